"""Judgements as the page, the choice of pairs and the figures see them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mirip_fast.data.pair_files import Judgements

#: Why a pair was shown: to learn from; to measure (works kept from training); a second time.
TEACH, MEASURE, REPEAT = "teach", "measure", "repeat"
KINDS = (TEACH, MEASURE, REPEAT)


@dataclass(frozen=True)
class Pair:
    """Two works to be compared, the left one first."""

    one: int
    other: int
    kind: str = TEACH

    @property
    def key(self) -> tuple[int, int]:
        """The two works whatever their sides."""
        return min(self.one, self.other), max(self.one, self.other)


@dataclass(frozen=True)
class Judgement:
    """A verdict on a pair.

    Attributes:
        pair: what was shown.
        label: 1 the left is better, −1 the right, 0 a tie.
        predicted: what the head of that moment expected, 1 or −1; None where there was none.
    """

    pair: Pair
    label: int
    predicted: int | None = None

    @property
    def hit(self) -> bool | None:
        """Whether the prediction was right; None without one, and for a tie, which has no better work."""
        return None if self.predicted is None or self.label == 0 else self.predicted == self.label


def from_file(read: Judgements) -> list[Judgement]:
    """The judgements of a file; those by other programs have neither kind nor prediction."""
    found = []
    for (one, other), label, extra in zip(
        read.images.tolist(), read.label.tolist(), read.extra, strict=True
    ):
        kind = extra.get("kind", "")
        predicted = {"1": 1, "-1": -1}.get(extra.get("predicted", "").strip())
        pair = Pair(one, other, kind if kind in KINDS else TEACH)
        found.append(Judgement(pair, label, predicted))
    return found


def as_arrays(judged: Sequence[Judgement]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """[p, 2] works and [p] labels."""
    pairs = np.array([(j.pair.one, j.pair.other) for j in judged], dtype=np.int64).reshape(-1, 2)
    return pairs, np.array([j.label for j in judged], dtype=np.int64)
