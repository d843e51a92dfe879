"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) through the peft library, and their merging."""

from __future__ import annotations

import torch
from torch import nn

from mirip_fast.config import FinetuneConfig
from mirip_fast.errors import ConfigError
from mirip_fast.finetune.model import ScoringModel


def add_lora(model: ScoringModel, settings: FinetuneConfig) -> None:
    """Put adapters beside linear layers of the backbone's blocks; its outputs are as before.

    Raises:
        ConfigError: peft is not installed, or no layer has such a name.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ConfigError(
            "--strategy lora needs the peft library: pip install 'mirip-fast[lora]'"
        ) from None
    targets = _targets(model, settings.lora_targets)
    config = LoraConfig(
        r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules=sorted(targets)
    )
    inject_adapter_in_model(config, model.backbone)


def _targets(model: ScoringModel, wanted: str | None) -> set[str]:
    """Full names of the linear layers to adapt."""
    inside = {id(module) for block in model.anatomy.blocks for module in block.modules()}
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
