"""The head-only run that end-to-end training starts from, and whether it may."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirip_fast.config import Config, DataConfig, HeadConfig
from mirip_fast.errors import CheckpointError, ConfigError, RunNotFoundError
from mirip_fast.features.recipe import Recipe
from mirip_fast.features.store import differing_fields
from mirip_fast.models.checkpoint import load_checkpoint
from mirip_fast.models.model_info import ModelInfo
from mirip_fast.ranking.fold_plan import FoldsPlan, load_plan
from mirip_fast.ranking.fold_runs import run_of_fold
from mirip_fast.settings import config_from_dict
from mirip_fast.training.run_folder import BEST, Run, find_runs, run_of_checkpoint

log = logging.getLogger(__name__)

#: Fields of a fingerprint that say how features were computed and stored, not of what.
_HOW = ("precision", "store_dtype")


@dataclass(frozen=True)
class HeadRun:
    """A head-only run to start from.

    Attributes:
        run: its folder.
        checkpoint: its best one; of a run with folds that of the first.
        info: what its head looks at.
        plan: of a run with folds, how they are divided.
    """

    run: Run
    checkpoint: dict[str, Any]
    info: ModelInfo
    plan: FoldsPlan | None = None

    @property
    def heads(self) -> tuple[Path, ...]:
        """Checkpoints of the folds' heads; none without folds."""
        folds = 0 if self.plan is None else self.plan.folds
        return tuple(run_of_fold(self.run, fold).best for fold in range(folds))

    @property
    def head(self) -> HeadConfig:
        """The shape of its head."""
        head = config_from_dict(self.checkpoint["config"]).head
        return dataclasses.replace(head, features=self.info.features)

    @property
    def data(self) -> DataConfig:
        """How its data was read."""
        return config_from_dict({"data": self.run.info.get("data", {})}).data


def find_head_run(config: Config, source: Path | None) -> HeadRun | None:
    """The head-only run that ``--init-from`` names, or the newest one of the same data.

    With folds that is one with the same number of folds, whose heads have not seen what each fold leaves
    out; where there is none, a run without folds gives its split alone.

    Raises:
        RunNotFoundError: a run was named that is not there.
        CheckpointError: it is no head-only run, or has folds where none are wanted.
        ConfigError: it is on other data, or its folds are others.
    """
    wanted, folds = config.finetune.init_from, config.train.folds
    if wanted == "none":
        return None
    if wanted is None:
        found = _newest_head_run(Path(config.train.output_dir), source, folds)
        if found is None:
            log.info("No finished head-only run of this data: the head starts from random weights")
        return found
    try:
        run, path = run_of_checkpoint(Path(wanted))
    except RunNotFoundError as error:
        raise RunNotFoundError(f"--init-from {error}") from error
    if run.info.get("mode", "head-only") not in ("head-only", "folds"):
        raise CheckpointError(f"--init-from {path}: this is no run of `train --head-only`")
    _require_folds(run, folds, wanted)
    if source is not None and not _is_of(run, source):
        raise ConfigError(
            f"--init-from {wanted} is a run on {run.info.get('dataset')}, and brings its split along: "
            f"leave out {source}, or name a run on it"
        )
    return _folds_head_run(run) if folds else _head_run(run, path)


def _require_folds(run: Run, folds: int, wanted: str) -> None:
    """Refuse a head that has seen what a fold leaves out, and heads where one is wanted."""
    if run.has_folds and not folds:
        n = load_plan(run).folds
        raise CheckpointError(
            f"--init-from {wanted} is a run with {n} folds and has a head for each: add --folds {n}, or "
            "name a run without folds"
        )
    if folds and not run.has_folds:
        raise ConfigError(
            f"--init-from {wanted}: its head has learnt from images that folds leave out, so that no fold "
            f"would be judged fairly. Train `mirip-fast train --head-only --folds {folds}` and name that "
            "run, or start with --init-from none"
        )
    if folds and load_plan(run).folds != folds:
        n = load_plan(run).folds
        raise ConfigError(f"--init-from {wanted} has {n} folds, not {folds}: give --folds {n}")


def _newest_head_run(output_dir: Path, source: Path | None, folds: int) -> HeadRun | None:
    usable = [
        run
        for run in find_runs(output_dir)
        if run.info.get("status") == "finished"
        and not run.info.get("debug")
        and run.info.get("mode") in ("head-only", "folds")
        and (source is None or _is_of(run, source))
    ]
    if folds:
        divided = (run for run in usable if run.has_folds and load_plan(run).folds == folds)
        run = next(divided, None)
        if run is not None:
            return _folds_head_run(run)
    whole = next((run for run in usable if not run.has_folds and run.has(BEST)), None)
    if whole is None:
        return None
    if not folds:
        return _head_run(whole, whole.best)
    log.info(
        "The split is that of %s. Its head has seen what folds leave out, so each fold starts with a random "
        "head; after `mirip-fast train --head-only --folds %d` each would start with one of its own",
        whole.path,
        folds,
    )
    checkpoint = load_checkpoint(whole.best)
    return HeadRun(whole, checkpoint, ModelInfo.from_dict(checkpoint["model"]))


def _head_run(run: Run, path: Path) -> HeadRun:
    checkpoint = load_checkpoint(path)
    if "model" not in checkpoint:
        raise CheckpointError(f"--init-from {path}: this is no run of `train --head-only`")
    log.info("Starting from the head of %s, with its split", path)
    return HeadRun(run, checkpoint, ModelInfo.from_dict(checkpoint["model"]))


def _folds_head_run(run: Run) -> HeadRun:
    plan = load_plan(run)
    checkpoint = load_checkpoint(run_of_fold(run, 0).best)
    log.info("Starting from the heads of %s, with its split and its %d folds", run.path, plan.folds)
    return HeadRun(run, checkpoint, plan.info, plan)


def _is_of(run: Run, source: Path) -> bool:
    dataset = Path(str(run.info.get("dataset", "")))
    return source.resolve() in {dataset.resolve(), dataset.parent.resolve()}


def check_same_features(head_run: HeadRun, recipe: Recipe) -> None:
    """Refuse a head that was trained on other features than those to be fine-tuned.

    Raises:
        ConfigError: names the fields that differ, and both values.
    """
    theirs = {k: v for k, v in head_run.info.fingerprint.items() if k not in _HOW}
    ours = {k: v for k, v in recipe.fingerprint.items() if k not in _HOW}
    if theirs != ours:
        raise ConfigError(
            f"The head of {head_run.run.path} was trained on other features than asked for now "
            f"({differing_fields(theirs, ours)}). Leave these options out to take the run's, give "
            "another run with --init-from, or --init-from none for a random head."
        )
