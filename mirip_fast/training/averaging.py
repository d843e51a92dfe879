"""Averages of a model's weights over training: often better on unseen data than the last weights.

- EMA: after every step, average ← decay · average + (1 − decay) · weights (Polyak & Juditsky 1992; Tarvainen
  & Valpola 2017).
- SWA: the mean of the weights at the end of each epoch from some epoch on (Izmailov et al. 2018).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mirip_fast.config import TrainConfig
from mirip_fast.errors import ConfigError


class Averaging:
    """Follows the weights of a model without batch statistics, and says which ones to judge and keep.

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
    def judged(self) -> nn.Module:
        """The weights to judge and keep: the average, once there is one."""
        if self.average is None or not self.has_average:
            return self.model
        return self.average.module

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model itself has the weights to judge and keep."""
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
        for ours, theirs in zip(self.model.parameters(), self.judged.parameters(), strict=True):
            kept = ours.clone()
            ours.copy_(theirs)
            theirs.copy_(kept)

    def after_step(self) -> None:
        """Take in the weights after an optimizer step."""
        if self.average is not None and self.ema:
            self.average.update_parameters(self.model)

    def after_epoch(self, epoch: int) -> None:
        """Take in the weights at the end of an epoch, counted from 1."""
        if self.average is not None and self.swa_start and epoch >= self.swa_start:
            self.average.update_parameters(self.model)

    def state_dict(self) -> dict[str, Any] | None:
        """What resuming needs besides the judged weights: plain types and tensors; None without averages."""
        if self.average is None:
            return None
        return {"weights": self.model.state_dict(), "count": int(self.average.n_averaged)}

    def load_state_dict(self, judged: Mapping[str, Any], state: Mapping[str, Any] | None) -> None:
        """Go on from the weights in ``judged`` and a :meth:`state_dict`.

        Raises:
            KeyError, RuntimeError: they are of another model.
        """
        self.model.load_state_dict(judged if state is None else state["weights"])
        if self.average is not None and state is not None:
            self.average.module.load_state_dict(judged)
            self.average.n_averaged.fill_(state["count"])


def check_averaging(config: TrainConfig, epochs: int) -> None:
    """Refuse settings of EMA and SWA that can not work.

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
