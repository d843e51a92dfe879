"""Bootstrap intervals of the figures that are not counted over pairs: NDCG, Spearman, tiers.

The resamples are those of :mod:`mirip_fast.evaluation.intervals`: whole groups, drawn with replacement, as
integer image weights [n, R]. Each figure is computed for all columns of weights at once, as if the
rows were repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mirip_fast.evaluation.intervals import Interval, group_codes, percentiles, ratio, resamples
from mirip_fast.evaluation.pair_counts import FloatArray, IntArray


@dataclass(frozen=True, slots=True)
class FigureIntervals:
    """Intervals from one set of resamples; None means unknown.

    Attributes:
        ndcg: k → interval of NDCG@k.
        spearman: over the images with a finer grade.
        tiers: for each set of predicted tiers, the intervals of tier accuracy and macro F1.
    """

    ndcg: dict[int, Interval | None]
    spearman: Interval | None
    tiers: tuple[tuple[Interval | None, Interval | None], ...]


def figure_intervals(
    scores: FloatArray,
    tiers: IntArray,
    n_tiers: int,
    groups: Sequence[str | None] | None,
    *,
    grades: FloatArray,
    predicted: Sequence[IntArray],
    ks: Sequence[int],
    rounds: int,
    confidence: float,
    seed: int,
) -> FigureIntervals:
    """Intervals by bootstrap over groups.

    Args:
        scores: [n] finite, higher is better.
        tiers: [n] in 0 … K−1, 0 = best.
        n_tiers: K.
        groups: [n] names; None for an image that is its own group.
        grades: [n] finer grades, NaN where there is none.
        predicted: sets of predicted tiers, each [n], kept as they are in every resample.
        ks: the k of each NDCG@k.
        rounds, confidence, seed: of the bootstrap; 0 rounds for no intervals.
    """
    if not rounds:
        nothing = (None, None)
        return FigureIntervals(dict.fromkeys(map(int, ks)), None, (nothing,) * len(predicted))
    codes = group_codes(groups, len(scores))
    ndcg: dict[int, list[FloatArray]] = {int(k): [] for k in ks}
    rank_correlation: list[FloatArray] = []
    judged: list[list[tuple[FloatArray, FloatArray]]] = [[] for _ in predicted]
    graded = np.flatnonzero(~np.isnan(grades))
    for weights in resamples(codes, rounds, seed):
        for k, values in ndcg.items():
            values.append(weighted_ndcg(scores, tiers, k, n_tiers, weights))
        rank_correlation.append(weighted_spearman(scores[graded], grades[graded], weights[graded]))
        for guess, figures in zip(predicted, judged, strict=True):
            figures.append(weighted_tier_figures(tiers, guess, n_tiers, weights))
    return FigureIntervals(
        ndcg={k: percentiles(np.concatenate(values), confidence) for k, values in ndcg.items()},
        spearman=percentiles(np.concatenate(rank_correlation), confidence),
        tiers=tuple(
            (
                percentiles(np.concatenate([accuracy for accuracy, _ in figures]), confidence),
                percentiles(np.concatenate([f1 for _, f1 in figures]), confidence),
            )
            for figures in judged
        ),
    )


def weighted_ndcg(
    scores: FloatArray, tiers: IntArray, k: int, n_tiers: int, weights: IntArray
) -> FloatArray:
    """NDCG@k (see :func:`mirip_fast.evaluation.metrics.ndcg_at_k`) of each column of weights [n, R]: [R]."""
    per_tier = np.stack([weights[tiers == t].sum(axis=0) for t in range(n_tiers)])
    total = per_tier.sum(axis=0)
    # reach[m] is the sum of the first m discounts, of which only k count.
    reach = np.r_[0.0, np.cumsum(1 / np.log2(np.arange(min(k, int(total.max(initial=0)))) + 2))]
    gains = (n_tiers - 1 - tiers).astype(np.float64)
    order, starts = _blocks(-scores)
    ends = np.r_[starts[1:], len(order)]
    blocks = min(len(starts), 2 * k)
    while True:  # blocks beyond the k-th place of every column need not be looked at
        top = order[: ends[blocks - 1]]
        in_block = np.add.reduceat(weights[top], starts[:blocks], axis=0)
        if blocks == len(starts) or (in_block.sum(axis=0) >= np.minimum(k, total)).all():
            break
        blocks = min(len(starts), 2 * blocks)
    gained = np.add.reduceat(weights[top] * gains[top][:, None], starts[:blocks], axis=0)
    dcg = _discounted(in_block, np.nan_to_num(ratio(gained, in_block)), reach)
    best = _discounted(per_tier, n_tiers - 1 - np.arange(n_tiers)[:, None], reach)
    return ratio(dcg, best)


def _discounted(sizes: IntArray, gain: FloatArray | IntArray, reach: FloatArray) -> FloatArray:
    """Σ over blocks of gain · the discounts of the block's places; blocks [B, R] in order."""
    ends = np.minimum(np.cumsum(sizes, axis=0), len(reach) - 1)
    share = np.diff(reach[ends], axis=0, prepend=0.0)
    result: FloatArray = (share * gain).sum(axis=0)
    return result


def weighted_spearman(first: FloatArray, second: FloatArray, weights: IntArray) -> FloatArray:
    """Spearman's rank correlation of each column of weights [n, R]: [R], NaN where not defined."""
    total = weights.sum(axis=0)
    x, y = (_mid_ranks(values, weights) - (total + 1) / 2 for values in (first, second))
    weighted = weights * x
    covariance, variance = (np.einsum("nr,nr->r", weighted, other) for other in (y, x))
    weighted = np.multiply(weights, y, out=weighted)
    return ratio(covariance, np.sqrt(variance * np.einsum("nr,nr->r", weighted, y)))


def _mid_ranks(values: FloatArray, weights: IntArray) -> FloatArray:
    """[n, R] mean rank (1 = the lowest) of each image's copies; equal values share their mean rank."""
    if not len(values):
        return np.zeros(weights.shape)
    order, starts = _blocks(values)
    sizes = weights[order]
    if len(starts) < len(order):
        sizes = np.add.reduceat(sizes, starts, axis=0)
    ranks = np.cumsum(sizes, axis=0) - (sizes - 1) / 2
    which = np.zeros(len(order), dtype=np.int64)
    which[starts[1:]] = 1
    block_of = np.empty_like(which)
    block_of[order] = np.cumsum(which)
    result: FloatArray = ranks[block_of]
    return result


def _blocks(values: FloatArray) -> tuple[IntArray, IntArray]:
    """Rows in rising order, and where each run of equal values starts."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    return order, np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])


def weighted_tier_figures(
    tiers: IntArray, predicted: IntArray, n_tiers: int, weights: IntArray
) -> tuple[FloatArray, FloatArray]:
    """Tier accuracy and macro F1 of each column of weights [n, R]: [R] each."""
    hit = tiers == predicted
    accuracy = ratio(weights[hit].sum(axis=0), weights.sum(axis=0))
    scores = []
    for t in range(n_tiers):
        size = weights[tiers == t].sum(axis=0) + weights[predicted == t].sum(axis=0)
        scores.append(ratio(2 * weights[hit & (tiers == t)].sum(axis=0), size))
    per_tier = np.stack(scores)
    return accuracy, ratio(np.nansum(per_tier, axis=0), (~np.isnan(per_tier)).sum(axis=0))
