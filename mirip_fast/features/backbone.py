"""A loaded, frozen backbone: pixels in, tokens out."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from mirip_fast.errors import BackboneError
from mirip_fast.features import tiny_random
from mirip_fast.features.backbone_files import BackboneSpec
from mirip_fast.features.onednn import through_onednn
from mirip_fast.features.pooling import layer_of, pool_tokens
from mirip_fast.runtime import keep_freed_memory, torch_dtype

log = logging.getLogger(__name__)


class Backbone:
    """A vision transformer with its normalisation, on one device, in one precision.

    Attributes:
        spec: what its files say about it.
        model: the transformers model, in eval mode, without gradients.
        compiled: whether torch.compile makes code for it at its first pass.
    """

    compiled = False

    def __init__(self, spec: BackboneSpec, model: nn.Module, device: torch.device, precision: str):
        self.spec = spec
        self.device = device
        self.dtype = torch_dtype(precision)
        self.model = model.to(device=device, dtype=self.dtype).eval().requires_grad_(False)
        self._mean = torch.tensor(spec.mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(spec.std, device=device).view(1, 3, 1, 1)

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [B, H, W, 3] in 0–255 → normalised [B, 3, H, W] on the device, compute precision."""
        pixels = images.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        # In place: on a CPU three more copies of the pixels cost as much as a twentieth of a small backbone.
        pixels = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        return pixels.div_(255).sub_(self._mean).div_(self._std).to(self.dtype)

    def compile(self) -> None:
        """Have code made for exactly the shapes that come, at the first pass (takes a minute or more)."""
        self.model.compile(dynamic=False)
        self.compiled = True

    @contextlib.contextmanager
    def many_passes(self) -> Iterator[None]:
        """On a CPU passes inside the block go through oneDNN, and keep memory for each other."""
        if self.device.type != "cpu":
            yield
            return
        keep_freed_memory()
        # Compiled code has kernels of its own choice.
        with contextlib.nullcontext() if self.compiled else through_onednn(self.model):
            yield

    @torch.inference_mode()
    def tokens(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """CLS tokens [B, D] and patch tokens [B, rows, columns, D] of the last block; register tokens are
        left out.
        """
        rows = features_of(self.spec, self.model, pixels, ("cls", "patch"))
        rows_of, columns = (side // self.spec.patch_size for side in pixels.shape[-2:])
        return rows["cls"], rows["patch"].reshape(len(pixels), rows_of, columns, -1)

    @torch.inference_mode()
    def features(self, pixels: torch.Tensor, kinds: Sequence[str]) -> dict[str, torch.Tensor]:
        """What one pass over normalised images says; see :func:`features_of`."""
        return features_of(self.spec, self.model, pixels, kinds)


def load_backbone(spec: BackboneSpec, device: torch.device, precision: str) -> Backbone:
    """Load a backbone's weights through ``transformers.AutoModel`` (or build the untrained one).

    Raises:
        BackboneError: the files do not make a model.
    """
    return Backbone(spec, load_model(spec), device, precision)


def load_model(spec: BackboneSpec) -> nn.Module:
    """The bare transformers model of ``spec``, float32, with attention through SDPA.

    Raises:
        BackboneError: the files do not make a model.
    """
    if spec.folder is None:
        log.warning(
            "Backbone tiny-random is UNTRAINED: it shows that everything works, "
            "its scores mean nothing."
        )
        return tiny_random.build()
    from transformers import AutoModel
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    try:
        model: nn.Module = AutoModel.from_pretrained(
            spec.folder, local_files_only=True, dtype=torch.float32
        )
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BackboneError(f"The backbone in {spec.folder} can not be loaded: {first}") from error
    return model


def features_of(
    spec: BackboneSpec, model: nn.Module, pixels: torch.Tensor, kinds: Sequence[str]
) -> dict[str, torch.Tensor]:
    r"""Several kinds of features from one pass of a backbone.

    Args:
        spec: what the backbone is.
        model: the bare transformers model.
        pixels: [B, 3, H, W] normalised, H and W multiples of the patch size.
        kinds: as in :mod:`mirip_fast.features.pooling`.

    Returns:
        kind → [B, \*shape], at least float32.

    Raises:
        BackboneError: the model does not give CLS + registers + patches.
    """
    layers = sorted({layer_of(kind) or 0 for kind in kinds})  # 0: the last one
    arguments: dict[str, Any] = {}
    if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
        arguments["interpolate_pos_encoding"] = True
    if layers[-1]:
        # Newer releases of transformers keep the named layers only, older ones all of them.
        arguments["output_hidden_states"] = layers[layers[0] == 0 :]
    output = model(pixels, **arguments)
    result: dict[str, torch.Tensor] = {}
    for layer in layers:
        of_layer = [kind for kind in kinds if (layer_of(kind) or 0) == layer]
        tokens = (
            final_norm(model)(output.hidden_states[layer]) if layer else output.last_hidden_state
        )
        cls, patches = split_tokens(spec, tokens, pixels.shape[-2:])
        result.update((kind, pool_tokens(kind, cls, patches)) for kind in of_layer)
    return result


def final_norm(model: nn.Module) -> nn.Module:
    """The norm behind a backbone's last block.

    Raises:
        BackboneError: the model is built in another way.
    """
    norms = [child for child in model.children() if isinstance(child, nn.LayerNorm)]
    if not norms:
        raise BackboneError(
            f"{type(model).__name__} has no final norm of its own: its middle layers cannot be read; "
            "give --layers last"
        )
    return norms[-1]


def split_tokens(
    spec: BackboneSpec, tokens: torch.Tensor, size: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """All tokens [B, T, D] of images of ``size`` (H, W) → cls [B, D], patches [B, rows, columns, D].

    Raises:
        BackboneError: T is not 1 + registers + patches.
    """
    rows, columns = (side // spec.patch_size for side in size)
    skipped = 1 + spec.num_register_tokens
    if tokens.shape[1] != skipped + rows * columns:
        raise BackboneError(
            f"--backbone {spec.name}: {tokens.shape[1]} tokens for {size[0]} × {size[1]} pixels, where "
            f"1 CLS + {spec.num_register_tokens} register + {rows}×{columns} patch tokens were "
            "expected; this model type is not supported"
        )
    return tokens[:, 0], tokens[:, skipped:].reshape(tokens.shape[0], rows, columns, -1)
