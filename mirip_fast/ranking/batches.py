"""Which images, or which pairs, a training step sees. A function of seed and epoch alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from mirip_fast.models.allpairs import bounds
from mirip_fast.models.places import line_up_labels


def epoch_generator(seed: int, epoch: int) -> np.random.Generator:
    """Random numbers of one epoch, the same whether the run was interrupted before it or not."""
    return np.random.default_rng([seed, epoch])


def image_batches(n: int, batch_size: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """All n images in random order, in batches of nearly equal size, none larger than ``batch_size``.

    Equal sizes, because a small last batch would have few pairs and the same say as the others.
    """
    order = rng.permutation(n)
    yield from np.array_split(order, max(1, -(-n // batch_size)))


class PartnerDraw:
    """The classic recipe's epoch: for every image one partner, drawn uniformly from those it differs from.

    Args:
        labels: [n], higher is better; two images are a pair where they differ by more than 0 and by at
            least ``min_gap``.
        min_gap: see above.
        within: [n] integers; only images of the same value are a pair. None: all.
    """

    def __init__(
        self,
        labels: NDArray[np.generic],
        min_gap: float = 0.0,
        within: NDArray[np.int64] | None = None,
    ):
        groups = None if within is None else torch.from_numpy(within)
        places = line_up_labels(torch.from_numpy(labels), min_gap, groups)
        start, end = bounds(places)
        # Worst first: an image's partners are the places start … reach − 1 and back … end − 1.
        self._order, self._reach, self._back = (
            array.numpy() for array in (places.order, places.reach, places.back())
        )
        self._start = start.numpy()
        self._worse = self._reach - self._start
        self._partners = self._worse + end.numpy() - self._back
        self._drawing = np.flatnonzero(self._partners)

    def __len__(self) -> int:
        return len(self._drawing)

    def draw(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """[p, 2] indices in random order, the better image first; images without a partner draw none."""
        place = self._drawing
        number = (rng.random(len(place)) * self._partners[place]).astype(np.int64)
        worse = self._worse[place]
        wins = number < worse
        other = np.where(wins, self._start[place] + number, self._back[place] + number - worse)
        image, partner = self._order[place], self._order[other]
        pairs = np.stack([np.where(wins, image, partner), np.where(wins, partner, image)], axis=1)
        return pairs[rng.permutation(len(pairs))]
