"""Counts of rightly ordered pairs from n scores, without ever listing the pairs.

A pair is two images of different tiers; it counts 1 when the image of the better tier scores
higher, ½ when the scores are equal, 0 otherwise. Sorting each tier by score turns "how many of tier
b score below this image" into a look-up in running sums, so n images need O(K n log n) time and O(K
n) memory (K tiers) instead of O(n²). Images may carry integer weights (how often a bootstrap
resample holds them); a pair then counts with the product of its two weights, which is what
repeating the rows would give.

Finer grades than tiers are codes of the same kind, perhaps as many as there are images: their pairs are
counted all together by comparing images with images, in O(n²) time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mirip_fast.errors import DataError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_ROWS = 256  # images compared with all others at a time, where grades are finer than tiers


def check_scores(
    scores: ArrayLike, names: Sequence[str] | None = None, *, what: str = "scores"
) -> FloatArray:
    """``scores`` as a finite float64 array [n].

    Args:
        scores: [n] or [n, 1] numbers.
        names: [n] names for the message (row numbers, counted from 0, when not given).
        what: what the numbers are, for the message.

    Raises:
        DataError: not one-dimensional, or a number is NaN or infinite.
    """
    array = _one_column(np.asarray(scores, dtype=np.float64))
    if array.ndim != 1:
        raise DataError(f"{what}: a list of numbers, one per image, not of shape {array.shape}")
    bad = np.flatnonzero(~np.isfinite(array))
    if len(bad):
        first = int(bad[0])
        name = f"row {first}" if names is None else repr(names[first])
        raise DataError(
            f"{what}: {len(bad)} of {len(array)} are not finite (first: {name} is {array[first]}); "
            "look for damaged inputs or a training run that diverged"
        )
    return array


def _one_column(array: NDArray[Any]) -> NDArray[Any]:
    """[n, 1] as [n], anything else as it is."""
    return array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array


def check_codes(codes: ArrayLike, n: int, what: str, *, lowest: int = 0) -> IntArray:
    """``codes`` as an int64 array [n] whose values are at least ``lowest``.

    Raises:
        DataError: another length than ``n``, not whole numbers, or a value below ``lowest``.
    """
    array = _one_column(np.asarray(codes))
    if array.shape != (n,):
        raise DataError(f"{what}: shape {array.shape}, but there are {n} scores")
    if n and not np.issubdtype(array.dtype, np.integer):
        raise DataError(f"{what}: whole numbers are needed, not {array.dtype}")
    if n and int(array.min()) < lowest:
        raise DataError(f"{what}: row {int(array.argmin())} is {int(array.min())}, below {lowest}")
    return array.astype(np.int64)


class PairCounter:
    """Cross-tier pairs of n images, prepared once, counted for any number of weightings.

    Args:
        scores: [n] finite floats, higher is better.
        tiers: [n] integers, 0 = best tier.
        n_tiers: K; ``max(tiers) + 1`` when not given.
        within: [n] integer codes; only pairs with equal codes count. An image with a negative code
            (unknown) is in no pair. All pairs count when not given.
        finer: the tiers are ranks of finer grades, which are not told apart: K is 1.

    Attributes:
        tiers: [n] int64, the tiers that are told apart.
        order: [m] the images that can be in a pair, by tier, then cell, then score.

    Raises:
        DataError: lengths differ, a score is not finite, a tier is negative or not below
            ``n_tiers``.
    """

    def __init__(
        self,
        scores: ArrayLike,
        tiers: ArrayLike,
        n_tiers: int | None = None,
        within: ArrayLike | None = None,
        *,
        finer: bool = False,
    ):
        values = check_scores(scores)
        n = len(values)
        tier = check_codes(tiers, n, "tiers")
        self.n_images = n
        self.n_tiers = int(tier.max(initial=-1)) + 1 if n_tiers is None else n_tiers
        if n and int(tier.max()) >= self.n_tiers:
            raise DataError(
                f"tiers: {int(tier.max())} is not below the number of tiers {self.n_tiers}"
            )

        self._grades = tier if finer else None  # that are not told apart
        if self._grades is not None:
            self._scores = values
            self._cells = np.zeros_like(tier) if within is None else np.asarray(within)
            self.n_tiers, tier = 1, np.zeros_like(tier)
        self.tiers = tier
        rank = np.unique(values, return_inverse=True)[1].astype(
            np.int64
        )  # equal scores, equal rank
        if within is None:
            cell = np.zeros(n, dtype=np.int64)
            keep = np.arange(n)
        else:
            given = check_codes(within, n, "within", lowest=np.iinfo(np.int64).min)
            keep = np.flatnonzero(given >= 0)
            cell = np.unique(np.maximum(given, 0), return_inverse=True)[1].astype(np.int64)
        self._n_cells = int(cell.max(initial=-1)) + 1
        # One key orders an image by cell first, then by score; both fit an int64 as each is below n.
        key = cell * (n + 1) + rank
        self.order: IntArray = keep[np.lexsort((key[keep], tier[keep]))]
        self._bounds = np.searchsorted(tier[self.order], np.arange(self.n_tiers + 1))
        keys = key[self.order]
        cell_keys = np.arange(self._n_cells + 1) * (n + 1)
        self._cell_starts = [
            np.searchsorted(keys[self._rows(t)], cell_keys) for t in range(self.n_tiers)
        ]
        # For each image of tier a: how many rows of tier b lie before it, without and with equal scores.
        self._places = {
            (a, b): (
                np.searchsorted(keys[self._rows(b)], keys[self._rows(a)], side="left"),
                np.searchsorted(keys[self._rows(b)], keys[self._rows(a)], side="right"),
            )
            for a in range(self.n_tiers)
            for b in range(a + 1, self.n_tiers)
        }

    def count(self, weights: IntArray | None = None) -> tuple[IntArray, IntArray]:
        """Weighted counts of pairs, for R weightings at once.

        Args:
            weights: [n, R] int64, not negative; one column of ones when not given.

        Returns:
            ``twice_right`` and ``pairs``, both int64 [K, K, R], filled where the row's tier is
            better than the column's (row < column) and 0 elsewhere. Over all pairs (i, j) of the
            two tiers ``pairs`` is Σ w_i w_j and ``twice_right`` is Σ w_i w_j (2·[s_i > s_j] + [s_i
            = s_j]): doubled, so that it stays a whole number. Of finer grades
            the sums over all pairs, [1, 1, R].
        """
        if weights is None:
            weights = np.ones((self.n_images, 1), dtype=np.int64)
        if self._grades is not None:
            return self._count_together(self._grades, weights)
        sorted_weights = weights[self.order]
        n_columns = weights.shape[1]
        twice_right = np.zeros((self.n_tiers, self.n_tiers, n_columns), dtype=np.int64)
        pairs = np.zeros_like(twice_right)

        by_tier = [sorted_weights[self._rows(t)] for t in range(self.n_tiers)]
        running = [_running_sum(w) for w in by_tier]
        cell_before = [running[t][self._cell_starts[t]] for t in range(self.n_tiers)]  # [C + 1, R]
        cell_total = [np.diff(before, axis=0) for before in cell_before]  # [C, R]
        for (a, b), (left, right) in self._places.items():
            pairs[a, b] = (cell_total[a] * cell_total[b]).sum(axis=0)
            below = running[b][left]
            below += running[b][right]
            below *= by_tier[a]
            # The running sums start at the tier's first row; what lies in earlier cells is taken off.
            earlier = 2 * (cell_total[a] * cell_before[b][:-1]).sum(axis=0)
            twice_right[a, b] = below.sum(axis=0) - earlier
        return twice_right, pairs

    def _count_together(self, grades: IntArray, weights: IntArray) -> tuple[IntArray, IntArray]:
        sums = np.zeros((2, weights.shape[1]))
        rows = self.order
        scores, grade, cell = self._scores[rows], grades[rows], self._cells[rows]
        weight = weights[rows].astype(np.float64)  # whole numbers to 2^53
        for start in range(0, len(rows), _ROWS):
            own = slice(start, start + _ROWS)
            pair = (grade[own, None] < grade) & (cell[own, None] == cell)
            right = np.where(pair, np.sign(scores[own, None] - scores) + 1, 0.0)
            for i, table in enumerate((right, pair.astype(np.float64))):
                sums[i] += (weight[own] * (table @ weight)).sum(axis=0)
        twice_right, pairs = sums.round().astype(np.int64)[:, None, None]
        return twice_right, pairs

    def _rows(self, tier: int) -> slice:
        return slice(int(self._bounds[tier]), int(self._bounds[tier + 1]))


def _running_sum(weights: IntArray) -> IntArray:
    """[m, R] → [m + 1, R]: row i is the sum of the first i rows."""
    sums = np.zeros((len(weights) + 1, weights.shape[1]), dtype=np.int64)
    np.cumsum(weights, axis=0, out=sums[1:])
    return sums
