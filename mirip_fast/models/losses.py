"""Pairwise ranking losses from n scores, never from a list of O(n²) pairs; and one for listed pairs.

:class:`PairLoss` is the mean over every pair of images of which one is better:

- ``margin`` (ranking hinge): max(0, m − (s_hi − s_lo)), exact in O(n log n) time and O(n) memory;
- ``logistic`` (RankNet, Burges et al. 2005): log(1 + exp(−(s_hi − s_lo))), exact in O(n²) time and
  constant extra memory (under 64 MB besides a few numbers per image).

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

from mirip_fast.errors import ConfigError
from mirip_fast.models.allpairs import Sums, label_margin_sums, tier_margin_sums
from mirip_fast.models.logistic import logistic_sums
from mirip_fast.models.loss_checks import (
    check_kind,
    check_label,
    check_labels,
    check_pairs,
    check_within,
    describe,
    one_column,
)
from mirip_fast.models.places import line_up_labels

#: Above so many tiers the count by labels, whose cost does not grow with the tiers, is the cheaper one.
_MANY_TIERS = 16


@dataclass(frozen=True)
class PairLoss:
    """Mean loss over all pairs of n scored images.

    Attributes:
        kind: ``margin`` or ``logistic``.
        margin: m ≥ 0, in units of the score; for ``margin``. A pair that sits exactly on the hinge has
            gradient 0, as in ``torch.relu`` and today's ``torch.nn.MarginRankingLoss``.
        label_smoothing: ε in 0 … 1, for ``logistic``: the better image is taken to win with probability
            1 − ε/2 (as in cross-entropy with two classes), which adds ε/2 · (s_hi − s_lo) to the term.
        tier_weights: for ``tier``: [tiers][tiers] weight ≥ 0 of a pair by its (better, worse) tier; the
            diagonal and what lies below it is not read. The loss is the weighted mean.
        within_share: which pairs count. None: all alike. 1: only those inside one value of ``within``.
            0: only the others. Between: share · mean over the inside pairs + (1 − share) · mean over the
            others; when one of the two has no pair, the other one is the loss.
        min_gap: for ``tier_score``: pairs whose labels differ by less do not count (nor do equal
            labels). A difference of exactly ``min_gap`` counts, also when the rounding of the labels'
            dtype makes it fall short (1.3 and 1.1 with a gap of 0.2).
        label: what the labels are. ``tier``: integers, 0 is best, every pair of different tiers counts.
            ``tier_score``: real numbers, higher is better, see ``min_gap``.

    Raises:
        ConfigError: a setting is unknown, out of range, or goes with another kind or label.
    """

    kind: str = "margin"
    margin: float = 1.0
    label_smoothing: float = 0.0
    tier_weights: tuple[tuple[float, ...], ...] | None = None
    within_share: float | None = None
    min_gap: float = 0.0
    label: str = "tier"

    def __post_init__(self) -> None:
        check_kind(self.kind, self.margin, self.label_smoothing)
        check_label(self.label, self.min_gap)
        if self.within_share is not None and not 0 <= self.within_share <= 1:
            raise ConfigError(f"within_share is {self.within_share}; it must be between 0 and 1")
        if self.tier_weights is None:
            return
        if self.label != "tier":
            raise ConfigError(f"tier_weights go with label tier, not with {self.label}")
        tiers = len(self.tier_weights)
        if tiers == 0 or any(len(row) != tiers for row in self.tier_weights):
            raise ConfigError("tier_weights must be a square table, one row and column per tier")
        if not all(0 <= weight < math.inf for row in self.tier_weights for weight in row):
            raise ConfigError("tier_weights must be numbers of at least 0")

    def __call__(self, scores: Tensor, labels: Tensor, within: Tensor | None = None) -> Tensor:
        """The mean loss, ready for ``backward()``.

        Args:
            scores: [n] or [n, 1] float16, bfloat16, float32 or float64; higher is better.
            labels: [n] or [n, 1] on the same device; int64 or another integer type for ``tier``.
            within: [n] integers; images with the same number are inside one value. Read only when
                ``within_share`` is set.

        Returns:
            Scalar, at least 0; float64 for float64 scores, else float32; on the scores' device, except
            that it lies on the CPU for MPS. 0 with gradient 0 where no pair counts. NaN when any score
            is not finite, whether or not it is part of a pair.

        Raises:
            ValueError: shapes or dtypes do not fit, a label is NaN, infinite or a negative tier, or
                ``within_share`` is set and ``within`` is missing.
            ConfigError: there are more tiers than ``tier_weights`` has rows.
        """
        scores = one_column(scores, "scores")
        if not scores.is_floating_point():
            raise ValueError(f"scores must be floats, not {describe(scores)}")
        labels = one_column(labels, "labels")
        within = None if within is None else one_column(within, "within")
        tiers = check_labels(labels, len(scores), self.label)
        if self.tier_weights is not None and tiers > len(self.tier_weights):
            raise ConfigError(
                f"tier_weights has {len(self.tier_weights)} tiers, the labels go up to tier {tiers - 1}"
            )
        if scores.device.type == "mps":  # which has no float64; n numbers are soon moved
            return self(scores.cpu(), labels.cpu(), None if within is None else within.cpu())
        groups = None
        if self.within_share is not None:
            if within is None:
                raise ValueError("within_share is set: within, one integer per score, is needed")
            groups = check_within(within, len(scores))

        def compute(detached: Tensor) -> tuple[Tensor, Tensor]:
            parts = self._sums(detached, labels, tiers, groups)
            factors = self._factors([part.total for part in parts])
            terms = [
                (part.value * factor, part.gradient * factor)
                for part, factor in zip(parts, factors, strict=True)
            ]
            if len(terms) == 1:
                return terms[0]
            (value, gradient), (other_value, other_gradient) = terms
            return value + other_value, gradient + other_gradient

        loss: Tensor = _ValueAndGradient.apply(scores, compute)
        return loss

    def _sums(
        self, scores: Tensor, labels: Tensor, tiers: int, groups: Tensor | None
    ) -> tuple[Sums, ...]:
        """Sums over the pairs that count or, with a share below 1, over inside and across pairs."""
        across = self.within_share is not None and self.within_share < 1
        weighted = self.tier_weights is not None
        quality = -labels.long() if self.label == "tier" else labels
        if self.kind == "logistic":
            return logistic_sums(
                scores if scores.dtype == torch.float64 else scores.float(),
                quality,
                self.min_gap,
                groups,
                across=across,
                label_smoothing=self.label_smoothing,
                tier_weights=self._weights(tiers, scores.device) if weighted else None,
            )
        values = scores.double()
        if self.label == "tier" and (weighted or tiers <= _MANY_TIERS):
            weights = self._weights(tiers, scores.device)
            return tier_margin_sums(
                values, labels.long(), weights, self.margin, groups, across=across
            )
        return label_margin_sums(values, quality, self.min_gap, self.margin, groups, across=across)

    def _factors(self, totals: list[float]) -> list[float]:
        """What to multiply each set's sum by: its share over its number of pairs."""
        share = self.within_share
        shares = [1.0] if share is None or len(totals) == 1 else [share, 1 - share]
        present = [share if total > 0 else 0.0 for share, total in zip(shares, totals, strict=True)]
        whole = sum(present)
        return [
            share / whole / total if share * total > 0 else 0.0
            for share, total in zip(shares, totals, strict=True)
        ]

    def _weights(self, tiers: int, device: torch.device) -> Tensor:
        """[K, K] weights above the diagonal; integers where all pairs weigh the same."""
        if self.tier_weights is None:
            return torch.ones(tiers, tiers, dtype=torch.int64, device=device).triu(1)
        return torch.tensor(self.tier_weights, dtype=torch.float64, device=device).triu(1)


def count_pairs(
    labels: Tensor, within: Tensor | None = None, *, label: str = "tier", min_gap: float = 0.0
) -> int:
    """Number of pairs that count, in O(n log n); with ``within``, of those inside one of its values.

    Args:
        labels: [n], see :class:`PairLoss`.
        within: [n] integers, or None.
        label: ``tier`` or ``tier_score``.
        min_gap: see :class:`PairLoss`.

    Raises:
        ConfigError: the settings do not fit together.
        ValueError: labels or ``within`` do not fit.
    """
    check_label(label, min_gap)
    labels = one_column(labels, "labels")
    within = None if within is None else one_column(within, "within")
    check_labels(labels, len(labels), label)
    groups = None if within is None else check_within(within, len(labels))
    places = line_up_labels(-labels.long() if label == "tier" else labels, min_gap, groups)
    return int((places.reach - places.start).sum())


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
    check_kind(kind, margin, label_smoothing)
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
