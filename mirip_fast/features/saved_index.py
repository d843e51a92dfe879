"""An approximate index of many vectors (faiss, inverted lists), saved beside the feature store.

The file's name holds the number of rows and a hash of what is indexed, so an index that does not fit the
cache any more is never read: it is built anew and replaced. A cache that can not be written to, or has no
room, keeps the index in memory.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from mirip_fast.errors import DiskFullError, StoreError
from mirip_fast.features.neighbours import (
    FLAT_ROWS,
    ExactIndex,
    FloatArray,
    Index,
    IntArray,
    Vectors,
    first_equal,
    unit,
)
from mirip_fast.files import write_atomically

log = logging.getLogger(__name__)

#: Share of sampled vectors whose true nearest neighbour the index is to find.
WANTED_RECALL = 0.99

_SAMPLE = 256  # vectors that the recall is measured on
_TRAIN_PER_LIST = 64
_LEAST_PROBES = 8  # near copies can lie on both sides of a border between lists
_BLOCK = 1024


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
        """See :class:`mirip_fast.features.neighbours.Index`; approximate."""
        cosines, numbers = self.index.search(np.ascontiguousarray(queries), k)
        return numbers.astype(np.int64), cosines

    def links(self, threshold: float) -> Iterator[tuple[IntArray, IntArray]]:
        """See :class:`mirip_fast.features.neighbours.Index`; approximate, a pair may come twice."""
        faiss = _faiss(self._vectors.count)
        known: dict[bytes, int] = {}
        wanted = faiss.SearchParametersIVF(nprobe=self._probes_for_copies(faiss, threshold))
        for start, block in self._vectors.blocks(_BLOCK):
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
            f"Searching {rows:,} images needs the package faiss, which can not be loaded ({error}): "
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
        log.warning("%s can not be read and is built anew (%s)", path, str(error).splitlines()[-1])
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
