"""k-medoids: the k members of a set that the others are nearest to."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mirip_fast.features.neighbours import unit

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

_LEAST_GAIN = 1e-9  # of the sum of distances; less is rounding


def find_medoids(rows: NDArray[np.floating], k: int) -> IntArray:
    """Choose k rows so that the sum of distances of all rows to the nearest of them is small.

    The distance is 1 − cosine. PAM (Kaufman and Rousseeuw 1990, Finding Groups in Data, chapter 2): BUILD
    takes the row that lowers the sum most, k times; SWAP exchanges a chosen row for another as long as that
    lowers the sum, all exchanges evaluated at once as in FastPAM1 (Schubert and Rousseeuw 2019, Faster
    k-Medoids Clustering). The result is a local optimum: no single exchange lowers the sum. Nothing is
    drawn at random. Memory is 8 n² bytes a few times over.

    Args:
        rows: [n, D] features of any length.
        k: how many, 1 or more.

    Returns:
        [min(k, n)] numbers of rows, rising.
    """
    if len(rows) <= k:
        return np.arange(len(rows), dtype=np.int64)
    vectors = unit(rows).astype(np.float64)
    distances = np.maximum(1 - vectors @ vectors.T, 0)
    chosen = _build(distances, k)
    while True:
        change = _changes(distances, chosen)
        candidate, out = np.unravel_index(int(change.argmin()), change.shape)
        if change[candidate, out] > -_LEAST_GAIN:
            return np.sort(chosen)
        chosen[out] = candidate


def _build(distances: FloatArray, k: int) -> IntArray:
    nearest = np.full(len(distances), np.inf)
    chosen = np.empty(k, dtype=np.int64)
    for place in range(k):
        sums = np.minimum(distances, nearest[:, None]).sum(axis=0)
        sums[chosen[:place]] = np.inf
        chosen[place] = sums.argmin()
        nearest = np.minimum(nearest, distances[:, chosen[place]])
    return chosen


def _changes(distances: FloatArray, chosen: IntArray) -> FloatArray:
    """[n, k]: how the sum changes when row c takes the place of chosen row i."""
    to_chosen = distances[:, chosen]
    own = to_chosen.argmin(axis=1)
    first = to_chosen.min(axis=1)[:, None]
    rest = to_chosen.copy()
    rest[np.arange(len(rest)), own] = np.inf
    second = rest.min(axis=1)[:, None]  # infinite for k = 1
    gain = np.minimum(distances - first, 0)  # of rows that keep their chosen row, or go over to c
    without = np.minimum(distances, second) - first - gain  # further, of rows that lose theirs
    change: FloatArray = gain.sum(axis=0)[:, None] + without.T @ np.eye(len(chosen))[own]
    return change
