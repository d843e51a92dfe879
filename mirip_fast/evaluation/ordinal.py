"""How probable each tier is for a work of a given score: the proportional-odds model.

P(tier k or better | score s) = σ(θ_k + β s) with θ_1 < θ_2 < … and one slope β ≥ 0 for all tiers
(cumulative logit; McCullagh 1980, *Regression Models for Ordinal Data*), fitted by maximum
likelihood on held-out scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from mirip_fast.errors import DataError
from mirip_fast.evaluation.pair_counts import FloatArray, IntArray, check_codes, check_scores
from mirip_fast.evaluation.temperature import logistic


@dataclass(frozen=True)
class OrdinalModel:
    """A fitted proportional-odds model.

    Attributes:
        n_tiers: K, tiers there are.
        present: the tiers that it knows, those with held-out images, best first; P of the others is 0.
        slope: β per unit of score, 0 or more.
        thresholds: θ, one fewer than ``present``, rising; θ_k belongs to «``present[k]`` or better».
        separated: no image scored above one of a better tier, so that no finite likelihood maximum
            exists; each image's tier then counts (n + 1) / (n + 2), its neighbours the rest.
    """

    n_tiers: int
    present: tuple[int, ...]
    slope: float
    thresholds: tuple[float, ...]
    separated: bool

    def probabilities(self, scores: ArrayLike) -> FloatArray:
        """P(tier) of each score: [n] → [n, K] float64, rows sum to 1, column 0 is the best tier."""
        values = np.asarray(scores, dtype=np.float64)
        at_least = logistic(np.asarray(self.thresholds) + self.slope * values[:, None])
        edges = np.zeros((len(values), 1))
        result = np.zeros((len(values), self.n_tiers))
        steps = np.diff(np.hstack([edges, at_least, edges + 1]), axis=1)
        result[:, list(self.present)] = np.maximum(steps, 0)
        return result

    def most_probable(self, scores: ArrayLike) -> IntArray:
        """[n] int64: the tier with the highest probability, the better one where two are equal."""
        best: IntArray = self.probabilities(scores).argmax(axis=1)
        return best


def fit_ordinal(scores: ArrayLike, tiers: ArrayLike, n_tiers: int) -> OrdinalModel:
    """Fit P(tier | score) on graded images.

    Args:
        scores: [n] finite held-out scores, higher is better.
        tiers: [n] integers, 0 = best, below ``n_tiers``.
        n_tiers: K.

    Raises:
        DataError: fewer than two tiers occur, a score is not finite, or lengths differ.
    """
    values = check_scores(scores)
    tier = check_codes(tiers, len(values), "tiers")
    present, codes = np.unique(tier, return_inverse=True)
    if len(present) < 2 or int(present[-1]) >= n_tiers:
        raise DataError(
            f"an ordinal model needs at least two of the {n_tiers} tiers, not {present.tolist()}"
        )
    centre, spread = float(values.mean()), float(values.std()) or 1.0
    z = (values - centre) / spread
    separated = _separated(z, codes)
    slope, thresholds = _maximise(z, _targets(codes, len(present), separated))
    return OrdinalModel(
        n_tiers=n_tiers,
        present=tuple(int(t) for t in present),
        slope=slope / spread,
        thresholds=tuple(float(t) for t in thresholds - slope * centre / spread),
        separated=separated,
    )


def _separated(z: FloatArray, codes: IntArray) -> bool:
    """Whether each tier's lowest score is at least the highest of the next worse one (not all equal)."""
    lowest = [z[codes == k].min() for k in range(int(codes.max()) + 1)]
    highest = [z[codes == k].max() for k in range(int(codes.max()) + 1)]
    apart = all(low >= high for low, high in zip(lowest, highest[1:], strict=False))
    return apart and bool(z.max() > z.min())


def _targets(codes: IntArray, k: int, separated: bool) -> FloatArray:
    """[n, k] weights of each image's tiers, rows sum to 1: its own tier's alone unless separated."""
    own = np.eye(k)
    if separated:
        n = len(codes)
        beside = np.eye(k, k=1) + np.eye(k, k=-1)
        own = (n + 1) / (n + 2) * own + beside / beside.sum(1, keepdims=True) / (n + 2)
    result: FloatArray = own[codes]
    return result


def _maximise(z: FloatArray, targets: FloatArray) -> tuple[float, FloatArray]:
    """Slope and thresholds [k − 1] of the highest likelihood, for standardised scores."""
    from scipy.optimize import minimize

    shares = np.cumsum(targets.mean(axis=0))[:-1]
    theta = np.log(shares / (1 - shares))
    start = np.r_[0.5, theta[0], np.log(np.diff(theta))]
    bounds = [(0, None)] + [(None, None)] * len(theta)
    done: Any = minimize(
        _loss, start, (z, targets), jac=True, method="L-BFGS-B", bounds=bounds,
        options={"ftol": 1e-15, "gtol": 1e-9, "maxiter": 1000},
    )  # fmt: skip
    return float(done.x[0]), _thresholds(done.x)


def _thresholds(parameters: FloatArray) -> FloatArray:
    """θ from (slope, θ_1, log of each further step): the steps can not be negative."""
    theta: FloatArray = np.cumsum(np.r_[parameters[1], np.exp(parameters[2:])])
    return theta


def _loss(parameters: FloatArray, z: FloatArray, targets: FloatArray) -> tuple[float, FloatArray]:
    """Mean negative log-likelihood and its gradient in (slope, θ_1, log steps).

    With u_k = θ_k + βz: P(k) = σ(u_k) − σ(u_{k−1}) = σ(u_k) σ(−u_{k−1}) (1 − e^−(u_k − u_{k−1})),
    whose logarithm is exact however small the probability.
    """
    n, steps = len(z), np.exp(parameters[2:])
    u = _thresholds(parameters) + parameters[0] * z[:, None]  # [n, k − 1]
    log_p = np.zeros_like(targets)
    log_p[:, :-1] -= np.logaddexp(0, -u)
    log_p[:, 1:] -= np.logaddexp(0, u)
    log_p[:, 1:-1] += np.log(-np.expm1(-steps))
    # d log P(k) / du_k = σ(−u_k) + r and d log P(k) / du_{k−1} = −σ(u_{k−1}) − r, r = 1 / (e^step − 1).
    r = np.r_[0.0, np.exp(-steps) / -np.expm1(-steps), 0.0]  # as a quotient that can not overflow
    by_u = targets[:, :-1] * (logistic(-u) + r[:-1]) - targets[:, 1:] * (logistic(u) + r[1:])
    by_theta = by_u.sum(axis=0)
    later = np.cumsum(by_theta[::-1])[::-1]  # θ_k moves with every step up to it
    gradient = np.r_[(by_u.sum(axis=1) * z).sum(), later[0], later[1:] * steps]
    return -float((targets * log_p).sum()) / n, -gradient / n
