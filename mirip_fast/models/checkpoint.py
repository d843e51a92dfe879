"""Checkpoints: plain dicts that load with ``weights_only=True``, written so that none is ever half there.

The keys are those of the documented interface: ``epoch``, ``model_state_dict``,
``optimizer_state_dict``, ``scheduler_state_dict``, ``best_accuracy`` and ``config`` (a plain dict). Two
more may follow: ``model`` (what the head expects of its input) and ``training_state`` (what resuming
needs besides). Frozen backbone weights are not in it.
"""

from __future__ import annotations

import re
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any, cast

import torch

from mirip_fast.errors import CheckpointError
from mirip_fast.files import open_file, write_atomically

#: Keys that every checkpoint has.
KEYS = (
    "epoch",
    "model_state_dict",
    "optimizer_state_dict",
    "scheduler_state_dict",
    "best_accuracy",
    "config",
)


#: Key in the metadata of a checkpoint's weights that holds its ``model`` entry.
ABOUT = "mirip_fast"


class _Settings:
    """Stands for another program's settings class: attributes and nothing else."""

    def __init__(self, *_: object) -> None:
        pass


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write ``checkpoint`` to a temporary file, fsync it and put it in place.

    Raises:
        DiskFullError: the previous file stays whole.
    """
    absent = [key for key in KEYS if key not in checkpoint]
    if absent:
        raise ValueError(f"a checkpoint needs {', '.join(absent)}")

    if "model" in checkpoint:  # the weights alone say it, too: load_state_dict sees nothing else
        state = OrderedDict(checkpoint["model_state_dict"])
        known = getattr(checkpoint["model_state_dict"], "_metadata", {})
        state._metadata = {**known, ABOUT: checkpoint["model"]}  # type: ignore[attr-defined]
        checkpoint = {**checkpoint, "model_state_dict": state}

    def write(stream: IO[bytes]) -> None:
        try:
            torch.save(checkpoint, stream)
        except RuntimeError as error:
            # torch hides what really happened (a full disk, Ctrl-C) behind an error of its own.
            raise error.__context__ or error from None

    write_atomically(path, write)


def load_checkpoint(path: Path, keys: Sequence[str] = KEYS) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, as data only: nothing in the file can run code.

    Another program's settings object (class ``…Config``) is read as the dict of its attributes; its class
    is neither imported nor called.

    Args:
        path: the file.
        keys: what it has to have.

    Raises:
        CheckpointError: missing, damaged, with things in it that are no plain data, or foreign.
    """
    settings: list[str] = []
    try:
        stream = open_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"--checkpoint {path}: there is no such file") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    try:
        with stream:
            try:
                checkpoint = torch.load(stream, map_location="cpu", weights_only=True)
            except UnpicklingError:
                settings = _settings_classes(path)
                if not settings:
                    raise
                stream.seek(0)
                stand_ins: Any = [(type("Settings", (_Settings,), {}), name) for name in settings]
                with torch.serialization.safe_globals(stand_ins):
                    checkpoint = torch.load(stream, map_location="cpu", weights_only=True)
    except UnpicklingError:  # torch's own words advise to open it nevertheless
        what = "" if zipfile.is_zipfile(path) else "it is of another kind, or "
        named = ", ".join(_foreign_classes(path))
        what += f"it asks for {named}; " if named else ""
        raise CheckpointError(
            f"{path} is no checkpoint of plain data, and was not opened: {what}what it holds could run code"
        ) from None
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path} is no checkpoint that can be read as plain data ({first})"
        ) from error
    if settings and isinstance(checkpoint, dict):
        checkpoint = {
            key: dict(vars(value)) if isinstance(value, _Settings) else value
            for key, value in checkpoint.items()
        }
    absent = [key for key in keys if not isinstance(checkpoint, dict) or key not in checkpoint]
    if absent:
        raise CheckpointError(
            f"{path} is no mirip-fast checkpoint: it lacks {', '.join(absent)}. "
            "mirip-fast writes best_model.pt and last_model.pt into each run's folder."
        )
    return cast(dict[str, Any], checkpoint)


def usual_names(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Weights of a model under the names that they have here.

    Understands what wrappers put in front (``module.``, ``_orig_mod.``), and projector and score head of
    other code, whatever its names, if they have the same layers in the same order.

    Raises:
        CheckpointError: projector or score head has other layers; names them.
    """
    plain = dict(state)
    for prefix in ("module.", "_orig_mod.", "module.", "model."):
        if plain and all(name.startswith(prefix) for name in plain):
            plain = {name.removeprefix(prefix): value for name, value in plain.items()}
    for part, layers in _LAYERS.items():
        here = {name for name in plain if name.startswith(f"{part}.")}
        if not here or all(name.startswith(f"{part}.layers.") for name in here):
            continue
        modules = list(dict.fromkeys(name.rpartition(".")[0] for name in plain if name in here))
        shapes = [plain.get(f"{module}.weight", torch.empty(0, 0, 0)).ndim for module in modules]
        extra = sorted(here - {f"{m}.{kind}" for m in modules for kind in ("weight", "bias")})
        if shapes != [dimensions for _, dimensions in layers] or extra:
            found = ", ".join(
                extra or [f"{name} {list(plain[name].shape)}" for name in sorted(here)]
            )
            raise CheckpointError(
                f"these weights are of another architecture: the {part} here is "
                f"{_SHAPES[part]}, and theirs has {found}"
            )
        for module, (number, _) in zip(modules, layers, strict=True):
            for kind in ("weight", "bias"):
                if f"{module}.{kind}" in plain:
                    plain[f"{part}.layers.{number}.{kind}"] = plain.pop(f"{module}.{kind}")
    return plain


#: Per part of a head: the number of each layer with weights in its Sequential, and its weight's dimensions.
_LAYERS = {"projector": ((0, 2), (1, 1), (4, 2), (5, 1)), "score_head": ((0, 2), (3, 2))}
_SHAPES = {
    "projector": "Linear, LayerNorm, GELU, Dropout, Linear, LayerNorm",
    "score_head": "Linear, ReLU, Dropout, Linear",
}


def _foreign_classes(path: Path) -> list[str]:
    """What a file of torch asks for beyond plain data; nothing where that cannot be told."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # of another kind, damaged, or an older torch
        return []


def _settings_classes(path: Path) -> list[str]:
    """The foreign classes of a file, if all of them are settings of some program; else nothing."""
    names = _foreign_classes(path)
    ours = all(re.fullmatch(r"[\w.]*\.\w*Config", name) for name in names)
    standard = any(name.partition(".")[0] in sys.stdlib_module_names for name in names)
    return names if ours and not standard else []
