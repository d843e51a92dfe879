"""How probable it is that one work beats another: P(a beats b) = σ((s_a − s_b) / T).

The temperature T is fitted by maximum likelihood on held-out pairs of different tiers, each pair once:
a logistic regression of «the first is the better one» on the difference of the scores, without an
intercept (the Bradley-Terry form; temperature scaling, Guo et al. 2017, *On Calibration of Modern
Neural Networks*). Pairs are never listed: blocks of differences are made from the n scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike

from mirip_fast.errors import DataError
from mirip_fast.evaluation.pair_counts import FloatArray, IntArray, check_codes, check_scores

#: Beyond so many images the temperature is fitted on a random sample of so many (37 million pairs).
MAX_IMAGES = 10_000

_BLOCK_PAIRS = 100_000  # a few float64 arrays of this size live at once, in the processor's cache
_START_IMAGES = 1_000  # images of the sample that gives the first guess
_TOLERANCE = 1e-10


@dataclass(frozen=True)
class Temperature:
    """A fitted temperature.

    Attributes:
        value: T > 0 in the unit of the scores; infinite where better tiers do not score higher on
            average, so that every probability is ½.
        images: images that it was fitted on.
        pairs: their pairs of different tiers.
        separated: no pair was in the wrong order, so that no finite likelihood maximum exists. Each
            pair then counts as right with (n + 1) / (n + 2) of its weight and as wrong with the rest,
            n the number of images (Platt 1999 with images in place of pairs).
    """

    value: float
    images: int
    pairs: int
    separated: bool


def logistic(x: ArrayLike) -> FloatArray:
    """σ(x) = 1 / (1 + e^−x) as float64."""
    with np.errstate(over="ignore"):  # e^−x is infinite below −709: σ is 0 there
        result: FloatArray = 1 / (1 + np.exp(-np.asarray(x, dtype=np.float64)))
    return result


def pair_probability(difference: ArrayLike, temperature: float) -> FloatArray:
    """P(first beats second) in 0–1 for score differences first − second of any shape."""
    return logistic(np.asarray(difference, dtype=np.float64) / temperature)


def fit_temperature(
    scores: ArrayLike, tiers: ArrayLike, within: ArrayLike | None = None
) -> Temperature:
    """Fit T on all pairs of different tiers.

    Args:
        scores: [n] finite held-out scores, higher is better.
        tiers: [n] integers, 0 = best.
        within: [n] integer codes; only pairs with equal codes count (negative: in no pair).

    Raises:
        DataError: there is no such pair, a score is not finite, or lengths differ.
    """
    values = check_scores(scores)
    tier = check_codes(tiers, len(values), "tiers")
    cell = np.zeros_like(tier)
    if within is not None:
        cell = check_codes(within, len(values), "within", lowest=np.iinfo(np.int64).min)
    if len(values) > MAX_IMAGES:
        chosen = np.random.default_rng(0).choice(len(values), MAX_IMAGES, replace=False)
        values, tier, cell = values[chosen], tier[chosen], cell[chosen]

    pairs = wrong = right = 0
    total = 0.0
    for block in difference_blocks(values, tier, cell):
        pairs += block.size
        wrong += int((block < 0).sum())
        right += int((block > 0).sum())
        total += float(block.sum())
    if not pairs:
        raise DataError("no pair of different tiers to fit the temperature on")
    n = len(values)
    if total <= 0 or not right:
        return Temperature(math.inf, n, pairs, separated=False)
    separated = wrong == 0
    target = (n + 1) / (n + 2) if separated else 1.0
    start = pairs / total  # 1 / mean difference
    if n > 2 * _START_IMAGES:
        some = slice(None, None, n // _START_IMAGES)
        order = np.argsort(tier, kind="stable")[some]
        start = _solve(values[order], tier[order], cell[order], target, start)
    return Temperature(1 / _solve(values, tier, cell, target, start), n, pairs, separated)


def difference_blocks(scores: FloatArray, tiers: IntArray, cells: IntArray) -> Iterator[FloatArray]:
    """Score differences (better − worse) of all pairs of different tiers in equal cells ≥ 0.

    Args:
        scores, tiers, cells: [n] each.

    Yields:
        [b, m] float64 with about a hundred thousand entries, or one row.
    """
    order = np.lexsort((tiers, cells))
    order = order[cells[order] >= 0]
    ordered, tier, cell = scores[order], tiers[order], cells[order]
    ends = np.searchsorted(cell, cell, side="right")  # one past the last image of the same cell
    keys = cell * (int(tiers.max(initial=0)) + 1) + tier
    starts = np.searchsorted(keys, keys, side="right")  # first image of the same cell, worse tier
    edges = np.flatnonzero(np.diff(keys, prepend=-1, append=-1))
    for first, last in pairwise(edges):  # images of one cell and tier
        worse = ordered[starts[first] : ends[first]]
        step = max(1, _BLOCK_PAIRS // max(1, len(worse)))
        for low in range(first, last if len(worse) else first, step):
            yield ordered[low : min(low + step, last), None] - worse[None, :]


def _solve(
    scores: FloatArray, tiers: IntArray, cells: IntArray, target: float, start: float
) -> float:
    """The β > 0 at which the likelihood of β = 1/T is highest: Newton's method, kept in a bracket.

    The slope of the negative log-likelihood is Σ d (σ(βd) − target), which rises with β.
    """
    low, high, beta = 0.0, math.inf, start
    for _ in range(200):
        slope = curvature = 0.0
        for block in difference_blocks(scores, tiers, cells):
            chance = logistic(beta * block)
            flat = block.ravel()
            slope += float(flat @ (chance.ravel() - target))
            weight = chance * (1 - chance)
            curvature += float(flat @ (weight * block).ravel())
        low, high = (beta, high) if slope < 0 else (low, beta)
        step = beta - slope / curvature if curvature > 0 else math.inf
        if not low < step < high:
            step = 2 * beta if math.isinf(high) else (low + high) / 2
        if abs(step - beta) <= _TOLERANCE * beta:
            return step
        beta = step
    return beta
