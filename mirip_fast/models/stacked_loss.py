"""The all-pairs losses of H batches at once.

For batches of up to some hundred images the plain table of all B × B differences is quicker than H sorts:
it is one computation for all heads, and small beside the heads' own. Beyond that, or with labels finer
than tiers, each head's loss is computed on its own by :class:`mirip_fast.models.losses.PairLoss`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from mirip_fast.models.losses import PairLoss

#: Differences in one table, at most: some five float64 tables of this size live together.
_TABLE = 1 << 21


def stacked_pair_loss(
    loss: PairLoss, scores: Tensor, labels: Tensor, within: Tensor | None, rows: Tensor
) -> Tensor:
    """The losses of H batches, each as of ``loss`` on its own.

    Args:
        loss: which loss.
        scores: [H, B] floats, higher is better.
        labels: [H, B], as ``loss`` expects them.
        within: [H, B] integers, or None.
        rows: [H] real rows of each batch; what is beyond is padding.

    Returns:
        [H] float64; 0 where a batch has no pair.
    """
    heads, width = scores.shape
    if loss.label != "tier" or heads * width * width > _TABLE:
        return torch.stack(
            [
                loss(
                    scores[i, :n].double(), labels[i, :n], None if within is None else within[i, :n]
                )
                for i, n in enumerate(rows.tolist())
            ]
        )
    values = scores.double()
    ahead = values[:, :, None] - values[:, None, :]  # [H, B, B]: score of the row − of the column
    if loss.kind == "margin":
        terms = torch.relu(loss.margin - ahead)
    else:
        terms = loss.label_smoothing / 2 * ahead - functional.logsigmoid(ahead)
    weights = _weights(loss, labels, rows)
    if loss.within_share is None or within is None:
        return _mean(terms, weights)[0]
    inside = within[:, :, None] == within[:, None, :]
    mean, has_inside = _mean(terms, weights * inside)
    if loss.within_share == 1:
        return mean
    other, has_other = _mean(terms, weights * ~inside)
    share = loss.within_share * has_inside.double()
    rest = (1 - loss.within_share) * has_other.double()
    return (share * mean + rest * other) / (share + rest).clamp(min=1e-300)


def _weights(loss: PairLoss, tiers: Tensor, rows: Tensor) -> Tensor:
    """[H, B, B] float64: what it weighs that the row should beat the column; 0 where it should not."""
    there = torch.arange(tiers.shape[1], device=tiers.device) < rows[:, None]
    wins = tiers[:, :, None] < tiers[:, None, :]
    wins = wins & there[:, :, None] & there[:, None, :]
    if loss.tier_weights is None:
        return wins.double()
    table = torch.tensor(loss.tier_weights, dtype=torch.float64, device=tiers.device)
    return table[tiers[:, :, None], tiers[:, None, :]] * wins


def _mean(terms: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """[H] weighted means, 0 where nothing weighs, and [H] whether something does."""
    total = weights.sum((1, 2))
    return (terms * weights).sum((1, 2)) / total.clamp(min=1e-300), total > 0
