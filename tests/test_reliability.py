"""Whether probabilities come true: the calibration error and every further interval, against plain loops."""

from __future__ import annotations

import numpy as np
import pytest

from mirip_fast.evaluation import metrics
from mirip_fast.evaluation import reliability as module
from mirip_fast.evaluation.calibration import fit_calibration
from mirip_fast.evaluation.more_intervals import (
    figure_intervals,
    weighted_ndcg,
    weighted_spearman,
    weighted_tier_figures,
)
from mirip_fast.evaluation.pair_counts import PairCounter
from mirip_fast.evaluation.reliability import reliability
from mirip_fast.evaluation.report import evaluate
from mirip_fast.evaluation.temperature import fit_temperature, logistic
from mirip_fast.evaluation.within_values import accuracy_within


def graded(seed: int, n: int, decimals: int = 1):
    rng = np.random.default_rng(seed)
    tiers = rng.choice(4, n, p=[0.1, 0.3, 0.4, 0.2])
    scores = np.round(rng.normal(size=n) - 0.6 * tiers, decimals)
    groups = [None if g == 0 else f"g{g}" for g in rng.integers(0, n // 2, n)]
    within = [None if w == 0 else f"학과{w}" for w in rng.integers(0, 4, n)]
    return scores, tiers, groups, within


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
def test_calibration_error_against_a_plain_loop(seed):
    scores, tiers, _, within = graded(seed, 40, decimals=2)
    temperature = (0.2, 0.7, 1.0, 3.0, 1e9)[seed]
    found = reliability(scores, tiers, temperature, rounds=0)
    assert found.ece == pytest.approx(plain_error(scores, tiers, temperature), abs=1e-12)
    assert found.interval is None
    assert sum(part.pairs for part in found.bins) == found.pairs
    codes = metrics.codes_of(within)
    inside = reliability(scores, tiers, temperature, within=codes, rounds=0)
    assert inside.ece == pytest.approx(plain_error(scores, tiers, temperature, within=codes))


def test_average_over_random_orientations_is_what_is_computed():
    """One drawn orientation per pair, many pairs: the textbook error of a binary classifier."""
    scores, tiers, _, _ = graded(3, 700, decimals=9)
    rng = np.random.default_rng(0)
    i, j = np.nonzero(tiers[:, None] < tiers[None, :])
    turned = rng.random(len(i)) < 0.5
    a, b = np.where(turned, j, i), np.where(turned, i, j)
    p, y = logistic((scores[a] - scores[b]) / 0.5), ~turned
    bins = np.minimum((p * 10).astype(int), 9)
    gaps = [abs(p[bins == k].mean() - y[bins == k].mean()) * (bins == k).mean() for k in range(10)]
    assert reliability(scores, tiers, 0.5, rounds=0).ece == pytest.approx(sum(gaps), abs=2e-3)


def drawn_rows(groups, rounds, seed):
    """The resamples as repeated rows, drawn here once more."""
    names = [g or ("alone", i) for i, g in enumerate(groups)]
    unique = list(dict.fromkeys(names))
    rng = np.random.Generator(np.random.PCG64(seed))
    for _ in range(rounds):
        drawn = rng.integers(len(unique), size=len(unique))
        yield [i for g in drawn for i, name in enumerate(names) if name == unique[g]]


def test_interval_of_the_error_against_repeated_rows():
    scores, tiers, groups, _ = graded(1, 30)
    found = reliability(scores, tiers, 0.8, groups, rounds=60, seed=4)
    errors = [plain_error(scores, tiers, 0.8, rows) for rows in drawn_rows(groups, 60, 4)]
    low, high = np.quantile(errors, [0.025, 0.975])
    assert found.interval.high == pytest.approx(high)
    assert found.interval.low == pytest.approx(max(0, 2 * found.ece - high))
    assert low > found.interval.low


def test_intervals_of_many_scores_in_steps_are_nearly_exact(monkeypatch):
    scores, tiers, groups, _ = graded(2, 600, decimals=9)
    steps = reliability(scores, tiers, 0.4, groups, rounds=100)
    monkeypatch.setattr(module, "_CELLS", 10_000)
    exact = reliability(scores, tiers, 0.4, groups, rounds=100)
    assert steps.ece == exact.ece
    assert steps.interval.high == pytest.approx(exact.interval.high, abs=2e-3)
    assert steps.interval != exact.interval


def ordinal_world(seed: int, n: int):
    """Scores, and tiers of a noisy latent grade."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=n)
    grade = scores + 0.6 * rng.logistic(size=n)
    return scores, 3 - np.searchsorted([-1.3, 0.3, 1.9], grade)


def test_calibrated_probabilities_come_true_and_overconfident_ones_do_not():
    learned = fit_temperature(*ordinal_world(0, 2000)).value
    scores, tiers = ordinal_world(1, 2000)
    good = reliability(scores, tiers, learned)
    assert good.ece < 0.02
    assert good.interval.low < 0.01
    bold = reliability(scores, tiers, learned / 3)
    assert bold.ece > 0.08 and bold.interval.low > 0.06
    assert bold.overconfidence == pytest.approx(bold.ece) and bold.overconfidence_interval.low > 0
    shy = reliability(scores, tiers, learned * 3)
    assert shy.overconfidence < -0.08 and shy.interval.low > 0.06


def test_the_interval_holds_the_true_error():
    """Of 40 small test sets of one world, where the percentile interval alone would hold it in none."""
    learned = fit_temperature(*ordinal_world(0, 6000)).value
    truth = reliability(*ordinal_world(1, 6000), learned, rounds=0).ece
    held = 0
    for seed in range(40):
        found = reliability(*ordinal_world(100 + seed, 80), learned, rounds=100)
        held += found.interval.low <= truth <= found.interval.high
    assert held >= 33


def test_what_can_not_be_known_is_none():
    scores, tiers, _, _ = graded(0, 40)
    assert reliability(scores, np.zeros(40, int), 1.0) is None
    assert reliability(scores, tiers, 1.0, ["one"] * 40).interval is None
    even = reliability(scores, tiers, np.inf)
    assert [part.pairs > 0 for part in even.bins] == [True, False, False, False, False]
    assert even.bins[0].said == 0.5 and even.bins[1].said is None


@pytest.mark.parametrize("seed", range(4))
def test_weighted_figures_are_those_of_repeated_rows(seed):
    scores, tiers, _, _ = graded(seed, 35, decimals=seed % 2)
    rng = np.random.default_rng(seed)
    grades = rng.integers(0, 6, 35).astype(float)
    predicted = rng.integers(0, 4, 35)
    weights = rng.integers(0, 3, (35, 7))
    figures = {k: weighted_ndcg(scores, tiers, k, 4, weights) for k in (1, 5, 1000)}
    rank = weighted_spearman(scores, grades, weights)
    accuracy, f1 = weighted_tier_figures(tiers, predicted, 4, weights)
    for r in range(7):
        rows = np.repeat(np.arange(35), weights[:, r])
        for k, values in figures.items():
            assert values[r] == pytest.approx(metrics.ndcg_at_k(scores[rows], tiers[rows], k, 4))
        assert rank[r] == pytest.approx(metrics.spearman(scores[rows], grades[rows]))
        confusion = metrics.confusion_matrix(tiers[rows], predicted[rows], 4)
        assert accuracy[r] == pytest.approx(metrics.tier_accuracy(confusion))
        assert f1[r] == pytest.approx(metrics.macro_f1(confusion))


def test_a_resample_without_the_best_works_still_has_its_top_ten():
    scores, tiers, _, _ = graded(0, 300, decimals=9)
    weights = np.random.default_rng(0).integers(0, 2, (300, 5))
    weights[np.argsort(-scores)[:150], 1:] = 0
    found = weighted_ndcg(scores, tiers, 10, 4, weights)
    for r in range(5):
        rows = np.repeat(np.arange(300), weights[:, r])
        assert found[r] == pytest.approx(metrics.ndcg_at_k(scores[rows], tiers[rows], 10, 4))


def test_figure_intervals_use_the_resamples_of_all():
    scores, tiers, groups, _ = graded(0, 40)
    grades = np.where(np.arange(40) % 3, scores + tiers, np.nan)
    settings = {"rounds": 50, "confidence": 0.9, "seed": 2}
    found = figure_intervals(
        scores, tiers, 4, groups, grades=grades, predicted=[tiers], ks=(5,), **settings
    )
    ndcg, rank = [], []
    for rows in map(np.array, drawn_rows(groups, 50, 2)):
        ndcg.append(metrics.ndcg_at_k(scores[rows], tiers[rows], 5, 4))
        kept = rows[~np.isnan(grades[rows])]
        rank.append(metrics.spearman(scores[kept], grades[kept]))
    assert (found.ndcg[5].low, found.ndcg[5].high) == pytest.approx(np.quantile(ndcg, [0.05, 0.95]))
    assert (found.spearman.low, found.spearman.high) == pytest.approx(
        np.quantile(rank, [0.05, 0.95])
    )
    assert (found.tiers[0][0].low, found.tiers[0][0].high) == (1, 1)


def test_accuracy_inside_each_value_and_their_mean():
    scores, tiers, groups, within = graded(5, 60)
    found = accuracy_within(scores, tiers, within, groups, rounds=40, confidence=0.95, seed=1)
    codes = metrics.codes_of(within)
    assert found.accuracy == metrics.pairwise_accuracy(scores, tiers, codes)
    assert found.pairs == PairCounter(scores, tiers, within=codes).count()[1].sum()
    each = {}
    for row in found.values:
        own = np.array([w == row.value for w in within])
        each[row.value] = metrics.pairwise_accuracy(scores[own], tiers[own])
        assert row.accuracy == each[row.value]
    assert len(each) == 3
    assert found.macro == pytest.approx(np.mean(list(each.values())))
    macro = []
    for rows in map(np.array, drawn_rows(groups, 40, 1)):
        shares = [
            metrics.pairwise_accuracy(scores[own], tiers[own])
            for value in each
            if len(set(tiers[own := [i for i in rows if within[i] == value]])) > 1
        ]
        macro.append(np.mean(shares))
    low, high = np.quantile(macro, [0.025, 0.975])
    assert (found.macro_interval.low, found.macro_interval.high) == pytest.approx((low, high))


def test_the_report_judges_a_calibration():
    scores, tiers = ordinal_world(0, 400)
    names = ("S", "A", "B", "C")
    known = fit_calibration(*ordinal_world(1, 400), names, source="out-of-fold")
    case = {"tier_names": names, "image_ids": [f"작품{i}" for i in range(400)], "rounds": 50}
    report = evaluate(scores, tiers, calibration=known, **case)
    assert report.probabilities.pairs.ece == reliability(scores, tiers, known.temperature.value).ece
    within = ["회화" if i % 3 else "조소" for i in range(400)]
    inside = evaluate(scores, tiers, calibration=known, within=within, **case).probabilities.pairs
    codes = metrics.codes_of(within)
    assert inside.pairs == reliability(scores, tiers, 1.0, within=codes, rounds=0).pairs
    guess = known.tier_probabilities(scores).argmax(1)
    assert report.probabilities.tiers.accuracy == (guess == tiers).mean()
    text = report.to_table()
    assert "learned from 400 held-out works (out-of-fold)" in text
    assert "true \\ most probable" in text
    assert (
        "too good" not in text
        and "too good" in evaluate(scores, tiers, calibration=known, seen=3, **case).to_table()
    )
    plain = report.to_dict()["probabilities"]
    assert plain["source"] == "out-of-fold" and len(plain["pairs"]["bins"]) == 5
    few = fit_calibration(scores[:20], tiers[:20], names, source="validation")
    unknown = evaluate(scores, tiers, calibration=few, **case)
    assert unknown.probabilities is None
    assert "20 held-out works (validation)" in unknown.to_table()
