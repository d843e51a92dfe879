"""Whether pair probabilities come true: expected calibration error over pairs of different tiers.

A pair in random orientation (a, b) is said to go to a with P = σ((s_a − s_b) / T); it comes true when a has
the better tier. In ten equal bins of P the mean of what was said is held against the share that came
true; the expected calibration error is the mean distance, weighted by pairs (Naeini et al. 2015; Guo et
al. 2017). Turning a pair round mirrors it into the opposite bin with the same distance. So, instead of
drawing orientations, each pair counts half in each: the average over all drawings, without their noise. That
is the same as five bins of the probability of the likelier side, from ½ to 1, with which the work is done.

The error of finitely many works is above 0 even for a perfect model, the more so the fewer works: look
at its interval.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike

from mirip_fast.evaluation.intervals import (
    Interval,
    group_codes,
    known_tier_pairs,
    percentiles,
    ratio,
    resamples,
)
from mirip_fast.evaluation.pair_counts import (
    FloatArray,
    IntArray,
    PairCounter,
    check_codes,
    check_scores,
)
from mirip_fast.evaluation.temperature import difference_blocks, pair_probability

#: Bins of the likelier side's probability between ½ and 1; with their mirror images ten from 0 to 1.
BINS = 5

#: Resamples see the scores in so many steps at most, each of about as many works.
_CELLS = 256


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Pairs whose likelier side was given a probability in [low, high), the last bin with 1.

    Attributes:
        low, high: 0.5–1.
        pairs: pairs in the bin.
        said: mean probability of the likelier side; None in an empty bin.
        came_true: share of pairs that the likelier side won (equal scores ½); None in an empty bin.
        interval: of ``came_true``; None means unknown.
    """

    low: float
    high: float
    pairs: int
    said: float | None
    came_true: float | None
    interval: Interval | None


@dataclass(frozen=True, slots=True)
class Reliability:
    """How far pair probabilities are from what came true.

    Attributes:
        ece: expected calibration error, 0–1.
        interval: of ``ece`` by bootstrap over groups, see :func:`_reflected_below`; None means unknown.
        overconfidence: mean probability of the likelier side minus the share it won; below 0: too modest.
        overconfidence_interval: None means unknown.
        pairs: pairs of different tiers.
        bins: from ½ to 1.
    """

    ece: float
    interval: Interval | None
    overconfidence: float
    overconfidence_interval: Interval | None
    pairs: int
    bins: tuple[ReliabilityBin, ...]


def reliability(
    scores: ArrayLike,
    tiers: ArrayLike,
    temperature: float,
    groups: Sequence[str | None] | None = None,
    *,
    within: ArrayLike | None = None,
    rounds: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Reliability | None:
    """Judge pair probabilities on graded works that neither training nor calibration has seen.

    The figures are exact sums over all pairs. Resamples of more than 256 different scores see the scores
    in 256 steps of equally many works, each with its mean.

    Args:
        scores: [n] finite floats, higher is better.
        tiers: [n] integers, 0 = best.
        temperature: T > 0, may be infinite.
        groups: [n] names; see :func:`mirip_fast.evaluation.intervals.group_codes`.
        within: [n] integer codes; only pairs with equal codes count (negative: in no pair).
        rounds: resamples; 0 for no intervals.
        confidence: share of resamples inside an interval, between 0 and 1.
        seed: of the resamples.

    Returns:
        None where there is no pair of different tiers.

    Raises:
        DataError: a score is not finite, or lengths differ.
    """
    values = check_scores(scores)
    tier = check_codes(tiers, len(values), "tiers")
    cells = np.zeros_like(tier)
    if within is not None:
        cells = check_codes(within, len(values), "within", lowest=np.iinfo(np.int64).min)
    sums = np.zeros((3, BINS))
    for block in difference_blocks(values, tier, cells):
        sums += _sums(block.ravel(), temperature)
    if not sums[0].sum():
        return None
    spread = None
    codes = group_codes(groups, len(values))
    if rounds and _varies(values, tier, within, codes):
        parts = [_Steps(values, tier, rows, temperature) for rows in _members(cells)]
        drawn = [
            np.sum([part.sums(weights) for part in parts], axis=0)
            for weights in resamples(codes, rounds, seed)
        ]
        spread = np.concatenate(drawn, axis=2)  # [3, BINS, R]
    return _summary(sums, spread, confidence)


def _sums(difference: FloatArray, temperature: float) -> FloatArray:
    """[m] differences (better − worse) → [3, BINS]: pairs, Σ probability, Σ came true."""
    likelier, bins = _likelier(difference, temperature)
    came_true = np.sign(difference) / 2 + 0.5
    rows = [np.bincount(bins, weights, BINS) for weights in (None, likelier, came_true)]
    return np.array(rows, dtype=np.float64)


def _likelier(difference: FloatArray, temperature: float) -> tuple[FloatArray, IntArray]:
    """The probability of the likelier side, and its bin."""
    probability = pair_probability(np.abs(difference), temperature)
    bins = ((probability - 0.5) * (2 * BINS)).astype(np.int64)
    return probability, np.minimum(bins, BINS - 1, out=bins)


def _varies(values: FloatArray, tiers: IntArray, within: ArrayLike | None, codes: IntArray) -> bool:
    """Whether resampling can show how much the figures vary, as for the pairwise accuracy."""
    counter = PairCounter(values, tiers, within=within)
    _, pairs = counter.count()
    return bool((known_tier_pairs(counter, codes) & (pairs[..., 0] > 0)).any())


class _Steps:
    """The works of one cell as counts per tier and score step, prepared for any number of weightings."""

    def __init__(self, values: FloatArray, tiers: IntArray, rows: IntArray, temperature: float):
        steps, means = _score_steps(values[rows])
        key = tiers[rows] * len(means) + steps
        order = np.argsort(key, kind="stable")
        self._rows = rows[order]
        places, self._starts = np.unique(key[order], return_index=True)
        self._spans = [
            (places[low:high] % len(means), slice(low, high))
            for low, high in pairwise(
                np.searchsorted(places, len(means) * np.arange(int(tiers.max()) + 2))
            )
        ]
        difference = means[:, None] - means[None, :]
        probability, bins = _likelier(difference, temperature)
        came_true = np.sign(difference) / 2 + 0.5
        values_of_pairs = np.stack([np.ones_like(probability), probability, came_true])
        #: [3, BINS, m, m] what a pair of steps (better, worse) adds to each sum.
        self._adds = np.where(bins == np.arange(BINS)[:, None, None], values_of_pairs[:, None], 0.0)

    def sums(self, weights: IntArray) -> FloatArray:
        """[n, R] image weights → [3, BINS, R]: pairs, Σ probability, Σ came true."""
        counts = np.add.reduceat(weights[self._rows], self._starts, axis=0).astype(np.float64)
        m = self._adds.shape[-1]
        total = np.zeros((3, BINS, weights.shape[1]))
        worse = np.zeros((m, weights.shape[1]))
        for steps, span in self._spans[::-1]:  # the worst tier first
            if worse.any():
                below = self._adds[:, :, steps] @ worse  # [3, BINS, m of the tier, R]
                total += (counts[span] * below).sum(axis=2)
            worse[steps] += counts[span]
        return total


def _members(cells: IntArray) -> Iterator[IntArray]:
    """Rows of each cell ≥ 0."""
    order = np.argsort(cells, kind="stable")
    order = order[cells[order] >= 0]
    edges = np.flatnonzero(np.diff(cells[order])) + 1
    yield from (part for part in np.split(order, edges) if len(part))


def _score_steps(values: FloatArray) -> tuple[IntArray, FloatArray]:
    """The step of each score [n], and the mean score of each step; equal scores share a step."""
    unique, steps = np.unique(values, return_inverse=True)
    if len(unique) > _CELLS:
        cuts = np.sort(values)[len(values) * np.arange(1, _CELLS) // _CELLS]
        _, steps = np.unique(np.searchsorted(cuts, values, side="right"), return_inverse=True)
    return steps, np.bincount(steps, values) / np.bincount(steps)


def _summary(sums: FloatArray, spread: FloatArray | None, confidence: float) -> Reliability:
    ece, over = _errors(sums[..., None])
    intervals: list[Interval | None] = [None] * (BINS + 2)
    if spread is not None:
        series = [*_errors(spread), *ratio(spread[2], spread[0])]
        intervals = [percentiles(values, confidence) for values in series]
        intervals[0] = _reflected_below(intervals[0], float(ece[0]))
    edges = np.linspace(0.5, 1, BINS + 1)
    return Reliability(
        ece=float(ece[0]),
        interval=intervals[0],
        overconfidence=float(over[0]),
        overconfidence_interval=intervals[1],
        pairs=int(sums[0].sum()),
        bins=tuple(
            ReliabilityBin(
                low=round(float(edges[k]), 6),
                high=round(float(edges[k + 1]), 6),
                pairs=int(sums[0, k]),
                said=float(sums[1, k] / sums[0, k]) if sums[0, k] else None,
                came_true=float(sums[2, k] / sums[0, k]) if sums[0, k] else None,
                interval=intervals[2 + k] if sums[0, k] else None,
            )
            for k in range(BINS)
        ),
    )


def _reflected_below(interval: Interval | None, estimate: float) -> Interval | None:
    """The percentile interval of the error with its lower end reflected about the estimate (at least 0).

    Resampling adds noise, and noise only ever adds to a mean distance: the resampled errors lie above the
    true one, of a perfect model all of them. The basic bootstrap's lower end, 2·estimate − upper end
    (Davison & Hinkley 1997), allows for that. In simulations with 60 and 250 works this interval held the
    true error 90–98 % of the time, the plain percentile interval 0 % for calibrated probabilities.
    """
    if interval is None:
        return None
    return replace(interval, low=max(0.0, 2 * estimate - interval.high))


def _errors(sums: FloatArray) -> tuple[FloatArray, FloatArray]:
    """[3, BINS, R] → expected calibration error and overconfidence, [R] each (NaN without a pair)."""
    gaps = sums[1] - sums[2]
    pairs = sums[0].sum(axis=0)
    return ratio(np.abs(gaps).sum(axis=0), pairs), ratio(gaps.sum(axis=0), pairs)
