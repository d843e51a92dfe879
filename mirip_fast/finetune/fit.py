"""The end-to-end training loop."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from mirip_fast.config import Config
from mirip_fast.errors import PreemptedError, TrainingError
from mirip_fast.finetune.averages import WeightAverage
from mirip_fast.finetune.fit_judge import ADVICE, judge
from mirip_fast.finetune.fit_parts import Graded, Hooks, Plan, Progress
from mirip_fast.finetune.fit_report import epoch_values, rates_of, tell_epoch
from mirip_fast.finetune.fit_state import checkpoint_of, resume_fit
from mirip_fast.finetune.memory import free_memory
from mirip_fast.finetune.model import ScoringModel
from mirip_fast.finetune.objective import Objective, count_right
from mirip_fast.finetune.peers import ALONE, Peers
from mirip_fast.finetune.plan import Mixing, Step, plan_epoch
from mirip_fast.finetune.step import Part, StepResult, take_gradients
from mirip_fast.finetune.strategy import Strategy, learning_rates, parameter_groups, unfreeze
from mirip_fast.models.checkpoint import save_checkpoint
from mirip_fast.ranking.fit import FitResult
from mirip_fast.runtime import set_seed, torch_dtype
from mirip_fast.training.early_stopping import EarlyStopping
from mirip_fast.training.optim import clip_gradients, make_scheduler
from mirip_fast.training.run_folder import Run

log = logging.getLogger(__name__)


class FullFit:
    """A model, its optimizer and its data; :meth:`run` trains it.

    Args:
        model: after ``prepare_model``.
        strategy: what learns when.
        train: images to learn from.
        val: images that choose the best epoch.
        config: every setting; written into the checkpoints.
        plan: how the run goes.
        model_info: what the checkpoints say of the model.
        peers: the processes that share the work.
        hooks: trackers, copies, stopping.
    """

    def __init__(
        self,
        model: ScoringModel,
        strategy: Strategy,
        train: Graded,
        val: Graded,
        config: Config,
        plan: Plan,
        model_info: dict[str, Any],
        *,
        peers: Peers = ALONE,
        hooks: Hooks | None = None,
    ):
        set_seed(config.train.seed)
        self.model, self.strategy, self.train, self.val = model, strategy, train, val
        self.config, self.plan, self.model_info = config, plan, model_info
        self.peers, self.hooks = peers, hooks or Hooks()
        self.device = model.device
        # MPS has no float64, which grades are in.
        self.loss_device = torch.device("cpu") if self.device.type == "mps" else self.device
        self.steps_per_epoch = len(self._steps(1))
        self.optimizer = self._optimizer()
        self.names = [str(group["name"]) for group in self.optimizer.param_groups]
        self.scheduler = self._scheduler()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=plan.precision == "fp16")
        self.scaler.scale(torch.ones((), device=self.device))  # it sets itself up on first use
        names = config.data.tier_names()
        mixing = config.finetune.mixup > 0 or config.finetune.cutmix > 0
        within = train.within is not None
        self.objective = Objective.of(config.train, names, within=within, mixing=mixing)
        self.stopping = EarlyStopping(plan.patience, config.train.early_stopping_min_delta)
        learning = self.learning = self._learning()
        self.ema = WeightAverage(learning) if config.train.ema_decay > 0 else None
        self.swa = WeightAverage(learning) if config.train.swa_start > 0 else None
        self.parts_per_step = config.finetune.accumulation_steps or 1
        self.judged_at_once = plan.batch_size  # images scored in one pass, as memory allows
        self.score: Callable[[torch.Tensor], torch.Tensor] = model
        if plan.cut is not None:
            cut = plan.cut
            self.score = lambda tokens: model.suffix(tokens.to(model.device), cut)
        if config.finetune.compile:
            self.score = torch.compile(self.score)
        self.epoch = 0  # finished epochs
        self.now = Progress()

    def _optimizer(self) -> torch.optim.Optimizer:
        train = self.config.train
        return torch.optim.AdamW(
            parameter_groups(self.model, self.strategy, self.config),
            betas=(train.beta1, train.beta2),
            eps=train.eps,
            fused=True,
        )

    def _scheduler(self) -> torch.optim.lr_scheduler.LambdaLR:
        train, steps = self.config.train, self.steps_per_epoch
        total = self.plan.epochs * steps
        base, head = learning_rates(self.config, self.strategy)
        return make_scheduler(
            self.optimizer,
            total_steps=total,
            warmup_steps=train.warmup_steps or round(self.config.finetune.warmup_share * total),
            learning_rate=max(base, head),
            eta_min=train.scheduler_eta_min,
            hold_from=(train.swa_start - 1) * steps if train.swa_start else None,
        )

    def _learning(self) -> dict[str, torch.nn.Parameter]:
        """Everything that the optimizer may change in the run, by name."""
        chosen = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        return {name: p for name, p in self.model.named_parameters() if id(p) in chosen}

    def _steps(self, epoch: int) -> list[Step]:
        settings = self.config.finetune
        mixing = None
        if settings.mixup > 0 or settings.cutmix > 0:
            mixing = Mixing(settings.mixup, settings.cutmix, self.plan.size)
        return plan_epoch(
            self.train.tiers,
            self.train.grades,
            self.train.groups,
            self.plan.batch_size,
            self.config.train.seed,
            epoch,
            mixing=mixing,
            within=self.train.within,
        )

    def run(self, run: Run) -> FitResult:
        """Train until the epochs or the patience are used up, saving into the run's folder.

        Raises:
            TrainingError: the loss is not finite, or one image does not fit into memory; the last good
                checkpoint stays.
            PreemptedError: a signal asked to stop; all is saved.
        """
        started = time.monotonic()
        while not self._done:
            self.train_epoch(run)
            progress, self.now = self.now, Progress()
            self.epoch += 1
            self._finish_epoch(run, progress)
        return FitResult(
            epochs=self.epoch,
            best_epoch=self.stopping.best_epoch,
            best_accuracy=self.stopping.best,
            stopped_early=self.epoch < self.plan.epochs,
            seconds=time.monotonic() - started,
        )

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
        steps = self._steps(epoch)[self.now.steps :]
        lists = [list(step.samples[self.peers.share(len(step.samples))]) for step in steps]
        started = time.monotonic() - self.now.seconds
        waited = self.hooks.waited() - self.now.waited
        for step, inputs in zip(steps, self.train.load(lists), strict=True):
            self._step(step, inputs)
            self.now.seconds = time.monotonic() - started
            self.now.waited = self.hooks.waited() - waited
            stop = self.hooks.stop.signal
            if self.peers.any(stop is not None, self.device):
                if self.peers.is_first:
                    self._save(run.last)
                self.peers.wait()  # launchers kill the others when one ends
                raise PreemptedError(
                    f"Stopped by {stop or 'a signal to another process'} after step "
                    f"{self.now.steps} of epoch {epoch}; all is saved."
                )

    def _step(self, step: Step, inputs: torch.Tensor) -> None:
        result = self._gradients(step, inputs)
        self.require_finite(result.loss)
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(
            (p for _, p in self.model.trainable()), self.config.train.gradient_clip_norm
        )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        if self.ema is not None:
            self.ema.update_moving(self.config.train.ema_decay)
        grades, within = self._labels(self.train, step)
        right, pairs = count_right(
            result.scores.to(grades.device), grades, within, mixed=step.mixed
        )
        now = self.now
        now.steps += 1
        now.loss += result.loss
        now.right += right
        now.pairs += pairs
        now.images += len(step.samples)
        now.norm += norm if math.isfinite(norm) else 0.0  # fp16 skips such a step

    def _labels(self, of: Graded, step: Step) -> tuple[torch.Tensor, torch.Tensor | None]:
        grades = torch.from_numpy(step.grades).to(self.loss_device)
        if of.within is None:
            return grades, None
        return grades, torch.from_numpy(of.within[step.index()]).to(self.loss_device)

    def _gradients(self, step: Step, inputs: torch.Tensor) -> StepResult:
        """The step's gradients; out of memory makes smaller micro-batches for the rest of the run."""
        grades, within = self._labels(self.train, step)
        while True:
            try:
                return take_gradients(
                    self._parts(inputs),
                    len(step.samples),
                    lambda scores: self.objective.loss(
                        scores.to(grades.device), grades, within, mixed=step.mixed
                    ),
                    [p for _, p in self.model.trainable()],
                    peers=self.peers,
                    scale=self.scaler.get_scale(),
                    compiled=self.config.finetune.compile,
                )
            except torch.OutOfMemoryError:
                self._halve(len(inputs))

    def _parts(self, inputs: torch.Tensor) -> list[Part]:
        """One function per micro-batch, that scores it with noise of its own."""
        if not len(inputs):
            return []
        chunks = torch.tensor_split(inputs, min(self.parts_per_step, len(inputs)))
        number = self.epoch * self.steps_per_epoch + self.now.steps
        seeds = np.random.SeedSequence([self.config.train.seed, number, self.peers.rank])
        states = seeds.generate_state(len(chunks), np.uint64)
        return [self._part(chunk, int(state)) for chunk, state in zip(chunks, states, strict=True)]

    def _part(self, chunk: torch.Tensor, seed: int) -> Part:
        def score() -> torch.Tensor:
            torch.manual_seed(seed)  # the noise is a function of run, step and micro-batch
            with self.autocast():
                return self.score(chunk)

        return score

    def _halve(self, images: int) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        biggest = -(-self.plan.batch_size // self.peers.world)
        if self.parts_per_step >= biggest:
            raise TrainingError(ADVICE)
        self.parts_per_step = min(biggest, self.parts_per_step * 2)
        free_memory()
        log.warning(
            "Out of memory: the step is done again in %d micro-batches of at most %d images. The batch "
            "stays at %d images, and so does its gradient, for %d/%d of a forward pass extra",
            self.parts_per_step,
            -(-biggest // self.parts_per_step),
            self.plan.batch_size,
            self.parts_per_step - 1,
            self.parts_per_step,
        )

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Inside, the model computes in the precision of the plan."""
        if self.plan.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch_dtype(self.plan.precision))

    def require_finite(self, loss: float) -> None:
        """End the run where the loss is no number."""
        if not math.isfinite(loss):
            rates = ", ".join(f"{name} {rate:.2g}" for name, rate in rates_of(self).items())
            raise TrainingError(
                f"The loss became {loss} in epoch {self.epoch + 1}. Likely causes: a learning rate that "
                f"is too high (now {rates}) or no gradient clipping (--gradient-clip-norm 1). The "
                "checkpoints saved before are good."
            )

    def _finish_epoch(self, run: Run, progress: Progress) -> None:
        """Judge, report and save."""
        if self.swa is not None and self.epoch >= self.config.train.swa_start:
            self.swa.update_mean()
        train = self.config.train
        rates = {f"learning_rate/{name}": rate for name, rate in rates_of(self).items()}
        with self.shown():
            loss, accuracy = judge(self, self.val)
        values = epoch_values(self, progress, loss, accuracy)
        is_best = self.stopping.update(accuracy, self.epoch)
        if self.epoch == train.swa_start:
            self.stopping.waited = 0  # the average is a new start
        if not self.peers.is_first:
            return
        run.append_history({"epoch": self.epoch, **values})
        self.hooks.trackers.log({**values, **rates}, self.epoch)
        tell_epoch(self, values, is_best=is_best)
        if is_best:
            self._save(run.best, resumable=False)
        every = train.save_every_n_epochs
        if every and self.epoch % every == 0:
            self._save(run.path / f"checkpoint_epoch_{self.epoch}.pt")
            run.prune_checkpoints(train.save_total_limit)
        self._save(run.last)

    def average(self) -> WeightAverage | None:
        """The average that stands for the model now, if any."""
        if self.swa is not None and self.swa.count:
            return self.swa
        return self.ema

    def shown(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the model has the weights that are judged and kept."""
        average = self.average()
        return contextlib.nullcontext() if average is None else average.in_place()

    def _save(self, path: Any, *, resumable: bool = True) -> None:
        save_checkpoint(path, checkpoint_of(self, resumable=resumable))
        self.hooks.saved(path)

    def resume(self, checkpoint: dict[str, Any]) -> None:
        """Go on where ``checkpoint`` was made, in the midst of an epoch too.

        Raises:
            CheckpointError: it is of another model, or not for resuming.
        """
        resume_fit(self, checkpoint)
