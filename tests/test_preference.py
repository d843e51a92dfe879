"""The Gaussian process of judged pairs: its numbers against plain optimisation and integration."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import integrate, optimize, stats
from scipy.spatial.distance import cdist

from mirip_fast.errors import DataError
from mirip_fast.models.gp import GaussianProcess
from mirip_fast.models.preference import Preferences, fit_pairs, join_pairs

N, BLOCKS = 30, (5, 4)
RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(N, 9)).astype(np.float32)
TRUTH = ROWS[:, 5] - ROWS[:, 6]  # the second block alone says it
PAIRS = np.array([RNG.choice(N, 2, replace=False) for _ in range(80)])
LABEL = np.sign(TRUTH[PAIRS[:, 0]] - TRUTH[PAIRS[:, 1]]).astype(int)
LABEL[::9] *= -1  # mistakes
LABEL[::13] = 0  # ties
FITTED = fit_pairs(ROWS, PAIRS, LABEL, blocks=BLOCKS)


def log_posterior(f: NDArray[np.float64], prior: NDArray[np.float64]) -> float:
    """Of f, in works and not in differences, by the plain formula."""
    gap, won = f[PAIRS[:, 0]] - f[PAIRS[:, 1]], (LABEL + 1) / 2
    likelihood = won * stats.norm.logcdf(gap) + (1 - won) * stats.norm.logcdf(-gap)
    return float(likelihood.sum() - f @ np.linalg.solve(prior, f) / 2)


def test_the_mode_is_that_of_a_plain_optimiser() -> None:
    start = np.zeros(N)
    best = optimize.minimize(
        lambda f: -log_posterior(f, FITTED.prior), start, method="BFGS", options={"gtol": 1e-6}
    ).x
    assert np.allclose(FITTED.mean, best, atol=1e-4)
    gap = best[PAIRS[:, 0]] - best[PAIRS[:, 1]]
    assert np.allclose(FITTED.differences(PAIRS)[0], gap, atol=1e-4)
    assert np.allclose(FITTED.score(ROWS), FITTED.mean, atol=1e-6)


def test_variances_and_evidence_are_those_of_the_curvature_at_the_mode() -> None:
    differ = np.zeros((len(PAIRS), N))
    differ[np.arange(len(PAIRS)), PAIRS[:, 0]] += 1
    differ[np.arange(len(PAIRS)), PAIRS[:, 1]] -= 1
    precision = np.linalg.inv(FITTED.prior) + differ.T @ np.diag(FITTED.sure) @ differ
    covariance = np.linalg.inv(precision)
    asked = np.array([[0, 1], [2, 29], [7, 3]])
    mean, variance = FITTED.differences(asked)
    for (i, j), m, v in zip(asked, mean, variance, strict=True):
        assert m == pytest.approx(FITTED.mean[i] - FITTED.mean[j])
        assert v == pytest.approx(covariance[i, i] + covariance[j, j] - 2 * covariance[i, j])
    volume = np.linalg.slogdet(FITTED.prior @ precision)[1] / 2
    assert FITTED.evidence == pytest.approx(log_posterior(FITTED.mean, FITTED.prior) - volume)


def with_amplitudes(logs: NDArray[np.float64]) -> float:
    """The log evidence with other amplitudes, times their prior."""
    kernel = type(FITTED.kernel)(FITTED.kernel.blocks, np.exp(logs), FITTED.kernel.lengths)
    changed = Preferences(**{**vars_of(FITTED), "prior": kernel.square(FITTED.works, 0.0)})
    return changed.given(PAIRS, LABEL).evidence - float((logs**2).sum()) / (2 * 1.5**2)


def vars_of(fitted: Preferences) -> dict[str, object]:
    return {name: getattr(fitted, name) for name in fitted.__dataclass_fields__}


def test_the_amplitudes_are_the_most_probable_ones() -> None:
    found = np.log(FITTED.kernel.amplitudes)
    best = optimize.minimize(lambda logs: -with_amplitudes(logs), found + 0.5, method="Nelder-Mead")
    assert with_amplitudes(found) == pytest.approx(-best.fun, abs=1e-3)
    assert FITTED.kernel.amplitudes[1] > 2 * FITTED.kernel.amplitudes[0]


def test_information_is_that_of_numerical_integration() -> None:
    asked = np.array([[0, 1], [2, 29], [7, 3], [11, 12]])
    mean, variance = FITTED.differences(asked)

    def entropy(p: NDArray[np.float64] | float) -> NDArray[np.float64]:
        return -(p * np.log2(p) + (1 - p) * np.log2(1 - p))

    for m, v, told in zip(mean, variance, FITTED.information(asked), strict=True):
        g = np.linspace(m - 8 * np.sqrt(v), m + 8 * np.sqrt(v), 10_001)
        chance, density = stats.norm.cdf(g), stats.norm.pdf(g, m, np.sqrt(v))
        mean_chance = integrate.trapezoid(density * chance, g)
        doubt = integrate.trapezoid(density * entropy(np.clip(chance, 1e-9, 1 - 1e-9)), g)
        assert told == pytest.approx(entropy(mean_chance) - doubt, abs=0.01)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_it_learns_from_few_contradicting_and_repeated_verdicts(scale: float) -> None:
    rows = ROWS * scale
    rows[3] = rows[4]  # the same picture twice
    pairs = np.array([[3, 4], [3, 4], [4, 3], [0, 1], [0, 1], [1, 0]])
    fitted = fit_pairs(rows, pairs, [1, 1, 1, 1, 1, -1])
    assert np.isfinite(fitted.mean).all() and fitted.mean[0] > fitted.mean[1]
    assert fitted.mean[3] == pytest.approx(fitted.mean[4], abs=1e-6)
    mirrored = fit_pairs(rows, pairs[:, ::-1], [-1, -1, -1, -1, -1, 1])
    assert np.allclose(mirrored.mean, fitted.mean, atol=1e-6)


def test_a_verdict_of_weight_two_is_two_verdicts() -> None:
    twice = FITTED.given(np.r_[PAIRS, PAIRS[:40]], np.r_[LABEL, LABEL[:40]])
    weighted = FITTED.given(PAIRS, LABEL, np.r_[np.full(40, 2.0), np.ones(len(PAIRS) - 40)])
    assert np.allclose(weighted.mean, twice.mean, atol=1e-6)


@pytest.mark.parametrize(
    ("pairs", "label", "blocks", "said"),
    [
        ([], [], BLOCKS, "0 judged pairs"),
        ([[0, 1]], [0], BLOCKS, "none of them decided"),
        ([[0, 1]], [1], (3, 3), "do not add up to 9"),
    ],
)
def test_what_cannot_be_learned_is_refused(
    pairs: list[list[int]], label: list[int], blocks: tuple[int, ...], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        fit_pairs(ROWS, pairs, label, blocks=blocks)


def test_the_process_that_is_kept_scores_and_doubts_alike() -> None:
    process = GaussianProcess.from_arrays(FITTED.process().arrays())
    new = np.vstack([ROWS, RNG.normal(size=(9, 9))]).astype(np.float32)
    assert np.allclose(process.score(new), FITTED.score(new), atol=1e-9)
    # The variance of f(x) less the mean f of the judged works, by the posterior covariance of the works.
    differ = np.zeros((len(PAIRS), N))
    differ[np.arange(len(PAIRS)), PAIRS[:, 0]] += 1
    differ[np.arange(len(PAIRS)), PAIRS[:, 1]] -= 1
    covariance = np.linalg.inv(
        np.linalg.inv(FITTED.prior) + differ.T @ np.diag(FITTED.sure) @ differ
    )
    judged = np.unique(PAIRS)
    for i in (0, 7, 29):
        less = np.eye(N)[i] - np.isin(np.arange(N), judged) / len(judged)
        assert process.spread(ROWS[[i]])[0] ** 2 == pytest.approx(
            less @ covariance @ less, rel=1e-4
        )
    drawn = process.draw(new, 4_000)
    assert np.allclose(drawn.std(axis=0), process.spread(new), rtol=0.1)


@pytest.mark.parametrize("kind", ["exact", "reduced", "sets"])
def test_pairs_beside_grades_are_at_the_mode_of_both_likelihoods(kind: str) -> None:
    """Where f − its mean given the grades = its covariance times the slope of the pairs' likelihood."""
    grades, sets = TRUTH + RNG.normal(size=N) / 2, None
    if kind == "sets":
        sets = np.arange(N) // 2
        grades = (np.bincount(sets, grades) / 2)[sets]
    rows, new = ROWS[:, 5:], RNG.normal(size=(6, 4)).astype(np.float32)
    gp = GaussianProcess.fit(
        rows, grades, exact=0 if kind == "reduced" else N, inducing=N, sets=sets
    )
    pairs, label = np.array([[0, 1], [1, 2], [3, 4], [5, 0], [2, 3]]), np.array([1, -1, 1, 1, 0])
    weight = np.array([1.0, 2, 1, 1, 1])
    joined = join_pairs(gp, np.vstack([new[:4], rows[:2]]), pairs, label, weight)

    u = (np.vstack([rows, new]) - gp.centre).astype(np.float64)
    ways = (u / np.linalg.norm(u, axis=1, keepdims=True), u / gp.deviation)
    parts = zip(gp.amplitudes, ways, gp.lengths, strict=True)
    prior = 1 + sum(a * np.exp(-cdist(v, v) / length) for a, v, length in parts)
    z, seen = (grades - gp.mean) / gp.sd, np.eye(N, N + 6)
    if sets is not None:
        z, seen = z[::2], (seen[::2] + seen[1::2]) / 2
    gain = prior @ seen.T @ np.linalg.inv(seen @ prior @ seen.T + gp.noise * np.eye(len(z)))
    mean, covariance = gain @ z, prior - gain @ seen @ prior
    place = np.array([N, N + 1, N + 2, N + 3, 0, 1])[pairs]
    differ = np.zeros((len(pairs), N + 6))
    for sign, works in zip((1, -1), place.T, strict=True):
        differ[np.arange(len(pairs)), works] += sign / np.sqrt(2 * gp.noise)
    f = (joined.score(np.vstack([rows, new])) - gp.mean) / gp.sd
    gap, won = differ @ f, (label + 1) / 2
    up, down = stats.norm.pdf(gap) / stats.norm.cdf(gap), stats.norm.pdf(gap) / stats.norm.cdf(-gap)
    slope = weight * (won * up - (1 - won) * down)
    assert np.allclose(f - mean, covariance @ differ.T @ slope, atol=1e-5)
    assert np.abs(f - mean).max() > 0.1
    sure = weight * (won * up * (gap + up) + (1 - won) * down * (down - gap))
    told = differ @ covariance
    after = covariance - told.T @ np.linalg.solve(told @ differ.T + np.diag(1 / sure), told)
    if kind != "reduced":  # whose spread counts what it lacks of a new row as noise
        spread = gp.sd * np.sqrt(np.diag(after)[N:] + gp.noise)
        assert np.allclose(joined.spread(new), spread, atol=1e-4)
    assert (joined.spread(new)[:4] < gp.spread(new)[:4]).all()
    again = GaussianProcess.from_arrays(joined.arrays())
    assert np.array_equal(again.score(new), joined.score(new)) and not again.pairs_alone
    assert np.array_equal(joined.left_out, gp.left_out)


def test_pairs_beside_many_grades_leave_the_noise_in_every_spread() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(660, 12)).astype(np.float32)
    grades, judged = np.abs(rows[:, 0]), rows[400:460]
    gp = GaussianProcess.fit(rows[:400], grades[:400], blocks=[6, 6], exact=100, inducing=60)
    pairs = np.array([rng.choice(60, 2, replace=False) for _ in range(200)])
    label = np.sign(grades[400 + pairs[:, 0]] - grades[400 + pairs[:, 1]])
    joined = join_pairs(gp, judged, pairs, label)
    before, after = (p.spread(rows[400:]) / p.sd for p in (gp, joined))
    assert (after >= gp.noise**0.5 - 1e-9).all() and (after <= before + 1e-9).all()
