"""One head of a stack: what it is to learn, where it stands, and what it came to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mirip_fast.config import Config
from mirip_fast.models.allpairs import label_accuracy
from mirip_fast.ranking.batches import epoch_generator, image_batches
from mirip_fast.ranking.objective import higher_is_better, make_loss
from mirip_fast.ranking.rows import Rows
from mirip_fast.training.optim import EarlyStopping
from mirip_fast.training.presets import Preset, choose_patience

Index = NDArray[np.int64]


@dataclass(frozen=True)
class HeadTask:
    """One head to train.

    Attributes:
        train: rows to learn from, [n] indices; may repeat.
        val: rows that choose the best epoch and when to stop, [m] indices; empty: the last epoch counts.
        config: its settings; the widths are those of the whole stack.
        preset: batch size (that of the whole stack), learning rate and epochs.
    """

    train: Index
    val: Index
    config: Config
    preset: Preset

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one epoch."""
        return max(1, -(-len(self.train) // self.preset.batch_size))


@dataclass(frozen=True)
class TrainedHead:
    """A head that is done.

    Attributes:
        arrays: name → float32 array, as in ``RankingHead.state_dict()``.
        epochs: epochs trained.
        best_epoch: the epoch that the arrays are of.
        accuracy: pairwise accuracy on ``val`` in that epoch; NaN without ``val``.
        finite: whether the loss stayed finite; if not, the arrays are of the last good epoch.
    """

    arrays: dict[str, NDArray[np.float32]]
    epochs: int
    best_epoch: int
    accuracy: float
    finite: bool


class Runner:
    """Where one head stands."""

    def __init__(self, place: int, task: HeadTask, rows: Rows):
        settings = task.config.train
        self.place, self.task, self._rows = place, task, rows
        tiers = task.config.data.tier_names()
        self.loss = make_loss(settings, tiers, within=rows.within is not None)
        self.stopping = EarlyStopping(
            choose_patience(settings, task.steps_per_epoch), settings.early_stopping_min_delta
        )
        self._within = rows.within if self.loss.within_share else None
        self.arrays: dict[str, NDArray[np.float32]] = {}
        self.epoch = 0
        self.finite = True
        self.finished = False

    def batches(self, epoch: int) -> Batches:
        """The epoch's batches, drawn as for a head that is trained alone."""
        rng = epoch_generator(self.task.config.train.seed, epoch)
        if self.finished:
            return Batches([], rng)
        train = self.task.train
        batches = image_batches(len(train), self.task.preset.batch_size, rng)
        return Batches([train[batch] for batch in batches], rng)

    def update(self, scores: NDArray[np.floating], epoch: int, finite: bool) -> bool:
        """Take in an epoch's validation scores; returns whether its weights are to be kept."""
        if not finite or not np.isfinite(scores).all():
            self.finite, self.finished = False, True
            return not self.arrays
        self.epoch = epoch
        last = epoch == self.task.preset.epochs
        if not len(self.task.val):
            self.finished = last
            self.stopping.best_epoch = epoch
            return last
        val = self.task.val
        labels = torch.from_numpy(higher_is_better(self._rows, self.loss)[val])
        groups = None if self._within is None else torch.from_numpy(self._within[val])
        found = label_accuracy(torch.from_numpy(scores), labels, self.loss.min_gap, groups)
        accuracy = float("nan") if found is None else found
        best = self.stopping.update(accuracy, epoch)
        self.finished = last or self.stopping.should_stop
        return best

    def result(self) -> TrainedHead:
        """The head with the weights of its best epoch."""
        accuracy = self.stopping.best if len(self.task.val) else float("nan")
        return TrainedHead(self.arrays, self.epoch, self.stopping.best_epoch, accuracy, self.finite)


@dataclass(frozen=True)
class Batches:
    """One head's batches of an epoch, and the random numbers that go on from there."""

    index: list[Index]
    rng: np.random.Generator
