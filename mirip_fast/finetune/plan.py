"""Which images a training step sees, and what is done to them. A function of seed and epoch alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class Sample(NamedTuple):
    """One image of a step.

    Attributes:
        image: its index.
        seed: of its augmentation.
        partner: index of the image that is mixed in, −1 for none.
        share: how much of the mixture is ``image``, 0 … 1.
        box: (left, top, right, bottom) in pixels, what CutMix takes from the partner; None with Mixup.
    """

    image: int
    seed: int
    partner: int = -1
    share: float = 1.0
    box: tuple[int, int, int, int] | None = None


@dataclass(frozen=True)
class Mixing:
    """Mixup and CutMix: alpha of each one's Beta distribution (0: off), and the image's side in pixels."""

    mixup: float = 0.0
    cutmix: float = 0.0
    size: int = 1


@dataclass(frozen=True)
class Step:
    """A step's images in order, and their grades.

    Attributes:
        samples: [B].
        grades: [B] float64, higher is better; of a mixture the mixture of the two grades.
        mixed: whether images were mixed.
    """

    samples: tuple[Sample, ...]
    grades: NDArray[np.float64]
    mixed: bool

    def index(self) -> Ints:
        """[B] indices of the images."""
        return np.array([sample.image for sample in self.samples], dtype=np.int64)


def balanced_batches(
    tiers: Ints, groups: Sequence[str | None], batch_size: int, rng: np.random.Generator
) -> list[Ints]:
    """One epoch in batches: every image once, every tier in every batch, groups spread over the batches.

    Tier by tier, and inside a tier group by group, images are dealt out like cards. So the counts of a
    tier in two batches differ by at most one, and so do those of a group inside a tier. A tier with fewer
    images than there are batches is dealt again until every batch has one: only its images come more
    than once.

    Args:
        tiers: [n] tier of each image.
        groups: [n] group of each, or None.
        batch_size: images per batch, at most; above the number of tiers.
        rng: source of the draw.

    Returns:
        Index arrays of sizes that differ by at most one, each in random order.
    """
    hands = [_dealt(np.flatnonzero(tiers == tier), groups, rng) for tier in np.unique(tiers)]
    batches = max(1, -(-len(tiers) // batch_size))
    # Repeated images take room, which may take another batch, which may take more of them.
    while sum(max(len(hand), batches) for hand in hands) > batches * batch_size:
        batches += 1
    cards = []
    for hand in hands:
        again = [rng.permutation(hand) for _ in range(-(-batches // len(hand)) - 1)]
        cards.append(np.concatenate([hand, *again])[: max(len(hand), batches)])
    deck = np.concatenate(cards)
    dealt = [rng.permutation(deck[i::batches]) for i in range(batches)]
    return [dealt[int(i)] for i in rng.permutation(batches)]


def _dealt(images: Ints, groups: Sequence[str | None], rng: np.random.Generator) -> Ints:
    """Images in random order, those of one group one after the other, groups in random order."""
    order = rng.permutation(images)
    place: dict[str | int, int] = {}
    keys = []
    for i in order.tolist():
        group = groups[i]
        keys.append(place.setdefault(i if group is None else group, len(place)))
    return order[np.argsort(keys, kind="stable")].astype(np.int64)


def plan_epoch(
    tiers: Ints,
    grades: NDArray[np.float64],
    groups: Sequence[str | None],
    batch_size: int,
    seed: int,
    epoch: int,
    *,
    mixing: Mixing | None = None,
    within: Ints | None = None,
) -> list[Step]:
    """All steps of an epoch.

    Args:
        tiers: [n] tier of each training image.
        grades: [n] what pairs are made by, higher is better.
        groups: [n] group of each, or None.
        batch_size: images per step.
        seed: of the run.
        epoch: counted from 1.
        mixing: Mixup and CutMix; where both are on, a coin decides for each batch.
        within: [n] codes; images are mixed with those of the same code only.
    """
    rng = np.random.default_rng([seed, epoch])
    steps = []
    for batch in balanced_batches(tiers, groups, batch_size, rng):
        seeds = rng.integers(2**62, size=len(batch))
        samples = [Sample(int(i), int(s)) for i, s in zip(batch, seeds, strict=True)]
        kind = _kind(mixing, rng)
        if mixing is not None and kind:
            samples = _mix(samples, mixing, kind, within, rng)
        steps.append(Step(tuple(samples), _grades(samples, grades), bool(kind)))
    return steps


def _kind(mixing: Mixing | None, rng: np.random.Generator) -> str:
    kinds = [] if mixing is None else [k for k in ("mixup", "cutmix") if getattr(mixing, k) > 0]
    return str(rng.choice(kinds)) if kinds else ""


def _mix(
    samples: list[Sample], mixing: Mixing, kind: str, within: Ints | None, rng: np.random.Generator
) -> list[Sample]:
    alpha = getattr(mixing, kind)
    index = np.array([sample.image for sample in samples])
    codes = np.zeros(len(index)) if within is None else within[index]
    partners = np.empty_like(index)
    for code in np.unique(codes):
        members = np.flatnonzero(codes == code)
        partners[members] = index[rng.permutation(members)]
    mixed = []
    for sample, partner in zip(samples, partners.tolist(), strict=True):
        share = float(rng.beta(alpha, alpha))
        box = None
        if kind == "cutmix":
            box = _box(share, mixing.size, rng)
            area = (box[2] - box[0]) * (box[3] - box[1])
            share = 1 - area / mixing.size**2
        mixed.append(sample._replace(partner=partner, share=share, box=box))
    return mixed


def _box(share: float, size: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A box of about 1 − share of the image, cut at its edges (Yun et al. 2019, arXiv 1905.04899)."""
    half = size * (1 - share) ** 0.5 / 2
    x, y = rng.uniform(0, size, 2)
    ends = np.clip(np.round([x - half, y - half, x + half, y + half]), 0, size).astype(int)
    left, top, right, bottom = ends.tolist()
    return left, top, right, bottom


def _grades(samples: list[Sample], grades: NDArray[np.float64]) -> NDArray[np.float64]:
    index = np.array([sample.image for sample in samples])
    partner = np.array([s.image if s.partner < 0 else s.partner for s in samples])
    share = np.array([sample.share for sample in samples])
    mixed: NDArray[np.float64] = share * grades[index] + (1 - share) * grades[partner]
    return mixed
