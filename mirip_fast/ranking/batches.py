"""Which images, or which pairs, a training step sees. A function of seed and epoch alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray


def epoch_generator(seed: int, epoch: int) -> np.random.Generator:
    """Random numbers of one epoch, the same whether the run was interrupted before it or not."""
    return np.random.default_rng([seed, epoch])


def image_batches(n: int, batch_size: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """All n images in random order, in batches of nearly equal size, none larger than ``batch_size``.

    Equal sizes, because a small last batch would have few pairs and the same say as the others.
    """
    order = rng.permutation(n)
    yield from np.array_split(order, max(1, -(-n // batch_size)))


def draw_pairs(tiers: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """The classic recipe's epoch: for every image one partner of another tier, drawn uniformly.

    Args:
        tiers: [n] tier of each image; at least two tiers occur.
        rng: source of the draw.

    Returns:
        [n, 2] indices in random order, the better image first.
    """
    order = np.argsort(tiers, kind="stable")
    sorted_tiers = tiers[order]
    first = np.searchsorted(sorted_tiers, tiers, side="left")
    count = np.searchsorted(sorted_tiers, tiers, side="right") - first
    others = len(tiers) - count
    drawn = (rng.random(len(tiers)) * others).astype(np.int64)
    drawn += np.where(drawn >= first, count, 0)  # jump over the image's own tier
    partner = order[drawn]
    pairs = np.stack([np.arange(len(tiers)), partner], axis=1)
    swap = tiers[pairs[:, 0]] > tiers[pairs[:, 1]]
    pairs[swap] = pairs[swap, ::-1]
    return pairs[rng.permutation(len(pairs))]
