"""How well scores order images whose tiers are known: each figure once, as a function of arrays.

Shapes: n images, K tiers. ``scores`` [n] are floats, higher is better; ``tiers`` [n] are integers, 0 = best
tier. A pair is two images of different tiers; equal scores count ½. ``weights`` [n] are whole numbers,
not negative: how often a bootstrap resample holds each image. A weight of 2 is what writing the row twice
would give, and copies of one image form no pair. Every figure is exact. Where a figure is not defined
(no pair, all scores equal), it is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mirip_fast.errors import ConfigError, DataError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


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


def check_codes(
    codes: ArrayLike, n: int, what: str, *, lowest: int | None = 0, below: int | None = None
) -> IntArray:
    """``codes`` as an int64 array [n] with values from ``lowest`` (None: any) to below ``below`` (None: any).

    Raises:
        DataError: another length than ``n``, not whole numbers, or a value out of range.
    """
    array = _one_column(np.asarray(codes))
    if array.shape != (n,):
        raise DataError(f"{what}: shape {array.shape}, but there are {n} scores")
    if n and not np.issubdtype(array.dtype, np.integer):
        raise DataError(f"{what}: whole numbers are needed, not {array.dtype}")
    if n and lowest is not None and int(array.min()) < lowest:
        raise DataError(f"{what}: row {int(array.argmin())} is {int(array.min())}, below {lowest}")
    if n and below is not None and int(array.max()) >= below:
        raise DataError(f"{what}: {int(array.max())} is not below the number of tiers {below}")
    return array.astype(np.int64)


def codes_of(labels: Sequence[str | None]) -> IntArray:
    """[n] integer codes, equal for equal labels; None or an empty label gets −1 (unknown)."""
    numbers: dict[str, int] = {}
    codes = [numbers.setdefault(label, len(numbers)) if label else -1 for label in labels]
    return np.array(codes, dtype=np.int64)


def ranks(grades: ArrayLike) -> IntArray:
    """[n] finer grades, higher is better → [n] codes, 0 for the best, equal ones for equal grades.

    Raises:
        DataError: a grade is missing or not finite.
    """
    values = check_scores(grades, what="tier_scores")
    return np.unique(-values, return_inverse=True)[1].astype(np.int64)


def ratio(part: ArrayLike, whole: ArrayLike) -> FloatArray:
    """part / whole, NaN where whole is 0."""
    part, whole = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    result: FloatArray = np.full(whole.shape, np.nan)
    np.divide(part, whole, out=result, where=whole > 0)
    return result


def mean(values: FloatArray) -> float:
    """The mean of those that are not NaN; NaN without any."""
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if len(kept) else math.nan


class PairCounter:
    """Cross-tier pairs of n images, sorted once and counted for any weights, without ever listing them.

    In the order of the scores «how many of tier b score below this image» is a look-up in running sums, so
    n images need O(n log n + K n) time and O(K n) memory instead of O(n²).

    Args:
        scores: [n] finite floats, higher is better.
        tiers: [n] integers, 0 = best tier.
        n_tiers: K; ``max(tiers) + 1`` when not given.
        within: [n] integer codes; only pairs with equal codes count. An image with a negative code
            (unknown) is in no pair. All pairs count when not given.
        finer: the tiers are ranks of finer grades, perhaps as many as images, which are not told apart: K is
            1, and pairs are those of different grades.
        grades: [n, G] tiers by several graders, NaN for none, in place of ``tiers``: pairs are those of one
            grader's tiers, and a grading of a work with m grades weighs 1 / √m, as in training: two works
            that the same graders ordered count as one pair.

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
        grades: FloatArray | None = None,
    ):
        values, self._of, share = check_scores(scores), None, np.float64(1)
        if grades is not None:
            there = np.isfinite(grades)
            self._of, within = np.nonzero(there)
            values, tiers = values[self._of], grades[there].astype(np.int64)
            share = 1 / np.sqrt(there.sum(axis=1))[self._of]
        n = len(values)
        self.tiers = check_codes(tiers, n, "tiers", below=n_tiers)
        self._grades = self.tiers if finer else None
        if finer:
            n_tiers, self.tiers = 1, np.zeros_like(self.tiers)
        self.n_tiers = int(self.tiers.max(initial=-1)) + 1 if n_tiers is None else n_tiers
        self._counts = np.ones(n)  # 0 for an image that is in no pair
        cells = np.zeros(n, dtype=np.int64)
        if within is not None:
            given = check_codes(within, n, "within", lowest=None)
            self._counts = (given >= 0).astype(np.float64)
            cells = np.unique(np.maximum(given, 0), return_inverse=True)[1].astype(np.int64)
        self._counts = self._counts * share
        self.cells, self.n_cells = cells, int(cells.max(initial=-1)) + 1
        self._rank = np.unique(values, return_inverse=True)[1]
        self._order = np.lexsort((values, cells))
        ordered, cell = values[self._order], cells[self._order]
        self._cell_ends = np.searchsorted(cell, np.arange(self.n_cells + 1))  # and the starts
        new = np.diff(cell, prepend=-1) != 0
        new[1:] |= ordered[1:] != ordered[:-1]
        starts, self._block = np.flatnonzero(new), np.cumsum(new) - 1
        self._before = starts[
            self._block
        ]  # rows before the first of the same score in the same cell
        self._through = np.r_[starts[1:], n][self._block]

    def table(self, weights: ArrayLike | None = None) -> tuple[FloatArray, FloatArray]:
        """Weight of the pairs in the right order and of all pairs, each [K, K]: row = the better tier.

        Over all pairs (i, j) of two tiers, Σ w_i w_j ([s_i > s_j] + ½ [s_i = s_j]) and Σ w_i w_j. Of finer
        grades the sums over all pairs, [1, 1] each.
        """
        if self._grades is not None:
            sums = self._finer(self._grades, self._weighted(weights), np.arange(len(self.tiers)))
            return np.full((1, 1), sums[0]), np.full((1, 1), sums[1])
        own = np.zeros((len(self.tiers), self.n_tiers))
        own[np.arange(len(own)), self.tiers] = self._weighted(weights)
        lower, total = self._by_tier(weights)
        return np.triu(own.T @ lower, 1), np.triu(own.T @ total, 1)

    def by_image(self, weights: ArrayLike | None = None) -> tuple[FloatArray, FloatArray]:
        """For each image the weight of the images that it is in the right order with, and of all that it is
        in a pair with, [n] each."""
        lower, total = self._by_tier(weights)
        tier, other = self.tiers[:, None], np.arange(self.n_tiers)
        right = np.where(other > tier, lower, np.where(other < tier, total - lower, 0)).sum(axis=1)
        return right * self._counts, np.where(other != tier, total, 0).sum(axis=1) * self._counts

    def by_cell(self, weights: ArrayLike | None = None) -> tuple[FloatArray, FloatArray]:
        """Weight of the pairs in the right order and of all pairs inside each within code, [C] each."""
        if self._grades is not None:
            weight = self._weighted(weights)
            cells = [np.flatnonzero(self.cells == cell) for cell in range(self.n_cells)]
            sums = np.array([self._finer(self._grades, weight, rows) for rows in cells])
            return sums[:, 0], sums[:, 1]
        weight = self._weighted(weights) / 2  # as both images of a pair count it
        right, pairs = (
            _sums(self.cells, weight * counts, self.n_cells) for counts in self.by_image(weights)
        )
        return right, pairs

    def accuracy(self, weights: ArrayLike | None = None) -> float:
        """Share of the pairs in the right order (0–1); NaN without a pair."""
        right, pairs = self.table(weights)
        return float(ratio(right.sum(), pairs.sum()))

    def tau_b(self, weights: ArrayLike | None = None) -> float:
        """Kendall's τ-b (−1 … 1) between scores and tiers; positive means that better tiers score higher.

        (right − wrong) / √(pairs of different tiers · of different scores): τ-b allows for ties on both sides
        (Kendall 1945; Agresti, *Analysis of Ordinal Categorical Data*). Images of one tier are ties, so with
        four equal tiers a perfect order of distinct scores gives about 0.87, not 1. NaN where all scores are
        equal, or all tiers.
        """
        right, pairs = (float(counts.sum()) for counts in self.table(weights))
        weight = self._weighted(weights)
        sizes = _sums(self._block, weight[self._order], len(weight))
        untied = (weight.sum() ** 2 - sizes @ sizes) / 2
        return float(ratio(2 * right - pairs, math.sqrt(pairs) * math.sqrt(untied)))

    def _finer(self, grades: IntArray, weights: FloatArray, rows: IntArray) -> tuple[float, float]:
        """Weight of the pairs of different grades in the right order, and of all, among these rows.

        Kendall's τ-b counts the first in O(n log n). Images of different cells are made to be in the
        right order, all of them, and taken off again.
        """
        from scipy.stats import kendalltau  # half a second to import, so only where it is used

        rows = np.repeat(rows, weights[rows].astype(np.int64))
        cell = self.cells[rows] * (len(self.tiers) + 1)
        one, other = cell + self._rank[rows], cell - grades[rows]
        across = _untied(self.cells[rows])
        untied_scores, untied = _untied(one), _untied(other)
        if untied == across:
            return 0.0, 0.0
        tau = kendalltau(one, other).statistic if untied_scores else 0.0
        more = float(np.rint(tau * math.sqrt(untied_scores) * math.sqrt(untied)))  # right − wrong
        return (more - across + untied - across) / 2, untied - across

    def _by_tier(self, weights: ArrayLike | None) -> tuple[FloatArray, FloatArray]:
        """For each image the weight of its cell's images of each tier: [n, K] of those that score lower
        (equal scores ½), and [n, K] of all."""
        weight = self._weighted(weights)
        running = np.zeros((len(weight) + 1, self.n_tiers))
        running[np.arange(1, len(weight) + 1), self.tiers[self._order]] = weight[self._order]
        np.cumsum(running, axis=0, out=running)
        at_cells = running[self._cell_ends]
        lower = np.empty((len(weight), self.n_tiers))
        lower[self._order] = (running[self._before] + running[self._through]) / 2
        lower -= at_cells[self.cells]
        return lower, np.diff(at_cells, axis=0)[self.cells]

    def _weighted(self, weights: ArrayLike | None) -> FloatArray:
        if weights is None:
            return self._counts
        given = np.asarray(weights, np.float64)
        return self._counts * (given if self._of is None else given[self._of])


def pairwise_accuracy(
    scores: ArrayLike,
    tiers: ArrayLike,
    within: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    *,
    finer: bool = False,
    grades: FloatArray | None = None,
) -> float:
    """Share (0–1) of all cross-tier pairs in which the better tier has the higher score.

    It is (1 + Somers' D) / 2 of scores given tiers, and with two tiers the area under the ROC curve.

    Args:
        scores: [n] finite floats.
        tiers: [n] integers, 0 = best.
        within: [n] integer codes; only pairs with equal codes count, an image with a negative code
            is in none.
        weights: [n], 1 each when not given.
        finer: ``tiers`` are ranks of finer grades, perhaps as many as images.
        grades: [n, G] of several graders in place of ``tiers``, see :class:`PairCounter`.

    Raises:
        DataError: there is no such pair, a score is not finite, or lengths differ.
    """
    counter = PairCounter(scores, tiers, within=within, finer=finer, grades=grades)
    accuracy = counter.accuracy(weights)
    if math.isnan(accuracy):
        array = np.asarray(tiers)
        where = "" if within is None else " inside the same value of the 'within' column"
        raise DataError(
            f"no pair of different tiers{where} among {len(array)} images of "
            f"{len(np.unique(array))} tier(s): give images of at least two tiers"
        )
    return accuracy


def listed_accuracy(margins: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Share (0–1), by weight, of listed pairs in the right order; NaN without a pair or weight.

    Args:
        margins: [p] score of the better image minus score of the worse one; 0 counts ½.
        weights: [p], 1 each when not given.
    """
    right = (1 + np.sign(np.asarray(margins, dtype=np.float64))) / 2
    weight = np.ones(len(right)) if weights is None else np.asarray(weights, dtype=np.float64)
    return float(ratio(weight @ right, weight.sum()))


def accuracy_by_group(
    scores: ArrayLike, tiers: ArrayLike, codes: IntArray
) -> tuple[FloatArray, IntArray]:
    """How each group's images are ordered against all others: [G] accuracy (NaN without a pair) and pairs.

    Pairs inside a group are left aside: they are few, and what they have in common is the group.

    Args:
        scores, tiers: [n].
        codes: [n] group codes 0 … G−1.
    """
    everywhere, inside = (PairCounter(scores, tiers, within=w).by_image() for w in (None, codes))
    size = int(codes.max(initial=-1)) + 1
    right, pairs = (_sums(codes, a - b, size) for a, b in zip(everywhere, inside, strict=True))
    return ratio(right, pairs), pairs.astype(np.int64)


def rank_correlation(first: IntArray, second: IntArray, weights: ArrayLike) -> float:
    """Spearman's correlation (−1 … 1): Pearson's, of the mean ranks of two arrays [n] that are ranks already,
    equal ones equal. NaN where all of one are equal."""
    weight = np.asarray(weights, dtype=np.float64)
    x, y = (_mean_ranks(ranks, weight) for ranks in (first, second))
    return float(ratio(weight * x @ y, np.sqrt((weight * x @ x) * (weight * y @ y))))


def ndcg_at_k(
    scores: ArrayLike, tiers: ArrayLike, k: int, n_tiers: int, weights: ArrayLike | None = None
) -> float:
    """Normalised discounted cumulative gain of the k best-scored images (0–1).

    DCG@k = Σ_{r=1…k} gain_r / log2(1 + r), divided by that of a perfect order (Järvelin &
    Kekäläinen 2002). An image's gain is K − 1 − tier: 0 for the worst of the K tiers, one more for
    each better tier (linear, not 2^gain − 1). Equal scores have no order among them: each counts
    with the mean gain of its tied block, the expectation over random orders (McSherry & Najork
    2008). NaN where every image is in the worst tier. k beyond n counts as n.

    Raises:
        ConfigError: k is below 1.
        DataError: a score is not finite, a tier is not in 0 … K−1, lengths differ, or there is no
            image.
    """
    if k < 1:
        raise ConfigError(f"NDCG@{k}: k must be at least 1")
    values = check_scores(scores)
    tier = check_codes(tiers, len(values), "tiers", below=n_tiers)
    if not len(values):
        raise DataError("NDCG: there is no image")
    weight = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=np.float64)
    gains = n_tiers - 1.0 - tier
    _, block = np.unique(-values, return_inverse=True)  # 0 = the highest score
    count = int(block.max()) + 1
    sizes, gained = (_sums(block, values, count) for values in (weight, weight * gains))
    places = np.arange(min(k, int(sizes.sum())))
    reach = np.r_[0.0, np.cumsum(1 / np.log2(places + 2))]  # sums of the first discounts

    def dcg(sizes: FloatArray, gain: FloatArray) -> float:
        ends = np.minimum(np.cumsum(sizes), len(places)).astype(np.int64)
        return float(np.diff(reach[ends], prepend=0.0) @ gain)

    best = np.arange(n_tiers - 1.0, -1, -1)
    in_tier = _sums(tier, weight, n_tiers)
    return float(ratio(dcg(sizes, np.nan_to_num(ratio(gained, sizes))), dcg(in_tier, best)))


def tiers_by_quota(scores: ArrayLike, tiers: ArrayLike) -> IntArray:
    """Predicted tiers: the n_S best-scored images get S, the next n_A get A, and so on.

    This needs the split's own tier shares, which a new portfolio does not have: it measures the order
    of the scores, not a decision that could be made without the grades. Equal scores get equal
    tiers, that in which the middle of their block falls, so the order of the rows never helps; with
    ties the predicted shares may therefore differ from the true ones.

    Returns:
        [n] int64, 0 = best.

    Raises:
        DataError: a score is not finite, or lengths differ.
    """
    values = check_scores(scores)
    tier = check_codes(tiers, len(values), "tiers")
    if not len(tier):
        return tier
    _, block, sizes = np.unique(-values, return_inverse=True, return_counts=True)
    middle = (2 * np.cumsum(sizes) - sizes - 1) // 2  # place of each block's middle, 0 = the best
    predicted: IntArray = np.sort(tier)[middle][block]
    return predicted


def confusion_matrix(
    tiers: ArrayLike, predicted: ArrayLike, n_tiers: int, weights: ArrayLike | None = None
) -> FloatArray:
    """Weight of the images by true tier (row) and predicted tier (column): [K, K].

    Raises:
        DataError: lengths differ, or a tier is not in 0 … K−1.
    """
    tier = check_codes(tiers, len(np.asarray(tiers)), "tiers", below=n_tiers)
    guess = check_codes(predicted, len(tier), "predicted tiers", below=n_tiers)
    counts = np.bincount(tier * n_tiers + guess, weights, n_tiers**2)
    return counts.reshape(n_tiers, n_tiers).astype(np.float64)


def tier_accuracy(confusion: NDArray[Any]) -> float:
    """Share (0–1) of images on the diagonal of a confusion matrix [K, K]; NaN without an image."""
    return float(ratio(np.trace(confusion), confusion.sum()))


def macro_f1(confusion: NDArray[Any]) -> float:
    """Mean F1 (0–1) over the tiers that occur as truth or as prediction; NaN without an image.

    F1 of a tier = 2·hits / (images of the tier + images predicted as the tier).
    """
    return mean(ratio(2 * np.diag(confusion), confusion.sum(axis=0) + confusion.sum(axis=1)))


def _sums(codes: IntArray, weights: FloatArray, size: int) -> FloatArray:
    """[size] sum of the weights of each code."""
    return np.bincount(codes, weights, size).astype(np.float64)


def _untied(values: IntArray) -> float:
    """Pairs of different values."""
    counts = np.unique(values, return_counts=True)[1].astype(np.float64)
    return float(len(values) ** 2 - counts @ counts) / 2


def _one_column(array: NDArray[Any]) -> NDArray[Any]:
    """[n, 1] as [n], anything else as it is."""
    return array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array


def _mean_ranks(ranks: IntArray, weights: FloatArray) -> FloatArray:
    """[n] mean place of each image's copies, rising, from their middle; equal ranks share their mean."""
    if not len(ranks):
        return np.zeros(0)
    sizes = _sums(ranks, weights, int(ranks.max()) + 1)
    places: FloatArray = (np.cumsum(sizes) - sizes / 2 - weights.sum() / 2)[ranks]
    return places
