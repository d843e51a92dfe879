"""A Gaussian process that learns from judged pairs: probit on differences, with NumPy and SciPy alone.

The first of two works is preferred with probability Φ(f(x) − f(x′)), f being a Gaussian process with the
kernel of :mod:`mirip_fast.models.gp`, whose constant is of no matter here. That is classification of pairs
with the kernel of differences (Houlsby, Huszár, Ghahramani & Lengyel 2011), solved by Laplace's approximation
(Rasmussen & Williams 2006, *Gaussian Processes for Machine Learning*, algorithms 3.1, 3.2 and 5.1). The noise
of a judgement is the unit of f; the amplitudes of the kernel's blocks are learned by the approximate marginal
likelihood, so that which layers count is learned, too.

Where works are graded, :func:`join_pairs` adds pairs to the process of the grades: its posterior is the prior
of the pairs, and a judgement is as noisy as the comparison of two grades, Φ((f(x) − f(x′)) / √(2 σ²)), σ²
being the noise of a grade. So a pair tells as much as two grades of which only the order is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mirip_fast.errors import DataError
from mirip_fast.models.gp import (
    _LENGTH,
    GaussianProcess,
    _cholesky,
    _distances,
    _Kernel,
    _prepare,
)
from mirip_fast.runtime import one_blas_thread

FloatArray = NDArray[np.float64]
Index = NDArray[np.int64]

SEARCH = 300  # pairs that amplitudes are learned from at most
#: Of all amplitudes together, before anything is judged: two works then differ by about twice a judgement's
#: noise. The prior of each amplitude's logarithm is normal and wide, as few judgements say little about it.
_TOTAL, _LOG_SD, _FAR = 2.0, 1.5, 6.0
_STEPS, _CLOSE = 50, 1e-9  # of Newton's method, in nats
_NONE = np.empty(0, np.float32)  # rows are seen in one way alone: nothing else was measured
_QUANTILES = 999  # of the bell curve, from which the errors of a score are drawn


@dataclass(frozen=True)
class Preferences:
    """The posterior of f given p judged pairs of n works.

    Attributes:
        kernel: of prepared rows, with amplitudes in squares of a judgement's noise.
        centre: [D] float32, subtracted from a row.
        works: [n, D] float32, prepared rows.
        prior: [n, n] covariance of f before anything is judged.
        pairs: [p, 2] works of the judged pairs.
        slope, sure: [p] first and negative second derivative of the log likelihood by f(first) − f(second)
            at the posterior's mode.
        factor: [p, p] lower Cholesky factor of I + W^½ C W^½, C the prior covariance of the differences.
        evidence: the approximate log marginal likelihood of the judgements.
    """

    kernel: _Kernel
    centre: NDArray[np.float32]
    works: NDArray[np.float32]
    prior: FloatArray
    pairs: Index
    slope: FloatArray
    sure: FloatArray
    factor: FloatArray
    evidence: float

    @cached_property
    def weights(self) -> FloatArray:
        """[n] of the kernel between a row and each work."""
        result = np.zeros(len(self.works))
        np.add.at(result, self.pairs[:, 0], self.slope)
        np.add.at(result, self.pairs[:, 1], -self.slope)
        return result

    @cached_property
    def mean(self) -> FloatArray:
        """[n] expected f of the works, higher is better."""
        result: FloatArray = self.prior @ self.weights
        return result

    def score(self, rows: ArrayLike) -> FloatArray:
        """[k, D] features of any works → [k] expected f."""
        return self.process().score(rows)

    def differences(self, pairs: Index) -> tuple[FloatArray, FloatArray]:
        """[m, 2] works → mean and variance of f(first) − f(second), [m] each."""
        one, other = pairs.T
        own = np.diag(self.prior)
        prior = own[one] + own[other] - 2 * self.prior[one, other]
        told = self._told[:, one] - self._told[:, other]
        return self.mean[one] - self.mean[other], np.maximum(prior - (told**2).sum(axis=0), 0.0)

    def information(self, pairs: Index) -> FloatArray:
        """[m, 2] works → [m] bits that a verdict on each is expected to tell about f (BALD).

        The entropy of the mean prediction less the mean entropy of predictions. The latter is in closed form,
        as the entropy of a coin with chance Φ(x) is exp(−x² / (π ln 2)) to within 0.01 (Houlsby et al. 2011).
        """
        from scipy.special import entr, ndtr

        mean, variance = self.differences(pairs)
        width = np.pi * np.log(2) / 2
        entropies = np.exp(-(mean**2) / (2 * (variance + width)))
        entropies *= np.sqrt(width / (variance + width))
        chance = ndtr(mean / np.sqrt(1 + variance))
        result: FloatArray = (entr(chance) + entr(1 - chance)) / np.log(2) - entropies
        return result

    def given(
        self, pairs: ArrayLike, label: ArrayLike, weight: ArrayLike | None = None
    ) -> Preferences:
        """The posterior given these judgements in place of its own, with the amplitudes as they are."""
        index = np.asarray(pairs, dtype=np.int64).reshape(-1, 2)
        covariance = _of_differences(self.prior, index)
        _, slope, sure, factor, evidence = _laplace(covariance, _votes(label, weight))
        return replace(self, pairs=index, slope=slope, sure=sure, factor=factor, evidence=evidence)

    def process(self) -> GaussianProcess:
        """The same scores, and how sure they are, as a process that is kept and asked like any other."""
        from scipy.linalg import solve_triangular
        from scipy.special import ndtri

        judged = np.unique(self.pairs)
        sign = np.zeros((len(self.pairs), len(judged)))
        rows = np.arange(len(self.pairs))
        for column, value in zip(np.searchsorted(judged, self.pairs).T, (1.0, -1.0), strict=True):
            sign[rows, column] += value
        told = solve_triangular(self.factor, np.sqrt(self.sure)[:, None] * sign, lower=True)
        none = np.empty(0)
        return GaussianProcess(
            blocks=self.kernel.blocks, amplitudes=self.kernel.amplitudes, lengths=self.kernel.lengths,
            centre=self.centre, basis=self.works[judged], weights=self.weights[judged],
            factor=np.empty((0, 0)), left_out=none, left_out_sd=none,
            errors=ndtri((np.arange(_QUANTILES) + 0.5) / _QUANTILES),
            noise=0.0, mean=0.0, sd=1.0, evidence=self.evidence, told=told,
        )  # fmt: skip

    @cached_property
    def _told(self) -> FloatArray:
        """[p, n] whose products are what the judgements take from the prior covariance."""
        from scipy.linalg import solve_triangular

        cross = self.prior[:, self.pairs[:, 0]] - self.prior[:, self.pairs[:, 1]]
        result: FloatArray = solve_triangular(
            self.factor, (cross * np.sqrt(self.sure)).T, lower=True, check_finite=False
        )
        return result


def fit_pairs(
    rows: ArrayLike,
    pairs: ArrayLike,
    label: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    blocks: Sequence[int] | None = None,
    seed: int = 0,
) -> Preferences:
    """Learn f from judged pairs.

    Args:
        rows: [n, D] finite features of the works, judged or not; n² numbers are kept.
        pairs: [p, 2] rows of the two works; the time grows with p³, 1,000 take seconds.
        label: [p] 1 the first is better, −1 the second, 0 a tie: half a verdict for either.
        weight: [p] at least 0, how often each verdict counts; None: once.
        blocks: numbers per block, which add up to D; None: one block.
        seed: of the pairs that amplitudes are learned from, where there are more than :data:`SEARCH`.

    Raises:
        DataError: no verdict that is no tie, or blocks that do not add up.
    """
    x, index = np.asarray(rows), np.asarray(pairs, dtype=np.int64).reshape(-1, 2)
    votes = _votes(label, weight)
    sizes = np.asarray([x.shape[-1]] if blocks is None else blocks, dtype=np.int64)
    if sizes.sum() != x.shape[1]:
        raise DataError(f"blocks of {sizes.tolist()} numbers do not add up to {x.shape[1]}")
    if (votes[0] == votes[1]).all():
        raise DataError(
            f"{len(index)} judged pairs, none of them decided: there is nothing to learn"
        )
    centre = x.mean(axis=0, dtype=np.float64).astype(np.float32)
    parts = _prepare(x, sizes, centre, _NONE)
    lengths = np.array([_length(part) for part in parts])
    some = np.sort(np.random.default_rng(seed).permutation(len(index))[:SEARCH])
    kernel = _Kernel(sizes, _learn(parts, lengths, index[some], votes[:, some]), lengths)
    works, none = np.hstack(parts), np.empty(0)
    before = Preferences(
        kernel, centre, works, kernel.square(works, 0.0), index[:0], none, none,
        np.empty((0, 0)), 0.0,
    )  # fmt: skip
    return before.given(index, label, weight)


def join_pairs(
    process: GaussianProcess,
    rows: ArrayLike,
    pairs: ArrayLike,
    label: ArrayLike,
    weight: ArrayLike | None = None,
) -> GaussianProcess:
    """A process of grades given judged pairs, too; what left-out grades would be stays as it is.

    Args:
        process: fitted to grades.
        rows: [q, D] finite features of the works in pairs, graded or not.
        pairs, label, weight: as for :func:`fit_pairs`.
    """
    from scipy.linalg import solve_triangular

    index = np.asarray(pairs, dtype=np.int64).reshape(-1, 2)
    one, other = index.T
    noise = (2 * process.noise) ** 0.5
    basis, known = process.given_grades(rows)
    more = np.zeros(len(basis) - len(process.basis))
    process = replace(process, basis=basis, weights=np.concatenate([process.weights, more]))
    covariance = known @ process.kernel(rows).T
    mean = (process.score(rows) - process.mean) / process.sd
    _, slope, sure, factor, _ = _laplace(
        _of_differences((covariance + covariance.T) / 2, index) / noise**2,
        _votes(label, weight),
        mean=(mean[one] - mean[other]) / noise,
    )
    sign = np.zeros((len(index), len(known)))
    sign[np.arange(len(index)), one] += 1
    sign[np.arange(len(index)), other] -= 1
    told = solve_triangular(factor, np.sqrt(sure)[:, None] * sign, lower=True)
    return replace(
        process,
        weights=process.weights + slope @ sign @ known / noise,
        told=np.linalg.qr(told, mode="r") @ known / noise,
    )


def _votes(label: ArrayLike, weight: ArrayLike | None) -> FloatArray:
    """[2, p] how much of each verdict is for the first and the second work: 1, ½ or 0, times its weight."""
    won = (np.asarray(label, dtype=np.float64) + 1) / 2
    result: FloatArray = np.array([won, 1 - won]) * (1.0 if weight is None else np.asarray(weight))
    return result


def _length(part: NDArray[np.float32]) -> float:
    """2 medians of the distances among at most 1,000 works."""
    some = part[:: -(-len(part) // 1_000)]
    distances = _distances(some, some)
    apart = distances[distances > 1e-3]  # nearer ones are the same picture
    return _LENGTH * float(np.median(apart)) if len(apart) else 1.0


def _of_differences(kernel: FloatArray, pairs: NDArray[np.int64]) -> FloatArray:
    """[m, m] covariance of works → [p, p] covariance of differences."""
    half = kernel[pairs[:, 0]] - kernel[pairs[:, 1]]
    result: FloatArray = half[:, pairs[:, 0]] - half[:, pairs[:, 1]]
    return result


def _likelihood(g: FloatArray, votes: FloatArray) -> tuple[FloatArray, ...]:
    """log p of each verdict and its first three derivatives by the difference g; [p] each."""
    from scipy.special import log_ndtr

    value, first, second, third = np.zeros((4, len(g)))
    for sign, share in zip((1.0, -1.0), votes, strict=True):
        log = log_ndtr(sign * g)
        ratio = np.exp(-(g**2) / 2 - log) / np.sqrt(2 * np.pi)
        value += share * log
        first += share * sign * ratio
        bend = np.clip(
            ratio * (sign * g + ratio), 0.0, 1.0
        )  # far out, it is a difference of equals
        second -= share * bend
        third += share * sign * (bend * (sign * g + 2 * ratio) - ratio)
    return value, first, second, third


def _laplace(
    prior: FloatArray,
    votes: FloatArray,
    start: FloatArray | None = None,
    mean: FloatArray | float = 0.0,
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray, float]:
    """The mode g, the likelihood's first and negative second derivative there, the factor, the log evidence.

    Newton's method in a = C⁻¹ (g − mean), halving steps that do not help; the objective is concave.
    """
    from scipy.linalg import cho_solve

    a = np.zeros(votes.shape[1]) if start is None else start
    g = mean + prior @ a
    value, slope, bend, _ = _likelihood(g, votes)
    now = value.sum() - a @ (g - mean) / 2
    for _ in range(_STEPS):
        sure = -bend
        root = np.sqrt(sure)
        factor = _cholesky(np.eye(votes.shape[1]) + root[:, None] * prior * root)
        b = sure * (g - mean) + slope
        step = b - root * cho_solve((factor, True), root * (prior @ b), check_finite=False) - a
        size = 1.0
        while True:
            trial = a + size * step
            g = mean + prior @ trial
            value, slope, bend, _ = _likelihood(g, votes)
            then = value.sum() - trial @ (g - mean) / 2
            if then >= now - 1e-12 * abs(now) or size < 1e-6:
                break
            size /= 2
        a, gained, now = trial, then - now, then
        if gained < _CLOSE:
            break
    sure = -bend
    root = np.sqrt(sure)
    factor = np.tril(_cholesky(np.eye(votes.shape[1]) + root[:, None] * prior * root))
    return g, slope, sure, factor, float(now - np.log(np.diag(factor)).sum())


@one_blas_thread()
def _learn(
    parts: list[NDArray[np.float32]],
    lengths: FloatArray,
    pairs: NDArray[np.int64],
    votes: FloatArray,
) -> FloatArray:
    """[B] amplitudes of the highest evidence, times a wide prior."""
    from scipy.linalg import solve_triangular
    from scipy.optimize import minimize

    judged, place = np.unique(pairs, return_inverse=True)
    place = place.reshape(-1, 2)
    kernels = np.array(
        [
            _of_differences(np.exp(_distances(part[judged], part[judged]) / -length), place)
            for part, length in zip(parts, lengths, strict=True)
        ]
    )
    middle = np.log(_TOTAL / len(parts))
    last: list[FloatArray] = [np.zeros(votes.shape[1])]

    def cost(logs: FloatArray) -> tuple[float, FloatArray]:
        values = np.exp(logs)
        prior = np.tensordot(values, kernels, 1)
        g, slope, sure, factor, evidence = _laplace(prior, votes, last[0])
        last[0] = slope
        root = np.sqrt(sure)
        half = solve_triangular(factor, np.diag(root), lower=True)
        inverse = half.T @ half
        third = _likelihood(g, votes)[3]
        spread = solve_triangular(factor, root[:, None] * prior, lower=True)
        moved = -(np.diag(prior) - (spread**2).sum(axis=0)) * -third / 2
        slopes = np.empty(len(values))
        for b, kernel in enumerate(kernels):
            part = kernel @ slope
            explicit = (slope @ part - (inverse * kernel).sum()) / 2
            slopes[b] = explicit + moved @ (part - prior @ (inverse @ part))
        away = (logs - middle) / _LOG_SD
        return (
            float(away @ away) / 2 - evidence,
            away / _LOG_SD - values * slopes,
        )

    start = np.full(len(parts), middle)
    bounds = [(middle - _FAR, middle + _FAR)] * len(parts)
    done: Any = minimize(
        cost, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 40}
    )
    result: FloatArray = np.exp(done.x)
    return result
