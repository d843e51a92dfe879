"""An end-to-end run from its settings and images: model, data, loop, and what is left behind."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mirip_fast.config import Config
from mirip_fast.errors import DataError, PreemptedError
from mirip_fast.evaluation.metrics import codes_of
from mirip_fast.features.backbone import load_model
from mirip_fast.features.backbone_files import find_backbone
from mirip_fast.features.command import default_workers, settings_of
from mirip_fast.features.phase_one import open_hashes
from mirip_fast.features.pooling import head_kinds
from mirip_fast.features.recipe import Recipe, make_recipe
from mirip_fast.files import format_bytes
from mirip_fast.finetune.anatomy import checkpoint_blocks
from mirip_fast.finetune.fit import FullFit
from mirip_fast.finetune.fit_parts import Graded, Hooks, Plan
from mirip_fast.finetune.loader import Batches, Pictures, decode_all
from mirip_fast.finetune.memory import room_in_memory
from mirip_fast.finetune.model import ScoringModel
from mirip_fast.finetune.noise import add_patch_dropout, add_stochastic_depth
from mirip_fast.finetune.peers import Peers
from mirip_fast.finetune.prefix import Prefix, check_prefix
from mirip_fast.finetune.stop_signals import stop_signals
from mirip_fast.finetune.strategy import Strategy, learning_rates, parse_strategy, prepare_model
from mirip_fast.models.checkpoint import load_checkpoint
from mirip_fast.models.finetuned import FINETUNED, deploy, describe_backbone, head_state
from mirip_fast.models.head import RankingHead
from mirip_fast.models.model_info import ModelInfo
from mirip_fast.ranking.finished import finish_run
from mirip_fast.ranking.fit import FitResult
from mirip_fast.ranking.graded import GradedImages, pairable
from mirip_fast.ranking.head_files import save_head
from mirip_fast.ranking.references import write_references_of_scores
from mirip_fast.ranking.scorer import load_score_model, score_files
from mirip_fast.runtime import keep_freed_memory, resolve_precision, set_seed
from mirip_fast.training.averaging import check_averaging
from mirip_fast.training.remote import RemoteSync
from mirip_fast.training.run_folder import Run
from mirip_fast.training.trackers import start_trackers

log = logging.getLogger(__name__)

#: Epochs of a run that says nothing else.
EPOCHS = 10
_BATCH, _PATIENCE = 32, 10


class Setup:
    """Everything that is decided before a run's folder is made.

    Args:
        config: resolved: nothing in it is left to choose.
        images: with their split.
        peers: who takes part.
        device: of this process.
    """

    def __init__(self, config: Config, images: GradedImages, peers: Peers, device: torch.device):
        self.config, self.images, self.peers, self.device = config, images, peers, device
        with open_hashes(Path(config.embed.cache_dir)) as hashes:
            spec = find_backbone(config.embed.backbone, hashes.sha256)
        precision = resolve_precision(config.embed.precision, device)
        self.recipe: Recipe = make_recipe(config.embed, spec, precision)
        self.strategy: Strategy = parse_strategy(config.finetune, spec.num_layers)
        check_averaging(config.train, config.train.epochs or EPOCHS)
        if config.finetune.cache_prefix:
            check_prefix(config.finetune, self.strategy)

    def train(
        self, run: Run, *, head: dict[str, Any] | None, resumed: dict[str, Any] | None
    ) -> FitResult:
        """Fit into the run's folder, and leave it finished, failed or interrupted."""
        if self.device.type == "cpu":
            keep_freed_memory()
        hooks = Hooks()
        ending = contextlib.ExitStack()
        if self.peers.is_first:
            run.update(status="running")
            ending.enter_context(run.log_to_file())
            if self.config.finetune.remote_sync:
                remote = RemoteSync(
                    self.config.finetune.remote_sync, run.place, along=run.small_files
                )
                hooks.saved = remote.add
                ending.callback(remote.finish)  # with the run's final status
        try:
            result = self._fit(run, hooks, head, resumed)
            if self.peers.is_first:
                self._finish(run, result)
                hooks.trackers.finish(run.best)
            self.peers.wait()
        except BaseException as error:
            if self.peers.is_first:
                ended = isinstance(error, KeyboardInterrupt | PreemptedError)
                run.update(status="interrupted" if ended else "failed", reason=str(error))
                hooks.trackers.finish(None)
            raise
        finally:
            ending.close()
        return result

    def _finish(self, run: Run, result: FitResult) -> None:
        """Make of the best checkpoint what evaluating and ranking use, and learn what its scores mean."""
        content = load_checkpoint(run.best)
        info = deploy(run.best, content)
        head = {name: value.numpy() for name, value in head_state(content).items()}
        save_head(run.path, run.best, head, info)
        if run.info.get("mode") != "fold":  # folds are calibrated together, on what each left out
            self._write_references(run)
        finish_run(run, result, self.images, self.config.evaluate.within)

    def _write_references(self, run: Run) -> None:
        model = load_score_model(run.best)
        paths = [record.path for record in self.images.part("val").manifest.records]
        scored = score_files(
            model, paths,
            cache_dir=Path(self.config.embed.cache_dir), device=self.device.type,
            settings=settings_of(self.config.embed, len(paths)),
        )  # fmt: skip
        write_references_of_scores(model, self.images, scored.scores, self.config.evaluate.within)

    @property
    def info(self) -> ModelInfo:
        """What the head looks at before the backbone has learnt anything."""
        features = self.config.head.features
        return ModelInfo(
            fingerprint=self.recipe.fingerprint,
            embed=self.config.embed,
            views=self.recipe.views,
            features=features,
            tiers=self.images.manifest.tiers,
            input_dim=self.recipe.backbone.hidden_size * len(head_kinds(features)),
        )

    def _fit(
        self,
        run: Run,
        hooks: Hooks,
        head: dict[str, Any] | None,
        resumed: dict[str, Any] | None,
    ) -> FitResult:
        with contextlib.ExitStack() as ending:
            fit = self._prepared(run, hooks, head, resumed, ending)
            ending.enter_context(stop_signals(hooks.stop))
            return fit.run(run)

    def _prepared(
        self,
        run: Run,
        hooks: Hooks,
        head: dict[str, Any] | None,
        resumed: dict[str, Any] | None,
        ending: contextlib.ExitStack,
    ) -> FullFit:
        """The model, its optimizer and its data; ``ending`` lets go of what they need while it runs."""
        config = self.config
        model = self._model(head)
        train, val, hooks.waited = self._data(model, ending)
        described = describe_backbone(self.recipe.backbone, model.backbone)
        fit = FullFit(
            model,
            self.strategy,
            train,
            val,
            config,
            self._plan(head is not None, resumed),
            {**self.info.to_dict(), FINETUNED: described},
            peers=self.peers,
            hooks=hooks,
        )
        if resumed is not None:
            fit.resume(resumed)
        self._tell(run, fit)
        if self.peers.is_first:
            hooks.trackers = start_trackers(config.tracking, run.path, config.to_dict())
        return fit

    def _model(self, head: dict[str, Any] | None) -> ScoringModel:
        config, spec = self.config, self.recipe.backbone
        set_seed(config.train.seed)
        ranking_head = RankingHead(self.info.input_dim, config.head)
        if head is not None:
            ranking_head.load_state_dict(head["model_state_dict"])
        model = ScoringModel(spec, load_model(spec), ranking_head, config.head.features)
        settings = config.finetune
        prepare_model(model, self.strategy, settings)
        add_stochastic_depth(model.anatomy, settings.stochastic_depth)
        add_patch_dropout(model, model.anatomy, settings.patch_dropout, model.skipped)
        if settings.gradient_checkpointing:
            checkpoint_blocks(model.anatomy)
        return model.to(self.device)

    def _data(
        self, model: ScoringModel, ending: contextlib.ExitStack
    ) -> tuple[Graded, Graded, Any]:
        """Train and val, and how long their loading was waited for."""
        parts = [self.images.part(split) for split in ("train", "val")]
        workers = default_workers(self.config.embed.workers)
        if self.config.finetune.cache_prefix:
            cut = len(model.anatomy.blocks) - self.strategy.blocks
            prefix = Prefix(model, cut, self.recipe, Path(self.config.embed.cache_dir))
            together = [*parts[0].manifest.records, *parts[1].manifest.records]
            hashes = [*parts[0].hashes, *parts[1].hashes]
            paths = [record.path for record in together]
            self.peers.first_does(lambda: prefix.fill(paths, hashes, workers))
            prefix.store.refresh()
            train, val = (self._graded(part, _of_prefix(prefix, part.hashes)) for part in parts)
            return train, val, lambda: prefix.waited
        batches = [
            ending.enter_context(self._batches(part, augmented))
            for part, augmented in zip(parts, (True, False), strict=True)
        ]
        train, val = (
            self._graded(part, batch.load) for part, batch in zip(parts, batches, strict=True)
        )
        return train, val, lambda: batches[0].waited

    def _batches(self, part: GradedImages, augmented: bool) -> Batches:
        settings, recipe = self.config.finetune, self.recipe
        pictures = Pictures(
            [record.path for record in part.manifest.records],
            recipe.size,
            resize=recipe.resize,
            draft=recipe.decode == "fast",
            preset=settings.augment if augmented else "none",
        )
        if settings.cache_images and _fits_in_memory(pictures):
            pictures.kept = decode_all(pictures, default_workers(self.config.embed.workers))
        return Batches(
            pictures,
            workers=settings.loader_workers,
            prefetch=settings.prefetch,
            pinned=self.device.type == "cuda",
        )

    def _graded(self, part: GradedImages, load: Any) -> Graded:
        within = self.config.evaluate.within
        codes = None if within is None else pairable(codes_of(part.column(within)))
        groups = [record.group for record in part.manifest.records]
        by_tier = self.config.train.label == "tier"
        grades = -part.tiers.astype(np.float64) if by_tier else part.tier_scores
        return Graded(part.tiers, grades, groups, codes, load)

    def _plan(self, has_head: bool, resumed: dict[str, Any] | None) -> Plan:
        if resumed is not None:
            return Plan(**resumed["training_state"]["plan"])
        train, settings = self.config.train, self.config.finetune
        head_epochs = settings.head_epochs
        patience = train.early_stopping_patience
        cut = self.recipe.backbone.num_layers - self.strategy.blocks
        return Plan(
            epochs=train.epochs or EPOCHS,
            batch_size=train.batch_size or _BATCH,
            head_epochs=(0 if has_head else 1) if head_epochs is None else head_epochs,
            patience=_PATIENCE if patience is None else patience,
            precision=self.recipe.precision,
            size=self.recipe.size,
            cut=cut if settings.cache_prefix else None,
        )

    def _tell(self, run: Run, fit: FullFit) -> None:
        base, head = learning_rates(self.config, self.strategy)
        plan = fit.plan
        log.info(
            "Run %s: %s, %d training and %d validation images, batch %d, learning rate %g (head %g), at "
            "most %d epochs%s, %s on %s",
            run.path,
            self.config.finetune.strategy,
            len(fit.train.tiers),
            len(fit.val.tiers),
            plan.batch_size,
            base,
            head,
            plan.epochs,
            f" (first {plan.head_epochs}: head only)" if plan.head_epochs else "",
            plan.precision,
            f"{self.device} × {self.peers.world}" if self.peers.world > 1 else self.device,
        )
        if fit.parts_per_step > 1:
            k = fit.parts_per_step
            log.info(
                "Each batch in %d micro-batches: exact gradient, %d/%d of a forward pass extra",
                k,
                k - 1,
                k,
            )


def _of_prefix(prefix: Prefix, hashes: Sequence[bytes]) -> Any:
    return lambda lists: prefix.load(hashes, lists)


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


def require_pairs(images: GradedImages) -> None:
    """Refuse splits that nothing can be learnt from or judged by.

    Raises:
        DataError: train or val has no pair of different tiers.
    """
    if not images.manifest.has_grades:
        raise DataError(
            "--full learns from tiers, and these images have none; judged pairs teach a head "
            "(`mirip-fast train --head-only --pairs FILE`)"
        )
    for split in ("train", "val"):
        part = images.part(split)
        if len(set(part.tiers.tolist())) < 2:
            raise DataError(
                f"The {split} split has {len(part)} images of fewer than two tiers: there is no pair to "
                "compare. More graded images are needed, or another --val-ratio."
            )
