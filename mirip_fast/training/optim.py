"""Optimizer, learning rate schedule and gradient clipping, shared by both training loops."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from mirip_fast.config import TrainConfig


def decaying(model: nn.Module) -> set[int]:
    """The ``id`` of every parameter that weight decay acts on: matrices of linear and convolution layers.

    Not biases, norms, LayerScale, nor CLS, register and position tokens, whatever their shapes.
    """
    return {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)
    }


def parameter_groups(
    model: nn.Module, learning_rate: float, weight_decay: float
) -> list[dict[str, object]]:
    """Trainable parameters in two groups: those that decay (see :func:`decaying`), and the others."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    decay = decaying(model)
    matrices = [p for p in trainable if id(p) in decay]
    vectors = [p for p in trainable if id(p) not in decay]
    return [
        {"params": matrices, "lr": learning_rate, "weight_decay": weight_decay},
        {"params": vectors, "lr": learning_rate, "weight_decay": 0.0},
    ]


def make_optimizer(
    model: nn.Module, config: TrainConfig, learning_rate: float
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) over :func:`parameter_groups`."""
    return torch.optim.AdamW(
        parameter_groups(model, learning_rate, config.weight_decay),
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
