"""Pairwise ranking losses from n scores, never from a list of O(n²) pairs; and one for listed pairs.

:class:`PairLoss` is the mean over every pair of images of which one is better:

- ``margin`` (ranking hinge): max(0, m − (s_hi − s_lo)), exact in O(n log n) time and O(n) memory;
- ``logistic`` (RankNet, Burges et al. 2005): log(1 + exp(−(s_hi − s_lo))), exact in O(n²) time and
  constant extra memory (under 64 MB besides a few numbers per image).

Counts are int64 and sums float64, whatever the dtype of the scores. The gradient is computed together
with the value, so there is no second derivative (``backward`` is once-differentiable).
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
from mirip_fast.models.allpairs import Sums, label_violations, tier_violations
from mirip_fast.models.logistic import logistic_sums
from mirip_fast.models.places import line_up_labels

#: Above so many tiers the count by labels, whose cost does not grow with the tiers, is the cheaper one.
_MANY_TIERS = 16

_KINDS = ("margin", "logistic")
_LABELS = ("tier", "tier_score")


@dataclass(frozen=True)
class PairLoss:
    """Mean loss over all pairs of n scored images.

    Attributes:
        kind: ``margin`` or ``logistic``.
        margin: m ≥ 0, in units of the score; for ``margin``. A pair that sits exactly on the hinge has
            gradient 0, as in ``torch.relu`` and today's ``torch.nn.MarginRankingLoss``.
        label_smoothing: ε in 0 … 1, for ``logistic``: the better image is taken to win with probability
            1 − ε/2 (as in cross-entropy with two classes), which adds ε/2 · (s_hi − s_lo) to the term.
        label: what the labels are. ``tier``: integers, 0 is best, every pair of different tiers counts.
            ``tier_score``: real numbers, higher is better, see ``min_gap``.
        min_gap: for ``tier_score``: pairs whose labels differ by less do not count (nor do equal
            labels). A difference of exactly ``min_gap`` counts, also when the rounding of the labels'
            dtype makes it fall short (1.3 and 1.1 with a gap of 0.2).
        tier_weights: for ``tier``: [tiers][tiers] weight ≥ 0 of a pair by its (better, worse) tier; the
            diagonal and what lies below it is not read. The loss is the weighted mean.
        within_share: which pairs count. None: all alike. 1: only those inside one value of ``within``.
            0 < share < 1: share · mean over the inside pairs + (1 − share) · mean over the others; when
            one of the two has no pair, the other one is the loss.

    Raises:
        ConfigError: a setting is unknown, out of range, or goes with another kind or label.
    """

    kind: str = "margin"
    margin: float = 1.0
    label_smoothing: float = 0.0
    label: str = "tier"
    min_gap: float = 0.0
    tier_weights: tuple[tuple[float, ...], ...] | None = None
    within_share: float | None = None

    def __post_init__(self) -> None:
        _check_kind(self.kind, self.margin, self.label_smoothing)
        _check_label(self.label, self.min_gap)
        if self.within_share is not None and not 0 < self.within_share <= 1:
            raise ConfigError(
                f"within_share is {self.within_share}; it must be above 0 and at most 1"
            )
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
            scores: [n] float16, bfloat16, float32 or float64; higher is better.
            labels: [n] on the same device; int64 or another integer type for ``tier``.
            within: [n] integers; images with the same number are inside one value. Read only when
                ``within_share`` is set.

        Returns:
            Scalar, at least 0; float64 for float64 scores, else float32. 0 with gradient 0 where no
            pair counts. NaN when any score is not finite, whether or not it is part of a pair.

        Raises:
            ValueError: shapes or dtypes do not fit, a label is NaN, infinite or a negative tier, or
                ``within_share`` is set and ``within`` is missing.
            ConfigError: there are more tiers than ``tier_weights`` has rows.
        """
        if scores.ndim != 1 or not scores.is_floating_point():
            raise ValueError(f"scores must be [n] floats, not {_describe(scores)}")
        tiers = _check_labels(labels, len(scores), self.label)
        if self.tier_weights is not None and tiers > len(self.tier_weights):
            raise ConfigError(
                f"tier_weights has {len(self.tier_weights)} tiers, the labels go up to tier {tiers - 1}"
            )
        groups = None
        if self.within_share is not None:
            if within is None:
                raise ValueError("within_share is set: within, one integer per score, is needed")
            groups = _check_within(within, len(scores))
        sums = self._logistic if self.kind == "logistic" else self._margin

        def compute(detached: Tensor) -> tuple[Tensor, Tensor]:
            def sums_in(groups: Tensor | None) -> Sums:
                return sums(detached, labels, tiers, groups)

            constant, gradient = self._mean(sums_in, groups)
            values = detached.double()
            if self.kind == "margin":  # linear in the scores: see allpairs
                # The gradient sums to 0, so any origin will do: one of the scores keeps differences
                # of large scores exact. Rounding may leave −1e-17 where 0 is meant.
                origin = values[len(values) // 2 :][:1]
                constant = (constant * self.margin + gradient @ (values - origin)).clamp(min=0)
            # An infinite score may cost nothing (the best image at +∞): it must not pass unseen.
            return constant + 0.0 * values.sum(), gradient

        loss: Tensor = _ValueAndGradient.apply(scores, compute)
        return loss

    def _mean(
        self, sums_in: Callable[[Tensor | None], Sums], groups: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Mean of the constant and of the gradient over the pairs that count, float64."""
        share = self.within_share
        inside = sums_in(groups)
        if share is None or share == 1:
            factor = _inverse(inside.total)
            return inside.constant * factor, inside.gradient * factor
        across = sums_in(None).without(inside)
        inside_factor = _inverse(inside.total) * torch.where(across.total > 0, share, 1.0)
        across_factor = _inverse(across.total) * torch.where(inside.total > 0, 1.0 - share, 1.0)
        return (
            inside.constant * inside_factor + across.constant * across_factor,
            inside.gradient * inside_factor + across.gradient * across_factor,
        )

    def _margin(self, scores: Tensor, labels: Tensor, tiers: int, groups: Tensor | None) -> Sums:
        scores = scores.double()
        if self.label == "tier" and (tiers <= _MANY_TIERS or self.tier_weights is not None):
            weights = self._weights(tiers, scores.device)
            return tier_violations(scores, labels.long(), weights, self.margin, groups)
        return label_violations(scores, self._quality(labels), self.min_gap, self.margin, groups)

    def _logistic(self, scores: Tensor, labels: Tensor, tiers: int, groups: Tensor | None) -> Sums:
        weighted = self.tier_weights is not None
        return logistic_sums(
            scores if scores.dtype == torch.float64 else scores.float(),
            self._quality(labels),
            self.min_gap,
            groups,
            label_smoothing=self.label_smoothing,
            tier_weights=self._weights(tiers, scores.device) if weighted else None,
        )

    def _quality(self, labels: Tensor) -> Tensor:
        return -labels.long() if self.label == "tier" else labels

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
    _check_label(label, min_gap)
    _check_labels(labels, len(labels), label)
    groups = None if within is None else _check_within(within, len(labels))
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

    A tie asks for equal scores. ``margin``: it costs |s1 − s2|. ``logistic``: its target probability
    is ½, so it costs at least log 2, at equal scores; smoothing leaves it as it is.

    Args:
        s1: [p] float scores of the first images.
        s2: [p] float scores of the second images.
        label: [p]: 1 the first is better, −1 the second is better, 0 a tie.
        kind: ``margin`` or ``logistic``.
        margin: m ≥ 0, see :class:`PairLoss`.
        label_smoothing: ε in 0 … 1, for ``logistic``, see :class:`PairLoss`.
        weight: [p] weights ≥ 0; the loss is the weighted mean.

    Returns:
        Scalar, float64 for float64 scores, else float32. 0 with gradient 0 where there is no pair or no
        weight. NaN when any score is not finite.

    Raises:
        ConfigError: a setting is unknown or out of range.
        ValueError: shapes do not fit, or a label or weight is out of range.
    """
    _check_kind(kind, margin, label_smoothing)
    if s1.ndim != 1 or s1.shape != s2.shape or s1.shape != label.shape:
        raise ValueError(
            f"s1, s2 and label must be [p] alike, not {_describe(s1)}, {_describe(s2)}, {_describe(label)}"
        )
    if bool(((label != 0) & (label.abs() != 1)).any()):
        raise ValueError("labels of pairs must be 1, 0 or -1")
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
        if weight.shape != s1.shape or not bool(((weight >= 0) & (weight < math.inf)).all()):
            raise ValueError("weight must be one finite number of at least 0 per pair")
        weight = weight.double()
        mean = (losses * weight).sum() * _inverse(weight.sum())
    # As above: an infinite score may cost nothing, and must not pass unseen.
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
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        # Scaled before it is cast: 1/n would vanish in float16 without the loss scaler's factor.
        return (upstream.double() * gradient).to(ctx.dtype), None


def _inverse(total: Tensor) -> Tensor:
    """1 / total in float64, and 0 where there is no pair."""
    total = total.double()
    return torch.where(total > 0, 1.0 / total, 0.0)


def _loss_dtype(scores: Tensor) -> torch.dtype:
    return torch.float64 if scores.dtype == torch.float64 else torch.float32


def _check_kind(kind: str, margin: float, label_smoothing: float) -> None:
    if kind not in _KINDS:
        raise ConfigError(f"unknown loss {kind!r}; there are {', '.join(_KINDS)}")
    if not 0 <= margin < math.inf:
        raise ConfigError(f"margin is {margin}; it must be a number of at least 0")
    if not 0 <= label_smoothing <= 1:
        raise ConfigError(f"label_smoothing is {label_smoothing}; it must be between 0 and 1")
    if label_smoothing and kind != "logistic":
        raise ConfigError("label_smoothing goes with the logistic loss, not with margin")


def _check_label(label: str, min_gap: float) -> None:
    if label not in _LABELS:
        raise ConfigError(f"unknown label {label!r}; there are {', '.join(_LABELS)}")
    if not 0 <= min_gap < math.inf:
        raise ConfigError(f"min_gap is {min_gap}; it must be a number of at least 0")
    if min_gap and label != "tier_score":
        raise ConfigError("min_gap goes with label tier_score, not with tier")


def _check_labels(labels: Tensor, n: int, label: str) -> int:
    """Check [n] labels; returns the number of tiers (largest + 1), or 0 for real labels."""
    if labels.shape != (n,):
        raise ValueError(
            f"labels must be one number for each of {n} scores, not {_describe(labels)}"
        )
    if label == "tier" and not _is_integer(labels):
        raise ValueError(
            f"tiers must be integers, not {_describe(labels)}; for real numbers use label='tier_score'"
        )
    if n == 0:
        return 0
    low, high = torch.stack(torch.aminmax(labels)).tolist()  # one transfer from a GPU
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("labels must be finite numbers")
    if label == "tier" and low < 0:
        raise ValueError(f"tiers start at 0, there is one of {low}")
    return int(high) + 1 if label == "tier" else 0


def _check_within(within: Tensor, n: int) -> Tensor:
    if within.shape != (n,) or not _is_integer(within):
        raise ValueError(
            f"within must be one integer for each of {n} scores, not {_describe(within)}"
        )
    return within.long()


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype}".replace("torch.", "")
