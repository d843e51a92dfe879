"""Tier verdicts from comparisons: how often a work beats graded works of each tier, and what follows.

The rule: a work is put in the best tier of whose anchors it beats at least half, and in the worst tier
otherwise. It asks a work to stand above the middle of a tier, so about half of a tier's own works are put
below it, however good the model (docs/tiers.md).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from mirip_fast.evaluation.pair_counts import FloatArray, IntArray

#: Share of a tier's anchors that a work has to beat.
LEAST_WIN_RATE = 0.5


def win_rates(
    scores: ArrayLike,
    anchor_scores: ArrayLike,
    anchor_tiers: ArrayLike,
    n_tiers: int,
    *,
    same: ArrayLike | None = None,
) -> FloatArray:
    """Share of each tier's anchors that a work beats: those with a lower score; an equal one counts half.

    Args:
        scores: [n] of the works, higher is better.
        anchor_scores: [a] of the anchors, in the same unit.
        anchor_tiers: [a] integers, 0 = best, below ``n_tiers``.
        n_tiers: K.
        same: [n, a] whether a work and an anchor are one picture, which is not compared with itself.

    Returns:
        [n, K]; NaN for tiers without an anchor to compare with.
    """
    difference = np.subtract.outer(np.asarray(scores, np.float64), np.asarray(anchor_scores))
    wins = (difference > 0) + 0.5 * (difference == 0)
    compared = np.ones_like(wins) if same is None else 1.0 - np.asarray(same)
    of_tier = np.eye(n_tiers)[np.asarray(anchor_tiers, dtype=np.int64)]
    rates: FloatArray = np.full((len(difference), n_tiers), np.nan)
    np.divide(
        (wins * compared) @ of_tier, compared @ of_tier, out=rates, where=compared @ of_tier > 0
    )
    return rates


def verdict_tiers(rates: ArrayLike) -> IntArray:
    """The tier that the rule puts each work in.

    Args:
        rates: [n, K] of :func:`win_rates`. A tier without anchors (NaN) is nobody's verdict; every row has
            one that is not.

    Returns:
        [n] int64, 0 is the best tier.
    """
    values = np.asarray(rates, np.float64)
    enough = np.nan_to_num(values, nan=-1.0) >= LEAST_WIN_RATE
    worst = values.shape[1] - 1 - np.isfinite(values)[:, ::-1].argmax(axis=1)
    tiers: IntArray = np.where(enough.any(axis=1), enough.argmax(axis=1), worst).astype(np.int64)
    return tiers
