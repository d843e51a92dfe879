"""Intervals against resamples whose rows are really repeated, and against the known truth."""

import itertools
import tracemalloc

import numpy as np
import pytest
from scipy import stats

from mirip_fast.errors import ConfigError, DataError
from mirip_fast.evaluation import intervals
from mirip_fast.evaluation.intervals import (
    bootstrap_over_groups,
    group_codes,
    paired_bootstrap,
)
from mirip_fast.evaluation.metrics import pairwise_accuracy

ROUNDS = 120


def make_case(seed, n=40, ties=True):
    rng = np.random.default_rng(seed)
    tiers = rng.choice([0, 1, 3], n, p=[0.1, 0.5, 0.4])
    tiers[:3] = [0, 1, 3]
    scores = rng.normal(size=n) - 0.5 * tiers
    if ties:
        scores = np.round(scores)
    names = [None if g == 0 else f"지원자{g}" for g in rng.integers(0, 12, n)]
    return scores, tiers, names, rng.integers(-1, 3, n)


def row_resamples(names, rounds, seed):
    """Row numbers of each resample, repeated as often as their group was drawn."""
    rows_of = {}
    for row, name in enumerate(names):
        rows_of.setdefault(name if name is not None else (row,), []).append(row)
    members = list(rows_of.values())
    rng = np.random.Generator(np.random.PCG64(seed))
    for _ in range(rounds):
        drawn = rng.integers(len(members), size=len(members))
        yield np.array(list(itertools.chain.from_iterable(members[g] for g in drawn)))


def pair_shares(scores, tiers, within):
    """{tier pair: (right, pairs)} with all n² pairs written out."""
    fair = within[:, None] == within[None, :]
    fair &= within[:, None] >= 0
    gap = scores[:, None] - scores[None, :]
    value = (gap > 0) + 0.5 * (gap == 0)
    shares = {}
    for a, b in itertools.combinations(range(4), 2):
        chosen = fair & (tiers[:, None] == a) & (tiers[None, :] == b)
        if chosen.any():
            shares[a, b] = (value[chosen].sum(), chosen.sum())
    return shares


def check(interval, values, rounds=ROUNDS):
    assert interval.rounds == len(values)
    assert interval.dropped == rounds - len(values)
    expected = np.percentile(values, [2.5, 97.5])
    assert [interval.low, interval.high] == pytest.approx(expected.tolist(), abs=1e-12)


@pytest.mark.parametrize("use_within", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_as_if_rows_were_repeated(seed, use_within):
    scores, tiers, names, within = make_case(seed, ties=seed % 2 == 0)
    codes = within if use_within else np.zeros_like(tiers)
    overall, macro, tau, single = [], [], [], {}
    for rows in row_resamples(names, ROUNDS, seed):
        shares = pair_shares(scores[rows], tiers[rows], codes[rows])
        if shares:
            right, pairs = np.sum(list(shares.values()), axis=0)
            overall.append(right / pairs)
            macro.append(np.mean([r / p for r, p in shares.values()]))
            tau.append(stats.kendalltau(scores[rows], -tiers[rows]).statistic)
        for pair, (right, pairs) in shares.items():
            single.setdefault(pair, []).append(right / pairs)

    result = bootstrap_over_groups(
        scores, tiers, names, within=within if use_within else None, rounds=ROUNDS, seed=seed
    )
    check(result.pairwise_accuracy, overall)
    check(result.macro_accuracy, macro)
    if use_within:
        assert result.kendall_tau_b is None
    else:
        check(result.kendall_tau_b, tau)
    assert set(result.tier_pairs) == set(pair_shares(scores, tiers, codes))
    for pair, interval in result.tier_pairs.items():
        if interval is not None:
            check(interval, single[pair])
    assert any(result.tier_pairs.values())


def test_rounds_without_a_pair_are_dropped_and_counted():
    scores, tiers = np.array([3.0, 1.0, 2.0, 0.0]), np.array([0, 0, 1, 1])
    values = []
    for rows in row_resamples([None] * 4, 500, 9):
        shares = pair_shares(scores[rows], tiers[rows], np.zeros(4, int))
        values += [right / pairs for right, pairs in shares.values()]
    assert 0 < len(values) < 500
    result = bootstrap_over_groups(scores, tiers, rounds=500, seed=9)
    check(result.pairwise_accuracy, values, rounds=500)


@pytest.mark.parametrize("seed", range(4))
def test_paired_difference_as_if_rows_were_repeated(seed):
    first, tiers, names, within = make_case(seed)
    second = first * 10 + np.random.default_rng(seed).normal(size=len(first)) * 8
    differences = []
    for rows in row_resamples(names, ROUNDS, 5):
        both = [pair_shares(s[rows], tiers[rows], within[rows]) for s in (first, second)]
        if both[0]:
            (r1, pairs), (r2, _) = (np.sum(list(shares.values()), axis=0) for shares in both)
            differences.append((r1 - r2) / pairs)
    result = paired_bootstrap(first, second, tiers, names, within=within, rounds=ROUNDS, seed=5)
    check(result.interval, differences)
    assert result.first == pairwise_accuracy(first, tiers, within)
    assert result.second == pairwise_accuracy(second, tiers, within)
    assert result.difference == result.first - result.second


def test_a_paired_interval_of_alike_scores_is_narrow():
    rng = np.random.default_rng(0)
    tiers = rng.integers(0, 4, 200)
    scores = rng.normal(size=200) - tiers
    same = paired_bootstrap(scores, 3 * scores + 1, tiers, rounds=100)
    assert (same.difference, same.interval.low, same.interval.high) == (0, 0, 0)
    alike = paired_bootstrap(scores, scores + rng.normal(size=200) * 0.1, tiers, rounds=200)
    alone = bootstrap_over_groups(scores, tiers, rounds=200).pairwise_accuracy
    assert alike.interval.high - alike.interval.low < 0.5 * (alone.high - alone.low)


@pytest.mark.parametrize("weights_at_once", [1, 100, 10_000_000])
def test_chunks_do_not_change_the_result(monkeypatch, weights_at_once):
    scores, tiers, names, _ = make_case(2)
    expected = bootstrap_over_groups(scores, tiers, names, rounds=50, seed=3)
    monkeypatch.setattr(intervals, "_CHUNK_WEIGHTS", weights_at_once)
    assert bootstrap_over_groups(scores, tiers, names, rounds=50, seed=3) == expected


def test_the_seed_decides():
    scores, tiers, names, _ = make_case(1, n=100, ties=False)
    runs = [
        bootstrap_over_groups(scores, tiers, names, rounds=50, seed=s).pairwise_accuracy
        for s in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_group_codes():
    assert group_codes(["b", None, "a", "", "b", None], 6).tolist() == [0, 1, 2, 3, 0, 4]
    assert group_codes(None, 3).tolist() == [0, 1, 2]
    with pytest.raises(DataError, match="2 values, but there are 3"):
        group_codes(["a", "b"], 3)


def test_memory_does_not_grow_with_rounds_or_pairs():
    rng = np.random.default_rng(0)
    tiers = rng.integers(0, 4, 20_000)
    tracemalloc.start()
    try:
        bootstrap_over_groups(rng.normal(size=20_000), tiers, rounds=300)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 200e6


UNKNOWN = {
    "one group": ([3.0, 2.0, 1.0, 0.0], [0, 1, 0, 1], ["a"] * 4, 100),
    "two images": ([1.0, 0.0], [0, 1], None, 100),
    "each tier in one group": ([3.0, 2.0, 1.0, 0.0], [0, 0, 1, 1], ["a", "a", "b", "b"], 100),
    "one tier": ([1.0, 2.0, 3.0], [1, 1, 1], None, 100),
    "no rounds": ([3.0, 2.0, 1.0, 0.0], [0, 1, 0, 1], None, 0),
    "no image": ([], [], None, 100),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_rather_than_made_up(name):
    scores, tiers, groups, rounds = UNKNOWN[name]
    result = bootstrap_over_groups(scores, tiers, groups, rounds=rounds)
    assert result.pairwise_accuracy is result.macro_accuracy is result.kendall_tau_b is None
    assert not any(result.tier_pairs.values())
    if len(set(tiers)) == 2:
        assert paired_bootstrap(scores, scores, tiers, groups, rounds=rounds).interval is None


def test_a_tier_of_one_group_leaves_its_pairs_unknown():
    tiers = [0, 0] + [1, 2] * 10
    groups = ["one", "one"] + [None] * 20
    result = bootstrap_over_groups(np.arange(22.0) % 7, tiers, groups, rounds=50)
    assert result.tier_pairs[0, 1] is None
    assert result.tier_pairs[0, 2] is None
    assert result.tier_pairs[1, 2] is not None
    assert result.pairwise_accuracy is not None
    assert result.n_groups == 21


@pytest.mark.parametrize(
    "settings", [{"rounds": -1}, {"confidence": 0}, {"confidence": 1}, {"confidence": 95}]
)
def test_unfit_settings(settings):
    with pytest.raises(ConfigError):
        bootstrap_over_groups([1.0, 2.0], [0, 1], **settings)
    with pytest.raises(ConfigError):
        paired_bootstrap([1.0, 2.0], [1.0, 2.0], [0, 1], **settings)


def test_more_confidence_is_wider():
    scores, tiers, names, _ = make_case(7, n=100, ties=False)
    wide, narrow = (
        bootstrap_over_groups(scores, tiers, names, confidence=c).pairwise_accuracy
        for c in (0.99, 0.8)
    )
    assert wide.low < narrow.low < narrow.high < wide.high


def coverage(copies, use_groups, trials=150):
    """Share of intervals that hold the true accuracy; each image stands ``copies`` times in its group."""
    truth = stats.norm.cdf(1 / np.sqrt(2))  # P(N(1, 1) > N(0, 1))
    rng = np.random.default_rng(11)
    hits = 0
    for trial in range(trials):
        tiers = np.repeat(rng.permutation(np.repeat([0, 1], 25)), copies)
        scores = (tiers == 0) + np.repeat(rng.normal(size=50), copies)
        names = [str(i // copies) for i in range(len(tiers))] if use_groups else None
        found = bootstrap_over_groups(scores, tiers, names, rounds=200, seed=trial)
        hits += found.pairwise_accuracy.low <= truth <= found.pairwise_accuracy.high
    return hits / trials


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    assert 0.88 <= coverage(copies=1, use_groups=False) <= 0.99


def test_groups_are_what_keeps_the_promise():
    assert 0.88 <= coverage(copies=4, use_groups=True) <= 0.99
    assert coverage(copies=4, use_groups=False) < 0.75
