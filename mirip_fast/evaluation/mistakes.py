"""The pairs that scores order most wrongly, found without listing all pairs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike

from mirip_fast.errors import ConfigError
from mirip_fast.evaluation.pair_counts import FloatArray, IntArray, check_codes, check_scores


@dataclass(frozen=True, slots=True)
class WrongPair:
    """Two images of different tiers of which the worse one scores higher.

    Attributes:
        better, worse: their rows; ``better`` has the better tier and the lower score.
        gap: score of ``worse`` minus score of ``better``, above 0.
    """

    better: int
    worse: int
    gap: float


def worst_pairs(
    scores: ArrayLike,
    tiers: ArrayLike,
    k: int,
    *,
    within: ArrayLike | None = None,
    max_per_image: int = 2,
) -> list[WrongPair]:
    """At most ``k`` wrongly ordered pairs, largest gap first.

    One badly scored image is wrong against hundreds of others, and a list of it alone would say
    little: the pairs are taken greedily by gap, passing over those with an image that was shown
    ``max_per_image`` times.

    When a pair is taken, each lower-scored image of its better tier must have been passed over
    because of an earlier pair that holds it, and a pair holds one image of a tier. So among the k
    lowest of each tier (and, alike, the k highest) nothing is missed, and memory is O(n + K² k²),
    not O(n²).

    Args:
        scores: [n] finite floats, higher is better.
        tiers: [n] integers, 0 = best.
        k: pairs wanted, 0 or more.
        within: [n] integer codes; only pairs with equal codes are listed (negative: in no pair).
        max_per_image: how often an image may be shown, at least 1.

    Raises:
        ConfigError: ``k`` or ``max_per_image`` is out of range.
        DataError: a score is not finite, or lengths differ.
    """
    if k < 0 or max_per_image < 1:
        raise ConfigError(
            f"worst mistakes: k={k} (at least 0), max_per_image={max_per_image} (at least 1)"
        )
    values = check_scores(scores)
    tier = check_codes(tiers, len(values), "tiers")
    cell = np.zeros_like(tier)
    if within is not None:
        cell = check_codes(within, len(values), "within", lowest=np.iinfo(np.int64).min)

    better, worse = _candidates(values, tier, cell, k)
    gap = values[worse] - values[better]
    shown = np.zeros(len(values), dtype=np.int64)
    taken: list[WrongPair] = []
    for row in np.lexsort((worse, better, -gap)):
        if len(taken) == k:
            break
        hi, lo = int(better[row]), int(worse[row])
        if shown[hi] < max_per_image and shown[lo] < max_per_image:
            shown[[hi, lo]] += 1
            taken.append(WrongPair(hi, lo, float(gap[row])))
    return taken


def _candidates(
    scores: FloatArray, tiers: IntArray, cells: IntArray, k: int
) -> tuple[IntArray, IntArray]:
    """Rows (better, worse) of the wrong pairs among the k lowest and k highest of each tier and cell."""
    better, worse = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    # Two orders, so that equal scores at either cut go by row, as they do in the final order.
    rising = np.lexsort((scores, cells, tiers))
    falling = np.lexsort((-scores, cells, tiers))
    _, starts = np.unique(np.stack([tiers, cells])[:, rising], axis=1, return_index=True)
    bounds = np.sort(np.r_[starts, len(rising)])
    spans = [slice(int(a), int(b)) for a, b in pairwise(bounds)]
    by_cell: dict[int, list[slice]] = {}
    for span in spans:  # best tier first inside each cell, as `rising` is sorted by tier
        by_cell.setdefault(int(cells[rising[span.start]]), []).append(span)
    for code, tier_spans in by_cell.items():
        for place, upper in enumerate(tier_spans if code >= 0 else []):
            for lower in tier_spans[place + 1 :]:
                low, high = rising[upper][:k], falling[lower][:k]
                wrong = np.argwhere(scores[high][None, :] > scores[low][:, None])
                better.append(low[wrong[:, 0]])
                worse.append(high[wrong[:, 1]])
    return np.concatenate(better), np.concatenate(worse)
