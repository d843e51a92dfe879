"""Pairwise accuracy inside each value of a column, over all of them, and the mean over the values (macro)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mirip_fast.evaluation.intervals import (
    Interval,
    group_codes,
    known_tier_pairs,
    percentiles,
    ratio,
    resamples,
)
from mirip_fast.evaluation.metrics import codes_of
from mirip_fast.evaluation.pair_counts import FloatArray, IntArray, PairCounter, check_codes
from mirip_fast.evaluation.report_parts import WithinRow


@dataclass(frozen=True, slots=True)
class WithinFigures:
    """Pairwise accuracy inside the values of a column; an interval of None means unknown.

    Attributes:
        pairs: pairs of different tiers and one value.
        accuracy: share of them in the right order; None without a pair.
        macro: mean of the accuracies of the values that have a pair, each counted alike; in a resample,
            of those that have one there.
        interval, macro_interval: by bootstrap over groups.
        values: one row per value with a pair, in order of appearance.
    """

    pairs: int = 0
    accuracy: float | None = None
    interval: Interval | None = None
    macro: float | None = None
    macro_interval: Interval | None = None
    values: tuple[WithinRow, ...] = ()


def accuracy_within(
    scores: FloatArray,
    tiers: IntArray,
    within: Sequence[str | None],
    groups: Sequence[str | None] | None,
    *,
    finer: bool = False,
    rounds: int,
    confidence: float,
    seed: int,
) -> WithinFigures:
    """Judge the order inside each value of a column.

    Args:
        scores: [n] finite, higher is better.
        tiers: [n], 0 = best.
        within: [n] values; None or "" is in no pair.
        groups: [n] names; None for an image that is its own group.
        finer: the tiers are ranks of finer grades.
        rounds, confidence, seed: of the bootstrap over groups; 0 rounds for no intervals.

    Raises:
        DataError: lengths differ.
    """
    codes = group_codes(groups, len(scores))
    numbers = check_codes(codes_of(within), len(scores), "within", lowest=-1)
    names, counters, known, counts = [], [], [], []
    for number, value in enumerate(dict.fromkeys(value for value in within if value)):
        members = np.flatnonzero(numbers == number)
        counter = PairCounter(scores[members], tiers[members], finer=finer)
        twice_right, pairs = counter.count()
        if pairs.any():
            names.append(value)
            counters.append((members, counter))
            counts.append((int(twice_right.sum()), int(pairs.sum())))
            varied = known_tier_pairs(counter, codes[members])
            known.append(bool((varied & (pairs[..., 0] > 0)).any()))
    if not counters:
        return WithinFigures()
    right, total = np.array(counts).T
    intervals: list[Interval | None] = [None] * (2 + len(names))
    if rounds and any(known):
        drawn = [
            np.stack([_counts(counter, weights[members]) for members, counter in counters], axis=1)
            for weights in resamples(codes, rounds, seed)
        ]
        rights, pairs = np.concatenate(drawn, axis=2)  # [values, R] each
        shares = ratio(rights, 2 * pairs)
        macro = ratio(np.nansum(shares, axis=0), (pairs > 0).sum(axis=0))
        series = [ratio(rights.sum(axis=0), 2 * pairs.sum(axis=0)), macro, *shares]
        intervals = [
            percentiles(values, confidence) if is_known else None
            for values, is_known in zip(series, [True, True, *known], strict=True)
        ]
    return WithinFigures(
        pairs=int(total.sum()),
        accuracy=float(right.sum() / (2 * total.sum())),
        interval=intervals[0],
        macro=float((right / (2 * total)).mean()),
        macro_interval=intervals[1],
        values=tuple(
            WithinRow(name, int(total[i]), float(right[i] / (2 * total[i])), intervals[2 + i])
            for i, name in enumerate(names)
        ),
    )


def _counts(counter: PairCounter, weights: IntArray) -> IntArray:
    """[2, R] twice the pairs in the right order, and the pairs, of each weighting [n, R]."""
    twice_right, pairs = counter.count(weights)
    return np.stack([twice_right.sum(axis=(0, 1)), pairs.sum(axis=(0, 1))])
