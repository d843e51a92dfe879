"""One report: its figures are those of the metrics, its JSON is plain, its mistakes the worst."""

import json
from collections import Counter

import numpy as np
import pytest
from scipy import stats
from test_metrics import listed_pairs, row_resamples, summed

from mirip_fast.errors import DataError
from mirip_fast.evaluation import metrics
from mirip_fast.evaluation.calibration import fit_calibration
from mirip_fast.evaluation.reliability import reliability
from mirip_fast.evaluation.report import evaluate
from mirip_fast.evaluation.text_table import display_width

NAMES = ("S", "A", "B", "C")


def make_case(seed=0, n=80):
    rng = np.random.default_rng(seed)
    tiers = rng.choice([0, 1, 3], n)  # no image of tier B
    return {
        "scores": np.round(rng.normal(size=n) - 0.6 * tiers, 1),
        "tiers": tiers,
        "image_ids": [f"그림-{i}.png" for i in range(n)],
        "groups": [None if g == 0 else str(g) for g in rng.integers(0, 30, n)],
        "tier_scores": [None if g < 0 else float(g) for g in rng.integers(-1, 9, n)],
        "within": [None if g == 0 else f"학과{g}" for g in rng.integers(0, 4, n)],
    }


def judged(case, **changes):
    case = {**case, "tier_names": NAMES, "rounds": 60, **changes}
    return evaluate(case.pop("scores"), case.pop("tiers"), **case)


def test_figures_and_intervals_are_those_of_rows_that_are_repeated():
    case = make_case()
    scores, tiers, n = case["scores"], case["tiers"], 80
    grades = np.array([np.nan if g is None else g for g in case["tier_scores"]])
    codes = metrics.codes_of(case["within"])
    report = judged(case, ks=(5, 20), seed=4, confidence=0.9, rounds=40)
    quota = metrics.tiers_by_quota(scores, tiers)

    def figures(rows):
        s, t, g = scores[rows], tiers[rows], grades[rows]
        kept = ~np.isnan(g)
        every = listed_pairs(s, t, np.zeros(len(rows), int))
        shares = {key[:2]: right / pairs for key, (right, pairs) in every.items()}
        inside = listed_pairs(s, t, codes[rows])
        values = summed(inside, lambda key: key[2])
        whole = np.sum(list(inside.values()), axis=0)
        confusion = metrics.confusion_matrix(t, quota[rows], 4)
        return {
            "pairwise_accuracy": metrics.pairwise_accuracy(s, t),
            "macro_accuracy": np.mean(list(shares.values())),
            "kendall_tau_b": stats.kendalltau(s, -t).statistic,
            "spearman": stats.spearmanr(s[kept], g[kept]).statistic,
            "within_accuracy": whole[0] / whole[1],
            "within_macro_accuracy": np.mean([right / pairs for right, pairs in values.values()]),
            "ndcg": metrics.ndcg_at_k(s, t, 5, 4),
            "tiers": metrics.tier_accuracy(confusion),
            "f1": metrics.macro_f1(confusion),
            **{(NAMES[a], NAMES[b]): share for (a, b), share in shares.items()},
            **{code: right / pairs for code, (right, pairs) in values.items()},
        }

    point = figures(np.arange(n))
    drawn = [figures(rows) for rows in row_resamples(case["groups"], 40, 4)]
    names = ("pairwise_accuracy", "macro_accuracy", "kendall_tau_b", "spearman",
             "within_accuracy", "within_macro_accuracy")  # fmt: skip
    found = {name: (getattr(report, name), getattr(report, f"{name}_interval")) for name in names}
    found["ndcg"] = report.ndcg[5], report.ndcg_intervals[5]
    by_quota = report.by_quota
    found["tiers"] = by_quota["accuracy"], by_quota["accuracy_interval"]
    found["f1"] = by_quota["macro_f1"], by_quota["macro_f1_interval"]
    tier_pairs, values = (t.itertuples() for t in (report.tier_pairs, report.within_values))
    found |= {(row.better, row.worse): (row.accuracy, row.interval) for row in tier_pairs}
    for row in values:
        found[codes[case["within"].index(row.value)]] = row.accuracy, row.interval
    assert found.keys() == point.keys()
    count = report.n_groups
    tail = stats.norm.cdf((count / (count - 1)) ** 0.5 * stats.t.ppf(0.05, count - 1))
    for name, (value, interval) in found.items():
        assert value == pytest.approx(point[name], abs=1e-12), name
        low, high = np.quantile([each[name] for each in drawn if name in each], [tail, 1 - tail])
        assert (interval.low, interval.high) == pytest.approx((low, high), abs=1e-12), name

    assert report.n_images == n and report.ndcg.keys() == {5, 20}
    assert report.tier_counts == tuple(np.bincount(tiers, minlength=4))
    named = {group for group in case["groups"] if group}
    assert report.n_groups == len(named) + case["groups"].count(None)
    ordered = [("S", "A"), ("S", "C"), ("A", "C")]
    assert [(row.better, row.worse) for row in report.tier_pairs.itertuples()] == ordered
    assert report.n_pairs == report.tier_pairs["pairs"].sum()
    assert report.within_pairs == report.within_values["pairs"].sum()
    assert report.spearman_images == (~np.isnan(grades)).sum() < n


def test_groups_are_told_worst_first_and_without_intervals():
    case = make_case()
    report = judged(case, groups=["a", None, "b", "", "a"] * 15 + ["c"] + ["d"] * 4)
    rows = report.groups.set_index("group")
    assert {*rows.index} == {"a", "b", "d"}  # c has one work only
    accuracy, pairs = metrics.accuracy_by_group(
        case["scores"], case["tiers"], np.array([0, 1, 2, 1, 0] * 15 + [1] * 5)
    )
    row = rows.loc["a"]
    assert (row.images, row.pairs, row.accuracy) == (30, pairs[0], accuracy[0])
    assert rows["accuracy"].is_monotonic_increasing
    plain = report.to_dict()["groups"][0]
    assert plain.keys() == {"group", "images", "pairs", "accuracy"}
    assert all(judged(case, groups=groups).groups.empty for groups in (None, ["all"] * 80))


def test_a_tier_of_one_group_leaves_its_pairs_unknown():
    tiers = [0, 0] + [1, 3] * 10
    case = {"scores": np.arange(22.0) % 7, "tiers": tiers, "image_ids": ["x"] * 22}
    report = judged(case, groups=["one", "one"] + [None] * 20)
    assert [*report.tier_pairs["interval"].isna()] == [True, True, False]
    assert report.pairwise_accuracy_interval is not None and report.n_groups == 21


def only_plain(value):
    if isinstance(value, dict):
        return all(type(key) is str and only_plain(item) for key, item in value.items())
    if type(value) is list:
        return all(only_plain(item) for item in value)
    return value is None or type(value) in (str, int, float, bool)


@pytest.mark.parametrize("rounds", [0, 60])
def test_the_dict_is_plain_json(rounds):
    report = judged(make_case(), rounds=rounds)
    plain = report.to_dict(mistakes=3)
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["pairwise_accuracy"] == report.pairwise_accuracy
    assert (plain["pairwise_accuracy_interval"] is None) == (rounds == 0)
    assert plain["tier_pairs"][0]["better"] == "S"
    assert plain["ndcg"].keys() == {"10"}
    assert len(plain["worst_mistakes"]) == 3
    assert only_plain(plain)


def test_undefined_figures_are_none_and_said():
    case = {"scores": np.zeros(60), "tiers": np.arange(60) % 2, "image_ids": ["x"] * 60}
    report = judged(case, tier_scores=[None] * 60, within=[None] * 60)
    assert report.pairwise_accuracy == 0.5
    assert report.kendall_tau_b is None
    assert report.spearman is None
    assert report.within_accuracy is None
    json.dumps(report.to_dict(), allow_nan=False)
    assert "undefined" in report.to_table()
    assert "no sign of certainty" in report.to_table()


def test_what_can_not_be_judged_is_named():
    case = make_case()
    lists = {**case, "scores": case["scores"].tolist(), "tiers": case["tiers"].tolist()}
    assert judged(case).to_dict() == judged(lists).to_dict()
    bad = case["scores"].copy()
    bad[7] = np.nan
    with pytest.raises(DataError, match="그림-7.png"):
        judged(case, scores=bad)
    with pytest.raises(DataError, match="all 80 images are of tier 'B'"):
        judged(case, tiers=np.full(80, 2))
    with pytest.raises(DataError, match="4 is not below the 4 tiers S, A, B, C"):
        judged(case, tiers=np.full(80, 4))
    with pytest.raises(DataError, match="80 scores for 79 image ids"):
        judged(case, image_ids=case["image_ids"][1:])
    for name in ("groups", "tier_scores", "within"):
        with pytest.raises(DataError, match=name):
            judged(case, **{name: case[name][1:]})
    with pytest.raises(DataError, match="there is no image"):
        evaluate([], [], tier_names=NAMES, image_ids=[])


def test_the_table_lines_up_and_says_what_is_unknown():
    report = judged(make_case())
    blocks = report.to_table().split("\n\n")
    figures = blocks[1].split("\n")
    assert figures[0].endswith("95 % interval")
    assert any(line.startswith("pairwise accuracy") for line in figures)
    mistakes = next(block for block in blocks if block.startswith("Worst mistakes")).split("\n")
    assert len({display_width(line) for line in mistakes[1:]}) == 1
    assert len(mistakes) == 3 + 5
    unknown = judged(make_case(), groups=["one"] * 80).to_table()
    assert "unknown" in unknown
    assert "too few groups" in unknown
    assert "no bootstrap rounds" in judged(make_case(), rounds=0).to_table()
    few = judged(make_case(), groups=[str(i % 5) for i in range(80)])
    assert "Only 5 groups" in few.to_table()


def greedy(scores, tiers, k, within, cap):
    """The same choice from a list of all pairs."""
    wrong = [
        (scores[i] - scores[j], i, j)
        for i in range(len(scores))
        for j in range(len(scores))
        if tiers[i] < tiers[j] and scores[j] > scores[i] and within[i] == within[j] is not None
    ]
    shown, taken = Counter(), []
    for gap, i, j in sorted(wrong):
        if len(taken) < k and shown[i] < cap and shown[j] < cap:
            shown.update((i, j))
            taken.append((i, j, -gap))
    return taken


@pytest.mark.parametrize("seed", range(6))
def test_worst_mistakes_are_those_of_the_full_list(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(3, 60))
    tiers = np.r_[0, 3, rng.choice([0, 2, 3], n - 2)]
    scores = rng.integers(0, 12, n) / 4 if seed % 2 else rng.normal(size=n)
    within = [(None, "a", "b", "c")[i] for i in rng.integers(0, 4, n)] if seed % 3 else ["a"] * n
    case = {"scores": scores, "tiers": tiers, "image_ids": [str(i) for i in range(n)]}
    report = judged(case, within=within, rounds=0)
    for k, cap in ((0, 1), (1, 1), (5, 1), (5, 2), (12, 3), (500, 2)):
        found = report.worst_mistakes(k, max_per_image=cap).itertuples()
        expected = greedy(scores, tiers, k, within, cap)
        assert [(int(m.better_id), int(m.worse_id), m.gap) for m in found] == expected


def test_the_report_holds_a_calibration_against_the_images():
    rng = np.random.default_rng(0)
    tiers = rng.integers(0, 4, 300)
    scores = rng.normal(size=300) - tiers
    known = fit_calibration(scores[:150], tiers[:150], NAMES, source="out-of-fold")
    within = ["회화" if i % 3 else "조소" for i in range(150)]
    case = {"scores": scores[150:], "tiers": tiers[150:], "image_ids": ["x"] * 150}
    found = judged(case, calibration=known).probabilities
    own = reliability(scores[150:], tiers[150:], known.temperature["value"], rounds=60)
    assert found["pairs"] == own
    guess = known.tier_probabilities(scores[150:]).argmax(1)
    assert found["tiers"]["accuracy"] == (guess == tiers[150:]).mean()
    inside = judged(case, calibration=known, within=within).probabilities["pairs"]
    codes = metrics.codes_of(within)
    apart = reliability(scores[150:], tiers[150:], 1, within=codes, rounds=0)
    assert inside["pairs"] == apart["pairs"]
    text = judged(case, calibration=known, seen=3).to_table()
    assert "learned from 150 held-out works (out-of-fold)" in text and "too good" in text
    assert "true \\ most probable" in text and "predicted  observed" in text
    plain = judged(case, calibration=known).to_dict()["probabilities"]
    assert plain["source"] == "out-of-fold" and plain["pairs"]["bins"][0].keys() == {
        "low", "high", "pairs", "predicted", "observed", "interval",
    }  # fmt: skip
    few = fit_calibration(scores[:20], tiers[:20], NAMES, source="validation")
    unknown = judged(case, calibration=few)
    assert unknown.probabilities is None and "20 held-out works (validation)" in unknown.to_table()
