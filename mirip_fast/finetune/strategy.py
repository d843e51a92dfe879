"""Which parameters learn, and how fast: the strategies of ``--strategy``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from mirip_fast.config import Config, FinetuneConfig
from mirip_fast.errors import ConfigError
from mirip_fast.finetune.model import (
    EMBEDDINGS,
    ScoringModel,
    add_lora,
    add_patch_dropout,
    add_stochastic_depth,
    checkpoint_blocks,
)
from mirip_fast.training.optim import decaying

KINDS = ("full", "last", "llrd", "gradual", "lora")

#: Everything of the backbone learns.
ALL = -1

_HEAD_LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Strategy:
    """A strategy as parsed.

    Attributes:
        kind: one of :data:`KINDS`.
        blocks: for ``last``, how many of the last blocks learn.
        schedule: for ``gradual``, (first epoch, counted from 1; blocks that learn or :data:`ALL`), rising.
    """

    kind: str
    blocks: int = 0
    schedule: tuple[tuple[int, int], ...] = ()

    @property
    def base_rate(self) -> float:
        """Peak learning rate of the backbone when none is given."""
        return 1e-4 if self.kind in ("llrd", "lora") else 1e-5

    def blocks_at(self, epoch: int, head_epochs: int) -> int:
        """How many of the last blocks learn in an epoch (counted from 1): 0 is the head alone.

        With ``lora`` that is about the added matrices.
        """
        if epoch <= head_epochs:
            return 0
        if self.kind == "last":
            return self.blocks
        if self.kind == "gradual":
            return next((blocks for first, blocks in reversed(self.schedule) if epoch >= first), 0)
        return ALL


def parse_strategy(settings: FinetuneConfig, num_layers: int) -> Strategy:
    """The strategy that the settings name, for a backbone of ``num_layers`` blocks.

    Raises:
        ConfigError: unknown, or more blocks than there are.
    """
    kind, _, count = settings.strategy.partition(":")
    if kind not in KINDS or bool(count) != (kind == "last"):
        raise ConfigError(
            f"--strategy {settings.strategy}: use full, last:N (like last:2), llrd, gradual or lora"
        )
    if kind == "last":
        blocks = _blocks(count, num_layers, f"--strategy {settings.strategy}")
        if blocks == 0:
            raise ConfigError(
                "--strategy last:0 trains the head alone: `mirip-fast train --head-only` does that "
                "on cached features, in seconds"
            )
        return Strategy(kind, blocks=num_layers if blocks == ALL else blocks)
    schedule = _schedule(settings.unfreeze, num_layers) if kind == "gradual" else ()
    return Strategy(kind, schedule=schedule)


def _schedule(text: str, num_layers: int) -> tuple[tuple[int, int], ...]:
    steps = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+|all)\s*", part)
        if not found or int(found[1]) < 1:
            raise ConfigError(
                f"--unfreeze {text}: pairs EPOCH:BLOCKS are expected, epochs counted from 1, such as "
                "1:0,3:2,5:all"
            )
        steps.append((int(found[1]), _blocks(found[2], num_layers, f"--unfreeze {text}")))
    epochs = [first for first, _ in steps]
    if epochs != sorted(set(epochs)):
        raise ConfigError(f"--unfreeze {text}: the epochs must rise")
    return tuple(steps)


def _blocks(text: str, num_layers: int, what: str) -> int:
    if text == "all":
        return ALL
    if not text.isdigit() or int(text) > num_layers:
        raise ConfigError(f"{what}: the backbone has {num_layers} blocks; {text!r} are not in it")
    return int(text)


def prepare_model(model: ScoringModel, strategy: Strategy, settings: FinetuneConfig) -> None:
    """Add to the backbone what strategy and settings ask for; nothing learns yet, see :func:`unfreeze`.

    Raises:
        ConfigError: the backbone cannot have it.
    """
    if strategy.kind == "lora":
        add_lora(model, settings)
    model.backbone.requires_grad_(False)
    add_stochastic_depth(model, settings.stochastic_depth)
    add_patch_dropout(model, settings.patch_dropout)
    if settings.gradient_checkpointing:
        checkpoint_blocks(model)


def unfreeze(model: ScoringModel, strategy: Strategy, blocks: int) -> None:
    """Let the head and the last ``blocks`` blocks learn (with the final norm), and nothing else.

    Args:
        model: after :func:`prepare_model`.
        strategy: decides what of a block learns.
        blocks: 0 for the head alone, :data:`ALL` for everything.
    """
    model.backbone.requires_grad_(False)
    if blocks == 0:
        return
    if strategy.kind == "lora":
        for name, parameter in model.backbone.named_parameters():
            parameter.requires_grad_(".lora_" in name)
        return
    first = EMBEDDINGS if blocks == ALL else len(model.blocks) - blocks
    parameters = dict(model.backbone.named_parameters())
    for name, layer in model.layers.items():
        parameters[name].requires_grad_(layer >= first)


def learning_rates(config: Config, strategy: Strategy) -> tuple[float, float]:
    """Peak learning rates: the backbone's base, and the head's."""
    base = strategy.base_rate if config.train.learning_rate is None else config.train.learning_rate
    head = config.finetune.head_learning_rate
    if head is None:
        head = base if strategy.kind == "llrd" else _HEAD_LEARNING_RATE
    return base, head


def parameter_groups(
    model: ScoringModel, strategy: Strategy, config: Config
) -> list[dict[str, Any]]:
    """Optimizer groups of everything that may learn in the run, one per learning rate and decay.

    With ``llrd``, block i of 0 … L−1 gets base · decay^(L − i), the embeddings base · decay^(L + 1), the
    final norm and the head base (after Clark et al. 2020, arXiv 2003.10555). Weight decay acts on the
    matrices of linear and convolution layers only: not on biases, norms, LayerScale, CLS, register and
    position tokens.

    Returns:
        Dicts with params, lr, weight_decay, and ``name`` (such as ``block 3``).
    """
    base, head = learning_rates(config, strategy)
    matrices = decaying(model)
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    learning = [*_backbone_rates(model, strategy, base, config.finetune.layer_decay)]
    learning += [("head", head, parameter) for parameter in model.head.parameters()]
    for label, rate, parameter in learning:
        decays = id(parameter) in matrices
        group = {
            "params": [],
            "lr": rate,
            "weight_decay": config.train.weight_decay if decays else 0.0,
            "name": label if decays else f"{label}, no decay",
        }
        groups.setdefault((label, decays), group)["params"].append(parameter)
    return list(groups.values())


def _backbone_rates(
    model: ScoringModel, strategy: Strategy, base: float, decay: float
) -> Iterator[tuple[str, float, nn.Parameter]]:
    """(group, learning rate, parameter) of every backbone parameter that may learn."""
    parameters, count = dict(model.backbone.named_parameters()), len(model.blocks)
    if strategy.kind == "lora":
        yield from (("lora", base, p) for name, p in parameters.items() if ".lora_" in name)
        return
    first = count - strategy.blocks if strategy.kind == "last" else EMBEDDINGS
    other = {EMBEDDINGS: "embeddings", count: "norm"}
    for name, layer in model.layers.items():
        if strategy.kind == "llrd":
            rate = base if layer == count else base * decay ** (count - layer)
            yield other.get(layer, f"block {layer}"), rate, parameters[name]
        elif layer >= first:
            yield "backbone", base, parameters[name]
