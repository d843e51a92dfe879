"""A trained model that scores without torch: its heads, and the safetensors files in which a run keeps them.

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
from mirip_fast.features.store import FeatureStore
from mirip_fast.files import read_file, sha256_of, write_atomically
from mirip_fast.models.gp import GaussianProcess, draw_errors
from mirip_fast.models.model_info import ModelInfo, beside
from mirip_fast.models.numpy_head import HEAD_FILE, NumpyHead
from mirip_fast.ranking.rows import read_features
from mirip_fast.training.run_folder import BEST, ENSEMBLE, PROCESS, Run, fold_name

_ERRORS = "errors"
_NUMBERS = 1 << 26  # numbers of features read at a time

Arrays = Mapping[str, NDArray[np.floating]]


@dataclass(frozen=True)
class TrainedHead:
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


@dataclass(frozen=True)
class ScoreModel:
    """One trained head or an ensemble of them, and what they expect of their input.

    Attributes:
        checkpoint: the file that it was loaded from, in the run's folder.
        info: the features it looks at.
        members: the heads; a score is the mean over them.
        errors: [m] float64, how far the graded works' own grades lie from their held-out scores, in the
            unit of the score; None where that is not known, or a Gaussian process knows it of each work.
    """

    checkpoint: Path
    info: ModelInfo
    members: tuple[TrainedHead, ...]
    errors: NDArray[np.float64] | None = None

    def parts(self) -> tuple[ScoreModel, ...]:
        """Models that each look through one backbone; the mean of their scores is this one's.

        That is the model itself, but for an ensemble whose members were fine-tuned each with a backbone
        of its own: every image has to be embedded once for each of those.
        """
        if self.members[0].info is None:
            return (self,)
        return tuple(
            ScoreModel(self.checkpoint, m.info or self.info, (replace(m, info=None),))
            for m in self.members
        )

    def require_one_backbone(self, what: str) -> None:
        """Refuse an ensemble of fine-tuned backbones, and a model that looks through several at once.

        Args:
            what: needs a single one.

        Raises:
            CheckpointError: says how to name or train another.
        """
        self.require_one_store(what)
        if self.info.more:
            names = [info.embed.backbone for info in self.info.backbones]
            raise CheckpointError(
                f"{what} looks through one backbone, and {self.checkpoint} looks through {len(names)} "
                f"({', '.join(names)}): train a run with one of them (`mirip-fast train --head-only "
                f"--backbone {names[0]}`), or name another run with --checkpoint"
            )

    def require_one_store(self, what: str) -> None:
        """Refuse an ensemble of fine-tuned backbones, whose members each have features of their own.

        Raises:
            CheckpointError: says how to name one of them.
        """
        n = len(self.parts())
        if n > 1:
            fold = self.checkpoint.parent / fold_name(0)
            raise CheckpointError(
                f"{what} looks through one backbone, and {self.checkpoint} has {n} fine-tuned ones: name "
                f"one of them with --checkpoint {fold}"
            )

    def score(self, store: FeatureStore, hashes: Sequence[bytes]) -> NDArray[np.float32]:
        """[n] scores of images whose features are in ``store``; the mean over the views.

        Raises:
            StoreError: a series or row is missing.
        """
        scores: NDArray[np.float32] = self.score_views(store, hashes).mean(1)
        return scores

    def score_views(self, store: FeatureStore, hashes: Sequence[bytes]) -> NDArray[np.float32]:
        """[n, V] scores, one for each of the ``info.views``, in their order.

        Raises:
            StoreError: a series or row is missing.
            CheckpointError: the members have backbones of their own, and no store holds what all of
                them look at: see :meth:`parts`.
        """
        self.require_one_store("Scoring from one feature store")
        info, views = self.info, len(self.info.views)
        parts = [np.empty((0, views), np.float32)]
        step = max(1, _NUMBERS // (info.input_dim * views))
        for start in range(0, len(hashes), step):
            some = hashes[start : start + step]
            flat = read_features(store, some, info.features, info.views).reshape(-1, info.input_dim)
            scores = np.mean([head(flat) for head in self.members], axis=0)
            parts.append(scores.reshape(len(some), views))
        return np.concatenate(parts)

    @property
    def process(self) -> GaussianProcess | None:
        """The Gaussian process that scores alone; None where heads do."""
        head = self.members[0].head
        return head if isinstance(head, GaussianProcess) and len(self.members) == 1 else None

    @property
    def knows_grades(self) -> bool:
        """Whether :meth:`draw` can tell what graders may say."""
        return self.process is not None or self.errors is not None

    def draw(
        self,
        store: FeatureStore,
        hashes: Sequence[bytes],
        scores: NDArray[np.floating],
        draws: int,
        *,
        together: NDArray[np.int64] | None = None,
        shared: float = 0.0,
    ) -> NDArray[np.float64] | None:
        """[draws, n] grades that n works may get, in the unit of :meth:`score`; None where it is not known.

        They vary as much as the graded works' own grades do around what the model had said of them
        without their group: with other training works, and with the graders' noise.

        Args:
            store: has what a Gaussian process looks at.
            hashes: SHA-256 of the n works.
            scores: [n] what the model says of them.
            draws: how many.
            together, shared: works that err alike, as for :func:`mirip_fast.models.gp.draw_errors`.

        Raises:
            StoreError: a series or row is missing.
        """
        if self.errors is not None:
            drawn = draw_errors(self.errors, (draws, len(hashes)), 0, together, shared)
            return np.asarray(scores + drawn, dtype=np.float64)
        if self.process is None:
            return None
        features = read_features(store, hashes, self.info.features, self.info.views)
        rows = features.mean(axis=1)
        return self.process.draw(rows, draws, together=together, shared=shared)


def save_head(folder: Path, checkpoint: Path, arrays: Arrays, info: ModelInfo) -> None:
    """Write the head of ``checkpoint`` beside it.

    Args:
        folder: where to.
        checkpoint: the file that holds the same weights.
        arrays: name → array, as in ``RankingHead.state_dict()``.
        info: what the head expects of its input.
    """
    _save(folder / HEAD_FILE, arrays, info, checkpoint_sha256=sha256_of(checkpoint))


def load_head(checkpoint: Path) -> tuple[ModelInfo, NumpyHead] | None:
    """The head beside ``checkpoint``; None where there is none of the same weights.

    Raises:
        CheckpointError: one of the two files is damaged.
    """
    path = checkpoint.with_name(HEAD_FILE)
    if not Run(path.parent).has(path.name):
        return None
    arrays, about = _load(path)
    try:
        same = about.get("checkpoint_sha256") == sha256_of(checkpoint)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint} cannot be read: {error}") from error
    return (_info(about, path), NumpyHead(arrays)) if same else None


def save_members(
    folder: Path,
    members: Sequence[TrainedHead],
    info: ModelInfo,
    errors: NDArray[np.float64] | None = None,
) -> Path:
    """Write a model's heads, or the Gaussian process that scores alone; returns the file.

    Args:
        folder: the run's folder.
        members: the heads with the mean and spread of their held-out scores.
        info: what they expect of their input, but for those that say so themselves.
        errors: of :class:`ScoreModel`.
    """
    heads = [member.head for member in members]
    if len(heads) == 1 and isinstance(heads[0], GaussianProcess):
        _save(folder / PROCESS, heads[0].arrays(), info, readout="gp")
        return folder / PROCESS
    about: dict[str, Any] = {"held_out": [[member.mean, member.spread] for member in members]}
    kept = [h.arrays() if isinstance(h, GaussianProcess) else h.arrays for h in heads]
    arrays: dict[str, NDArray[Any]] = {}
    if all(isinstance(m.head, NumpyHead) and m.columns is None for m in members):
        arrays.update((name, np.stack([each[name] for each in kept])) for name in kept[0])
    else:
        about["columns"] = [member.columns or [[0, info.input_dim]] for member in members]
        for i, own in enumerate(kept):
            arrays.update((f"{i}.{name}", array) for name, array in own.items())
    if errors is not None:
        arrays[_ERRORS] = errors
    if backbones := [member.info.to_dict() for member in members if member.info is not None]:
        about["own"] = backbones
    _save(folder / ENSEMBLE, arrays, info, **about)
    return folder / ENSEMBLE


def load_members(
    path: Path,
) -> tuple[ModelInfo, tuple[TrainedHead, ...], NDArray[np.float64] | None]:
    """Read what :func:`save_members` wrote, errors included; with backbones of their own, the first one's
    needs lead.

    Raises:
        CheckpointError: missing, damaged or of another kind.
    """
    arrays, about = _load(path)
    if about.get("readout") == "gp":
        process = GaussianProcess.from_arrays(arrays)
        return beside(path, _info(about, path)), (TrainedHead(process),), None
    if "held_out" not in about:
        raise CheckpointError(f"{path} holds no ensemble of heads")
    errors, lines = arrays.pop(_ERRORS, None), about["held_out"]
    columns: list[Any] = [None] * len(lines)
    if "columns" in about:
        columns = [tuple((first, end) for first, end in parts) for parts in about["columns"]]
        heads = [_head_of(arrays, f"{i}.") for i in range(len(lines))]
    else:
        if any(len(stack) != len(lines) for stack in arrays.values()):
            raise CheckpointError(f"{path} is damaged: its arrays are not of {len(lines)} heads")
        heads = [
            NumpyHead({name: stack[i] for name, stack in arrays.items()}) for i in range(len(lines))
        ]
    infos: list[Any] = [None] * len(lines)
    if "own" in about:
        if len(about["own"]) != len(lines):
            raise CheckpointError(
                f"{path} is damaged: it does not describe every member's backbone"
            )
        infos = [
            beside(path.with_name(fold_name(i)) / BEST, ModelInfo.from_dict(values))
            for i, values in enumerate(about["own"])
        ]
    members = tuple(
        TrainedHead(head, mean, spread, info, parts)
        for head, (mean, spread), info, parts in zip(heads, lines, infos, columns, strict=True)
    )
    return infos[0] or beside(path, _info(about, path)), members, errors


def _head_of(arrays: Arrays, prefix: str) -> NumpyHead | GaussianProcess:
    """The head whose arrays' names begin so."""
    own = {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}
    return GaussianProcess.from_arrays(own) if "amplitudes" in own else NumpyHead(own)


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
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _info(about: Mapping[str, Any], path: Path) -> ModelInfo:
    if "model" not in about:
        raise CheckpointError(f"{path} does not say what its heads expect")
    return ModelInfo.from_dict(about["model"])
