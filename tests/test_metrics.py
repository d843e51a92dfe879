"""Each figure against plain loops, SciPy or scikit-learn, on rows that are really repeated."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn_metrics

from mirip_fast.errors import ConfigError, DataError
from mirip_fast.evaluation import metrics
from mirip_fast.evaluation.bootstrap import (
    accuracy_interval,
    bootstrap,
    paired_bootstrap,
)
from mirip_fast.evaluation.metrics import PairCounter, pairwise_accuracy


def random_case(seed: int) -> tuple[Any, ...]:
    """Scores with ties, tiers with gaps, within codes with unknown ones, and weights; n from 2 to 40."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 41))
    n_tiers = int(rng.integers(2, 6))
    kinds = rng.permutation(n_tiers)[: rng.integers(2, n_tiers + 1)]  # some tiers stay empty
    tiers = np.r_[kinds[:2], rng.choice(kinds, n - 2)]
    scores = rng.normal(size=n) if seed % 3 == 0 else rng.integers(0, 4, n) / 3
    within = rng.integers(-1, 4, n) * 7 if seed % 2 else np.zeros(n, int)
    return scores, tiers, within, n_tiers, rng.integers(0, 4, n) if seed % 4 else np.ones(n, int)


def listed_pairs(scores: Any, tiers: Any, within: Any) -> dict[Any, list[float]]:
    """{(better tier, worse tier, code): [right, pairs]} by looking at every two rows."""
    table: dict[Any, list[float]] = {}
    for i, j in itertools.permutations(range(len(scores)), 2):
        if tiers[i] < tiers[j] and within[i] == within[j] >= 0:
            cell = table.setdefault((tiers[i], tiers[j], within[i]), [0.0, 0])
            cell[0] += (1 + np.sign(scores[i] - scores[j])) / 2
            cell[1] += 1
    return table


def summed(table: dict[Any, list[float]], place: Any) -> dict[Any, list[float]]:
    result: dict[Any, list[float]] = {}
    for key, counts in table.items():
        own = result.setdefault(place(key), [0.0, 0])
        own[:] = [a + b for a, b in zip(own, counts, strict=True)]
    return result


@pytest.mark.parametrize("seed", range(16))
def test_pairs_are_counted_as_in_the_double_loop(seed: int) -> None:
    scores, tiers, within, n_tiers, weights = random_case(seed)
    rows = np.repeat(np.arange(len(scores)), weights)
    table = listed_pairs(scores[rows], tiers[rows], within[rows])
    counter = PairCounter(scores, tiers, n_tiers, within)
    right, pairs = counter.table(weights)
    by_tiers = summed(table, lambda key: key[:2])
    for a, b in itertools.product(range(n_tiers), repeat=2):
        assert [right[a, b], pairs[a, b]] == by_tiers.get((a, b), [0, 0])
    by_code = summed(table, lambda key: key[2])
    codes = np.unique(np.maximum(within, 0))
    for row, counts in zip(codes, np.transpose(counter.by_cell(weights)), strict=True):
        assert counts.tolist() == by_code.get(row, [0, 0])
    whole = np.sum(list(table.values()), axis=0) if table else (0, 0)
    if whole[1]:
        assert pairwise_accuracy(scores, tiers, within, weights) == whole[0] / whole[1]
    else:
        with pytest.raises(DataError, match="within"):
            pairwise_accuracy(scores, tiers, within, weights)


def spearman(scores: Any, grades: Any, weights: Any = None) -> float:
    one, other = (np.unique(values, return_inverse=True)[1] for values in (scores, grades))
    return metrics.rank_correlation(one, other, np.ones(len(one)) if weights is None else weights)


def tau_b(scores: Any, tiers: Any) -> float:
    return PairCounter(scores, tiers).tau_b()


@pytest.mark.parametrize("seed", range(12))
def test_figures_are_those_of_scipy_and_scikit_learn(seed: int) -> None:
    scores, tiers, _, n_tiers, weights = random_case(seed)
    rng = np.random.default_rng(seed)
    grades, guess = rng.integers(0, 6, len(scores)) / 2, rng.integers(0, n_tiers, len(scores))
    weights[:2] = np.maximum(weights[:2], 1)  # two tiers at least
    rows = np.repeat(np.arange(len(scores)), weights)
    s, t, g = scores[rows], tiers[rows], grades[rows]
    near = {"abs": 1e-12}
    found = pairwise_accuracy(scores, tiers, weights=weights)
    assert found == pytest.approx((1 + stats.somersd(-t, s).statistic) / 2, **near)
    if len(set(t)) == 2:
        area = sklearn_metrics.roc_auc_score(t == t.min(), s)
        assert found == pytest.approx(area, **near)
    if len(set(s)) > 1:
        tau = PairCounter(scores, tiers).tau_b(weights)
        assert tau == pytest.approx(stats.kendalltau(s, -t).statistic, **near)
    if len(set(s)) > 1 and len(set(g)) > 1:
        rank = spearman(scores, grades, weights)
        assert rank == pytest.approx(stats.spearmanr(s, g).statistic, **near)
    for k in (1, 3, 1000):
        ndcg = metrics.ndcg_at_k(scores, tiers, k, n_tiers, weights)
        expected = sklearn_metrics.ndcg_score([n_tiers - 1 - t], [s], k=k)
        assert ndcg == pytest.approx(expected, **near)
    confusion = metrics.confusion_matrix(tiers, guess, n_tiers, weights)
    expected = sklearn_metrics.confusion_matrix(t, guess[rows], labels=range(n_tiers))
    assert confusion.tolist() == expected.tolist()
    assert metrics.tier_accuracy(confusion) == np.mean(t == guess[rows])
    f1 = sklearn_metrics.f1_score(t, guess[rows], average="macro")
    assert metrics.macro_f1(confusion) == pytest.approx(f1, **near)


def test_accuracy_of_groups_and_of_listed_pairs() -> None:
    rng = np.random.default_rng(0)
    scores, tiers = rng.integers(0, 6, 60).astype(float), rng.integers(0, 4, 60)
    codes = np.r_[0, 1 + rng.integers(0, 5, 59)]
    accuracy, pairs = metrics.accuracy_by_group(scores, tiers, codes)
    margins = []
    for code in range(6):
        own = [
            (scores[i] - scores[j]) * np.sign(tiers[j] - tiers[i])
            for i in np.flatnonzero(codes == code)
            for j in np.flatnonzero(codes != code)
            if tiers[i] != tiers[j]
        ]
        assert pairs[code] == len(own)
        assert accuracy[code] == pytest.approx(np.mean((1 + np.sign(own)) / 2), abs=1e-14)
        assert metrics.listed_accuracy(own) == pytest.approx(accuracy[code], abs=1e-14)
        margins += own
    assert metrics.listed_accuracy([2.0, -1.0, 0.0], [1, 3, 2]) == pytest.approx(2 / 6)
    assert math.isnan(metrics.listed_accuracy([])) and math.isnan(
        metrics.listed_accuracy([1.0], [0])
    )


def test_counts_beyond_32_bits_without_listing_pairs() -> None:
    n = 200_000  # 10¹⁰ pairs: a list of them would not fit
    tiers = np.repeat([0, 1], n // 2)
    scores = np.arange(n, dtype=float)
    scores[0] = n  # one image of the better tier is above all others
    tracemalloc.start()
    try:
        assert PairCounter(scores, tiers).table()[1][0, 1] == (n // 2) ** 2
        assert pairwise_accuracy(scores, tiers) == pytest.approx(2 / n, rel=1e-12)
        assert tracemalloc.get_traced_memory()[1] < 200e6
    finally:
        tracemalloc.stop()


def test_what_is_not_defined_is_nan() -> None:
    for figure, first, second in (
        (tau_b, [1.0, 1.0], [0, 1]),
        (tau_b, [1.0, 2.0], [1, 1]),
        (tau_b, [], []),
        (spearman, [1.0, 1.0], [0.0, 1.0]),
        (spearman, [1.0, 2.0], [3.0, 3.0]),
        (lambda s, t: metrics.ndcg_at_k(s, t, 1, 4), [1.0, 2.0], [3, 3]),
    ):
        assert math.isnan(figure(first, second))
    empty = metrics.confusion_matrix([], [], 3)
    assert math.isnan(metrics.tier_accuracy(empty)) and math.isnan(metrics.macro_f1(empty))
    with pytest.raises(ConfigError, match="at least 1"):
        metrics.ndcg_at_k([1.0, 2.0], [0, 3], 0, 4)


def test_quota_keeps_the_tier_shares_and_never_profits_from_the_order_of_the_rows() -> None:
    rng = np.random.default_rng(3)
    tiers, scores = rng.choice([0, 2, 3], 50), rng.normal(size=50)
    predicted = metrics.tiers_by_quota(scores, tiers)
    assert (np.bincount(predicted) == np.bincount(tiers)).all()
    assert (np.diff(predicted[np.argsort(-scores)]) >= 0).all()
    for _ in range(10):
        tiers = np.sort(rng.integers(0, 4, 30))  # as a folder per tier would give them
        scores = rng.integers(0, 4, 30).astype(float)
        predicted = metrics.tiers_by_quota(scores, tiers)
        assert all(len(set(predicted[scores == value])) == 1 for value in set(scores))
        shuffled = rng.permutation(30)
        again = metrics.tiers_by_quota(scores[shuffled], tiers[shuffled])
        assert (again == predicted[shuffled]).all()
    assert (metrics.tiers_by_quota(np.zeros(9), [0, 0, 0, 1, 1, 2, 2, 2, 2]) == 1).all()


def make_case(seed: int, n: int = 40) -> tuple[Any, ...]:
    rng = np.random.default_rng(seed)
    tiers = rng.choice([0, 1, 3], n, p=[0.1, 0.5, 0.4])
    tiers[:3] = [0, 1, 3]
    names = [None if g == 0 else f"지원자{g}" for g in rng.integers(0, 12, n)]
    return np.round(rng.normal(size=n) - 0.5 * tiers), tiers, names, rng.integers(-1, 3, n)


def row_resamples(names: Any, rounds: int, seed: int) -> Any:
    """Row numbers of each resample, repeated as often as their group was drawn."""
    rows_of: dict[Any, list[int]] = {}
    for row, name in enumerate(names):
        rows_of.setdefault(name if name is not None else (row,), []).append(row)
    members = list(rows_of.values())
    rng = np.random.Generator(np.random.PCG64(seed))
    for _ in range(rounds):
        drawn = rng.integers(len(members), size=len(members))
        yield np.array(list(itertools.chain.from_iterable(members[g] for g in drawn)))


@pytest.mark.parametrize("seed", range(3))
def test_intervals_are_those_of_rows_that_are_repeated(seed: int) -> None:
    first, tiers, names, within = make_case(seed)
    second = first * 10 + np.random.default_rng(seed).normal(size=len(first)) * 8
    alone, differences = [], []
    for rows in row_resamples(names, 80, seed):
        both = [
            np.sum(list(listed_pairs(s[rows], tiers[rows], within[rows]).values()), axis=0)
            for s in (first, second)
        ]
        alone.append(both[0][0] / both[0][1])
        differences.append((both[0][0] - both[1][0]) / both[0][1])
    settings: dict[str, Any] = {"within": within, "rounds": 80, "seed": seed}
    found = accuracy_interval(first, tiers, names, **settings)
    paired = paired_bootstrap(first, second, tiers, names, **settings)
    assert paired["difference"] == paired["first"] - paired["second"]
    assert paired["first"] == pairwise_accuracy(first, tiers, within)
    for interval, values in ((found, alone), (paired["interval"], differences)):
        assert interval is not None and (interval.rounds, interval.dropped) == (80, 0)
        count = len(set(filter(None, names))) + list(names).count(None)
        low = stats.norm.cdf((count / (count - 1)) ** 0.5 * stats.t.ppf(0.025, count - 1))
        expected = np.quantile(values, [low, 1 - low])
        assert [interval.low, interval.high] == pytest.approx(expected.tolist(), abs=1e-12)


def test_rounds_without_a_pair_are_dropped_and_counted() -> None:
    scores, tiers = np.array([3.0, 1.0, 2.0, 0.0]), np.array([0, 0, 1, 1])
    pairs = [len(set(tiers[rows])) > 1 for rows in row_resamples([None] * 4, 500, 9)]
    found = accuracy_interval(scores, tiers, rounds=500, seed=9)
    assert found is not None and found.rounds == sum(pairs) < 500
    assert found.rounds + found.dropped == 500


def test_any_figure_can_be_drawn_and_the_seed_decides() -> None:
    values, codes = np.random.default_rng(0).normal(size=200), np.arange(200)

    def figures(weights: Any) -> dict[str, float]:
        return {"mean": float(weights @ values / weights.sum()), "nothing": math.nan}

    one, same, other = (bootstrap(figures, codes, rounds=400, seed=seed) for seed in (1, 1, 2))
    assert one == same != other and one["nothing"] is None
    mean, error = values.mean(), values.std() / np.sqrt(200)
    span = one["mean"]
    assert span is not None
    assert (span.low, span.high) == pytest.approx(
        (mean - 1.96 * error, mean + 1.96 * error), abs=0.03
    )
    wide = bootstrap(figures, codes, rounds=400, seed=1, confidence=0.99)["mean"]
    assert wide is not None and wide.low < span.low < span.high < wide.high
    for settings in ({"rounds": -1}, {"confidence": 0}, {"confidence": 1}, {"confidence": 95}):
        with pytest.raises(ConfigError):
            bootstrap(figures, codes, **settings)  # type: ignore[arg-type]
        with pytest.raises(ConfigError):
            paired_bootstrap([1.0, 2.0], [1.0, 2.0], [0, 1], **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "scores, tiers, groups, rounds",
    [
        ([3.0, 2.0, 1.0, 0.0], [0, 1, 0, 1], ["a"] * 4, 100),  # one group
        ([1.0, 0.0], [0, 1], None, 100),  # two images
        ([3.0, 2.0, 1.0, 0.0], [0, 0, 1, 1], ["a", "a", "b", "b"], 100),  # each tier in one group
        ([1.0, 2.0, 3.0], [1, 1, 1], None, 100),  # one tier
        ([3.0, 2.0, 1.0, 0.0], [0, 1, 0, 1], None, 0),  # no rounds
        ([], [], None, 100),
    ],
)
def test_unknown_rather_than_made_up(scores: Any, tiers: Any, groups: Any, rounds: int) -> None:
    assert accuracy_interval(scores, tiers, groups, rounds=rounds) is None
