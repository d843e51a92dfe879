"""The parts that a report is made of."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mirip_fast.evaluation.intervals import Interval
from mirip_fast.evaluation.pair_counts import FloatArray, IntArray
from mirip_fast.evaluation.reliability import Reliability


@dataclass(frozen=True, slots=True)
class TierPairRow:
    """Pairwise accuracy of one tier against a worse one.

    Attributes:
        better, worse: tier names.
        pairs: image pairs of the two tiers, at least 1.
        accuracy: share of them in the right order (0–1, score ties ½).
        interval: None means unknown.
    """

    better: str
    worse: str
    pairs: int
    accuracy: float
    interval: Interval | None


@dataclass(frozen=True, slots=True)
class WithinRow:
    """Pairwise accuracy among the images with one value of the within column.

    Attributes:
        value: the column's value.
        pairs: their pairs of different tiers, at least 1.
        accuracy: share of them in the right order (0–1, score ties ½).
        interval: None means unknown.
    """

    value: str
    pairs: int
    accuracy: float
    interval: Interval | None


@dataclass(frozen=True, slots=True)
class GroupRow:
    """How the works of one group are ordered against works outside it.

    Attributes:
        group: its name.
        images: its works.
        pairs: pairs of different tiers with one work in the group and one outside, at least 1.
        accuracy: share of them in the right order (0–1, score ties ½).
        interval: None means unknown.
    """

    group: str
    images: int
    pairs: int
    accuracy: float
    interval: Interval | None


@dataclass(frozen=True, slots=True)
class Mistake:
    """A wrongly ordered pair: ``better_*`` has the better tier, ``worse_*`` the higher score.

    ``gap`` is the worse image's score minus the better one's, above 0.
    """

    better_id: str
    better_tier: str
    better_score: float
    worse_id: str
    worse_tier: str
    worse_score: float
    gap: float


@dataclass(frozen=True, slots=True)
class Judged:
    """What was judged, each [n]: names, scores, tiers (0 = best) and within codes, where given.

    Without tiers these are the ranks of the finer grades; ``grades`` are NaN where there are none.
    """

    image_ids: tuple[str, ...]
    scores: FloatArray
    tiers: IntArray
    within: IntArray | None
    grades: FloatArray


@dataclass(frozen=True, slots=True)
class TierFigures:
    """How well predicted tiers meet the true ones.

    Attributes:
        accuracy: share of images whose tier is met (0–1).
        macro_f1: mean F1 over the tiers that occur as truth or prediction (0–1).
        confusion: images by [true tier][predicted tier].
        accuracy_interval, macro_f1_interval: None means unknown.
    """

    accuracy: float
    accuracy_interval: Interval | None
    macro_f1: float
    macro_f1_interval: Interval | None
    confusion: tuple[tuple[int, ...], ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**asdict(self), "confusion": [list(row) for row in self.confusion]}


@dataclass(frozen=True, slots=True)
class Probabilities:
    """Pair and tier probabilities, and whether they come true on the judged images.

    Attributes:
        source, images: where the held-out scores that they were learned from come from, and how many.
        temperature: T of P(a beats b) = σ((s_a − s_b) / T); None where it is infinite.
        pairs: whether pair probabilities come true; None where no pair counts.
        tiers: with the most probable tier as the predicted one; None where none is known.
        remarks: what a reader has to know.
    """

    source: str
    images: int
    temperature: float | None
    pairs: Reliability | None
    tiers: TierFigures | None
    remarks: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        plain = {
            **asdict(self),
            "tiers": self.tiers and self.tiers.to_dict(),
            "remarks": list(self.remarks),
        }
        if self.pairs is not None:
            plain["pairs"] = {
                **asdict(self.pairs),
                "bins": [asdict(part) for part in self.pairs.bins],
            }
        return plain
