"""How sure a pairwise accuracy is: percentile intervals by bootstrap over groups.

The pairs of n images are far from independent (each image is in many), and so are the images of one
group (one applicant, one post). So whole groups are drawn with replacement, as many as there are,
and everything is counted again (cluster bootstrap; Efron & Tibshirani 1993, *An Introduction to the
Bootstrap*; Field & Welsh 2007). An image without a group is a group of its own. A resample is kept
as integer image weights, how often each image's group was drawn; copies of one image have one tier
and so form no pair.

The interval covers the choice of images and groups. It does not cover another training run or
disagreement among graders, and an accuracy of exactly 0 or 1 gets an interval of zero width, which
shows too few mistakes to count, not certainty.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from mirip_fast.errors import ConfigError, DataError
from mirip_fast.evaluation.metrics import pairwise_accuracy
from mirip_fast.evaluation.pair_counts import FloatArray, IntArray, PairCounter, check_scores

logger = logging.getLogger(__name__)

FEW_GROUPS = 20
# Image weights held at once; about eight arrays of this size live together, so some 64 MB.
_CHUNK_WEIGHTS = 1_000_000


@dataclass(frozen=True, slots=True)
class Interval:
    """A percentile interval.

    Attributes:
        low, high: its ends, in the unit of the statistic.
        confidence: share of resamples between them (0–1).
        rounds: resamples that it rests on.
        dropped: resamples left out because the statistic did not exist in them (no pair was drawn).
    """

    low: float
    high: float
    confidence: float
    rounds: int
    dropped: int


@dataclass(frozen=True, slots=True)
class PairIntervals:
    """Intervals from one set of resamples; None means unknown.

    Attributes:
        n_groups: groups that were drawn from.
        pairwise_accuracy, macro_accuracy: over all pairs; mean over the tier pairs that occur.
        kendall_tau_b: None with ``within`` too, as it knows no such restriction.
        tier_pairs: (better tier, worse tier) → interval, for each tier pair that occurs.
    """

    n_groups: int
    pairwise_accuracy: Interval | None
    macro_accuracy: Interval | None
    kendall_tau_b: Interval | None
    tier_pairs: Mapping[tuple[int, int], Interval | None]


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Pairwise accuracy of two score vectors on the same images.

    Attributes:
        first, second: the two accuracies (0–1).
        difference: first − second.
        interval: of the difference, both judged on the same resamples; None means unknown.
    """

    first: float
    second: float
    difference: float
    interval: Interval | None


def group_codes(groups: Sequence[str | None] | None, n: int) -> IntArray:
    """[n] codes 0 … G−1 in order of first appearance; None or "" (no group) is a group of its own.

    Raises:
        DataError: another number of groups than ``n``.
    """
    if groups is None:
        return np.arange(n, dtype=np.int64)
    if len(groups) != n:
        raise DataError(f"groups: {len(groups)} values, but there are {n} scores")
    numbers: dict[str | int, int] = {}
    codes = [numbers.setdefault(name or row, len(numbers)) for row, name in enumerate(groups)]
    return np.array(codes, dtype=np.int64)


def bootstrap_over_groups(
    scores: ArrayLike,
    tiers: ArrayLike,
    groups: Sequence[str | None] | None = None,
    *,
    within: ArrayLike | None = None,
    finer: bool = False,
    rounds: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> PairIntervals:
    """Percentile intervals for everything that is counted over pairs, from the same resamples.

    An interval is None («unknown») where resampling can not show how much the figure varies: no
    rounds, fewer than 2 groups, or no tier pair with at least 2 groups on each side (for a tier
    pair: in that pair).

    Args:
        scores: [n] finite floats, higher is better.
        tiers: [n] integers, 0 = best.
        groups: [n] names; see :func:`group_codes`.
        within: [n] integer codes; only pairs with equal codes count (negative: in no pair).
        finer: ``tiers`` are ranks of finer grades: all pairs are one tier pair.
        rounds: resamples R; time is O(R · n · K), extra memory does not grow with R.
        confidence: share of resamples inside the interval, between 0 and 1.
        seed: of ``numpy.random.PCG64``; the same seed and groups give the same resamples.

    Raises:
        ConfigError: ``rounds`` or ``confidence`` is out of range.
        DataError: a score is not finite, or lengths differ.
    """
    _check_settings(rounds, confidence)
    counter = PairCounter(scores, tiers, within=within, finer=finer)
    codes = group_codes(groups, counter.n_images)
    _, pairs = counter.count()
    known = known_tier_pairs(counter, codes) & (pairs[..., 0] > 0)
    n_groups = _number_of_groups(codes)
    occurring = [(int(a), int(b)) for a, b in np.argwhere(pairs[..., 0] > 0)]
    if rounds == 0 or not known.any():
        return PairIntervals(n_groups, None, None, None, dict.fromkeys(occurring))

    ties = None if within is not None else _ScoreTies(check_scores(scores))
    accuracy, macro, tau, by_pair = [], [], [], []
    for weights in resamples(codes, rounds, seed):
        twice_right, pairs = counter.count(weights)
        shares = ratio(twice_right, 2 * pairs)
        accuracy.append(ratio(twice_right.sum(axis=(0, 1)), 2 * pairs.sum(axis=(0, 1))))
        macro.append(ratio(np.nansum(shares, axis=(0, 1)), (pairs > 0).sum(axis=(0, 1))))
        by_pair.append(np.stack([shares[pair] for pair in occurring]))
        if ties is not None:
            tau.append(_tau_b(twice_right, pairs, ties.untied_pairs(weights)))
    columns = np.concatenate(by_pair, axis=1)  # [tier pairs, R]
    return PairIntervals(
        n_groups=n_groups,
        pairwise_accuracy=percentiles(np.concatenate(accuracy), confidence),
        macro_accuracy=percentiles(np.concatenate(macro), confidence),
        kendall_tau_b=percentiles(np.concatenate(tau), confidence) if tau else None,
        tier_pairs={
            pair: percentiles(columns[row], confidence) if known[pair] else None
            for row, pair in enumerate(occurring)
        },
    )


def paired_bootstrap(
    first: ArrayLike,
    second: ArrayLike,
    tiers: ArrayLike,
    groups: Sequence[str | None] | None = None,
    *,
    within: ArrayLike | None = None,
    finer: bool = False,
    rounds: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> PairedDifference:
    """Pairwise accuracy of ``first`` minus that of ``second`` on the same n images, with its interval.

    Both are judged on the same resamples, so what makes a resample easy or hard for both cancels
    out. Arguments as :func:`bootstrap_over_groups`; the two score vectors may have different
    scales.

    Raises:
        ConfigError: ``rounds`` or ``confidence`` is out of range.
        DataError: no cross-tier pair, a score is not finite, or lengths differ.
    """
    _check_settings(rounds, confidence)
    point = [pairwise_accuracy(scores, tiers, within, finer=finer) for scores in (first, second)]
    counters = [
        PairCounter(scores, tiers, within=within, finer=finer) for scores in (first, second)
    ]
    codes = group_codes(groups, counters[0].n_images)
    _, pairs = counters[0].count()
    known = known_tier_pairs(counters[0], codes) & (pairs[..., 0] > 0)
    interval = None
    if rounds and known.any():
        differences = []
        for weights in resamples(codes, rounds, seed):
            counts = [counter.count(weights) for counter in counters]
            shares = [ratio(right.sum(axis=(0, 1)), 2 * p.sum(axis=(0, 1))) for right, p in counts]
            differences.append(shares[0] - shares[1])
        interval = percentiles(np.concatenate(differences), confidence)
    return PairedDifference(point[0], point[1], point[0] - point[1], interval)


class _ScoreTies:
    """Counts the pairs of a resample whose scores differ, whatever their tiers (τ-b's n0 − n1)."""

    def __init__(self, scores: FloatArray):
        self._order = np.argsort(scores, kind="stable")
        ordered = scores[self._order]
        self._starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])

    def untied_pairs(self, weights: IntArray) -> IntArray:
        """[n, R] weights → [R] counts: (N² − Σ over distinct scores of N_u²) / 2."""
        if len(self._starts) == len(self._order):
            per_score = weights
        else:
            per_score = np.add.reduceat(weights[self._order], self._starts, axis=0)
        total = weights.sum(axis=0)
        untied: IntArray = (total * total - (per_score * per_score).sum(axis=0)) // 2
        return untied


def _tau_b(twice_right: IntArray, pairs: IntArray, untied: IntArray) -> FloatArray:
    """τ-b per resample: (right − wrong) / √(pairs of different tiers · pairs of different scores)."""
    total = pairs.sum(axis=(0, 1))
    root = np.sqrt(total.astype(np.float64)) * np.sqrt(untied.astype(np.float64))
    return ratio(twice_right.sum(axis=(0, 1)) - total, root)


def resamples(codes: IntArray, rounds: int, seed: int) -> Iterator[IntArray]:
    """Image weights [n, ≤ chunk] of all ``rounds``; one draw of G group numbers per round.

    The same codes, rounds and seed give the same resamples, so that all figures share them.
    """
    n_groups = _number_of_groups(codes)
    rng = np.random.Generator(np.random.PCG64(seed))
    chunk = max(1, _CHUNK_WEIGHTS // len(codes))
    for start in range(0, rounds, chunk):
        times_drawn = np.empty((n_groups, min(chunk, rounds - start)), dtype=np.int64)
        for column in range(times_drawn.shape[1]):
            drawn = rng.integers(n_groups, size=n_groups)
            times_drawn[:, column] = np.bincount(drawn, minlength=n_groups)
        yield times_drawn[codes]


def known_tier_pairs(counter: PairCounter, codes: IntArray) -> np.ndarray:
    """[K, K] bool: both tiers have images of at least 2 groups, so that resampling varies each."""
    members, tiers = counter.order, counter.tiers
    groups_in = np.array(
        [len(np.unique(codes[members[tiers[members] == t]])) for t in range(counter.n_tiers)]
    )
    return np.logical_and.outer(groups_in >= 2, groups_in >= 2)


def ratio(part: np.ndarray, whole: np.ndarray) -> FloatArray:
    """part / whole, NaN where whole is 0."""
    result = np.full(np.shape(whole), np.nan)
    np.divide(part, whole, out=result, where=whole > 0)
    return result


def percentiles(values: FloatArray, confidence: float) -> Interval | None:
    """The percentile interval of [R] resampled values; NaN are counted and left out."""
    kept = values[np.isfinite(values)]
    if not len(kept):
        return None
    tail = (1 - confidence) / 2
    low, high = np.quantile(kept, [tail, 1 - tail])
    return Interval(float(low), float(high), confidence, len(kept), len(values) - len(kept))


def _number_of_groups(codes: IntArray) -> int:
    return int(codes.max(initial=-1)) + 1


def _check_settings(rounds: int, confidence: float) -> None:
    if rounds < 0:
        raise ConfigError(f"bootstrap rounds: {rounds} is negative; 0 means no interval")
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence: {confidence} is not between 0 and 1 (0.95 is usual)")
