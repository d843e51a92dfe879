"""Margin loss over all pairs in O(n log n): which pairs violate the margin is counted, never listed.

With V the set of violating pairs, the loss Σ_V (m − (s_hi − s_lo)) is linear in the scores:
m·|V| + Σ_i g_i s_i, where g_i, the gradient, is the number of violating pairs that i should lose minus
the number of those that it should win. So value and gradient both follow from two counts per item
(compare Joachims 2005, «A support vector method for multivariate performance measures»).

Counts are int64, also where pairs are weighted: weights enter after the last sum and difference.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mirip_fast.models.loss_checks import one_column
from mirip_fast.models.places import Places, count_below, line_up_labels, line_up_scores


class Sums(NamedTuple):
    """Sums over a set of pairs.

    Attributes:
        value: float64 scalar, the summed loss.
        gradient: [n] float64, its derivative by each score.
        total: number of pairs, or their summed weight.
    """

    value: Tensor
    gradient: Tensor
    total: float


class _Counts(NamedTuple):
    """What each item sees of the others, in items' order; see the functions that make it.

    Attributes:
        above: violating pairs that the item should win, [n] or, by tier of the partner, [n, K].
        below: violating pairs that it should lose, likewise.
        partners: pairs that it should win or, by tier, all items of its group: likewise, or [1, K].
    """

    above: Tensor
    below: Tensor
    partners: Tensor

    def without(self, part: _Counts) -> _Counts:
        return _Counts(*(mine - its for mine, its in zip(self, part, strict=True)))


def tier_margin_sums(
    scores: Tensor,
    tiers: Tensor,
    weights: Tensor,
    margin: float,
    groups: Tensor | None = None,
    *,
    across: bool = False,
) -> tuple[Sums, ...]:
    """Margin loss over pairs of different tiers; O(K n + n log n) time, O(K n) memory for K tiers.

    Args:
        scores: [n] float64.
        tiers: [n] int64 in 0 … K − 1, 0 is best.
        weights: [K, K], weight of a pair by (better tier, worse tier), 0 on and below the diagonal;
            float64, or int64, with which every count stays an integer.
        margin: m.
        groups: [n] integers; only pairs inside one value count. None: all pairs.
        across: with ``groups``, also give the sums over the pairs that are not inside one value.

    Returns:
        The sums over the pairs that count and, with ``across``, over the others.
    """
    counts = [_tier_counts(scores, tiers, len(weights), margin, groups)]
    if across:
        everything = _tier_counts(scores, tiers, len(weights), margin, None)
        counts.append(everything.without(counts[0]))
    by_better = weights.index_select(
        0, tiers
    )  # [n, K]: what a win of the item over each tier weighs
    by_worse = weights.T.index_select(0, tiers)
    return tuple(
        _linear(
            scores,
            margin,
            wins_missed=(by_better * count.above).sum(1),
            losses_missed=(by_worse * count.below).sum(1),
            total=(by_better * count.partners).sum().item(),
        )
        for count in counts
    )


def label_margin_sums(
    scores: Tensor,
    labels: Tensor,
    min_gap: float,
    margin: float,
    groups: Tensor | None = None,
    *,
    across: bool = False,
) -> tuple[Sums, ...]:
    """Margin loss over pairs by real labels; O(n log n) time in log n passes, O(n) memory.

    Args:
        scores: [n] float64.
        labels: [n], higher is better.
        min_gap: smallest difference of labels that makes a pair.
        margin: m.
        groups: [n] integers; only pairs inside one value count. None: all pairs.
        across: with ``groups``, also give the sums over the pairs that are not inside one value.

    Returns:
        The sums over the pairs that count and, with ``across``, over the others.
    """
    by_score = line_up_scores(scores, margin, None)
    counts = [_label_counts(by_score, line_up_labels(labels, min_gap, groups))]
    if across:
        everything = _label_counts(by_score, line_up_labels(labels, min_gap, None))
        counts.append(everything.without(counts[0]))
    return tuple(
        _linear(scores, margin, count.above, count.below, count.partners.sum().item())
        for count in counts
    )


def label_accuracy(
    scores: Tensor, labels: Tensor, min_gap: float = 0.0, groups: Tensor | None = None
) -> float | None:
    """Share (0–1) of the pairs in which the better label has the higher score; equal scores count ½.

    O(n log n) time in log n passes, O(n) memory; exact.

    Args:
        scores: [n] or [n, 1] finite floats.
        labels: [n] or [n, 1], higher is better.
        min_gap: smallest difference of labels that makes a pair.
        groups: [n] integers; only pairs inside one value count. None: all pairs.

    Returns:
        The share, or None where there is no pair.
    """
    scores, labels = one_column(scores, "scores"), one_column(labels, "labels")
    if len(scores) != len(labels):
        raise ValueError(f"there are {len(scores)} scores and {len(labels)} labels")
    by_label = line_up_labels(labels, min_gap, groups)
    values = scores.double()
    wrong = _label_counts(line_up_scores(values, 0.0, None), by_label)
    right = _label_counts(line_up_scores(-values, 0.0, None), by_label)
    pairs = int(wrong.partners.sum())
    if not pairs:
        return None
    return (pairs + int(right.above.sum()) - int(wrong.above.sum())) / (2 * pairs)


def bounds(places: Places) -> tuple[Tensor, Tensor]:
    """[n] ``start`` and [n] ``end`` of each place's group, also where there are no groups."""
    if isinstance(places.start, Tensor) and isinstance(places.end, Tensor):
        return places.start, places.end
    return torch.zeros_like(places.order), torch.full_like(places.order, len(places.order))


def _tier_counts(
    scores: Tensor, tiers: Tensor, count: int, margin: float, groups: Tensor | None
) -> _Counts:
    """Counts by the partner's tier, [n, K]; violating means here: too close, whatever the tiers."""
    n = len(scores)
    places = line_up_scores(scores, margin, groups)
    one_hot = torch.eye(count, dtype=torch.int64, device=scores.device).index_select(0, tiers)
    passed = one_hot.new_zeros(n + 1, count)  # row k: items of each tier at the places before k
    torch.cumsum(one_hot.index_select(0, places.order), 0, out=passed[1:])

    def up_to(place: Tensor | int) -> Tensor:
        if isinstance(place, int):
            return passed[place : place + 1]  # one row for all
        return passed.index_select(0, place)

    start, end = up_to(places.start), up_to(places.end)
    above = end - up_to(places.reach)
    below = up_to(places.back()) - start
    partners = end - start
    place = _inverse(places.order)
    return _Counts(
        above=above.index_select(0, place),
        below=below.index_select(0, place),
        partners=partners if groups is None else partners.index_select(0, place),
    )


def _label_counts(by_score: Places, by_label: Places) -> _Counts:
    """Counts [n] of the pairs that the labels order; ``by_score`` has no groups, ``by_label`` may.

    By label, an item's partners are a stretch of places; of these, those that keep their distance have
    score places below the item's reach. So each count asks for the numbers below a bound in a stretch.
    """
    n = len(by_score.order)
    score_place = _inverse(by_score.order)[by_label.order]
    start, end = bounds(by_label)
    below = count_below(
        score_place,
        torch.cat((start, by_label.back())),
        torch.cat((by_label.reach, end)),
        torch.cat((by_score.reach[score_place], by_score.back()[score_place])),
    )
    partners = by_label.reach - start
    place = _inverse(by_label.order)
    return _Counts((partners - below[:n])[place], below[n:][place], partners[place])


def _linear(
    scores: Tensor, margin: float, wins_missed: Tensor, losses_missed: Tensor, total: float
) -> Sums:
    """The loss from the counts, see the head of this file."""
    gradient = (losses_missed - wins_missed).double()
    # The gradient sums to 0, so any origin will do: one of the scores keeps the differences of large
    # scores exact. Rounding may leave −1e-17 where 0 is meant.
    origin = scores[len(scores) // 2 :][:1]
    value = margin * wins_missed.sum().double() + gradient @ (scores - origin)
    return Sums(value.clamp(min=0), gradient, total)


def _inverse(order: Tensor) -> Tensor:
    """[n] place of each item."""
    places = torch.arange(len(order), device=order.device)
    return torch.empty_like(order).scatter_(0, order, places)
