"""`train --head-only --folds K` as a whole: one run per fold, joined into an ensemble when all are there.

The folds are runs of their own in ``fold_0/`` … below the run's folder, so that a finished one is kept
whatever happens to the others, and one that was trained elsewhere can be put beside them.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mirip_fast.config import Config, config_from_dict
from mirip_fast.errors import CheckpointError, ConfigError, DataError
from mirip_fast.evaluation.report import Report, judge
from mirip_fast.features.store import FeatureStore, differing_fields
from mirip_fast.files import read_json, write_json
from mirip_fast.models.checkpoint import load_checkpoint
from mirip_fast.models.model_info import ModelInfo
from mirip_fast.ranking.bootstrap import write_bootstrap
from mirip_fast.ranking.fit import FitResult
from mirip_fast.ranking.folds import LEFT_OUT, assign_folds, leave_out
from mirip_fast.ranking.graded import GradedImages, load_split, save_split
from mirip_fast.ranking.head_files import Member, save_ensemble
from mirip_fast.ranking.held_out import HeldOut, save_held_out
from mirip_fast.ranking.references import write_calibration
from mirip_fast.ranking.rows import read_features
from mirip_fast.ranking.scorer import load_score_model
from mirip_fast.training.presets import choose_pace
from mirip_fast.training.run_folder import FOLDS_FILE, SPLIT_FILE, Run

log = logging.getLogger(__name__)


class FitRun(Protocol):
    """Trains one head into a run's folder."""

    def __call__(
        self,
        run: Run,
        config: Config,
        images: GradedImages,
        store: FeatureStore,
        views: Any,
        checkpoint: dict[str, Any] | None,
    ) -> FitResult:
        """Fit from the start, or go on from a checkpoint."""


@dataclass(frozen=True)
class FoldsResult:
    """What became of the folds.

    Attributes:
        folds: number of folds.
        missing: those that are not trained yet; empty when the ensemble is there.
        report: how the out-of-fold scores order the images; None while folds are missing.
        by_fold: pairwise accuracy on each fold by the head that left it out.
    """

    folds: int
    missing: tuple[int, ...]
    report: Report | None
    by_fold: tuple[float, ...]


@dataclass(frozen=True)
class FoldsPlan:
    """Everything that a run with folds is made of.

    Attributes:
        config: its settings.
        info: what its heads look at.
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

    def config_of(self, fold: int, run: Run, n_train: int) -> Config:
        """The settings of one fold's run: its own seed, so that the heads differ by more than their data."""
        train = self.config.train
        pace = choose_pace(train, n_train)
        own = dataclasses.replace(train, seed=train.seed + fold, folds=0, bootstrap=0, **vars(pace))
        name = self.config.tracking.wandb_run_name or run.path.name
        tracking = dataclasses.replace(self.config.tracking, wandb_run_name=f"{name}-fold_{fold}")
        return dataclasses.replace(self.config, train=own, tracking=tracking)


def plan_folds(
    run: Run, config: Config, images: GradedImages, store: FeatureStore, views: Any
) -> FoldsPlan:
    """Divide the images and write the plan into the run's folder, which can be resumed from then on."""
    fold_of = assign_folds(images, config.train.folds, config.split.split_seed)
    width = read_features(store, images.hashes[:1], config.head.features, views).shape[2]
    info = ModelInfo(
        fingerprint=store.fingerprint,
        embed=config.embed,
        views=tuple(views),
        features=config.head.features,
        tiers=images.manifest.tiers,
        input_dim=width,
    )
    plan = FoldsPlan(config, info, images, fold_of)
    for fold in range(plan.folds):  # what can not be divided is told before anything is trained
        plan.images_of(fold)
    save_split(run.path / SPLIT_FILE, images)
    write_json(
        run.path / FOLDS_FILE,
        {"config": config.to_dict(), "model": info.to_dict(), "fold_of": fold_of.tolist()},
    )
    return plan


def load_plan(run: Run) -> tuple[FoldsPlan, FeatureStore]:
    """The plan of an earlier run, and the store of its features.

    Raises:
        DataError: the plan can not be read.
        CheckpointError: the store is not the one it was made with.
    """
    path = run.path / FOLDS_FILE
    try:
        values = read_json(path)
        config = config_from_dict(values["config"])
        info = ModelInfo.from_dict(values["model"])
        fold_of = np.array(values["fold_of"], dtype=np.int64)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} can not be read: {error}") from error
    images = load_split(run.path / SPLIT_FILE, info.tiers, config.data)
    store = FeatureStore.open(Path(config.embed.cache_dir) / info.fingerprint_id)
    if store.fingerprint != info.fingerprint:
        raise CheckpointError(
            f"{path} does not fit {store.path} "
            f"({differing_fields(info.fingerprint, store.fingerprint)})"
        )
    return FoldsPlan(config, info, images, fold_of), store


def train_folds(
    run: Run, plan: FoldsPlan, store: FeatureStore, fit: FitRun, only: Sequence[int] = ()
) -> FoldsResult:
    """Train the folds that are not there yet, and join them when all are.

    Args:
        run: the run of which the folds are parts.
        plan: how the images are divided.
        store: their features.
        fit: trains one of them.
        only: the folds to train now; none: all.

    Raises:
        ConfigError: ``only`` names a fold that does not exist.
        CheckpointError: a fold's folder is of another division of the images.
    """
    wrong = [fold for fold in only if not 0 <= fold < plan.folds]
    if wrong:
        raise ConfigError(
            f"--only-folds {','.join(map(str, only))}: there are folds 0 to {plan.folds - 1}"
        )
    run.update(status="running")
    try:
        for fold in only or range(plan.folds):
            _train_fold(_run_of(run, fold), fold, plan, store, fit)
        missing = tuple(f for f in range(plan.folds) if not _is_done(_run_of(run, f)))
        if missing:
            run.update(status="partial", missing_folds=list(missing))
            return FoldsResult(plan.folds, missing, None, ())
        return _join(run, plan, store)
    except BaseException as error:
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        run.update(status=status, reason=str(error))
        raise


def _train_fold(run: Run, fold: int, plan: FoldsPlan, store: FeatureStore, fit: FitRun) -> None:
    images = plan.images_of(fold)
    if _is_done(run):
        log.info("Fold %d of %d: there already", fold, plan.folds)
        return
    log.info("Fold %d of %d: %d images left out", fold, plan.folds, images.splits.count(LEFT_OUT))
    config = plan.config_of(fold, Run(run.path.parent), images.splits.count("train"))
    checkpoint = None
    if run.last.is_file():
        _require_same(run, images, plan.info)
        checkpoint = load_checkpoint(run.last)
        config = config_from_dict(checkpoint["config"])
    run.path.mkdir(exist_ok=True)
    run.remove_partial_files()
    run.truncate_history(0 if checkpoint is None else int(checkpoint["epoch"]))
    save_split(run.path / SPLIT_FILE, images)
    parent = Run(run.path.parent).info
    kept = {key: parent[key] for key in ("data", "within") if key in parent}
    run.update(name=f"fold_{fold}", mode="fold", fold=fold, **kept)
    fit(run, config, images, store, plan.info.views, checkpoint)


def _join(run: Run, plan: FoldsPlan, store: FeatureStore) -> FoldsResult:
    """Standardise each fold's head by its left-out scores, and keep heads and scores."""
    scores = np.full(len(plan.images), np.nan)
    members, by_fold = [], []
    for fold in range(plan.folds):
        own = _run_of(run, fold)
        _require_same(own, plan.images_of(fold), plan.info)
        model = load_score_model(own.best)
        index = np.flatnonzero(plan.fold_of == fold)
        left_out = model.score(store, [plan.images.hashes[i] for i in index]).astype(np.float64)
        mean, spread = float(left_out.mean()), float(left_out.std()) or 1.0
        members.append(Member(model.members[0].head, mean, spread))
        scores[index] = (left_out - mean) / spread
        by_fold.append(_judge(plan, index, left_out, rounds=0).pairwise_accuracy)
    path = save_ensemble(run.path, members, plan.info)
    inside = np.flatnonzero(plan.fold_of >= 0)
    held_out = _held_out(plan.images, inside, scores[inside])
    save_held_out(run.path, held_out, plan.info.tiers)
    write_calibration(load_score_model(path), held_out, plan.images, plan.config.evaluate.within)
    if plan.config.train.bootstrap:
        write_bootstrap(run, plan.images, ("train", "val"), plan.config, plan.info, store)
    report = _judge(plan, inside, scores[inside], rounds=plan.config.evaluate.bootstrap_rounds)
    write_json(run.path / "evaluation_out_of_fold.json", report.to_dict())
    run.update(
        status="finished", missing_folds=[], out_of_fold_pairwise_accuracy=report.pairwise_accuracy
    )
    return FoldsResult(plan.folds, (), report, tuple(by_fold))


def _judge(
    plan: FoldsPlan, index: NDArray[np.int64], scores: NDArray[np.float64], *, rounds: int
) -> Report:
    part = plan.images.manifest.subset(index)
    within = plan.config.evaluate.within
    column = None if within is None else plan.images.column(within)
    return judge(
        scores,
        plan.images.tiers[index],
        tier_names=part.tiers,
        image_ids=[record.image_id for record in part.records],
        groups=[record.group for record in part.records],
        tier_scores=[record.tier_score for record in part.records],
        within=None if column is None else [column[i] for i in index],
        rounds=rounds,
    )


def _held_out(
    images: GradedImages, index: NDArray[np.int64], scores: NDArray[np.float64]
) -> HeldOut:
    records = [images.manifest.records[i] for i in index]
    return HeldOut(
        ids=[record.image_id for record in records],
        paths=[record.path for record in records],
        tiers=images.tiers[index],
        tier_scores=[record.tier_score for record in records],
        groups=[record.group for record in records],
        source="out-of-fold",
        scores=scores,
    )


def _run_of(run: Run, fold: int) -> Run:
    return Run(run.path / f"fold_{fold}")


def _is_done(run: Run) -> bool:
    return run.info.get("status") == "finished" and run.best.is_file()


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
