"""One report: its figures are those of the metrics, its JSON is plain, its mistakes the worst."""

import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from mirip_fast.errors import ConfigError, DataError
from mirip_fast.evaluation import metrics
from mirip_fast.evaluation.intervals import bootstrap_over_groups
from mirip_fast.evaluation.mistakes import worst_pairs
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


def test_figures_are_those_of_the_metrics():
    case = make_case()
    scores, tiers = case["scores"], case["tiers"]
    within = metrics.codes_of(case["within"])
    report = judged(case, ks=(5, 20), seed=4, confidence=0.9)
    settings = {"rounds": 60, "seed": 4, "confidence": 0.9}
    spread = bootstrap_over_groups(scores, tiers, case["groups"], **settings)
    inside = bootstrap_over_groups(scores, tiers, case["groups"], within=within, **settings)

    assert report.n_images == 80
    assert report.tier_counts == tuple(np.bincount(tiers, minlength=4))
    named = {group for group in case["groups"] if group}
    assert report.n_groups == len(named) + case["groups"].count(None)
    assert report.pairwise_accuracy == metrics.pairwise_accuracy(scores, tiers)
    assert report.pairwise_accuracy_interval == spread.pairwise_accuracy
    assert report.macro_accuracy == metrics.macro_pairwise_accuracy(scores, tiers)
    assert report.macro_accuracy_interval == spread.macro_accuracy
    assert report.within_accuracy == metrics.pairwise_accuracy(scores, tiers, within)
    assert report.within_accuracy_interval == inside.pairwise_accuracy
    assert report.kendall_tau_b == metrics.kendall_tau_b(scores, tiers)
    assert report.kendall_tau_b_interval == spread.kendall_tau_b
    assert report.ndcg == {k: metrics.ndcg_at_k(scores, tiers, k, 4) for k in (5, 20)}

    accuracy, pairs = metrics.tier_pair_accuracy(scores, tiers, 4)
    assert report.n_pairs == pairs.sum()
    assert [(row.better, row.worse) for row in report.tier_pairs] == [
        ("S", "A"),
        ("S", "C"),
        ("A", "C"),
    ]
    for row in report.tier_pairs:
        cell = NAMES.index(row.better), NAMES.index(row.worse)
        assert (row.pairs, row.accuracy) == (pairs[cell], accuracy[cell])
        assert row.interval == spread.tier_pairs[cell]

    graded = [i for i, grade in enumerate(case["tier_scores"]) if grade is not None]
    grades = [case["tier_scores"][i] for i in graded]
    assert report.spearman == metrics.spearman(scores[graded], grades)
    assert report.spearman_images == len(graded) < 80

    predicted = metrics.tiers_by_quota(scores, tiers)
    assert report.tier_accuracy == np.mean(predicted == tiers)
    assert np.array_equal(report.confusion, metrics.confusion_matrix(tiers, predicted, 4))
    assert report.macro_f1 == metrics.macro_f1(np.array(report.confusion))


def test_pairs_within_are_counted():
    case = make_case()
    expected = sum(
        a == b and a is not None and case["tiers"][i] < case["tiers"][j]
        for i, a in enumerate(case["within"])
        for j, b in enumerate(case["within"])
    )
    assert judged(case).within_pairs == expected


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


@pytest.mark.parametrize("numbers", [np.float32, np.float64])
def test_lists_and_arrays_alike(numbers):
    case = make_case()
    case["scores"] = case["scores"].astype(numbers)
    lists = {**case, "scores": case["scores"].tolist(), "tiers": case["tiers"].tolist()}
    assert judged(case) == judged(lists)


def test_what_can_not_be_judged_is_named():
    case = make_case()
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
        if tiers[i] < tiers[j] and scores[j] > scores[i] and within[i] == within[j] >= 0
    ]
    shown, taken = Counter(), []
    for gap, i, j in sorted(wrong):
        if len(taken) < k and shown[i] < cap and shown[j] < cap:
            shown.update((i, j))
            taken.append((i, j, -gap))
    return taken


@pytest.mark.parametrize("seed", range(40))
def test_worst_pairs_are_those_of_the_full_list(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 60))
    tiers = rng.choice([0, 2, 3], n)
    scores = rng.integers(0, 12, n) / 4 if seed % 2 else rng.normal(size=n)
    within = rng.integers(-1, 3, n) if seed % 3 else np.zeros(n, int)
    for k, cap in ((0, 1), (1, 1), (5, 1), (5, 2), (12, 3), (500, 2)):
        found = worst_pairs(scores, tiers, k, within=within, max_per_image=cap)
        assert [(p.better, p.worse, p.gap) for p in found] == greedy(scores, tiers, k, within, cap)


def test_mistakes_carry_names_tiers_and_scores():
    report = evaluate(
        [0.0, 5.0, 3.0, 1.0], [0, 3, 1, 1], tier_names=NAMES, image_ids=list("abcd"), rounds=0
    )
    worst = report.worst_mistakes(2)
    assert [(m.better_id, m.worse_id, m.gap) for m in worst] == [("a", "b", 5.0), ("d", "b", 4.0)]
    assert (worst[0].better_tier, worst[0].better_score) == ("S", 0.0)
    assert (worst[0].worse_tier, worst[0].worse_score) == ("C", 5.0)
    assert [(m.better_id, m.worse_id) for m in report.worst_mistakes(9, max_per_image=1)] == [
        ("a", "b")
    ]
    with pytest.raises(ConfigError, match="k=-1"):
        report.worst_mistakes(-1)


def test_mistakes_stay_within():
    case = make_case()
    value = dict(zip(case["image_ids"], case["within"], strict=True))
    for mistake in judged(case).worst_mistakes(10):
        assert value[mistake.better_id] == value[mistake.worse_id] is not None


def test_importing_it_loads_nothing_heavy():
    code = (
        "import sys; import mirip_fast.evaluation.report; "
        "sys.exit(str([m for m in ('torch', 'pandas', 'scipy') if m in sys.modules] or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
