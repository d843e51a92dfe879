"""The built-in backbone: a small DINOv2 whose weights are drawn, not trained.

It needs no download, so that the tool can be tried and tested anywhere. Its features carry colour and
texture but no taste: what it ranks is a demonstration.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import nn

#: Part of the fingerprint: raise it when the weights change in any way.
VERSION = 1

CONFIG: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "mlp_ratio": 2,
    "patch_size": 14,
    "image_size": 224,
    "layerscale_value": 1.0,
}


def build() -> nn.Module:
    """A ``Dinov2Model`` with seeded weights, the same on every machine and torch version.

    NumPy's legacy generator draws them, because its stream is guaranteed never to change. Matrices are
    N(0, 1/fan-in), which keeps the scale of activations from layer to layer.
    """
    import torch
    from transformers import Dinov2Config, Dinov2Model

    model: nn.Module = Dinov2Model(Dinov2Config(**CONFIG))
    draw = np.random.RandomState(20_230_414)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "norm" in name or "layer_scale" in name or name.endswith("bias"):
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            fan_in = int(np.prod(parameter.shape[1:])) if parameter.dim() > 1 else 1
            scale = 0.02 if "embeddings" in name and "projection" not in name else fan_in**-0.5
            values = draw.standard_normal(tuple(parameter.shape)) * scale
            parameter.copy_(torch.from_numpy(values))
    return model
