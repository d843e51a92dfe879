"""Cached features of graded images, in memory: what phase two trains on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mirip_fast.errors import StoreError
from mirip_fast.features.pooling import head_input, head_kinds
from mirip_fast.features.recipe import series_name
from mirip_fast.features.store import FeatureStore
from mirip_fast.features.views import View


@dataclass(frozen=True)
class Rows:
    """n images of one split.

    Attributes:
        ids: image ids, [n].
        features: [n, V, D] float32, V views of D numbers each, the base view first.
        tiers: [n] int64, 0 is the best tier.
        groups: [n], None for an image that is its own group.
        within: [n] int64 codes of the column inside which pairs count, or None for all pairs.
    """

    ids: Sequence[str]
    features: NDArray[np.float32]
    tiers: NDArray[np.int64]
    groups: Sequence[str | None]
    within: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.tiers)

    @property
    def input_dim(self) -> int:
        """D, numbers per feature row."""
        return int(self.features.shape[2])


def read_features(
    store: FeatureStore, hashes: Sequence[bytes], features: str, views: Sequence[View]
) -> NDArray[np.float32]:
    """Read what a head sees of every image: [n, V, D] float32, in the order of ``hashes``.

    Args:
        store: where the rows are.
        hashes: SHA-256 of the images' bytes.
        features: ``cls``, ``mean`` or ``cls+mean``.
        views: the views to read.

    Raises:
        StoreError: a series or a row is missing; says which.
    """
    there = store.series()
    per_view = []
    for view in views:
        parts = []
        for kind in head_kinds(features):
            name = series_name(view, kind)
            if name not in there:
                raise StoreError(
                    f"{store.path} has no series {name}; it has {', '.join(sorted(there))}. "
                    "Run `mirip-fast embed` with --patches and --tta that include it."
                )
            rows = store.rows(name, hashes)
            if (rows < 0).any():
                raise StoreError(
                    f"{store.path}: {int((rows < 0).sum())} of {len(hashes)} images have no {name} yet. "
                    "Run `mirip-fast embed` again to complete them."
                )
            parts.append(store.read(name, rows))
        per_view.append(head_input(parts))
    return np.stack(per_view, axis=1)
