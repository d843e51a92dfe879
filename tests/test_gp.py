"""The Gaussian process: its numbers against scikit-learn and against plain formulas, and what it keeps."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from scipy.spatial.distance import cdist

from mirip_fast.errors import CheckpointError, DataError
from mirip_fast.models.gp import GaussianProcess, normal_scores

N, BLOCKS = 70, (5, 4)
RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(N, 9)).astype(np.float32)
# The second block alone says what the grade is.
GRADES = 3 + 2 * (ROWS[:, 5] - ROWS[:, 6] + 0.3 * RNG.normal(size=N))
GROUPS = [None if i % 3 == 0 else f"g{i % 7}" for i in range(N)]
NEW = RNG.normal(size=(11, 9)).astype(np.float32)

EXACTLY = GaussianProcess.fit(ROWS, GRADES, GROUPS, blocks=BLOCKS)
REDUCED = GaussianProcess.fit(ROWS, GRADES, GROUPS, blocks=BLOCKS, exact=0, inducing=40)


def prepared(x: NDArray[np.float32]) -> NDArray[np.float64]:
    parts = np.split(x.astype(np.float64) - ROWS.mean(0, dtype=np.float64), [5], axis=1)
    return np.hstack([p / np.linalg.norm(p, axis=1, keepdims=True) for p in parts]) / 2**0.5


def kernel(a: NDArray[np.float64], b: NDArray[np.float64], length: float) -> NDArray[np.float64]:
    return 1 + np.exp(-cdist(a, b) / length)


def test_scores_and_spreads_are_those_of_scikit_learn() -> None:
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    gp = EXACTLY
    signal = ConstantKernel(gp.variance) * (ConstantKernel(1) + Matern(gp.length, nu=0.5))
    peer = GaussianProcessRegressor(
        signal + WhiteKernel(gp.variance * gp.noise), optimizer=None, normalize_y=True, alpha=0
    ).fit(prepared(ROWS), GRADES)
    mean, sd = peer.predict(prepared(NEW), return_std=True)
    assert np.allclose(gp.score(NEW), mean, atol=1e-5) and np.allclose(
        gp.spread(NEW), sd, atol=1e-5
    )
    assert gp.evidence == pytest.approx(peer.log_marginal_likelihood_value_ / N, abs=1e-6)


def exact_without(out: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    gp, u, z = EXACTLY, prepared(ROWS), (GRADES - GRADES.mean()) / GRADES.std()
    inverse = np.linalg.inv(
        kernel(u[~out], u[~out], gp.length) + gp.noise * np.eye(int((~out).sum()))
    )
    k = kernel(u[out], u[~out], gp.length)
    return k @ inverse @ z[~out], 2 + gp.noise - np.einsum("ij,jk,ik->i", k, inverse, k)


def reduced_without(out: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    gp, u, z = REDUCED, prepared(ROWS), (GRADES - GRADES.mean()) / GRADES.std()
    basis = gp.basis.astype(np.float64)
    square = kernel(basis, basis, gp.length) + 1e-8 * np.eye(len(basis))
    phi = np.linalg.solve(np.linalg.cholesky(square), kernel(basis, u, gp.length)).T
    inverse = np.linalg.inv(phi[~out].T @ phi[~out] + gp.noise * np.eye(len(basis)))
    mean = phi[out] @ inverse @ phi[~out].T @ z[~out]
    return mean, gp.noise * (1 + np.einsum("ij,jk,ik->i", phi[out], inverse, phi[out]))


@pytest.mark.parametrize(("gp", "without"), [(EXACTLY, exact_without), (REDUCED, reduced_without)])
def test_a_work_left_out_scores_what_it_would_without_its_group(
    gp: GaussianProcess,
    without: Callable[[NDArray[np.bool_]], tuple[NDArray[np.float64], NDArray[np.float64]]],
) -> None:
    names = [name or f"alone {i}" for i, name in enumerate(GROUPS)]
    for group in set(names):
        out = np.array([name == group for name in names])
        mean, variance = without(out)
        assert np.allclose(gp.left_out[out], gp.mean + gp.sd * mean, atol=1e-4)
        assert np.allclose(gp.left_out_sd[out], gp.sd * (gp.variance * variance) ** 0.5, atol=1e-4)
    assert np.allclose(gp.left_out + gp.errors * gp.left_out_sd, GRADES)


def test_with_all_rows_as_basis_the_approximation_is_exact() -> None:
    full = GaussianProcess.fit(ROWS, GRADES, GROUPS, blocks=BLOCKS, exact=0, inducing=N)
    assert np.allclose(full.score(NEW), EXACTLY.score(NEW), atol=1e-3)
    assert np.allclose(full.left_out, EXACTLY.left_out, atol=1e-3)


@pytest.mark.parametrize("gp", [EXACTLY, REDUCED])
def test_what_is_read_again_scores_the_same_to_the_bit(gp: GaussianProcess, tmp_path: Path) -> None:
    save_file(gp.arrays(), tmp_path / "gp.safetensors")
    again = GaussianProcess.from_arrays(load_file(tmp_path / "gp.safetensors"))
    for method, extra in (("score", ()), ("spread", ()), ("draw", (3,))):
        mine, read = (getattr(one, method)(NEW, *extra) for one in (gp, again))
        assert mine.tobytes() == read.tobytes()
    assert again.input_dim == 9 and again.score(NEW[:0]).shape == (0,)


def test_the_blocks_that_know_the_grade_are_used() -> None:
    gp = GaussianProcess.fit(ROWS, GRADES, blocks=BLOCKS, choices=[(0,), (0, 1), (1,)])
    assert gp.chosen.tolist() == [1]
    other = NEW.copy()
    other[:, :5] = 0
    assert (gp.score(other) == gp.score(NEW)).all()


def test_draws_hold_the_grades_of_new_works() -> None:
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(900, 6))
    grades = rows[:, 0] + np.abs(rows[:, 1]) + rng.standard_t(4, size=900)
    draws = GaussianProcess.fit(rows[:300], grades[:300]).draw(rows[300:], 2000)
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    assert 0.92 < ((low < grades[300:]) & (grades[300:] < high)).mean() < 0.98


def test_tiers_become_normal_quantiles_of_their_middle_rank() -> None:
    scores = normal_scores([0, 1, 1, 2])
    assert (
        scores[0] == -scores[3] == pytest.approx(1.1503, abs=1e-4) and scores[1] == scores[2] == 0
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"rows": ROWS[:5]}, "do not fit"),
        ({"groups": ["a"]}, "and 1 groups"),
        ({"y": np.ones(N)}, "same grade"),
        ({"rows": np.full_like(ROWS, np.nan)}, "not finite"),
        ({"blocks": (3, 3)}, r"\[3, 3\] .* 9"),
    ],
)
def test_what_cannot_be_learned_is_refused(arguments: dict[str, object], said: str) -> None:
    with pytest.raises(DataError, match=said):
        GaussianProcess.fit(**{"rows": ROWS, "y": GRADES, "blocks": BLOCKS, **arguments})  # type: ignore[arg-type]


def test_rows_or_arrays_of_something_else_are_refused() -> None:
    with pytest.raises(CheckpointError, match="9 numbers"):
        EXACTLY.score(NEW[:, :4])
    with pytest.raises(CheckpointError, match="basis"):
        GaussianProcess.from_arrays({"centre": np.zeros(3)})


def test_it_is_scored_without_torch() -> None:
    code = (
        "import sys, numpy as np; from mirip_fast.models.gp import GaussianProcess as G;"
        "x = np.eye(4); G.fit(x, [1, 2, 3, 4]).score(x);"
        "print(sorted({'torch', 'sklearn', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
