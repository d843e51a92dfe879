"""Scoring images with a trained head: from cached features at once, computing what is missing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mirip_fast.errors import CheckpointError, ImageError, StoreError
from mirip_fast.features.embed import Outcome, Progress, Settings, ledger
from mirip_fast.features.phase_one import PhaseOne, open_hashes, prepare, with_kinds
from mirip_fast.features.recipe import series_name
from mirip_fast.features.store import FeatureStore, differing_fields
from mirip_fast.files import write_atomically
from mirip_fast.models.model_info import ModelInfo
from mirip_fast.models.numpy_head import HEAD_FILE, NumpyHead, load_numpy_head
from mirip_fast.ranking.rows import read_features

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoreModel:
    """A trained head and what it expects of its input."""

    checkpoint: Path
    info: ModelInfo
    head: NumpyHead

    def score(self, store: FeatureStore, hashes: Sequence[bytes]) -> NDArray[np.float32]:
        """[n] scores of images whose features are in ``store``; the mean over the views.

        Raises:
            StoreError: a series or row is missing.
        """
        features = read_features(store, hashes, self.info.features, self.info.views)
        n, views, width = features.shape
        scores: NDArray[np.float32] = (
            self.head(features.reshape(-1, width)).reshape(n, views).mean(1)
        )
        return scores


@dataclass(frozen=True)
class Scored:
    """Scores of image files: one outcome and one score per path, NaN where it failed."""

    outcomes: list[Outcome]
    scores: NDArray[np.float32]


def save_numpy_head(folder: Path, checkpoint: Path, state: dict[str, Any], info: ModelInfo) -> None:
    """Write the head of ``checkpoint`` as safetensors beside it, for scoring without torch."""
    from safetensors.numpy import save

    arrays = {name: np.ascontiguousarray(value.numpy()) for name, value in state.items()}
    metadata = {"checkpoint_sha256": _file_hash(checkpoint), "model": json.dumps(info.to_dict())}
    data = save(arrays, metadata)
    write_atomically(folder / HEAD_FILE, lambda stream: stream.write(data))


def load_score_model(checkpoint: Path) -> ScoreModel:
    """Load a head: from the safetensors file beside the checkpoint if it is of the same weights.

    Raises:
        CheckpointError: unreadable, foreign, or of a model that has no head of this kind.
    """
    quick = checkpoint.with_name(HEAD_FILE)
    if quick.is_file():
        metadata = _metadata(quick)
        if metadata.get("checkpoint_sha256") == _file_hash(checkpoint):
            info = ModelInfo.from_dict(json.loads(metadata["model"]))
            return ScoreModel(checkpoint, info, load_numpy_head(quick))
    from mirip_fast.models.checkpoint import load_checkpoint

    content = load_checkpoint(checkpoint)
    if "model" not in content:
        raise CheckpointError(
            f"{checkpoint} does not say which features its head was trained on; "
            "`mirip-fast train --head-only` writes checkpoints that do"
        )
    arrays = {name: value.numpy() for name, value in content["model_state_dict"].items()}
    return ScoreModel(checkpoint, ModelInfo.from_dict(content["model"]), NumpyHead(arrays))


def score_files(
    model: ScoreModel,
    paths: Sequence[Path],
    *,
    cache_dir: Path,
    device: str = "auto",
    backbone: str | None = None,
    settings: Settings | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Scored:
    """Score image files, embedding those whose features are not in the cache.

    Args:
        model: the head; its backbone, preprocessing and precision are used.
        paths: image files.
        cache_dir: folder of the stores.
        device: where missing features are computed.
        backbone: another place of the same backbone, if it moved.
        settings: how missing features are computed.
        progress: called after every committed batch.

    Raises:
        CheckpointError: the backbone found is not the one that the head was trained on.
        BackboneError: features are missing and the backbone can not be found.
    """
    settings = settings or Settings()
    with open_hashes(cache_dir) as hashes:
        known = list(hashes.sha256_many(paths, rehash=settings.rehash))
        store = _complete_store(model.info, cache_dir, known)
        if store is not None:  # nothing to compute: neither torch nor the backbone is needed
            present = {sha for sha in known if isinstance(sha, bytes)}
            outcomes = ledger(known, present, {})
        else:
            phase = _prepare(model.info, cache_dir, device, backbone, hashes)
            outcomes = phase.embed(paths, hashes, settings, progress)
            store = phase.store
    good = [i for i, outcome in enumerate(outcomes) if outcome.status != "failed"]
    scores = np.full(len(paths), np.nan, np.float32)
    if good:
        wanted = [sha for sha in (outcomes[i].sha256 for i in good) if sha is not None]
        scores[good] = model.score(store, wanted)
    return Scored(outcomes, scores)


def _complete_store(
    info: ModelInfo, cache_dir: Path, known: Sequence[bytes | ImageError]
) -> FeatureStore | None:
    """The model's store, if it has everything the head needs of every readable image."""
    try:
        store = FeatureStore.open(cache_dir / info.fingerprint_id)
    except StoreError:
        return None
    wanted = [sha for sha in known if isinstance(sha, bytes)]
    for view in info.views:
        for kind in info.kinds:
            if (store.rows(series_name(view, kind), wanted) < 0).any():
                return None
    return store


def _prepare(
    info: ModelInfo, cache_dir: Path, device: str, backbone: str | None, hashes: Any
) -> PhaseOne:
    """Phase one as the model was trained, on this machine.

    A machine that can not compute in the model's precision computes in fp32, into a store of its own.
    """
    from mirip_fast.runtime import resolve_device, supported_precisions

    options = dataclasses.replace(info.embed, cache_dir=str(cache_dir))
    if backbone is not None:
        options.backbone = backbone
    wanted = info.fingerprint["precision"]
    possible = supported_precisions(resolve_device(device))
    options.precision = wanted if wanted in possible else "fp32"
    if options.precision != wanted:
        log.warning(
            "The model was trained on %s features; this machine computes in fp32, which differs by "
            "about 1 %%. They are kept in a store of their own.",
            wanted,
        )
    phase = with_kinds(prepare(options, device, hashes), info.kinds)
    ours = {**phase.recipe.fingerprint, "precision": wanted}
    if ours != info.fingerprint:
        raise CheckpointError(
            "The backbone or its preprocessing is not the one this model was trained on "
            f"({differing_fields(info.fingerprint, ours)}). "
            "Give the same backbone with --backbone DIR, or train again."
        )
    return phase


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} can not be read: {error}") from error


def _file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
