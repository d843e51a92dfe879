"""Which pairs are put before the judge, what a verdict tells, and the figures of a session."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from mirip_fast.config import LabelConfig
from mirip_fast.label.choice import (
    MEASURE,
    REPEAT,
    REPEAT_AFTER,
    REST,
    TEACH,
    Chooser,
    Pair,
)
from mirip_fast.label.session import consistency, curve, predicted, share

Splits = dict[str, np.ndarray]


def some_works(n: int = 80, seed: int = 0) -> tuple[np.ndarray, np.ndarray, Splits]:
    """Features, true scores, and the works of each split."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(n, 12))
    truth = rows @ rng.normal(size=rows.shape[1])
    order = rng.permutation(n)
    cut = int(0.7 * n), int(0.85 * n)
    parts = np.split(order, cut)
    return (
        rows,
        truth,
        {name: np.sort(p) for name, p in zip(("train", "val", "test"), parts, strict=True)},
    )


def choose(
    rows: np.ndarray,
    splits: Splits,
    measure: float = 0.0,
    repeat: float = 0.0,
    *,
    informative: bool = False,
    seed: int = 0,
) -> Chooser:
    config = LabelConfig(
        measure_share=measure,
        repeat_share=repeat,
        choose="informative" if informative else "random",
    )
    return Chooser(splits, rows, [rows.shape[1]], config, seed)


def judge_many(chooser: Chooser, truth: np.ndarray, count: int) -> list[Pair]:
    judged: list[Pair] = []
    for _ in range(count):
        pair = chooser.next(judged)
        judged.append(replace(pair, label=1 if truth[pair.one] > truth[pair.other] else -1))
    return judged


@pytest.mark.parametrize("informative", [True, False])
def test_properties_of_the_pairs(informative: bool) -> None:
    rows, truth, splits = some_works()
    chooser = choose(rows, splits, 0.25, 0.05, informative=informative, seed=3)
    judged = judge_many(chooser, truth, 200)
    home = {int(work): name for name, works in splits.items() for work in works}
    kinds = Counter(j.kind for j in judged)
    assert [kinds[TEACH], kinds[MEASURE], kinds[REPEAT]] == pytest.approx([140, 50, 10], abs=1)
    seen: dict[tuple[int, int], tuple[int, Pair]] = {}
    for number, pair in enumerate(judged):
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
        if informative and pair.kind == TEACH and number > 20:  # the first are random
            recent = [j.key for j in judged[max(0, number - REST) : number]]
            assert not set(pair.key) & {work for key in recent for work in key}
    measured = [home[j.one] for j in judged if j.kind == MEASURE]
    assert measured[:6] == ["val", "val", "test"] * 2
    left = sum(j.one < j.other for j in judged if j.kind != REPEAT)
    assert stats.binomtest(left, 190).pvalue > 1e-4  # either side


def test_skipped_and_waiting_pairs_do_not_come() -> None:
    rows, _, splits = some_works(24)
    chooser = choose(rows, splits)
    train = splits["train"]
    every = [(int(a), int(b)) for i, a in enumerate(train) for b in train[i + 1 :]]
    left = every[7]
    skipped = set(every) - {left, every[3]}
    assert chooser.next([], waiting=[Pair(*every[3])], skipped=skipped).key == left


def test_a_small_set_runs_out_without_an_end() -> None:
    splits = {"train": np.array([0, 1, 2]), "val": np.array([3, 4]), "test": np.array([5])}
    chooser = choose(some_works(6)[0], splits, 0.25, 0.05, informative=True)
    judged = judge_many(chooser, np.arange(6.0), 30)
    assert {j.key for j in judged} == {(0, 1), (0, 2), (1, 2), (3, 4)}
    assert max(Counter(j.key for j in judged if j.kind != REPEAT).values()) == 1


def test_chosen_pairs_are_those_in_doubt() -> None:
    rows, truth, splits = some_works(100)
    chooser = choose(rows, splits, informative=True)
    judged = judge_many(chooser, truth, 60)
    gap = np.array([abs(truth[j.one] - truth[j.other]) for j in judged])
    assert np.median(gap[30:]) < 0.7 * np.median(gap[:10])  # the first ten are random


def test_the_choice_heeds_the_file_of_another_program_and_does_not_need_decided_pairs() -> None:
    rows, _, splits = some_works(30)
    one, other = splits["train"][:2].tolist()
    across = Pair(one, int(splits["test"][0]))
    for judged in (
        [Pair(one, other, TEACH, 0)] * 12,  # ties alone
        [replace(across, label=1)] * 12,
        [Pair(one, other, TEACH, 1)] * 12 + [replace(across, label=-1)],
    ):
        pair = choose(rows, splits, informative=True).next(judged)
        assert pair.kind == TEACH and pair.key not in {j.key for j in judged}


def test_intervals_of_shares_are_scipys() -> None:
    for hits, count in ((0, 3), (5, 9), (40, 50), (7, 7)):
        known = stats.binomtest(hits, count).proportion_ci(method="wilson")
        found = share(hits, count)
        assert (found["low"], found["high"]) == pytest.approx((known.low, known.high), abs=1e-6)
    assert set(share(0, 0).values()) == {0, None}


def test_consistency_looks_at_works_and_not_at_sides() -> None:
    judged = [
        Pair(1, 2, TEACH, 1),
        Pair(3, 4, TEACH, -1),
        Pair(5, 6, TEACH, 0),
        Pair(2, 1, REPEAT, -1),  # the same
        Pair(4, 3, REPEAT, -1),  # the other way
        Pair(6, 5, REPEAT, 0),  # the same
        Pair(1, 2, TEACH, 0),  # a tie, this time
    ]
    assert consistency(judged) == share(2, 4)


def test_the_curve_counts_predictions_made_before() -> None:
    judged = [
        Pair(0, 1, MEASURE, 1, None),  # no head yet
        Pair(2, 3, MEASURE, 1, 1),
        Pair(4, 5, TEACH, 1, -1),
        Pair(6, 7, MEASURE, 0, -1),  # a tie has no better work
        Pair(3, 2, REPEAT, -1, -1),  # learned from before
        Pair(8, 9, MEASURE, -1, 1),
    ]
    assert predicted(judged, measure=True) == [(2, True), (6, False)]
    assert predicted(judged, measure=False) == [(3, False)]
    points = curve([(i, i % 2 == 0) for i in range(1, 8)], window=3)
    assert [(p["at"], p["hits"], p["count"]) for p in points] == [
        (1, 0, 1), (2, 1, 2), (3, 1, 3), (4, 2, 3), (5, 1, 3), (6, 2, 3), (7, 1, 3),
    ]  # fmt: skip
