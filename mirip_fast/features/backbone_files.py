"""Finding a backbone and reading what its files say about it, without loading its weights (or torch)."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirip_fast.errors import BackboneError

log = logging.getLogger(__name__)

#: The built-in, seeded, untrained backbone; its weights are drawn by ``features/tiny_random.py``.
TINY_RANDOM = "tiny-random"

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Keys of config.json that change nothing about the features.
_COSMETIC = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures"}
_FILES = ("*.json", "*.safetensors")


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
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def trained(self) -> bool:
        """Whether the weights come from training (the built-in backbone's do not)."""
        return self.folder is not None


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
    folder = locate(name)
    config = _read_json(folder / "config.json", name)
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not weights:
        raise BackboneError(f"{name}: no weights (*.safetensors) in {folder}")
    identity = hashlib.sha256()
    identity.update(_canonical({k: v for k, v in config.items() if k not in _COSMETIC}))
    for file in weights:
        identity.update(hash_file(file))
    mean, std = _normalisation(folder, name)
    return BackboneSpec(
        name=name,
        folder=folder,
        weights_id=identity.hexdigest(),
        model_type=str(config.get("model_type", "unknown")),
        hidden_size=_integer(config, "hidden_size", name),
        patch_size=_integer(config, "patch_size", name),
        num_layers=_integer(config, "num_hidden_layers", name),
        num_register_tokens=int(config.get("num_register_tokens") or 0),
        mean=mean,
        std=std,
    )


def tiny_random_spec() -> BackboneSpec:
    """Spec of the built-in untrained backbone."""
    from mirip_fast.features import tiny_random

    config = tiny_random.CONFIG
    return BackboneSpec(
        name=TINY_RANDOM,
        folder=None,
        weights_id=hashlib.sha256(
            _canonical({"version": tiny_random.VERSION, **config})
        ).hexdigest(),
        model_type="dinov2",
        hidden_size=int(config["hidden_size"]),
        patch_size=int(config["patch_size"]),
        num_layers=int(config["num_hidden_layers"]),
        num_register_tokens=0,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )


def locate(name: str, *, attempts: int = 3, pause_s: float = 2.0) -> Path:
    """The local folder of a backbone: a directory as given, else the Hugging Face cache or a download.

    A download that fails is tried ``attempts`` times with growing pauses.

    Raises:
        BackboneError: says the name, the cache folder that was looked in, and the ways on.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise BackboneError(f"--backbone {name}: the folder has no config.json")
        return folder.resolve()
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise BackboneError(f"--backbone {name}: there is no such folder")
    import huggingface_hub
    from huggingface_hub import constants, errors

    def fetch(**how: Any) -> Path | None:
        found = Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_FILES), **how))
        return found if _is_whole(found) else None

    try:
        found = fetch(local_files_only=True)
        if found is not None:
            return found
    except (errors.LocalEntryNotFoundError, errors.HFValidationError, OSError):
        log.debug("%s is not in the Hugging Face cache yet", name)
    reason, asked = "it is not in the cache and HF_HUB_OFFLINE is set", ""
    if not constants.HF_HUB_OFFLINE:
        asked = " and asked the hub"
        for attempt in range(1, attempts + 1):
            try:
                log.info("Downloading %s (attempt %d of %d) …", name, attempt, attempts)
                found = fetch()
                if found is not None:
                    return found
                reason = "the repository has no config.json with *.safetensors weights"
                break
            except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
                reason = _first_line(error)
                break  # trying again does not help
            except Exception as error:
                reason = _first_line(error)
                if attempt < attempts:
                    time.sleep(pause_s * attempt)
    raise BackboneError(
        f"The backbone '{name}' could not be loaded: {reason}\n"
        f"Looked in the Hugging Face cache {constants.HF_HUB_CACHE}{asked}.\n"
        f"Ways on: on a connected machine run `hf download {name}` and copy the cache folder here, or "
        "give a local directory with --backbone DIR. (`--backbone tiny-random` needs no download: "
        "untrained, for trying the tool out.)"
    )


def _is_whole(folder: Path) -> bool:
    """Whether config and weights are all there: a download that broke off may have left some."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        parts = _read_json(index, str(folder)).get("weight_map", {}).values()
        if not all((folder / part).is_file() for part in parts):
            return False
    return any(folder.glob("*.safetensors")) and (folder / "config.json").is_file()


def _normalisation(
    folder: Path, name: str
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        log.warning("%s has no preprocessor_config.json: ImageNet's mean and std are used", name)
        return IMAGENET_MEAN, IMAGENET_STD
    values = _read_json(path, name)
    result = []
    for key in ("image_mean", "image_std"):
        triple = values.get(key)
        numbers = triple if isinstance(triple, list) else []
        if [isinstance(x, int | float) for x in numbers] != [True] * 3 or (
            key == "image_std" and min(numbers) <= 0
        ):
            raise BackboneError(
                f"{path}: {key} has to be three numbers (std above 0), not {triple!r}"
            )
        result.append((float(numbers[0]), float(numbers[1]), float(numbers[2])))
    return result[0], result[1]


def _integer(config: dict[str, Any], key: str, name: str) -> int:
    value = config.get(key)
    if isinstance(value, list) and len(set(value)) == 1:  # patch_size: [14, 14]
        value = value[0]
    if not isinstance(value, int):
        raise BackboneError(
            f"--backbone {name}: its config.json has no usable {key!r} (model type "
            f"{config.get('model_type')!r}). A plain vision transformer is needed, like "
            "facebook/dinov2-large, a DINOv2 with registers, a DINOv3 ViT or a ViT."
        )
    return value


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BackboneError(f"--backbone {name}: {path} can not be read: {error}") from error
    if not isinstance(value, dict):
        raise BackboneError(f"--backbone {name}: {path} does not hold a JSON object")
    return value


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
