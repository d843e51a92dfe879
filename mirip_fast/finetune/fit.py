"""The end-to-end training loop: take an epoch's steps, evaluate, report, save; again until done."""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mirip_fast.config import Config
from mirip_fast.errors import CheckpointError, PreemptedError, TrainingError
from mirip_fast.evaluation.metrics import pairwise_accuracy
from mirip_fast.finetune.data import Batches, Sample, mixed_grades, plan_epoch
from mirip_fast.finetune.distributed import ALONE, ProcessGroup
from mirip_fast.finetune.model import ScoringModel, merged_state
from mirip_fast.finetune.step import Part, batch_loss, count_right, make_objective, take_gradients
from mirip_fast.finetune.strategy import Strategy, learning_rates, parameter_groups, unfreeze
from mirip_fast.models.checkpoint import save_checkpoint
from mirip_fast.ranking.objective import by_grader
from mirip_fast.ranking.rows import Rows
from mirip_fast.runtime import free_memory, in_passes, is_out_of_memory, set_seed, torch_dtype
from mirip_fast.training.optim import Averaging, EarlyStopping, clip_gradients, make_scheduler
from mirip_fast.training.run_folder import Run
from mirip_fast.training.trackers import Trackers

log = logging.getLogger(__name__)

#: What a user can do where not even one image fits.
_ADVICE = (
    "Out of memory with one image at a time. Ways on: --gradient-checkpointing, a smaller --image-size (and "
    "its own head-only run), --strategy last:2 or lora, or a smaller backbone. The checkpoints saved before "
    "are good."
)


#: What an epoch has seen so far: sums over its steps, and its seconds, of which so many it waited for data.
_SEEN = ("steps", "loss", "right", "pairs", "images", "norm", "seconds", "waited")


@dataclass(frozen=True)
class Plan:
    """How a run goes, decided before it starts.

    Attributes:
        epochs: at most.
        batch_size: images per step.
        head_epochs: first epochs in which only the head learns.
        patience: epochs without a better one; 0 never stops.
        precision: of the model's arithmetic: fp32, bf16 or fp16.
        size: side of the images in pixels.
    """

    epochs: int
    batch_size: int
    head_epochs: int
    patience: int
    precision: str
    size: int


class FullFit:
    """A model, its optimizer and its data; :meth:`run` trains it.

    Args:
        model: after ``prepare_model``.
        strategy: what learns when.
        train: images to learn from, and
        train_pixels: what loads them.
        val: images that choose the best epoch, and
        val_pixels: what loads them.
        config: every setting; written into the checkpoints.
        plan: how the run goes.
        model_info: what the checkpoints say of the model.
        group: the processes that share the work.

    Attributes:
        trackers: where values are reported.
        saved: called with every checkpoint that is complete.
        stop: name of the signal that asks the run to save and end after the step under way, if one does.
    """

    def __init__(
        self,
        model: ScoringModel,
        strategy: Strategy,
        train: Rows,
        train_pixels: Batches,
        val: Rows,
        val_pixels: Batches,
        config: Config,
        plan: Plan,
        model_info: dict[str, Any],
        *,
        group: ProcessGroup = ALONE,
    ):
        set_seed(config.train.seed)
        self.model, self.strategy, self.train, self.val = model, strategy, train, val
        self.train_pixels, self.val_pixels = train_pixels, val_pixels
        self.config, self.plan, self.model_info, self.group = config, plan, model_info, group
        self.trackers = Trackers({})
        self.saved: Callable[[Path], None] = lambda _: None
        self.stop: str | None = None
        self.device = model.device
        # MPS has no float64, which grades are in.
        self._loss_device = torch.device("cpu") if self.device.type == "mps" else self.device
        settings, tuning = config.train, config.finetune
        alphas = {"mixup": tuning.mixup, "cutmix": tuning.cutmix}
        self._mixing = {kind: alpha for kind, alpha in alphas.items() if alpha > 0}
        self.steps_per_epoch = len(self._steps(1))
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, strategy, config),
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            fused=True,
        )
        total = plan.epochs * self.steps_per_epoch
        start = settings.swa_start
        self.scheduler = make_scheduler(
            self.optimizer,
            total_steps=total,
            warmup_steps=settings.warmup_steps or round(tuning.warmup_share * total),
            learning_rate=max(learning_rates(config, strategy)),
            eta_min=settings.scheduler_eta_min,
            hold_from=(start - 1) * self.steps_per_epoch if start else None,
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=plan.precision == "fp16")
        self.scaler.scale(torch.ones((), device=self.device))  # it sets itself up on first use
        self.objective = make_objective(settings)
        self.stopping = EarlyStopping(plan.patience, settings.early_stopping_min_delta)
        chosen = {id(p) for group_ in self.optimizer.param_groups for p in group_["params"]}
        #: Everything that the optimizer may change in the run, by name.
        self.learning = {name: p for name, p in model.named_parameters() if id(p) in chosen}
        # Only what learns is averaged: a frozen backbone would double the memory for nothing.
        self.averaging = Averaging(
            nn.ParameterList(self.learning.values()), ema_decay=settings.ema_decay, swa_start=start
        )
        self.parts_per_step = tuning.accumulation_steps or 1
        self.evaluated_at_once = plan.batch_size  # images scored in one pass, as memory allows
        self.score: Callable[[torch.Tensor], torch.Tensor] = model
        if tuning.compile:
            self.score = torch.compile(model)
        self.epoch = 0  # finished epochs
        self.now: dict[str, Any] = dict.fromkeys(_SEEN, 0)

    def _steps(self, epoch: int) -> list[list[Sample]]:
        return plan_epoch(
            self.train.tiers,
            self.train.groups,
            self.plan.batch_size,
            self.config.train.seed,
            epoch,
            mixing=self._mixing,
            size=self.plan.size,
            within=self.train.within,
        )

    def run(self, run: Run) -> dict[str, Any]:
        """Train until the epochs or the patience are used up, saving into the run's folder.

        Returns:
            How it ended, as :meth:`mirip_fast.ranking.fit.HeadFit.run` says it.

        Raises:
            TrainingError: the loss is not finite, or one image does not fit into memory; the last good
                checkpoint stays.
            PreemptedError: a signal asked to stop; all is saved.
        """
        started = time.monotonic()
        while not self._done:
            self.train_epoch(run)
            self._finish_epoch(run)
        return {
            "epochs": self.epoch,
            "best_epoch": self.stopping.best_epoch,
            "val_pairwise_accuracy": self.stopping.best,
            "stopped_early": self.epoch < self.plan.epochs,
            "seconds": time.monotonic() - started,
        }

    @property
    def _done(self) -> bool:
        if self.epoch >= self.plan.epochs:
            return True
        return self.stopping.should_stop and self.epoch >= self.config.train.swa_start

    def train_epoch(self, run: Run) -> None:
        """Take the steps of the next epoch; saves into the run's folder where a signal asks to stop."""
        epoch = self.epoch + 1
        unfreeze(self.model, self.strategy, self.strategy.blocks_at(epoch, self.plan.head_epochs))
        self.model.train()
        now = self.now
        steps = self._steps(epoch)[now["steps"] :]
        lists = [samples[self.group.share(len(samples))] for samples in steps]
        started = time.monotonic() - now["seconds"]
        waited = self.train_pixels.waited - now["waited"]
        for samples, inputs in zip(steps, self.train_pixels.load(lists), strict=True):
            self._step(samples, inputs)
            now["seconds"] = time.monotonic() - started
            now["waited"] = self.train_pixels.waited - waited
            stop = self.stop
            if self.group.any(stop is not None, self.device):
                if self.group.is_first:
                    self._save(run.last)
                self.group.wait()  # launchers kill the others when one ends
                raise PreemptedError(
                    f"Stopped by {stop or 'a signal to another process'} after step "
                    f"{now['steps']} of epoch {epoch}; all is saved."
                )

    def _known(self, rows: Rows, samples: Sequence[Sample]) -> dict[str, Any]:
        """What the pairs of some images are made by, as :func:`batch_loss` takes it."""

        def of_samples(values: NDArray[Any] | None) -> torch.Tensor | None:
            if values is None:
                return None
            return torch.from_numpy(values[[s.image for s in samples]]).to(self._loss_device)

        return {
            "grades": torch.from_numpy(mixed_grades(samples, pair_grades(rows))).to(
                self._loss_device
            ),
            "within": of_samples(rows.within),
            "graders": of_samples(rows.grades),
            "mixed": samples[0].partner >= 0,
        }

    def _step(self, samples: Sequence[Sample], inputs: torch.Tensor) -> None:
        known = self._known(self.train, samples)
        loss, scores = self._gradients(
            inputs,
            len(samples),
            lambda scores: batch_loss(self.objective, scores.to(self._loss_device), **known),
        )
        self._require_finite(loss)
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(
            (p for _, p in self.model.trainable()), self.config.train.gradient_clip_norm
        )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        self.averaging.after_step()
        right, pairs = count_right(scores.to(self._loss_device), **known)
        norm = norm if math.isfinite(norm) else 0.0  # fp16 skips such a step
        for name, value in zip(_SEEN, (1, loss, right, pairs, len(samples), norm), strict=False):
            self.now[name] += value

    def _gradients(
        self, inputs: torch.Tensor, n: int, loss_of: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[float, torch.Tensor]:
        """The step's gradients; out of memory makes smaller micro-batches for the rest of the run."""
        while True:
            try:
                return take_gradients(
                    self._parts(inputs),
                    n,
                    loss_of,
                    [p for _, p in self.model.trainable()],
                    group=self.group,
                    scale=self.scaler.get_scale(),
                    compiled=self.config.finetune.compile,
                )
            except torch.OutOfMemoryError:
                self.optimizer.zero_grad(set_to_none=True)
            biggest = -(-self.plan.batch_size // self.group.world)
            if self.parts_per_step >= biggest:
                raise TrainingError(_ADVICE)
            k = self.parts_per_step = min(biggest, self.parts_per_step * 2)
            free_memory()
            log.warning(
                "Out of memory: the step is done again in %d micro-batches of at most %d images. The batch "
                "stays at %d images, and so does its gradient, for %d/%d of a forward pass extra",
                k,
                -(-biggest // k),
                self.plan.batch_size,
                k - 1,
                k,
            )

    def _parts(self, inputs: torch.Tensor) -> list[Part]:
        """One function per micro-batch, that scores it with noise of its own."""
        if not len(inputs):
            return []
        chunks = torch.tensor_split(inputs, min(self.parts_per_step, len(inputs)))
        number = self.epoch * self.steps_per_epoch + self.now["steps"]
        seeds = np.random.SeedSequence([self.config.train.seed, number, self.group.rank])
        states = seeds.generate_state(len(chunks), np.uint64)

        def part(chunk: torch.Tensor, seed: int) -> Part:
            def score() -> torch.Tensor:
                torch.manual_seed(seed)  # the noise is a function of run, step and micro-batch
                with self._autocast():
                    return self.score(chunk)

            return score

        return [part(chunk, int(state)) for chunk, state in zip(chunks, states, strict=True)]

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Inside, the model computes in the precision of the plan."""
        if self.plan.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch_dtype(self.plan.precision))

    def _require_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            rates = ", ".join(f"{name} {rate:.2g}" for name, rate in self._rates().items())
            raise TrainingError(
                f"The loss became {loss} in epoch {self.epoch + 1}. Likely causes: a learning rate that "
                f"is too high (now {rates}) or no gradient clipping (--gradient-clip-norm 1). The "
                "checkpoints saved before are good."
            )

    def _rates(self) -> dict[str, float]:
        """Learning rate of every group of parameters, by name."""
        return {str(group["name"]): float(group["lr"]) for group in self.optimizer.param_groups}

    def _finish_epoch(self, run: Run) -> None:
        """Evaluate, report and save."""
        now, self.now = self.now, dict.fromkeys(_SEEN, 0)
        steps, seconds = max(1, now["steps"]), now["seconds"]
        self.epoch += 1
        settings = self.config.train
        self.averaging.after_epoch(self.epoch)
        with self.averaging.in_place():
            loss, accuracy = self._evaluate()
        rates = self._rates()
        values = {
            "train/loss": now["loss"] / steps,
            "train/accuracy": now["right"] / now["pairs"] if now["pairs"] else math.nan,
            "val/loss": loss,
            "val/accuracy": accuracy,
            "learning_rate": max(rates.values()),
            "epoch_seconds": seconds,
            "gradient_norm": now["norm"] / steps,
            "images_per_second": now["images"] / max(seconds, 1e-9),
            "data_seconds": now["waited"],
            "memory_gib": _peak_memory(self.device),
        }
        is_best = self.stopping.update(accuracy, self.epoch)
        if self.epoch == settings.swa_start:
            self.stopping.waited = 0  # the average is a new start
        if not self.group.is_first:
            return
        run.append_history({"epoch": self.epoch, **values})
        by_group = {f"learning_rate/{name}": rate for name, rate in rates.items()}
        self.trackers.log({**values, **by_group}, self.epoch)
        log.info(
            "epoch %3d/%d  loss %.4f  accuracy %.4f  val loss %.4f  val accuracy %.4f  "
            "%.1f s, %.1f images/s%s",
            self.epoch,
            self.plan.epochs,
            values["train/loss"],
            values["train/accuracy"],
            loss,
            accuracy,
            values["epoch_seconds"],
            values["images_per_second"],
            "  best" if is_best else "",
        )
        if is_best:
            self._save(run.best, resumable=False)
        every = settings.save_every_n_epochs
        if every and self.epoch % every == 0:
            self._save(run.path / f"checkpoint_epoch_{self.epoch}.pt")
            run.prune_checkpoints(settings.save_total_limit)
        self._save(run.last)

    @torch.no_grad()
    def _evaluate(self) -> tuple[float, float]:
        """Loss and pairwise accuracy over all pairs of the validation split, with the weights as they are.

        When memory runs out the passes become smaller, for the rest of the run too; scores do not depend on
        which images go through together.
        """
        self.model.eval()
        images, n, world = self.val, len(self.val), self.group.world
        everyone = [Sample(i, 0) for i in range(n)]
        mine = everyone[self.group.share(n)]
        most = -(-self.plan.batch_size // (self.parts_per_step * world))
        size = at_once = min(self.evaluated_at_once, most)

        def score(inputs: torch.Tensor) -> torch.Tensor:
            with self._autocast():
                return self.score(inputs).float()

        parts = [torch.empty(0, device=self.device)]
        try:
            lists = [mine[i : i + size] for i in range(0, len(mine), size)]
            for inputs in self.val_pixels.load(lists):
                scored, at_once = in_passes(score, inputs, at_once, _tell_smaller)
                parts += scored
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise TrainingError(_ADVICE) from None
        if at_once < size:
            self.evaluated_at_once = at_once
        scores = self.group.gather(torch.cat(parts), n).to(self._loss_device)
        known = self._known(images, everyone)
        loss = float(batch_loss(self.objective, scores, **known))
        self._require_finite(loss)
        tiers, inside = images.tiers, images.within
        if known["graders"] is not None:
            place, of, codes, _ = (t.cpu() for t in by_grader(known["graders"], known["within"]))
            scores, tiers, inside = scores.cpu()[place], of.numpy(), codes.numpy()
        return loss, pairwise_accuracy(scores.cpu().numpy(), tiers, inside)

    def _save(self, path: Path, *, resumable: bool = True) -> None:
        """Write the documented checkpoint: weights as evaluated (adapters merged), and what resuming needs.

        Args:
            path: the file.
            resumable: leave out the optimizer and what else only resuming needs, if False.
        """
        with self.averaging.in_place():
            weights = dict(self.model.head.state_dict())
            backbone = merged_state(self.model.backbone)
            weights.update({f"backbone.{name}": value for name, value in backbone.items()})
            if self.averaging.has_average:
                weights = {name: value.clone() for name, value in weights.items()}
        state = {
            "epoch": self.epoch,
            "model_state_dict": weights,
            "optimizer_state_dict": self.optimizer.state_dict() if resumable else {},
            "scheduler_state_dict": self.scheduler.state_dict() if resumable else {},
            "best_accuracy": self.stopping.best,
            "config": self.config.to_dict(),
            "model": self.model_info,
        }
        if resumable:
            average = self.averaging.average
            kept = average and {
                "values": dict(zip(self.learning, average.module.parameters(), strict=True)),
                "count": int(average.n_averaged),
            }
            state["training_state"] = {
                "early_stopping": self.stopping.state_dict(),
                "plan": vars(self.plan),
                "learning": {name: p.detach() for name, p in self.learning.items()},
                "scaler": self.scaler.state_dict(),
                "ema": kept if self.config.train.ema_decay else None,
                "swa": kept if self.config.train.swa_start else None,
                "parts_per_step": self.parts_per_step,
                "evaluated_at_once": self.evaluated_at_once,
                "progress": self.now,
            }
        save_checkpoint(path, state)
        self.saved(path)

    def resume(self, checkpoint: dict[str, Any]) -> None:
        """Go on where ``checkpoint`` was made, in the midst of an epoch too.

        Raises:
            CheckpointError: it is of another model, or not for resuming.
        """
        try:
            state = checkpoint["training_state"]
            kept, average = state["ema"] or state["swa"], self.averaging.average
            with torch.no_grad():
                for name, parameter in self.learning.items():
                    parameter.copy_(state["learning"][name])
                if average is not None:
                    for name, value in zip(self.learning, average.module.parameters(), strict=True):
                        value.copy_(kept["values"][name])
                    average.n_averaged.fill_(kept["count"])
            self.optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
            self.scheduler.load_state_dict(checkpoint["scheduler_state_dict"])
            self.stopping.load_state_dict(state["early_stopping"])
            self.scaler.load_state_dict(state["scaler"])
            self.parts_per_step = int(state["parts_per_step"])
            # Older ones call it judged_at_once, or do not say.
            at_once = state.get("evaluated_at_once", state.get("judged_at_once"))
            self.evaluated_at_once = int(at_once or self.evaluated_at_once)
            self.now = {name: state["progress"][name] for name in _SEEN}
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise CheckpointError(f"the checkpoint does not fit this run: {error}") from error
        self.epoch = int(checkpoint["epoch"])

    @contextlib.contextmanager
    def stop_signals(self) -> Iterator[None]:
        """Inside, SIGTERM and SIGUSR1, which schedulers send beforehand, ask the run to save and end."""

        def ask(number: int, frame: FrameType | None) -> None:
            self.stop = signal.Signals(number).name
            log.warning("%s: saving and stopping after this step", self.stop)

        kept = {}
        for name in ("SIGTERM", "SIGUSR1"):
            if hasattr(signal, name):
                with contextlib.suppress(ValueError):  # not in the main thread
                    kept[name] = signal.signal(getattr(signal, name), ask)
        try:
            yield
        finally:
            for name, handler in kept.items():
                signal.signal(getattr(signal, name), handler)


def pair_grades(rows: Rows) -> NDArray[np.float64]:
    """[n] what pairs are made by, higher is better: minus the tier, or the finer grade."""
    return -rows.tiers.astype(np.float64) if rows.tier_scores is None else rows.tier_scores


def _tell_smaller(images: int) -> None:
    log.warning(
        "Out of memory while evaluating: from here on at most %d images are scored at once", images
    )


def _peak_memory(device: torch.device) -> float:
    """Peak memory of this process, in GiB: of the GPU where there is one."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
