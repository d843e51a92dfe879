"""The pairwise losses against plain double loops, torch's own losses and counting by hand."""

from __future__ import annotations

import math
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mirip_fast.errors import ConfigError
from mirip_fast.models import logistic
from mirip_fast.models.losses import PairLoss, count_pairs, pair_loss
from mirip_fast.models.places import count_below

EXACT = {"rtol": 1e-11, "atol": 1e-13}


# --- references: nothing shared with the product ---------------------------------------------------


def pair_term(loss, difference):
    """Value and derivative of one pair's loss by s_hi − s_lo."""
    if loss.kind == "margin":
        return (loss.margin - difference, -1.0) if loss.margin - difference > 0 else (0.0, 0.0)
    win = 1 / (1 + math.exp(-difference))
    target = 1 - loss.label_smoothing / 2
    tail = math.log1p(math.exp(-abs(difference)))
    cost_of_win, cost_of_loss = tail + max(-difference, 0.0), tail + max(difference, 0.0)
    return target * cost_of_win + (1 - target) * cost_of_loss, win - target


def reference(loss, scores, labels, within=None):
    """The mean over a plain double loop: (value, gradient) as Python numbers."""
    n = len(scores)
    sums = {
        True: [0.0, 0.0, [0.0] * n],
        False: [0.0, 0.0, [0.0] * n],
    }  # inside: weight, value, gradient
    for hi in range(n):
        for lo in range(n):
            if loss.label == "tier":
                counts = labels[hi] < labels[lo]
            else:
                gap = labels[hi] - labels[lo]
                counts = gap > 0 and gap >= loss.min_gap
            inside = within is not None and within[hi] == within[lo]
            if not counts or (loss.within_share == 1 and not inside):
                continue
            weight = loss.tier_weights[labels[hi]][labels[lo]] if loss.tier_weights else 1.0
            value, slope = pair_term(loss, scores[hi] - scores[lo])
            part = sums[inside or loss.within_share is None]
            part[0] += weight
            part[1] += weight * value
            part[2][hi] += weight * slope
            part[2][lo] -= weight * slope
    share = 1.0 if loss.within_share is None else loss.within_share
    parts = [(share, sums[True]), (1 - share, sums[False])]
    parts = [(s, part) for s, part in parts if s > 0 and part[0] > 0]
    whole = sum(s for s, _ in parts)
    value = sum(s / whole * part[1] / part[0] for s, part in parts)
    gradient = [sum(s / whole * part[2][i] / part[0] for s, part in parts) for i in range(n)]
    return value, gradient


def dense(scores, tiers, margin):
    """The margin loss of larger cases as one matrix: (value, gradient), float64."""
    difference = scores[:, None] - scores[None, :]
    counts = tiers[:, None] < tiers[None, :]
    hinge = np.maximum(margin - difference, 0) * counts
    violating = (hinge > 0).astype(float)
    pairs = counts.sum()
    return hinge.sum() / pairs, (violating.sum(0) - violating.sum(1)) / pairs


# --- cases -----------------------------------------------------------------------------------------


def draw_scores(rng, n):
    """Generic numbers, or a grid with ties and pairs exactly on the hinge, near 0 or far away."""
    if rng.random() < 0.4:
        return rng.normal(size=n) * rng.choice([0.1, 1.0, 4.0])
    return rng.integers(-8, 9, size=n) / 4 + rng.choice([0.0, 0.0, 1e6])


def draw_tiers(rng, n):
    """One to five tiers, some of them empty."""
    chosen = rng.choice(5, size=rng.integers(1, 6), replace=False)
    return rng.choice(chosen, size=n)


def draw_loss(rng, kind):
    settings = {"kind": kind}
    if kind == "margin":
        settings["margin"] = float(rng.choice([0.0, 0.3, 0.5, 1.0, 2.25]))
    elif rng.random() < 0.5:
        settings["label_smoothing"] = float(rng.choice([0.1, 0.5, 1.0]))
    if rng.random() < 0.5:
        weights = rng.random((5, 5)) * (rng.random((5, 5)) < 0.8)
        settings["tier_weights"] = tuple(map(tuple, weights.tolist()))
    settings["within_share"] = [None, 1.0, 0.3, 0.9, 0.0][rng.integers(5)]
    return PairLoss(**settings)


def draw_groups(rng, n):
    """One group, a few, or nearly as many as items; codes of any size."""
    codes = rng.choice([0, 1, -7, 2**62, 2**62 + 1, -(2**62), 12, 13], size=8, replace=False)
    return rng.choice(codes[: rng.integers(1, 9)], size=n)


def evaluate(loss, scores, labels, within=None, dtype=torch.float64):
    x = torch.tensor(np.asarray(scores), dtype=dtype, requires_grad=True)
    groups = None if within is None else torch.tensor(np.asarray(within))
    value = loss(x, torch.as_tensor(np.asarray(labels)), groups)
    value.backward()
    return value.item(), x.grad


def assert_matches(loss, scores, labels, within=None, given_labels=None, **tolerance):
    """``given_labels``: what the product sees, when the reference reads them in other units."""
    value, gradient = evaluate(
        loss, scores, labels if given_labels is None else given_labels, within
    )
    listed = None if within is None else list(within)
    expected, expected_gradient = reference(loss, list(scores), list(labels), listed)
    # Differences of scores around 1e6 on the grid are exact; the tolerance stays.
    np.testing.assert_allclose(value, expected, **(tolerance or EXACT))
    np.testing.assert_allclose(gradient.numpy(), expected_gradient, **(tolerance or EXACT))


# --- values and gradients --------------------------------------------------------------------------


def test_margin_is_the_double_loop():
    rng = np.random.default_rng(0)
    for n in [0, 1, 2, 2, 2, 3, *rng.integers(2, 20, size=300)]:
        loss = PairLoss(margin=float(rng.choice([0.0, 0.3, 0.5, 1.0, 2.25])))
        assert_matches(loss, draw_scores(rng, n), draw_tiers(rng, n))


@pytest.mark.parametrize("kind", ["margin", "logistic"])
@pytest.mark.parametrize("tile", [3, 512])
def test_weights_groups_shares_and_smoothing_are_the_double_loop(kind, tile, monkeypatch):
    monkeypatch.setattr(logistic, "TILE", tile)  # 3: several tiles, cut at every kind of place
    rng = np.random.default_rng(tile)
    for _ in range(250):
        n = int(rng.integers(0, 16))
        loss = draw_loss(rng, kind)
        assert_matches(loss, draw_scores(rng, n), draw_tiers(rng, n), draw_groups(rng, n))


@pytest.mark.parametrize("kind", ["margin", "logistic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_real_labels_with_a_smallest_gap_are_the_double_loop(kind, dtype, monkeypatch):
    # Labels are tenths, as people type them; the reference compares them as whole numbers, so a
    # difference of exactly the gap must count although 1.3 − 1.1 < 0.2 in floating point.
    monkeypatch.setattr(logistic, "TILE", 5)
    rng = np.random.default_rng(1)
    for _ in range(200):
        n = int(rng.integers(0, 18))
        tenths = rng.integers(0, 40, size=n) + rng.choice([0, 10, 900])
        gap = int(rng.choice([0, 1, 2, 3, 7, 100]))
        loss = PairLoss(
            kind,
            label="tier_score",
            within_share=[None, 1.0, 0.3, 0.0][rng.integers(4)],
            min_gap=gap,
        )
        shown = torch.tensor(tenths / 10, dtype=dtype)
        scores, within = draw_scores(rng, n), draw_groups(rng, n)
        value, gradient = evaluate(replace(loss, min_gap=gap / 10), scores, shown, within)
        expected, expected_gradient = reference(loss, list(scores), list(tenths), list(within))
        np.testing.assert_allclose(value, expected, **EXACT)
        np.testing.assert_allclose(gradient.numpy(), expected_gradient, **EXACT)
        pairs = sum(a - b >= max(gap, 1) for a in tenths for b in tenths)
        assert count_pairs(shown, label="tier_score", min_gap=gap / 10) == pairs


def test_equal_labels_are_no_pair_however_small_the_gap():
    labels = torch.tensor([3.0, 3.0, 1.0, 3.0, 1.0])  # float32, where 1e-20 is lost beside 3
    assert count_pairs(labels, label="tier_score", min_gap=1e-20) == 6
    value, _ = evaluate(PairLoss(label="tier_score", min_gap=1e-20), [0, 9, 0, 0, 0], labels)
    assert value == pytest.approx(4 / 6)


def test_generic_real_labels_are_the_double_loop():
    rng = np.random.default_rng(2)
    for _ in range(150):
        n = int(rng.integers(2, 30))
        loss = PairLoss(label="tier_score", min_gap=float(rng.random()))
        assert_matches(loss, draw_scores(rng, n), rng.normal(size=n))


def test_many_tiers_go_another_way_to_the_same_result():
    rng = np.random.default_rng(3)
    for _ in range(60):
        n = int(rng.integers(2, 25))
        tiers = (
            rng.integers(0, 10**12, size=n) if rng.random() < 0.3 else rng.integers(0, 40, size=n)
        )
        loss = PairLoss(within_share=[None, 1.0, 0.5, 0.0][rng.integers(4)])
        assert_matches(loss, draw_scores(rng, n), tiers, draw_groups(rng, n))


def listed(scores, tiers):
    """Every pair as an explicit list, in random orientation: s1, s2, label."""
    better, worse = torch.nonzero(tiers[:, None] < tiers[None, :], as_tuple=True)
    flip = torch.arange(len(better)) % 3 == 0
    first, second = torch.where(flip, worse, better), torch.where(flip, better, worse)
    return scores[first], scores[second], torch.where(flip, -1, 1)


def torch_is_flat_on_the_hinge():
    x = torch.zeros(1, requires_grad=True)
    x.clamp_min(0).sum().backward()
    return x.grad.item() == 0


def test_margin_is_torchs_own_loss_on_the_listed_pairs():
    rng = np.random.default_rng(4)
    compared = 0
    for _ in range(250):
        n, margin = int(rng.integers(2, 40)), float(rng.choice([0.0, 0.5, 1.0]))
        # Older versions of torch pass a gradient where the loss is exactly 0: no such pairs for them.
        generic = not torch_is_flat_on_the_hinge()
        numbers = rng.normal(size=n) if generic else draw_scores(rng, n)
        x = torch.tensor(numbers, requires_grad=True)
        tiers = torch.tensor(draw_tiers(rng, n))
        s1, s2, label = listed(x, tiers)
        if not len(label):
            continue
        expected = torch.nn.MarginRankingLoss(margin)(s1, s2, label)
        (gradient,) = torch.autograd.grad(expected, x, retain_graph=True)
        for value in (PairLoss(margin=margin)(x, tiers), pair_loss(s1, s2, label, margin=margin)):
            torch.testing.assert_close(value, expected, **EXACT)
            torch.testing.assert_close(
                torch.autograd.grad(value, x, retain_graph=True)[0], gradient, **EXACT
            )
        compared += 1
    assert compared > 150


def test_a_pair_on_the_hinge_costs_nothing_and_pulls_nothing():
    value, gradient = evaluate(PairLoss(), [3.0, 2.0, 1.0], [0, 1, 2])
    assert value == 0
    assert gradient.tolist() == [0, 0, 0]


def test_rounding_at_the_hinge_never_makes_a_loss_negative():
    for a in range(-30, 30):
        for b in range(-5, 6):  # three tenths apart, give or take a rounding, is the hinge
            for far in (0.1, 1000.1):
                scores = [(a + b) / 10 + 0.3, a / 10, far, (a - b) / 10]
                value, _ = evaluate(PairLoss(margin=0.3), scores, [0, 1, 0, 1])
                expected, _ = reference(PairLoss(margin=0.3), scores, [0, 1, 0, 1])
                assert value >= 0
                assert value == pytest.approx(expected, abs=1e-12)


def test_gradcheck():
    torch.manual_seed(0)
    scores = torch.randn(9, dtype=torch.float64, requires_grad=True)
    tiers, within = torch.arange(9) % 3, torch.arange(9) // 4
    table = ((0.0, 1.0, 0.3), (0.0, 0.0, 2.0), (0.0, 0.0, 0.0))
    for loss in (
        PairLoss(),
        PairLoss(tier_weights=table, within_share=0.6),
        PairLoss("logistic", label_smoothing=0.2, tier_weights=table, within_share=0.6),
        PairLoss("logistic", label="tier_score", min_gap=1),
    ):
        assert torch.autograd.gradcheck(lambda s, loss=loss: 3 * loss(s, tiers, within), scores)
    other, label = torch.randn(9, dtype=torch.float64, requires_grad=True), torch.arange(9) % 3 - 1
    for kind in ("margin", "logistic"):
        assert torch.autograd.gradcheck(
            lambda a, b, kind=kind: pair_loss(a, b, label, kind=kind, weight=tiers + 1),
            (scores, other),
        )


def test_there_is_no_second_derivative():
    scores = torch.randn(5, requires_grad=True)
    for loss in (PairLoss(), PairLoss("logistic")):
        value = loss(scores, torch.arange(5))
        (gradient,) = torch.autograd.grad(value * value, scores, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


# --- numbers: precision, size, dtypes --------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1e6, -1e6])
def test_float32_scores_lose_nothing_in_the_sums(offset):
    rng = np.random.default_rng(5)
    scores = (rng.normal(size=3000) * 2 + offset).astype(np.float32)
    tiers = rng.integers(0, 4, size=3000)
    expected, expected_gradient = dense(scores.astype(np.float64), tiers, 1.0)
    for loss, labels in ((PairLoss(), tiers), (PairLoss(label="tier_score"), -tiers)):
        value, gradient = evaluate(loss, scores, labels, dtype=torch.float32)
        assert gradient.dtype == torch.float32
        assert value == np.float32(expected)
        np.testing.assert_array_equal(gradient.numpy(), expected_gradient.astype(np.float32))


def test_logistic_float32_agrees_with_float64():
    rng = np.random.default_rng(6)
    scores = (rng.normal(size=2500) * 3 + 1e6).astype(np.float32)
    tiers = rng.integers(0, 4, size=2500)
    value, gradient = evaluate(PairLoss("logistic"), scores, tiers, dtype=torch.float32)
    exact, exact_gradient = evaluate(PairLoss("logistic"), scores.astype(np.float64), tiers)
    assert value == pytest.approx(exact, rel=1e-7)
    np.testing.assert_allclose(gradient.numpy(), exact_gradient.numpy(), rtol=1e-5, atol=1e-10)


def test_logistic_is_exact_far_out():
    # torch's softplus cuts off at 20 by default: 25 off would cost 0 too little or too much.
    for difference in (-800.0, -25.0, 25.0, 800.0):
        value, _ = evaluate(PairLoss("logistic"), [difference, 0.0], [0, 1])
        expected = math.log1p(math.exp(-abs(difference))) + max(-difference, 0.0)
        assert value == pytest.approx(expected, rel=1e-15, abs=0)


def test_more_pairs_than_an_int32_or_float32_can_count():
    tiers = torch.arange(100_003) % 3
    sizes = [33_335, 33_334, 33_334]
    costs = {(0, 1): 1.8, (0, 2): 2.3, (1, 2): 1.8}  # every pair the wrong way: 1.3 + 0.5 per tier
    for loss in (PairLoss(margin=1.3), PairLoss(margin=1.3, tier_weights=((0.3, 0.3, 0.3),) * 3)):
        scores = (tiers.double() * 0.5).requires_grad_()
        value = loss(scores, tiers)
        value.backward()
        pairs = {(a, b): sizes[a] * sizes[b] for a, b in costs}
        expected = sum(costs[p] * pairs[p] for p in pairs) / sum(pairs.values())
        assert value.item() == pytest.approx(expected, rel=1e-13)
        pull = np.array([-sizes[1] - sizes[2], sizes[0] - sizes[2], sizes[0] + sizes[1]])
        np.testing.assert_allclose(
            scores.grad.numpy(), (pull / sum(pairs.values()))[tiers.numpy()], rtol=1e-13, atol=1e-19
        )
        assert count_pairs(tiers) == sum(pairs.values()) > 2**31


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["margin", "logistic"])
def test_every_float_dtype_is_summed_in_float64(dtype, kind):
    torch.manual_seed(1)
    scores = torch.randn(700).to(dtype)
    tiers = torch.randint(0, 3, (700,), dtype=torch.int16)
    exact, exact_gradient = evaluate(PairLoss(kind), scores.double(), tiers)
    x = scores.clone().requires_grad_()
    value = PairLoss(kind)(x, tiers)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert value.item() == pytest.approx(exact, rel=1e-6)
    (1024 * value).backward()  # a loss scaler's factor comes before the gradient is cast
    assert x.grad.dtype == dtype
    torch.testing.assert_close(x.grad, (1024 * exact_gradient).to(dtype), rtol=1e-2, atol=1e-7)


def test_strided_scores_and_graph_above():
    torch.manual_seed(2)
    weight = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    tiers = torch.tensor([0, 1, 2, 0, 1, 2])
    PairLoss()(weight[:, 1], tiers).backward()
    _, expected = evaluate(PairLoss(), weight[:, 1].detach().numpy(), tiers)
    torch.testing.assert_close(weight.grad[:, 1], expected)
    assert not weight.grad[:, 0].any()


def test_the_same_input_gives_the_same_bits():
    torch.manual_seed(3)
    scores, tiers = torch.randn(2000), torch.randint(0, 4, (2000,))
    within = torch.randint(0, 9, (2000,))
    for kind in ("margin", "logistic"):
        loss = PairLoss(kind, within_share=0.5)
        first, second = (evaluate(loss, scores, tiers, within, torch.float32) for _ in range(2))
        assert first[0] == second[0]
        assert torch.equal(first[1], second[1])


# --- edges -----------------------------------------------------------------------------------------

NO_PAIR = {
    "nothing": (PairLoss(), [], [], None),
    "one score": (PairLoss(), [1.0], [3], None),
    "one tier": (PairLoss(), [1.0, 2.0, 3.0], [2, 2, 2], None),
    "every weight 0": (PairLoss(tier_weights=((0.0, 0.0), (0.0, 0.0))), [1.0, 2.0], [0, 1], None),
    "gap too wide": (PairLoss(label="tier_score", min_gap=9.0), [1.0, 2.0], [0.0, 1.0], None),
    "all apart": (PairLoss(within_share=1.0), [1.0, 2.0], [0, 1], [5, 6]),
    "shares of nothing": (PairLoss(within_share=0.5), [1.0, 2.0], [1, 1], [5, 6]),
}


@pytest.mark.parametrize("case", NO_PAIR)
@pytest.mark.parametrize("kind", ["margin", "logistic"])
def test_without_a_pair_loss_and_gradient_are_zero(case, kind):
    loss, scores, labels, within = NO_PAIR[case]
    labels = torch.tensor(labels, dtype=torch.int64 if loss.label == "tier" else torch.float64)
    value, gradient = evaluate(replace(loss, kind=kind), scores, labels, within)
    assert value == 0
    assert gradient.tolist() == [0.0] * len(scores)


@pytest.mark.parametrize("share", [0.2, 0.7])
@pytest.mark.parametrize("kind", ["margin", "logistic"])
def test_a_share_of_no_pairs_goes_to_the_others(share, kind):
    # Weights that do not add up exactly: what is left must be exactly no pair, not 1e-17 of one.
    table = tuple(tuple(0.1 * (3 * a + b + 1) for b in range(4)) for a in range(4))
    torch.manual_seed(4)
    scores, tiers = torch.randn(50, dtype=torch.float64), torch.arange(50) % 4
    plain = PairLoss(kind, tier_weights=table)
    expected = evaluate(plain, scores, tiers)
    mixed = replace(plain, within_share=share)
    for within in (torch.zeros(50, dtype=torch.int64), torch.arange(50)):
        value, gradient = evaluate(mixed, scores, tiers, within)
        assert value == pytest.approx(expected[0], rel=1e-13)
        torch.testing.assert_close(gradient, expected[1], **EXACT)


SETTINGS = [
    PairLoss(),
    PairLoss(within_share=1.0),
    PairLoss(within_share=0.5),
    PairLoss(tier_weights=((0.0, 1.0, 1.0),) * 3),
    PairLoss(label="tier_score", min_gap=1.0),
    PairLoss("logistic"),
    PairLoss("logistic", label_smoothing=0.1, within_share=0.5),
]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("loss", SETTINGS, ids=repr)
def test_a_score_that_is_not_finite_never_passes_unseen(bad, loss):
    for n in (1, 2, 3, 12):
        for place in range(n):  # in the best tier, where +inf would cost nothing, and in the worst
            scores = torch.linspace(-1, 1, n)
            scores[place] = bad
            value = loss(scores, torch.arange(n) % 3, torch.arange(n) % 2)
            assert not math.isfinite(value.item())
    everywhere = torch.full((7,), bad, requires_grad=True)
    value = loss(everywhere, torch.arange(7) % 3, torch.arange(7) % 2)
    value.backward()
    assert not math.isfinite(value.item())


def test_within_is_read_only_when_a_share_is_set():
    scores, tiers = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0, 1, 2])
    assert PairLoss()(scores, tiers, torch.arange(3)) == PairLoss()(scores, tiers)


def test_settings_are_plain_data():
    loss = PairLoss("logistic", tier_weights=((0.0, 2.0), (0.0, 0.0)), label_smoothing=0.1)
    assert pickle.loads(pickle.dumps(loss)) == loss
    assert hash(loss) == hash(replace(loss))


# --- listed pairs ----------------------------------------------------------------------------------


def test_listed_pairs_are_the_plain_loop():
    rng = np.random.default_rng(7)
    for _ in range(200):
        p = int(rng.integers(0, 12))
        kind = str(rng.choice(["margin", "logistic"]))
        smoothing = float(rng.choice([0.0, 0.2])) if kind == "logistic" else 0.0
        s1, s2 = draw_scores(rng, p) % 16, draw_scores(rng, p) % 16
        label, weight = rng.integers(-1, 2, size=p), rng.random(p)
        plain = PairLoss(kind, margin=0.5, label_smoothing=smoothing)
        total = 0.0
        gradient = np.zeros(p)
        for i in range(p):
            d = s1[i] - s2[i]
            if label[i]:
                value, slope = pair_term(plain, label[i] * d)
                slope *= label[i]
            elif kind == "margin":
                value, slope = abs(d), np.sign(d)
            else:
                value = math.log(2) + math.log(math.cosh(d / 2))
                slope = math.tanh(d / 2) / 2
            total += weight[i] * value / weight.sum()
            gradient[i] = weight[i] * slope / weight.sum()
        x = torch.tensor(s1, requires_grad=True)
        value = pair_loss(
            x,
            torch.tensor(s2),
            torch.tensor(label),
            kind=kind,
            margin=0.5,
            label_smoothing=smoothing,
            weight=torch.tensor(weight),
        )
        value.backward()
        assert value.item() == pytest.approx(total, rel=1e-10, abs=1e-13)
        np.testing.assert_allclose(x.grad.numpy(), gradient, rtol=1e-10, atol=1e-13)


def test_listed_logistic_pairs_are_torchs_cross_entropy():
    torch.manual_seed(5)
    s1, s2 = torch.randn(2, 30, dtype=torch.float64)
    label = torch.arange(30) % 3 - 1
    target = 0.5 + label * torch.tensor(0.45, dtype=torch.float64)  # ε = 0.1: 0.95, 0.5, 0.05
    expected = torch.nn.functional.binary_cross_entropy_with_logits(s1 - s2, target)
    torch.testing.assert_close(
        pair_loss(s1, s2, label, kind="logistic", label_smoothing=0.1), expected, **EXACT
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("label", [1, 0, -1])
@pytest.mark.parametrize("kind", ["margin", "logistic"])
def test_a_listed_score_that_is_not_finite_never_passes_unseen(bad, label, kind):
    value = pair_loss(torch.tensor([bad, 0.0]), torch.zeros(2), torch.tensor([label, 1]), kind=kind)
    assert not math.isfinite(value.item())


@pytest.mark.parametrize("weight", [None, 0.0])
def test_no_listed_pair_costs_nothing(weight):
    p = 0 if weight is None else 3
    s1 = torch.ones(p, requires_grad=True)
    weights = None if weight is None else torch.full((p,), weight)
    value = pair_loss(s1, torch.zeros(p), torch.ones(p), weight=weights)
    value.backward()
    assert value.item() == 0
    assert not s1.grad.any()


# --- counting --------------------------------------------------------------------------------------


def test_count_pairs_is_the_double_loop():
    rng = np.random.default_rng(8)
    for _ in range(100):
        n = int(rng.integers(0, 20))
        tiers, within = draw_tiers(rng, n), draw_groups(rng, n)
        pairs = [(i, j) for i in range(n) for j in range(n) if tiers[i] < tiers[j]]
        assert count_pairs(torch.tensor(tiers)) == len(pairs)
        inside = sum(within[i] == within[j] for i, j in pairs)
        assert count_pairs(torch.tensor(tiers), torch.tensor(within)) == inside


def test_count_below_is_the_plain_loop():
    rng = np.random.default_rng(9)
    for n in [0, 1, 2, 3, 4, 7, 8, 9, *rng.integers(1, 70, size=60)]:
        sequence = rng.permutation(n) if rng.random() < 0.5 else rng.integers(0, max(n, 1), size=n)
        left, right = np.sort(rng.integers(0, n + 1, size=(2, 40)), axis=0)
        below = rng.integers(0, n + 1, size=40)
        expected = [
            int((sequence[a:b] < c).sum()) for a, b, c in zip(left, right, below, strict=True)
        ]
        counted = count_below(*map(torch.tensor, (sequence, left, right, below)))
        assert counted.tolist() == expected


# --- memory ----------------------------------------------------------------------------------------

MEMORY_SCRIPT = """
import sys, torch
from pathlib import Path
from mirip_fast.models.losses import PairLoss

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024

torch.manual_seed(0)
table = tuple(tuple(1.0 + a + b for b in range(4)) for a in range(4))
loss = PairLoss("logistic", label_smoothing=0.1, tier_weights=table, within_share=0.5)
def step(n):
    scores = torch.randn(n, dtype=torch.float64, requires_grad=True)
    loss(scores, torch.randint(0, 4, (n,)), torch.randint(0, 3, (n,))).backward()
step(64)
before = peak()
step(8000)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own peak memory")
def test_logistic_takes_less_than_64_mb():
    # 8000 × 8000 pairs in float64 are 512 MB for one matrix.
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout) < 64


# --- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "hinge"}, "margin, logistic"),
        ({"margin": -1.0}, "at least 0"),
        ({"margin": math.nan}, "at least 0"),
        ({"label_smoothing": 0.1}, "goes with the logistic loss"),
        ({"kind": "logistic", "label_smoothing": 1.5}, "between 0 and 1"),
        ({"label": "grade"}, "tier, tier_score"),
        ({"min_gap": 0.5}, "goes with label tier_score"),
        ({"label": "tier_score", "min_gap": -1.0}, "at least 0"),
        ({"within_share": -0.1}, "between 0 and 1"),
        ({"within_share": 1.1}, "between 0 and 1"),
        ({"tier_weights": ((0.0, 1.0),)}, "square"),
        ({"tier_weights": ((0.0, -1.0), (0.0, 0.0))}, "at least 0"),
        ({"tier_weights": ((0.0, math.nan), (0.0, 0.0))}, "at least 0"),
        ({"tier_weights": ((0.0,),), "label": "tier_score"}, "go with label tier"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        PairLoss(**settings)


@pytest.mark.parametrize(
    ("loss", "scores", "labels", "within", "words"),
    [
        (PairLoss(), torch.zeros(2, 2), torch.tensor([0, 1]), None, r"\[2, 2\]"),
        (PairLoss(), torch.tensor([0, 1]), torch.tensor([0, 1]), None, "must be floats"),
        (PairLoss(), torch.zeros(2), torch.tensor([0, 1, 2]), None, "each of 2 scores"),
        (PairLoss(), torch.zeros(2), torch.tensor([0.0, 1.0]), None, "label='tier_score'"),
        (PairLoss(), torch.zeros(2), torch.tensor([True, False]), None, "must be integers"),
        (PairLoss(), torch.zeros(2), torch.tensor([-1, 1]), None, "start at 0"),
        (PairLoss(label="tier_score"), torch.zeros(2), torch.tensor([0, math.nan]), None, "finite"),
        (PairLoss(within_share=1.0), torch.zeros(2), torch.tensor([0, 1]), None, "is needed"),
        (
            PairLoss(within_share=1.0),
            torch.zeros(2),
            torch.tensor([0, 1]),
            torch.zeros(2),
            "integer",
        ),
        (
            PairLoss(tier_weights=((0, 1), (0, 0))),
            torch.zeros(1),
            torch.tensor([2]),
            None,
            "2 tiers",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(loss, scores, labels, within, words):
    with pytest.raises(ValueError, match=words):
        loss(scores, labels, within)


def test_listed_pairs_that_do_not_fit_are_refused():
    two = torch.zeros(2)
    with pytest.raises(ValueError, match="same pairs"):
        pair_loss(two, torch.zeros(3), two)
    with pytest.raises(ValueError, match="1, 0 or -1"):
        pair_loss(two, two, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="weight"):
        pair_loss(two, two, two, weight=torch.tensor([1.0, -1.0]))
    with pytest.raises(ConfigError, match="unknown loss"):
        pair_loss(two, two, two, kind="hinge")


# --- GPU -------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("loss", SETTINGS, ids=repr)
def test_a_gpu_gives_what_the_cpu_gives(loss):
    torch.manual_seed(6)
    scores = torch.randn(3000, dtype=torch.float64)
    tiers, within = torch.arange(3000) % 3, torch.arange(3000) % 7
    expected = evaluate(loss, scores, tiers, within)
    x = scores.cuda().requires_grad_()
    value = loss(x, tiers.cuda(), within.cuda())
    value.backward()
    assert value.is_cuda
    assert value.item() == pytest.approx(expected[0], rel=1e-11)
    torch.testing.assert_close(x.grad.cpu(), expected[1], rtol=1e-9, atol=1e-12)
