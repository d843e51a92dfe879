"""What a session of judging shows about the head and about the judge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mirip_fast.label.judgements import MEASURE, REPEAT, Judgement

#: Predictions that one point of the curve rests on.
WINDOW = 50


@dataclass(frozen=True)
class Share:
    """So many of so many, with a 95 % interval; all None without any.

    Attributes:
        hits: how many.
        count: of how many.
        low, high: 95 % interval (Wilson 1927), which holds for few and for shares near 0 or 1.
    """

    hits: int
    count: int

    @property
    def value(self) -> float | None:
        """The share, 0–1."""
        return self.hits / self.count if self.count else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Its 95 % interval."""
        return wilson(self.hits, self.count) if self.count else None

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        low, high = self.interval or (None, None)
        return {
            "hits": self.hits,
            "count": self.count,
            "value": self.value,
            "low": low,
            "high": high,
        }


def wilson(hits: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Score interval of a share (Wilson 1927): where the true share may lie, 0–1.

    Args:
        hits: how many.
        count: of how many, at least 1.
        z: 1.96 for 95 %.
    """
    share = hits / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = (z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))) / (
        1 + z * z / count
    )
    return max(0.0, middle - half), min(1.0, middle + half)


def predicted(judged: Sequence[Judgement], *, measure: bool) -> list[tuple[int, bool]]:
    """Number of each judgement (from 1) that was predicted before it was learned from, and whether rightly.

    Args:
        judged: all judgements, in order.
        measure: those drawn at random among works kept from training; else those chosen to learn from.
    """
    return [
        (number, judgement.hit)
        for number, judgement in enumerate(judged, start=1)
        if judgement.hit is not None
        and judgement.pair.kind != REPEAT  # the head has learned from that pair
        and (judgement.pair.kind == MEASURE) == measure
    ]


def curve(hits: Sequence[tuple[int, bool]], window: int = WINDOW) -> list[dict[str, Any]]:
    """The share of right predictions over the last ``window`` of them, at each: at, value, low, high."""
    points = []
    for end in range(1, len(hits) + 1):
        last = [hit for _, hit in hits[max(0, end - window) : end]]
        points.append({"at": hits[end - 1][0], **Share(sum(last), len(last)).to_dict()})
    return points


def consistency(judged: Sequence[Judgement]) -> Share:
    """How often a pair that was judged before got the same verdict (better, worse or tie) again."""
    first: dict[tuple[int, int], int] = {}
    same = count = 0
    for judgement in judged:
        pair = judgement.pair
        verdict = judgement.label if pair.one == pair.key[0] else -judgement.label
        if pair.key in first:
            count += 1
            same += first[pair.key] == verdict
        else:
            first[pair.key] = verdict
    return Share(same, count)
