"""The meaning of a score, and whether it comes true: each against an independent way to the same number."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import minimize, minimize_scalar
from test_metrics import row_resamples

from mirip_fast.errors import DataError
from mirip_fast.evaluation import reliability as module
from mirip_fast.evaluation.calibration import (
    MIN_IMAGES,
    Calibration,
    difference_blocks,
    fit_calibration,
    fit_ordinal,
    fit_temperature,
    logistic,
    pair_probability,
)
from mirip_fast.evaluation.reliability import reliability

NAMES = ("S", "A", "B", "C")


def graded(seed: int, n: int, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Scores that overlap between the tiers, with ties and a rare best tier."""
    rng = np.random.default_rng(seed)
    tiers = rng.choice(4, n, p=[0.05, 0.32, 0.42, 0.21])
    return np.round(spread * (rng.normal(size=n) - 0.7 * tiers), 2), tiers


def listed(scores, tiers, within=None) -> np.ndarray:
    """Differences better − worse of every cross-tier pair, by a plain double loop."""
    n = len(scores)
    within = np.zeros(n, int) if within is None else within
    return np.array(
        [
            scores[i] - scores[j]
            for i in range(n)
            for j in range(n)
            if tiers[i] < tiers[j] and within[i] == within[j] >= 0
        ]
    )


@pytest.mark.parametrize(("seed", "spread"), [(0, 1.0), (1, 0.01), (2, 300.0)])
@pytest.mark.parametrize("inside", [False, True])
def test_temperature_is_that_of_a_logistic_regression(seed, spread, inside):
    scores, tiers = graded(seed, 150)
    scores = scores * spread
    within = np.random.default_rng(3).integers(-1, 4, 150) if inside else None
    fitted = fit_temperature(scores, tiers, within)
    d = listed(scores, tiers, within)
    assert (fitted["pairs"], fitted["separated"]) == (len(d), False)
    brute = minimize_scalar(lambda b: np.logaddexp(0, -b * d / spread).mean(), bounds=(1e-3, 30))
    assert fitted["value"] == pytest.approx(spread / brute.x, rel=1e-4)


def test_temperature_of_many_images_starts_from_a_sample_and_ends_at_the_same():
    scores, tiers = graded(4, 2500)
    d = np.concatenate([b.ravel() for b in difference_blocks(scores, tiers, np.zeros_like(tiers))])
    beta = 1 / fit_temperature(scores, tiers)["value"]
    assert abs((d * (logistic(beta * d) - 1)).mean()) < 1e-9  # the slope at the maximum
    assert logistic([-1e4, 0, 1e4]).tolist() == [0, 0.5, 1]


def test_scores_without_order_and_scores_without_mistakes():
    tiers = np.arange(40) % 2
    against = fit_temperature(tiers.astype(float), tiers)
    assert math.isinf(against["value"])
    assert pair_probability(5.0, against["value"]) == 0.5
    assert math.isinf(fit_temperature(np.zeros(40), tiers)["value"])
    rng = np.random.default_rng(0)
    perfect = -2.0 * tiers + rng.random(40)
    fitted = fit_temperature(perfect, tiers)
    assert fitted["separated"]
    d = listed(perfect, tiers)
    loss = lambda b: (41 / 42 * np.logaddexp(0, -b * d) + np.logaddexp(0, b * d) / 42).mean()  # noqa: E731
    best = minimize_scalar(loss, bounds=(1e-3, 100), options={"xatol": 1e-10})
    assert fitted["value"] == pytest.approx(1 / best.x, rel=1e-4)
    with pytest.raises(DataError, match="no pair"):
        fit_temperature([1.0, 2.0], [3, 3])


def direct_likelihood(scores, tiers):
    """The proportional-odds maximum by another parametrisation and a derivative-free search."""
    k = int(tiers.max())

    def loss(x):
        theta = x[1:]
        if (np.diff(theta) <= 0).any():
            return 1e9
        upper = np.hstack(
            [1 / (1 + np.exp(-(theta + x[0] * scores[:, None]))), np.ones((len(scores), 1))]
        )
        p = np.diff(np.hstack([np.zeros((len(scores), 1)), upper]), axis=1)
        return -np.log(np.maximum(p[np.arange(len(scores)), tiers], 1e-300)).mean()

    start = np.r_[0.3, np.linspace(-2, 2, k)]
    for _ in range(3):
        options = {"maxiter": 20000, "maxfev": 20000, "xatol": 1e-9, "fatol": 1e-13}
        start = minimize(loss, start, method="Nelder-Mead", options=options).x
    return start[0], start[1:]


def test_ordinal_fit_is_the_likelihood_maximum():
    scores, tiers = graded(0, 200)
    model = fit_ordinal(scores, tiers, 4)
    slope, thresholds = direct_likelihood(scores, tiers)
    assert model.slope == pytest.approx(slope, rel=1e-4)
    np.testing.assert_allclose(model.thresholds, thresholds, rtol=1e-3, atol=1e-4)


def test_probabilities_are_probabilities():
    scores, tiers = graded(0, 300)
    model = fit_ordinal(scores, tiers, 4)
    grid = np.r_[-1e3, np.linspace(-8, 8, 101), 1e3]
    p = model.probabilities(grid)
    assert p.shape == (103, 4)
    assert (p >= 0).all()
    np.testing.assert_allclose(p.sum(axis=1), 1, atol=1e-12)
    or_better = p.cumsum(axis=1)
    assert (
        np.diff(or_better, axis=0) >= -1e-12
    ).all()  # a higher score never makes a tier less likely
    assert model.most_probable(grid)[[0, -1]].tolist() == [3, 0]


def test_missing_tiers_have_no_probability_and_are_told():
    scores, tiers = graded(0, 300)
    tiers = np.where(tiers == 1, 3, tiers)
    model = fit_ordinal(scores, tiers, 5)
    p = model.probabilities(scores)
    assert model.present == (0, 2, 3)
    assert not p[:, [1, 4]].any()
    np.testing.assert_allclose(p.sum(axis=1), 1)
    said = " ".join(fit_calibration(scores, tiers, "SABCD", source="validation").warnings())
    assert "No held-out work is of tier A, D" in said
    with pytest.raises(DataError, match="at least two"):
        fit_ordinal(scores, np.zeros(300, int), 4)


def test_scores_that_order_wrongly_give_the_shares():
    scores, tiers = graded(0, 300)
    model = fit_ordinal(-scores, tiers, 4)
    assert model.slope == 0
    shares = np.bincount(tiers) / 300
    np.testing.assert_allclose(model.probabilities([-9, 0, 9]), [shares] * 3, atol=1e-5)


def test_perfectly_separated_tiers_stay_finite():
    tiers = np.repeat([0, 1, 2], 20)
    scores = -3.0 * tiers + np.tile(np.linspace(-1, 1, 20), 3)
    model = fit_ordinal(scores, tiers, 3)
    assert model.separated
    p = model.probabilities(scores)
    assert (p.argmax(axis=1) == tiers).all()
    assert 0.9 < p[np.arange(60), tiers].mean() < 0.999


def test_percentile_against_a_plain_count():
    rng = np.random.default_rng(0)
    reference = np.sort(rng.integers(0, 12, 57) / 4)
    scores = np.r_[rng.integers(-2, 14, 40) / 4, np.nan]
    made = fit_calibration(reference, np.arange(57) % 2, "SA", source="validation")
    expected = [100 * ((reference < s).mean() + (reference == s).mean() / 2) for s in scores[:-1]]
    found = made.score_100(scores)
    np.testing.assert_allclose(found[:-1], expected)
    assert np.isnan(found[-1])
    assert made.score_100([-99, 99]).tolist() == [0, 100]


def test_everything_survives_json():
    scores, tiers = graded(0, 200)
    for values in (scores, np.zeros(200), -3.0 * tiers, scores[:5]):
        made = fit_calibration(values, tiers[: len(values)], NAMES, source="out-of-fold")
        assert (
            Calibration.from_dict(json.loads(json.dumps(made.to_dict(), allow_nan=False))) == made
        )
    with pytest.raises(DataError, match="version 7"):
        Calibration.from_dict({**made.to_dict(), "version": 7})
    with pytest.raises(DataError, match="ordinal"):
        Calibration.from_dict({k: v for k, v in made.to_dict().items() if k != "ordinal"})


def test_too_few_works_give_no_numbers_but_a_reason():
    scores, tiers = graded(0, MIN_IMAGES)
    tiers = np.arange(MIN_IMAGES) % 4
    assert fit_calibration(scores, tiers, NAMES, source="validation").unknown is None
    few = fit_calibration(scores[1:], tiers[1:], NAMES, source="validation")
    assert f"{MIN_IMAGES - 1} held-out works" in few.unknown and "--folds" in few.unknown
    assert few.warnings() == [few.unknown]
    assert (
        few.pair_probability(1.0) is few.tier_probabilities(scores) is few.score_100(scores) is None
    )
    lone = fit_calibration(
        scores, np.r_[0, np.ones(MIN_IMAGES - 1, int)], NAMES, source="out-of-fold"
    )
    assert "fewer than two tiers" in lone.unknown and "--folds" not in lone.unknown
    apart = fit_calibration(
        scores, tiers, NAMES, source="validation", within=tiers, within_name="department"
    )
    assert "same department" in apart.unknown


def test_rare_tiers_and_lost_order_are_told():
    scores, tiers = graded(0, 60)
    tiers[:] = np.r_[0, 0, np.arange(58) % 3 + 1]
    said = " ".join(fit_calibration(scores, tiers, NAMES, source="validation").warnings())
    assert "tier S (2)" in said
    said = " ".join(fit_calibration(np.zeros(60), tiers, NAMES, source="validation").warnings())
    assert "given as even" in said
    said = " ".join(fit_calibration(-1.0 * tiers, tiers, NAMES, source="validation").warnings())
    assert "rest on an assumption" in said


def test_a_tier_that_is_never_the_most_probable_is_told():
    rng = np.random.default_rng(0)
    tiers = np.repeat([0, 1, 2], [10, 100, 90])
    noisy = rng.normal(size=200) - 0.5 * tiers
    for scores, told in ((noisy, True), (0.1 * noisy - tiers, False)):
        learned = fit_calibration(scores, tiers, "SAB", source="validation")
        assert ("S" not in {"SAB"[k] for k in learned.tier_probabilities(scores).argmax(1)}) == told
        for known in (learned, Calibration.from_dict(json.loads(json.dumps(learned.to_dict())))):
            sentence = "No held-out work has S as its most probable tier, though 5 % have it."
            assert (sentence in known.warnings()) == told
    # Of 3 % of the works nothing is said, and several tiers take one sentence.
    rare = fit_calibration(noisy, np.repeat([0, 1, 2], [6, 100, 94]), "SAB", source="validation")
    assert not any("most probable" in text for text in rare.warnings())
    level = fit_calibration(0 * noisy, tiers, "SAB", source="validation").warnings()
    assert (
        "No held-out work has S or B as its most probable tier, though 5 % and 45 % have it."
        in level
    )


def plain_error(scores, tiers, temperature, rows=None, within=None):
    """Ten bins of P, every pair in both orientations with half its weight, by a double loop."""
    rows = range(len(scores)) if rows is None else rows
    total = np.zeros((3, 10))
    for i in rows:
        for j in rows:
            if tiers[i] == tiers[j] or (within is not None and not within[i] == within[j] >= 0):
                continue
            p = 1 / (1 + np.exp(-(scores[i] - scores[j]) / temperature))
            # (i, j) and (j, i) are both met, each once: half of each pair's weight.
            k = min(int(p * 10), 9) if p >= 0.5 else 9 - min(int((1 - p) * 10), 9)
            total[:, k] += 0.5 * np.array([1, p, tiers[i] < tiers[j]])
    gaps = np.abs(total[1] - total[2])
    return gaps.sum() / total[0].sum() if total[0].sum() else np.nan


@pytest.mark.parametrize("seed", range(5))
def test_calibration_error_and_its_interval_against_a_plain_loop(seed):
    scores, tiers = graded(seed, 40)
    rng = np.random.default_rng(seed)
    temperature = (0.2, 0.7, 1.0, 3.0, 1e9)[seed]
    groups = [None if g == 0 else f"g{g}" for g in rng.integers(0, 20, 40)]
    within = None if seed % 2 else rng.integers(-1, 3, 40)
    found = reliability(scores, tiers, temperature, groups, within=within, rounds=20, seed=4)
    expected = plain_error(scores, tiers, temperature, within=within)
    assert found["ece"] == pytest.approx(expected, abs=1e-12)
    assert sum(part["pairs"] for part in found["bins"]) == found["pairs"]
    errors = [
        plain_error(scores, tiers, temperature, rows, within)
        for rows in row_resamples(groups, 20, 4)
    ]
    count = len(set(filter(None, groups))) + groups.count(None)
    tail = stats.norm.cdf((count / (count - 1)) ** 0.5 * stats.t.ppf(0.025, count - 1))
    high = np.nanquantile(errors, 1 - tail)
    assert found["interval"].high == pytest.approx(high)
    assert found["interval"].low == pytest.approx(max(0, 2 * found["ece"] - high))


@pytest.mark.parametrize("values", [120])
def test_many_scores_in_steps_and_many_departments_are_nearly_exact(values, monkeypatch):
    rng = np.random.default_rng(2)
    tiers = rng.integers(0, 4, 600)
    scores = rng.normal(size=600) - 0.6 * tiers
    case = {"within": rng.integers(0, values, 600), "rounds": 15}
    steps = reliability(scores, tiers, 0.4, **case)
    monkeypatch.setattr(module, "_STEPS", 10_000)
    exact = reliability(scores, tiers, 0.4, **case)
    assert steps["ece"] == exact["ece"] and steps["interval"] != exact["interval"]
    assert steps["interval"].high == pytest.approx(exact["interval"].high, abs=4e-3)
    monkeypatch.setattr(module, "_DENSE", 10_000 if values > 1 else 0)  # the other way to multiply
    other = reliability(scores, tiers, 0.4, **case)
    assert other["interval"].high == pytest.approx(exact["interval"].high, abs=1e-12)


def ordinal_world(seed: int, n: int):
    """Scores, and tiers of a noisy latent grade."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=n)
    grade = scores + 0.6 * rng.logistic(size=n)
    return scores, 3 - np.searchsorted([-1.3, 0.3, 1.9], grade)


def test_calibrated_probabilities_come_true_and_overconfident_ones_do_not():
    learned = fit_temperature(*ordinal_world(0, 2000))["value"]
    scores, tiers = ordinal_world(1, 1000)
    good, bold, shy = (
        reliability(scores, tiers, factor * learned, rounds=200) for factor in (1, 1 / 3, 3)
    )
    assert good["ece"] < 0.02 and good["interval"].low < 0.01
    assert bold["ece"] > 0.08 and bold["interval"].low > 0.06
    assert (
        bold["overconfidence"] == pytest.approx(bold["ece"])
        and bold["overconfidence_interval"].low > 0
    )
    assert shy["overconfidence"] < -0.08 and shy["interval"].low > 0.06


def test_the_interval_holds_the_true_error():
    """Of 40 small test sets of one world, where the percentile interval alone would hold it in none."""
    learned = fit_temperature(*ordinal_world(0, 6000))["value"]
    truth = reliability(*ordinal_world(1, 6000), learned, rounds=0)["ece"]
    held = 0
    for seed in range(40):
        found = reliability(*ordinal_world(100 + seed, 80), learned, rounds=60)
        held += found["interval"].low <= truth <= found["interval"].high
    assert held >= 33


def test_what_cannot_be_known_of_probabilities_is_none():
    scores, tiers = graded(0, 40)
    assert reliability(scores, np.zeros(40, int), 1.0) is None
    assert reliability(scores, tiers, 1.0, ["one"] * 40)["interval"] is None
    even = reliability(scores, tiers, np.inf, rounds=0)
    assert even["interval"] is None
    assert [part["pairs"] > 0 for part in even["bins"]] == [True, False, False, False, False]
    assert even["bins"][0]["predicted"] == 0.5 and even["bins"][1]["predicted"] is None
