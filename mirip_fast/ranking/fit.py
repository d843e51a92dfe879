"""The head-only training loop: cached features in memory, every epoch in one pass over them."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import time
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from mirip_fast.config import Config
from mirip_fast.errors import CheckpointError, TrainingError
from mirip_fast.models.checkpoint import save_checkpoint
from mirip_fast.models.head import RankingHead
from mirip_fast.ranking.graded import GradedImages
from mirip_fast.ranking.objective import DeviceRows, Objective, epoch_generator
from mirip_fast.ranking.rows import Rows
from mirip_fast.runtime import cpu_threads, set_seed
from mirip_fast.training.optim import (
    Averaging,
    EarlyStopping,
    Preset,
    choose_patience,
    choose_preset,
    clip_gradients,
    make_optimizer,
    make_scheduler,
)
from mirip_fast.training.run_folder import Run
from mirip_fast.training.trackers import Trackers

log = logging.getLogger(__name__)

# Small batches gain little from more threads, and lose by threads that wait for each other where other
# programs are busy; one thread also gives the same numbers on machines with other core counts.
_ONE_THREAD_BATCH = 128
_TRAIN_SAMPLE = 2_048  # training images that the training accuracy is taken from
# Epochs of a few hundred images take less time than a checkpoint that is safe on the disk. What a kill
# loses is computed again, to the last bit.
_SAVE_SECONDS = 1.0


class HeadFit:
    """A head, its optimizer and its data; :meth:`run` trains it.

    Args:
        train: rows to learn from.
        val: rows that choose the best epoch.
        config: every setting; written into the checkpoints.
        preset: batch size, learning rate and epochs.
        model_info: what the head expects of its input; written into the checkpoints.
        device: where to train.
        joined: works in judged pairs that are learned beside ``train``'s grades; each pair weighs as much as
            a graded work.

    Raises:
        ConfigError: settings that do not go together.
    """

    def __init__(
        self,
        train: Rows,
        val: Rows,
        config: Config,
        preset: Preset,
        model_info: dict[str, Any],
        device: torch.device,
        joined: Rows | None = None,
    ):
        set_seed(config.train.seed)
        settings = config.train
        self.config, self.preset, self.model_info, self.device = config, preset, model_info, device
        self.objective = Objective(settings, train)
        self.train, self.val = DeviceRows.of(train, device), DeviceRows.of(val, device)
        self._joined = None if joined is None else DeviceRows.of(joined, device)
        self._train_sample = self.train.sample(_TRAIN_SAMPLE, settings.seed)
        self.head = RankingHead(train.input_dim, config.head, train.attention).to(device)
        self.averaging = Averaging(
            self.head, ema_decay=settings.ema_decay, swa_start=settings.swa_start
        )
        self._parameters = list(self.head.parameters())
        self.optimizer = make_optimizer(self.head, settings, preset.learning_rate)
        batches = max(1, -(-self.objective.units // preset.batch_size))
        self.steps_per_epoch = -(-batches // settings.gradient_accumulation_steps)
        self.scheduler = make_scheduler(
            self.optimizer,
            total_steps=preset.epochs * self.steps_per_epoch,
            warmup_steps=settings.warmup_steps,
            learning_rate=preset.learning_rate,
            eta_min=settings.scheduler_eta_min,
            hold_from=(settings.swa_start - 1) * self.steps_per_epoch
            if settings.swa_start
            else None,
        )
        self.stopping = EarlyStopping(
            choose_patience(settings, self.steps_per_epoch), settings.early_stopping_min_delta
        )
        self.epoch = 0  # finished epochs
        # The checkpoints of the best and of the last epoch, until they are saved.
        self.best: dict[str, Any] | None = None
        self._last: dict[str, Any] | None = None
        self._saved_at = -math.inf

    def run(self, run: Run | None, trackers: Trackers) -> dict[str, Any]:
        """Train until the epochs or the patience are used up.

        Args:
            run: what to save into; None: nothing is saved, ``best`` is the best epoch's checkpoint.
            trackers: are told of each epoch.

        Returns:
            How it ended, as run.json says it: ``epochs``, ``best_epoch``, its ``val_pairwise_accuracy``,
            whether it ``stopped_early``, and ``seconds``.

        Raises:
            TrainingError: the loss is not finite; the last good checkpoint stays.
            DiskFullError: no room for a checkpoint; the previous ones stay whole.
        """
        small = self.device.type == "cpu" and self.preset.batch_size <= _ONE_THREAD_BATCH
        with cpu_threads(1 if small else None):
            try:
                return self._run(run, trackers)
            except BaseException:  # Ctrl-C, a loss that is not finite: what was reached is kept
                if run is not None:
                    with contextlib.suppress(OSError):  # a full disk, which is told already
                        self._flush(run)
                raise

    def _run(self, run: Run | None, trackers: Trackers) -> dict[str, Any]:
        started = time.monotonic()
        while not self._done:
            epoch_started = time.monotonic()
            train_loss = self._train_epoch(self.epoch + 1)
            self.epoch += 1
            self.averaging.after_epoch(self.epoch)
            judged = cast(RankingHead, self.averaging.kept)
            val = self._judge("val", judged, self.val)
            is_best = self.stopping.update(val["val/accuracy"], self.epoch)
            if self.epoch == self.config.train.swa_start:
                self.stopping.waited = 0  # the average is a new start
            if run is None:  # nobody is told how the training images are ordered
                self.best = copy.deepcopy(self.checkpoint()) if is_best else self.best
                continue
            values = {
                **self._judge("train", judged, self._train_sample),
                "train/loss": train_loss,  # of the whole epoch, and not of the sample
                **val,
                "learning_rate": float(self.optimizer.param_groups[0]["lr"]),
                "epoch_seconds": time.monotonic() - epoch_started,
            }
            run.append_history({"epoch": self.epoch, **values})
            trackers.log(values, self.epoch)
            self._log(values, is_best)
            self._save(run, is_best)
        return {
            "epochs": self.epoch,
            "best_epoch": self.stopping.best_epoch,
            "val_pairwise_accuracy": self.stopping.best,
            "stopped_early": self.epoch < self.preset.epochs,
            "seconds": time.monotonic() - started,
        }

    @property
    def _done(self) -> bool:
        if self.epoch >= self.preset.epochs:
            return True
        return self.stopping.should_stop and self.epoch >= self.config.train.swa_start

    def _log(self, values: Mapping[str, float], is_best: bool) -> None:
        of_tiers = values.get("val/tier_accuracy")
        log.info(
            "epoch %3d/%d  loss %.4f  accuracy %.4f  val loss %.4f  val accuracy %.4f%s%s",
            self.epoch,
            self.preset.epochs,
            *(
                values[f"{split}/{what}"]
                for split in ("train", "val")
                for what in ("loss", "accuracy")
            ),
            "" if of_tiers is None else f" (of tiers {of_tiers:.4f})",
            "  best" if is_best else "",
        )

    def _save(self, run: Run, is_best: bool) -> None:
        """Write the checkpoints that are due."""
        self._last = copy.deepcopy(self.checkpoint())
        if is_best:
            self.best = self._last
        every = self.config.train.save_every_n_epochs
        if every and self.epoch % every == 0:
            save_checkpoint(run.path / f"checkpoint_epoch_{self.epoch}.pt", self._last)
            run.prune_checkpoints(self.config.train.save_total_limit)
        if self._done or time.monotonic() - self._saved_at >= _SAVE_SECONDS:
            self._flush(run)

    def _flush(self, run: Run) -> None:
        """Save the epochs that are not yet; the last one at the end, as resuming starts from it."""
        run.sync_history()
        if self.best is not None:
            save_checkpoint(run.best, self.best)
            self.best = None
        if self._last is not None:
            save_checkpoint(run.last, self._last)
            self._last = None
        self._saved_at = time.monotonic()

    def _train_epoch(self, epoch: int) -> float:
        """One pass over the training rows; returns the mean loss."""
        # Dropout, too, is a function of seed and epoch: a resumed run repeats an uninterrupted one.
        torch.manual_seed(self.config.train.seed * 1_000_003 + epoch)
        rng = epoch_generator(self.config.train.seed, epoch)
        accumulate = self.config.train.gradient_accumulation_steps
        self.head.train()
        losses = []
        batches = self.objective.batches(self.preset.batch_size, rng)
        for i, batch in enumerate(batches):
            loss = self.objective.batch_loss(self.head, self.train, batch, rng)
            if self._joined is not None and self._joined.pairs is not None:
                weights = self._joined.pairs[2]
                some = rng.permutation(len(weights))[: self.preset.batch_size]
                judged = self.objective.batch_loss(self.head, self._joined, some, rng)
                share = float(weights.sum()) / (float(weights.sum()) + self.objective.units)
                loss = (1 - share) * loss + share * judged
            losses.append(float(loss.detach()))
            self._require_finite(losses[-1], epoch)
            together = min(accumulate, len(batches) - i // accumulate * accumulate)
            (loss / together).backward()  # type: ignore[no-untyped-call]
            if (i + 1) % accumulate == 0 or i + 1 == len(batches):
                clip_gradients(self._parameters, self.config.train.gradient_clip_norm)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                self.scheduler.step()
                self.averaging.after_step()
        return float(np.mean(losses))

    def _judge(self, split: str, head: RankingHead, rows: DeviceRows) -> dict[str, float]:
        """Loss and accuracies of rows, under the names of the history."""
        loss, accuracy, of_tiers = self.objective.judge(head, rows)
        self._require_finite(loss, self.epoch)
        values = {f"{split}/loss": loss, f"{split}/accuracy": accuracy}
        return values if of_tiers is None else {**values, f"{split}/tier_accuracy": of_tiers}

    def _require_finite(self, loss: float, epoch: int) -> None:
        if not math.isfinite(loss):
            raise TrainingError(
                f"The loss became {loss} in epoch {epoch}. Likely causes: a learning rate that is too "
                f"high (--learning-rate, now {self.preset.learning_rate:g}), no gradient clipping "
                "(--gradient-clip-norm 1), or features that are not finite (`mirip-fast cache "
                "verify`). The checkpoints saved before are good."
            )

    def checkpoint(self) -> dict[str, Any]:
        """The documented checkpoint, with what resuming needs; its weights are those that were judged."""
        return {
            "epoch": self.epoch,
            "model_state_dict": self.averaging.kept.state_dict(),
            "optimizer_state_dict": self.optimizer.state_dict(),
            "scheduler_state_dict": self.scheduler.state_dict(),
            "best_accuracy": self.stopping.best,
            "config": self.config.to_dict(),
            "model": self.model_info,
            "training_state": {
                "early_stopping": self.stopping.state_dict(),
                "rng_state": torch.get_rng_state(),
                "pace": vars(self.preset),
                "averaging": self.averaging.state_dict(),
            },
        }

    def resume(self, checkpoint: dict[str, Any]) -> None:
        """Go on after the epoch of ``checkpoint``.

        Raises:
            CheckpointError: it is of another model.
        """
        try:
            state = checkpoint["training_state"]
            self.averaging.load_state_dict(checkpoint["model_state_dict"], state.get("averaging"))
            self.optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
            self.scheduler.load_state_dict(checkpoint["scheduler_state_dict"])
            self.stopping.load_state_dict(state["early_stopping"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"the checkpoint does not fit this run: {error}") from error
        self.epoch = int(checkpoint["epoch"])


def fit_quietly(
    rows: Rows, fold: GradedImages, config: Config, device: torch.device
) -> tuple[dict[str, NDArray[np.float32]] | None, int]:
    """A head that is kept in memory: the arrays of its best epoch, None where the loss was not finite, and
    that epoch's number.

    Args:
        rows: the images' features and labels.
        fold: the same images; those of train are learned from, those of val choose the best epoch.
        config: its settings.
        device: where to train.
    """
    train, val = (rows.subset(fold.indexes(split)) for split in ("train", "val"))
    fit = HeadFit(train, val, config, choose_preset(config.train, len(train)), {}, device)
    try:
        result = fit.run(None, Trackers({}))
    except TrainingError:
        return None, 0
    if fit.best is None:
        return None, 0
    arrays = {name: v.cpu().numpy() for name, v in fit.best["model_state_dict"].items()}
    return arrays, result["best_epoch"]
