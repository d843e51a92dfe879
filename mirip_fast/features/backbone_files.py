"""Finding a backbone and reading what its files say about it, without loading its weights (or torch)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mirip_fast.errors import BackboneError
from mirip_fast.features.hub import (
    fault_of,
    fetch_beside,
    locate,
    read_json,
    tensors,
    weight_files,
)

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)

#: The built-in, seeded, untrained backbone; its weights are drawn by :func:`build_tiny_random`.
TINY_RANDOM = "tiny-random"

_TINY_VERSION = 1  # part of the fingerprint: raise it when the weights change in any way
_TINY_CONFIG: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "mlp_ratio": 2,
    "patch_size": 14,
    "image_size": 224,
    "layerscale_value": 1.0,
}

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Keys of config.json that change nothing about the features.
_COSMETIC = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures"}
# What config.json has to say; other numbers in it are only checked.
_NEEDED = ("hidden_size", "patch_size", "num_hidden_layers")
# Steps of image processors that would change the pixels in ways that are not carried out.
_OTHER_STEPS = (
    "do_flip_channel_order",
    "do_grayscale",
    "do_color_quantize",
    "rescale_offset",
    "offset",
)

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class BackboneSpec:
    """What a backbone is, as far as its files tell; enough to name a cache and to allocate rows."""

    name: str  # as the user gave it
    folder: Path | None  # where config and weights lie; None for the built-in one
    weights_id: str  # hash of the weights and of every setting that shapes the features
    model_type: str
    hidden_size: int
    patch_size: int
    num_layers: int
    num_register_tokens: int
    mean: Triple  # of pixels from 0 to 1
    std: Triple

    @property
    def trained(self) -> bool:
        """Whether the weights come from training (the built-in backbone's do not)."""
        return self.folder is not None


def names_of_backbones(text: str) -> list[str]:
    """The backbones that a setting names, by commas; local folders with their whole path.

    Raises:
        BackboneError: none, or one twice.
    """
    whole = Path(text).expanduser().is_dir()  # its name may have a comma in it
    names = [text] if whole else [name.strip() for name in text.split(",")]
    folders = [Path(name).expanduser() for name in names]
    found = [str(f.resolve()) if f.is_dir() else n for n, f in zip(names, folders, strict=True)]
    if not all(names):
        raise BackboneError(f"--backbone {text!r}: a name is empty")
    for name in found:
        if found.count(name) > 1:
            raise BackboneError(f"--backbone {name} is given twice")
    return found


def find_backbone(name: str, hash_file: Callable[[Path], bytes]) -> BackboneSpec:
    """Locate a backbone by local directory, built-in name or Hugging Face name, and read its spec.

    Args:
        name: a directory, ``tiny-random``, or a name like ``facebook/dinov2-large``.
        hash_file: SHA-256 of a file's bytes (pass a remembering one: weights are large).

    Raises:
        BackboneError: not found, not downloadable, or no vision transformer.
    """
    if name == TINY_RANDOM:
        return tiny_random_spec()
    if "," in name and not Path(name).expanduser().is_dir():
        raise BackboneError(
            f"--backbone {name}: several are taken by embed and train --head-only alone; give one"
        )
    folder = locate(name)
    config, tower = _image_config(folder, name)
    weights = weight_files(folder)
    sizes = _check_config(tower, weights, name)
    identity = hashlib.sha256()
    identity.update(_canonical({k: v for k, v in config.items() if k not in _COSMETIC}))
    for file in weights:
        identity.update(hash_file(file))
    mean, std = _normalisation(folder)
    return BackboneSpec(
        name=name,
        folder=folder,
        weights_id=identity.hexdigest(),
        model_type=str(config.get("model_type", "unknown")),
        hidden_size=sizes["hidden_size"],
        patch_size=sizes["patch_size"],
        num_layers=sizes["num_hidden_layers"],
        num_register_tokens=sizes["num_register_tokens"],
        mean=mean,
        std=std,
    )


def tiny_random_spec() -> BackboneSpec:
    """Spec of the built-in untrained backbone."""
    config = _TINY_CONFIG
    return BackboneSpec(
        name=TINY_RANDOM,
        folder=None,
        weights_id=hashlib.sha256(_canonical({"version": _TINY_VERSION, **config})).hexdigest(),
        model_type="dinov2",
        hidden_size=int(config["hidden_size"]),
        patch_size=int(config["patch_size"]),
        num_layers=int(config["num_hidden_layers"]),
        num_register_tokens=0,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )


def build_tiny_random() -> nn.Module:
    """The built-in backbone: a small ``Dinov2Model`` of seeded weights, the same on every machine.

    NumPy's legacy generator draws them, because its stream is guaranteed never to change. Matrices are
    N(0, 1/fan-in), which keeps the scale of activations from layer to layer. Its features carry colour and
    texture but no taste: what it ranks is a demonstration.
    """
    import torch
    from transformers import Dinov2Config, Dinov2Model

    model: nn.Module = Dinov2Model(Dinov2Config(**_TINY_CONFIG))
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


def _image_config(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json, and the part of it that describes the image model (a whole SigLIP or CLIP has two)."""
    whole = read_json(folder / "config.json")
    tower = whole.get("vision_config")
    tower = tower if isinstance(tower, dict) else whole
    if not all(key in tower for key in _NEEDED):
        # Values that are their class's defaults are often left out. Rare, so that others need no torch.
        with contextlib.suppress(Exception):
            from transformers import AutoConfig

            full = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            tower = {**getattr(full, "vision_config", full).to_dict(), **tower}
    missing = [key for key in _NEEDED if tower.get(key) is None]
    if missing:
        code = "auto_map" in whole and " It asks to run code of its own, which is never done."
        raise BackboneError(
            f"--backbone {name}: its config.json has no usable {missing[0]!r} (model type "
            f"{whole.get('model_type')!r}).{code or ''} A plain vision transformer is needed, like "
            "facebook/dinov2-large, a DINOv2 with registers, a DINOv3 ViT, a ViT, SigLIP or CLIP."
        )
    return whole, tower


def _check_config(tower: dict[str, Any], weights: Sequence[Path], name: str) -> dict[str, int]:
    """The sizes in a config.json, once they are possible and fit the weights' bulk."""

    def wrong(key: str, needed: str) -> BackboneError:
        value = repr(tower.get(key))
        value = value if len(value) <= 60 else value[:60] + "…"
        return BackboneError(f"--backbone {name}: {key} in its config.json {needed}, not {value}")

    def whole(key: str, least: int, default: int | None = None) -> int:
        value = default if tower.get(key) is None else tower[key]
        if isinstance(value, list | tuple) and value and all(side == value[0] for side in value):
            value = value[0]  # patch_size: [14, 14]
        elif isinstance(value, list | tuple | dict):
            raise wrong(key, "has to be one number: rectangles are not supported")
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise wrong(key, f"has to be a whole number of at least {least}")
        return value

    sizes = {key: whole(key, 1) for key in _NEEDED}
    # DeiT's distillation token stands where registers do.
    registers = int(tower.get("model_type") == "deit")
    sizes["num_register_tokens"] = whole("num_register_tokens", 0, registers)
    patch, width = sizes["patch_size"], sizes["hidden_size"]
    # Every patch's pixels have weights, and every layer has tensors: more than there are would only take
    # all memory before it is found out.
    if 3 * patch * patch * width > sum(file.stat().st_size for file in weights):
        raise BackboneError(
            f"--backbone {name}: its config.json describes patches of {patch} pixels and vectors of "
            f"{width} numbers, far more than the weights beside it hold; they do not belong together"
        )
    held = sum(len(tensors(file)) if file.suffix == ".safetensors" else 1_000 for file in weights)
    if sizes["num_hidden_layers"] > held:
        raise wrong(
            "num_hidden_layers", f"can be at most {held}, as many as the weights have tensors"
        )
    if tower.get("image_size") is not None:
        whole("image_size", patch)
    if width % whole("num_attention_heads", 1, 1):
        raise wrong("num_attention_heads", f"has to divide hidden_size {width}")
    if whole("num_channels", 1, 3) != 3:
        raise wrong("num_channels", "has to be 3 (red, green, blue)")
    for key, value in tower.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise wrong(key, "has to be a finite number")
        if key.endswith("norm_eps") and isinstance(value, float) and not 0 < value < 1:
            raise wrong(key, "has to be between 0 and 1")
    return sizes


def _normalisation(folder: Path) -> tuple[Triple, Triple]:
    """Mean and standard deviation for pixels that were divided by 255, as AutoImageProcessor computes.

    A processor that rescales otherwise, or leaves a step out, has the same result as other mean and std:
    ``(x · f − m) / s = (x / 255 − m / 255f) / (s / 255f)``.
    """
    path, values = _processor(folder)
    if values is None:
        log.warning("%s has no preprocessor_config.json: ImageNet's mean and std are used", folder)
        return IMAGENET_MEAN, IMAGENET_STD
    for key in _OTHER_STEPS:
        if values.get(key):
            raise BackboneError(f"{path} asks for {key}, which is not supported")
    if values.get("do_normalize", True) and not {"image_mean", "image_std"} <= values.keys():
        # Left out because they are the defaults of the processor's class.
        with contextlib.suppress(Exception):
            from transformers import AutoImageProcessor

            full = AutoImageProcessor.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            values = {**full.to_dict(), **values}
    factor = 255.0
    if values.get("do_rescale", True):
        factor *= _numbers(values, "rescale_factor", path, 1 / 255)[0]
    if math.isclose(factor, 1, rel_tol=1e-6):
        factor = 1.0
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if values.get("do_normalize", True):
        mean = _numbers(values, "image_mean", path)
        std = _numbers(values, "image_std", path)
    if factor == 1:
        return mean, std
    return (
        (mean[0] / factor, mean[1] / factor, mean[2] / factor),
        (std[0] / factor, std[1] / factor, std[2] / factor),
    )


def _processor(folder: Path) -> tuple[Path, dict[str, Any] | None]:
    """What says how images are made ready: in a file of its own, or as a part of the whole processor's."""
    path = folder / "preprocessor_config.json"
    files = [folder / "processor_config.json", path]
    if not any(os.path.lexists(file) for file in files):
        fetched = fetch_beside(folder, path.name) or fetch_beside(folder, files[0].name)
        files = [fetched] if fetched else []
    for file in files:
        if os.path.lexists(file):
            if fault := fault_of(file):
                raise BackboneError(fault)
            values = read_json(file)
            nested = values.get("image_processor")
            if isinstance(nested, dict):
                return file, nested
            if file.name == path.name:
                return file, values
    return path, None


def _numbers(values: dict[str, Any], key: str, path: Path, default: float | None = None) -> Triple:
    """Three numbers, of which a file may give one for all."""
    given = values.get(key, default)
    numbers: list[Any] = list(given) if isinstance(given, list | tuple) else [given]
    numbers = numbers * 3 if len(numbers) == 1 else numbers
    least = -math.inf if key == "image_mean" else 0
    if len(numbers) != 3 or not all(
        isinstance(x, int | float) and not isinstance(x, bool) and least < x < math.inf
        for x in numbers
    ):
        above = "" if key == "image_mean" else " above 0"
        raise BackboneError(f"{path}: {key} has to be one or three numbers{above}, not {given!r}")
    return float(numbers[0]), float(numbers[1]), float(numbers[2])


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
