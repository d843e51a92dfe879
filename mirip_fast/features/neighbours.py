"""Nearest neighbours among unit vectors by cosine: exact below 100,000 rows, faiss' inverted lists above.

Exact search is blocks of matrix products: as fast as faiss' flat index, and comparing all rows with each
other takes half the work. Above, comparing all with all would take many minutes, and an IVF index pays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]

#: From this many rows on an index is built.
FLAT_ROWS = 100_000

_BLOCK = 2048
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
