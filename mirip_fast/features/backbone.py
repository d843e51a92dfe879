"""A loaded, frozen backbone: pixels in, tokens out."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mirip_fast.errors import BackboneError, MiripError
from mirip_fast.features.backbone_files import (
    BackboneSpec,
    build_tiny_random,
    first_line,
    weight_files,
)
from mirip_fast.features.recipe import layer_of, pool_tokens
from mirip_fast.runtime import is_out_of_memory, torch_dtype

log = logging.getLogger(__name__)

#: Parameters that take no part in features: they may be missing, and are never trained.
UNUSED = ("mask_token", "pooler.")


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

    @torch.inference_mode()
    def tokens(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """CLS tokens [B, D] and patch tokens [B, rows, columns, D] of the last block; register tokens are
        left out.
        """
        rows = self.features(pixels, ("cls", "patch"))
        rows_of, columns = (side // self.spec.patch_size for side in pixels.shape[-2:])
        return rows["cls"], rows["patch"].reshape(len(pixels), rows_of, columns, -1)

    @torch.inference_mode()
    def features(self, pixels: torch.Tensor, kinds: Sequence[str]) -> dict[str, torch.Tensor]:
        """What one pass over normalised images says; see :func:`features_of`.

        Raises:
            BackboneError: the model cannot run on them, too.
        """
        try:
            return features_of(self.spec, self.model, pixels, kinds)
        except MiripError:  # also that the run was stopped
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            if self.compiled:
                raise BackboneError(
                    f"--compile does not work here ({first_line(error)}); the same command without it does"
                ) from error
            raise BackboneError(
                f"--backbone {self.spec.name}: the model cannot run on {pixels.shape[-2]} × "
                f"{pixels.shape[-1]} pixels: {_said(error)}"
            ) from error


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
        return build_tiny_random()
    from transformers import AutoConfig, AutoModel
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    safe: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(spec.folder, **safe)
        config = getattr(config, "vision_config", config)  # of a whole SigLIP or CLIP
        config._attn_implementation = (
            None  # SDPA where the model has it, never a kernel from elsewhere
        )
        _check_bulk(spec, config)
        with _quiet_transformers():
            # Weights of another shape are only let through to be named below: none is ever accepted.
            model, report = AutoModel.from_pretrained(
                spec.folder, config=config, dtype=torch.float32, weights_only=True,
                output_loading_info=True, ignore_mismatched_sizes=True, **safe,
            )  # fmt: skip
    except BackboneError:
        raise
    except Exception as error:
        raise BackboneError(
            f"The backbone in {spec.folder} cannot be loaded: {_said(error)}"
        ) from error
    _check_weights(spec, model, report)
    if any(name.endswith(("cls_token", "class_embedding")) for name in model.state_dict()):
        whole: nn.Module = model
        return whole
    return TowerWithoutCls(model, spec, pooled=not report["missing_keys"])


def _said(error: Exception) -> str:
    """The beginning of a library's message, without its advice to load in ways that are not safe."""
    text = " ".join(str(error).split()).partition(" Model type should be one of")[0]
    text = text or type(error).__name__
    if "trust_remote_code" in text:
        return "it asks to run code of its own, which is never done"
    if isinstance(error, KeyError):
        return f"transformers does not know {text}"
    if "weights_only" in text:
        return (
            "its pickled weights are damaged, or hold more than tensors, which is never read. Save the "
            "model with `save_pretrained`, which writes safetensors, where it comes from"
        )
    return text if len(text) <= 300 else text[:300] + " …"


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without the library's own report on weights, which names all and judges none."""
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _check_bulk(spec: BackboneSpec, config: Any) -> None:
    """Refuse a config that asks for far more numbers than the weights have, before memory is taken.

    A byte of the files is at most one number, and a gigabyte of what they lack may be made.
    """
    from transformers import AutoModel

    with torch.device("meta"):
        model = AutoModel.from_config(config, trust_remote_code=False)
    asked = sum(value.numel() for value in (*model.parameters(), *model.buffers()))
    held = sum(file.stat().st_size for file in weight_files(spec.folder or Path()))
    if asked > held + 250_000_000:
        raise BackboneError(
            f"--backbone {spec.name}: its config.json describes {asked:,} numbers, far more than the "
            f"weights beside it hold ({held:,} bytes); they do not belong together"
        )


def _check_weights(spec: BackboneSpec, model: nn.Module, report: dict[str, Any]) -> None:
    """Refuse weights that features depend on and that are missing, of another shape, or not finite.

    Weights inside the model's own modules that it has no place for (registers, more layers) mean that it
    is another model. What lies beside them (a text model, a classifier) is of no concern.

    Raises:
        BackboneError: names the first of them.
    """
    own = {name.partition(".")[0] for name in model.state_dict()}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    faults = {
        "are missing in the files": report["missing_keys"],
        "have another shape in the files": {key[0] for key in report["mismatched_keys"]},
        "are in the files and have no place in the model": {
            key
            for key in report["unexpected_keys"]
            if key.removeprefix(prefix).partition(".")[0] in own
        },
    }
    for fault, keys in faults.items():
        found = sorted(key for key in keys if not any(unused in key for unused in UNUSED))
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            others = sorted(report["unexpected_keys"] - set(found))
            instead = f" In the files and not expected: {', '.join(others[:3])}." if others else ""
            raise BackboneError(
                f"--backbone {spec.name}: weights and config.json do not fit, features would be wrong. "
                f"{len(found)} weights {fault}: {', '.join(found[:3])}{more}.{instead} Get the model "
                "again, or save it with `save_pretrained` where it comes from"
            )
    for name, value in model.named_parameters():
        used = not any(unused in name for unused in UNUSED)
        # The sum is quicker, and never finite where a number is not.
        if used and not value.sum().isfinite() and not value.isfinite().all():
            raise BackboneError(
                f"--backbone {spec.name}: its weight {name} is not finite (NaN or infinity): "
                "the file is damaged, or its training went wrong"
            )


class TowerWithoutCls(nn.Module):
    """A vision tower without a CLS token (SigLIP, …): its pooled token stands first, where CLS would.

    Args:
        model: the bare ``transformers`` model.
        spec: what its files say about it.
        pooled: take the token of its own pooling, if it has one; else the mean of the patches.
    """

    def __init__(self, model: nn.Module, spec: BackboneSpec, *, pooled: bool):
        super().__init__()
        self.model, self.patch, self.pooled = model, spec.patch_size, pooled
        # SigLIP 2 with free aspect ratios takes rows of pixels of each patch, and how many there are.
        self.by_patch = "spatial_shapes" in inspect.signature(model.forward).parameters

    def forward(self, pixels: torch.Tensor, **how: Any) -> Any:
        """[B, 3, H, W] → an output whose ``last_hidden_state`` is [B, 1 + patches, D]."""
        if self.by_patch:
            b, c, height, width = pixels.shape
            rows, columns, p = height // self.patch, width // self.patch, self.patch
            cut = pixels.reshape(b, c, rows, p, columns, p).permute(0, 2, 4, 3, 5, 1)
            shapes = torch.tensor([[rows, columns]], device=pixels.device).expand(b, 2)
            every = torch.ones(b, rows * columns, dtype=torch.int32, device=pixels.device)
            output = self.model(cut.reshape(b, rows * columns, -1), every, shapes, **how)
        else:
            output = run_model(self.model, pixels, **how)
        first = output.get("pooler_output") if self.pooled else None
        output.last_hidden_state = with_first(output.last_hidden_state, first)
        return output


def with_first(tokens: torch.Tensor, first: torch.Tensor | None) -> torch.Tensor:
    """Patch tokens [B, T, D] behind a token [B, D] in the place of CLS, their mean where there is none."""
    if first is None or first.shape != tokens[:, 0].shape:
        first = tokens.mean(dim=1)
    return torch.cat([first[:, None], tokens], dim=1)


def run_model(model: nn.Module, pixels: torch.Tensor, **how: Any) -> Any:
    """A pass of a ``transformers`` vision model, with positions for the size of these pixels."""
    if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
        how["interpolate_pos_encoding"] = True
    return model(pixels, **how)


def features_of(
    spec: BackboneSpec, model: nn.Module, pixels: torch.Tensor, kinds: Sequence[str]
) -> dict[str, torch.Tensor]:
    r"""Several kinds of features from one pass of a backbone.

    Args:
        spec: what the backbone is.
        model: the bare transformers model.
        pixels: [B, 3, H, W] normalised, H and W multiples of the patch size.
        kinds: as in :mod:`mirip_fast.features.recipe`.

    Returns:
        kind → [B, \*shape], at least float32.

    Raises:
        BackboneError: the model does not give CLS + registers + patches.
    """
    layers = sorted({layer_of(kind) or 0 for kind in kinds})  # 0: the last one
    # Newer releases of transformers keep the named layers only, older ones all of them.
    more = {"output_hidden_states": layers[layers[0] == 0 :]} if layers[-1] else {}
    output = run_model(model, pixels, **more)
    result: dict[str, torch.Tensor] = {}
    for layer in layers:
        of_layer = [kind for kind in kinds if (layer_of(kind) or 0) == layer]
        tokens = output.last_hidden_state
        if layer:
            tokens = final_norm(model)(output.hidden_states[layer])
            if isinstance(model, TowerWithoutCls):  # its pooling knows the last layer only
                tokens = with_first(tokens, None)
        cls, patches = split_tokens(spec, tokens, pixels.shape[-2:])
        result.update((kind, pool_tokens(kind, cls, patches)) for kind in of_layer)
    return result


def final_norm(model: nn.Module) -> nn.Module:
    """The norm behind a backbone's last block.

    Raises:
        BackboneError: the model is built in another way.
    """
    model = model.model if isinstance(model, TowerWithoutCls) else model
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
