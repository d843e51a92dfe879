"""Cached features of graded images, in memory: what phase two trains on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mirip_fast.errors import StoreError
from mirip_fast.features.recipe import View, head_input, head_kinds, is_patches, series_name
from mirip_fast.features.shards import SeriesSpec
from mirip_fast.features.store import FeatureStore
from mirip_fast.models.model_info import ModelInfo

_PIECE = 4096  # rows read at a time


@dataclass(frozen=True)
class ListedPairs:
    """p pairs of images that somebody judged.

    Attributes:
        images: [p, 2] int64, rows of the two images.
        label: [p] int64; 1 the first is better, −1 the second, 0 a tie.
        weight: [p] float64, at least 0.
    """

    images: NDArray[np.int64]
    label: NDArray[np.int64]
    weight: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.label)

    @property
    def decided(self) -> int:
        """How many are no tie and weigh something: those that can be in the right order."""
        return int(((self.label != 0) & (self.weight > 0)).sum())

    @property
    def better_first(self) -> NDArray[np.int64]:
        """[:attr:`decided`, 2] the pairs that can be in the right order, the better image first."""
        decided = (self.label != 0) & (self.weight > 0)
        pairs = self.images[decided]
        result: NDArray[np.int64] = np.where(self.label[decided, None] > 0, pairs, pairs[:, ::-1])
        return result


@dataclass(frozen=True)
class Rows:
    """n images of one split.

    Attributes:
        ids: image ids, [n].
        features: [n, V, D] float32, V views of D numbers each, the base view first.
        tiers: [n] int64, 0 is the best tier; all −1 where the images have none.
        groups: [n], None for an image that is its own group.
        within: [n] int64 codes of the column inside which pairs count, or None for all pairs.
        tier_scores: [n] float64, higher is better; None unless the pairs come from them.
        grades: [n, G] int64 tiers by several graders, −1 for none: pairs are those of one grader's tiers.
            None: pairs are those of ``tiers``.
        pairs: the judged pairs among the images; None unless the pairs come from a file.
        attention: (numbers per token, tokens before the patch tokens) where a head attends to patch
            tokens; None: it takes a row as it is.
    """

    ids: Sequence[str]
    features: NDArray[np.float32]
    tiers: NDArray[np.int64]
    groups: Sequence[str | None]
    within: NDArray[np.int64] | None = None
    tier_scores: NDArray[np.float64] | None = None
    grades: NDArray[np.int64] | None = None
    pairs: ListedPairs | None = None
    attention: tuple[int, int] | None = None
    sets: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.tiers)

    @property
    def has_tiers(self) -> bool:
        """Whether the images have tiers."""
        return bool((self.tiers >= 0).all())

    def subset(self, index: NDArray[np.int64]) -> Rows:
        """The rows with these indexes, without judged pairs."""
        return dataclasses.replace(
            self,
            ids=[self.ids[i] for i in index],
            features=self.features[index],
            tiers=self.tiers[index],
            groups=[self.groups[i] for i in index],
            within=None if self.within is None else self.within[index],
            tier_scores=None if self.tier_scores is None else self.tier_scores[index],
            grades=None if self.grades is None else self.grades[index],
            pairs=None,
            sets=None if self.sets is None else self.sets[index],
        )

    @property
    def input_dim(self) -> int:
        """D, numbers per feature row."""
        return int(self.features.shape[2])


class JoinedStore(FeatureStore):
    """The store of a model's first backbone, in which those of its others stand as kinds of their own.

    ``mean@2.224`` is the series ``mean`` of the second store, of the view that stands where ``224`` stands
    in the first: features are joined here, and nothing that reads them knows of it.

    Args:
        stores: one per backbone.
        info: what looks through them.
    """

    def __init__(self, stores: Sequence[FeatureStore], info: ModelInfo):
        super().__init__(stores[0].path, stores[0].fingerprint)
        self._others: dict[str, tuple[FeatureStore, str]] = {}
        for number, (store, own) in enumerate(zip(stores[1:], info.more, strict=True), 2):
            for view, theirs in zip(info.views, own.views, strict=True):
                for kind in own.kinds:
                    name = series_name(view, f"{kind}@{number}")
                    self._others[name] = store, series_name(theirs, kind)

    def series(self) -> dict[str, SeriesSpec]:
        """The series of all backbones."""
        found = super().series()
        for name, (store, theirs) in self._others.items():
            if theirs in (there := store.series()):
                found[name] = there[theirs]
        return found

    def rows(self, series: str, hashes: Sequence[bytes]) -> NDArray[np.int64]:
        """[n] row of each content hash in the store that has the series, −1 where it has none."""
        if series not in self._others:
            return super().rows(series, hashes)
        store, theirs = self._others[series]
        return store.rows(theirs, hashes)

    def read(self, series: str, rows: NDArray[np.int64], *, finite: bool = True) -> NDArray[Any]:
        """[n, *shape] rows of a series."""
        if series not in self._others:
            return super().read(series, rows, finite=finite)
        store, theirs = self._others[series]
        return store.read(theirs, rows, finite=finite)


def open_store(cache_dir: Path, info: ModelInfo) -> FeatureStore:
    """What a model looks at in a cache folder, through all its backbones.

    Raises:
        StoreError: a backbone has no store there.
    """
    stores = [FeatureStore.open(cache_dir / each.fingerprint_id) for each in info.backbones]
    return JoinedStore(stores, info) if info.more else stores[0]


def read_features(
    store: FeatureStore, hashes: Sequence[bytes], features: str, views: Sequence[View]
) -> NDArray[np.float32]:
    """Read what a head sees of every image: [n, V, D] float32, in the order of ``hashes``.

    Args:
        store: where the rows are.
        hashes: SHA-256 of the images' bytes.
        features: kinds joined by +, such as ``cls+mean``.
        views: the views to read.

    Raises:
        StoreError: a series or a row is missing, or a feature is not finite; says which.
    """
    kinds = head_kinds(features)
    found = [[_rows_of(store, series_name(view, kind), hashes) for kind in kinds] for view in views]
    shapes = store.series()
    widths = {
        sum(math.prod(shapes[series_name(view, kind)].shape) for kind in kinds) for view in views
    }
    if len(widths) > 1:
        raise StoreError(
            f"{store.path}: views of several sizes have different numbers of patches, and one head looks at "
            "one number of them. Run `mirip-fast embed` with --patches grid:7, or without --tta."
        )
    (width,) = widths
    result = np.empty((len(hashes), len(views), width), np.float32)
    for v, (view, rows) in enumerate(zip(views, found, strict=True)):
        # In the order of the store and piece by piece, so that no feature is ever held twice.
        order = np.argsort(rows[0], kind="stable")
        for piece in np.array_split(order, max(1, -(-len(order) // _PIECE))):
            parts = [
                store.read(series_name(view, kind), of_kind[piece])
                for kind, of_kind in zip(kinds, rows, strict=True)
            ]
            result[piece, v] = head_input(parts)
    return result


def missing_rows(
    store: FeatureStore, hashes: Sequence[bytes], features: str, views: Sequence[View]
) -> int:
    """How many of n images lack something that :func:`read_features` would read."""
    names = [series_name(view, kind) for view in views for kind in head_kinds(features)]
    there = store.series()
    if any(name not in there for name in names):
        return len(hashes)
    return int(np.any([store.rows(name, hashes) < 0 for name in names], axis=0).sum())


def with_features(
    rows: Rows, store: FeatureStore, hashes: Sequence[bytes], features: str, views: Sequence[View]
) -> Rows:
    """``rows`` with :func:`read_features`, and where patch tokens begin if the last kind holds several.

    Raises:
        StoreError: a series or a row is missing, or a feature is not finite; says which.
    """
    read, attention, kinds = (
        read_features(store, hashes, features, views),
        None,
        head_kinds(features),
    )
    if is_patches(kinds[-1]):
        width = store.series()[series_name(views[0], kinds[-1])].shape[-1]
        attention = (int(width), len(kinds) - 1)
    return dataclasses.replace(rows, features=read, attention=attention)


def _rows_of(store: FeatureStore, name: str, hashes: Sequence[bytes]) -> NDArray[np.int64]:
    there = store.series()
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
    return rows
