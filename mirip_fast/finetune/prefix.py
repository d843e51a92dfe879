"""The frozen blocks' tokens, computed once and kept: what ``last:N`` needs of the others.

Without pixel augmentation the frozen first blocks give the same tokens for an image in every epoch (they
are in eval mode, with neither dropout nor stochastic depth). They are kept in a feature store of their
own, whose fingerprint is that of phase one with the cut, in the number format in which they come out of
the block: float32 too under bf16 autocast, where the residual stream is float32.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mirip_fast.config import FinetuneConfig
from mirip_fast.data.decode_pool import DecodeJob, DecodePool
from mirip_fast.data.images import UTMOST_PIXELS
from mirip_fast.errors import ConfigError, DataError
from mirip_fast.features.recipe import Recipe
from mirip_fast.features.store import FeatureStore, SeriesSpec, fingerprint_id
from mirip_fast.files import disk_full, format_bytes
from mirip_fast.finetune.memory import Passes
from mirip_fast.finetune.model import ScoringModel
from mirip_fast.finetune.plan import Sample
from mirip_fast.finetune.strategy import Strategy
from mirip_fast.runtime import torch_dtype

log = logging.getLogger(__name__)

_BATCH = 16  # images per pass through the prefix, where memory allows
_SPARE = 64 << 20  # bytes of disk left for everything else


def check_prefix(settings: FinetuneConfig, strategy: Strategy) -> None:
    """Refuse what would change the tokens from epoch to epoch.

    Raises:
        ConfigError: names all settings in the way.
    """
    wrong = []
    if strategy.kind != "last":
        wrong.append(f"--strategy last:N (not {settings.strategy})")
    if settings.augment != "none":
        wrong.append(f"--augment none (not {settings.augment})")
    for name in ("mixup", "cutmix", "patch_dropout"):
        if getattr(settings, name) > 0:
            wrong.append(f"--{name.replace('_', '-')} 0 (not {getattr(settings, name):g})")
    if wrong:
        raise ConfigError(
            "--cache-prefix keeps what the frozen blocks make of each image, which has to be the same in "
            f"every epoch: it needs {', '.join(wrong)}"
        )


def _tell_smaller(images: int) -> None:
    log.warning("Out of memory: tokens are computed of %d images at a time", images)


class Prefix:
    """Kept tokens of a backbone's first blocks.

    Args:
        model: its backbone's blocks before ``cut`` are frozen.
        cut: first block that is trained.
        recipe: phase one's recipe: backbone, preprocessing, precision.
        cache_dir: folder of the stores.
    """

    def __init__(self, model: ScoringModel, cut: int, recipe: Recipe, cache_dir: Path):
        self.model, self.cut, self.recipe = model, cut, recipe
        self.waited = 0.0
        self._passes = Passes(_BATCH, _tell_smaller)
        fingerprint = {**recipe.fingerprint, "store_dtype": "float32", "prefix_blocks": cut}
        self.store = FeatureStore.create(cache_dir / fingerprint_id(fingerprint), fingerprint)
        side = recipe.size // recipe.backbone.patch_size
        shape = (model.skipped + side * side, recipe.backbone.hidden_size)
        self.spec = SeriesSpec(f"tokens.{recipe.size}", shape, "float32")
        # What the blocks get besides tokens depends on the size alone: one black image tells.
        black = torch.zeros((1, recipe.size, recipe.size, 3), dtype=torch.uint8)
        self._tokens(black)

    def fill(self, paths: Sequence[Path], hashes: Sequence[bytes], workers: int) -> None:
        """Compute the tokens that are not there yet.

        Raises:
            DiskFullError: they do not fit on the disk; nothing was computed.
            DataError: an image can not be read, or has changed.
        """
        missing = self._missing(hashes)
        needed = self._disk_space(len(missing))
        free = shutil.disk_usage(self.store.path).free
        log.info(
            "Tokens before block %d: %d of %d images to compute, %s each; files of %s are made in %s, where "
            "%s are free",
            self.cut,
            len(missing),
            len(hashes),
            format_bytes(self.spec.row_bytes),
            format_bytes(needed),
            self.store.path,
            format_bytes(free),
        )
        if needed + _SPARE > free:
            raise disk_full(self.store.path, needed)
        if not missing:
            return
        mode = (self.recipe.size,), self.recipe.resize, self.recipe.decode == "fast"
        with DecodePool(workers) as pool, self.store.writer(command="train --full") as writer:
            # They were admitted when the data was read.
            decoded = pool.decode(
                DecodeJob(i, paths[i], *mode, max_pixels=UTMOST_PIXELS) for i in missing
            )
            while batch := list(islice(decoded, _BATCH)):
                for item in batch:
                    if item.reason or item.sha256 != hashes[item.index]:
                        why = item.reason or "its content changed while training began"
                        raise DataError(f"{paths[item.index]}: {why}")
                pixels = torch.from_numpy(np.stack([item.images[0] for item in batch]))
                writer.append([item.sha256 for item in batch], {self.spec: self._tokens(pixels)})
        self.store.refresh()

    def _disk_space(self, rows: int) -> int:
        """Bytes of the files that have to be made for so many rows; files are made whole."""
        name, files = self.spec.name, self.spec.shard_rows
        slots = sum(shard.rows for shard in self.store.shards(name))
        free = slots - len(self.store.valid_hashes(name))
        return -(-max(0, rows - free) // files) * files * self.spec.row_bytes

    def _missing(self, hashes: Sequence[bytes]) -> list[int]:
        """Index of the first image of each content that has no tokens yet."""
        rows = self.store.rows(self.spec.name, hashes)
        first: dict[bytes, int] = {}
        for i in np.flatnonzero(rows < 0).tolist():
            first.setdefault(hashes[i], i)
        return list(first.values())

    def _tokens(self, pixels: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
        self.model.eval()
        dtype = torch_dtype(self.recipe.precision)
        device = self.model.device

        def run(part: torch.Tensor) -> torch.Tensor:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                return self.model.prefix(part, self.cut).float().cpu()

        return self._passes.run(run, pixels).numpy()

    def load(
        self, hashes: Sequence[bytes], lists: Sequence[Sequence[Sample]]
    ) -> Iterator[torch.Tensor]:
        """Tokens [b, T, D] of each list of samples, in order.

        Args:
            hashes: content hash of each image that samples count.
            lists: the samples.
        """
        for samples in lists:
            started = time.perf_counter()
            rows = self.store.rows(self.spec.name, [hashes[sample.image] for sample in samples])
            tokens = torch.from_numpy(self.store.read(self.spec.name, rows))
            self.waited += time.perf_counter() - started
            yield tokens
