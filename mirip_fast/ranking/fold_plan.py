"""The plan of a run with folds: which image each fold leaves out, kept in ``folds.json``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mirip_fast.config import Config
from mirip_fast.errors import DataError
from mirip_fast.files import read_json, write_json
from mirip_fast.models.model_info import ModelInfo
from mirip_fast.ranking.folds import assign_folds, leave_out
from mirip_fast.ranking.graded import GradedImages, load_split, save_split
from mirip_fast.settings import config_from_dict
from mirip_fast.training.run_folder import FOLDS_FILE, SPLIT_FILE, Run


@dataclass(frozen=True)
class FoldsPlan:
    """Everything that a run with folds is made of.

    Attributes:
        config: its settings.
        info: what its models look at; of fine-tuned ones before they were.
        images: all graded images with their split.
        fold_of: [n], of :func:`mirip_fast.ranking.folds.assign_folds`.
    """

    config: Config
    info: ModelInfo
    images: GradedImages
    fold_of: NDArray[np.int64]

    @property
    def folds(self) -> int:
        """Number of folds."""
        return int(self.fold_of.max()) + 1

    def images_of(self, fold: int) -> GradedImages:
        """The images as the run of one fold sees them."""
        split = self.config.split
        return leave_out(
            self.images,
            self.fold_of,
            fold,
            val_share=split.val_ratio / (split.train_ratio + split.val_ratio),
            seed=split.split_seed,
        )

    def config_of(self, fold: int, run: Run) -> Config:
        """The settings of one fold's run: its own seed, so that models differ by more than their data.

        Args:
            fold: its number.
            run: the run with folds.
        """
        train = self.config.train
        own = dataclasses.replace(train, seed=train.seed + fold, folds=0)
        name = self.config.tracking.wandb_run_name or run.path.name
        tracking = dataclasses.replace(self.config.tracking, wandb_run_name=f"{name}-fold_{fold}")
        return dataclasses.replace(self.config, train=own, tracking=tracking)


def plan_folds(
    run: Run,
    config: Config,
    info: ModelInfo,
    images: GradedImages,
    fold_of: NDArray[np.int64] | None = None,
) -> FoldsPlan:
    """Divide the images and write the plan into the run's folder, which can be resumed from then on.

    Args:
        run: the run with folds.
        config: its settings.
        info: what its models look at.
        images: all graded images with their split.
        fold_of: a division that is there already; None: a new one.
    """
    if fold_of is None:
        fold_of = assign_folds(images, config.train.folds, config.split.split_seed)
    plan = FoldsPlan(config, info, images, fold_of)
    for fold in range(plan.folds):  # what can not be divided is told before anything is trained
        plan.images_of(fold)
    save_split(run.path / SPLIT_FILE, images)
    write_json(
        run.path / FOLDS_FILE,
        {"config": config.to_dict(), "model": info.to_dict(), "fold_of": fold_of.tolist()},
    )
    return plan


def load_plan(run: Run) -> FoldsPlan:
    """The plan of an earlier run.

    Raises:
        DataError: it can not be read.
    """
    path = run.path / FOLDS_FILE
    try:
        values = read_json(path)
        config = config_from_dict(values["config"])
        info = ModelInfo.from_dict(values["model"])
        fold_of = np.array(values["fold_of"], dtype=np.int64)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} can not be read: {error}") from error
    images = load_split(run.path / SPLIT_FILE, info.tiers, config.data)
    return FoldsPlan(config, info, images, fold_of)
