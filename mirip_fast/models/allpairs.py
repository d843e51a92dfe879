"""Margin loss over all pairs in O(n log n): which pairs violate the margin is counted, never listed.

With V the set of violating pairs, the loss Σ_V (m − (s_hi − s_lo)) is linear in the scores:
m·|V| + Σ_i g_i s_i, where g_i, the gradient, is the number of violating pairs that i should lose minus
the number of those that it should win. So value and gradient both follow from two counts per item
(compare Joachims 2005, «A support vector method for multivariate performance measures»).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mirip_fast.models.places import Places, count_below, line_up_labels, line_up_scores


class Sums(NamedTuple):
    """Sums over a set of pairs; sets can be subtracted from one another.

    Attributes:
        constant: scalar, the part of the loss that does not follow from ``gradient``: violating pairs
            for the margin loss, the whole loss for the logistic one. int64 or float64.
        gradient: [n], derivative of the summed loss by each score. int64 or float64.
        total: scalar, number (int64) or summed weight (float64) of the pairs.
    """

    constant: Tensor
    gradient: Tensor
    total: Tensor

    def without(self, part: Sums) -> Sums:
        """The sums over the pairs that are not in ``part``."""
        return Sums(*(mine - its for mine, its in zip(self, part, strict=True)))


def tier_violations(
    scores: Tensor, tiers: Tensor, weights: Tensor, margin: float, groups: Tensor | None
) -> Sums:
    """Violating pairs of different tiers; O(K n + n log n) time, O(K n) memory for K tiers.

    Args:
        scores: [n] float64.
        tiers: [n] int64 in 0 … K − 1, 0 is best.
        weights: [K, K], weight of a pair by (better tier, worse tier), 0 on and below the diagonal;
            int64 (then every count is an integer) or float64.
        margin: m.
        groups: [n] integers; only pairs inside one value count. None: all pairs.
    """
    n, count = len(scores), len(weights)
    places = line_up_scores(scores, margin, groups)
    lined_up = tiers[places.order]
    # Row a: summed weight, up to each place, of the partners that an item of tier a should beat; and
    # in row K + b: of those that should beat an item of tier b.
    table = torch.cat((weights, weights.T))
    partners = table.new_zeros(2 * count, n + 1)
    torch.cumsum(table[:, lined_up], 1, out=partners[:, 1:])
    flat = partners.view(-1)
    as_better = lined_up * (n + 1)
    as_worse = as_better + count * (n + 1)
    up_to_end = flat[as_better + places.end]
    wins_missed = up_to_end - flat[as_better + places.reach]
    losses_missed = flat[as_worse + places.back()] - flat[as_worse + places.start]
    gradient = torch.empty_like(wins_missed)
    gradient[places.order] = losses_missed - wins_missed
    total = (up_to_end - flat[as_better + places.start]).sum()
    return Sums(wins_missed.sum(), gradient, total)


def label_violations(
    scores: Tensor, labels: Tensor, min_gap: float, margin: float, groups: Tensor | None
) -> Sums:
    """Violating pairs by real labels; O(n log n) time in log n passes, O(n) memory, all counts int64.

    Args:
        scores: [n] float64.
        labels: [n], higher is better.
        min_gap: smallest difference of labels that makes a pair.
        margin: m.
        groups: [n] integers; only pairs inside one value count. None: all pairs.
    """
    n = len(scores)
    by_score = line_up_scores(scores, margin, None)
    by_label = line_up_labels(labels, min_gap, groups)
    score_place = torch.empty_like(by_score.order)
    score_place[by_score.order] = torch.arange(n, device=scores.device)
    lined_up = score_place[by_label.order]
    start, end = bounds(by_label)
    back = by_label.back()
    below = count_below(
        lined_up,
        torch.cat((start, back)),
        torch.cat((by_label.reach, end)),
        torch.cat((by_score.reach[lined_up], by_score.back()[lined_up])),
    )
    to_beat = by_label.reach - start
    wins_missed = to_beat - below[:n]
    gradient = torch.empty_like(wins_missed)
    gradient[by_label.order] = below[n:] - wins_missed
    return Sums(wins_missed.sum(), gradient, to_beat.sum())


def bounds(places: Places) -> tuple[Tensor, Tensor]:
    """[n] ``start`` and [n] ``end`` of each place's group, also where there are no groups."""
    if isinstance(places.start, Tensor) and isinstance(places.end, Tensor):
        return places.start, places.end
    return torch.zeros_like(places.order), torch.full_like(places.order, len(places.order))
