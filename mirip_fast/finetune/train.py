"""`train --full` as a whole: find the data, join the processes, fit the model, leave a finished run."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mirip_fast.config import Config
from mirip_fast.data.images import UTMOST_PIXELS
from mirip_fast.errors import CheckpointError, ConfigError, DataError
from mirip_fast.evaluation.report import Report
from mirip_fast.features.backbone import load_model
from mirip_fast.features.backbone_files import find_backbone
from mirip_fast.features.embed import open_hashes
from mirip_fast.features.phase_one import default_workers, settings_of
from mirip_fast.features.recipe import head_kinds, make_recipe
from mirip_fast.files import format_bytes, write_text
from mirip_fast.finetune.data import Batches, Pictures, decode_all, room_in_memory
from mirip_fast.finetune.distributed import ProcessGroup, join_processes
from mirip_fast.finetune.fit import FullFit, Plan
from mirip_fast.finetune.model import ScoringModel
from mirip_fast.finetune.sources import (
    HeadRun,
    check_same_features,
    check_unchanged,
    find_images,
)
from mirip_fast.finetune.step import make_objective
from mirip_fast.finetune.strategy import learning_rates, parse_strategy, prepare_model
from mirip_fast.models.checkpoint import load_checkpoint
from mirip_fast.models.finetuned import FINETUNED, deploy, describe_backbone, head_state
from mirip_fast.models.head import RankingHead
from mirip_fast.models.model_info import ModelInfo
from mirip_fast.ranking.finished import finish_run, show_run
from mirip_fast.ranking.folds import (
    FoldsPlan,
    load_plan,
    plan_folds,
    run_of_fold,
    train_folds,
)
from mirip_fast.ranking.graded import (
    GradedImages,
    as_trial,
    choose_features,
    load_split,
    save_split,
    trial,
)
from mirip_fast.ranking.held_out import keep_references
from mirip_fast.ranking.objective import require_pairs
from mirip_fast.ranking.rows import Rows
from mirip_fast.ranking.score_model import ScoreModel, save_head
from mirip_fast.ranking.scorer import load_score_model, score_files
from mirip_fast.ranking.train import tell_agreement
from mirip_fast.runtime import keep_freed_memory, resolve_device, resolve_precision, set_seed
from mirip_fast.settings import config_from_dict, to_yaml
from mirip_fast.text import shown
from mirip_fast.training.optim import check_averaging
from mirip_fast.training.remote import RemoteSync, check_remote
from mirip_fast.training.run_folder import (
    SPLIT_FILE,
    Run,
    create_run,
    remove_runs_without_checkpoint,
    resumable_run,
)
from mirip_fast.training.trackers import parse_report_to, start_trackers

log = logging.getLogger(__name__)

#: Epochs of a run that says nothing else.
EPOCHS = 10
_BATCH, _PATIENCE = 32, 10
_MODE = "full"


def train_full(
    config: Config,
    source: Path | None = None,
    *,
    debug: bool = False,
    given: Collection[str] = (),
    only_folds: tuple[int, ...] = (),
) -> tuple[Run, Report | None]:
    """Fine-tune backbone and head on images, once or once per fold.

    Args:
        config: the settings.
        source: folder or CSV file; None takes the head-only run's, or the newest embedded one.
        debug: a trial on 100 images and two epochs, without tracking.
        given: dotted keys of the settings that were set, by YAML or on the command line.
        only_folds: with folds: those to train now; none: all.

    Raises:
        ConfigError: settings that do not go together, or folds that do not exist.
        MiripError: see :func:`mirip_fast.finetune.sources.find_images` for data and head-only run,
            :class:`mirip_fast.finetune.fit.FullFit` for training.
    """
    parse_report_to(config.tracking.report_to)
    if config.finetune.remote_sync:
        check_remote(config.finetune.remote_sync)
    if only_folds and not config.train.folds:
        raise ConfigError("--only-folds goes with --folds: say how many there are")
    if config.train.gradient_accumulation_steps > 1:
        raise ConfigError(
            "--gradient-accumulation-steps goes with --head-only: it adds up the gradients of batches that "
            "know nothing of each other's pairs. --full divides a batch with --accumulation-steps "
            f"{config.train.gradient_accumulation_steps}, and keeps all of its pairs"
        )
    with join_processes(config.runtime.device) as (group, device):
        config, images, name, head_run = group.first_does(
            lambda: find_images(source, config, given)
        )
        config = _resolved(config)
        if debug:
            config, images = as_trial(config), trial(images)
        tell_agreement(images, config)
        # What can be wrong with the settings is told before a run's folder is made.
        setup = Setup(config, images, group, resolve_device(device))
        if head_run is not None:
            check_same_features(head_run, setup.recipe)
        # Of folds it is their heads that are taken, and a trial has none that fit.
        heads = () if head_run is None or debug else head_run.heads
        taken = head_run if heads or not config.train.folds else None
        run = Run(Path(group.first_does(lambda: _new_run(config, name, images, taken, debug))))
        if not config.train.folds:
            setup.train(run, head=None if head_run is None else head_run.checkpoint)
            return run, None
        fold_of = head_run.plan.fold_of if heads and head_run and head_run.plan else None
        plan = group.first_does(lambda: plan_folds(run, config, setup.info, images, fold_of))
        return run, _train_folds(run, plan, group, setup.device, heads, only_folds)


def resume_full(
    which: str, output_dir: Path, device: str = "auto", only_folds: tuple[int, ...] = ()
) -> tuple[Run, Report | None]:
    """Go on with an interrupted run, with its own settings, split and data.

    Args:
        which: ``latest``, a run's folder or a checkpoint.
        output_dir: folder of the runs.
        device: where; the settings of the run do not bind it.
        only_folds: with folds: those to train now; none: all that are missing.

    Raises:
        RunNotFoundError: nothing to resume.
        CheckpointError: it cannot be resumed from this file.
    """
    with join_processes(device) as (group, device_name):
        run, path = resumable_run(output_dir, which, full=True)
        if run.has_folds:
            return _resume_folds(run, group, resolve_device(device_name), only_folds)
        if only_folds:
            raise ConfigError(f"--only-folds: {run.path} has no folds")
        checkpoint = load_checkpoint(path)
        if FINETUNED not in checkpoint.get("model", {}) or "training_state" not in checkpoint:
            raise CheckpointError(
                f"{path} cannot be resumed by `train --full`: give last_model.pt or a numbered "
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
        setup = Setup(config, images, group, resolve_device(device_name))
        if setup.recipe.fingerprint != info.fingerprint:
            raise CheckpointError(
                f"{path} is of another backbone or preprocessing than {setup.recipe.backbone.name}"
            )
        if group.is_first:
            run.truncate_history(int(checkpoint["epoch"]))
        setup.train(run, resumed=checkpoint)
        return run, None


def _resume_folds(
    run: Run, group: ProcessGroup, device: torch.device, only: tuple[int, ...]
) -> tuple[Run, Report | None]:
    log.info("Resuming %s, with its own settings", run.path)
    if run.info.get("mode") != _MODE:
        raise CheckpointError(
            f"{run.path} cannot be resumed by `train --full`: `mirip-fast train --head-only --resume "
            f"{run.path}` goes on with it"
        )
    plan = load_plan(run)
    check_unchanged(plan.images, Path(plan.config.embed.cache_dir))
    heads: tuple[Path, ...] = ()
    if run.info.get("init_from") is not None:
        head_run = Run(Path(run.info["init_from"]))
        heads = tuple(run_of_fold(head_run, fold).best for fold in range(plan.folds))
    return run, _train_folds(run, plan, group, device, heads, only)


class Setup:
    """Everything that is decided before a run's folder is made.

    Args:
        config: resolved: nothing in it is left to choose.
        images: with their split.
        group: the processes that take part.
        device: of this process.

    Raises:
        ConfigError: settings that do not go together.
        DataError: train or val has no pair.
    """

    def __init__(
        self, config: Config, images: GradedImages, group: ProcessGroup, device: torch.device
    ):
        self.config, self.images, self.group, self.device = config, images, group, device
        with open_hashes(Path(config.embed.cache_dir)) as hashes:
            spec = find_backbone(config.embed.backbone, hashes.sha256)
        self.recipe = make_recipe(
            config.embed, spec, resolve_precision(config.embed.precision, device)
        )
        self.strategy = parse_strategy(config.finetune, spec.num_layers)
        mixing = config.finetune.mixup > 0 or config.finetune.cutmix > 0
        if mixing and config.train.label == "tier" and images.grades is not None:
            raise ConfigError(
                "--mixup and --cutmix mix the grades of two works, of which no grader's pairs can be made: "
                "leave them out, or learn from one grader with --grader NAME"
            )
        check_averaging(config.train, config.train.epochs or EPOCHS)
        if not images.has_grades:
            raise DataError(
                "--full learns from tiers, and these images have none; judged pairs teach a head "
                "(`mirip-fast train --head-only --pairs FILE`)"
            )
        loss = make_objective(config.train)
        self.rows = {split: self._rows(split) for split in ("train", "val")}
        for split, rows in self.rows.items():
            require_pairs(rows, loss, split)

    def _rows(self, split: str) -> Rows:
        """What is known of the images of a split but their pixels."""
        labels = self.images.part(split).labels(
            self.config.evaluate.within, label=self.config.train.label
        )
        return dataclasses.replace(labels, sets=None)  # works are compared, not applicants

    @property
    def info(self) -> ModelInfo:
        """What the head looks at before the backbone has learnt anything."""
        features = self.config.head.features
        return ModelInfo(
            fingerprint=self.recipe.fingerprint,
            embed=self.config.embed,
            views=self.recipe.views,
            features=features,
            tiers=self.images.tiers,
            input_dim=self.recipe.backbone.hidden_size * len(head_kinds(features)),
        )

    def train(
        self,
        run: Run,
        *,
        head: dict[str, Any] | None = None,
        resumed: dict[str, Any] | None = None,
    ) -> None:
        """Fit into the run's folder, and leave it finished, failed or interrupted.

        Args:
            run: its folder.
            head: checkpoint of a head-only run to start from; None: a random head.
            resumed: checkpoint of this run to go on from; None: from the start.
        """
        if self.device.type == "cpu":
            keep_freed_memory()
        first, fit = self.group.is_first, None
        with contextlib.ExitStack() as ending:
            saved: Callable[[Path], None] = lambda _: None  # noqa: E731
            if first:
                ending.enter_context(run.log_to_file())
                if url := self.config.finetune.remote_sync:
                    remote = RemoteSync(url, run.place, along=run.small_files)
                    ending.callback(remote.finish)  # with the run's final status
                    saved = remote.add
                ending.enter_context(run.in_progress())
            try:
                with contextlib.ExitStack() as loading:
                    fit = self._prepared(run, head, resumed, loading)
                    fit.saved = saved
                    loading.enter_context(fit.stop_signals())
                    result = fit.run(run)
                if first:
                    show_run(fit.trackers, run, *self._finish(run, result))
                    fit.trackers.finish(run.best)
                self.group.wait()
            except BaseException:
                if first and fit is not None:
                    fit.trackers.finish(None)
                raise

    def _prepared(
        self,
        run: Run,
        head: dict[str, Any] | None,
        resumed: dict[str, Any] | None,
        ending: contextlib.ExitStack,
    ) -> FullFit:
        """The model, its optimizer and its data, whose loading ``ending`` stops."""
        config, spec, settings = self.config, self.recipe.backbone, self.config.finetune
        set_seed(config.train.seed)
        ranking_head = RankingHead(self.info.input_dim, config.head)
        if head is not None:
            ranking_head.load_state_dict(head["model_state_dict"])
        model = ScoringModel(spec, load_model(spec), ranking_head, config.head.features)
        prepare_model(model, self.strategy, settings)
        model.to(self.device)
        fit = FullFit(
            model,
            self.strategy,
            self.rows["train"],
            self._batches("train", settings.augment, ending),
            self.rows["val"],
            self._batches("val", "none", ending),
            config,
            self._plan(head is not None, resumed),
            {**self.info.to_dict(), FINETUNED: describe_backbone(spec, model.backbone)},
            group=self.group,
        )
        if resumed is not None:
            fit.resume(resumed)
        self._tell(run, fit)
        if self.group.is_first:
            fit.trackers = start_trackers(config.tracking, run.path, config.to_dict())
        return fit

    def _batches(self, split: str, preset: str, ending: contextlib.ExitStack) -> Batches:
        """Loads the images of a split, until ``ending``."""
        settings, recipe = self.config.finetune, self.recipe
        pictures = Pictures(
            self.images.part(split).paths,
            recipe.size,
            resize=recipe.resize,
            draft=recipe.decode == "fast",
            srgb=recipe.srgb,
            preset=preset,
        )
        if settings.cache_images and _fits_in_memory(pictures):
            pictures.kept = decode_all(pictures, default_workers(self.config.embed.workers))
        pinned = self.device.type == "cuda"
        return ending.enter_context(
            Batches(pictures, settings.loader_workers, settings.prefetch, pinned=pinned)
        )

    def _plan(self, has_head: bool, resumed: dict[str, Any] | None) -> Plan:
        if resumed is not None:
            kept = dict(resumed["training_state"]["plan"])
            kept.pop("cut", None)  # of older runs
            return Plan(**kept)
        train, head_epochs = self.config.train, self.config.finetune.head_epochs
        patience = train.early_stopping_patience
        return Plan(
            epochs=train.epochs or EPOCHS,
            batch_size=train.batch_size or _BATCH,
            head_epochs=(0 if has_head else 1) if head_epochs is None else head_epochs,
            patience=_PATIENCE if patience is None else patience,
            precision=self.recipe.precision,
            size=self.recipe.size,
        )

    def _tell(self, run: Run, fit: FullFit) -> None:
        base, head = learning_rates(self.config, self.strategy)
        plan, k = fit.plan, fit.parts_per_step
        log.info(
            "Run %s: %s, %d training and %d validation images, batch %d, learning rate %g (head %g), at "
            "most %d epochs%s, %s on %s",
            run.path,
            self.config.finetune.strategy,
            len(fit.train),
            len(fit.val),
            plan.batch_size,
            base,
            head,
            plan.epochs,
            f" (first {plan.head_epochs}: head only)" if plan.head_epochs else "",
            plan.precision,
            f"{self.device} × {self.group.world}" if self.group.world > 1 else self.device,
        )
        if k > 1:
            log.info(
                "Each batch in %d micro-batches: exact gradient, %d/%d of a forward pass extra",
                k,
                k - 1,
                k,
            )

    def _finish(
        self, run: Run, result: Mapping[str, Any]
    ) -> tuple[GradedImages | None, Report | None]:
        """Make of the best checkpoint what evaluating and ranking use, and learn what its scores mean."""
        content = load_checkpoint(run.best)
        info = deploy(run.best, content)
        head = {name: value.numpy() for name, value in head_state(content).items()}
        save_head(run.path, run.best, head, info)
        held_out, report = None, None
        if run.info.get("mode") != "fold":  # folds are calibrated together, on what each left out
            model = load_score_model(run.best)
            val = self.images.part("val")
            paths = val.paths
            scored = score_files(
                model, paths,
                cache_dir=Path(self.config.embed.cache_dir), device=self.device.type,
                settings=settings_of(self.config.embed, len(paths)),
            )  # fmt: skip
            held_out = val.with_scores(scored.scores, "validation")
            report = keep_references(model, held_out, self.config.evaluate.within)
        finish_run(run, held_out, report, **result)
        return held_out, report


def _fits_in_memory(pictures: Pictures) -> bool:
    """Whether decoded images can be kept; tells how much they take, and what if not."""
    n = len(pictures.paths)
    needed, room = n * pictures.side**2 * 3, room_in_memory()
    if room is None or needed <= room:
        log.info("Keeping %d decoded images in memory: %s", n, format_bytes(needed))
        return True
    log.warning(
        "--cache-images: %d decoded images take %s, and %s of memory are free: they are decoded in "
        "every epoch",
        n,
        format_bytes(needed),
        format_bytes(room),
    )
    return False


def _train_folds(
    run: Run,
    plan: FoldsPlan,
    group: ProcessGroup,
    device: torch.device,
    heads: Sequence[Path],
    only: Sequence[int],
) -> Report | None:
    """Train backbone and head per fold, and report what they are together.

    Args:
        run: the run with folds.
        plan: how its images are divided.
        group: the processes that train together.
        device: of this process.
        heads: per fold the checkpoint of a head that had not seen the fold either; none: random heads.
        only: the folds to train now; none: all.
    """

    def fit(
        own: Run, number: int, config: Config, images: GradedImages, checkpoint: Path | None
    ) -> None:
        setup = Setup(config, images, group, device)
        resumed = None if checkpoint is None else load_checkpoint(checkpoint)
        head = load_checkpoint(heads[number]) if resumed is None and heads else None
        setup.train(own, head=head, resumed=resumed)

    def score(model: ScoreModel, images: GradedImages) -> NDArray[np.floating]:
        """Through the backbone of the fold's model."""
        embed, paths = plan.config.embed, images.paths
        workers = min(len(paths), default_workers(embed.workers))
        settings = {"workers": workers, "max_pixels": UTMOST_PIXELS}  # they were admitted before
        scored = score_files(
            model, paths, cache_dir=Path(embed.cache_dir), device=device.type, settings=settings
        )
        for path, reason in zip(paths, scored.outcomes["reason"], strict=True):
            if reason is not None:
                raise DataError(f"{path}: {reason}")
        return scored.scores

    _, report = train_folds(
        run, plan, fit, score, only, first_does=group.first_does, is_first=group.is_first
    )
    if report is not None and group.is_first and (url := plan.config.finetune.remote_sync):
        # The ensemble and what was learned for it go where the checkpoints were copied.
        RemoteSync(url, run.place, along=run.small_files).finish()
    return report


def _resolved(config: Config) -> Config:
    """The settings of a run that is found again from any working folder, with features that it can learn."""
    embed, head = config.embed, config.head
    if Path(embed.backbone).expanduser().is_dir():
        folder = str(Path(embed.backbone).expanduser().resolve())
        embed = dataclasses.replace(embed, backbone=folder)
    embed = dataclasses.replace(embed, cache_dir=str(Path(embed.cache_dir)))
    # A pass through the backbone gives every kind of token.
    head = dataclasses.replace(head, features=choose_features(head.features, ("cls", "mean")))
    return dataclasses.replace(config, embed=embed, head=head)


def _new_run(
    config: Config, source: str, images: GradedImages, taken: HeadRun | None, debug: bool
) -> str:
    remove_runs_without_checkpoint(Path(config.train.output_dir))
    run = create_run(
        Path(config.train.output_dir),
        config.train.name or config.finetune.strategy.replace(":", ""),
        mode=_MODE,
        debug=debug,
        dataset=source,
        data=dataclasses.asdict(config.data),
        within=config.evaluate.within,
        grader=config.evaluate.grader,
        # Absolute, for resuming from any folder.
        init_from=None if taken is None else str(taken.run.path.resolve()),
    )
    write_text(run.path / "config.yaml", to_yaml(config))
    save_split(run.path / SPLIT_FILE, images)
    log.info("Data %s", shown(Path(source)))
    return str(run.path)
