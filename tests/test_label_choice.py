"""Which pairs are put before the judge, what a verdict tells, and the figures of a session."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from scipy import optimize, stats

from mirip_fast.label.choice import REPEAT_AFTER, REST, Chooser, Shares
from mirip_fast.label.committee import (
    MEMBERS,
    PRIOR,
    Committee,
    information,
    principal_components,
)
from mirip_fast.label.figures import Share, consistency, curve, predicted, wilson
from mirip_fast.label.judgements import MEASURE, REPEAT, TEACH, Judgement, Pair, as_arrays

Splits = dict[str, np.ndarray]


def some_works(n: int = 80, seed: int = 0) -> tuple[np.ndarray, np.ndarray, Splits]:
    """Components, true scores, and the works of each split."""
    rng = np.random.default_rng(seed)
    rows = principal_components(rng.normal(size=(n, 12)))
    truth = rows @ rng.normal(size=rows.shape[1])
    order = rng.permutation(n)
    cut = int(0.7 * n), int(0.85 * n)
    parts = np.split(order, cut)
    return (
        rows,
        truth,
        {name: np.sort(p) for name, p in zip(("train", "val", "test"), parts, strict=True)},
    )


def judge_many(chooser: Chooser, truth: np.ndarray, count: int) -> list[Judgement]:
    judged: list[Judgement] = []
    for _ in range(count):
        pair = chooser.next(judged)
        judged.append(Judgement(pair, 1 if truth[pair.one] > truth[pair.other] else -1))
    return judged


@pytest.mark.parametrize("informative", [True, False])
def test_properties_of_the_pairs(informative: bool) -> None:
    rows, truth, splits = some_works()
    chooser = Chooser(splits, Committee(rows), Shares(0.25, 0.05, informative), seed=3)
    judged = judge_many(chooser, truth, 200)
    home = {int(work): name for name, works in splits.items() for work in works}
    kinds = Counter(j.pair.kind for j in judged)
    assert [kinds[TEACH], kinds[MEASURE], kinds[REPEAT]] == pytest.approx([140, 50, 10], abs=1)
    seen: dict[tuple[int, int], tuple[int, Pair]] = {}
    for number, judgement in enumerate(judged):
        pair = judgement.pair
        assert pair.one != pair.other
        split = home[pair.one]
        assert split == home[pair.other]  # or train --pairs drops it
        if pair.kind != REPEAT:
            assert (split == "train") == (pair.kind == TEACH)
            assert pair.key not in seen
            seen[pair.key] = (number, pair)
        else:
            before, first = seen[pair.key]
            assert (pair.one, pair.other) == (first.other, first.one)  # sides swapped
            assert number - before >= REPEAT_AFTER
        if informative and pair.kind == TEACH:
            recent = [j.pair.key for j in judged[max(0, number - REST) : number]]
            assert not set(pair.key) & {work for key in recent for work in key}
    measured = [home[j.pair.one] for j in judged if j.pair.kind == MEASURE]
    assert measured[:6] == ["val", "val", "test"] * 2
    left = sum(j.pair.one < j.pair.other for j in judged if j.pair.kind != REPEAT)
    assert stats.binomtest(left, 190).pvalue > 1e-4  # either side


def test_skipped_and_waiting_pairs_do_not_come() -> None:
    rows, _, splits = some_works(24)
    chooser = Chooser(splits, Committee(rows), Shares(0, 0), seed=0)
    train = splits["train"]
    every = [(int(a), int(b)) for i, a in enumerate(train) for b in train[i + 1 :]]
    left = every[7]
    skipped = set(every) - {left, every[3]}
    assert chooser.next([], waiting=[Pair(*every[3])], skipped=skipped).key == left


def test_a_small_set_runs_out_without_an_end() -> None:
    splits = {"train": np.array([0, 1, 2]), "val": np.array([3, 4]), "test": np.array([5])}
    chooser = Chooser(splits, Committee(some_works(6)[0]), Shares(), seed=0)
    judged = judge_many(chooser, np.arange(6.0), 30)
    assert {j.pair.key for j in judged} == {(0, 1), (0, 2), (1, 2), (3, 4)}
    assert max(Counter(j.pair.key for j in judged if j.pair.kind != REPEAT).values()) == 1


def test_information_is_what_the_plain_formula_says() -> None:
    rng = np.random.default_rng(0)
    margins = rng.normal(0, 3, (7, 20))
    for m, told in enumerate(information(margins)):
        chances = [1 / (1 + math.exp(-x)) for x in margins[:, m]]
        mean = sum(chances) / len(chances)
        kullback = 0.0  # mutual information = mean divergence of each member from the mean
        for p in chances:
            kullback += p * math.log(p / mean) + (1 - p) * math.log((1 - p) / (1 - mean))
        assert told == pytest.approx(kullback / len(chances), abs=1e-9)


def test_contradiction_tells_more_than_doubt() -> None:
    margins = np.array([[5.0, 0.0, 5.0], [-5.0, 0.0, 5.0]])
    contradiction, doubt, agreement = information(margins)
    assert contradiction > 0.6 > 1e-9 > abs(doubt) and abs(agreement) < 1e-9


def test_a_member_is_the_minimum_of_its_loss() -> None:
    rows, truth, _ = some_works(40)
    rows = rows * 20  # margins so large that whole Newton steps overshoot
    rng = np.random.default_rng(1)
    pairs = np.array([rng.choice(40, 2, replace=False) for _ in range(60)])
    label = np.sign(truth[pairs[:, 0]] - truth[pairs[:, 1]]).astype(int)
    label[::9] = 0
    committee = Committee(rows, seed=5)
    for _ in range(5):
        committee.fit(pairs, label)
    gap = rows[pairs[:, 0]] - rows[pairs[:, 1]]
    times = committee._resamples(len(label))
    assert times.mean() == pytest.approx(1, abs=0.1)
    for member in (0, MEMBERS - 1):

        def loss(w: np.ndarray, member: int = member) -> float:
            total = ((w - committee._prior[member]) ** 2).sum() / (2 * PRIOR**2)
            for t, x, y in zip(times[member], gap @ w, (label + 1) / 2, strict=True):
                total += t * (y * np.log1p(np.exp(-x)) + (1 - y) * np.log1p(np.exp(x)))
            return float(total)

        best = optimize.minimize(loss, committee._prior[member], method="BFGS").x
        assert committee.scores()[member] == pytest.approx(rows @ best, rel=1e-3, abs=2e-2)


def test_members_learn_and_differ_where_nothing_is_known() -> None:
    rows, truth, splits = some_works(200)
    committee = Committee(rows)
    chooser = Chooser(splits, committee, Shares(0, 0), seed=0)
    judged = judge_many(chooser, truth, 150)
    before = Committee(rows).scores()
    committee.fit(*as_arrays(judged))
    after = committee.scores()
    assert stats.spearmanr(after.mean(0), truth).statistic > 0.9
    # they differ less about differences of works than before
    assert np.median(
        (after - after.mean(1, keepdims=True)).std(0) / after.std(1).mean()
    ) < 0.6 * np.median((before - before.mean(1, keepdims=True)).std(0) / before.std(1).mean())


def test_heads_of_a_run_say_what_is_in_doubt_at_first() -> None:
    rows, truth, splits = some_works(60)
    rng = np.random.default_rng(0)
    heads = truth + rng.normal(0, 0.01, (20, 60))
    few = splits["train"][:6]
    doubtful = int(few[0])
    heads[:10, doubtful] += 30  # half of the heads praise this work
    committee = Committee(rows, heads)
    assert len(committee) == 20
    for seed in range(5):
        chooser = Chooser(splits | {"train": few}, committee, Shares(0, 0), seed=seed)
        assert doubtful in chooser.next([]).key


def test_works_take_turns() -> None:
    rows, truth, splits = some_works(100)
    chooser = Chooser(splits, Committee(rows), Shares(0, 0), seed=1)
    judged = judge_many(chooser, truth, 140)
    times: Counter[int] = Counter({int(work): 0 for work in splits["train"]})
    for judgement in judged:
        times.update(judgement.pair.key)
        assert max(times.values()) - min(times.values()) <= 2
    # the same number of random pairs leaves some works out
    chooser = Chooser(splits, Committee(rows), Shares(0, 0, informative=False), seed=1)
    times = Counter(work for j in judge_many(chooser, truth, 70) for work in j.pair.key)
    assert len(times) < len(splits["train"])


def test_wilson_is_scipys() -> None:
    for hits, count in ((0, 3), (5, 9), (40, 50), (7, 7)):
        known = stats.binomtest(hits, count).proportion_ci(method="wilson")
        assert wilson(hits, count) == pytest.approx((known.low, known.high), abs=1e-6)
    assert Share(0, 0).to_dict() == {
        "hits": 0,
        "count": 0,
        "value": None,
        "low": None,
        "high": None,
    }


def test_consistency_looks_at_works_and_not_at_sides() -> None:
    judged = [
        Judgement(Pair(1, 2), 1),
        Judgement(Pair(3, 4), -1),
        Judgement(Pair(5, 6), 0),
        Judgement(Pair(2, 1, REPEAT), -1),  # the same
        Judgement(Pair(4, 3, REPEAT), -1),  # the other way
        Judgement(Pair(6, 5, REPEAT), 0),  # the same
        Judgement(Pair(1, 2), 0),  # a tie, this time
    ]
    assert consistency(judged) == Share(2, 4)


def test_the_curve_counts_predictions_made_before() -> None:
    judged = [
        Judgement(Pair(0, 1, MEASURE), 1, None),  # no head yet
        Judgement(Pair(2, 3, MEASURE), 1, 1),
        Judgement(Pair(4, 5, TEACH), 1, -1),
        Judgement(Pair(6, 7, MEASURE), 0, -1),  # a tie has no better work
        Judgement(Pair(3, 2, REPEAT), -1, -1),  # learned from before
        Judgement(Pair(8, 9, MEASURE), -1, 1),
    ]
    assert predicted(judged, measure=True) == [(2, True), (6, False)]
    assert predicted(judged, measure=False) == [(3, False)]
    points = curve([(i, i % 2 == 0) for i in range(1, 8)], window=3)
    assert [(p["at"], p["hits"], p["count"]) for p in points] == [
        (1, 0, 1), (2, 1, 2), (3, 1, 3), (4, 2, 3), (5, 1, 3), (6, 2, 3), (7, 1, 3),
    ]  # fmt: skip
