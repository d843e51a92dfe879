"""Pairs of images for code that trains on batches of two images: the documented dataset."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mirip_fast.config import DataConfig
from mirip_fast.data.images import load_rgb
from mirip_fast.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pandas as pd
    from PIL.Image import Image


class PairwiseDataset:
    """Pairs of images of different tiers, as (first image, second image, label).

    A map-style dataset for ``torch.utils.data.DataLoader``. The label is 1.0 where the first image is the
    better one and −1.0 where the second is; which comes first is drawn, the same way for the same seed.

    Args:
        metadata: table with the columns ``filename`` (or ``image_path``, as ``embed`` reads it) and ``tier``.
        image_dir: folder of the files.
        transform: PIL image → what the model takes; None gives PIL images.
        pairs: ``sampled`` draws one partner of another tier for every image (the classic recipe);
            ``all`` has every pair of different tiers, without keeping a list of them.
        seed: of partners and order.
        tiers: names of the tiers, best first.

    Raises:
        DataError: a column is missing, a tier is unknown, or all images have one tier.
        ConfigError: ``pairs`` is neither.
    """

    def __init__(
        self,
        metadata: pd.DataFrame,
        image_dir: str | Path,
        transform: Callable[[Image], Any] | None = None,
        *,
        pairs: str = "sampled",
        seed: int = 42,
        tiers: Sequence[str] = DataConfig().tier_names(),
    ):
        if pairs not in ("sampled", "all"):
            raise ConfigError(f"pairs={pairs!r}: use 'sampled' or 'all'")
        file = next((name for name in ("filename", "image_path") if name in metadata.columns), None)
        absent = ["filename (or image_path)"] * (file is None)
        absent += ["tier"] * ("tier" not in metadata.columns)
        if absent:
            there = ", ".join(map(str, metadata.columns))
            raise DataError(f"the metadata has no column {', '.join(absent)}; it has {there}")
        names = [str(tier) for tier in metadata["tier"]]
        unknown = sorted(set(names) - set(tiers))
        if unknown:
            raise DataError(f"unknown tiers {', '.join(unknown)}; known are {', '.join(tiers)}")
        self.paths = [os.path.join(image_dir, str(name)) for name in metadata[file]]  # noqa: PTH118
        self.tier_names = tuple(tiers)
        self.tiers = np.array([list(tiers).index(name) for name in names], dtype=np.int64)
        if len(set(names)) < 2:
            raise DataError("pairs need images of at least two tiers")
        self.transform = transform
        self.seed = seed
        self._order = np.argsort(self.tiers, kind="stable")  # best tier first
        ordered = self.tiers[self._order]
        # In that order an image is better than all that follow its own tier.
        self._first_worse = np.searchsorted(ordered, ordered, side="right")
        self._ends = np.cumsum(len(ordered) - self._first_worse)  # pairs up to each image
        self._drawn = self._draw() if pairs == "sampled" else None

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._drawn is None else len(self._drawn)

    def __getitem__(self, index: int) -> tuple[Any, Any, float]:
        first, second, label = self.pair(index)
        return self._item(first), self._item(second), label

    def pair(self, index: int) -> tuple[int, int, float]:
        """Pair number ``index`` as (row of the first image, row of the second, label)."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        index %= len(self)
        better, worse = self._ranked_pair(index)
        if np.random.default_rng([self.seed, index]).random() < 0.5:
            return worse, better, -1.0
        return better, worse, 1.0

    def _ranked_pair(self, index: int) -> tuple[int, int]:
        """(row of the better image, row of the worse one)."""
        if self._drawn is not None:
            better, worse = self._drawn[index]
            return int(better), int(worse)
        position = int(np.searchsorted(self._ends, index, side="right"))
        before = int(self._ends[position - 1]) if position else 0
        other = int(self._first_worse[position]) + index - before
        return int(self._order[position]), int(self._order[other])

    def _draw(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """For every image one partner of another tier, drawn uniformly: [n, 2], the better one first."""
        rng = np.random.default_rng(self.seed)
        drawn = []
        for row, tier in enumerate(self.tiers):
            others = np.flatnonzero(self.tiers != tier)
            other = int(rng.choice(others))
            drawn.append((row, other) if tier < self.tiers[other] else (other, row))
        return np.array(drawn, dtype=np.int64)

    def _item(self, row: int) -> Any:
        image = self._load_image(self.paths[row])
        return image if self.transform is None else self.transform(image)

    def _load_image(self, path: str) -> Image:
        """Read one image; a subclass may keep images in memory here."""
        return load_rgb(Path(path))
