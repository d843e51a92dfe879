"""The head-only training loop: cached features in memory, every epoch in one pass over them."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mirip_fast.config import Config
from mirip_fast.errors import CheckpointError, TrainingError
from mirip_fast.evaluation.metrics import pairwise_accuracy
from mirip_fast.models.checkpoint import save_checkpoint
from mirip_fast.models.head import RankingHead
from mirip_fast.models.losses import PairLoss, pair_loss
from mirip_fast.ranking.batches import draw_pairs, epoch_generator, image_batches
from mirip_fast.ranking.rows import Rows
from mirip_fast.runtime import cpu_threads, set_seed
from mirip_fast.training.early_stopping import EarlyStopping
from mirip_fast.training.optim import clip_gradients, make_optimizer, make_scheduler
from mirip_fast.training.presets import Pace, choose_patience
from mirip_fast.training.run_folder import Run
from mirip_fast.training.trackers import Trackers

log = logging.getLogger(__name__)

_CHUNK = 16_384  # rows scored at a time: bounds the memory of an evaluation
# Small batches gain nothing from more threads, and lose by threads that wait for each other where other
# programs are busy; one thread also gives the same numbers on machines with other core counts.
_ONE_THREAD_BATCH = 128
_TRAIN_SAMPLE = 4_096  # training images that the training accuracy is taken from


@dataclass(frozen=True)
class FitResult:
    """How a fit ended."""

    epochs: int
    best_epoch: int
    best_accuracy: float
    stopped_early: bool
    seconds: float


class HeadFit:
    """A head, its optimizer and its data; :meth:`run` trains it.

    Args:
        train: rows to learn from.
        val: rows that choose the best epoch.
        config: every setting; written into the checkpoints.
        pace: batch size, learning rate and epochs.
        model_info: what the head expects of its input; written into the checkpoints.
        device: where to train.
    """

    def __init__(
        self,
        train: Rows,
        val: Rows,
        config: Config,
        pace: Pace,
        model_info: dict[str, Any],
        device: torch.device,
    ):
        set_seed(config.train.seed)
        self.config, self.pace, self.model_info, self.device = config, pace, model_info, device
        self.train, self.val = _on_device(train, device), _on_device(val, device)
        self.head = RankingHead(train.input_dim, config.head).to(device)
        self.optimizer = make_optimizer(self.head, config.train, pace.learning_rate)
        batches = max(1, -(-len(train) // pace.batch_size))
        self.steps_per_epoch = -(-batches // config.train.gradient_accumulation_steps)
        self.scheduler = make_scheduler(
            self.optimizer,
            total_steps=pace.epochs * self.steps_per_epoch,
            warmup_steps=config.train.warmup_steps,
            learning_rate=pace.learning_rate,
            eta_min=config.train.scheduler_eta_min,
        )
        self.loss = PairLoss(
            kind=config.train.loss,
            margin=config.train.margin,
            within_share=None if train.within is None else 1.0,
        )
        self.stopping = EarlyStopping(
            choose_patience(config.train, self.steps_per_epoch),
            config.train.early_stopping_min_delta,
        )
        self.epoch = 0  # finished epochs

    def run(self, run: Run, trackers: Trackers) -> FitResult:
        """Train until the epochs or the patience are used up, saving into the run's folder.

        Raises:
            TrainingError: the loss is not finite; the last good checkpoint stays.
        """
        small = self.device.type == "cpu" and self.pace.batch_size <= _ONE_THREAD_BATCH
        with cpu_threads(1 if small else None):
            return self._run(run, trackers)

    def _run(self, run: Run, trackers: Trackers) -> FitResult:
        started = time.monotonic()
        settings = self.config.train
        while self.epoch < self.pace.epochs and not self.stopping.should_stop:
            epoch_started = time.monotonic()
            train_loss = self._train_epoch(self.epoch + 1)
            self.epoch += 1
            val_loss, val_accuracy = self._judge(self.val)
            _, train_accuracy = self._judge(self.train, sample=_TRAIN_SAMPLE)
            values = {
                "train/loss": train_loss,
                "train/accuracy": train_accuracy,
                "val/loss": val_loss,
                "val/accuracy": val_accuracy,
                "learning_rate": float(self.optimizer.param_groups[0]["lr"]),
                "epoch_seconds": time.monotonic() - epoch_started,
            }
            is_best = self.stopping.update(val_accuracy, self.epoch)
            run.append_history({"epoch": self.epoch, **values})
            trackers.log(values, self.epoch)
            log.info(
                "epoch %3d/%d  loss %.4f  accuracy %.4f  val loss %.4f  val accuracy %.4f%s",
                self.epoch,
                self.pace.epochs,
                train_loss,
                train_accuracy,
                val_loss,
                val_accuracy,
                "  best" if is_best else "",
            )
            if is_best:
                save_checkpoint(run.best, self.checkpoint())
            every = settings.save_every_n_epochs
            if every and self.epoch % every == 0:
                save_checkpoint(run.path / f"checkpoint_epoch_{self.epoch}.pt", self.checkpoint())
                run.prune_checkpoints(settings.save_total_limit)
            save_checkpoint(run.last, self.checkpoint())
        return FitResult(
            epochs=self.epoch,
            best_epoch=self.stopping.best_epoch,
            best_accuracy=self.stopping.best,
            stopped_early=self.epoch < self.pace.epochs,
            seconds=time.monotonic() - started,
        )

    def _train_epoch(self, epoch: int) -> float:
        """One pass over the training rows; returns the mean loss."""
        # Dropout, too, is a function of seed and epoch: a resumed run repeats an uninterrupted one.
        torch.manual_seed(self.config.train.seed * 1_000_003 + epoch)
        rng = epoch_generator(self.config.train.seed, epoch)
        accumulate = self.config.train.gradient_accumulation_steps
        self.head.train()
        losses = []
        batches = list(self._batches(rng))
        for i, batch in enumerate(batches):
            loss = self._batch_loss(batch, rng)
            losses.append(float(loss.detach()))
            self._require_finite(losses[-1], epoch)
            together = min(accumulate, len(batches) - i // accumulate * accumulate)
            (loss / together).backward()  # type: ignore[no-untyped-call]
            if (i + 1) % accumulate == 0 or i + 1 == len(batches):
                clip_gradients(self.head.parameters(), self.config.train.gradient_clip_norm)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                self.scheduler.step()
        return float(np.mean(losses))

    def _require_finite(self, loss: float, epoch: int) -> None:
        if not math.isfinite(loss):
            raise TrainingError(
                f"The loss became {loss} in epoch {epoch}. Likely causes: a learning rate that is too "
                f"high (--learning-rate, now {self.pace.learning_rate:g}), no gradient clipping "
                "(--gradient-clip-norm 1), or features that are not finite (`mirip-fast cache "
                "verify`). The checkpoints saved before are good."
            )

    def _batches(self, rng: np.random.Generator) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
        if self.config.train.pairs == "sampled":
            pairs = draw_pairs(self.train.tiers.cpu().numpy(), rng)
            return np.array_split(pairs, max(1, -(-len(pairs) // self.pace.batch_size)))
        return list(image_batches(len(self.train), self.pace.batch_size, rng))

    def _batch_loss(
        self, batch: np.ndarray[Any, np.dtype[np.int64]], rng: np.random.Generator
    ) -> torch.Tensor:
        """The loss of a batch of images [B] (all its pairs) or of drawn pairs [B, 2]."""
        index = torch.from_numpy(batch.reshape(-1)).to(self.device)
        n_views = self.train.features.shape[1]
        if n_views == 1:
            features = self.train.features[index, 0]
        else:  # stored views serve as augmentation: each image shows one of them
            view = torch.from_numpy(rng.integers(n_views, size=len(index))).to(self.device)
            features = self.train.features[index, view]
        scores = self.head(features.float())
        if batch.ndim == 2:
            better, worse = scores.view(-1, 2).unbind(1)
            first_wins = torch.ones_like(better)
            return pair_loss(
                better, worse, first_wins, kind=self.loss.kind, margin=self.loss.margin
            )
        within = None if self.train.within is None else self.train.within[index]
        return self.loss(scores, self.train.tiers[index], within)

    def _judge(self, rows: _DeviceRows, *, sample: int | None = None) -> tuple[float, float]:
        """Loss and pairwise accuracy over all pairs of ``rows``, or of a fixed sample of them."""
        index = None
        if sample is not None and len(rows) > sample:
            chosen = np.random.default_rng(self.config.train.seed).choice(len(rows), sample, False)
            index = torch.from_numpy(np.sort(chosen)).to(self.device)
        features = rows.features if index is None else rows.features[index]
        tiers = rows.tiers if index is None else rows.tiers[index]
        within = rows.within if index is None or rows.within is None else rows.within[index]
        scores = score_rows(self.head, features)
        loss = float(self.loss(scores, tiers, within))
        self._require_finite(loss, self.epoch)
        codes = None if within is None else within.cpu().numpy()
        accuracy = pairwise_accuracy(scores.cpu().numpy(), tiers.cpu().numpy(), codes)
        return loss, accuracy

    def checkpoint(self) -> dict[str, Any]:
        """The documented checkpoint, with what resuming needs."""
        return {
            "epoch": self.epoch,
            "model_state_dict": self.head.state_dict(),
            "optimizer_state_dict": self.optimizer.state_dict(),
            "scheduler_state_dict": self.scheduler.state_dict(),
            "best_accuracy": self.stopping.best,
            "config": self.config.to_dict(),
            "model": self.model_info,
            "training_state": {
                "early_stopping": self.stopping.state_dict(),
                "rng_state": torch.get_rng_state(),
                "pace": vars(self.pace),
            },
        }

    def resume(self, checkpoint: dict[str, Any]) -> None:
        """Go on after the epoch of ``checkpoint``.

        Raises:
            CheckpointError: it is of another model.
        """
        try:
            self.head.load_state_dict(checkpoint["model_state_dict"])
            self.optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
            self.scheduler.load_state_dict(checkpoint["scheduler_state_dict"])
            self.stopping.load_state_dict(checkpoint["training_state"]["early_stopping"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"the checkpoint does not fit this run: {error}") from error
        self.epoch = int(checkpoint["epoch"])


@dataclass(frozen=True)
class _DeviceRows:
    """Rows as tensors on the training device; half precision on a GPU, fp32 on a CPU."""

    features: torch.Tensor  # [n, V, D]
    tiers: torch.Tensor  # [n]
    within: torch.Tensor | None  # [n]

    def __len__(self) -> int:
        return len(self.tiers)


def _on_device(rows: Rows, device: torch.device) -> _DeviceRows:
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    return _DeviceRows(
        torch.from_numpy(rows.features).to(device=device, dtype=dtype),
        torch.from_numpy(rows.tiers).to(device),
        None if rows.within is None else torch.from_numpy(rows.within).to(device),
    )


@torch.inference_mode()
def score_rows(head: RankingHead, features: torch.Tensor) -> torch.Tensor:
    """Scores of [n, V, D] features: the mean over the views, in chunks; [n] float32."""
    head.eval()
    scores = [
        head(chunk.flatten(0, 1).float()).view(chunk.shape[:2]).mean(dim=1)
        for chunk in torch.split(features, _CHUNK)
    ]
    return torch.cat(scores) if scores else torch.empty(0)
