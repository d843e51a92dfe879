"""The trainer of the documented interface: batches of image pairs through the whole model.

``fit(train_loader, val_loader)`` takes batches (first images, second images, labels). With a frozen
backbone this trains the same head as ``mirip-fast train --head-only``, but pays for the backbone in every
epoch; it is here for code written against that interface and for models whose backbone is trained too.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Sized
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from mirip_fast.config import DataConfig, TrackingConfig, TrainConfig
from mirip_fast.errors import CheckpointError, TrainingError
from mirip_fast.evaluation.evaluator import PairLoader, score_pairs
from mirip_fast.models.checkpoint import load_checkpoint, save_checkpoint
from mirip_fast.models.finetuned import FINETUNED, describe_backbone
from mirip_fast.models.losses import check_pairs, pair_loss
from mirip_fast.models.ranking_model import PairwiseRankingModel
from mirip_fast.runtime import resolve_device, resolve_precision, set_seed, torch_dtype
from mirip_fast.training.optim import (
    PATIENCE,
    EarlyStopping,
    clip_gradients,
    make_optimizer,
    make_scheduler,
)
from mirip_fast.training.run_folder import BEST, LAST, Run
from mirip_fast.training.trackers import start_trackers

log = logging.getLogger(__name__)


@dataclass
class TrainingConfig:
    """Settings of :class:`Trainer`, named as in the documented interface.

    ``scheduler_t_max`` is the length of the cosine in epochs (None: ``max_epochs``); all other names are
    those of the ``train`` section of the configuration.
    """

    learning_rate: float = 1e-4
    weight_decay: float = TrainConfig.weight_decay
    batch_size: int = 32
    max_epochs: int = 100
    gradient_clip_norm: float = TrainConfig.gradient_clip_norm
    gradient_accumulation_steps: int = TrainConfig.gradient_accumulation_steps
    early_stopping_patience: int = PATIENCE
    early_stopping_min_delta: float = TrainConfig.early_stopping_min_delta
    scheduler_t_max: int | None = None
    scheduler_eta_min: float = TrainConfig.scheduler_eta_min
    warmup_steps: int = TrainConfig.warmup_steps
    checkpoint_dir: str = "./checkpoints"
    save_every_n_epochs: int = TrainConfig.save_every_n_epochs
    save_total_limit: int = TrainConfig.save_total_limit
    wandb_enabled: bool = False
    wandb_project: str = TrackingConfig.wandb_project
    wandb_run_name: str | None = None
    device: str = "auto"
    seed: int = TrainConfig.seed


class Trainer:
    """Trains a model on loaders of image pairs.

    Args:
        model: any module whose ``forward(first images, second images)`` gives two scores, [B] or [B, 1]; its
            trainable parameters are trained, by its own ``compute_loss`` where it has one.
        config: the settings.
    """

    def __init__(self, model: nn.Module, config: TrainingConfig | None = None):
        self.config = config or TrainingConfig()
        self.device = resolve_device(self.config.device)
        self.model = model.to(self.device)
        self.folder = Path(self.config.checkpoint_dir)
        train = TrainConfig(
            weight_decay=self.config.weight_decay,
            gradient_clip_norm=self.config.gradient_clip_norm,
        )
        self.optimizer = make_optimizer(self.model, train, self.config.learning_rate)
        self.stopping = EarlyStopping(
            self.config.early_stopping_patience, self.config.early_stopping_min_delta
        )
        self.epoch = 0
        self.history: list[dict[str, float]] = []
        self._resumed: dict[str, Any] | None = None
        self._image_size, self._tiers = 0, DataConfig().tier_names()

    def fit(self, train_loader: PairLoader, val_loader: PairLoader) -> list[dict[str, float]]:
        """Train until ``max_epochs`` or the patience is used up.

        Returns:
            One dict per epoch: train/loss, train/accuracy, val/loss, val/accuracy, learning_rate, epoch.

        Raises:
            TrainingError: the loss is not finite; the checkpoints saved before are good.
        """
        config = self.config
        dataset = getattr(train_loader, "dataset", None)
        self._tiers = getattr(dataset, "tier_names", self._tiers)
        batches = len(cast(Sized, train_loader))
        steps = -(-batches // config.gradient_accumulation_steps)
        scheduler = make_scheduler(
            self.optimizer,
            total_steps=steps * (config.scheduler_t_max or config.max_epochs),
            warmup_steps=config.warmup_steps,
            learning_rate=config.learning_rate,
            eta_min=config.scheduler_eta_min,
        )
        if self._resumed:
            scheduler.load_state_dict(self._resumed["scheduler_state_dict"])
            # A new schedule has put the first learning rate into the optimizer.
            self.optimizer.load_state_dict(self._resumed["optimizer_state_dict"])
            self._resumed = None
        trackers = start_trackers(
            TrackingConfig(
                report_to="wandb" if config.wandb_enabled else "none",
                wandb_project=config.wandb_project,
                wandb_run_name=config.wandb_run_name,
            ),
            self.folder.absolute(),
            asdict(config),
        )
        while self.epoch < config.max_epochs and not self.stopping.should_stop:
            started = time.monotonic()
            train_loss, train_accuracy = self._train_epoch(train_loader, scheduler)
            self.epoch += 1
            val_loss, val_accuracy = self._pass(val_loader)
            values = {
                "train/loss": train_loss,
                "train/accuracy": train_accuracy,
                "val/loss": val_loss,
                "val/accuracy": val_accuracy,
                "learning_rate": float(self.optimizer.param_groups[0]["lr"]),
                "epoch_seconds": time.monotonic() - started,
            }
            is_best = self.stopping.update(val_accuracy, self.epoch)
            self.history.append({"epoch": self.epoch, **values})
            trackers.log(values, self.epoch)
            log.info(
                "epoch %3d/%d  loss %.4f  val loss %.4f  val accuracy %.4f%s",
                self.epoch,
                config.max_epochs,
                train_loss,
                val_loss,
                val_accuracy,
                "  best" if is_best else "",
            )
            self._save(scheduler, is_best=is_best)
        best = self.folder / BEST
        trackers.finish(best if best.is_file() else None)
        return self.history

    def load_checkpoint(self, path: str | Path) -> None:
        """Go on from a checkpoint: weights, optimizer, schedule and early stopping.

        Raises:
            CheckpointError: it cannot be read, or is of another model.
        """
        checkpoint = load_checkpoint(Path(path))
        try:
            self.model.load_state_dict(checkpoint["model_state_dict"])
            self.optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
            self.stopping.load_state_dict(checkpoint["training_state"]["early_stopping"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path} does not fit this model: {error}") from error
        self.epoch = int(checkpoint["epoch"])
        self._resumed = checkpoint

    def _train_epoch(
        self, loader: PairLoader, scheduler: torch.optim.lr_scheduler.LambdaLR
    ) -> tuple[float, float]:
        # Shuffling and dropout are a function of seed and epoch: a resumed run repeats an uninterrupted one.
        set_seed(self.config.seed * 1_000_003 + self.epoch)
        self.model.train()
        accumulate = self.config.gradient_accumulation_steps
        batches = len(cast(Sized, loader))
        seen: list[tuple[float, torch.Tensor]] = []
        for i, (first, second, labels) in enumerate(loader):
            loss, margins = self._forward(first, second, labels)
            seen.append((float(loss.detach()), margins))
            if not math.isfinite(seen[-1][0]):
                raise TrainingError(
                    f"The loss became {seen[-1][0]} in epoch {self.epoch + 1}: try a smaller "
                    "learning_rate or gradient_clip_norm=1.0. The checkpoints saved before are good."
                )
            (loss / accumulate).backward()  # type: ignore[no-untyped-call]
            if (i + 1) % accumulate == 0 or i + 1 == batches:
                trainable = (p for p in self.model.parameters() if p.requires_grad)
                clip_gradients(trainable, self.config.gradient_clip_norm)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                scheduler.step()
        return _means(seen)

    @torch.inference_mode()
    def _pass(self, loader: PairLoader) -> tuple[float, float]:
        """Mean loss and accuracy over a loader, nothing learnt."""
        self.model.eval()
        seen = []
        for first, second, labels in loader:
            loss, margins = self._forward(first, second, labels)
            seen.append((float(loss), margins))
        return _means(seen)

    def _forward(
        self, first: torch.Tensor, second: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        labels, self._image_size = labels.to(self.device), int(first.shape[-1])
        with self._autocast():
            scores = score_pairs(self.model, first.to(self.device), second.to(self.device))
        score1, score2, labels = check_pairs(scores[0].float(), scores[1].float(), labels)
        # A model without a loss of its own gets the default one.
        loss = getattr(self.model, "compute_loss", pair_loss)(score1, score2, labels)
        return loss, ((score1 - score2) * labels)[labels != 0].detach()

    def _about(self) -> dict[str, Any]:
        """What ``rank`` and ``evaluate`` have to know of the model, if it is one of ours."""
        if not isinstance(self.model, PairwiseRankingModel):
            return {}
        about = self.model.describe(self._image_size, self._tiers).to_dict()
        if not self.model.freeze_backbone:
            about[FINETUNED] = describe_backbone(self.model.spec, self.model.backbone)
        return {"model": about}

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        precision = resolve_precision("auto", self.device)
        if precision != "bf16":  # fp16 would need a gradient scaler
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch_dtype(precision))

    def _save(self, scheduler: torch.optim.lr_scheduler.LambdaLR, *, is_best: bool) -> None:
        checkpoint = {
            "epoch": self.epoch,
            "model_state_dict": self.model.state_dict(),
            "optimizer_state_dict": self.optimizer.state_dict(),
            "scheduler_state_dict": scheduler.state_dict(),
            "best_accuracy": self.stopping.best,
            "config": asdict(self.config),
            **self._about(),
            "training_state": {"early_stopping": self.stopping.state_dict()},
        }
        if is_best:
            save_checkpoint(self.folder / BEST, checkpoint)
        every = self.config.save_every_n_epochs
        if every and self.epoch % every == 0:
            save_checkpoint(self.folder / f"checkpoint_epoch_{self.epoch}.pt", checkpoint)
            Run(self.folder).prune_checkpoints(self.config.save_total_limit)
        save_checkpoint(self.folder / LAST, checkpoint)


def _means(seen: list[tuple[float, torch.Tensor]]) -> tuple[float, float]:
    """Mean loss over batches, and accuracy over their pairs, of whose margins zero counts half."""
    right = sum(float((m > 0).sum() + 0.5 * (m == 0).sum()) for _, m in seen)
    pairs = sum(m.numel() for _, m in seen)
    return sum(loss for loss, _ in seen) / max(1, len(seen)), right / max(1, pairs)
