"""Noise inside the backbone while it learns: stochastic depth and patch dropout, as forward hooks.

Both draw from torch's global generators, so that seeding these replays them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mirip_fast.errors import ConfigError
from mirip_fast.finetune.anatomy import Anatomy


def add_stochastic_depth(anatomy: Anatomy, rate: float) -> None:
    """Leave blocks out at random, image by image (Huang et al. 2016, arXiv 1603.09382).

    The probability rises from 0 at the first block to ``rate`` at the last (Touvron et al. 2021). What a
    kept block adds is scaled by 1 / (1 − probability), so that its mean stays. Blocks in eval mode, that
    is frozen ones, are never left out.
    """
    last = max(1, len(anatomy.blocks) - 1)
    for i, block in enumerate(anatomy.blocks):
        if rate > 0 and i > 0:
            block.register_forward_hook(_DropBlock(rate * i / last), with_kwargs=True)


class _DropBlock:
    """Forward hook of one block."""

    def __init__(self, probability: float):
        self.probability = probability

    def __call__(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        if not block.training:
            return None
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        keep = 1 - self.probability
        mask = (torch.rand(len(before), 1, 1, device=before.device) < keep).to(after.dtype) / keep
        mixed = before + (after - before) * mask
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed


def add_patch_dropout(model: nn.Module, anatomy: Anatomy, share: float, skipped: int) -> None:
    """Leave out a random share of each image's patch tokens, before the first block.

    Fewer tokens are less work, and a regulariser (Liu et al. 2023, arXiv 2208.07220).

    Args:
        model: patches are left out while it is in training mode.
        anatomy: its backbone's parts.
        share: of the patches, 0 … 1; at least one patch stays.
        skipped: CLS and register tokens, which stay.

    Raises:
        ConfigError: positions enter every block of this backbone; they would no longer fit.
    """
    if share <= 0:
        return
    if anatomy.rotary:
        raise ConfigError(
            "--patch-dropout: this backbone has rotary positions, which need all patches; leave it out"
        )

    def drop(_: nn.Module, __: tuple[Any, ...], tokens: torch.Tensor) -> torch.Tensor | None:
        if not model.training:
            return None
        patches = tokens[:, skipped:]
        kept = max(1, round(patches.shape[1] * (1 - share)))
        order = torch.rand(patches.shape[:2], device=tokens.device).argsort(dim=1)
        chosen = order[:, :kept].sort(dim=1).values.unsqueeze(-1).expand(-1, -1, patches.shape[2])
        return torch.cat([tokens[:, :skipped], patches.gather(1, chosen)], dim=1)

    anatomy.embeddings.register_forward_hook(drop)
