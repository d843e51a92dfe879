"""AdamW for stacked heads: heads of one recipe side by side are stepped as one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mirip_fast.config import TrainConfig
from mirip_fast.models.stacked_head import StackedHeads
from mirip_fast.training.optim import make_scheduler
from mirip_fast.training.presets import Preset


@dataclass(frozen=True)
class Recipe:
    """What an optimizer and its schedule are made of."""

    learning_rate: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    warmup_steps: int
    eta_min: float
    clip_norm: float
    epochs: int
    steps_per_epoch: int

    @classmethod
    def of(cls, settings: TrainConfig, preset: Preset, steps_per_epoch: int) -> Recipe:
        """The recipe of a head."""
        return cls(
            preset.learning_rate,
            settings.weight_decay,
            (settings.beta1, settings.beta2),
            settings.eps,
            settings.warmup_steps,
            settings.scheduler_eta_min,
            settings.gradient_clip_norm,
            preset.epochs,
            steps_per_epoch,
        )


class StackedOptimizer:
    """Clipping, AdamW and the learning rate schedule for a stack.

    Args:
        heads: the stack.
        recipes: one per head; equal neighbours share an optimizer.
    """

    def __init__(self, heads: StackedHeads, recipes: Sequence[Recipe]):
        self.heads, self.recipes = heads, list(recipes)
        limits = [recipe.clip_norm or torch.inf for recipe in recipes]
        device = next(iter(heads.weights.values())).device
        self._limits = torch.tensor(limits, dtype=torch.float64, device=device)
        self._blocks = []
        start = 0
        for recipe, members in itertools.groupby(recipes):
            end = start + len(list(members))
            self._blocks.append(_Block(heads, recipe, start, end))
            start = end

    def step(self, has_batch: Sequence[bool]) -> None:
        """One step of every head that has seen a batch; gradients are used up.

        Heads of one recipe see batches together or not at all, or have finished.
        """
        self._clip()
        for block in self._blocks:
            if any(has_batch[block.start : block.end]):
                block.step(self.heads)
        for stack in self.heads.weights.values():
            stack.grad = None

    def select(self, heads: StackedHeads, places: Sequence[int]) -> StackedOptimizer:
        """The optimizer of ``heads``, which are those at ``places`` in this one's."""
        chosen = StackedOptimizer(heads, [self.recipes[i] for i in places])
        for block in chosen._blocks:
            origin = places[block.start]
            old = next(b for b in self._blocks if b.start <= origin < b.end)
            block.take_over(old, [places[i] - old.start for i in range(block.start, block.end)])
        return chosen

    def _clip(self) -> None:
        """Scale each head's gradient down to its limit, as ``torch.nn.utils.clip_grad_norm_``."""
        gradients = [stack.grad for stack in self.heads.weights.values() if stack.grad is not None]
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
        factors = (self._limits / (norms.double() + 1e-6)).clamp(max=1.0).to(norms.dtype)
        if bool((factors < 1).any()):
            for gradient in gradients:
                gradient.mul_(factors.view(-1, *[1] * (gradient.ndim - 1)))


class _Block:
    """Heads ``start`` … ``end`` − 1, their optimizer and its schedule."""

    def __init__(self, heads: StackedHeads, recipe: Recipe, start: int, end: int):
        self.start, self.end, self.recipe = start, end, recipe
        # Views without a history: the optimizer changes the stack's own memory.
        self.parameters = [stack.detach()[start:end] for stack in heads.weights.values()]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in self.parameters if p.ndim > 2], "weight_decay": recipe.weight_decay},
                {"params": [p for p in self.parameters if p.ndim <= 2], "weight_decay": 0.0},
            ],
            lr=recipe.learning_rate,
            betas=recipe.betas,
            eps=recipe.eps,
            fused=True,
        )  # fmt: skip
        self.scheduler = make_scheduler(
            self.optimizer,
            total_steps=recipe.epochs * recipe.steps_per_epoch,
            warmup_steps=recipe.warmup_steps,
            learning_rate=recipe.learning_rate,
            eta_min=recipe.eta_min,
        )

    def step(self, heads: StackedHeads) -> None:
        for parameter, stack in zip(self.parameters, heads.weights.values(), strict=True):
            parameter.grad = None if stack.grad is None else stack.grad[self.start : self.end]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)

    def take_over(self, old: _Block, places: Sequence[int]) -> None:
        """Go on where ``old`` stands, with the heads at ``places`` in it."""
        for mine, its in zip(self.parameters, old.parameters, strict=True):
            self.optimizer.state[mine] = {
                key: value.clone() if key == "step" else value[list(places)]
                for key, value in old.optimizer.state[its].items()
            }
        self.scheduler.load_state_dict(old.scheduler.state_dict())
        rates: list[Tensor | float] = [group["lr"] for group in old.optimizer.param_groups]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
