"""Training in folds as a whole: one run per fold, joined into an ensemble when all are there.

The folds are runs of their own in ``fold_0/`` … below the run's folder, so that a finished one is kept
whatever happens to the others, and one that was trained elsewhere can be put beside them. What is trained
in a fold, a head or a head with its backbone, is the business of a :class:`FoldWork`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from mirip_fast.config import Config
from mirip_fast.errors import CheckpointError, ConfigError, PreemptedError
from mirip_fast.evaluation.report import Report, evaluate
from mirip_fast.files import list_files, write_json
from mirip_fast.models.checkpoint import load_checkpoint
from mirip_fast.models.model_info import ModelInfo
from mirip_fast.ranking.finished import draw_run
from mirip_fast.ranking.fold_plan import FoldsPlan
from mirip_fast.ranking.folds import LEFT_OUT
from mirip_fast.ranking.graded import GradedImages, load_split, save_split
from mirip_fast.ranking.head_files import Member, save_ensemble
from mirip_fast.ranking.held_out import HeldOut, save_held_out
from mirip_fast.ranking.references import write_calibration
from mirip_fast.ranking.scorer import ScoreModel, load_score_model
from mirip_fast.settings import config_from_dict
from mirip_fast.training.run_folder import BEST, FOLDS_FILE, SPLIT_FILE, Run, fold_name

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class FoldRun:
    """One fold that is to be trained now.

    Attributes:
        run: its own run.
        number: counted from 0.
        config: its settings.
        images: with the split of this fold.
        checkpoint: what to go on from; None: from the start.
    """

    run: Run
    number: int
    config: Config
    images: GradedImages
    checkpoint: Path | None


class FoldWork(Protocol):
    """What is done in each fold; where several processes train together, each has one."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes files."""

    def first_does(self, work: Callable[[], T]) -> T:
        """The result of ``work`` in every process, done by the first."""

    def fit(self, fold: FoldRun) -> object:
        """Train, and leave the fold's run finished."""

    def score(self, model: ScoreModel, images: GradedImages) -> NDArray[np.floating]:
        """[n] scores of images that a fold's model was not trained on."""

    def complete(self, run: Run, plan: FoldsPlan) -> None:
        """What remains to be done when the ensemble is there; in the first process."""


@dataclass(frozen=True)
class FoldsResult:
    """What became of the folds.

    Attributes:
        folds: number of folds.
        missing: those that are not trained yet; empty when the ensemble is there.
        report: how the out-of-fold scores order the images; None while folds are missing.
        by_fold: pairwise accuracy on each fold by the model that left it out.
    """

    folds: int
    missing: tuple[int, ...]
    report: Report | None
    by_fold: tuple[float, ...]


def train_folds(run: Run, plan: FoldsPlan, work: FoldWork, only: Sequence[int] = ()) -> FoldsResult:
    """Train the folds that are not there yet, and join them when all are.

    Args:
        run: the run of which the folds are parts.
        plan: how the images are divided.
        work: trains and scores one of them.
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
    with _status(run, work):
        for number in only or range(plan.folds):
            fold = work.first_does(functools.partial(_prepare, run, number, plan))
            if fold is not None:
                work.fit(fold)
        return work.first_does(functools.partial(_finish, run, plan, work))


@contextlib.contextmanager
def _status(run: Run, work: FoldWork) -> Iterator[None]:
    """Keep the run's status while the block works, and say why where it ends in an error."""
    if work.is_first:
        run.update(status="running")
    try:
        yield
    except BaseException as error:
        if work.is_first:
            stopped = isinstance(error, KeyboardInterrupt | PreemptedError)
            run.update(status="interrupted" if stopped else "failed", reason=str(error))
        raise


def _prepare(parent: Run, number: int, plan: FoldsPlan) -> FoldRun | None:
    """Make a fold's folder; None where the fold is done."""
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
    kept = {key: about[key] for key in ("data", "within") if key in about}
    run.update(name=fold_name(number), mode="fold", fold=number, **kept)
    return FoldRun(run, number, config, images, checkpoint)


def _finish(run: Run, plan: FoldsPlan, work: FoldWork) -> FoldsResult:
    """Join the folds, or say which are missing."""
    missing = tuple(f for f in range(plan.folds) if not _is_done(run_of_fold(run, f)))
    if missing:
        run.update(status="partial", missing_folds=list(missing))
        return FoldsResult(plan.folds, missing, None, ())
    result = _join(run, plan, work)
    assert result.report is not None
    run.update(
        status="finished",
        missing_folds=[],
        out_of_fold_pairwise_accuracy=result.report.pairwise_accuracy,
    )
    work.complete(run, plan)
    draw_run(run, plan.images, plan.config.evaluate.within)
    return result


def _join(run: Run, plan: FoldsPlan, work: FoldWork) -> FoldsResult:
    """Standardise each fold's model by its left-out scores, and keep heads and scores."""
    scores = np.full(len(plan.images), np.nan)
    members, by_fold = [], []
    for fold in range(plan.folds):
        own = run_of_fold(run, fold)
        _require_same(own, plan.images_of(fold), plan.info)
        model = load_score_model(own.best)
        index = np.flatnonzero(plan.fold_of == fold)
        left_out = work.score(model, plan.images.subset(index)).astype(np.float64)
        mean, spread = float(left_out.mean()), float(left_out.std()) or 1.0
        info = None if model.info.fingerprint == plan.info.fingerprint else model.info
        members.append(Member(model.members[0].head, mean, spread, info))
        scores[index] = (left_out - mean) / spread
        by_fold.append(_judge(plan, index, left_out, rounds=0).pairwise_accuracy)
    path = save_ensemble(run.path, members, plan.info)
    inside = np.flatnonzero(plan.fold_of >= 0)
    held_out = HeldOut.of(plan.images.subset(inside), scores[inside], "out-of-fold")
    save_held_out(run.path, held_out, plan.info.tiers)
    write_calibration(load_score_model(path), held_out, plan.images, plan.config.evaluate.within)
    report = _judge(plan, inside, scores[inside], rounds=plan.config.evaluate.bootstrap_rounds)
    write_json(run.path / "evaluation_out_of_fold.json", report.to_dict())
    return FoldsResult(plan.folds, (), report, tuple(by_fold))


def _judge(
    plan: FoldsPlan, index: NDArray[np.int64], scores: NDArray[np.float64], *, rounds: int
) -> Report:
    part = plan.images.manifest.subset(index)
    within = plan.config.evaluate.within
    column = None if within is None else plan.images.column(within)
    return evaluate(
        scores,
        plan.images.tiers[index],
        tier_names=part.tiers,
        image_ids=[record.image_id for record in part.records],
        groups=[record.group for record in part.records],
        tier_scores=[record.tier_score for record in part.records],
        within=None if column is None else [column[i] for i in index],
        rounds=rounds,
    )


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
