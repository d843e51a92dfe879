"""The pairwise losses against plain double loops, torch's own losses and counting by hand."""

from __future__ import annotations

import math
import resource
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from forked import start

from mirip_fast.errors import ConfigError
from mirip_fast.models import losses
from mirip_fast.models.losses import PairLoss, count_pairs, pair_loss

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
    pairs, total, gradient = 0, 0.0, [0.0] * n
    for hi in range(n):
        for lo in range(n):
            better = labels[hi] < labels[lo] if loss.label == "tier" else labels[hi] > labels[lo]
            if better and (within is None or within[hi] == within[lo]):
                value, slope = pair_term(loss, scores[hi] - scores[lo])
                pairs += 1
                total += value
                gradient[hi] += slope
                gradient[lo] -= slope
    return total / max(pairs, 1), [slope / max(pairs, 1) for slope in gradient]


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


def assert_close(found, expected):
    """Differences of scores around 1e6 on the grid are exact; the tolerance stays."""
    np.testing.assert_allclose(found[0], expected[0], **EXACT)
    np.testing.assert_allclose(found[1].numpy(), expected[1], **EXACT)


def assert_matches(loss, scores, labels, within=None):
    listed = None if within is None else list(within)
    expected = reference(loss, list(scores), list(labels), listed)
    assert_close(evaluate(loss, scores, labels, within), expected)


# --- values and gradients --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["margin", "logistic"])
@pytest.mark.parametrize("tile", [3, 512])
@pytest.mark.parametrize("label", ["tier", "tier_score"])
def test_groups_smoothing_and_real_labels_are_the_double_loop(kind, tile, label, monkeypatch):
    monkeypatch.setattr(losses, "TILE", tile)  # 3: several tiles, cut at every kind of place
    rng = np.random.default_rng(tile)
    for _ in range(150):
        n = int(rng.integers(0, 16))
        loss = replace(draw_loss(rng, kind), label=label)
        labels = draw_tiers(rng, n) if label == "tier" else rng.integers(0, 9, size=n) / 10
        if label == "tier" and rng.random() < 0.2:  # many tiers go another way to the same result
            labels = rng.integers(0, rng.choice([40, 10**12]), size=n)
        within = draw_groups(rng, n) if rng.random() < 0.7 else None
        assert_matches(loss, draw_scores(rng, n), labels, within)


def test_rounding_at_the_hinge_never_makes_a_loss_negative():
    for a in range(-30, 30, 4):
        for b in range(-5, 6):  # three tenths apart, give or take a rounding, is the hinge
            for far in (0.1, 1000.1):
                scores = [(a + b) / 10 + 0.3, a / 10, far, (a - b) / 10]
                value, _ = evaluate(PairLoss(margin=0.3), scores, [0, 1, 0, 1])
                expected, _ = reference(PairLoss(margin=0.3), scores, [0, 1, 0, 1])
                assert value >= 0
                assert value == pytest.approx(expected, abs=1e-12)


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
    loss = PairLoss(margin=1.3)
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


# --- edges -----------------------------------------------------------------------------------------

NO_PAIR = {
    "nothing": (PairLoss(), [], [], None),
    "one score": (PairLoss(), [1.0], [3], None),
    "one tier": (PairLoss(), [1.0, 2.0, 3.0], [2, 2, 2], None),
    "equal grades": (PairLoss(label="tier_score"), [1.0, 2.0], [0.5, 0.5], None),
    "all apart": (PairLoss(), [1.0, 2.0], [0, 1], [5, 6]),
}


@pytest.mark.parametrize("case", NO_PAIR)
@pytest.mark.parametrize("kind", ["margin", "logistic"])
def test_without_a_pair_loss_and_gradient_are_zero(case, kind):
    loss, scores, labels, within = NO_PAIR[case]
    labels = torch.tensor(labels, dtype=torch.int64 if loss.label == "tier" else torch.float64)
    value, gradient = evaluate(replace(loss, kind=kind), scores, labels, within)
    assert value == 0
    assert gradient.tolist() == [0.0] * len(scores)


SETTINGS = [
    (PairLoss(), False),
    (PairLoss(), True),
    (PairLoss(label="tier_score"), False),
    (PairLoss("logistic"), False),
    (PairLoss("logistic", label_smoothing=0.1), True),
]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("loss", "grouped"), SETTINGS, ids=repr)
def test_a_score_that_is_not_finite_never_passes_unseen(bad, loss, grouped):
    for n in (1, 2, 3, 12):
        for place in range(n):  # in the best tier, where +inf would cost nothing, and in the worst
            scores = torch.linspace(-1, 1, n)
            scores[place] = bad
            value = loss(scores, torch.arange(n) % 3, torch.arange(n) % 2 if grouped else None)
            assert not math.isfinite(value.item())
    everywhere = torch.full((7,), bad, requires_grad=True)
    value = loss(everywhere, torch.arange(7) % 3, torch.arange(7) % 2 if grouped else None)
    value.backward()
    assert not math.isfinite(value.item())


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
        settings = {"kind": kind, "margin": 0.5, "label_smoothing": smoothing}
        others = torch.tensor(s2), torch.tensor(label)
        value = pair_loss(x, *others, weight=torch.tensor(weight), **settings)
        value.backward()
        assert value.item() == pytest.approx(total, rel=1e-10, abs=1e-13)
        np.testing.assert_allclose(x.grad.numpy(), gradient, rtol=1e-10, atol=1e-13)


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


# --- memory ----------------------------------------------------------------------------------------


def memory_of_a_matrix() -> int:
    """0 where the peak grows by less than 64 MB; 8000 × 8000 pairs in float64 are 512 MB for one matrix."""
    loss, peaks = PairLoss("logistic", label_smoothing=0.1), []
    for n in (64, 8000):
        scores = torch.randn(n, dtype=torch.float64, requires_grad=True)
        loss(scores, torch.randint(0, 4, (n,)), torch.randint(0, 3, (n,))).backward()
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return int(peaks[1] - peaks[0] >= 64)


@pytest.mark.skipif(sys.platform != "linux", reason="others count memory in other units")
def test_logistic_takes_less_than_64_mb(tmp_path):
    (process,) = start(memory_of_a_matrix, 1, tmp_path)
    code, _, err = process.wait()
    assert code == 0, err


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
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        PairLoss(**settings)


# --- GPU -------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("loss", "grouped"), SETTINGS, ids=repr)
def test_a_gpu_gives_what_the_cpu_gives(loss, grouped):
    torch.manual_seed(6)
    scores = torch.randn(3000, dtype=torch.float64)
    tiers, within = torch.arange(3000) % 3, torch.arange(3000) % 7
    expected = evaluate(loss, scores, tiers, within if grouped else None)
    x = scores.cuda().requires_grad_()
    value = loss(x, tiers.cuda(), within.cuda() if grouped else None)
    value.backward()
    assert value.is_cuda
    assert value.item() == pytest.approx(expected[0], rel=1e-11)
    torch.testing.assert_close(x.grad.cpu(), expected[1], rtol=1e-9, atol=1e-12)
