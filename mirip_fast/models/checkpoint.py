"""Checkpoints: plain dicts that load with ``weights_only=True``, written so that none is ever half there.

The keys are those of the documented interface: ``epoch``, ``model_state_dict``,
``optimizer_state_dict``, ``scheduler_state_dict``, ``best_accuracy`` and ``config`` (a plain dict). Two
more may follow: ``model`` (what the head expects of its input) and ``training_state`` (what resuming
needs besides). Frozen backbone weights are not in it.
"""

from __future__ import annotations

import zipfile
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


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write ``checkpoint`` to a temporary file, fsync it and put it in place.

    Raises:
        DiskFullError: the previous file stays whole.
    """
    absent = [key for key in KEYS if key not in checkpoint]
    if absent:
        raise ValueError(f"a checkpoint needs {', '.join(absent)}")

    def write(stream: IO[bytes]) -> None:
        try:
            torch.save(checkpoint, stream)
        except RuntimeError as error:
            # torch hides what really happened (a full disk, Ctrl-C) behind an error of its own.
            raise error.__context__ or error from None

    write_atomically(path, write)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, as data only: nothing in the file can run code.

    Raises:
        CheckpointError: missing, damaged, with things in it that are no plain data, or foreign.
    """
    try:
        stream = open_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"--checkpoint {path}: there is no such file") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can not be read: {error}") from error
    try:
        with stream:
            checkpoint = torch.load(stream, map_location="cpu", weights_only=True)
    except UnpicklingError:  # torch's own words advise to open it nevertheless
        what = "" if zipfile.is_zipfile(path) else "it is of another kind, or "
        raise CheckpointError(
            f"{path} is no checkpoint of plain data, and was not opened: {what}what it holds could run code"
        ) from None
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path} is no checkpoint that can be read as plain data ({first})"
        ) from error
    absent = [key for key in KEYS if not isinstance(checkpoint, dict) or key not in checkpoint]
    if absent:
        raise CheckpointError(
            f"{path} is no mirip-fast checkpoint: it lacks {', '.join(absent)}. "
            "mirip-fast writes best_model.pt and last_model.pt into each run's folder."
        )
    return cast(dict[str, Any], checkpoint)
