"""Training in folds: train and val are divided, each part is left out once, and the models are joined.

Folds are stratified by tier; groups and copies of one picture stay together; the test split is in none.
While a fold is left out, the others are divided once more, so that early stopping looks at a small inner
validation split and never at the fold itself.

The folds are runs of their own in ``fold_0/`` … below the run's folder, so that a finished one is kept
whatever happens to the others, and one that was trained elsewhere can be put beside them. What is trained
in a fold, a head or a head with its backbone, is the business of the caller. The plan, which image each fold
leaves out, is kept in ``folds.json``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mirip_fast.config import Config, SplitConfig
from mirip_fast.data.splits import join_units, stratify
from mirip_fast.errors import CheckpointError, ConfigError, DataError
from mirip_fast.evaluation.metrics import pairwise_accuracy
from mirip_fast.evaluation.report import Report
from mirip_fast.files import list_files, read_json, write_json
from mirip_fast.models.checkpoint import load_checkpoint
from mirip_fast.models.model_info import ModelInfo
from mirip_fast.progress import steps
from mirip_fast.ranking.finished import finish_run
from mirip_fast.ranking.graded import GradedImages, load_split, save_split
from mirip_fast.ranking.held_out import keep_references
from mirip_fast.ranking.score_model import ScoreModel, TrainedHead, save_members
from mirip_fast.ranking.scorer import load_score_model
from mirip_fast.settings import config_from_dict
from mirip_fast.text import counted
from mirip_fast.training.run_folder import BEST, FOLDS_FILE, SPLIT_FILE, Run, fold_name

log = logging.getLogger(__name__)

#: Name of the left-out fold in the split of a fold's own run.
LEFT_OUT = "held-out"

#: Share of the inner validation split where the data set's own split has none to go by.
_INNER_SHARE = 0.1


def assign_folds(images: GradedImages, folds: int, seed: int) -> NDArray[np.int64]:
    """[n] number of each image's fold, 0 … folds − 1, or −1 for images of the test split.

    Args:
        images: the graded images with their split.
        folds: K, 2 or more.
        seed: another seed gives other folds.

    Raises:
        ConfigError: ``folds`` is below 2.
        DataError: a fold would have fewer than two tiers.
    """
    if folds < 2:
        raise ConfigError(f"--folds {folds}: 2 or more are needed; 5 is usual")
    inside = np.flatnonzero([split != "test" for split in images.splits])
    fold_of = np.full(len(images), -1, dtype=np.int64)
    fold_of[inside] = 0
    # With more folds than units one is empty anyway, and dividing would take minutes.
    if folds <= len(np.unique(units_of(images)[inside])):
        fold_of[inside] = _divide(images, inside, [1 / folds] * folds, seed)
    for fold in range(folds):
        left_out = images.needed_tiers[fold_of == fold]
        if len(set(left_out.tolist())) < 2:
            raise DataError(
                f"--folds {folds}: fold {fold} would have {counted(len(left_out), 'image')} of fewer than "
                f"two tiers ({len(inside)} images of train and val are divided, groups and copies kept "
                "together). Ask for fewer folds."
            )
    sizes = np.bincount(fold_of[inside], minlength=folds)
    if sizes.max() > 2 * len(inside) / folds:
        log.warning(
            "The folds are very unequal (%s images): one group holds a large part of the data. What is "
            "measured on a fold of few images says little. If these images need not stay together, `embed` "
            "again with --group-column image_id.",
            ", ".join(map(str, sizes.tolist())),
        )
    return fold_of


def leave_out(
    images: GradedImages, fold_of: NDArray[np.int64], fold: int, split: SplitConfig
) -> GradedImages:
    """The images as one fold's run sees them: train, val (inner), the fold itself, and test.

    Args:
        images: the graded images.
        fold_of: of :func:`assign_folds`.
        fold: the one to leave out; its images get the split :data:`LEFT_OUT`.
        split: its train and val ratios say how the remaining images are divided; without val a tenth is.

    Raises:
        DataError: train or val would have fewer than two tiers.
    """
    rest = np.flatnonzero((fold_of >= 0) & (fold_of != fold))
    share = split.val_ratio / (split.train_ratio + split.val_ratio) or _INNER_SHARE
    splits = np.where(fold_of == fold, LEFT_OUT, "test").astype(object)
    # Another seed per fold: the same seed would order the same images alike in every fold.
    inner = _divide(images, rest, [1 - share, share], split.split_seed + 1 + fold)
    splits[rest] = np.where(inner == 0, "train", "val")
    for name in ("train", "val"):
        tiers = images.needed_tiers[splits == name]
        if len(set(tiers.tolist())) < 2:
            raise DataError(
                f"Without fold {fold}, the inner {name} split has {counted(len(tiers), 'image')} of fewer "
                "than two tiers: there is no pair to compare. Ask for fewer --folds or another --val-ratio."
            )
    return dataclasses.replace(images, table=images.table.assign(split=splits))


def units_of(images: GradedImages) -> NDArray[np.int64]:
    """[n] number of each image's unit: its group, joined with copies and near duplicates of its pictures."""
    near = images.table["near_group"]
    labelings: list[Sequence[Hashable | None]] = [images.groups, images.hashes, images.ids]
    if near.notna().any():
        labelings.append(near.tolist())
    return join_units(len(images), labelings)


def _divide(
    images: GradedImages, index: NDArray[np.int64], ratios: Sequence[float], seed: int
) -> NDArray[np.int64]:
    """The part of each image of ``index``."""
    part = images.subset(index)
    tiers = [part.tiers[max(tier, 0)] for tier in part.tier_codes]
    units = np.unique(units_of(images)[index], return_inverse=True)[1]
    return stratify(tiers, units.astype(np.int64), part.ids, ratios, seed)


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
        return leave_out(self.images, self.fold_of, fold, self.config.split)

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
    for fold in range(plan.folds):  # what cannot be divided is told before anything is trained
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
        DataError: it cannot be read.
    """
    path = run.path / FOLDS_FILE
    try:
        values = read_json(path)
        config = config_from_dict(values["config"])
        info = ModelInfo.from_dict(values["model"])
        fold_of = np.array(values["fold_of"], dtype=np.int64)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    images = load_split(run.path / SPLIT_FILE, info.tiers, config.data)
    return FoldsPlan(config, info, images, fold_of)


#: Trains one fold and leaves its run finished: that run, the fold's number and settings, the images with its
#: split, and the checkpoint to go on from (None: from the start).
FitFold = Callable[[Run, int, Config, GradedImages, Path | None], object]
#: [n] scores of images that a fold's model was not trained on.
ScoreFold = Callable[[ScoreModel, GradedImages], NDArray[np.floating]]


def train_folds(
    run: Run,
    plan: FoldsPlan,
    fit: FitFold,
    score: ScoreFold,
    only: Sequence[int] = (),
    *,
    first_does: Callable[[Callable[[], Any]], Any] = lambda work: work(),
    is_first: bool = True,
) -> tuple[GradedImages | None, Report | None]:
    """Train the folds that are not there yet, and join them when all are.

    Args:
        run: the run of which the folds are parts.
        plan: how the images are divided.
        fit, score: what is done in each fold.
        only: the folds to train now; none: all.
        first_does: where several processes train together, gives all of them what the first one made.
        is_first: whether this process writes files.

    Returns:
        The images with their out-of-fold scores, and how these order them; None while folds are missing.

    Raises:
        ConfigError: ``only`` names a fold that does not exist.
        CheckpointError: a fold's folder is of another division of the images.
    """
    wrong = [fold for fold in only if not 0 <= fold < plan.folds]
    if wrong:
        raise ConfigError(
            f"--only-folds {','.join(map(str, only))}: there are folds 0 to {plan.folds - 1}"
        )
    with run.in_progress() if is_first else contextlib.nullcontext():
        for number in steps(only or range(plan.folds), "folds"):
            fold = first_does(functools.partial(_prepare, run, number, plan))
            if fold is not None:
                fit(*fold)
        held_out, report = first_does(functools.partial(_join, run, plan, score))
        return held_out, report


def _prepare(
    parent: Run, number: int, plan: FoldsPlan
) -> tuple[Run, int, Config, GradedImages, Path | None] | None:
    """Make a fold's folder: what :data:`FitFold` takes, None where the fold is done."""
    run, images = run_of_fold(parent, number), plan.images_of(number)
    if _is_done(run):
        log.info("Fold %d of %d: there already", number, plan.folds)
        return None
    log.info("Fold %d of %d: %d images left out", number, plan.folds, images.splits.count(LEFT_OUT))
    config, epochs, checkpoint = plan.config_of(number, parent), 0, None
    if run.last.is_file():
        _require_same(run, images, plan.info)
        checkpoint = run.last
        content = load_checkpoint(checkpoint)
        config, epochs = config_from_dict(content["config"]), int(content["epoch"])
    if not run.path.exists():
        run.path.mkdir()
        list_files(run.path)
    run.remove_partial_files()
    run.truncate_history(epochs)
    save_split(run.path / SPLIT_FILE, images)
    about = parent.info
    kept = {key: about[key] for key in ("data", "within", "grader") if key in about}
    run.update(name=fold_name(number), mode="fold", fold=number, **kept)
    return run, number, config, images, checkpoint


def _join(run: Run, plan: FoldsPlan, score: ScoreFold) -> tuple[GradedImages | None, Report | None]:
    """Standardise each fold's model by its left-out scores, and keep all; or say what is missing."""
    missing = [f for f in range(plan.folds) if not _is_done(run_of_fold(run, f))]
    run.update(folds=plan.folds, missing_folds=missing)
    if missing:
        run.update(status="partial")
        return None, None
    scores = np.full(len(plan.images), np.nan)
    members, by_fold = [], []
    for fold in range(plan.folds):
        own = run_of_fold(run, fold)
        _require_same(own, plan.images_of(fold), plan.info)
        model = load_score_model(own.best)
        index = np.flatnonzero(plan.fold_of == fold)
        part = plan.images.subset(index)
        left_out = score(model, part).astype(np.float64)
        mean, spread = float(left_out.mean()), float(left_out.std()) or 1.0
        info = None if model.info.fingerprint == plan.info.fingerprint else model.info
        members.append(TrainedHead(model.members[0].head, mean, spread, info))
        scores[index] = (left_out - mean) / spread
        by_fold.append(pairwise_accuracy(left_out, part.needed_tiers, grades=part.grades))
    path = save_members(run.path, members, plan.info)
    inside = np.flatnonzero(plan.fold_of >= 0)
    held_out = plan.images.subset(inside).with_scores(scores[inside], "out-of-fold")
    rounds, within = plan.config.evaluate.bootstrap_rounds, plan.config.evaluate.within
    report = keep_references(load_score_model(path), held_out, within, rounds=rounds)
    assert report is not None
    write_json(run.path / "evaluation_out_of_fold.json", report.to_dict())
    finish_run(
        run, held_out, report,
        out_of_fold_pairwise_accuracy=report.pairwise_accuracy, fold_pairwise_accuracies=by_fold,
    )  # fmt: skip
    return held_out, report


def run_of_fold(run: Run, fold: int) -> Run:
    """The run of one fold, below the run with folds."""
    return Run(run.path / fold_name(fold))


def _is_done(run: Run) -> bool:
    return run.info.get("status") == "finished" and run.has(BEST)


def _require_same(run: Run, images: GradedImages, info: ModelInfo) -> None:
    """Refuse a fold that was trained on another division or on other features.

    Raises:
        CheckpointError: says what differs.
    """
    path = run.path / SPLIT_FILE
    split = load_split(path, info.tiers, config_from_dict({}).data)
    theirs = dict(zip(split.hashes, split.splits, strict=True))
    ours = dict(zip(images.hashes, images.splits, strict=True))
    if theirs != ours:
        raise CheckpointError(
            f"{path} divides the images otherwise than {run.path.parent / FOLDS_FILE}: this fold was trained "
            f"for another run. Remove {run.path} and resume, and the fold is trained anew."
        )
    checkpoint = run.best if run.best.is_file() else run.last
    trained = ModelInfo.from_dict(load_checkpoint(checkpoint)["model"])
    if (trained.fingerprint, trained.features, trained.views) != (
        info.fingerprint,
        info.features,
        info.views,
    ):
        raise CheckpointError(
            f"{checkpoint} was trained on other features than the rest of its run. Remove {run.path} and "
            "resume, and the fold is trained anew."
        )
