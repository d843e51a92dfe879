"""`train --full` as a whole: find the data, join the peers, fit the model, leave a finished run."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from mirip_fast.config import Config
from mirip_fast.data.csv_reader import shown
from mirip_fast.errors import CheckpointError, ConfigError
from mirip_fast.files import write_text
from mirip_fast.finetune.folds import FullFolds
from mirip_fast.finetune.head_runs import HeadRun, check_same_features, find_head_run
from mirip_fast.finetune.peers import Peers, peers_of_torchrun
from mirip_fast.finetune.setup import Setup, require_pairs
from mirip_fast.finetune.sources import Source, check_unchanged, source_of_data, source_of_run
from mirip_fast.models.checkpoint import load_checkpoint
from mirip_fast.models.finetuned import FINETUNED
from mirip_fast.models.model_info import ModelInfo
from mirip_fast.ranking.dataset_settings import choose_features
from mirip_fast.ranking.fit import FitResult
from mirip_fast.ranking.fold_plan import FoldsPlan, load_plan, plan_folds
from mirip_fast.ranking.fold_runs import FoldsResult, run_of_fold, train_folds
from mirip_fast.ranking.graded import GradedImages, load_split, save_split, trial
from mirip_fast.runtime import resolve_device
from mirip_fast.settings import config_from_dict, to_yaml
from mirip_fast.training.remote import check_remote
from mirip_fast.training.run_folder import (
    SPLIT_FILE,
    Run,
    create_run,
    remove_runs_without_checkpoint,
    resumable_run,
)
from mirip_fast.training.trackers import parse_report_to

log = logging.getLogger(__name__)

_TRIAL_IMAGES, _TRIAL_EPOCHS = 100, 2
_MODE = "full"


@dataclass(frozen=True)
class FullRequest:
    """What the command asks for, besides the configuration.

    Attributes:
        source: folder or CSV file; None takes the head-only run's, or the newest embedded one.
        debug: a trial on 100 images and two epochs, without tracking.
        given: dotted keys of the settings that were set, by YAML or on the command line.
        only_folds: with folds: those to train now; none: all.
    """

    source: Path | None = None
    debug: bool = False
    given: frozenset[str] = frozenset()
    only_folds: tuple[int, ...] = ()


def train_full(config: Config, request: FullRequest) -> tuple[Run, FitResult | FoldsResult]:
    """Fine-tune backbone and head on images, once or once per fold.

    Raises:
        ConfigError: settings that do not go together, or folds that do not exist.
        MiripError: see :mod:`mirip_fast.finetune.sources` for data and head-only run,
            :class:`mirip_fast.finetune.fit.FullFit` for training.
    """
    parse_report_to(config.tracking.report_to)
    if config.finetune.remote_sync:
        check_remote(config.finetune.remote_sync)
    if request.only_folds and not config.train.folds:
        raise ConfigError("--only-folds goes with --folds: say how many there are")
    if config.train.gradient_accumulation_steps > 1:
        raise ConfigError(
            "--gradient-accumulation-steps goes with --head-only: it adds up the gradients of batches that "
            "know nothing of each other's pairs. --full divides a batch with --accumulation-steps "
            f"{config.train.gradient_accumulation_steps}, and keeps all of its pairs"
        )
    if config.train.bootstrap:
        raise ConfigError(
            "--bootstrap goes with --head-only. End to end, each resample would be a fine-tuning of its own; "
            "heads on the features of one fine-tuned backbone, which has seen every work, would agree with "
            "each other more than they should. --folds K works with --full"
        )
    with peers_of_torchrun(config.runtime.device) as (peers, device), _quiet(peers):
        source = peers.first_does(lambda: _source(config, request))
        config = _resolved(config, request, source)
        images = trial(source.images, _TRIAL_IMAGES) if request.debug else source.images
        require_pairs(images)
        # What can be wrong with the settings is told before a run's folder is made.
        setup = Setup(config, images, peers, resolve_device(device))
        if source.head_run is not None:
            check_same_features(source.head_run, setup.recipe)
        run = Run(Path(peers.first_does(lambda: _new_run(config, request, source, images))))
        head_run = source.head_run
        if config.train.folds:
            divided = None if head_run is None or request.debug else head_run.plan
            fold_of = None if divided is None else divided.fold_of
            plan = peers.first_does(lambda: plan_folds(run, config, setup.info, images, fold_of))
            heads = () if head_run is None or request.debug else head_run.heads
            work = _work(plan, peers, setup.device, heads)
            return run, train_folds(run, plan, work, request.only_folds)
        head = None if head_run is None else head_run.checkpoint
        return run, setup.train(run, head=head, resumed=None)


def _work(
    plan: FoldsPlan, peers: Peers, device: torch.device, heads: tuple[Path, ...]
) -> FullFolds:
    embed = plan.config.embed
    return FullFolds(peers, device, heads, Path(embed.cache_dir), embed.workers)


def _resume_folds(
    run: Run, peers: Peers, device: torch.device, only: tuple[int, ...]
) -> tuple[Run, FoldsResult]:
    log.info("Resuming %s, with its own settings", run.path)
    if run.info.get("mode") != _MODE:
        raise CheckpointError(
            f"{run.path} can not be resumed by `train --full`: `mirip-fast train --head-only --resume "
            f"{run.path}` goes on with it"
        )
    plan = load_plan(run)
    check_unchanged(plan.images, Path(plan.config.embed.cache_dir))
    started = run.info.get("init_from")
    heads = (
        ()
        if started is None
        else tuple(run_of_fold(Run(Path(started)), fold).best for fold in range(plan.folds))
    )
    return run, train_folds(run, plan, _work(plan, peers, device, heads), only)


def resume_full(
    which: str, output_dir: Path, device: str = "auto", only_folds: tuple[int, ...] = ()
) -> tuple[Run, FitResult | FoldsResult]:
    """Go on with an interrupted run, with its own settings, split and data.

    Args:
        which: ``latest``, a run's folder or a checkpoint.
        output_dir: folder of the runs.
        device: where; the settings of the run do not bind it.
        only_folds: with folds: those to train now; none: all that are missing.

    Raises:
        RunNotFoundError: nothing to resume.
        CheckpointError: it can not be resumed from this file.
    """
    with peers_of_torchrun(device) as (peers, device_name), _quiet(peers):
        run, path = resumable_run(output_dir, which, full=True)
        if run.has_folds:
            return _resume_folds(run, peers, resolve_device(device_name), only_folds)
        if only_folds:
            raise ConfigError(f"--only-folds: {run.path} has no folds")
        checkpoint = load_checkpoint(path)
        if FINETUNED not in checkpoint.get("model", {}) or "training_state" not in checkpoint:
            raise CheckpointError(
                f"{path} can not be resumed by `train --full`: give last_model.pt or a numbered "
                "checkpoint of such a run (the best one is for use, without the optimizer)"
            )
        config = config_from_dict(checkpoint["config"])
        info = ModelInfo.from_dict(checkpoint["model"])
        progress = checkpoint["training_state"]["progress"]
        log.info(
            "Resuming %s after epoch %d%s, with its own settings",
            run.path,
            checkpoint["epoch"],
            f" and {progress['steps']} steps" if progress["steps"] else "",
        )
        images = load_split(run.path / SPLIT_FILE, info.tiers, config.data)
        check_unchanged(images, Path(config.embed.cache_dir))
        setup = Setup(config, images, peers, resolve_device(device_name))
        if setup.recipe.fingerprint != info.fingerprint:
            raise CheckpointError(
                f"{path} is of another backbone or preprocessing than {setup.recipe.backbone.name}"
            )
        if peers.is_first:
            run.truncate_history(int(checkpoint["epoch"]))
        return run, setup.train(run, head=None, resumed=checkpoint)


def _source(config: Config, request: FullRequest) -> Source:
    head_run = find_head_run(config, request.source)
    if head_run is not None:
        return source_of_run(head_run, config)
    return source_of_data(request.source, config)


def _resolved(config: Config, request: FullRequest, source: Source) -> Config:
    """The configuration of the run: what the user set, over what the head-only run brings."""
    embed, head = config.embed, config.head
    if source.head_run is not None:
        config = _with_split(config, request, source.head_run)
        own = {k.partition(".")[2] for k in request.given if k.startswith("embed.")}
        embed = dataclasses.replace(source.embed, **{k: getattr(config.embed, k) for k in own})
        head = source.head_run.head
        shape = [k for k in request.given if k.startswith("head.") and "dropout" not in k]
        for key in shape:
            name = key.partition(".")[2]
            if getattr(config.head, name) not in (getattr(head, name), "auto"):
                raise ConfigError(
                    f"head.{name}: the head of {source.head_run.run.path} has "
                    f"{getattr(head, name)}; leave it out, or start with --init-from none"
                )
        if "head.projector_dropout" in request.given:
            head = dataclasses.replace(head, projector_dropout=config.head.projector_dropout)
    if Path(embed.backbone).expanduser().is_dir():  # found again from any working folder
        folder = str(Path(embed.backbone).expanduser().resolve())
        embed = dataclasses.replace(embed, backbone=folder)
    embed = dataclasses.replace(embed, cache_dir=str(Path(config.embed.cache_dir)))
    # A pass through the backbone gives every kind of token.
    head = dataclasses.replace(head, features=choose_features(head.features, ("cls", "mean")))
    config = dataclasses.replace(config, data=source.data, embed=embed, head=head)
    if request.debug:
        train = dataclasses.replace(config.train, epochs=_TRIAL_EPOCHS)
        tracking = dataclasses.replace(config.tracking, report_to="none")
        log.info("Trial: %d images, %d epochs, no tracking", _TRIAL_IMAGES, _TRIAL_EPOCHS)
        config = dataclasses.replace(config, train=train, tracking=tracking)
    return config


def _with_split(config: Config, request: FullRequest, head_run: HeadRun) -> Config:
    """The configuration with the split section of the head-only run, whose split is taken.

    Raises:
        ConfigError: another split was asked for.
    """
    own = config_from_dict(head_run.checkpoint["config"]).split
    asked = [key.partition(".")[2] for key in request.given if key.startswith("split.")]
    wrong = [name for name in asked if getattr(config.split, name) != getattr(own, name)]
    if wrong:
        raise ConfigError(
            f"{', '.join(f'split.{name}' for name in sorted(wrong))}: {head_run.run.path} brings its own "
            "split along; leave it out, or start with --init-from none"
        )
    return dataclasses.replace(config, split=own)


def _new_run(config: Config, request: FullRequest, source: Source, images: GradedImages) -> str:
    remove_runs_without_checkpoint(Path(config.train.output_dir))
    run = create_run(
        Path(config.train.output_dir),
        config.train.name or config.finetune.strategy.replace(":", ""),
        mode=_MODE,
        debug=request.debug,
        dataset=source.name,
        data=dataclasses.asdict(source.data),
        within=config.evaluate.within,
        init_from=_init_from(config, request, source),
    )
    write_text(run.path / "config.yaml", to_yaml(config))
    save_split(run.path / SPLIT_FILE, images)
    log.info("Data %s", shown(Path(source.name)))
    return str(run.path)


def _init_from(config: Config, request: FullRequest, source: Source) -> str | None:
    """The run whose head, or heads, are taken; absolute, for resuming from any folder."""
    head_run = source.head_run
    taken = head_run is not None and (
        not config.train.folds or (bool(head_run.heads) and not request.debug)
    )
    return str(head_run.run.path.resolve()) if head_run is not None and taken else None


@contextlib.contextmanager
def _quiet(peers: Peers) -> Iterator[None]:
    """Inside, only the first process tells what is going on; warnings are everyone's."""
    package = logging.getLogger("mirip_fast")
    level = package.level
    if not peers.is_first:
        package.setLevel(logging.ERROR)
    try:
        yield
    finally:
        package.setLevel(level)
