"""Point figures against plain double loops, permutations and scipy."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from mirip_fast.errors import ConfigError, DataError
from mirip_fast.evaluation import metrics
from mirip_fast.evaluation.pair_counts import PairCounter


def listed_pairs(scores, tiers, within=None, weights=None):
    """{(better tier, worse tier): [right, pairs]} by looking at every two images."""
    table = {}
    for i, j in itertools.permutations(range(len(scores)), 2):
        if tiers[i] >= tiers[j]:
            continue
        if within is not None and (within[i] != within[j] or within[i] < 0):
            continue
        weight = 1 if weights is None else int(weights[i]) * int(weights[j])
        cell = table.setdefault((int(tiers[i]), int(tiers[j])), [0.0, 0])
        cell[0] += weight * (1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0)
        cell[1] += weight
    return table


def random_case(seed):
    """Scores with ties, tiers with gaps, within codes with unknown ones; n from 2 to 40."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 41))
    n_tiers = int(rng.integers(2, 6))
    kinds = rng.permutation(n_tiers)[: rng.integers(2, n_tiers + 1)]  # some tiers stay empty
    tiers = np.r_[kinds[:2], rng.choice(kinds, n - 2)]
    scores = rng.normal(size=n) if seed % 3 == 0 else rng.integers(0, 4, n) / 3
    within = rng.integers(-1, 4, n) * 7
    return scores, tiers, within, n_tiers


CASES = range(60)


@pytest.mark.parametrize("seed", CASES)
def test_every_pair_is_counted_as_in_the_double_loop(seed):
    scores, tiers, _, n_tiers = random_case(seed)
    table = listed_pairs(scores, tiers)
    right, total = np.sum(list(table.values()), axis=0)
    assert metrics.pairwise_accuracy(scores, tiers) == pytest.approx(right / total, abs=1e-15)
    macro = np.mean([r / p for r, p in table.values()])
    assert metrics.macro_pairwise_accuracy(scores, tiers) == pytest.approx(macro, abs=1e-14)

    accuracy, pairs = metrics.tier_pair_accuracy(scores, tiers, n_tiers)
    assert accuracy.shape == pairs.shape == (n_tiers, n_tiers)
    assert pairs.dtype == np.int64
    for cell in itertools.product(range(n_tiers), repeat=2):
        expected = table.get(cell)
        assert pairs[cell] == (expected[1] if expected else 0)
        if expected:
            assert accuracy[cell] == pytest.approx(expected[0] / expected[1], abs=1e-15)
        else:
            assert math.isnan(accuracy[cell])


@pytest.mark.parametrize("seed", CASES)
def test_only_pairs_inside_the_same_code_count(seed):
    scores, tiers, within, n_tiers = random_case(seed)
    table = listed_pairs(scores, tiers, within)
    if not table:
        with pytest.raises(DataError, match="within"):
            metrics.pairwise_accuracy(scores, tiers, within)
        return
    right, total = np.sum(list(table.values()), axis=0)
    assert metrics.pairwise_accuracy(scores, tiers, within) == pytest.approx(right / total)
    macro = np.mean([r / p for r, p in table.values()])
    assert metrics.macro_pairwise_accuracy(scores, tiers, within) == pytest.approx(macro)
    _, pairs = metrics.tier_pair_accuracy(scores, tiers, n_tiers, within)
    assert {tuple(cell): pairs[tuple(cell)] for cell in np.argwhere(pairs)} == {
        cell: count for cell, (_, count) in table.items()
    }


@pytest.mark.parametrize("seed", CASES)
def test_weighted_counts_are_those_of_the_double_loop(seed):
    scores, tiers, within, n_tiers = random_case(seed)
    weights = np.random.default_rng(seed + 1000).integers(0, 4, (len(scores), 3))
    for codes in (None, within, np.zeros(len(scores), int)):
        twice_right, pairs = PairCounter(scores, tiers, n_tiers, codes).count(weights)
        for column in range(3):
            table = listed_pairs(scores, tiers, codes, weights[:, column])
            for cell in itertools.product(range(n_tiers), repeat=2):
                right, count = table.get(cell, (0, 0))
                assert twice_right[(*cell, column)] == 2 * right
                assert pairs[(*cell, column)] == count


def test_two_images():
    assert metrics.pairwise_accuracy([2.0, 1.0], [0, 1]) == 1.0
    assert metrics.pairwise_accuracy([1.0, 2.0], [0, 1]) == 0.0
    assert metrics.pairwise_accuracy([1.0, 1.0], [0, 3]) == 0.5


def test_one_within_value_is_as_none():
    scores, tiers, _, _ = random_case(4)
    everywhere = np.full(len(scores), 5)
    assert metrics.pairwise_accuracy(scores, tiers, everywhere) == metrics.pairwise_accuracy(
        scores, tiers
    )


def test_half_precision_scores_tie_as_they_are():
    scores = np.array([1.0001, 1.0], dtype=np.float16)
    assert metrics.pairwise_accuracy(scores, [0, 1]) == 0.5


def test_counts_beyond_32_bits():
    n = 200_000  # 10¹⁰ pairs: a list of them would not fit
    tiers = np.repeat([0, 1], n // 2)
    scores = np.arange(n, dtype=float)
    scores[0] = n  # one image of the better tier is above all others
    _, pairs = metrics.tier_pair_accuracy(scores, tiers, 2)
    assert pairs[0, 1] == (n // 2) ** 2
    assert metrics.pairwise_accuracy(scores, tiers) == pytest.approx(2 / n, rel=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "figure",
    [
        metrics.pairwise_accuracy,
        metrics.macro_pairwise_accuracy,
        metrics.kendall_tau_b,
        metrics.spearman,
        metrics.tiers_by_quota,
        lambda s, t: metrics.tier_pair_accuracy(s, t, 3),
        lambda s, t: metrics.ndcg_at_k(s, t, 2, 3),
    ],
)
def test_a_score_that_is_not_finite_is_named(figure, bad):
    with pytest.raises(DataError, match=r"1 of 3 are not finite .*row 1"):
        figure([0.0, bad, 1.0], [0, 1, 2])


@pytest.mark.parametrize("scores, tiers", [([1.0, 2.0], [1, 1]), ([1.0], [0]), ([], [])])
def test_no_pair_is_an_error(scores, tiers):
    for figure in (metrics.pairwise_accuracy, metrics.macro_pairwise_accuracy):
        with pytest.raises(DataError, match="at least two tiers"):
            figure(scores, tiers)


@pytest.mark.parametrize(
    "tiers, message",
    [([0, 1, 2], "there are 2 scores"), ([0, -1], "row 1 is -1"), ([0.0, 1.0], "whole numbers")],
)
def test_unfit_tiers(tiers, message):
    with pytest.raises(DataError, match=message):
        metrics.pairwise_accuracy([1.0, 2.0], tiers)


def test_a_tier_beyond_the_number_of_tiers():
    for figure in (
        lambda: metrics.tier_pair_accuracy([1.0, 2.0], [0, 3], 3),
        lambda: metrics.ndcg_at_k([1.0, 2.0], [0, 3], 1, 3),
        lambda: metrics.confusion_matrix([0, 3], [0, 1], 3),
    ):
        with pytest.raises(DataError, match="3 is not below the number of tiers 3"):
            figure()


@pytest.mark.parametrize("seed", CASES)
def test_kendall_by_its_definition(seed):
    scores, tiers, _, _ = random_case(seed)
    right = wrong = tied_score = tied_tier = 0
    for i, j in itertools.combinations(range(len(scores)), 2):
        tied_score += scores[i] == scores[j]
        tied_tier += tiers[i] == tiers[j]
        sign = np.sign(scores[i] - scores[j]) * np.sign(tiers[j] - tiers[i])
        right += sign > 0
        wrong += sign < 0
    everything = math.comb(len(scores), 2)
    root = math.sqrt((everything - tied_score) * (everything - tied_tier))
    if root == 0:
        assert metrics.kendall_tau_b(scores, tiers) is None
    else:
        expected = pytest.approx((right - wrong) / root, abs=1e-12)
        assert metrics.kendall_tau_b(scores, tiers) == expected


def test_correlations_without_spread_are_undefined():
    assert metrics.kendall_tau_b([1.0, 1.0], [0, 1]) is None
    assert metrics.kendall_tau_b([1.0, 2.0], [1, 1]) is None
    assert metrics.kendall_tau_b([], []) is None
    assert metrics.spearman([1.0, 1.0], [0.0, 1.0]) is None
    assert metrics.spearman([1.0, 2.0], [3.0, 3.0]) is None


@pytest.mark.parametrize("seed", range(10))
def test_spearman_is_the_correlation_of_mean_ranks(seed):
    rng = np.random.default_rng(seed)
    scores, grades = rng.integers(0, 6, 25) / 2, rng.normal(size=25)
    expected = np.corrcoef(stats.rankdata(scores), stats.rankdata(grades))[0, 1]
    assert metrics.spearman(scores, grades) == pytest.approx(expected, abs=1e-12)
    with pytest.raises(DataError, match="24 values"):
        metrics.spearman(scores, grades[1:])


@pytest.mark.parametrize("seed", range(40))
def test_ndcg_is_the_mean_over_all_orders_of_tied_images(seed):
    rng = np.random.default_rng(seed)
    n, n_tiers = int(rng.integers(1, 7)), 4
    tiers = rng.integers(0, n_tiers, n)
    tiers[0] = 0
    scores = rng.integers(0, 3, n) / 2
    orders = [
        order
        for order in itertools.permutations(range(n))
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))
    ]
    for k in (1, 2, n, n + 5):

        def dcg(order, k=k):
            return sum((3 - tiers[i]) / math.log2(1 + r) for r, i in enumerate(order[:k], start=1))

        best = dcg(sorted(range(n), key=lambda i: tiers[i]))
        expected = np.mean([dcg(order) for order in orders]) / best
        assert metrics.ndcg_at_k(scores, tiers, k, n_tiers) == pytest.approx(expected, abs=1e-12)


def test_ndcg_limits():
    assert metrics.ndcg_at_k([1.0, 2.0], [3, 3], 1, 4) is None
    with pytest.raises(ConfigError, match="at least 1"):
        metrics.ndcg_at_k([1.0, 2.0], [0, 3], 0, 4)
    with pytest.raises(DataError, match="no image"):
        metrics.ndcg_at_k([], [], 1, 4)


def test_quota_without_ties_keeps_the_tier_shares():
    rng = np.random.default_rng(3)
    tiers = rng.choice([0, 2, 3], 50)
    scores = rng.normal(size=50)
    predicted = metrics.tiers_by_quota(scores, tiers)
    assert (np.bincount(predicted) == np.bincount(tiers)).all()
    best_first = predicted[np.argsort(-scores)]
    assert (np.diff(best_first) >= 0).all()


@pytest.mark.parametrize("seed", range(10))
def test_quota_never_profits_from_the_order_of_the_rows(seed):
    rng = np.random.default_rng(seed)
    tiers = np.sort(rng.integers(0, 4, 30))  # as a folder per tier would give them
    scores = rng.integers(0, 4, 30).astype(float)
    predicted = metrics.tiers_by_quota(scores, tiers)
    for value in np.unique(scores):
        assert len(np.unique(predicted[scores == value])) == 1
    shuffled = rng.permutation(30)
    again = metrics.tiers_by_quota(scores[shuffled], tiers[shuffled])
    assert (again == predicted[shuffled]).all()


def test_quota_of_equal_scores_is_the_middle_tier():
    predicted = metrics.tiers_by_quota(np.zeros(9), [0, 0, 0, 1, 1, 2, 2, 2, 2])
    assert (predicted == 1).all()
    assert len(metrics.tiers_by_quota([], [])) == 0


@pytest.mark.parametrize("seed", range(10))
def test_confusion_accuracy_and_f1_by_counting(seed):
    rng = np.random.default_rng(seed)
    tiers, predicted = rng.choice([0, 1, 3], 20), rng.choice([1, 3, 4], 20)
    confusion = metrics.confusion_matrix(tiers, predicted, 6)
    for row, column in itertools.product(range(6), repeat=2):
        assert confusion[row, column] == sum((tiers == row) & (predicted == column))
    assert metrics.tier_accuracy(confusion) == np.mean(tiers == predicted)
    scores = []
    for tier in set(tiers) | set(predicted):
        hits = sum((tiers == tier) & (predicted == tier))
        precision = hits / max(1, sum(predicted == tier))
        recall = hits / max(1, sum(tiers == tier))
        scores.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    assert metrics.macro_f1(confusion) == pytest.approx(np.mean(scores))


def test_an_empty_confusion_matrix_has_no_share():
    empty = metrics.confusion_matrix(np.array([], int), np.array([], int), 3)
    assert empty.shape == (3, 3)
    for figure in (metrics.tier_accuracy, metrics.macro_f1):
        with pytest.raises(DataError, match="no image"):
            figure(empty)


def test_codes_of_labels():
    assert metrics.codes_of(["회화", "", "조소", None, "회화"]).tolist() == [0, -1, 1, -1, 0]
