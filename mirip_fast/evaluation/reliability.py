"""Whether pair probabilities come true: expected calibration error over pairs of different tiers.

A pair in random orientation (a, b) goes to a with the predicted probability P = σ((s_a − s_b) / T); it does
when a has the better tier. In ten equal bins of P the mean predicted probability is held against the observed
frequency; the expected calibration error is the mean distance, weighted by pairs (Naeini et al. 2015; Guo et
al. 2017). Turning a pair round mirrors it into the opposite bin with the same distance. So, instead of
drawing orientations, each pair counts half in each: the average over all drawings, without their noise. That
is the same as five bins of the probability of the likelier side, from ½ to 1, with which the work is done.

The error of finitely many works is above 0 even for a perfect model, the more so the fewer works: look
at its interval.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from mirip_fast.evaluation.bootstrap import bootstrap, group_codes, varying_pairs
from mirip_fast.evaluation.calibration import difference_blocks, pair_probability
from mirip_fast.evaluation.metrics import (
    FloatArray,
    IntArray,
    PairCounter,
    check_scores,
    ratio,
)

#: Bins of the likelier side's probability between ½ and 1; with their mirror images ten from 0 to 1.
BINS = 5

#: Resamples see the scores in so many steps at most, each of about as many works.
_STEPS = 256

_DENSE = 200  # more cells and tiers than this are multiplied as sparse matrices


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
) -> dict[str, Any] | None:
    """Hold pair probabilities against graded works that neither training nor calibration has seen.

    The figures are exact sums over all pairs. Resamples of more than 256 different scores see the scores
    in 256 steps of equally many works, each with its mean.

    The lower end of the error's interval is 2·estimate − upper end (the basic bootstrap's; Davison & Hinkley
    1997), at least 0: resampling adds noise, and noise only ever adds to a mean distance, so that the
    resampled errors lie above the true one, of a perfect model all of them. In simulations with 60 and 250
    works this interval held the true error 90–98 % of the time, the plain percentile interval 0 % for
    calibrated probabilities.

    Args:
        scores: [n] finite floats, higher is better.
        tiers: [n] integers, 0 = best.
        temperature: T > 0, may be infinite.
        groups: [n] names; see :func:`mirip_fast.evaluation.bootstrap.group_codes`.
        within: [n] integer codes; only pairs with equal codes count (negative: in no pair).
        rounds, confidence, seed: see :func:`mirip_fast.evaluation.bootstrap.bootstrap`.

    Returns:
        ``ece``, the expected calibration error (0–1), with its ``interval``, whose lower end is reflected;
        ``overconfidence``, the mean probability of the likelier side minus the share it won (below 0: too
        modest), with its ``overconfidence_interval``; ``pairs`` of different tiers; and ``bins`` from ½ to 1,
        each of the pairs whose likelier side was given a probability in [``low``, ``high``), the last with 1:
        ``pairs``, mean ``predicted`` probability and ``observed`` share that the likelier side won (equal
        scores ½), None in an empty bin, with its ``interval``. Intervals are None where they are unknown.
        None where there is no pair of different tiers.

    Raises:
        DataError: a score is not finite, or lengths differ.
    """
    values = check_scores(scores)
    counter = PairCounter(values, tiers, within=within)
    tier, cells = counter.tiers, counter.cells
    kept = np.ones(len(tier), dtype=bool) if within is None else np.asarray(within) >= 0
    sums = np.zeros((3, BINS))
    for block in difference_blocks(values, tier, np.where(kept, cells, -1)):
        sums += _by_bin(block.ravel(), temperature)(np.ones(block.size))
    if not sums[0].sum():
        return None
    codes = group_codes(groups, len(values))
    known = varying_pairs(tier[kept], codes[kept], counter.n_tiers) & (counter.table()[1] > 0)

    steps, means = _score_steps(values)
    by_bin = _by_bin((means[:, None] - means[None, :]).ravel(), temperature)
    place = (cells * counter.n_tiers + tier) * len(means) + steps
    shape = (counter.n_cells, counter.n_tiers, len(means))

    def statistic(weights: IntArray) -> dict[str, float]:
        counts = (
            np.bincount(place, weights * kept, int(np.prod(shape))).reshape(shape).astype(float)
        )
        worse = np.cumsum(counts[:, ::-1], axis=1)[:, ::-1] - counts
        flat, flat_worse = (array.reshape(-1, len(means)) for array in (counts, worse))
        if len(flat) <= _DENSE:
            pairs = flat.T @ flat_worse  # [steps, steps] pairs, better × worse
        else:
            from scipy.sparse import csr_array

            pairs = (csr_array(flat).T @ csr_array(flat_worse)).toarray()
        return _errors(by_bin(pairs.ravel()))

    spans = bootstrap(
        statistic, codes,
        rounds=rounds if known.any() else min(rounds, 0), confidence=confidence, seed=seed,
    )  # fmt: skip
    figures = _errors(sums)
    interval = spans.get("ece")
    if interval is not None:
        interval = replace(interval, low=max(0.0, 2 * figures["ece"] - interval.high))
    edges = np.linspace(0.5, 1, BINS + 1)
    bins = [
        {
            "low": round(float(edges[k]), 6),
            "high": round(float(edges[k + 1]), 6),
            "pairs": int(sums[0, k]),
            "predicted": float(sums[1, k] / sums[0, k]) if sums[0, k] else None,
            "observed": float(sums[2, k] / sums[0, k]) if sums[0, k] else None,
            "interval": spans.get(f"bin {k}") if sums[0, k] else None,
        }
        for k in range(BINS)
    ]
    return {
        "ece": figures["ece"],
        "interval": interval,
        "overconfidence": figures["overconfidence"],
        "overconfidence_interval": spans.get("overconfidence"),
        "pairs": int(sums[0].sum()),
        "bins": bins,
    }


def _by_bin(difference: FloatArray, temperature: float) -> Callable[[FloatArray], FloatArray]:
    """[m] differences (better − worse) → a function of their weights [m] → [3, BINS]: weight of the pairs,
    Σ predicted, Σ observed."""
    predicted = pair_probability(np.abs(difference), temperature)
    bins = np.minimum(((predicted - 0.5) * (2 * BINS)).astype(np.int64), BINS - 1)
    observed = np.sign(difference) / 2 + 0.5

    def sums(weights: FloatArray) -> FloatArray:
        rows = (weights, weights * predicted, weights * observed)
        return np.array([np.bincount(bins, row, BINS) for row in rows])

    return sums


def _score_steps(values: FloatArray) -> tuple[IntArray, FloatArray]:
    """The step of each score [n], and the mean score of each step; equal scores share a step."""
    unique, steps = np.unique(values, return_inverse=True)
    if len(unique) > _STEPS:
        cuts = np.sort(values)[len(values) * np.arange(1, _STEPS) // _STEPS]
        _, steps = np.unique(np.searchsorted(cuts, values, side="right"), return_inverse=True)
    return steps, np.bincount(steps, values) / np.bincount(steps)


def _errors(sums: FloatArray) -> dict[str, float]:
    """[3, BINS] → expected calibration error, overconfidence, and the observed frequency of each bin."""
    gaps, pairs = sums[1] - sums[2], sums[0].sum()
    observed = {f"bin {k}": float(value) for k, value in enumerate(ratio(sums[2], sums[0]))}
    errors = ratio([np.abs(gaps).sum(), gaps.sum()], [pairs, pairs])
    return {"ece": float(errors[0]), "overconfidence": float(errors[1]), **observed}
