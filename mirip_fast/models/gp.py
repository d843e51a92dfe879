"""A Gaussian process that learns scores from rows of features, with NumPy and SciPy alone.

y = m + f(x) + noise, where f and the unknown mean have the covariance σ² (1 + exp(−|x − x′| / ℓ)): an
exponential (Matérn ½) kernel and a constant (Rasmussen & Williams 2006, *Gaussian Processes for Machine
Learning*, chapters 2, 4, 5). A row is made of blocks (CLS token and patch mean of a layer, say); each block
is centred and scaled to length 1, so that all weigh the same. Length, noise and the choice of blocks are
those of the highest marginal likelihood; one eigendecomposition per length gives it for all noises.

Up to :data:`EXACT` rows nothing is approximated. Beyond, the process is conditioned on its values at
:data:`INDUCING` rows (Quiñonero-Candela & Rasmussen 2005), so that time and memory grow with n.

What rows would score had their group been left out comes in closed form; nothing is fitted again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mirip_fast.errors import CheckpointError, DataError

FloatArray = NDArray[np.float64]

EXACT = 6_000  # rows up to which nothing is approximated: 290 MB for the one matrix
INDUCING = 2_000
SEARCH = 1_000  # rows that length, noise and blocks are chosen on, at most

LENGTHS = (
    2.0,
    0.5,
    1.0,
    4.0,
    8.0,
)  # in units of the median distance; blocks are chosen at the first
NOISES = 10.0 ** np.arange(-3, 1.6, 0.25)  # in units of σ²

_PIECE = 2_048  # rows of a kernel matrix made at a time


def normal_scores(tiers: ArrayLike) -> FloatArray:
    """[n] tiers, 0 = best → [n] numbers, higher is better: the normal quantile of a tier's middle rank.

    (Van der Waerden scores: equal steps of tiers are not equal steps of quality where the shares differ.)
    """
    from scipy.special import ndtri

    _, code, count = np.unique(np.asarray(tiers), return_inverse=True, return_counts=True)
    middle = (np.cumsum(count) - count / 2) / count.sum()
    result: FloatArray = -ndtri(middle)[code]
    return result


@dataclass(frozen=True)
class GaussianProcess:
    """A fitted process; :meth:`arrays` and :meth:`from_arrays` keep it to the bit.

    Attributes (n training rows of D numbers in B blocks, m basis rows of d chosen numbers):
        blocks: [B] int64, numbers per block, in the order in which they stand in a row; their sum is D.
        chosen: int64, the blocks that are used.
        centre: [d] float32, subtracted from a row.
        basis: [m, d] float32, prepared rows: all training rows, or the inducing ones.
        weights: [m] float64, of the kernel between a row and each basis row.
        factor: [m, m] float64, of the approximate process, lower triangular; [0, 0] where it is exact.
        left_out: [n] float64, each training row's score by the other groups alone, in the unit of y.
        left_out_sd: [n] float64, the standard deviation of y around it, noise included.
        errors: [n] float64, (y − left_out) / left_out_sd.
        length, noise, variance: ℓ, the noise's variance in units of σ², and σ², of standardised y.
        mean, sd: of y.
        evidence: log marginal likelihood per row of those that were searched.
    """

    blocks: NDArray[np.int64]
    chosen: NDArray[np.int64]
    centre: NDArray[np.float32]
    basis: NDArray[np.float32]
    weights: FloatArray
    factor: FloatArray
    left_out: FloatArray
    left_out_sd: FloatArray
    errors: FloatArray
    length: float
    noise: float
    variance: float
    mean: float
    sd: float
    evidence: float

    @classmethod
    def fit(
        cls,
        rows: ArrayLike,
        y: ArrayLike,
        groups: Sequence[Any] | None = None,
        *,
        blocks: Sequence[int] | None = None,
        choices: Sequence[Sequence[int]] | None = None,
        exact: int = EXACT,
        inducing: int = INDUCING,
        seed: int = 0,
    ) -> GaussianProcess:
        """Learn y from rows.

        Args:
            rows: [n, D] finite features.
            y: [n] finite numbers, higher is better: :func:`normal_scores` of tiers, or a finer score.
            groups: [n] names of what is left out together; None as a name: that row alone; None: every
                row alone.
            blocks: numbers per block, which add up to D; None: one block.
            choices: sets of blocks (counted from 0) to choose from; None: all blocks.
            exact: up to how many rows nothing is approximated.
            inducing: basis rows beyond that.
            seed: of the rows that are searched and of the basis rows, where these are not all.

        Raises:
            DataError: fewer than two rows, the same y for all, a number that is not finite, or
                lengths that do not fit.
        """
        x, target = np.asarray(rows), np.asarray(y, dtype=np.float64)
        sizes = np.asarray([x.shape[-1]] if blocks is None else blocks, dtype=np.int64)
        _check(x, target, groups, sizes)
        mean, sd = float(target.mean()), float(target.std())
        z = (target - mean) / sd
        rng = np.random.default_rng(seed)
        some = np.sort(rng.permutation(len(x))[:SEARCH])
        centre = x.mean(axis=0, dtype=np.float64).astype(np.float32)
        found = []
        for choice in choices or [range(len(sizes))]:
            used = np.asarray(choice, dtype=np.int64)
            distances, unit = _apart(_prepare(x[some], sizes, used, centre))
            found.append((_search(distances, z[some], LENGTHS[0] * unit), used, distances, unit))
        best, chosen, distances, unit = max(found, key=lambda one: one[0])
        others = (_search(distances, z[some], length * unit) for length in LENGTHS[1:])
        evidence, length, noise, variance = max(best, *others)
        u = _prepare(x, sizes, chosen, centre)
        members = _members(groups, len(x))
        if len(x) <= exact:
            basis, factor = u, np.empty((0, 0))
            weights, error, spread = _solve(u, z, length, noise, members)
        else:
            basis = u[np.sort(rng.permutation(len(x))[:inducing])]
            weights, error, spread, noise, factor = _reduce(u, z, basis, length, noise, members)
        left_out_sd = sd * np.sqrt(variance * spread)
        return cls(
            blocks=sizes,
            chosen=chosen,
            centre=centre,
            basis=basis,
            weights=weights,
            factor=factor,
            left_out=target - sd * error,
            left_out_sd=left_out_sd,
            errors=sd * error / left_out_sd,
            length=length,
            noise=noise,
            variance=variance,
            mean=mean,
            sd=sd,
            evidence=evidence,
        )

    @property
    def input_dim(self) -> int:
        """D, the numbers per feature row that it expects."""
        return int(self.blocks.sum())

    def score(self, rows: ArrayLike) -> FloatArray:
        """[k, D] features → [k] expected y, higher is better.

        Raises:
            CheckpointError: the features have another width than those it was trained on.
        """
        parts = [kernel @ self.weights for kernel in self._kernels(rows)]
        result: FloatArray = self.mean + self.sd * np.concatenate([np.empty(0), *parts])
        return result

    def spread(self, rows: ArrayLike) -> FloatArray:
        """[k, D] features → [k] standard deviation of y around :meth:`score`, noise included.

        Raises:
            CheckpointError: the features have another width than those it was trained on.
        """
        from scipy.linalg import solve_triangular

        parts = [np.empty(0)]
        for kernel in self._kernels(rows):
            half = solve_triangular(self._basis_factor, kernel.T, lower=True)
            if len(self.factor):
                half = solve_triangular(self.factor, half, lower=True)
                parts.append(self.noise * (1 + (half**2).sum(axis=0)))
            else:
                parts.append(_SELF + self.noise - (half**2).sum(axis=0))
        result: FloatArray = self.sd * np.sqrt(self.variance * np.concatenate(parts))
        return result

    def draw(self, rows: ArrayLike, draws: int, seed: int = 0) -> FloatArray:
        """[draws, k] values that the grader may give to k works: score + spread × error.

        The errors are those of the left-out training rows, drawn with replacement, and no bell curve.

        Raises:
            CheckpointError: the features have another width than those it was trained on.
        """
        score, spread = self.score(rows), self.spread(rows)
        drawn = np.random.default_rng(seed).integers(len(self.errors), size=(draws, len(score)))
        result: FloatArray = score + spread * self.errors[drawn]
        return result

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything as arrays, for a safetensors file."""
        return {f.name: np.ascontiguousarray(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> GaussianProcess:
        """The process that :meth:`arrays` described.

        Raises:
            CheckpointError: an array is missing.
        """
        absent = [f.name for f in fields(cls) if f.name not in arrays]
        if absent:
            raise CheckpointError(
                f"no Gaussian process in these arrays: {', '.join(absent)} missing"
            )
        values: dict[str, Any] = {f.name: arrays[f.name] for f in fields(cls)}
        return cls(**{k: v.item() if k in _NUMBERS else v for k, v in values.items()})

    def _kernels(self, rows: ArrayLike) -> Iterator[FloatArray]:
        """The kernel between k rows and the basis, [≤ _PIECE, m] at a time."""
        x = np.asarray(rows)
        if x.ndim != 2 or x.shape[1] != self.input_dim:
            raise CheckpointError(
                f"the Gaussian process expects rows of {self.input_dim} numbers, not {x.shape[1:]}"
            )
        for start in range(0, len(x), _PIECE):
            u = _prepare(x[start : start + _PIECE], self.blocks, self.chosen, self.centre)
            yield _kernel(u, self.basis, self.length)

    @cached_property
    def _basis_factor(self) -> FloatArray:
        """The Cholesky factor of the basis rows' kernel, with the noise where the process is exact."""
        return _cholesky(
            _square(self.basis, self.length, _JITTER if len(self.factor) else self.noise)
        )


_NUMBERS = ("length", "noise", "variance", "mean", "sd", "evidence")
_SELF = 2.0  # the kernel of a row with itself: 1 of the constant and 1 of the exponential
_JITTER = 1e-8  # of the inducing rows' kernel, which may hold the same row twice


def _check(
    x: NDArray[Any], y: FloatArray, groups: Sequence[Any] | None, sizes: NDArray[np.int64]
) -> None:
    if x.ndim != 2 or y.shape != x.shape[:1] or (groups is not None and len(groups) != len(y)):
        names = "" if groups is None else f" and {len(groups)} groups"
        raise DataError(
            f"{y.shape} grades{names} do not fit features of shape {x.shape}: [n, D] rows need n each"
        )
    if sizes.sum() != x.shape[1]:
        raise DataError(f"blocks of {sizes.tolist()} numbers do not add up to {x.shape[1]}")
    if not (np.isfinite(y).all() and np.isfinite(x).all()):
        raise DataError("a feature or a grade is not finite")
    if len(y) < 2 or y.min() == y.max():
        raise DataError(f"{len(y)} works that all have the same grade: there is nothing to learn")


def _members(groups: Sequence[Any] | None, n: int) -> list[NDArray[np.int64]]:
    """The rows of each group of two and more; the others are left out alone."""
    rows: dict[Any, list[int]] = {}
    for i, name in enumerate([None] * n if groups is None else groups):
        if name is not None:
            rows.setdefault(name, []).append(i)
    return [np.array(r) for r in rows.values() if len(r) > 1]


def _prepare(
    x: NDArray[Any],
    sizes: NDArray[np.int64],
    chosen: NDArray[np.int64],
    centre: NDArray[np.float32],
) -> NDArray[np.float32]:
    """[n, D] rows → [n, d] of length 1: the chosen blocks, centred, each of length 1 / √(their number)."""
    ends = np.cumsum(sizes)
    parts = []
    for k in chosen:
        columns = slice(ends[k] - sizes[k], ends[k])
        part = x[:, columns].astype(np.float64) - centre[columns]
        length = np.linalg.norm(part, axis=1, keepdims=True)
        parts.append((part / np.maximum(length, 1e-12)).astype(np.float32))
    result: NDArray[np.float32] = (np.hstack(parts) / len(parts) ** 0.5).astype(np.float32)
    return result


def _kernel(a: NDArray[np.float32], b: NDArray[np.float32], length: float) -> FloatArray:
    """1 + exp(−|a − b| / ℓ) of prepared rows: [n, d], [m, d] → [n, m]."""
    k = _distances(a, b)
    k /= -length
    np.exp(k, out=k)
    k += 1
    return k


def _distances(a: NDArray[np.float32], b: NDArray[np.float32]) -> FloatArray:
    """|a − b|, in float64: the square root would make 3e-4 of float32's error for equal rows."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    d: FloatArray = x @ y.T
    d *= -2
    d += (x**2).sum(axis=1)[:, None]
    d += (y**2).sum(axis=1)
    np.maximum(d, 0, out=d)
    return np.sqrt(d, out=d)


def _square(u: NDArray[np.float32], length: float, noise: float) -> FloatArray:
    """[n, n] kernel of rows with each other, the noise on its diagonal; in one matrix, row by row."""
    k = np.empty((len(u), len(u)))
    for start in range(0, len(u), _PIECE):
        k[start : start + _PIECE] = _kernel(u[start : start + _PIECE], u, length)
    np.fill_diagonal(k, _SELF + noise)
    return k


def _cholesky(k: FloatArray) -> FloatArray:
    """The lower factor, in place of k; what stands above the diagonal means nothing."""
    from scipy.linalg import cholesky

    # k is symmetric: its transpose, in LAPACK's order, needs no copy.
    factor: FloatArray = cholesky(k.T, lower=True, overwrite_a=True, check_finite=False)
    return factor


def _apart(u: NDArray[np.float32]) -> tuple[FloatArray, float]:
    """[n, n] distances of rows, and their median without those of equal rows."""
    distances = _distances(u, u)
    np.fill_diagonal(distances, 0)
    apart = distances[distances > 1e-6]
    unit = float(np.median(apart)) if len(apart) else 1.0
    return distances, unit


def _search(
    distances: FloatArray, z: FloatArray, length: float
) -> tuple[float, float, float, float]:
    """(log marginal likelihood per row, ℓ, noise, σ²) where it is highest for this ℓ; σ² is profiled out."""
    values, vectors = np.linalg.eigh(1 + np.exp(distances / -length))
    scaled = 1 / (np.maximum(values, 0)[:, None] + NOISES)
    variance = ((vectors.T @ z)[:, None] ** 2 * scaled).mean(axis=0)
    evidence = (np.log(scaled).mean(axis=0) - np.log(2 * np.pi * variance) - 1) / 2
    k = int(evidence.argmax())
    return float(evidence[k]), length, float(NOISES[k]), float(variance[k])


def _solve(
    u: NDArray[np.float32],
    z: FloatArray,
    length: float,
    noise: float,
    members: list[NDArray[np.int64]],
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Exact: weights, errors of left-out rows, and their variances in units of σ²; [n] each."""
    from scipy.linalg import cho_solve
    from scipy.linalg.lapack import dpotri

    factor = _cholesky(_square(u, length, noise))
    weights = cho_solve((factor, True), z, check_finite=False)
    inverse, _ = dpotri(factor, lower=True, overwrite_c=True)  # its lower triangle
    variance = 1 / np.diag(inverse)
    error = weights * variance
    for rows in members:
        block = np.tril(inverse[np.ix_(rows, rows)])
        inverted = np.linalg.inv(block + np.tril(block, -1).T)
        error[rows], variance[rows] = inverted @ weights[rows], np.diag(inverted)
    return weights, error, variance


def _reduce(
    u: NDArray[np.float32],
    z: FloatArray,
    basis: NDArray[np.float32],
    length: float,
    noise: float,
    members: list[NDArray[np.int64]],
) -> tuple[FloatArray, FloatArray, FloatArray, float, FloatArray]:
    """Approximate: weights [m], errors and variances [n] of left-out rows, the noise, the factor [m, m].

    With Φ = K_nm L⁻ᵀ and K_mm = L Lᵀ it is ridge regression of z on Φ. What Φ lacks of a row's own variance
    counts as noise, in the mean over the rows that are no basis.
    """
    from scipy.linalg import cho_solve, solve_triangular

    lower = _cholesky(_square(basis, length, _JITTER))
    pieces = [slice(i, i + _PIECE) for i in range(0, len(u), _PIECE)]

    def phi(rows: slice | NDArray[np.int64]) -> FloatArray:  # [m, k]
        result: FloatArray = solve_triangular(lower, _kernel(u[rows], basis, length).T, lower=True)
        return result

    gram, moment, explained = np.zeros((len(basis), len(basis))), np.zeros(len(basis)), 0.0
    for piece in pieces:
        part = phi(piece)
        gram += part @ part.T
        moment += part @ z[piece]
        explained += float((part**2).sum())
    noise += max(0.0, _SELF * len(u) - explained) / max(1, len(u) - len(basis))
    gram[np.diag_indices_from(gram)] += noise
    factor = np.tril(_cholesky(gram))
    coefficients = cho_solve((factor, True), moment)
    error, variance = np.empty(len(u)), np.empty(len(u))
    for piece in pieces:
        part = phi(piece)
        kept = 1 - (solve_triangular(factor, part, lower=True) ** 2).sum(axis=0)
        error[piece] = (z[piece] - coefficients @ part) / kept
        variance[piece] = noise / kept
    for rows in members:
        part = phi(rows)
        half = solve_triangular(factor, part, lower=True)
        inverted = np.linalg.inv(np.eye(len(rows)) - half.T @ half)
        error[rows] = inverted @ (z[rows] - coefficients @ part)
        variance[rows] = noise * np.diag(inverted)
    return solve_triangular(lower.T, coefficients), error, variance, noise, factor
