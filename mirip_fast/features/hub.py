"""Where a backbone lies (a folder, the Hugging Face cache, a download), and whether its files are whole."""

from __future__ import annotations

import difflib
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mirip_fast.errors import BackboneError

log = logging.getLogger(__name__)

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
    """Why a file can not be what its name says; None where nothing is seen. Only its start is read."""
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
        return f"{file} can not be read: {error.strerror or error}"
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return f"{file} can not be loaded: it is damaged, or no safetensors file"
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
        BackboneError: it can not be read, is none, or is far too large.
    """
    try:
        if path.stat().st_size > _MOST_JSON:
            raise ValueError(f"{path.stat().st_size:,} bytes are too many")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BackboneError(f"{path} can not be read: {error}") from error
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
