"""A readable score from 0 to 100: where a work would stand among the held-out works."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from mirip_fast.evaluation.pair_counts import FloatArray


def score_100(scores: ArrayLike, reference: ArrayLike) -> FloatArray:
    """100 · (share of the reference works that score lower + half of the share that score the same).

    The mid-rank percentile: 50 is a work in the middle of the reference, 0 one below and 100 one above
    all of it. The reference counts as it is, one work one vote: 80 means «better than 80 % of the
    graded works», in the mix of tiers that the graded works have.

    Args:
        scores: [n] scores.
        reference: [m] held-out scores, at least one, rising.

    Returns:
        [n] float64 in 0–100; NaN for NaN.
    """
    values = np.asarray(scores, dtype=np.float64)
    known = np.asarray(reference, dtype=np.float64)
    lower = np.searchsorted(known, values, side="left")
    up_to = np.searchsorted(known, values, side="right")
    result: FloatArray = np.where(np.isnan(values), np.nan, 50.0 * (lower + up_to) / len(known))
    return result
