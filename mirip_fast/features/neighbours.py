"""Near neighbours among unit vectors by cosine.

The nearest of one are found by comparing it with all. All near pairs are found in blocks of matrix products
below 100,000 vectors; above, that would take many minutes, and faiss looks only among those that lie in
the same direction.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mirip_fast.data.splits import members_of
from mirip_fast.data.table import or_none
from mirip_fast.errors import RunNotFoundError, StoreError
from mirip_fast.features.datasets import Dataset, find_datasets
from mirip_fast.features.recipe import series_name
from mirip_fast.features.store import FeatureStore, differing_fields
from mirip_fast.text import counted, shown

log = logging.getLogger(__name__)

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]

#: From this many rows on near pairs are looked for in inverted lists.
FLAT_ROWS = 100_000
#: Share of copies, at the cosine asked for, that the lists searched are to hold.
WANTED_RECALL = 0.99

_BLOCK = 2048
_SAMPLE = 256  # vectors that the recall is measured on
_TRAIN_PER_LIST = 64
_LEAST_PROBES = 8  # near copies can lie on both sides of a border between lists


def unit(rows: NDArray[np.floating]) -> FloatArray:
    """Rows [n, D] scaled to length 1, float32; rows of zeros stay zero."""
    values = np.asarray(rows, np.float32)
    length = np.linalg.norm(values, axis=1, keepdims=True)
    return (values / np.where(length > 0, length, np.float32(1))).astype(np.float32, copy=False)


#: What is known of a work: its file, its name in its data set, SHA-256 of the file's bytes, tier or None.
Work = tuple[str, str, bytes, str | None]
WORK = ["file", "image_id", "sha256", "tier"]


@dataclass(frozen=True)
class Gallery:
    """Works, and a unit vector of D numbers for each of their n different contents, read when it is needed.

    Attributes:
        works: every file, also several with the same content; see :data:`WORK`.
        hashes: SHA-256 of each content, [n].
        width: D.
        read: int64 [m] numbers of contents → float32 [m, D], the CLS token of the base view, of length 1 (or
            all zero).
    """

    works: pd.DataFrame
    hashes: tuple[bytes, ...]
    width: int
    read: Callable[[IntArray], FloatArray]

    def works_of(self, number: int) -> list[Work]:
        """The files that have content ``number``."""
        return self._files[self.hashes[number]]

    @cached_property
    def _files(self) -> dict[bytes, list[Work]]:
        files: dict[bytes, list[Work]] = {}
        for work in zip(*(or_none(self.works[name]) for name in WORK), strict=True):
            files.setdefault(work[2], []).append(work)
        return files

    def nearest(self, query: FloatArray, k: int) -> tuple[IntArray, FloatArray]:
        """The k contents nearest to ``query`` [D], the nearest first: numbers and cosines, [≤ k] each.

        Equal cosines are in the order of the contents.
        """
        parts = [np.empty(0, np.float32), *(block @ query for _, block in self._blocks())]
        cosines = np.concatenate(parts)
        best = np.argsort(-cosines, kind="stable")[:k]
        return best, cosines[best]

    def groups(self, threshold: float) -> list[list[int]]:
        """Contents with a cosine of at least ``threshold``, directly or through others; each is in one group.

        The largest group comes first. From :data:`FLAT_ROWS` on it is approximate; equal vectors are always
        together.

        Raises:
            StoreError: so many vectors need faiss, which cannot be loaded.
        """
        # Thousands of equal vectors (blank pages) would be millions of pairs: a star joins them, too.
        seen: dict[bytes, int] = {}
        keys = (
            blake2b(row.tobytes(), digest_size=16).digest()
            for _, block in self._blocks()
            for row in block
        )
        group = np.array([seen.setdefault(key, i) for i, key in enumerate(keys)], np.int64)
        different = np.flatnonzero(group == np.arange(len(self.hashes)))
        links = self._links if len(self.hashes) < FLAT_ROWS else self._listed_links
        for one, two in links(different, threshold):
            group = joined_groups(group, one, two)
        members = (numbers.tolist() for numbers in members_of(group.tolist())[1])
        return sorted(members, key=lambda numbers: (-len(numbers), numbers))

    def _blocks(self) -> Iterator[tuple[int, FloatArray]]:
        for start in range(0, len(self.hashes), _BLOCK):
            yield start, self.read(np.arange(start, min(start + _BLOCK, len(self.hashes))))

    def _links(self, numbers: IntArray, threshold: float) -> Iterator[tuple[IntArray, IntArray]]:
        """All near pairs of some vectors, in pieces: numbers [m] and numbers [m]."""
        rows = self.read(numbers)
        for i in range(0, len(rows), _BLOCK):
            for j in range(i, len(rows), _BLOCK):
                close = rows[i : i + _BLOCK] @ rows[j : j + _BLOCK].T >= threshold
                one, two = np.nonzero(np.triu(close, 1) if i == j else close)
                yield numbers[one + i], numbers[two + j]

    def _listed_links(
        self, numbers: IntArray, threshold: float
    ) -> Iterator[tuple[IntArray, IntArray]]:
        """The same among vectors that are grouped around centres: only the nearest lists are searched."""
        faiss = _faiss(len(self.hashes))
        lists = round(len(self.hashes) ** 0.5)
        index = faiss.index_factory(self.width, f"IVF{lists},SQfp16", faiss.METRIC_INNER_PRODUCT)
        index.cp.max_points_per_centroid = _TRAIN_PER_LIST
        index.cp.niter = 8
        index.train(self._sample(lists * _TRAIN_PER_LIST))
        for _, block in self._blocks():
            index.add(block)
        self._choose_probes(index, lists, threshold)
        for start in range(0, len(numbers), _BLOCK):
            asked = numbers[start : start + _BLOCK]
            bounds, _, found = index.range_search(self.read(asked), float(threshold))
            yield np.repeat(asked, np.diff(bounds.astype(np.int64))), found.astype(np.int64)

    def _choose_probes(self, index: Any, lists: int, threshold: float) -> None:
        """Search as few lists as find copies at a cosine of ``threshold``, a quarter of all at most.

        Sampled vectors are moved to that cosine in random directions, and looked for.
        """
        rows, cosine = self._sample(_SAMPLE), min(threshold, 1.0)
        noise = np.random.default_rng(1).standard_normal(rows.shape, dtype=np.float32)
        across = unit(noise - (noise * rows).sum(axis=1, keepdims=True) * rows)
        moved = np.float32(cosine) * rows + np.float32((1 - cosine**2) ** 0.5) * across
        index.nprobe = _LEAST_PROBES
        while True:
            found = float(
                (index.search(moved, 1)[0] >= cosine - 1e-3).mean()
            )  # half precision rounds
            if found >= WANTED_RECALL or index.nprobe >= lists // 4:
                break
            index.nprobe = min(2 * index.nprobe, lists // 4)
        log.info(
            "Near duplicates: %d of %d lists searched, %.1f %% found",
            *(index.nprobe, lists, 100 * found),
        )

    def _sample(self, most: int) -> FloatArray:
        rng = np.random.default_rng(0)
        return self.read(
            np.sort(rng.choice(len(self.hashes), min(len(self.hashes), most), replace=False))
        )


def joined_groups(group: IntArray, one: IntArray, two: IntArray) -> IntArray:
    """Join the groups of linked things.

    Args:
        group: [n] the smallest number of the group that each is in.
        one: [m] numbers of things.
        two: [m] what each is linked to.

    Returns:
        [n] int64, in the same way.
    """
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import connected_components

    new, n = group[one] != group[two], len(group)
    if not new.any():
        return group
    pairs = np.r_[np.arange(n), one[new]], np.r_[group, two[new]]
    graph = csr_matrix((np.ones(len(pairs[0]), np.int8), pairs), shape=(n, n))
    _, label = connected_components(graph, directed=False)
    joined: IntArray = np.unique(label, return_index=True)[1][label]
    return joined


def _faiss(rows: int) -> Any:
    try:
        import faiss
    except ImportError as error:
        raise StoreError(
            f"Comparing {rows:,} images needs the package faiss, which cannot be loaded ({error}): "
            f"`pip install faiss-cpu`. (Below {FLAT_ROWS:,} images it is not needed.)"
        ) from error
    return faiss


def datasets_like(store: FeatureStore, caches: Iterable[Path]) -> list[Dataset]:
    """The data sets in cache folders whose features can be compared with those in ``store``.

    Raises:
        RunNotFoundError: a cache has no data set.
        StoreError: a cache has other features only; names the differing fields.
    """
    found = []
    for cache in caches:
        datasets = find_datasets(cache)
        if not datasets:
            raise RunNotFoundError(f"{cache}: no data set is embedded in this cache")
        same = [d for d in datasets if d.store_path.name == store.fingerprint_id]
        if not same:
            other = FeatureStore.open(datasets[0].store_path)
            raise StoreError(
                f"The features in {cache} cannot be compared with those in {store.path} "
                f"({differing_fields(store.fingerprint, other.fingerprint)}). Embed "
                f"{shown(datasets[0].source)} in the same way, with the same --backbone, "
                "--image-size and so on."
            )
        if len(same) < len(datasets):
            other_way = counted(len(datasets) - len(same), "data set")
            log.info("%s: %s embedded in another way left out", cache, other_way)
        found += same
    return found


def works_of_datasets(datasets: Iterable[Dataset]) -> pd.DataFrame:
    """Every embedded file once, see :data:`WORK`; one of several data sets as the first of them knows it."""
    tables = [dataset.embedded()[WORK].astype({"tier": object}) for dataset in datasets]
    empty = pd.DataFrame(columns=WORK, dtype=object)
    return pd.concat([empty, *tables]).drop_duplicates("file", ignore_index=True)


def base_series(dataset: Dataset) -> str:
    """The series with the CLS token of the whole image."""
    return series_name(dataset.views()[0], "cls")


def open_gallery(works: pd.DataFrame, stores: Sequence[FeatureStore], series: str) -> Gallery:
    """Find the features of works.

    Args:
        works: image files, see :data:`WORK`; those without features in any store are left out, and told.
        stores: stores of one fingerprint; the first that has a row wins.
        series: the series to compare.

    Raises:
        StoreError: none of the works has features.
    """
    hashes = sorted(set(works["sha256"]))  # one order, whatever the order of the works
    store_of = np.full(len(hashes), -1, np.int64)
    row_of = np.full(len(hashes), -1, np.int64)
    for i, store in enumerate(stores):
        rows = store.rows(series, hashes)
        new = (store_of < 0) & (rows >= 0)
        store_of[new], row_of[new] = i, rows[new]
    there = np.flatnonzero(store_of >= 0)
    if not len(there):
        raise StoreError(
            f"{stores[0].path} has no features ({series}) of any of the {len(works)} images: run "
            "`mirip-fast embed` again."
        )
    kept = tuple(hashes[i] for i in there.tolist())
    known = set(kept)  # Series.isin would take the zeros at the end of bytes for padding
    present = works[works["sha256"].map(known.__contains__)]
    if len(present) < len(works):
        lost = counted(len(works) - len(present), "image")
        log.warning("%s without features in the cache left out; embed again to include them", lost)
    store_of, row_of = store_of[there], row_of[there]
    first = stores[int(store_of[0])]
    width = int(first.series()[series].shape[0])

    def read(numbers: IntArray) -> FloatArray:
        found = np.empty((len(numbers), width), np.float32)
        for i, store in enumerate(stores):
            here = np.flatnonzero(store_of[numbers] == i)
            if len(here):
                found[here] = unit(store.read(series, row_of[numbers[here]]))
        return found

    return Gallery(present, kept, width, read)


def stores_of(datasets: Iterable[Dataset]) -> list[FeatureStore]:
    """The stores of data sets, each once."""
    paths = dict.fromkeys(dataset.store_path for dataset in datasets)
    return [FeatureStore.open(path) for path in paths]
