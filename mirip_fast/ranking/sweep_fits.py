"""The fits of a sweep: every cell on every fold with every seed, stacked where the settings allow it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mirip_fast.config import Config
from mirip_fast.errors import TrainingError
from mirip_fast.files import temporary_folder
from mirip_fast.models.checkpoint import load_checkpoint
from mirip_fast.models.numpy_head import NumpyHead
from mirip_fast.ranking.fit import HeadFit
from mirip_fast.ranking.folds import Fold
from mirip_fast.ranking.head_tasks import HeadTask
from mirip_fast.ranking.many_heads import heads_per_stack, stackable, train_heads
from mirip_fast.ranking.rows import Rows
from mirip_fast.training.presets import choose_preset
from mirip_fast.training.run_folder import Run
from mirip_fast.training.trackers import Trackers

Index = NDArray[np.int64]


@dataclass(frozen=True)
class CellFits:
    """What the fits of a cell came to, for S seeds, K folds and n images.

    Attributes:
        scores: [S, n] float32, of each image by the head that left it out; NaN throughout where the loss
            of one of the cell's heads was not finite.
        epochs: [S, K] epoch that each head is of.
    """

    scores: NDArray[np.float32]
    epochs: Index

    @property
    def finite(self) -> bool:
        """Whether every head could be trained."""
        return bool(np.isfinite(self.scores).all())


def batches_of_cells(
    configs: Mapping[int, Config],
    folds: Sequence[Fold],
    seeds: int,
    input_dim: int,
    device: torch.device,
) -> list[list[int]]:
    """Which cells are trained together: those of one shape and batch size, as many as fit in a stack.

    Args:
        configs: cell number → its settings; all look at the same features.
        folds: the folds.
        seeds: seeds per cell.
        input_dim: numbers per feature row.
        device: where they are trained.

    Returns:
        Cell numbers, batch after batch.
    """  # fmt: skip
    alike: dict[Any, list[int]] = {}
    for number, config in configs.items():
        head = dataclasses.replace(config.head, projector_dropout=0.0)
        preset = choose_preset(config.train, len(folds[0].train))
        alone = number if not stackable(config) else None
        alike.setdefault((repr(head), preset.batch_size, alone), []).append(number)
    batches = []
    for numbers in alike.values():
        heads = heads_per_stack(input_dim, configs[numbers[0]].head, device)
        size = max(1, heads // (len(folds) * seeds))
        batches += [numbers[i : i + size] for i in range(0, len(numbers), size)]
    return batches


def fit_cells(
    rows: Rows,
    configs: Sequence[Config],
    folds: Sequence[Fold],
    seeds: int,
    device: torch.device,
    on_epoch: Callable[[int, int], None] = lambda *_: None,
) -> list[CellFits]:
    """Fit some cells of :func:`batches_of_cells`.

    Args:
        rows: all images.
        configs: the cells' settings.
        folds: the folds.
        seeds: how many seeds; the same ones for every cell, so that cells differ by their settings only.
        device: where to train.
        on_epoch: called with the epoch and the number of heads still at work.
    """
    tasks = [task for config in configs for task in fold_tasks(config, folds, seeds)]
    heads = fit_tasks(rows, tasks, device, on_epoch)
    each = len(folds) * seeds
    return [
        _judge(rows, heads[i * each : (i + 1) * each], folds, seeds) for i in range(len(configs))
    ]


def fit_tasks(
    rows: Rows,
    tasks: Sequence[HeadTask],
    device: torch.device,
    on_epoch: Callable[[int, int], None] = lambda *_: None,
) -> list[tuple[dict[str, NDArray[np.float32]] | None, int]]:
    """Heads of one shape, stacked where their settings allow it: the arrays of each, None where the loss was
    not finite; and the epoch that they are of."""
    if not stackable(tasks[0].config):
        return [_fit_alone(rows, task, device) for task in tasks]
    return [
        (head.arrays if head.finite else None, head.best_epoch)
        for head in train_heads(rows, tasks, device, on_epoch)
    ]


def fold_tasks(config: Config, folds: Sequence[Fold], seeds: int = 1) -> list[HeadTask]:
    """One task per seed and fold, fold by fold inside each seed."""
    tasks = []
    for seed in range(seeds):
        for number, fold in enumerate(folds):
            own = config.train.seed + seed * len(folds) + number
            train = dataclasses.replace(config.train, seed=own)
            preset = choose_preset(train, len(fold.train))
            own_config = dataclasses.replace(config, train=train)
            tasks.append(HeadTask(fold.train, fold.val, own_config, preset))
    return tasks


def _judge(
    rows: Rows,
    heads: Sequence[tuple[dict[str, NDArray[np.float32]] | None, int]],
    folds: Sequence[Fold],
    seeds: int,
) -> CellFits:
    scores = np.full((seeds, len(rows)), np.nan, np.float32)
    epochs = np.array([epoch for _, epoch in heads], dtype=np.int64).reshape(seeds, len(folds))
    for place, (arrays, _) in enumerate(heads):
        seed, fold = divmod(place, len(folds))
        if arrays is None:
            return CellFits(np.full_like(scores, np.nan), epochs)
        index = folds[fold].left_out
        n, views, width = rows.features[index].shape
        flat = rows.features[index].reshape(-1, width)
        scores[seed, index] = NumpyHead(arrays)(flat).reshape(n, views).mean(1)
    return CellFits(scores, epochs)


def _fit_alone(
    rows: Rows, task: HeadTask, device: torch.device
) -> tuple[dict[str, NDArray[np.float32]] | None, int]:
    """A head that no stack can train: its arrays, or None where the loss was not finite; and its epoch."""
    fit = HeadFit(
        _subset(rows, task.train), _subset(rows, task.val), task.config, task.preset, {}, device
    )
    epochs_log = logging.getLogger("mirip_fast.ranking.fit")
    with temporary_folder() as folder:
        run = Run(folder)
        epochs_log.disabled = True
        try:
            result = fit.run(run, Trackers({}))
        except TrainingError:
            return None, 0
        finally:
            epochs_log.disabled = False
        state = load_checkpoint(run.best)["model_state_dict"]
    return {name: value.numpy() for name, value in state.items()}, result.best_epoch


def _subset(rows: Rows, index: Index) -> Rows:
    return Rows(
        ids=[rows.ids[i] for i in index],
        features=rows.features[index],
        tiers=rows.tiers[index],
        groups=[rows.groups[i] for i in index],
        within=None if rows.within is None else rows.within[index],
        tier_scores=None if rows.tier_scores is None else rows.tier_scores[index],
        attention=rows.attention,
    )
