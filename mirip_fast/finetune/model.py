"""Backbone and head as one module that scores images, and what is built into it for training.

A backbone's parts are found by what they are (embeddings, blocks, final norm): ``transformers`` gives its
models other inner names from class to class and version to version. Noise is added by forward hooks that
draw from torch's global generators, so that seeding these replays it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mirip_fast.config import FinetuneConfig
from mirip_fast.errors import BackboneError, ConfigError
from mirip_fast.features.backbone import UNUSED
from mirip_fast.features.backbone_files import BackboneSpec
from mirip_fast.features.recipe import head_kinds, pool_tokens
from mirip_fast.models.head import RankingHead

#: The layer number of the embeddings; blocks have 0 … L−1, and the final norm L.
EMBEDDINGS = -1


def find_parts(model: nn.Module, num_layers: int) -> tuple[nn.Module, ...]:
    """The parts of a ``transformers`` vision model: embeddings (patches, CLS and register tokens, positions),
    the transformer blocks, and the final norm.

    Args:
        model: the bare model.
        num_layers: how many blocks it has.

    Raises:
        BackboneError: it is built in another way.
    """
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers]
    children = dict(model.named_children())
    norms = [child for child in children.values() if isinstance(child, nn.LayerNorm)]
    embeddings = children.get("embeddings")
    if not lists or not norms or embeddings is None:
        raise BackboneError(
            f"{type(model).__name__} is no plain stack of embeddings, {num_layers} blocks and a final "
            "norm: only its head can be trained (`mirip-fast train --head-only`)"
        )
    return (embeddings, *lists[0], norms[-1])


def checkpoint_blocks(model: ScoringModel) -> None:
    """Keep no activations inside blocks that learn; backward computes them again (Chen et al. 2016).

    Noise inside a block is replayed by torch's own checkpointing.
    """
    for block in model.blocks:
        block.forward = _checkpointed(block, block.forward)


def _checkpointed(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        if block.training and torch.is_grad_enabled():
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        return forward(*args, **kwargs)

    return checkpointed


class ScoringModel(nn.Module):
    """Images in, scores out.

    Args:
        spec: what the backbone is.
        backbone: the bare ``transformers`` model.
        head: projector and score head.
        features: what the head sees: ``cls``, ``mean`` or ``cls+mean``.

    Raises:
        BackboneError: the backbone is no plain stack of blocks.
    """

    def __init__(self, spec: BackboneSpec, backbone: nn.Module, head: RankingHead, features: str):
        super().__init__()
        self.spec, self.kinds = spec, head_kinds(features)
        self.skipped = 1 + spec.num_register_tokens
        self.backbone, self.head = backbone, head
        #: Embeddings, blocks and final norm.
        self.parts = find_parts(backbone, spec.num_layers)
        self.blocks = self.parts[1:-1]
        layers = {
            id(parameter): layer
            for layer, part in enumerate(self.parts, EMBEDDINGS)
            for parameter in part.parameters()
        }
        #: The layer of every backbone parameter that takes part in features (mask token and pooler do not),
        #: before anything is added to the backbone.
        self.layers = {
            name: layers.get(id(parameter), EMBEDDINGS)
            for name, parameter in backbone.named_parameters()
            if not any(unused in name for unused in UNUSED)
        }
        self._arguments = {}
        if "interpolate_pos_encoding" in inspect.signature(backbone.forward).parameters:
            self._arguments["interpolate_pos_encoding"] = True
        for name, values in (("mean", spec.mean), ("std", spec.std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.head.parameters()).device

    def train(self, mode: bool = True) -> ScoringModel:
        """Training mode for the parts that learn; frozen parts of the backbone stay in eval mode."""
        super().train(mode)
        if mode:
            self.backbone.eval()
            for part in self.parts:
                part.train(any(p.requires_grad for p in part.parameters()))
        return self

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that learn now."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, S, S, 3] uint8 pixels, S a multiple of the patch size → [B] scores, higher is better."""
        tokens = self.backbone(self.normalise(images), **self._arguments).last_hidden_state
        side = images.shape[1] // self.spec.patch_size
        if not self.training and tokens.shape[1] != self.skipped + side * side:
            raise BackboneError(
                f"{self.spec.name}: {tokens.shape[1]} tokens for {side} × {side} patches; "
                "this model type is not supported"
            )
        return self.score_tokens(tokens)

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """[B, S, S, 3] uint8 → [B, 3, S, S] (channels last in memory) as the backbone expects it."""
        dtype = next(self.backbone.parameters()).dtype
        pixels = images.to(self.device, non_blocking=True).permute(0, 3, 1, 2).to(dtype) / 255
        mean, std = self.get_buffer("mean").to(dtype), self.get_buffer("std").to(dtype)
        return (pixels - mean) / std

    def score_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, T, D] tokens after the final norm → [B] scores."""
        cls, patches = tokens[:, 0], tokens[:, self.skipped :].unsqueeze(2)
        # Out of autocast: bf16 scores would tie where the margin of a pair is small.
        with torch.autocast(tokens.device.type, enabled=False):
            parts = [pool_tokens(kind, cls, patches) for kind in self.kinds]
            scores: torch.Tensor = self.head(torch.cat(parts, dim=-1))
        return scores


def add_stochastic_depth(model: ScoringModel, rate: float) -> None:
    """Leave blocks out at random, image by image (Huang et al. 2016, arXiv 1603.09382).

    The probability rises from 0 at the first block to ``rate`` at the last (Touvron et al. 2021). What a
    kept block adds is scaled by 1 / (1 − probability), so that its mean stays. Blocks in eval mode, that
    is frozen ones, are never left out.
    """
    last = max(1, len(model.blocks) - 1)
    for i, block in enumerate(model.blocks):
        if rate > 0 and i > 0:
            hook = functools.partial(_drop_block, rate * i / last)
            block.register_forward_hook(hook, with_kwargs=True)


def _drop_block(
    probability: float, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    """Forward hook of one block."""
    if not block.training:
        return None
    before = args[0] if args else kwargs["hidden_states"]
    after = output[0] if isinstance(output, tuple) else output
    keep = 1 - probability
    mask = (torch.rand(len(before), 1, 1, device=before.device) < keep).to(after.dtype) / keep
    mixed = before + (after - before) * mask
    return (mixed, *output[1:]) if isinstance(output, tuple) else mixed


def add_patch_dropout(model: ScoringModel, share: float) -> None:
    """Leave out a random share of each image's patch tokens before the first block, while training.

    Fewer tokens are less work, and a regulariser (Liu et al. 2023, arXiv 2208.07220). At least one stays.

    Raises:
        ConfigError: positions enter every block of this backbone; they would no longer fit.
    """
    if share <= 0:
        return
    if any("rope" in name or "rotary" in name for name, _ in model.backbone.named_children()):
        raise ConfigError(
            "--patch-dropout: this backbone has rotary positions, which need all patches; leave it out"
        )

    skipped = model.skipped  # CLS and register tokens

    def drop(_: nn.Module, __: tuple[Any, ...], tokens: torch.Tensor) -> torch.Tensor | None:
        if not model.training:
            return None
        patches = tokens[:, skipped:]
        kept = max(1, round(patches.shape[1] * (1 - share)))
        order = torch.rand(patches.shape[:2], device=tokens.device).argsort(dim=1)
        chosen = order[:, :kept].sort(dim=1).values.unsqueeze(-1).expand(-1, -1, patches.shape[2])
        return torch.cat([tokens[:, :skipped], patches.gather(1, chosen)], dim=1)

    model.parts[0].register_forward_hook(drop)


def add_lora(model: ScoringModel, settings: FinetuneConfig) -> None:
    """Put adapters beside linear layers of the backbone's blocks; its outputs are as before.

    Raises:
        ConfigError: peft is not installed, or no layer has such a name.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ConfigError("--strategy lora needs the peft library: pip install peft") from None
    targets = _targets(model, settings.lora_targets)
    config = LoraConfig(
        r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules=sorted(targets)
    )
    inject_adapter_in_model(config, model.backbone)


def _targets(model: ScoringModel, wanted: str | None) -> set[str]:
    """Full names of the linear layers to adapt."""
    inside = {id(module) for block in model.blocks for module in block.modules()}
    linear = [
        name
        for name, module in model.backbone.named_modules()
        if isinstance(module, nn.Linear) and id(module) in inside
    ]
    if wanted is None:
        return {name for name in linear if "attention" in name}
    ends = tuple(end.strip() for end in wanted.split(","))
    chosen = {name for name in linear if name.endswith(ends)}
    missing = [end for end in ends if not any(name.endswith(end) for name in linear)]
    if missing or not chosen:
        there = sorted({".".join(name.split(".")[-2:]) for name in linear})
        raise ConfigError(
            f"--lora-targets {', '.join(missing)}: no linear layer is called so; there are "
            f"{', '.join(there)}"
        )
    return chosen


def merged_state(backbone: nn.Module) -> dict[str, torch.Tensor]:
    """The backbone's weights under their plain names, adapters added in.

    Without adapters that is its ``state_dict()``. Nothing is changed in the model.
    """
    state = {
        name.replace(".base_layer.", "."): tensor.detach()
        for name, tensor in backbone.state_dict().items()
        if ".lora_" not in name
    }
    for name, module in backbone.named_modules():
        if hasattr(module, "get_delta_weight") and hasattr(module, "base_layer"):
            weight = f"{name}.weight"
            state[weight] = state[weight] + module.get_delta_weight("default").detach()
    return state
