"""The Gaussian process: its numbers against scikit-learn and against plain formulas, and what it keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from scipy.spatial.distance import cdist

from mirip_fast.errors import CheckpointError, DataError
from mirip_fast.models.gp import GaussianProcess, draw_errors, normal_scores

N, BLOCKS = 70, (5, 4)
RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(N, 9)).astype(np.float32)
# The second block alone says what the grade is.
GRADES = 3 + 2 * (ROWS[:, 5] - ROWS[:, 6] + RNG.normal(size=N))
GROUPS = [None if i % 3 == 0 else f"g{i % 7}" for i in range(N)]
NEW = RNG.normal(size=(11, 9)).astype(np.float32)

EXACTLY = GaussianProcess.fit(ROWS, GRADES, GROUPS, blocks=BLOCKS)
REDUCED = GaussianProcess.fit(ROWS, GRADES, GROUPS, blocks=BLOCKS, exact=0, inducing=40)


def kernel(
    gp: GaussianProcess,
    a: NDArray[np.float32],
    b: NDArray[np.float32],
    of: NDArray[np.float32] = ROWS,
) -> NDArray[np.float64]:
    total, starts = np.ones((len(a), len(b))), np.cumsum([0, *gp.blocks[:-1]])
    halves = zip(np.split(gp.amplitudes, 2), np.split(gp.lengths, 2), (unit, scaled), strict=True)
    for amplitudes, lengths, way in halves:
        for start, size, amplitude, length in zip(
            starts, gp.blocks, amplitudes, lengths, strict=True
        ):
            ends = (way(x, start, size, of) for x in (a, b))
            total += amplitude * np.exp(-cdist(*ends) / length)
    return total


def scaled(
    x: NDArray[np.float32], start: int, size: int, of: NDArray[np.float32] = ROWS
) -> NDArray[np.float64]:
    own = slice(start, start + size)
    part: NDArray[np.float64] = (x - of.mean(0, dtype=np.float64))[:, own] / of.std(0)[own]
    return part


def unit(
    x: NDArray[np.float32], start: int, size: int, of: NDArray[np.float32] = ROWS
) -> NDArray[np.float64]:
    part = (x - of.mean(0, dtype=np.float64))[:, start : start + size]
    return part / np.linalg.norm(part, axis=1, keepdims=True)


@pytest.mark.filterwarnings(
    "ignore:The optimal value found"
)  # the noise, which has the same bounds here
def test_scores_and_spreads_are_those_of_scikit_learn_at_its_optimum() -> None:
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    gp = GaussianProcess.fit(ROWS, GRADES)
    part = Matern(gp.lengths[0], length_scale_bounds="fixed", nu=0.5)
    shape = ConstantKernel(1, "fixed") + ConstantKernel(1) * part + WhiteKernel(1, (np.exp(-7), 20))
    peer = GaussianProcessRegressor(shape, normalize_y=True, alpha=0).fit(unit(ROWS, 0, 9), GRADES)
    mean, sd = peer.predict(unit(NEW, 0, 9), return_std=True)
    assert gp.evidence == pytest.approx(peer.log_marginal_likelihood_value_ / N, abs=1e-5)
    assert np.allclose(gp.score(NEW), mean, atol=0.01) and np.allclose(
        gp.spread(NEW), sd, atol=0.01
    )


def exact_without(out: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    gp, z = EXACTLY, (GRADES - GRADES.mean()) / GRADES.std()
    square = kernel(gp, ROWS[~out], ROWS[~out]) + gp.noise * np.eye(int((~out).sum()))
    k = kernel(gp, ROWS[out], ROWS[~out])
    own = np.diag(kernel(gp, ROWS[out], ROWS[out])) + gp.noise
    inverse = np.linalg.inv(square)
    return k @ inverse @ z[~out], own - np.einsum("ij,jk,ik->i", k, inverse, k)


def reduced_without(out: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    gp, z = REDUCED, (GRADES - GRADES.mean()) / GRADES.std()
    some = ROWS[[int(np.abs(scaled(ROWS, 5, 4) - b[-4:]).sum(1).argmin()) for b in gp.basis]]
    square = kernel(gp, some, some) + 1e-8 * np.eye(len(some))
    phi = np.linalg.solve(np.linalg.cholesky(square), kernel(gp, some, ROWS)).T
    inverse = np.linalg.inv(phi[~out].T @ phi[~out] + gp.noise * np.eye(len(some)))
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
        assert np.allclose(gp.left_out_sd[out], gp.sd * variance**0.5, atol=1e-4)
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


def test_a_block_that_does_not_know_the_grade_is_not_used() -> None:
    assert EXACTLY.used.tolist() == [False, True] and EXACTLY.basis.shape == (N, 8)
    other = NEW.copy()
    other[:, :5] = 0
    assert (EXACTLY.score(other) == EXACTLY.score(NEW)).all()


def test_draws_hold_the_grades_of_new_works() -> None:
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(900, 6))
    grades = rows[:, 0] + np.abs(rows[:, 1]) + rng.standard_t(4, size=900)
    draws = GaussianProcess.fit(rows[:300], grades[:300]).draw(rows[300:], 2000)
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    assert 0.92 < ((low < grades[300:]) & (grades[300:] < high)).mean() < 0.98


def test_draws_from_tiers_hold_the_finer_grade_and_no_more() -> None:
    """Not in 98 % and more, as where the coarseness of tiers counts as scatter."""
    rng = np.random.default_rng(2)
    rows = rng.normal(size=(1000, 4))
    finer = rows[:, 0] + rows[:, 1] + rng.normal(size=1000) / 2
    tiers = np.searchsorted([-2.0, -0.6, 1.0], -finer)
    known, new = slice(0, 400), slice(400, None)
    draws = GaussianProcess.fit(rows[known], normal_scores(tiers[known]), tiers=tiers[known]).draw(
        rows[new], 999
    )
    ranks = draws.argsort(axis=1).argsort(axis=1)
    low, high = np.quantile(ranks, [0.025, 0.975], axis=0)
    own = finer[new].argsort().argsort()
    assert 0.92 < ((low <= own) & (own <= high)).mean() < 0.97


def test_what_short_numbers_say_is_seen_beside_long_ones() -> None:
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(300, 6)) * [300, 300, 300, 300, 300, 1]
    fitted = GaussianProcess.fit(rows[:200], rows[:200, 5])
    assert np.corrcoef(fitted.score(rows[200:]), rows[200:, 5])[0, 1] > 0.8


def test_a_graded_work_is_as_unsure_as_without_its_grade() -> None:
    again = GaussianProcess.fit(ROWS, np.arange(N) + 0.0, GROUPS, blocks=BLOCKS)
    assert np.allclose(again.spread(ROWS), again.left_out_sd)
    assert again.draw(ROWS, 99).std(axis=0).min() > again.left_out_sd.min() / 2


def test_a_spread_from_some_rows_is_a_little_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    exactly = EXACTLY.spread(NEW)
    monkeypatch.setattr("mirip_fast.models.gp._SURE", N // 2)
    some = replace(EXACTLY).spread(NEW)
    assert (exactly < some).all() and (some < 1.4 * exactly).all()


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


#: Sets of one to four rows with one grade; two sets in one group.
SETS = np.repeat(np.arange(24), np.tile([1, 2, 3, 4], 6))
SET_GRADES = normal_scores(np.random.default_rng(5).integers(0, 4, 24))[SETS]
SET_GROUPS = [None if s % 3 else f"g{s // 6}" for s in SETS]
OF_SETS = GaussianProcess.fit(
    ROWS[: len(SETS)], SET_GRADES, SET_GROUPS, blocks=BLOCKS, sets=SETS, seed=0
)


def test_grades_of_sets_are_learned_as_means_by_plain_formulas() -> None:
    """An applicant's grade is of all works together; in float64, each set as a row of an averaging matrix."""
    gp, rows = OF_SETS, ROWS[: len(SETS)]
    average = np.array([(s == SETS) / (s == SETS).sum() for s in range(24)])
    y = average @ SET_GRADES
    z = (y - y.mean()) / y.std()

    def own(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
        return kernel(gp, a, b, of=rows)

    square = average @ own(rows, rows) @ average.T
    inverse = np.linalg.inv(square + gp.noise * np.eye(24))
    k = own(NEW, rows) @ average.T
    assert np.allclose(gp.score(NEW), y.mean() + y.std() * (k @ inverse @ z), atol=1e-4)
    variance = np.diag(own(NEW, NEW)) + gp.noise - np.einsum("ij,jk,ik->i", k, inverse, k)
    assert np.allclose(gp.spread(NEW), y.std() * variance**0.5, atol=1e-4)
    names = [SET_GROUPS[int(np.flatnonzero(s == SETS)[0])] or s for s in range(24)]
    for name in set(names):
        out = np.array([other == name for other in names])
        here = np.isin(SETS, np.flatnonzero(out))
        rest = np.linalg.inv(square[~out][:, ~out] + gp.noise * np.eye(int((~out).sum())))
        k = own(rows[here], rows) @ average[~out].T
        assert np.allclose(gp.left_out[here], y.mean() + y.std() * (k @ rest @ z[~out]), atol=1e-4)
        variance = gp._kernel.self + gp.noise - np.einsum("ij,jk,ik->i", k, rest, k)
        assert np.allclose(gp.left_out_sd[here], y.std() * variance**0.5, atol=1e-4)
    assert np.allclose(average @ gp.left_out + gp.errors * (average @ gp.left_out_sd), y)


def test_sets_of_one_row_are_rows() -> None:
    alone = GaussianProcess.fit(ROWS, GRADES, GROUPS, blocks=BLOCKS, sets=np.arange(N)[::-1])
    assert np.allclose(alone.score(NEW), EXACTLY.score(NEW), atol=1e-3)
    assert np.allclose(alone.left_out, EXACTLY.left_out, atol=1e-3)
    assert np.allclose(alone.spread(NEW), EXACTLY.spread(NEW), atol=1e-3)


def test_works_of_one_hand_err_together_as_much_as_is_said() -> None:
    errors = np.random.default_rng(0).gumbel(size=5_000)
    together = np.array([0, 0, 1])
    drawn = draw_errors(errors, (20_000, 3), 0, together, 0.4)
    correlation = np.corrcoef(drawn.T)
    assert correlation[0, 1] == pytest.approx(0.4, abs=0.03) and abs(correlation[0, 2]) < 0.03
    assert np.quantile(drawn, [0.1, 0.9]) == pytest.approx(
        np.quantile(errors, [0.1, 0.9]), abs=0.05
    )
