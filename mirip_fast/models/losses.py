"""Pairwise ranking losses from n scores, never from a list of O(n²) pairs; and one for listed pairs.

:class:`PairLoss` is the mean over every pair of images of which one is better:

- ``margin`` (ranking hinge): max(0, m − (s_hi − s_lo)), over tiers in O(n log n) time and O(n) memory;
- ``logistic`` (RankNet, Burges et al. 2005): log(1 + exp(−(s_hi − s_lo))). This one, and the margin loss of
  real labels or inside the values of a column, go over all pairs tile by tile: O(n²) time, under 64 MB.

Counts are int64 and sums float64, whatever the dtype of the scores. The gradient is computed together
with the value and is a constant to autograd: there is no second derivative.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mirip_fast.config import LOSSES
from mirip_fast.errors import ConfigError

LABELS = ("tier", "tier_score")

#: Above so many tiers, tiles are the cheaper way.
_MANY_TIERS = 16
#: Side of a tile. A tile of float64 takes 2 MiB, and fewer than ten are alive at once.
TILE = 512


@dataclass(frozen=True)
class PairLoss:
    """Mean loss over all pairs of n scored images.

    Attributes:
        kind: ``margin`` or ``logistic``.
        margin: m ≥ 0, in units of the score; for ``margin``. A pair that sits exactly on the hinge has
            gradient 0, as in ``torch.relu`` and today's ``torch.nn.MarginRankingLoss``.
        label_smoothing: ε in 0 … 1, for ``logistic``: the better image is taken to win with probability
            1 − ε/2 (as in cross-entropy with two classes), which adds ε/2 · (s_hi − s_lo) to the term.
        label: what the labels are. ``tier``: integers, 0 is best. ``tier_score``: real numbers, higher is
            better. Every pair of different labels counts.

    Raises:
        ConfigError: a setting is unknown, out of range, or goes with another kind.
    """

    kind: str = "margin"
    margin: float = 1.0
    label_smoothing: float = 0.0
    label: str = "tier"

    def __post_init__(self) -> None:
        _check_kind(self.kind, self.margin, self.label_smoothing)
        if self.label not in LABELS:
            raise ConfigError(f"unknown label {self.label!r}; there are {', '.join(LABELS)}")

    def __call__(
        self,
        scores: Tensor,
        labels: Tensor,
        within: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """The mean loss, ready for ``backward()``.

        Args:
            scores: [n] or [n, 1] float16, bfloat16, float32 or float64; higher is better.
            labels: [n] or [n, 1] on the same device; int64 or another integer type for ``tier``.
            within: [n] integers; only pairs with the same number count. None: all pairs.
            weights: [n] above 0; a pair weighs the product of both, and the loss is the weighted mean.

        Returns:
            Scalar, at least 0; float64 for float64 scores, else float32; on the scores' device, except
            that it lies on the CPU for MPS. 0 with gradient 0 where no pair counts. NaN when any score
            is not finite, whether or not it is part of a pair.

        Raises:
            ValueError: shapes or dtypes do not fit, or a label is NaN, infinite or a negative tier.
        """
        scores, labels = one_column(scores, "scores"), one_column(labels, "labels")
        within = None if within is None else one_column(within, "within")
        if not scores.is_floating_point():
            raise ValueError(f"scores must be floats, not {describe(scores)}")
        tiers = _check_labels(labels, len(scores), self.label)
        if within is not None and (within.shape != scores.shape or not _is_integer(within)):
            raise ValueError(
                f"within must be one integer for each of {len(scores)} scores, not {describe(within)}"
            )
        if scores.device.type == "mps":  # which has no float64; n numbers are soon moved
            others = (None if t is None else t.cpu() for t in (within, weights))
            return self(scores.cpu(), labels.cpu(), *others)

        def compute(detached: Tensor) -> tuple[Tensor, Tensor]:
            plain = within is None and weights is None
            if self.kind == "margin" and plain and 0 < tiers <= _MANY_TIERS:
                return _tier_margin(detached.double(), labels.long(), tiers, self.margin)
            better = -labels.long() if self.label == "tier" else labels
            if self.kind == "margin":
                values = detached.double()
            else:
                values = detached if detached.dtype == torch.float64 else detached.float()
            return _sum_tiles(values, better, within, weights, self._terms)

        loss: Tensor = _ValueAndGradient.apply(scores, compute)
        return loss

    def _terms(self, behind: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of each pair and its derivative by ``behind`` = s_lo − s_hi."""
        if self.kind == "margin":
            loss = torch.relu(behind + self.margin)
            return loss, (loss > 0).to(loss.dtype)
        half = self.label_smoothing / 2
        # softplus without the cut-off of torch's own
        return -functional.logsigmoid(-behind) - half * behind, torch.sigmoid(behind) - half


def _tier_margin(scores: Tensor, tiers: Tensor, count: int, margin: float) -> tuple[Tensor, Tensor]:
    """Mean margin loss over pairs of different tiers, and its gradient [n].

    Which pairs violate the margin is counted, never listed. With V the set of violating pairs, the loss
    Σ_V (m − (s_hi − s_lo)) is linear in the scores: m·|V| + Σ_i g_i s_i, where g_i, the gradient, is the
    number of violating pairs that i should lose minus the number of those that it should win (compare
    Joachims 2005, «A support vector method for multivariate performance measures»).

    Args:
        scores: [n] float64.
        tiers: [n] int64 in 0 … K − 1, 0 is best.
        count: K; O(K n + n log n) time, O(K n) memory.
        margin: m.
    """
    n = len(scores)
    ordered, order = torch.sort(scores)
    # Sorted, the items at the places reach ≤ k < n come too close to an item, or lie above it; those at
    # 0 ≤ k < back are those that it comes too close to, from above.
    reach = torch.searchsorted(ordered, ordered - margin, right=True)
    back = torch.searchsorted(reach, torch.arange(n, device=scores.device), right=True)
    own = tiers[order]
    one_hot = torch.eye(count, dtype=torch.int64, device=scores.device)[own]
    passed = one_hot.new_zeros(n + 1, count)  # row k: items of each tier at the places before k
    torch.cumsum(one_hot, 0, out=passed[1:])
    worse = torch.arange(count, device=scores.device) > own[:, None]
    better = torch.arange(count, device=scores.device) < own[:, None]
    wins_missed = ((passed[n] - passed[reach]) * worse).sum(1)
    losses_missed = (passed[back] * better).sum(1)
    sizes = passed[n]
    pairs = int((sizes * (n - sizes)).sum()) // 2
    gradient = torch.empty_like(scores).scatter_(0, order, (losses_missed - wins_missed).double())
    # The gradient sums to 0, so any origin will do: one of the scores keeps the differences of large
    # scores exact. Rounding may leave −1e-17 where 0 is meant.
    value = margin * wins_missed.sum().double() + gradient @ (scores - scores[n // 2])
    return value.clamp(min=0) / max(pairs, 1), gradient / max(pairs, 1)


def _sum_tiles(
    scores: Tensor,
    labels: Tensor,
    within: Tensor | None,
    weights: Tensor | None,
    terms: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """Mean over the pairs of different labels, and its gradient [n]; each pair in the dtype of ``scores``.

    Args:
        scores: [n].
        labels: [n], higher is better.
        within: [n]; only pairs of the same number count. None: all.
        weights: [n]; a pair weighs the product of both. None: 1.
        terms: s_lo − s_hi of some pairs → their losses and the derivatives.
    """
    n = len(scores)
    order = torch.argsort(
        labels, stable=True
    )  # worst first: a row's pairs are among the columns before
    ordered, label = scores[order], labels[order]
    group = None if within is None else within[order]
    weight = None if weights is None else weights[order].to(scores.dtype)
    whole = torch.zeros((), dtype=torch.float64, device=scores.device)
    value = torch.zeros((), dtype=torch.float64, device=scores.device)
    slopes = torch.zeros(n, dtype=torch.float64, device=scores.device)
    for top in range(0, n, TILE):
        rows = slice(top, top + TILE)
        for left in range(0, top + 1, TILE):
            columns = slice(left, left + TILE)
            counts = label[rows, None] > label[columns]
            if group is not None:
                counts &= group[rows, None] == group[columns]
            if weight is not None:
                counts = counts * (weight[rows, None] * weight[columns])
                whole += counts.sum(dtype=torch.float64)
            loss, slope = terms(ordered[columns] - ordered[rows, None])
            value += (loss * counts).sum(dtype=torch.float64)
            slope = slope * counts
            slopes[rows] -= slope.sum(1, dtype=torch.float64)
            slopes[columns] += slope.sum(0, dtype=torch.float64)
    gradient = torch.empty_like(slopes).scatter_(0, order, slopes)
    # An infinite score may cost nothing (the best item at +∞): it must not pass unseen.
    value = value + 0.0 * scores.sum(dtype=torch.float64)
    pairs = max(count_pairs(labels, within), 1) if weight is None else float(whole) or 1.0
    return value / pairs, gradient / pairs


def count_pairs(labels: Tensor, within: Tensor | None = None) -> int:
    """Number of pairs of different labels [n]; with ``within`` [n], of those inside one of its values."""

    def alike(codes: Tensor) -> int:
        sizes = torch.unique(codes, return_counts=True)[1]
        return int((sizes * (sizes - 1)).sum()) // 2

    values, label = torch.unique(labels, return_inverse=True)
    if within is None:
        return len(labels) * (len(labels) - 1) // 2 - alike(label)
    group = torch.unique(within, return_inverse=True)[1]
    return alike(group) - alike(group * len(values) + label)


def pair_loss(
    s1: Tensor,
    s2: Tensor,
    label: Tensor,
    *,
    kind: str = "margin",
    margin: float = 1.0,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
) -> Tensor:
    """Mean loss over listed pairs; without ties, ``margin`` is ``torch.nn.MarginRankingLoss``.

    A tie asks for equal scores. ``margin``: it costs |s1 − s2|, the slack of Parikh & Grauman 2011
    («Relative attributes», similar pairs). ``logistic``: its target probability is ½ (Burges et al.
    2005), so it costs at least log 2, at equal scores; smoothing leaves it as it is.

    Args:
        s1: [p] or [p, 1] float scores of the first images.
        s2: the same of the second images.
        label: [p] or [p, 1]: 1 the first is better, −1 the second is better, 0 a tie.
        kind: ``margin`` or ``logistic``.
        margin: m ≥ 0, see :class:`PairLoss`.
        label_smoothing: ε in 0 … 1, for ``logistic``, see :class:`PairLoss`.
        weight: [p] or [p, 1] weights ≥ 0; the loss is the weighted mean.

    Returns:
        Scalar as of :class:`PairLoss`. 0 with gradient 0 where there is no pair or no weight.
        NaN when any score is not finite.

    Raises:
        ConfigError: a setting is unknown or out of range.
        ValueError: shapes do not fit, or a label or weight is out of range.
    """
    _check_kind(kind, margin, label_smoothing)
    s1, s2, label = check_pairs(s1, s2, label)
    if s1.device.type == "mps":  # which has no float64
        s1, s2, label = s1.cpu(), s2.cpu(), label.cpu()
        weight = None if weight is None else weight.cpu()
    label = label.double()
    difference = s1.double() - s2.double()
    if kind == "margin":
        wrong = torch.relu(margin - label * difference)
        losses = torch.where(label == 0, difference.abs(), wrong)
    else:
        target = (1 + label * (1 - label_smoothing)) / 2
        # Binary cross-entropy: softplus(−d) + (1 − target) d, without overflow.
        losses = (1 - target) * difference - functional.logsigmoid(difference)
    if weight is None:
        mean = losses.sum() / max(len(losses), 1)
    else:
        weight = one_column(weight, "weight")
        if weight.shape != s1.shape or not bool(((weight >= 0) & (weight < math.inf)).all()):
            raise ValueError("weight must be one finite number of at least 0 per pair")
        weight = weight.double()
        whole = float(weight.sum())
        mean = (losses * weight).sum() / (whole if whole > 0 else 1.0)
    # An infinite score may cost nothing, and must not pass unseen.
    mean = mean + 0.0 * difference.detach().sum()
    return mean.to(_loss_dtype(s1))


class _ValueAndGradient(torch.autograd.Function):
    """A scalar whose gradient is already known when its value is."""

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, compute: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> Tensor:
        value, gradient = compute(scores.detach())
        ctx.save_for_backward(gradient)
        ctx.dtype = scores.dtype
        return value.to(_loss_dtype(scores))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        # Scaled before it is cast: 1/n would vanish in float16 without the loss scaler's factor.
        return (upstream.double() * gradient).to(ctx.dtype), None


def _loss_dtype(scores: Tensor) -> torch.dtype:
    return torch.float64 if scores.dtype == torch.float64 else torch.float32


def _check_kind(kind: str, margin: float, label_smoothing: float) -> None:
    if kind not in LOSSES:
        raise ConfigError(f"unknown loss {kind!r}; there are {', '.join(LOSSES)}")
    if not 0 <= margin < math.inf:
        raise ConfigError(f"margin is {margin}; it must be a number of at least 0")
    if not 0 <= label_smoothing <= 1:
        raise ConfigError(f"label_smoothing is {label_smoothing}; it must be between 0 and 1")
    if label_smoothing and kind != "logistic":
        raise ConfigError("label_smoothing goes with the logistic loss, not with margin")


def _check_labels(labels: Tensor, n: int, label: str) -> int:
    """Check [n] labels; returns the number of tiers (largest + 1), or 0 for real ones. Raises ValueError."""
    if labels.shape != (n,):
        raise ValueError(
            f"labels must be one number for each of {n} scores, not {describe(labels)}"
        )
    if label == "tier" and not _is_integer(labels):
        raise ValueError(
            f"tiers must be integers, not {describe(labels)}; for real numbers use label='tier_score'"
        )
    if n == 0:
        return 0
    low, high = torch.stack(torch.aminmax(labels)).tolist()  # one transfer from a GPU
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("labels must be finite numbers")
    if label == "tier" and low < 0:
        raise ValueError(f"tiers start at 0, there is one of {low}")
    return int(high) + 1 if label == "tier" else 0


def one_column(values: Tensor, what: str) -> Tensor:
    """[n] or [n, 1] numbers as [n]: no other shape is taken, as it would be broadcast to other pairs.

    Raises:
        ValueError: another shape, or no real numbers; names both.
    """
    if not isinstance(values, Tensor):
        raise ValueError(f"{what} must be a tensor [n] or [n, 1], not {type(values).__name__}")
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1 or values.is_complex():
        raise ValueError(f"{what} must be [n] or [n, 1] numbers, not {describe(values)}")
    return values


def check_pairs(score1: Tensor, score2: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Two scores and a label for each of p pairs, each [p] or [p, 1], as [p] alike.

    Raises:
        ValueError: another shape, different numbers of pairs, or a label that is not 1, 0 or -1.
    """
    first, second = one_column(score1, "the first scores"), one_column(score2, "the second scores")
    label = one_column(labels, "labels")
    if not len(first) == len(second) == len(label):
        shapes = ", ".join(map(describe, (score1, score2, labels)))
        raise ValueError(
            f"scores and labels must be of the same pairs, [p] or [p, 1], not {shapes}"
        )
    if bool(((label != 0) & (label.double().abs() != 1)).any()):
        raise ValueError("labels of pairs must be 1, 0 or -1")
    return first, second, label


def describe(tensor: Tensor) -> str:
    """Shape and dtype for a message: ``[3, 4] float32``."""
    return f"{list(tensor.shape)} {tensor.dtype}".replace("torch.", "")


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
