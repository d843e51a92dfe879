"""How sure a figure is: percentile intervals by bootstrap over groups, of any figure.

The pairs of n images are far from independent (each image is in many), and so are the images of one
group (one applicant, one post). So whole groups are drawn with replacement, as many as there are,
and everything is computed again (cluster bootstrap; Efron & Tibshirani 1993, *An Introduction to the
Bootstrap*; Field & Welsh 2007). An image without a group is a group of its own. A resample is kept
as integer image weights [n], how often each image's group was drawn, which the functions of
:mod:`mirip_fast.evaluation.metrics` take.

Few groups vary less among their resamples than groups do: with G of them the interval goes from the
percentile Φ(√(G / (G − 1)) · t) to its mirror image, t the quantile of Student's distribution with G − 1
degrees of freedom (expanded percentiles; Hesterberg 2015, *What Teachers Should Know About the Bootstrap*).

The interval covers the choice of images and groups. It does not cover another training run or
disagreement among graders, and an accuracy of exactly 0 or 1 gets an interval of zero width, which
shows too few mistakes to count, not certainty.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mirip_fast.errors import ConfigError, DataError
from mirip_fast.evaluation.metrics import (
    FloatArray,
    IntArray,
    PairCounter,
    pairwise_accuracy,
)
from mirip_fast.language import tr
from mirip_fast.progress import steps

Key = TypeVar("Key", bound=Hashable)

FEW_GROUPS = 20


@dataclass(frozen=True, slots=True)
class Interval:
    """A percentile interval.

    Attributes:
        low, high: its ends, in the unit of the statistic.
        confidence: that it holds the true value (0–1).
        rounds: resamples that it rests on.
        dropped: resamples left out because the statistic did not exist in them (no pair was drawn).
    """

    low: float
    high: float
    confidence: float
    rounds: int
    dropped: int


def span(interval: Interval | None, sign: str = "") -> str:
    """An interval as text; ``sign`` + writes the sign of each end."""
    if interval is None:
        return tr("unknown")
    return f"{interval.low:{sign}.4f} – {interval.high:{sign}.4f}"


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


def bootstrap(
    statistic: Callable[[IntArray], Mapping[Key, float]],
    codes: IntArray,
    *,
    rounds: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[Key, Interval | None]:
    """Expanded percentile intervals of several figures at once, from the same resamples.

    Args:
        statistic: [n] image weights → name → figure; NaN where it does not exist. The names are the same
            for all weights.
        codes: [n] group codes 0 … G−1.
        rounds: resamples; with 0 there are no intervals.
        confidence: of the intervals, between 0 and 1.
        seed: of ``numpy.random.PCG64``; the same codes, rounds and seed give the same resamples.

    Returns:
        An interval by name; None where a figure exists in no resample. Empty with no rounds.

    Raises:
        ConfigError: ``rounds`` or ``confidence`` is out of range.
    """
    if rounds < 0:
        raise ConfigError(f"bootstrap rounds: {rounds} is negative; 0 means no interval")
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence: {confidence} is not between 0 and 1 (0.95 is usual)")
    from scipy.special import ndtr, stdtrit

    n_groups = int(codes.max(initial=-1)) + 1
    rng = np.random.Generator(np.random.PCG64(seed))
    drawn: dict[Key, list[float]] = {}
    for _ in steps(range(rounds if n_groups else 0), "resamples"):
        times = np.bincount(rng.integers(n_groups, size=n_groups), minlength=n_groups)
        for name, value in statistic(times[codes]).items():
            drawn.setdefault(name, []).append(value)
    tail = (1 - confidence) / 2
    if n_groups > 1:
        tail = float(ndtr((n_groups / (n_groups - 1)) ** 0.5 * stdtrit(n_groups - 1, tail)))
    return {
        name: _percentiles(np.array(values), tail, confidence) for name, values in drawn.items()
    }


def varying_pairs(tiers: IntArray, codes: IntArray, n_tiers: int) -> NDArray[np.bool_]:
    """[K, K] better × worse tier: whether both have images of at least 2 groups, so that resampling can
    show how much the pairs of these tiers vary. Finer grades are one tier."""
    several = np.array([len(np.unique(codes[tiers == t])) >= 2 for t in range(n_tiers)], dtype=bool)
    return np.triu(np.logical_and.outer(several, several), 1 if n_tiers > 1 else 0)


def paired_bootstrap(
    first: ArrayLike,
    second: ArrayLike,
    tiers: ArrayLike,
    groups: Sequence[str | None] | None = None,
    *,
    within: ArrayLike | None = None,
    finer: bool = False,
    grades: FloatArray | None = None,
    rounds: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Pairwise accuracy of ``first`` minus that of ``second`` on the same n images, with its interval.

    Both are evaluated on the same resamples, so what makes a resample easy or hard for both cancels
    out. The interval is None («unknown») where resampling cannot show how much the figure varies: no
    rounds, or no tier pair with at least 2 groups on each side.

    Args:
        first, second: [n] finite floats, higher is better; each may have a scale of its own.
        tiers: [n] integers, 0 = best.
        groups: [n] names; see :func:`group_codes`.
        within: [n] integer codes; only pairs with equal codes count (negative: in no pair).
        finer: ``tiers`` are ranks of finer grades.
        grades: [n, G] of several graders, whose pairs count in place of those of ``tiers``.
        rounds, confidence, seed: see :func:`bootstrap`.

    Returns:
        ``first`` and ``second``, the two accuracies (0–1), their ``difference``, and its ``interval``; None
        means unknown.

    Raises:
        ConfigError: ``rounds`` or ``confidence`` is out of range.
        DataError: no cross-tier pair, a score is not finite, or lengths differ.
    """
    one, other = (
        pairwise_accuracy(s, tiers, within, finer=finer, grades=grades) for s in (first, second)
    )
    interval = accuracy_interval(
        first, tiers, groups,
        minus=second, within=within, finer=finer, grades=grades,
        rounds=rounds, confidence=confidence, seed=seed,
    )  # fmt: skip
    return {"first": one, "second": other, "difference": one - other, "interval": interval}


def accuracy_interval(
    scores: ArrayLike,
    tiers: ArrayLike,
    groups: Sequence[str | None] | None = None,
    *,
    minus: ArrayLike | None = None,
    within: ArrayLike | None = None,
    finer: bool = False,
    grades: FloatArray | None = None,
    rounds: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval | None:
    """The interval of a pairwise accuracy, or of the difference to that of the scores ``minus`` [n].

    Arguments, errors and None as for :func:`paired_bootstrap`.
    """
    both = [scores] if minus is None else [scores, minus]
    counters = [
        PairCounter(values, tiers, within=within, finer=finer, grades=grades) for values in both
    ]
    tier = PairCounter(both[0], tiers, finer=finer).tiers
    codes = group_codes(groups, len(tier))
    kept = np.ones(len(tier), dtype=bool) if within is None else np.asarray(within) >= 0
    known = varying_pairs(tier[kept], codes[kept], counters[0].n_tiers)
    if not (known & (counters[0].table()[1] > 0)).any():
        rounds = min(rounds, 0)

    def statistic(weights: IntArray) -> dict[str, float]:
        accuracies = [counter.accuracy(weights) for counter in counters]
        return {"accuracy": accuracies[0] if minus is None else accuracies[0] - accuracies[1]}

    found = bootstrap(statistic, codes, rounds=rounds, confidence=confidence, seed=seed)
    return found.get("accuracy")


def _percentiles(values: FloatArray, tail: float, confidence: float) -> Interval | None:
    """The interval of [R] values without ``tail`` of them at either end; NaN are counted and left out."""
    kept = values[np.isfinite(values)]
    if not len(kept):
        return None
    low, high = np.quantile(kept, [tail, 1 - tail])
    return Interval(float(low), float(high), confidence, len(kept), len(values) - len(kept))
