"""How sure a rank is: the ranks that the same works get in many draws of the grades that they may get.

Draws are of :meth:`mirip_fast.ranking.scorer.ScoreModel.draw`: the interval says where the graders may put a
work. It goes from the k-th smallest to the k-th largest of a work's ranks in H draws,
k = ⌊(H + 1) · (1 − confidence) / 2⌋, so that a further draw of the same kind falls outside with at
most 1 − confidence (order statistics of exchangeable draws). It is widened to hold the work's own rank.
docs/uncertainty.md tells how often intervals were measured to hold the truth.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mirip_fast.evaluation.metrics import IntArray

CONFIDENCE = 0.95


@dataclass(frozen=True)
class RankIntervals:
    """Ranks that works may have, [n] each, in the order of their scores (the best first).

    Attributes:
        low, high: int64, 1 = best; low ≤ own rank ≤ high.
        settled: bool, whether the work scores higher than the next one, and lower than the one before,
            in at least 95 % of the draws each.
    """

    low: IntArray
    high: IntArray
    settled: NDArray[np.bool_]


def ranks_of(scores: ArrayLike) -> IntArray:
    """[…, n] scores → ranks along the last axis, 1 = the highest; equal scores share the better rank."""
    falling = -np.asarray(scores, dtype=np.float64)
    rows = falling.reshape(-1, falling.shape[-1])
    ranks = [np.searchsorted(np.sort(row), row, side="left") + 1 for row in rows]
    return np.array(ranks, dtype=np.int64).reshape(falling.shape)


def rank_intervals(draws: ArrayLike, own_ranks: ArrayLike) -> RankIntervals:
    """95 % intervals of the ranks, and whose order is settled.

    Args:
        draws: [H, n] scores of n works in H draws, the works in the order of their own scores.
        own_ranks: [n] ranks by the model's own scores.
    """
    scores, own = np.asarray(draws, dtype=np.float64), np.asarray(own_ranks, dtype=np.int64)
    ranks = np.sort(ranks_of(scores), axis=0)
    outside = _outside(len(scores))
    ahead = (np.sign(scores[:, :-1] - scores[:, 1:]) / 2 + 0.5).mean(axis=0)
    clear = np.r_[
        True, ahead >= CONFIDENCE, True
    ]  # before the first, between neighbours, after the last
    return RankIntervals(
        low=np.minimum(ranks[outside - 1], own),
        high=np.maximum(ranks[-outside], own),
        settled=clear[:-1] & clear[1:],
    )


def _outside(draws: int) -> int:
    """k: the interval goes from the k-th smallest to the k-th largest of the draws."""
    return max(1, int((draws + 1) * (1 - CONFIDENCE) / 2))
