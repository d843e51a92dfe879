"""What both training loops share: presets, optimizer, schedule, clipping, averages of weights, early
stopping."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mirip_fast.config import TrainConfig
from mirip_fast.errors import ConfigError


@dataclass(frozen=True)
class Preset:
    """How fast a head learns: the three numbers that belong together."""

    batch_size: int  # images with all pairs, else pairs
    learning_rate: float
    epochs: int


#: The classic recipe, in drawn pairs per batch: (training images below, values).
SAMPLED = (
    (1_000, Preset(16, 5e-5, 200)),
    (10_000, Preset(32, 1e-4, 100)),
    (100_000, Preset(64, 2e-4, 50)),
    (None, Preset(128, 3e-4, 30)),
)

#: The same for all pairs, in images per batch; measured below 10,000 images, see docs/benchmarks.md.
ALL_PAIRS = (
    (300, Preset(32, 1e-4, 200)),
    (1_000, Preset(64, 1e-3, 20)),
    (4_000, Preset(64, 2e-4, 100)),
    (10_000, Preset(512, 1e-3, 100)),
    (100_000, Preset(128, 3e-4, 50)),
    (None, Preset(256, 3e-4, 30)),
)

#: Without a preset.
PLAIN = Preset(32, 1e-4, 100)

#: Patience in epochs, and the steps that it should be worth at least: ten epochs of a hundred images are
#: some thirty steps, in which validation accuracy is still mostly chance.
PATIENCE, PATIENCE_STEPS = 10, 300


def choose_patience(config: TrainConfig, steps_per_epoch: int) -> int:
    """Epochs to wait for a better one: as given, else 10 epochs or 300 steps, whichever is longer."""
    if config.early_stopping_patience is not None:
        return config.early_stopping_patience
    return max(PATIENCE, -(-PATIENCE_STEPS // steps_per_epoch))


def choose_preset(config: TrainConfig, n_train: int) -> Preset:
    """The given values, completed by the preset for ``n_train`` training images or judged pairs."""
    table = ALL_PAIRS if config.pairs == "all" else SAMPLED
    preset = next(row for below, row in table if below is None or n_train < below)
    if config.preset == "none":
        preset = PLAIN
    return Preset(
        batch_size=config.batch_size or preset.batch_size,
        learning_rate=preset.learning_rate
        if config.learning_rate is None
        else config.learning_rate,
        epochs=config.epochs or preset.epochs,
    )


def decaying(model: nn.Module) -> set[int]:
    """The ``id`` of every parameter that weight decay acts on: matrices of linear and convolution layers.

    Not biases, norms, LayerScale, nor CLS, register and position tokens, whatever their shapes.
    """
    return {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)
    }


def make_optimizer(
    model: nn.Module, config: TrainConfig, learning_rate: float
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) over trainable parameters: those that decay, see :func:`decaying`, and
    the others."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    decay = decaying(model)
    matrices = [p for p in trainable if id(p) in decay]
    vectors = [p for p in trainable if id(p) not in decay]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups,
        lr=learning_rate,
        weight_decay=config.weight_decay,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def make_scheduler(
    optimizer: torch.optim.Optimizer,
    *,
    total_steps: int,
    warmup_steps: int,
    learning_rate: float,
    eta_min: float,
    hold_from: int | None = None,
) -> LambdaLR:
    """Linear warm-up from 0, then a cosine down to ``eta_min`` (Loshchilov & Hutter 2017), per step.

    From step ``hold_from`` on the rate stays what it is there (None: it never stays).
    """
    floor = min(1.0, eta_min / learning_rate) if learning_rate > 0 else 1.0

    def factor(step: int) -> float:
        step = step if hold_from is None else min(step, hold_from)
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scale gradients down to ``max_norm`` (0: leave them); returns the norm they had."""
    limit = max_norm if max_norm > 0 else math.inf
    return float(nn.utils.clip_grad_norm_(parameters, limit))


class Averaging:
    """Follows the weights of a model without batch statistics, and says which ones to keep.

    EMA: after every step, average ← decay · average + (1 − decay) · weights (Polyak & Juditsky 1992;
    Tarvainen & Valpola 2017). SWA: the mean of the weights at the end of each epoch from some
    epoch on (Izmailov et al. 2018). Both are often better on unseen data than the last weights.

    Args:
        model: what is trained.
        ema_decay: share of the average that stays at each step, 0 for no EMA.
        swa_start: the first epoch whose end counts, 0 for no SWA.

    Attributes:
        average: torch's own; None where neither is asked for.

    Raises:
        ConfigError: both are asked for.
    """

    def __init__(self, model: nn.Module, *, ema_decay: float = 0.0, swa_start: int = 0):
        if ema_decay and swa_start:
            raise ConfigError("--ema-decay and --swa-start are two ways to average: choose one")
        self.model, self.ema, self.swa_start = model, bool(ema_decay), swa_start
        self.average: AveragedModel | None = None
        if ema_decay:
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema_decay))  # type: ignore[no-untyped-call]
        elif swa_start:
            self.average = AveragedModel(model)

    @property
    def has_average(self) -> bool:
        """Whether there is an average by now."""
        return self.average is not None and int(self.average.n_averaged) > 0

    @property
    def kept(self) -> nn.Module:
        """The weights to evaluate and keep: the average, once there is one."""
        if self.average is None or not self.has_average:
            return self.model
        return self.average.module

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model itself has the weights to evaluate and keep."""
        if not self.has_average:
            yield
            return
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for ours, theirs in zip(self.model.parameters(), self.kept.parameters(), strict=True):
            before = ours.clone()
            ours.copy_(theirs)
            theirs.copy_(before)

    def after_step(self) -> None:
        """Take in the weights after an optimizer step."""
        if self.average is not None and self.ema:
            self.average.update_parameters(self.model)

    def after_epoch(self, epoch: int) -> None:
        """Take in the weights at the end of an epoch, counted from 1."""
        if self.average is not None and self.swa_start and epoch >= self.swa_start:
            self.average.update_parameters(self.model)

    def state_dict(self) -> dict[str, Any] | None:
        """What resuming needs besides the kept weights: plain types and tensors; None without averages."""
        if self.average is None:
            return None
        return {"weights": self.model.state_dict(), "count": int(self.average.n_averaged)}

    def load_state_dict(self, kept: Mapping[str, Any], state: Mapping[str, Any] | None) -> None:
        """Go on from the weights in ``kept`` and a :meth:`state_dict`.

        Raises:
            KeyError, RuntimeError: they are of another model.
        """
        self.model.load_state_dict(kept if state is None else state["weights"])
        if self.average is not None and state is not None:
            self.average.module.load_state_dict(kept)
            self.average.n_averaged.fill_(state["count"])


def check_averaging(config: TrainConfig, epochs: int) -> None:
    """Refuse settings of EMA and SWA that cannot work.

    Args:
        config: the settings.
        epochs: passes over the training images, at most.

    Raises:
        ConfigError: both are asked for, or SWA would start after the last epoch.
    """
    Averaging(nn.Identity(), ema_decay=config.ema_decay, swa_start=config.swa_start)
    if config.swa_start > epochs:
        raise ConfigError(
            f"--swa-start {config.swa_start}: there are {epochs} epochs at most; start earlier, or "
            "give more --epochs"
        )


@dataclass
class EarlyStopping:
    """Follows the best value of a metric that should grow.

    Attributes:
        patience: epochs without a better value before stopping; 0 never stops.
        min_delta: smallest gain that resets the count.
        best: the best value so far, and since when it is (``best_epoch``).
        waited: epochs since a gain of at least ``min_delta``.
    """

    patience: int
    min_delta: float = 0.0
    best: float = float("-inf")
    best_epoch: int = 0
    waited: int = 0
    _mark: float = float("-inf")  # the value that the next gain is measured from

    def update(self, value: float, epoch: int) -> bool:
        """Take in the epoch's value; returns whether it is the best so far."""
        if value >= self._mark + self.min_delta and value > self._mark:
            self._mark = value
            self.waited = 0
        else:
            self.waited += 1
        if value > self.best:
            self.best, self.best_epoch = value, epoch
            return True
        return False

    @property
    def should_stop(self) -> bool:
        """Whether patience has run out."""
        return self.patience > 0 and self.waited >= self.patience

    def state_dict(self) -> dict[str, float]:
        """What resuming needs, as plain numbers."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a :meth:`state_dict`; patience and min_delta stay as set now."""
        self.best, self._mark = state["best"], state["_mark"]
        self.best_epoch, self.waited = int(state["best_epoch"]), int(state["waited"])
