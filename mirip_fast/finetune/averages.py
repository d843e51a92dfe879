"""Averages over time of the weights that learn: EMA and SWA, as in the head-only mode.

Only what learns is copied: a frozen backbone would double the memory for nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


class WeightAverage:
    """A running average of parameters, of the same names.

    Args:
        parameters: name → parameter; the average starts as a copy of them.
    """

    def __init__(self, parameters: dict[str, nn.Parameter]):
        self.parameters = parameters
        self.values = {name: p.detach().clone() for name, p in parameters.items()}
        self.count = 0

    @torch.no_grad()
    def update_moving(self, decay: float) -> None:
        """Exponential moving average (Polyak & Juditsky 1992) that begins with the first weights it sees."""
        self.count += 1
        decay = decay if self.count > 1 else 0.0
        for name, parameter in self.parameters.items():
            self.values[name].lerp_(parameter.detach(), 1 - decay)

    @torch.no_grad()
    def update_mean(self) -> None:
        """Equal mean of all that was seen (SWA, Izmailov et al. 2018, arXiv 1803.05407)."""
        self.count += 1
        for name, parameter in self.parameters.items():
            self.values[name].lerp_(parameter.detach(), 1 / self.count)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model have the averaged weights inside the block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            kept = parameter.detach().clone()
            parameter.copy_(self.values[name])
            self.values[name].copy_(kept)

    def state_dict(self) -> dict[str, object]:
        """What resuming needs."""
        return {"values": self.values, "count": self.count}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Go on from a :meth:`state_dict`.

        Raises:
            KeyError: it is of other parameters.
        """
        values, count = state["values"], state["count"]
        assert isinstance(values, dict) and isinstance(count, int)
        for name, value in self.values.items():
            value.copy_(values[name])
        self.count = count
