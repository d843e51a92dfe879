"""Accuracy by group against a plain double loop, and intervals that cover what they say."""

from __future__ import annotations

import numpy as np
import pytest
from made_evaluation import made_report

from mirip_fast.evaluation.group_accuracy import accuracy_by_group, counts_by_image


def by_loop(
    scores: np.ndarray, tiers: np.ndarray, groups: list[str | None], group: str
) -> tuple[int, float]:
    right, pairs = 0.0, 0
    for i in range(len(scores)):
        for j in range(len(scores)):
            if groups[i] == group and groups[j] != group and tiers[i] != tiers[j]:
                better, worse = (i, j) if tiers[i] < tiers[j] else (j, i)
                gap = scores[better] - scores[worse]
                right += 1.0 if gap > 0 else 0.5 if gap == 0 else 0.0
                pairs += 1
    return pairs, right / max(1, pairs)


def test_against_a_double_loop() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, size=70).astype(float)  # many equal scores
    tiers = rng.integers(0, 4, size=70)
    groups: list[str | None] = [
        ("", None, "가", "나", "c", "d")[i] for i in rng.integers(6, size=70)
    ]
    groups[0] = "one work only"
    rows = accuracy_by_group(scores, tiers, groups, rounds=40, confidence=0.9, seed=1)
    assert {row.group for row in rows} == {"가", "나", "c", "d"}
    for row in rows:
        pairs, accuracy = by_loop(scores, tiers, groups, row.group)
        assert (row.pairs, row.images) == (pairs, groups.count(row.group))
        assert row.accuracy == pytest.approx(accuracy, abs=1e-12)
        assert row.interval is not None and row.interval.low < accuracy < row.interval.high
    assert [row.accuracy for row in rows] == sorted(row.accuracy for row in rows)


def test_weighted_counts_are_those_of_repeated_rows() -> None:
    rng = np.random.default_rng(2)
    scores, tiers = rng.integers(0, 5, size=30).astype(float), rng.integers(0, 3, size=30)
    weights = rng.integers(0, 3, size=(30, 2))
    right, pairs = counts_by_image(scores, tiers, weights)
    for column in range(2):
        rows = np.repeat(np.arange(30), weights[:, column])
        for i in range(30):
            others = rows[tiers[rows] != tiers[i]]
            good = np.sign(scores[i] - scores[others]) * np.sign(tiers[others] - tiers[i])
            assert pairs[i, column] == len(others)
            assert right[i, column] == (1 + good).sum()


def test_the_interval_covers_another_sample_of_the_group() -> None:
    """Its scores are noise in the middle of three tiers one standard deviation apart from each other.

    Four of the six kinds of pairs are right with Φ(1/√2), two with ½.
    """
    truth = (4 * 0.76025 + 2 * 0.5) / 6
    rng = np.random.default_rng(3)
    inside = 0
    for trial in range(60):
        tiers = rng.integers(0, 3, size=120)
        groups: list[str | None] = ["x"] * 12 + [f"g{i % 27}" for i in range(108)]
        scores = rng.normal(size=120) - np.r_[np.zeros(12), tiers[12:]]
        scores[:12] = rng.normal(size=12) - 1
        (row,) = (
            row
            for row in accuracy_by_group(
                scores, tiers, groups, rounds=200, confidence=0.9, seed=trial
            )
            if row.group == "x"
        )
        assert row.interval is not None
        inside += row.interval.low <= truth <= row.interval.high
    assert 48 <= inside <= 60


def test_where_there_is_nothing_to_say() -> None:
    assert made_report().groups == ()
    assert made_report(groups=["all"] * 96).groups == ()
    two = made_report(groups=["a"] * 48 + ["b"] * 48).groups
    assert len(two) == 2 and two[0].interval is None
    report = made_report(groups=["a", None] * 48)
    assert [row.group for row in report.groups] == ["a"]
    assert report.to_dict()["groups"][0]["pairs"] == report.groups[0].pairs
