"""Nearest neighbours among unit vectors by cosine: exact below 100,000 rows, faiss' inverted lists above.

Exact search is blocks of matrix products: as fast as faiss' flat index, and comparing all rows with each
other takes half the work. Above, comparing all with all would take many minutes, and an IVF index pays.

It is saved beside the feature store. The file's name holds the number of rows and a hash of what is indexed,
so an index that does not fit the cache any more is never read: it is built anew and replaced. A cache that
cannot be written to, or has no room, keeps the index in memory.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mirip_fast.data.csv_reader import counted, shown
from mirip_fast.data.stratify import members_of
from mirip_fast.data.table import or_none
from mirip_fast.errors import DiskFullError, RunNotFoundError, StoreError
from mirip_fast.features.datasets import Dataset, find_datasets
from mirip_fast.features.recipe import series_name
from mirip_fast.features.store import FeatureStore, differing_fields
from mirip_fast.files import write_atomically

log = logging.getLogger(__name__)

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]

#: From this many rows on an index is built.
FLAT_ROWS = 100_000
#: Share of sampled vectors whose true nearest neighbour the index is to find.
WANTED_RECALL = 0.99

_BLOCK = 2048
_LIST_BLOCK = 1024
_SAMPLE = 256  # vectors that the recall is measured on
_TRAIN_PER_LIST = 64
_LEAST_PROBES = 8  # near copies can lie on both sides of a border between lists
_MAX_LINKS = 1 << 22  # links kept before they are merged: 64 MiB


@dataclass(frozen=True)
class Vectors:
    """n unit vectors of D numbers that are read when they are needed.

    Attributes:
        count: n.
        width: D.
        read: int64 [m] numbers of vectors → float32 [m, D], each of length 1 (or all zero).
        key: names the content; equal keys, equal vectors.
    """

    count: int
    width: int
    read: Callable[[IntArray], FloatArray]
    key: str = ""

    def blocks(self, size: int = 4 * _BLOCK) -> Iterator[tuple[int, FloatArray]]:
        """(number of the first, [≤ size, D]) of all vectors in order."""
        for start in range(0, self.count, size):
            yield start, self.read(np.arange(start, min(start + size, self.count)))


class Index(Protocol):
    """What searches the vectors that it was made of."""

    def nearest(self, queries: FloatArray, k: int) -> tuple[IntArray, FloatArray]:
        """The k nearest of each query, the nearest first.

        Args:
            queries: [q, D] unit vectors.
            k: neighbours wanted.

        Returns:
            Numbers of vectors [q, k], −1 where there are no more, and their cosines [q, k].
        """

    def links(self, threshold: float) -> Iterator[tuple[IntArray, IntArray]]:
        """All pairs with a cosine of at least ``threshold``, in pieces: numbers [m] and numbers [m]."""


def unit(rows: NDArray[np.floating]) -> FloatArray:
    """Rows [n, D] scaled to length 1, float32; rows of zeros stay zero."""
    values = np.asarray(rows, np.float32)
    length = np.linalg.norm(values, axis=1, keepdims=True)
    return (values / np.where(length > 0, length, np.float32(1))).astype(np.float32, copy=False)


class ExactIndex:
    """Compares with every vector; all of them are held in memory (4 D bytes each)."""

    def __init__(self, vectors: Vectors):
        self._rows = np.empty((vectors.count, vectors.width), np.float32)
        for start, block in vectors.blocks():
            self._rows[start : start + len(block)] = block

    def nearest(self, queries: FloatArray, k: int) -> tuple[IntArray, FloatArray]:
        """See :class:`Index`; equal cosines in the order of the vectors."""
        numbers = np.full((len(queries), k), -1, np.int64)
        cosines = np.full((len(queries), k), -np.inf, np.float32)
        step = max(1, _MAX_LINKS // max(1, len(self._rows)))
        for start in range(0, len(queries), step):
            for i, row in enumerate(queries[start : start + step] @ self._rows.T, start):
                best = _largest(row, k)
                numbers[i, : len(best)], cosines[i, : len(best)] = best, row[best]
        return numbers, cosines

    def links(self, threshold: float) -> Iterator[tuple[IntArray, IntArray]]:
        """See :class:`Index`; each pair once, but equal vectors are linked to their first only."""
        # Thousands of equal vectors (blank pages) would be millions of pairs: a star joins them, too.
        first = first_equal(self._rows, {})
        is_first = first == np.arange(len(first))
        yield first[~is_first], np.flatnonzero(~is_first)
        different = np.flatnonzero(is_first)
        for i in range(0, len(different), _BLOCK):
            left = self._rows[different[i : i + _BLOCK]]
            for j in range(i, len(different), _BLOCK):
                close = left @ self._rows[different[j : j + _BLOCK]].T >= threshold
                one, two = np.nonzero(np.triu(close, 1) if i == j else close)
                yield different[one + i], different[two + j]


def _largest(values: FloatArray, k: int) -> IntArray:
    """Positions of the k largest values, the largest first; equal ones by position."""
    candidates = np.arange(len(values))
    if k < len(values):
        candidates = np.flatnonzero(
            values >= np.partition(values, len(values) - k)[len(values) - k]
        )
    return candidates[np.lexsort((candidates, -values[candidates]))[:k]]


def first_equal(rows: FloatArray, known: dict[bytes, int], start: int = 0) -> IntArray:
    """[n]: the number of the first vector that is the same to the last bit as each of ``rows``.

    Args:
        rows: [n, D], with the numbers ``start``, ``start`` + 1 …
        known: what earlier calls have seen; is added to.
        start: number of the first row.
    """
    keys = (blake2b(row.tobytes(), digest_size=16).digest() for row in rows)
    numbers = [known.setdefault(key, i) for i, key in enumerate(keys, start)]
    return np.array(numbers, dtype=np.int64)


def groups_of(count: int, links: Iterator[tuple[IntArray, IntArray]]) -> IntArray:
    """Join what is linked, directly or through others.

    Args:
        count: n, numbers go from 0 to n − 1.
        links: pairs of numbers, in pieces.

    Returns:
        [n] int64: the smallest number of the group that each belongs to.
    """
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import connected_components

    group = np.arange(count, dtype=np.int64)
    waiting: list[tuple[IntArray, IntArray]] = []

    def merge() -> None:
        nonlocal group
        one = np.concatenate([group, *(group[a] for a, _ in waiting)])
        two = np.concatenate([np.arange(count), *(group[b] for _, b in waiting)])
        graph = csr_matrix((np.ones(len(one), np.int8), (one, two)), shape=(count, count))
        _, label = connected_components(graph, directed=False)
        first = np.full(count, count, np.int64)
        np.minimum.at(first, label, np.arange(count))
        group = first[label]
        waiting.clear()

    for one, two in links:
        new = group[one] != group[two]
        if new.any():
            waiting.append((one[new], two[new]))
            if sum(len(a) for a, _ in waiting) > _MAX_LINKS:
                merge()
    if waiting:
        merge()
    return group


def open_index(vectors: Vectors, folder: Path | None, name: str) -> Index:
    """What searches ``vectors``: exact below :data:`FLAT_ROWS`, else a saved or new approximate index.

    Args:
        vectors: what to search.
        folder: the store's folder, where the index is kept; None keeps it in memory.
        name: the series, part of the file's name.

    Raises:
        StoreError: so many vectors need faiss, and it is not installed.
    """
    if vectors.count < FLAT_ROWS:
        return ExactIndex(vectors)
    faiss = _faiss(vectors.count)
    path = None
    if folder is not None:
        path = folder / f"neighbours-{name}-{vectors.count}-{vectors.key[:16]}.faiss"
        saved = _read(faiss, path, vectors)
        if saved is not None:
            return saved
    index = _build(faiss, vectors)
    if path is not None:
        _save(faiss, path, index, name)
    return index


class ListIndex:
    """Inverted lists: vectors are grouped around centres, and only the nearest lists are searched."""

    def __init__(self, index: Any, vectors: Vectors):
        self.index = index
        self._vectors = vectors

    def nearest(self, queries: FloatArray, k: int) -> tuple[IntArray, FloatArray]:
        """See :class:`Index`; approximate."""
        cosines, numbers = self.index.search(np.ascontiguousarray(queries), k)
        return numbers.astype(np.int64), cosines

    def links(self, threshold: float) -> Iterator[tuple[IntArray, IntArray]]:
        """See :class:`Index`; approximate, a pair may come twice."""
        faiss = _faiss(self._vectors.count)
        known: dict[bytes, int] = {}
        wanted = faiss.SearchParametersIVF(nprobe=self._probes_for_copies(faiss, threshold))
        for start, block in self._vectors.blocks(_LIST_BLOCK):
            first = first_equal(block, known, start)
            own = np.arange(start, start + len(block))
            yield first, own
            queries = np.flatnonzero(first == own)
            bounds, _, numbers = self.index.range_search(
                block[queries], float(threshold), params=wanted
            )
            yield (
                np.repeat(own[queries], np.diff(bounds.astype(np.int64))),
                numbers.astype(np.int64),
            )

    def _probes_for_copies(self, faiss: Any, threshold: float) -> int:
        """Lists to search so that copies at a cosine of ``threshold`` are found.

        Sampled vectors are moved to that cosine in random directions, and looked for.
        """
        rng = np.random.default_rng(1)
        count, lists = self._vectors.count, int(self.index.nlist)
        rows = self._vectors.read(np.sort(rng.choice(count, min(_SAMPLE, count), replace=False)))
        noise = rng.standard_normal(rows.shape, dtype=np.float32)
        across = unit(noise - (noise * rows).sum(axis=1, keepdims=True) * rows)
        cosine = min(threshold, 1.0)
        moved = np.float32(cosine) * rows + np.float32((1 - cosine**2) ** 0.5) * across
        probes = _LEAST_PROBES
        while True:
            params = faiss.SearchParametersIVF(nprobe=probes)
            cosines, _ = self.index.search(moved, 1, params=params)
            found = float((cosines[:, 0] >= cosine - 1e-3).mean())  # half precision rounds
            if found >= WANTED_RECALL or probes >= lists // 4:
                log.info(
                    "Near duplicates: %d of %d lists searched, %.1f %% found",
                    probes,
                    lists,
                    100 * found,
                )
                return probes
            probes = min(2 * probes, lists // 4)


def _faiss(rows: int) -> Any:
    try:
        import faiss
    except ImportError as error:
        raise StoreError(
            f"Searching {rows:,} images needs the package faiss, which cannot be loaded ({error}): "
            f"`pip install faiss-cpu`. (Below {FLAT_ROWS:,} images it is not needed.)"
        ) from error
    return faiss


def _build(faiss: Any, vectors: Vectors) -> ListIndex:
    started = time.monotonic()
    lists = round(vectors.count**0.5)
    index = faiss.index_factory(vectors.width, f"IVF{lists},SQfp16", faiss.METRIC_INNER_PRODUCT)
    index.cp.max_points_per_centroid = _TRAIN_PER_LIST
    index.cp.niter = 8
    rng = np.random.default_rng(0)
    sample = rng.choice(vectors.count, min(vectors.count, lists * _TRAIN_PER_LIST), replace=False)
    index.train(vectors.read(np.sort(sample)))
    for _, block in vectors.blocks():
        index.add(block)
    queries = np.sort(rng.choice(vectors.count, min(_SAMPLE, vectors.count), replace=False))
    recall = _choose_probes(index, vectors, queries, lists)
    log.info(
        "Index of %s images built in %.1f s: %d of %d lists searched, which finds the nearest of "
        "%.1f %% of %d sampled images",
        *(f"{vectors.count:,}", time.monotonic() - started, index.nprobe, lists),
        *(100 * recall, len(queries)),
    )
    return ListIndex(index, vectors)


def _choose_probes(index: Any, vectors: Vectors, queries: IntArray, lists: int) -> float:
    """Search as few lists as reach the wanted recall, a quarter of all at most; returns the recall@1."""
    rows = vectors.read(queries)
    best = np.full(len(queries), -np.inf, np.float32)
    for start, block in vectors.blocks():
        cosines = rows @ block.T
        here = np.flatnonzero((queries >= start) & (queries < start + len(block)))
        cosines[here, queries[here] - start] = -np.inf  # not itself
        best = np.maximum(best, cosines.max(axis=1))
    probes = _LEAST_PROBES
    while True:
        index.nprobe = probes
        cosines, numbers = index.search(rows, 2)
        found = np.where(numbers[:, 0] == queries, cosines[:, 1], cosines[:, 0])
        recall = float((found >= best - 1e-3).mean())  # half precision rounds
        if recall >= WANTED_RECALL or probes >= lists // 4:
            return recall
        probes = min(2 * probes, lists // 4)


def _read(faiss: Any, path: Path, vectors: Vectors) -> ListIndex | None:
    if not path.is_file():
        return None
    try:
        index = faiss.read_index(str(path))
    except RuntimeError as error:
        log.warning("%s cannot be read and is built anew (%s)", path, str(error).splitlines()[-1])
        return None
    if (index.ntotal, index.d) != (vectors.count, vectors.width):
        return None
    return ListIndex(index, vectors)


def _save(faiss: Any, path: Path, index: ListIndex, name: str) -> None:
    def write(stream: IO[bytes]) -> None:
        faiss.write_index(index.index, faiss.PyCallbackIOWriter(stream.write))

    try:
        write_atomically(path, write)
        for old in path.parent.glob(f"neighbours-{name}-*.faiss"):
            if old != path:
                old.unlink()
    except (OSError, DiskFullError, RuntimeError) as error:
        log.warning("The index is kept in memory only: %s", error)


@dataclass(frozen=True)
class Work:
    """One image file, and what is known about it.

    Attributes:
        path: the file.
        image_id: its name in its data set.
        sha256: of the file's bytes.
        tier: name of its tier, None where it has no grade.
    """

    path: Path
    image_id: str
    sha256: bytes
    tier: str | None = None


@dataclass(frozen=True)
class Gallery:
    """Works, and the features of their contents: n vectors for n different contents.

    Attributes:
        works: every file, also several with the same content.
        hashes: SHA-256 of each content, [n].
        vectors: the CLS token of each content's base view, scaled to length 1.
        folder: the store's folder, where an index of the vectors may be kept.
        series: name of the series the vectors come from.
    """

    works: tuple[Work, ...]
    hashes: tuple[bytes, ...]
    vectors: Vectors
    folder: Path
    series: str

    def works_of(self, number: int) -> list[Work]:
        """The files that have content ``number``."""
        return self._files[self.hashes[number]]

    @cached_property
    def _files(self) -> dict[bytes, list[Work]]:
        files: dict[bytes, list[Work]] = {}
        for work in self.works:
            files.setdefault(work.sha256, []).append(work)
        return files


def reference_dataset(cache_dir: Path, source: Path | None) -> Dataset:
    """The data set that says how images are looked at: that of ``source``, else the newest.

    Raises:
        RunNotFoundError: nothing is embedded, or not ``source``.
    """
    datasets = find_datasets(cache_dir)
    if not datasets:
        raise RunNotFoundError(
            f"Nothing is embedded in {cache_dir.resolve()} yet: run `mirip-fast embed data/` first."
        )
    if source is None:
        return datasets[0]
    for dataset in datasets:
        if dataset.is_called(source):
            return dataset
    raise RunNotFoundError(
        f"{source}: not embedded in {cache_dir.resolve()} yet (there is: "
        f"{', '.join(shown(dataset.source) for dataset in datasets[:5])}); "
        f"run `mirip-fast embed {source}` first."
    )


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


def works_of_datasets(datasets: Iterable[Dataset]) -> list[Work]:
    """Every embedded file once; a file of several data sets as the first of them knows it."""
    found: dict[Path, Work] = {}
    for dataset in datasets:
        images = dataset.embedded()
        columns = (images["file"], images["image_id"], images["sha256"], or_none(images["tier"]))
        for file, image_id, sha256, tier in zip(*columns, strict=True):
            work = Work(Path(file), image_id, sha256, tier)
            found.setdefault(work.path, work)
    return list(found.values())


def base_series(dataset: Dataset) -> str:
    """The series with the CLS token of the whole image."""
    return series_name(dataset.views()[0], "cls")


def open_gallery(works: Sequence[Work], stores: Sequence[FeatureStore], series: str) -> Gallery:
    """Find the features of works.

    Args:
        works: image files; those without features in any store are left out, and told.
        stores: stores of one fingerprint; the first that has a row wins.
        series: the series to compare.

    Raises:
        StoreError: none of the works has features.
    """
    hashes = sorted({work.sha256 for work in works})  # one order, whatever the order of the works
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
    known = set(kept)
    present = tuple(work for work in works if work.sha256 in known)
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

    key = hashlib.sha256(f"{first.fingerprint_id}/{series}/".encode() + b"".join(kept)).hexdigest()
    return Gallery(present, kept, Vectors(len(kept), width, read, key), stores[0].path, series)


def near_groups(gallery: Gallery, threshold: float, index: Index | None = None) -> list[list[int]]:
    """Contents that look alike, directly or through others, the largest group first; each is in one.

    Args:
        gallery: the works.
        threshold: cosine from which on two contents are near duplicates.
        index: searches ``gallery.vectors``, where it is open already.
    """
    index = index or open_index(gallery.vectors, gallery.folder, gallery.series)
    group = groups_of(gallery.vectors.count, index.links(threshold))
    members = (numbers.tolist() for numbers in members_of(group.tolist())[1])
    return sorted(members, key=lambda numbers: (-len(numbers), numbers))


def stores_of(datasets: Iterable[Dataset]) -> list[FeatureStore]:
    """The stores of data sets, each once."""
    paths = dict.fromkeys(dataset.store_path for dataset in datasets)
    return [FeatureStore.open(path) for path in paths]
