"""The trained heads of a run as safetensors files, for scoring without torch.

- ``head.safetensors`` beside a checkpoint: the same head;
- ``gp.safetensors``: a Gaussian process in place of a head;
- ``ensemble.safetensors``: the heads of all folds, stacked, each with the mean and spread of its held-out
  scores, and with the backbone it belongs to where each has one of its own; or members of several kinds, each
  with the columns of a row that it looks at.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mirip_fast.errors import CheckpointError
from mirip_fast.files import read_file, sha256_of, write_atomically
from mirip_fast.models.gp import GaussianProcess
from mirip_fast.models.model_info import ModelInfo, beside
from mirip_fast.models.numpy_head import HEAD_FILE, NumpyHead
from mirip_fast.training.run_folder import BEST, ENSEMBLE, PROCESS, Run, fold_name

_ERRORS = "errors"

Arrays = Mapping[str, NDArray[np.floating]]


@dataclass(frozen=True)
class Member:
    """A head and the line that its scores are put through: ``(score − mean) / spread``.

    Attributes:
        head: the head.
        mean, spread: of its scores on images it had not trained on; spread > 0. 0 and 1 leave the
            score as it is.
        info: what it looks at, where it was trained together with a backbone of its own; None: what
            the whole model looks at.
        columns: (first, end) of the parts of a row that it looks at; None: the whole row.
    """

    head: NumpyHead | GaussianProcess
    mean: float = 0.0
    spread: float = 1.0
    info: ModelInfo | None = None
    columns: tuple[tuple[int, int], ...] | None = None

    def __call__(self, features: NDArray[np.floating]) -> NDArray[np.float32]:
        """[n, D] features → [n] scores, higher is better."""
        scores = self.head(self.seen(features))
        return (scores - np.float32(self.mean)) / np.float32(self.spread)

    def seen(self, features: NDArray[np.floating]) -> NDArray[np.floating]:
        """The columns of [n, D] features that it looks at."""
        if self.columns is None:
            return features
        return np.hstack([features[:, first:end] for first, end in self.columns])


def save_head(folder: Path, checkpoint: Path, arrays: Arrays, info: ModelInfo) -> None:
    """Write the head of ``checkpoint`` beside it.

    Args:
        folder: where to.
        checkpoint: the file that holds the same weights.
        arrays: name → array, as in ``RankingHead.state_dict()``.
        info: what the head expects of its input.
    """
    _save(folder / HEAD_FILE, arrays, info, checkpoint_sha256=sha256_of(checkpoint))


def load_head(checkpoint: Path) -> tuple[ModelInfo, Member] | None:
    """The head beside ``checkpoint``; None where there is none of the same weights.

    Raises:
        CheckpointError: one of the two files is damaged.
    """
    path = checkpoint.with_name(HEAD_FILE)
    if not Run(path.parent).has(path.name):
        return None
    arrays, about = _load(path)
    if about.get("checkpoint_sha256") != _hash(checkpoint):
        return None
    return _info(about, path), Member(NumpyHead(arrays))


def save_ensemble(
    folder: Path,
    members: Sequence[Member],
    info: ModelInfo,
    errors: NDArray[np.float64] | None = None,
) -> Path:
    """Write the members of an ensemble; returns the file.

    Args:
        folder: the run's folder.
        members: the heads with the mean and spread of their held-out scores.
        info: what they expect of their input, but for those that say so themselves.
        errors: of :class:`mirip_fast.ranking.scorer.ScoreModel`.
    """
    about: dict[str, Any] = {"held_out": [[member.mean, member.spread] for member in members]}
    arrays: dict[str, NDArray[Any]] = {}
    if all(isinstance(m.head, NumpyHead) and m.columns is None for m in members):
        arrays.update(_stacked(members))
    else:
        about["columns"] = [member.columns or [[0, info.input_dim]] for member in members]
        for i, member in enumerate(members):
            head = member.head
            kept: Arrays = head.arrays() if isinstance(head, GaussianProcess) else head.arrays
            arrays.update((f"{i}.{name}", array) for name, array in kept.items())
    if errors is not None:
        arrays[_ERRORS] = errors
    own = [member.info.to_dict() for member in members if member.info is not None]
    _save(folder / ENSEMBLE, arrays, info, **about, **({"own": own} if own else {}))
    return folder / ENSEMBLE


def save_process(folder: Path, process: GaussianProcess, info: ModelInfo) -> Path:
    """Write a Gaussian process; returns the file."""
    _save(folder / PROCESS, process.arrays(), info, readout="gp")
    return folder / PROCESS


def load_members(
    path: Path,
) -> tuple[ModelInfo, tuple[Member, ...], NDArray[np.float64] | None]:
    """Read what :func:`save_ensemble` (with its errors) or :func:`save_process` wrote; with backbones of
    their own, the first one's needs lead.

    Raises:
        CheckpointError: missing, damaged or of another kind.
    """
    arrays, about = _load(path)
    if about.get("readout") == "gp":
        process = GaussianProcess.from_arrays(arrays)
        return beside(path, _info(about, path)), (Member(process),), None
    if "held_out" not in about:
        raise CheckpointError(f"{path} holds no ensemble of heads")
    errors, lines = arrays.pop(_ERRORS, None), about["held_out"]
    if "columns" in about:
        members = tuple(
            Member(_head_of(arrays, f"{i}."), mean, spread, columns=tuple((a, b) for a, b in parts))
            for i, ((mean, spread), parts) in enumerate(zip(lines, about["columns"], strict=True))
        )
    else:
        members = _members(arrays, lines, path)
    if "own" not in about:
        return beside(path, _info(about, path)), members, errors
    if len(about["own"]) != len(members):
        raise CheckpointError(f"{path} is damaged: it does not describe every member's backbone")
    infos = [
        beside(path.with_name(fold_name(i)) / BEST, ModelInfo.from_dict(values))
        for i, values in enumerate(about["own"])
    ]
    tuned = (replace(member, info=info) for member, info in zip(members, infos, strict=True))
    return infos[0], tuple(tuned), errors


def _head_of(arrays: Arrays, prefix: str) -> NumpyHead | GaussianProcess:
    """The head whose arrays' names begin so."""
    own = {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}
    return GaussianProcess.from_arrays(own) if "amplitudes" in own else NumpyHead(own)


def _hash(path: Path) -> str:
    try:
        return sha256_of(path)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read: {error}")


def _stacked(members: Sequence[Member]) -> dict[str, NDArray[np.float32]]:
    heads = [member.head for member in members if isinstance(member.head, NumpyHead)]
    return {name: np.stack([head.arrays[name] for head in heads]) for name in heads[0].arrays}


def _members(arrays: Arrays, lines: Sequence[Sequence[float]], path: Path) -> tuple[Member, ...]:
    if any(len(stack) != len(lines) for stack in arrays.values()):
        raise CheckpointError(f"{path} is damaged: its arrays are not of {len(lines)} heads")
    return tuple(
        Member(NumpyHead({name: stack[i] for name, stack in arrays.items()}), mean, spread)
        for i, (mean, spread) in enumerate(lines)
    )


def _save(path: Path, arrays: Arrays, info: ModelInfo, **about: Any) -> None:
    from safetensors.numpy import save

    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    # One entry: several are written in an order that differs from time to time.
    data = save(whole, {"about": json.dumps({**about, "model": info.to_dict()})})
    write_atomically(path, lambda stream: stream.write(data))


def _load(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """The arrays of a file and what it says about them (nothing, if another program wrote it)."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        data = read_file(path)
        arrays = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return arrays, json.loads(header.get("__metadata__", {}).get("about", "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise _unreadable(path, error) from error


def _info(about: Mapping[str, Any], path: Path) -> ModelInfo:
    if "model" not in about:
        raise CheckpointError(f"{path} does not say what its heads expect")
    return ModelInfo.from_dict(about["model"])
