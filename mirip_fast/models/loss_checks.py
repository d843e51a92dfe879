"""What the pairwise losses accept: settings and tensors, refused with a sentence where they do not fit."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mirip_fast.errors import ConfigError

KINDS = ("margin", "logistic")
LABELS = ("tier", "tier_score")


def check_kind(kind: str, margin: float, label_smoothing: float) -> None:
    """Raise ConfigError unless these settings of the loss go together."""
    if kind not in KINDS:
        raise ConfigError(f"unknown loss {kind!r}; there are {', '.join(KINDS)}")
    if not 0 <= margin < math.inf:
        raise ConfigError(f"margin is {margin}; it must be a number of at least 0")
    if not 0 <= label_smoothing <= 1:
        raise ConfigError(f"label_smoothing is {label_smoothing}; it must be between 0 and 1")
    if label_smoothing and kind != "logistic":
        raise ConfigError("label_smoothing goes with the logistic loss, not with margin")


def check_label(label: str, min_gap: float) -> None:
    """Raise ConfigError unless these settings of the labels go together."""
    if label not in LABELS:
        raise ConfigError(f"unknown label {label!r}; there are {', '.join(LABELS)}")
    if not 0 <= min_gap < math.inf:
        raise ConfigError(f"min_gap is {min_gap}; it must be a number of at least 0")
    if min_gap and label != "tier_score":
        raise ConfigError("min_gap goes with label tier_score, not with tier")


def check_labels(labels: Tensor, n: int, label: str) -> int:
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


def check_within(within: Tensor, n: int) -> Tensor:
    """Check [n] integers; returns them as int64. Raises ValueError."""
    if within.shape != (n,) or not _is_integer(within):
        raise ValueError(
            f"within must be one integer for each of {n} scores, not {describe(within)}"
        )
    return within.long()


def describe(tensor: Tensor) -> str:
    """Shape and dtype for a message: ``[3, 4] float32``."""
    return f"{list(tensor.shape)} {tensor.dtype}".replace("torch.", "")


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
