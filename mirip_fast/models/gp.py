"""A Gaussian process that learns scores from rows of features, with NumPy and SciPy alone.

y = f(x) + noise. A row is made of blocks (CLS token and patch mean of a layer, say), each centred and seen
in two ways: scaled to length 1, and with each number in its standard deviations. f is a constant and one
function per block and way. Its covariance is a sum of exponential (Matérn ½) kernels, 1 + Σ_b a_b exp(−|x_b −
x′_b| / ℓ_b) (Rasmussen & Williams 2006, *Gaussian Processes for Machine Learning*, chapters 2, 4, 5). The
amplitudes a_b and the noise are those of the highest marginal likelihood: a part that does not help gets
none, so that which layers count, and how, is learned, without validation works.

Up to :data:`EXACT` rows nothing is approximated. Beyond, the process is conditioned on its values at
:data:`INDUCING` rows (Quiñonero-Candela & Rasmussen 2005), so that time and memory grow with n.

Where several graders graded, y is the mean of their grades of a row, and its model is f(x) + the mean of its
graders' strictness (a normal constant each) + noise, of which a part shrinks with the number of grades. What
strictness is found to be is taken off y, so that grades of a strict and a mild grader are not compared.

What rows would score had their group been left out comes in closed form; nothing is fitted again.

Where a grade is of a set of rows (an applicant's works) and not of each, y of a set is the mean of f over its
rows, and noise: observations through linear functionals stay exact (Rasmussen & Williams, 9.8), the kernel of
two sets is the mean over their pairs of rows, and each row's score comes from the same f.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mirip_fast.data.splits import members_of
from mirip_fast.errors import CheckpointError, DataError
from mirip_fast.runtime import one_blas_thread

FloatArray = NDArray[np.float64]

EXACT = 6_000  # rows up to which nothing is approximated: 290 MB for the one matrix
INDUCING = 2_000
SEARCH = 1_000  # rows that amplitudes and noise are learned from, at most

_LENGTH = 2.0  # ℓ_b in medians of the block's distances; a longer one with a larger amplitude is much alike
_LEAST = 1e-3  # share of all amplitudes below which a block is not used
_SURE = 1_500  # basis rows that a spread is computed from, at most
_TAILS = 4.0  # degrees of freedom of errors
_JITTER = 1e-8  # noise of the inducing rows, which may hold the same row twice
_PIECE = 1_024  # rows of a kernel matrix made at a time


def normal_scores(tiers: ArrayLike) -> FloatArray:
    """[n] tiers, 0 = best → [n] numbers, higher is better: the normal quantile of a tier's middle rank.

    (Van der Waerden scores: equal steps of tiers are not equal steps of quality where the shares differ.)
    """
    from scipy.special import ndtri

    _, code, count = np.unique(np.asarray(tiers), return_inverse=True, return_counts=True)
    middle = (np.cumsum(count) - count / 2) / count.sum()
    result: FloatArray = -ndtri(middle)[code]
    return result


def errors_in_tiers(
    tiers: ArrayLike, expected: FloatArray, sd: FloatArray, seed: int = 0
) -> FloatArray:
    """[n] how far from what was expected works lie by a finer grade of which only the tier is told, in sd.

    A tier is an interval of the normal scale, which is shrunk as its middles are (their covariance with the
    finer grades). A work's finer grade is drawn from Student's t of :data:`_TAILS` degrees of freedom around
    what was expected, inside its tier's interval, of the most likely width: now and then graders differ from
    it by more than a bell curve has. (Residuals of the middles would count tiers as scatter.)

    Args:
        tiers: [n], 0 = best.
        expected, sd: [n] what :func:`normal_scores` of them were expected, and the standard deviation.
        seed: of the drawing.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import ndtri, stdtr, stdtrit

    _, first, code, count = np.unique(
        np.asarray(tiers), return_index=True, return_inverse=True, return_counts=True
    )
    edges = ndtri(1 - np.r_[0, np.cumsum(count)] / count.sum())
    density = np.exp(-(edges**2) / 2) / np.sqrt(2 * np.pi)
    edges *= normal_scores(tiers)[first] @ np.diff(density)
    high, low = ((edges[k] - expected) / sd for k in (code, code + 1))

    def cost(log: float) -> float:
        chance = stdtr(_TAILS, high / np.exp(log)) - stdtr(_TAILS, low / np.exp(log))
        return -float(np.log(np.maximum(chance, 1e-12)).sum())

    width = np.exp(minimize_scalar(cost, bounds=(-3, 3), method="bounded").x)
    below, above = stdtr(_TAILS, low / width), stdtr(_TAILS, high / width)
    place = below + (above - below) * np.random.default_rng(seed).random(len(code))
    result: FloatArray = width * stdtrit(_TAILS, np.clip(place, 1e-6, 1 - 1e-6))
    return result


def draw_errors(
    errors: FloatArray,
    size: tuple[int, int],
    seed: int = 0,
    together: NDArray[np.int64] | None = None,
    shared: float = 0.0,
) -> FloatArray:
    """[draws, k] of the known errors, drawn with replacement, and no bell curve.

    Args:
        errors: [m].
        size: draws, k.
        seed: of the draws.
        together: [k] numbers of sets 0 … G − 1 whose works err alike; None: every work alone.
        shared: correlation of the errors of two works of one set (0–1): each takes its set's error, and not
            one of its own, with the chance √shared, so that each work's errors stay as they are.
    """
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(errors), size=size)
    if together is not None and shared > 0:
        common = rng.integers(len(errors), size=(size[0], int(together.max(initial=-1)) + 1))
        drawn = np.where(rng.random(size) < shared**0.5, common[:, together], drawn)
    return errors[drawn]


def grader_scores(grades: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """What a process learns of several graders: y [n], and each one's share in it [n, G].

    y is the mean over a row's graders of :func:`normal_scores` of each one's own tiers.

    Args:
        grades: [n, G] tiers, 0 = best, negative for none; every row has one.
    """
    codes = np.asarray(grades)
    there = codes >= 0
    shares: FloatArray = there / there.sum(axis=1, keepdims=True)
    scores = np.zeros(codes.shape)
    for g, rows in enumerate(there.T):
        scores[rows, g] = normal_scores(codes[rows, g]) if rows.any() else 0.0
    return (shares * scores).sum(axis=1), shares


@dataclass(frozen=True)
class GaussianProcess:
    """A fitted process; :meth:`arrays` and :meth:`from_arrays` keep it to the bit.

    Attributes (n training rows of D numbers in B blocks, m basis rows of d chosen numbers):
        blocks: [B] int64, numbers per block, in the order in which they stand in a row; their sum is D.
        amplitudes: [2B] float64, a_b in variances of y, of the blocks scaled to length 1 and of those in
            standard deviations; 0 for one that is not used. [B] without the latter.
        lengths: as many, ℓ_b.
        centre: [D] float32, subtracted from a row.
        basis: [m, d] float32, prepared rows: all training rows, or the inducing ones.
        weights: [m] float64, of the kernel between a row and each basis row.
        factor: [m, m] float64, of the approximate process, lower triangular; [0, 0] where it is exact.
        left_out: [n] float64, each training row's score by the other groups alone, in the unit of y.
        left_out_sd: [n] float64, the standard deviation of y around it, noise included.
        errors: [n] float64, (y − left_out) / left_out_sd.
        noise: its variance, in variances of y.
        mean, sd: of y.
        evidence: log marginal likelihood per row of standardised y, of the rows learned from.
        told: [p, m] float64, of a process that learned from judged pairs (:mod:`.preference`): its product
            with the kernel of a row is what they take from the variance of f; [0, 0] without. Where they
            were learned beside y, the basis ends with the rows of their works.
        sets: [n] int64, of rows that were graded in sets, the number of each row's set; then ``errors`` is
            [s], per set (y − mean of left_out) / mean of left_out_sd; [0] where every row has its own grade.
        deviation: [D] float32, the standard deviation of each number; [0] where only lengths of 1 are seen.
    """

    blocks: NDArray[np.int64]
    amplitudes: FloatArray
    lengths: FloatArray
    centre: NDArray[np.float32]
    basis: NDArray[np.float32]
    weights: FloatArray
    factor: FloatArray
    left_out: FloatArray
    left_out_sd: FloatArray
    errors: FloatArray
    noise: float
    mean: float
    sd: float
    evidence: float
    told: FloatArray = field(default_factory=lambda: np.empty((0, 0)))
    sets: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    deviation: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))

    @classmethod
    def fit(
        cls,
        rows: ArrayLike,
        y: ArrayLike,
        groups: Sequence[Any] | None = None,
        *,
        blocks: Sequence[int] | None = None,
        sets: ArrayLike | None = None,
        exact: int = EXACT,
        inducing: int = INDUCING,
        seed: int = 0,
        graders: NDArray[np.float64] | None = None,
        tiers: ArrayLike | None = None,
    ) -> GaussianProcess:
        """Learn y from rows.

        Args:
            rows: [n, D] finite features.
            y: [n] finite numbers, higher is better: :func:`normal_scores` of tiers, or a finer score.
            groups: [n] names of what is left out together; None as a name: that row alone; None: every
                row alone.
            blocks: numbers per block, which add up to D; None: one block.
            sets: [n] numbers of sets that have one grade, the same y in all their rows, and lie in one group;
                never approximated. None: every row has its own.
            exact: up to how many rows nothing is approximated.
            inducing: basis rows beyond that.
            seed: of the rows that amplitudes are learned from and of the basis rows, where not all are.
            graders: [n, G] the share that each of several graders has in y; a row adds up to 1. None: one.
            tiers: [n] those that y is the :func:`normal_scores` of: errors are then what graders may have
                meant by them (:func:`errors_in_tiers`).

        Raises:
            DataError: fewer than two rows, the same y for all, a number that is not finite, or
                lengths that do not fit.
        """
        x, target = np.asarray(rows), np.asarray(y, dtype=np.float64)
        sizes = np.asarray([x.shape[-1]] if blocks is None else blocks, dtype=np.int64)
        _check(x, target, groups, sizes)
        first, set_of = np.unique(
            np.arange(len(x)) if sets is None else sets, return_index=True, return_inverse=True
        )[1:]
        mean, sd = float(target[first].mean()), float(target[first].std())
        z = (target - mean) / sd
        rng = np.random.default_rng(seed)
        some = np.sort(rng.permutation(len(x))[:SEARCH])
        if sets is not None:  # whole sets
            drawn = rng.permutation(len(first))
            count = np.searchsorted(np.cumsum(np.bincount(set_of)[drawn]), SEARCH, side="right")
            some = np.flatnonzero(np.isin(set_of, drawn[: max(2, int(count))]))
        centre = x.mean(axis=0, dtype=np.float64).astype(np.float32)
        deviation = x.std(axis=0, dtype=np.float64).astype(np.float32)
        deviation[deviation == 0] = 1
        shares = np.zeros((len(x), 0)) if graders is None else graders
        thin = (shares**2).sum(axis=1)  # 1 / number of grades
        kinds = np.stack([np.ones(len(x)), *([thin] if np.ptp(thin) > 0 else [])])
        amplitudes, lengths, noises, evidence, strictness = _learn(
            _prepare(x[some], sizes, centre, deviation), z[some], shares[some], kinds[:, some],
            None if sets is None else set_of[some],
        )  # fmt: skip
        if graders is not None:
            z -= shares @ strictness
            target = mean + sd * z
        of_row = noises @ kinds
        noise = float(of_row.mean())
        relative = np.sqrt(of_row / noise)
        used = amplitudes >= _LEAST * amplitudes.sum()
        amplitudes = np.where(used, amplitudes, 0.0)
        kernel = _Kernel(sizes, amplitudes, lengths)
        u = _chosen(_prepare(x, sizes, centre, deviation), amplitudes)
        # Rows of a group of two and more are left out together, the others alone.
        members = [
            rows for rows in members_of(() if groups is None else groups)[1] if len(rows) > 1
        ]
        if sets is not None:
            basis, factor = u, np.empty((0, 0))
            names = [
                f"\n{s}" if groups is None or groups[i] is None else groups[i]
                for s, i in enumerate(first)
            ]
            weights, error, spread = _solve_sets(u, z[first], kernel, noise, set_of, names)
        elif len(x) <= exact:
            basis, factor = u, np.empty((0, 0))
            weights, error, spread = _solve(u, z, kernel, of_row, members)
        else:
            basis = u[np.sort(rng.permutation(len(x))[:inducing])]
            weights, error, spread, noise, factor = _reduce(
                u, z, basis, kernel, noise, members, relative
            )
        left_out_sd = sd * np.sqrt(spread)
        average = _averaging(set_of)
        own_error = sd * (average @ error) / (average @ left_out_sd)
        if tiers is not None:
            expected, own_sd = average @ (target - sd * error), average @ left_out_sd
            own_error = errors_in_tiers(np.asarray(tiers)[first], expected, own_sd, seed)
        return cls(
            blocks=sizes,
            amplitudes=amplitudes,
            lengths=lengths,
            centre=centre,
            deviation=deviation,
            basis=basis,
            weights=weights,
            factor=factor,
            left_out=target - sd * error,
            left_out_sd=left_out_sd,
            errors=own_error,
            sets=set_of.astype(np.int64) if sets is not None else np.empty(0, np.int64),
            noise=noise,
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

    def __call__(self, features: NDArray[np.floating]) -> NDArray[np.float32]:
        """As :meth:`score`, the way a head is asked: [k, D] features → [k] float32."""
        return self.score(features).astype(np.float32)

    @property
    def used(self) -> NDArray[np.bool_]:
        """[B] whether it looks at a block."""
        looked: NDArray[np.bool_] = np.any(self.amplitudes.reshape(-1, len(self.blocks)), axis=0)
        return looked

    def of_used(self) -> GaussianProcess:
        """The same process, for rows that hold the used blocks only."""
        used = self.used
        numbers, parts = np.repeat(used, self.blocks), np.resize(used, len(self.amplitudes))
        return replace(
            self,
            blocks=self.blocks[used],
            amplitudes=self.amplitudes[parts],
            lengths=self.lengths[parts],
            centre=self.centre[numbers],
            deviation=self.deviation[numbers] if len(self.deviation) else self.deviation,
        )

    def spread(self, rows: ArrayLike) -> FloatArray:
        """[k, D] features → [k] standard deviation of y around :meth:`score`, noise included.

        Of an exact process it comes from 1,500 of the training rows, at most, which makes it larger, never
        smaller, than from all (Rasmussen & Williams, 8.3.3): on 3,000 made rows by 2 to 4 % in the mean,
        14 % at most. A training row's own is that of its left-out score: its grade is in its score, and
        graders may still grade it otherwise. (Of an approximate process the two hardly differ.)
        Of judged pairs: that of f(x) less the mean f of the basis rows, as pairs tell differences only.

        Raises:
            CheckpointError: the features have another width than those it was trained on.
        """
        return self._predict(rows)[1]

    def draw(
        self,
        rows: ArrayLike,
        draws: int,
        seed: int = 0,
        *,
        together: NDArray[np.int64] | None = None,
        shared: float = 0.0,
    ) -> FloatArray:
        """[draws, k] values that the grader may give to k works: score + spread × error.

        The errors are those of the left-out training rows, as :func:`draw_errors` draws them.

        Raises:
            CheckpointError: the features have another width than those it was trained on.
        """
        score, spread = self._predict(rows)
        size = (draws, len(score))
        result: FloatArray = score + spread * draw_errors(self.errors, size, seed, together, shared)
        return result

    def _predict(self, rows: ArrayLike) -> tuple[FloatArray, FloatArray]:
        """[k] :meth:`score` and :meth:`spread` of rows, whose kernel is made once."""
        means, variances = [np.empty(0)], [np.empty(0)]
        for kernel in self._kernels(rows):
            means.append(self.mean + self.sd * (kernel @ self.weights))
            variances.append(np.maximum(self._variance(kernel), 0.0))
            if len(self.left_out_sd) == self._graded:
                graded = kernel[:, : self._graded]
                nearest = graded.argmax(axis=1)
                same = graded.max(axis=1) > (1 - 1e-6) * self._kernel.self
                own = (self.left_out_sd[nearest] / self.sd) ** 2
                variances[-1] = np.where(same, own, variances[-1])
        return np.concatenate(means), self.sd * np.sqrt(np.concatenate(variances))

    def _variance(self, kernel: FloatArray) -> FloatArray:
        """[k] of y, in variances of y, given the kernel [k, m] of rows and basis."""
        from scipy.linalg import solve_triangular

        if self.pairs_alone:
            own = self._kernel.square(self.basis, 0.0).mean(axis=0)
            before = self._kernel.self - 2 * kernel.mean(axis=1) + own.mean()
            after: FloatArray = before - ((self.told @ (kernel - own).T) ** 2).sum(axis=0)
            return after
        joined = ((self.told @ kernel.T) ** 2).sum(axis=0) if len(self.told) else 0.0
        kernel = kernel[:, : self._graded]
        if len(self.factor):
            half = solve_triangular(self._basis_factor, kernel.T, lower=True)
            lacking = np.maximum(self._kernel.self - (half**2).sum(axis=0), 0.0)  # the noise has it
            half = solve_triangular(self.factor, half, lower=True)
            own = self.noise * (half**2).sum(axis=0)
            # Pairs were joined to f with all its variance: they take the same share of what is told here.
            left = np.clip(1 - joined / (own + lacking), 0.0, 1.0)
            approximate: FloatArray = self.noise + own * left
            return approximate
        part = _averaging(self.sets) @ kernel.T if len(self.sets) else kernel[:, self._sure].T
        half = solve_triangular(self._basis_factor, part, lower=True)
        exact: FloatArray = self._kernel.self + self.noise - (half**2).sum(axis=0) - joined
        return exact

    def given_grades(self, rows: ArrayLike) -> tuple[NDArray[np.float32], FloatArray]:
        """[q, D] features → the basis [m, d] with these rows behind it, and M [q, m]: the covariance of f,
        given the grades, of them and any others is M times the kernel of that basis and those."""
        from scipy.linalg import cho_solve, solve_triangular

        u = self._seen(np.asarray(rows))
        cross = self._kernel(self.basis, u)
        if len(self.sets):
            average = _averaging(self.sets)
            told = average.T @ cho_solve((self._basis_factor, True), average @ cross)
        elif len(self.factor):
            half = solve_triangular(self._basis_factor, cross, lower=True)
            half -= self.noise * cho_solve((self.factor, True), half)
            told = solve_triangular(self._basis_factor.T, half)
        else:
            factor = _cholesky(self._kernel.square(self.basis, self.noise))
            told = cho_solve((factor, True), cross, check_finite=False)
        return np.vstack([self.basis, u]), np.hstack([-told.T, np.eye(len(u))])

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything as arrays, for a safetensors file."""
        return {f.name: np.ascontiguousarray(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> GaussianProcess:
        """The process that :meth:`arrays` described.

        Raises:
            CheckpointError: an array is missing.
        """
        needed = [f.name for f in fields(cls) if f.default_factory is MISSING]
        absent = [name for name in needed if name not in arrays]
        if absent:
            raise CheckpointError(
                f"no Gaussian process in these arrays: {', '.join(absent)} missing"
            )
        values: dict[str, Any] = {f.name: arrays[f.name] for f in fields(cls) if f.name in arrays}
        return cls(**{k: v.item() if k in _NUMBERS else v for k, v in values.items()})

    def kernel(self, rows: ArrayLike) -> FloatArray:
        """[k, D] features → [k, m] kernel between them and the basis."""
        return np.concatenate([*self._kernels(rows)])

    def _kernels(self, rows: ArrayLike) -> Iterator[FloatArray]:
        """The kernel between k rows and the basis, [≤ _PIECE, m] at a time."""
        x = np.asarray(rows)
        if x.ndim != 2 or x.shape[1] != self.input_dim:
            raise CheckpointError(
                f"the Gaussian process expects rows of {self.input_dim} numbers, not {x.shape[1:]}"
            )
        for start in range(0, len(x), _PIECE):
            yield self._kernel(self._seen(x[start : start + _PIECE]), self.basis)

    def _seen(self, x: NDArray[Any]) -> NDArray[np.float32]:
        return _chosen(_prepare(x, self.blocks, self.centre, self.deviation), self.amplitudes)

    @property
    def _kernel(self) -> _Kernel:
        return _Kernel(self.blocks, self.amplitudes, self.lengths)

    @property
    def pairs_alone(self) -> bool:
        """Whether it learned from judged pairs, and no grades."""
        return len(self.told) > 0 and not len(self.left_out)

    @property
    def _graded(self) -> int:
        """Rows of the basis but for those of judged pairs that were learned beside grades."""
        return len(self.factor) or len(self.left_out) or len(self.basis)

    @property
    def _sure(self) -> NDArray[np.int64]:
        """Rows of an exact process's basis that a spread is computed from."""
        every = np.random.default_rng(0).permutation(self._graded)
        return np.sort(every[:_SURE])

    @cached_property
    def _basis_factor(self) -> FloatArray:
        """The Cholesky factor of the kernel of those rows, with the noise where the process is exact."""
        basis = self.basis[: self._graded]
        if len(self.factor):
            return _cholesky(self._kernel.square(basis, _JITTER))
        if len(self.sets):
            return _cholesky(_of_sets(self._kernel, basis, self.sets, self.noise)[1])
        return _cholesky(self._kernel.square(self.basis[self._sure], self.noise))


_NUMBERS = ("noise", "mean", "sd", "evidence")


@dataclass(frozen=True)
class _Kernel:
    """1 + Σ_b a_b exp(−|x_b − x′_b| / ℓ_b) of prepared rows, over the blocks that are used."""

    blocks: NDArray[np.int64]
    amplitudes: FloatArray
    lengths: FloatArray

    @property
    def self(self) -> float:
        """Of a row with itself."""
        return 1 + float(self.amplitudes.sum())

    def __call__(self, a: NDArray[np.float32], b: NDArray[np.float32]) -> FloatArray:
        """[n, d], [m, d] → [n, m]."""
        total, start = np.ones((len(a), len(b))), 0
        sizes = np.resize(self.blocks, len(self.amplitudes)).tolist()
        for size, amplitude, length in zip(sizes, self.amplitudes, self.lengths, strict=True):
            if amplitude:
                columns = slice(start, start + size)
                start += size
                part = _distances(a[:, columns], b[:, columns])
                part /= -length
                np.exp(part, out=part)
                part *= amplitude
                total += part
        return total

    def square(self, u: NDArray[np.float32], noise: float | FloatArray) -> FloatArray:
        """[n, n] of rows with each other, the noise (one, or [n]) on the diagonal."""
        k = np.empty((len(u), len(u)))
        for start in range(0, len(u), _PIECE):
            k[start : start + _PIECE] = self(u[start : start + _PIECE], u)
        np.fill_diagonal(k, self.self + noise)
        return k


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


def _prepare(
    x: NDArray[Any],
    sizes: NDArray[np.int64],
    centre: NDArray[np.float32],
    deviation: NDArray[np.float32],
) -> list[NDArray[np.float32]]:
    """[n, D] rows → their blocks, centred: each row of length 1; then, if given, in standard deviations."""
    units, scaled, start = [], [], 0
    for size in sizes:
        columns = slice(start, start + size)
        start += size
        part = x[:, columns].astype(np.float64) - centre[columns]
        length = np.linalg.norm(part, axis=1, keepdims=True)
        units.append((part / np.maximum(length, 1e-12)).astype(np.float32))
        if len(deviation):
            scaled.append((part / deviation[columns]).astype(np.float32))
    return units + scaled


def _chosen(parts: list[NDArray[np.float32]], amplitudes: FloatArray) -> NDArray[np.float32]:
    """[n, d] those parts side by side that have an amplitude."""
    return np.hstack([part for part, a in zip(parts, amplitudes, strict=True) if a])


def _distances(a: NDArray[np.float32], b: NDArray[np.float32]) -> FloatArray:
    """|a − b|, in float64: the square root would make 3e-4 of float32's error for equal rows."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    d: FloatArray = x @ y.T
    d *= -2
    d += (x**2).sum(axis=1)[:, None]
    d += (y**2).sum(axis=1)
    np.maximum(d, 0, out=d)
    return np.sqrt(d, out=d)


def _cholesky(k: FloatArray) -> FloatArray:
    """The lower factor, in place of k; what stands above the diagonal means nothing."""
    from scipy.linalg import cholesky

    # k is symmetric: its transpose, in LAPACK's order, needs no copy.
    factor: FloatArray = cholesky(k.T, lower=True, overwrite_a=True, check_finite=False)
    return factor


def _averaging(sets: NDArray[np.int64]) -> Any:
    """[s, n] sparse: the mean over the rows of each set 0 … s − 1."""
    from scipy.sparse import csr_array

    share = 1 / np.bincount(sets)[sets]
    return csr_array((share, (sets, np.arange(len(sets)))))


def _of_sets(
    kernel: _Kernel, u: NDArray[np.float32], sets: NDArray[np.int64], noise: float
) -> tuple[FloatArray, FloatArray]:
    """The kernel [n, s] of rows and sets, and [s, s] of sets with each other, the noise on its diagonal."""
    average = _averaging(sets)
    cross = np.empty((len(u), average.shape[0]))
    for start in range(0, len(u), _PIECE):
        piece = kernel(u[start : start + _PIECE], u)
        own = np.arange(len(piece))
        piece[own, start + own] = kernel.self
        cross[start : start + _PIECE] = (average @ piece.T).T
    square: FloatArray = average @ cross
    square[np.diag_indices_from(square)] += noise
    return cross, square


def _solve_sets(
    u: NDArray[np.float32],
    z: FloatArray,
    kernel: _Kernel,
    noise: float,
    sets: NDArray[np.int64],
    groups: Sequence[Any],
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """As :func:`_solve` of [s] grades and groups of sets: weights, errors and variances of [n] left-out rows.

    With B the inverse of the sets' kernel and k that of a row and the sets, the row's score without the sets
    O is k (α − B_·O B_OO⁻¹ α_O), and what is known of it k (B − B_·O B_OO⁻¹ B_O·) k.
    """
    from scipy.linalg import cho_solve

    cross, square = _of_sets(kernel, u, sets, noise)
    factor = (_cholesky(square), True)
    alpha = cho_solve(factor, z, check_finite=False)
    inverse = cho_solve(factor, np.eye(len(z)), check_finite=False)
    known = cross @ inverse
    score, variance = cross @ alpha, kernel.self + noise - (known * cross).sum(axis=1)
    _, members = members_of(groups)
    group_of = np.empty(len(z), np.int64)
    for number, own in enumerate(members):
        group_of[own] = number
    order = np.argsort(group_of[sets], kind="stable")
    ends = np.cumsum(np.bincount(group_of[sets]))[:-1]
    for out, rows in zip(members, np.split(order, ends), strict=True):
        inverted = np.linalg.inv(inverse[np.ix_(out, out)])
        part = known[np.ix_(rows, out)] @ inverted
        score[rows] -= part @ alpha[out]
        variance[rows] += (part * known[np.ix_(rows, out)]).sum(axis=1)
    weights: FloatArray = alpha[sets] / np.bincount(sets)[sets]
    return weights, z[sets] - score, variance


@one_blas_thread()
def _learn(
    parts: list[NDArray[np.float32]],
    z: FloatArray,
    shares: FloatArray,
    kinds: FloatArray,
    sets: NDArray[np.int64] | None = None,
) -> tuple[FloatArray, FloatArray, FloatArray, float, FloatArray]:
    """Amplitudes [B], lengths [B], noises [k] of the ``kinds`` [k, n] on the diagonal, the log marginal
    likelihood per row, which is at its maximum, and the strictness [G] of graders of ``shares`` [n, G] of z.

    Its gradient by log a_b is ½ tr((α αᵀ − K⁻¹) a_b E_b), with α = K⁻¹ z (Rasmussen & Williams, 5.9).
    """
    from scipy.linalg import cho_solve
    from scipy.linalg.lapack import dpotri
    from scipy.optimize import minimize

    average = None
    if sets is not None:
        first, sets = np.unique(sets, return_index=True, return_inverse=True)[1:]
        average, z, shares, kinds = _averaging(sets), z[first], shares[first], kinds[:, first]
    n, count = len(z), len(parts)
    start_noise, of_graders = np.array([0.3, 0.1])[: len(kinds)], shares @ shares.T
    kernels, lengths = np.empty((count, n, n)), np.ones(count)
    for b, part in enumerate(parts):
        distances = _distances(part, part)
        np.fill_diagonal(distances, 0)
        apart = distances[distances > 1e-6]
        lengths[b] = _LENGTH * float(np.median(apart)) if len(apart) else 1.0
        made = np.exp(distances / -lengths[b])
        kernels[b] = made if average is None else average @ (average @ made).T

    def cost(logs: FloatArray) -> tuple[float, FloatArray]:
        values = np.exp(logs)
        k = 1 + of_graders + np.tensordot(values[:count], kernels, 1)
        k[np.diag_indices(n)] += values[count:] @ kinds
        factor = _cholesky(k)
        determinant = float(np.log(np.diag(factor)).sum())
        alpha = cho_solve((factor, True), z, check_finite=False)
        inverse, _ = dpotri(factor, lower=True, overwrite_c=True)
        # The lower triangle twice, for the upper one; the diagonal once.
        rest = 2 * np.tril(inverse, -1) - np.outer(alpha, alpha)
        rest[np.diag_indices(n)] += np.diag(inverse)
        slopes = np.r_[kernels.reshape(count, -1) @ rest.ravel(), kinds @ np.diag(rest)]
        value = float(z @ alpha) / 2 + determinant + n * np.log(2 * np.pi) / 2
        return value / n, values * slopes / (2 * n)

    start = np.log(np.r_[np.full(count, 1 / count), start_noise])
    bounds = [(-9.0, 4.0)] * count + [(-7.0, 3.0)] * len(kinds)
    done: Any = minimize(
        cost, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 60}
    )
    values = np.exp(done.x)
    strictness = np.zeros(shares.shape[1])
    if len(strictness):
        k = 1 + of_graders + np.tensordot(values[:count], kernels, 1)
        k[np.diag_indices(n)] += values[count:] @ kinds
        strictness = shares.T @ cho_solve((_cholesky(k), True), z, check_finite=False)
    return values[:count], lengths, values[count:], -float(done.fun), strictness


def _solve(
    u: NDArray[np.float32],
    z: FloatArray,
    kernel: _Kernel,
    noise: FloatArray,
    members: list[NDArray[np.int64]],
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Exact: weights, errors of left-out rows, and their variances; [n] each."""
    from scipy.linalg import cho_solve
    from scipy.linalg.lapack import dpotri

    factor = _cholesky(kernel.square(u, noise))
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
    kernel: _Kernel,
    noise: float,
    members: list[NDArray[np.int64]],
    relative: FloatArray,
) -> tuple[FloatArray, FloatArray, FloatArray, float, FloatArray]:
    """Approximate: weights [m], errors and variances [n] of left-out rows, the noise, the factor [m, m].

    With Φ = K_nm L⁻ᵀ and K_mm = L Lᵀ it is ridge regression of z on Φ. What Φ lacks of a row's own variance
    counts as noise, in the mean over the rows that are no basis. A row whose noise has ``relative`` [n] times
    the usual standard deviation is a usual one divided by it.
    """
    from scipy.linalg import cho_solve, solve_triangular

    lower = _cholesky(kernel.square(basis, _JITTER))
    pieces = [slice(i, i + _PIECE) for i in range(0, len(u), _PIECE)]

    def phi(rows: slice | NDArray[np.int64]) -> FloatArray:  # [m, k]
        result: FloatArray = solve_triangular(lower, kernel(u[rows], basis).T, lower=True)
        result /= relative[rows]
        return result

    z = z / relative

    gram, moment, explained = np.zeros((len(basis), len(basis))), np.zeros(len(basis)), 0.0
    for piece in pieces:
        part = phi(piece)
        gram += part @ part.T
        moment += part @ z[piece]
        explained += float(((part * relative[piece]) ** 2).sum())
    noise += max(0.0, kernel.self * len(u) - explained) / max(1, len(u) - len(basis))
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
    error, variance = error * relative, variance * relative**2
    return solve_triangular(lower.T, coefficients), error, variance, noise, factor
