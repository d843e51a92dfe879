"""Logistic loss (RankNet, Burges et al. 2005) over all pairs: exact, tile by tile, in constant memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from mirip_fast.models.allpairs import Sums, bounds
from mirip_fast.models.places import line_up_labels

#: Side of a tile. A tile of float64 takes 2 MiB, and about eight are alive at once.
TILE = 512


def logistic_sums(
    scores: Tensor,
    labels: Tensor,
    min_gap: float,
    groups: Tensor | None,
    *,
    label_smoothing: float = 0.0,
    tier_weights: Tensor | None = None,
) -> Sums:
    """Sum of softplus(−(s_hi − s_lo)) + ε/2 · (s_hi − s_lo) over all pairs, and its gradient.

    O(n²) time. Each pair's term is computed in the dtype of ``scores``, the sums are float64.

    Args:
        scores: [n] float32 or float64.
        labels: [n], higher is better; with ``tier_weights``: −tier.
        min_gap: smallest difference of labels that makes a pair.
        groups: [n] integers; only pairs inside one value count. None: all pairs.
        label_smoothing: ε, 0 … 1.
        tier_weights: [K, K] float64, weight of a pair by (better tier, worse tier).
    """
    places = line_up_labels(labels, min_gap, groups)
    start, _ = bounds(places)
    ordered = scores[places.order]
    tiers = None if tier_weights is None else -labels[places.order].long()
    n, half = len(ordered), label_smoothing / 2
    # The item at place k is to beat those at first[k] … last[k] − 1; both never fall, so the pairs of
    # some rows are known from their first and last row.
    first, last = start.tolist(), places.reach.tolist()
    value = torch.zeros((), dtype=torch.float64, device=scores.device)
    total = (places.reach - start).sum() if tiers is None else torch.zeros_like(value)
    gradient = torch.zeros(n, dtype=torch.float64, device=scores.device)
    for top in range(0, n, TILE):
        bottom = min(top + TILE, n)
        for near in range(first[top], last[bottom - 1], TILE):
            far = min(near + TILE, last[bottom - 1])
            rows, columns = slice(top, bottom), slice(near, far)
            behind = ordered[columns] - ordered[rows, None]  # s_lo − s_hi
            loss = -functional.logsigmoid(-behind)
            slope = torch.sigmoid(behind)
            if half:
                loss -= half * behind
                slope -= half
            weight: Tensor | None = None
            if near < first[bottom - 1] or far > last[top]:
                column = torch.arange(near, far, device=scores.device)
                weight = (column >= start[rows, None]) & (column < places.reach[rows, None])
            if tier_weights is not None and tiers is not None:
                by_tier = tier_weights[tiers[rows, None], tiers[columns]]
                weight = by_tier if weight is None else by_tier * weight
                total += weight.sum()
            if weight is not None:
                loss *= weight
                slope *= weight
            value += loss.sum(dtype=torch.float64)
            gradient[rows] -= slope.sum(1, dtype=torch.float64)
            gradient[columns] += slope.sum(0, dtype=torch.float64)
    by_item = torch.empty_like(gradient)
    by_item[places.order] = gradient
    return Sums(value, by_item, total)
