"""Logistic loss (RankNet, Burges et al. 2005) over all pairs: exact, tile by tile, constant memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from mirip_fast.models.allpairs import Sums, bounds
from mirip_fast.models.places import Places, line_up_labels

#: Side of a tile. A tile of float64 takes 2 MiB, and fewer than ten are alive at once.
TILE = 512


def logistic_sums(
    scores: Tensor,
    labels: Tensor,
    min_gap: float,
    groups: Tensor | None = None,
    *,
    across: bool = False,
    label_smoothing: float = 0.0,
    tier_weights: Tensor | None = None,
) -> tuple[Sums, ...]:
    """Sum of softplus(−(s_hi − s_lo)) + ε/2 · (s_hi − s_lo) over the pairs, and its gradient.

    O(n²) time. Each pair's term is computed in the dtype of ``scores``, the sums are float64.

    Args:
        scores: [n] float32 or float64.
        labels: [n], higher is better; with ``tier_weights``: −tier, int64.
        min_gap: smallest difference of labels that makes a pair.
        groups: [n] integers; only pairs inside one value count. None: all pairs.
        across: with ``groups``, also give the sums over the pairs that are not inside one value.
        label_smoothing: ε, 0 … 1.
        tier_weights: [K, K] float64, weight of a pair by (better tier, worse tier).

    Returns:
        The sums over the pairs that count and, with ``across``, over the others.
    """

    def sums(places: Places, apart: Tensor | None) -> Sums:
        weigh = _Weights(places, apart, -labels, tier_weights)
        return _sum_tiles(scores, places, weigh, label_smoothing / 2)

    inside = sums(line_up_labels(labels, min_gap, groups), None)
    if not across:
        return (inside,)
    return inside, sums(line_up_labels(labels, min_gap, None), groups)


class _Weights:
    """Which pairs of a tile count, and how much.

    Args:
        places: the items by label.
        apart: [n] integers; pairs inside one value do not count. None: they do.
        tiers: [n] int64, read only with ``tier_weights``.
        tier_weights: [K, K] float64, or None.
    """

    def __init__(
        self, places: Places, apart: Tensor | None, tiers: Tensor, tier_weights: Tensor | None
    ):
        start, _ = bounds(places)
        self.first, self.last = start, places.reach
        self.apart = None if apart is None else apart[places.order]
        self.tiers = tiers[places.order] if tier_weights is not None else None
        self.tier_weights = tier_weights

    def __call__(self, rows: slice, columns: slice, *, whole: bool) -> Tensor | None:
        """[rows, columns] weights, bool or float64, or None where every pair counts once.

        ``whole``: every column is among the places that each row is to beat.
        """
        weight: Tensor | None = None
        if not whole:
            column = torch.arange(columns.start, columns.stop, device=self.first.device)
            weight = (column >= self.first[rows, None]) & (column < self.last[rows, None])
        if self.apart is not None:
            differ = self.apart[rows, None] != self.apart[columns]
            weight = differ if weight is None else weight & differ
        if self.tier_weights is not None and self.tiers is not None:
            by_tier = self.tier_weights[self.tiers[rows, None], self.tiers[columns]]
            weight = by_tier if weight is None else by_tier * weight
        return weight


def _sum_tiles(scores: Tensor, places: Places, weigh: _Weights, half: float) -> Sums:
    """Add up the tiles. The item at place k is to beat those at ``first[k]`` … ``last[k]`` − 1.

    Neither bound ever falls, so the columns of a strip of rows follow from its first and last row.
    """
    n = len(scores)
    ordered = scores[places.order]
    first, last = weigh.first.cpu(), weigh.last.cpu()
    value = torch.zeros((), dtype=torch.float64, device=scores.device)
    gradient = torch.zeros(n, dtype=torch.float64, device=scores.device)
    total: Tensor | int = 0
    for top in range(0, n, TILE):
        bottom = min(top + TILE, n)
        leftmost, rightmost = int(first[top]), int(last[bottom - 1])
        for left in range(leftmost, rightmost, TILE):
            right = min(left + TILE, rightmost)
            rows, columns = slice(top, bottom), slice(left, right)
            whole = int(first[bottom - 1]) <= left and right <= int(last[top])
            weight = weigh(rows, columns, whole=whole)
            loss, slope = _terms(ordered[columns] - ordered[rows, None], half)
            if weight is None:
                total = total + loss.numel()
            else:
                loss *= weight
                slope *= weight
                total = total + weight.sum()
            value += loss.sum(dtype=torch.float64)
            gradient[rows] -= slope.sum(1, dtype=torch.float64)
            gradient[columns] += slope.sum(0, dtype=torch.float64)
    by_item = torch.empty_like(gradient)
    by_item[places.order] = gradient
    # An infinite score may cost nothing (the best item at +∞): it must not pass unseen.
    value += 0.0 * scores.sum(dtype=torch.float64)
    return Sums(value, by_item, float(total))


def _terms(behind: Tensor, half: float) -> tuple[Tensor, Tensor]:
    """Loss of each pair and its derivative by ``behind`` = s_lo − s_hi; ``half`` is ε/2."""
    loss = -functional.logsigmoid(-behind)  # softplus, without the cut-off of torch's own
    slope = torch.sigmoid(behind)
    if half:
        loss -= half * behind
        slope -= half
    return loss, slope
