"""How the held-out scores of each training tier are distributed, as curves to draw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mirip_fast.ranking.held_out import HeldOut

FloatArray = NDArray[np.float64]

_POINTS = 96  # of a curve
_TICKS = 400  # single scores shown per tier at most
_MARGIN = 0.05  # of the range, left free at both ends


def score_curves(held_out: HeldOut, tier_names: Sequence[str], scores: ArrayLike) -> dict[str, Any]:
    """:func:`tier_curves` of held-out scores, on an axis for the ``scores`` [n] of ranked works too.

    Without tiers it is one curve without a name.
    """
    tiers = held_out.tiers if tier_names else np.zeros(len(held_out), dtype=np.int64)
    return tier_curves(held_out.scores, tiers, tier_names or ("",), scores)


def tier_curves(
    graded: FloatArray,
    tiers_of: NDArray[np.int64],
    tier_names: Sequence[str],
    scores: ArrayLike = (),
) -> dict[str, Any]:
    """Curves of the scores of graded works of each tier on one axis.

    Args:
        graded: [m] scores of graded works that the model had not trained on.
        tiers_of: [m] their tiers, 0 = best.
        tier_names: names of the tiers, best first.
        scores: [n] further scores that the axis has to hold.

    Returns:
        ``low`` and ``high``, the ends of the axis in units of the score; ``tiers``: per tier its name,
        count, ``curve`` (heights 0–1 at equal distances from ``low`` to ``high``; 1 is the peak of that
        tier), ``median`` and ``ticks`` (single scores, all or an even choice of them).
    """
    everything = np.concatenate([graded, np.asarray(scores, np.float64)])
    low, high = float(everything.min()), float(everything.max())
    margin = _MARGIN * (high - low) or 1.0
    low, high = low - margin, high + margin
    grid = np.linspace(low, high, _POINTS)
    tiers = []
    for tier, name in enumerate(tier_names):
        values = np.sort(graded[tiers_of == tier])
        shown = np.unique(np.linspace(0, len(values) - 1, _TICKS).round().astype(int))
        tiers.append(
            {
                "name": name,
                "count": len(values),
                "curve": [round(y, 3) for y in density(values, grid).tolist()],
                "median": _short(float(np.median(values))) if len(values) else None,
                "ticks": [_short(x) for x in values[shown]] if len(values) else [],
            }
        )
    return {"low": _short(low), "high": _short(high), "tiers": tiers}


def density(values: FloatArray, grid: FloatArray) -> FloatArray:
    """Gaussian kernel density at the points of ``grid``, scaled to a peak of 1; 0 for fewer than 2 values.

    The bandwidth is Silverman's rule of thumb, 0.9 · min(σ, IQR / 1.34) · n^(−1/5) (Silverman 1986,
    Density Estimation for Statistics and Data Analysis, equation 3.31).
    """
    if len(values) < 2:
        return np.zeros_like(grid)
    quarter, three = np.percentile(values, [25, 75])
    spread = min((s for s in (values.std(ddof=1), (three - quarter) / 1.34) if s > 0), default=0.0)
    width = max(0.9 * spread * len(values) ** -0.2, (grid[1] - grid[0]) / 2)
    heights = np.zeros_like(grid)
    for start in range(0, len(values), 4096):
        distance = (grid[:, None] - values[None, start : start + 4096]) / width
        heights += np.exp(-0.5 * distance**2).sum(axis=1)
    scaled: FloatArray = heights / heights.max()
    return scaled


def _short(value: float) -> float:
    return float(f"{value:.6g}")
