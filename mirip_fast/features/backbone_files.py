"""Finding a backbone (a folder, the Hugging Face cache, a download) and what its files say; no torch."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mirip_fast.errors import BackboneError

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


#: Backbones that are known to work: names are completed from these and compared with them.
KNOWN = (
    *(f"facebook/dinov2-{size}" for size in ("large", "base", "small", "giant")),
    *(f"facebook/dinov2-with-registers-{size}" for size in ("large", "base", "small", "giant")),
    *(f"facebook/dinov3-vit{size}-pretrain-lvd1689m" for size in ("s16", "b16", "l16", "h16plus")),
    "google/vit-base-patch16-224", "google/vit-base-patch16-224-in21k", "google/vit-large-patch16-224",
    "google/siglip-base-patch16-224", "google/siglip-so400m-patch14-384",
    "google/siglip2-base-patch16-224", "google/siglip2-so400m-patch14-384",
    "google/siglip2-base-patch16-naflex", "openai/clip-vit-base-patch16", "openai/clip-vit-large-patch14",
)  # fmt: skip

_INDEX = {".safetensors": "model.safetensors.index.json", ".bin": "pytorch_model.bin.index.json"}
_MOST_JSON = 64 << 20  # bytes; no config or header of a real model comes near


def locate(name: str, *, attempts: int = 3, pause_s: float = 2.0) -> Path:
    """The local folder of a backbone: a directory as given, else the Hugging Face cache or a download.

    A folder ``models--owner--name`` of a Hugging Face cache means its snapshot. A download that fails is
    tried ``attempts`` times with growing pauses.

    Raises:
        BackboneError: what is missing or damaged, where was looked, and the ways on.
    """
    # os.path takes names of any length and any characters.
    folder = Path(os.path.expanduser(name))  # noqa: PTH111
    if os.path.isdir(folder):  # noqa: PTH112
        return _whole(folder, name)
    if os.path.isfile(folder):  # noqa: PTH113
        raise BackboneError(f"--backbone {name} is a file; give its folder: {folder.parent}")
    name = name.removeprefix("https://huggingface.co/").rstrip("/")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or "\0" in name:
        close = difflib.get_close_matches(folder.name, _folders(folder.parent), n=1)
        hint = f". Did you mean {folder.parent / close[0]}?" if close else ""
        raise BackboneError(f"--backbone {name}: there is no such folder{hint}")
    return _from_hub(_full_name(name), attempts, pause_s)


def _whole(folder: Path, name: str) -> Path:
    """A folder as given, or the snapshot that it means."""
    if not os.path.lexists(folder / "config.json"):
        snapshot = _snapshot(folder)
        if snapshot is None:
            models = sorted(p.parent for p in folder.glob("*/config.json"))
            models += sorted([*folder.glob("models--*"), *folder.glob("hub/models--*")])
            hint = f"; it has {', '.join(map(str, models[:5]))}: give one of them" if models else ""
            raise BackboneError(f"--backbone {name}: the folder has no config.json{hint}")
        folder = snapshot
    if fault := _fault(folder):
        raise BackboneError(f"--backbone {name}: {fault}")
    return folder.resolve()


def _snapshot(folder: Path) -> Path | None:
    """The snapshot that a model's folder in a Hugging Face cache stands for: main's, or the only one."""
    if folder.name == "snapshots":
        folder = folder.parent
    found = sorted(_folders(folder / "snapshots"))
    try:
        main = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        main = ""
    if main not in found and len(found) > 1:
        raise BackboneError(
            f"{folder} has {len(found)} snapshots and no refs/main that names one: give "
            f"{folder / 'snapshots' / found[0]} or another"
        )
    return folder / "snapshots" / (main if main in found else found[0]) if found else None


def _folders(folder: Path) -> list[str]:
    try:
        return [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    except OSError:
        return []


def weight_files(folder: Path) -> list[Path]:
    """The files with a model's weights: safetensors, else pickled ones (read with ``weights_only``)."""
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def _fault(folder: Path) -> str | None:
    """Why the folder's files make no model: something is missing, a dead link, empty or cut off."""
    weights = weight_files(folder)
    for file in (folder / "config.json", *weights):
        if fault := fault_of(file):
            return fault
    if not weights:
        return f"no weights (*.safetensors) in {folder}"
    kind = weights[0].suffix
    if (folder / f"{'model' if kind == '.safetensors' else 'pytorch_model'}{kind}").exists():
        return None
    index = folder / _INDEX[kind]
    if not os.path.lexists(index):
        whole = index.name.removesuffix(".index.json")
        return f"{folder} has {weights[0].name}, but neither {whole} nor {index.name}"
    if fault := fault_of(index):
        return fault
    parts = read_json(index).get("weight_map")
    for part in sorted(set(map(str, parts.values()))) if isinstance(parts, dict) else ["(none)"]:
        if part not in [file.name for file in weights]:
            return f"{index} names {part}, which is not there: the copy or download is not complete"
    return None


def fault_of(file: Path) -> str | None:
    """Why a file cannot be what its name says; None where nothing is seen. Only its start is read."""
    try:
        if file.is_symlink() and not file.exists():
            return (
                f"{file} is a link to {file.readlink()}, which is not there. Copy the model again with "
                "what its links point to (`cp -rL`, `rsync -L`), or download it again"
            )
        if not file.is_file():
            return f"{file} is {'no regular file' if file.exists() else 'not there'}"
        if not file.stat().st_size:
            return f"{file} is empty (0 bytes): copy or download it again"
        with file.open("rb") as stream:
            if stream.read(24).startswith(b"version https://git-lfs"):
                return f"{file} is only a Git LFS pointer: run `git lfs pull` in its folder"
        if file.suffix == ".safetensors":
            ends = [8 + _header(file)[0]]
            ends += [ends[0] + int(entry["data_offsets"][1]) for entry in tensors(file).values()]
            if file.stat().st_size < max(ends):
                return (
                    f"{file} is cut off: {file.stat().st_size:,} of {max(ends):,} bytes are there; "
                    "copy or download it again"
                )
    except OSError as error:
        return f"{file} cannot be read: {error.strerror or error}"
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return f"{file} cannot be loaded: it is damaged, or no safetensors file"
    return None


def tensors(file: Path) -> dict[str, Any]:
    """The tensors of a safetensors file: name → dtype, shape, data_offsets."""
    return {name: about for name, about in _header(file)[1].items() if name != "__metadata__"}


def _header(file: Path) -> tuple[int, dict[str, Any]]:
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if size > _MOST_JSON:
            raise ValueError("no safetensors header")
        return size, json.loads(stream.read(size))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        BackboneError: it cannot be read, is none, or is far too large.
    """
    try:
        if path.stat().st_size > _MOST_JSON:
            raise ValueError(f"{path.stat().st_size:,} bytes are too many")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BackboneError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise BackboneError(f"{path} does not hold a JSON object")
    return value


def fetch_beside(folder: Path, file: str) -> Path | None:
    """A small file that a snapshot in the Hugging Face cache lacks, from the hub; None if it has none."""
    import huggingface_hub
    from huggingface_hub import constants

    repository = folder.parent.parent
    cache = Path(constants.HF_HUB_CACHE).expanduser().resolve()
    if constants.HF_HUB_OFFLINE or repository.parent != cache:
        return None
    name = repository.name.removeprefix("models--").replace("--", "/", 1)
    known = huggingface_hub.try_to_load_from_cache(name, file, revision=folder.name)
    if known is not None:  # there, or known not to be
        return Path(known) if isinstance(known, str) else None
    try:
        return Path(
            huggingface_hub.hf_hub_download(name, file, revision=folder.name, etag_timeout=3)
        )
    except Exception as error:
        log.debug("%s of %s could not be had: %s", file, name, error)
        return None


def _from_hub(name: str, attempts: int, pause_s: float) -> Path:
    from huggingface_hub import constants, errors

    cached = _snapshot(Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}")
    reason = "it is not in the cache" if cached is None else _fault(cached)
    if cached is not None and reason is None:
        return cached.resolve()
    asked = ""
    if constants.HF_HUB_OFFLINE:
        reason = f"{reason} and HF_HUB_OFFLINE is set"
        attempts = 0
    for attempt in range(1, attempts + 1):
        asked = " and asked the hub"
        try:
            log.info("Downloading %s (attempt %d of %d) …", name, attempt, attempts)
            found = _download(name)
        except Exception as error:
            reason = _why(name, error)
            if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
                break  # trying again does not help
            if attempt < attempts:
                time.sleep(pause_s * attempt)
        else:
            reason = _fault(found)
            if reason is None:
                return found.resolve()
            break
    raise BackboneError(
        f"The backbone '{name}' could not be loaded: {reason}\n"
        f"Looked in the Hugging Face cache {constants.HF_HUB_CACHE}{asked}.{_nearest(name)}\n"
        f"Ways on: on a connected machine run `hf download {name}` and copy the cache folder here, or "
        "give a local directory with --backbone DIR. (`--backbone tiny-random` needs no download: "
        "untrained, for trying the tool out.)"
    )


def _download(name: str) -> Path:
    import huggingface_hub

    found = Path(
        huggingface_hub.snapshot_download(name, allow_patterns=["*.json", "*.safetensors"])
    )
    if not weight_files(found) and (found / "config.json").exists():
        # An old repository: its weights are pickled only. They are read as tensors and nothing else.
        wanted = ["*.json", "pytorch_model*.bin"]
        found = Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    return found


def _why(name: str, error: Exception) -> str:
    """What an error of ``huggingface_hub`` means to somebody who wants a model."""
    from huggingface_hub import errors

    first = first_line(error)
    if isinstance(error, errors.GatedRepoError):
        return (
            f"it is gated. Ask for access on https://huggingface.co/{name}, then log in: "
            "`hf auth login`"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub has no such model (or it is private: log in with `hf auth login`)"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"the hub refuses the login ({status}): log in again with `hf auth login`"
    if status is not None:
        return f"the hub answers {status}: {first}"
    if isinstance(error, errors.LocalEntryNotFoundError | ConnectionError):
        return f"there is no connection to the hub ({first})"
    return first


def _candidates() -> Iterator[str]:
    """Names of backbones that are known, then those of the models in the cache."""
    from huggingface_hub import constants

    yield from KNOWN
    for folder in _folders(Path(constants.HF_HUB_CACHE)):
        if folder.startswith("models--"):
            yield folder.removeprefix("models--").replace("--", "/", 1)


def _full_name(name: str) -> str:
    """``dinov2-large`` → ``facebook/dinov2-large``; a name that is not known stays as it is."""
    for known in _candidates():
        if name.lower() in (known.lower(), known.rpartition("/")[2].lower()):
            if known != name:
                log.info("Backbone %s is taken for %s", name, known)
            return known
    return name


def _nearest(name: str) -> str:
    # By the whole name or without its owner, whichever is alike.
    by_text = {
        text.lower(): c
        for c in (*_candidates(), "tiny-random")
        for text in (c, c.rpartition("/")[2])
    }
    wanted = {name.lower(), name.lower().rpartition("/")[2]} - {""}
    close = [by_text[c] for w in wanted for c in difflib.get_close_matches(w, by_text, n=3)]
    close = [c for c in dict.fromkeys(close) if c != name][:3]
    return f" Did you mean {' or '.join(close)}?" if close and name not in KNOWN else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, else its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
