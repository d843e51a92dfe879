"""Items lined up by a number, with one threshold each: the shared ground of the all-pairs losses.

Which pairs count, and which of them violate the margin, are both questions of the form «which items lie
below my threshold». After a sort the answer is one place per item, because thresholds rise with the
items. Places are integers, so everything that follows (groups, counts) is exact.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: Rounding steps of the labels' own dtype by which a difference may fall short of ``min_gap``: 1.3 − 1.1
#: is 0.2 to whoever typed the labels, and slightly less in floating point.
_GAP_ROUNDING = 4.0


class Places(NamedTuple):
    """n items in an order; groups, where there are any, lie one after the other.

    Attributes:
        order: [n] int64, the item at each place.
        reach: [n] int64, never falling: the items of the place's group that lie below its threshold
            are those at the places ``start`` ≤ k < ``reach``.
        start: first place of the place's group, [n] int64, or 0 without groups.
        end: one past the last place of the place's group, [n] int64, or n without groups.
    """

    order: Tensor
    reach: Tensor
    start: Tensor | int
    end: Tensor | int

    def back(self) -> Tensor:
        """[n] int64: within its group, place k is below the thresholds of ``back[k]`` ≤ i < ``end``."""
        places = torch.arange(len(self.order), device=self.order.device)
        return torch.searchsorted(self.reach, places, right=True)


def line_up_scores(scores: Tensor, margin: float, groups: Tensor | None) -> Places:
    """Order [n] float64 scores; an item's threshold is its score − margin, equality counting as below.

    So the items at ``reach`` ≤ k < ``end`` are those that come too close: s_k > s − margin, the right
    side rounded to float64. Items with NaN come last and reach anywhere from 0 to n.
    """
    ordered, order = torch.sort(scores)
    return _split(order, torch.searchsorted(ordered, ordered - margin, right=True), groups)


def line_up_labels(labels: Tensor, min_gap: float, groups: Tensor | None) -> Places:
    """Order [n] real labels, higher is better; below the threshold lie the items to be beaten.

    Those are the items of a smaller label with a difference of at least ``min_gap``. A difference
    that misses ``min_gap`` by no more than the rounding of the labels' own dtype still counts.
    """
    values = labels.double()
    ordered, order = torch.sort(values)
    reach = torch.searchsorted(ordered, ordered)
    if min_gap > 0 and len(ordered):
        rounding = torch.finfo(labels.dtype).eps if labels.is_floating_point() else 0.0
        slack = _GAP_ROUNDING * rounding * ordered.abs().max()
        far_enough = torch.searchsorted(ordered, ordered - min_gap + slack, right=True)
        reach = torch.minimum(reach, far_enough)  # equal labels are never a pair
    return _split(order, reach, groups)


def _split(order: Tensor, reach: Tensor, groups: Tensor | None) -> Places:
    """Put the groups one after the other, keeping the order inside each, and translate ``reach``."""
    n = len(order)
    if groups is None:
        return Places(order, reach, 0, n)
    grouped, rank = torch.sort(groups[order], stable=True)  # rank: place among all, per new place
    number = torch.zeros(n, dtype=torch.int64, device=order.device)
    number[1:] = (grouped[1:] != grouped[:-1]).cumsum(0)  # 0, 1, 2, …: no key below can overflow
    keys = number * (n + 1) + rank
    return Places(
        order=order[rank],
        reach=torch.searchsorted(keys, number * (n + 1) + reach[rank]),
        start=torch.searchsorted(number, number),
        end=torch.searchsorted(number, number, right=True),
    )


def count_below(sequence: Tensor, left: Tensor, right: Tensor, below: Tensor) -> Tensor:
    """Count k with left ≤ k < right and sequence[k] < below, for many queries at once.

    A wavelet matrix (Claude, Navarro & Ordóñez 2015) that is walked while it is built: one pass per
    binary digit, O((n + q) log n) time, O(n + q) memory.

    Args:
        sequence: [n] int64 in 0 … n − 1.
        left: [q] int64 in 0 … n.
        right: [q] int64 in ``left`` … n.
        below: [q] int64 in 0 … n.

    Returns:
        [q] int64.
    """
    n = len(sequence)
    counts = torch.zeros_like(below)
    zeros_before = torch.zeros(n + 1, dtype=torch.int64, device=sequence.device)
    places = torch.arange(n, device=sequence.device)
    for digit in reversed(range(n.bit_length())):
        is_one = (sequence >> digit) & 1 == 1
        torch.cumsum(~is_one, 0, out=zeros_before[1:])
        zeros = zeros_before[n]
        wants_one = (below >> digit) & 1 == 1
        left_zeros, right_zeros = zeros_before[left], zeros_before[right]
        # Up to here sequence and below agree: those with a 0 where below has a 1 are smaller.
        counts += torch.where(wants_one, right_zeros - left_zeros, 0)
        left = torch.where(wants_one, zeros + left - left_zeros, left_zeros)
        right = torch.where(wants_one, zeros + right - right_zeros, right_zeros)
        target = torch.where(is_one, zeros + places - zeros_before[:n], zeros_before[:n])
        sequence = torch.empty_like(sequence).scatter_(0, target, sequence)
    return counts
