"""Scoring images with a trained head: from cached features at once, computing what is missing."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mirip_fast.config import DataConfig, EmbedConfig
from mirip_fast.data.hashes import HashMemory
from mirip_fast.data.remote import is_remote
from mirip_fast.errors import BackboneError, CheckpointError, ImageError, StoreError
from mirip_fast.features.backbone_files import find_backbone, names_of_backbones
from mirip_fast.features.embed import OnProgress, PhaseOne, open_hashes, prepare, with_kinds
from mirip_fast.features.outcomes import ledger
from mirip_fast.features.recipe import is_patches, series_name
from mirip_fast.features.store import FeatureStore, differing_fields
from mirip_fast.models.model_info import ModelInfo, beside
from mirip_fast.models.numpy_head import NumpyHead
from mirip_fast.ranking.held_out import grade_errors
from mirip_fast.ranking.rows import JoinedStore, open_store
from mirip_fast.ranking.score_model import ScoreModel, TrainedHead, load_head, load_members

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scored:
    """Scores of image files.

    Attributes:
        outcomes: what became of each of n paths: ``status``, ``reason`` and ``sha256``.
        by_view: [n, V] a score for each stored view, NaN where the image failed.
        store: the features of the others, for asking the model more about them; of an ensemble of
            fine-tuned backbones those of the first.
    """

    outcomes: pd.DataFrame
    by_view: NDArray[np.float32]
    store: FeatureStore

    @property
    def scores(self) -> NDArray[np.float32]:
        """[n] the mean over the views."""
        scores: NDArray[np.float32] = self.by_view.mean(1)
        return scores

    @property
    def view_spread(self) -> NDArray[np.float32] | None:
        """[n] standard deviation over the views (n − 1), in the unit of the score; None with one view."""
        if self.by_view.shape[1] < 2:
            return None
        spread: NDArray[np.float32] = self.by_view.std(1, ddof=1)
        return spread


def load_score_model(path: Path) -> ScoreModel:
    """Load a model: an ensemble's safetensors file or a checkpoint.

    A checkpoint's head is read from the safetensors file beside it, if that is of the same weights.

    Raises:
        CheckpointError: unreadable, foreign, or of a model that has no head of this kind.
    """
    model = _load_model(path)
    if model.errors is not None or model.process is not None:
        return model
    return dataclasses.replace(model, errors=grade_errors(path, model.info.tiers))


def _load_model(path: Path) -> ScoreModel:
    if path.suffix == ".safetensors":
        return ScoreModel(path, *load_members(path))
    quick = load_head(path)
    if quick is not None:
        return ScoreModel(path, beside(path, quick[0]), (TrainedHead(quick[1]),))
    from mirip_fast.models.checkpoint import load_checkpoint

    content = load_checkpoint(path, ("model_state_dict",))
    if "model" not in content:
        return _foreign_model(path)
    from mirip_fast.models.finetuned import deploy, head_state, is_finetuned

    arrays = {name: value.numpy() for name, value in head_state(content).items()}
    tuned = is_finetuned(content)
    info = deploy(path, content) if tuned else ModelInfo.from_dict(content["model"])
    return ScoreModel(path, info, (TrainedHead(NumpyHead(arrays)),))


def _foreign_model(path: Path) -> ScoreModel:
    """A checkpoint that does not say what it expects: it is taken to be of the documented interface."""
    from mirip_fast.models.ranking_model import PairwiseRankingModel

    try:
        model = PairwiseRankingModel.from_checkpoint(path)
    except BackboneError as error:
        raise CheckpointError(
            f"{path} does not say which features its head was trained on, and the usual backbone is not "
            f"here: {error}"
        ) from error
    info = model.describe(EmbedConfig.image_size, DataConfig().tier_names())
    log.warning(
        "%s does not say what it was trained on; assumed are %s, images of %d pixels and the tiers %s",
        path, info.embed.backbone, info.embed.image_size, ", ".join(info.tiers),
    )  # fmt: skip
    state = {name: v for name, v in model.state_dict().items() if not name.startswith("backbone.")}
    head = NumpyHead({name: value.numpy() for name, value in state.items()})
    return ScoreModel(path, info, (TrainedHead(head),))


def score_files(
    model: ScoreModel,
    paths: Sequence[Path],
    *,
    cache_dir: Path,
    device: str = "auto",
    backbone: str | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: OnProgress = lambda *_: None,
) -> Scored:
    """Score image files, embedding those whose features are not in the cache.

    Args:
        model: the head; its backbone, preprocessing and precision are used.
        paths: image files.
        cache_dir: folder of the stores.
        device: where missing features are computed.
        backbone: another place of the same backbone, if it moved.
        settings: how missing features are computed: arguments of :func:`mirip_fast.features.embed.embed`.
        progress: called after every committed batch.

    Raises:
        CheckpointError: the backbone found is not the one that the head was trained on.
        BackboneError: features are missing and the backbone cannot be found.
    """
    settings = settings or {}
    parts = model.parts()
    found = []
    for part in parts:
        found.append(_score_part(part, paths, cache_dir, device, backbone, settings, progress))
        settings = {**settings, "rehash": False}  # once is enough
    first = found[0]
    if len(parts) == 1:
        return first
    outcomes = _all_of([scored.outcomes for scored in found])
    return Scored(outcomes, np.mean([scored.by_view for scored in found], axis=0), first.store)


def _all_of(passes: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Of each file what became of it in several passes: failed if it failed in one."""
    outcomes = passes[0].copy()
    for other in reversed(passes):
        failed = other["status"] == "failed"
        outcomes[failed] = other[failed]
    return outcomes


def _places(info: ModelInfo, moved: str | None, hashes: HashMemory) -> list[str | None]:
    """Per backbone of a model, where it is now if it moved: known by its weights."""
    if moved is None or not info.more:
        return [moved] * len(info.backbones)
    known = {find_backbone(n, hashes.sha256).weights_id: n for n in names_of_backbones(moved)}
    places = [known.pop(str(each.fingerprint["backbone"]), None) for each in info.backbones]
    if known:
        names = ", ".join(each.embed.backbone for each in info.backbones)
        raise CheckpointError(
            f"--backbone {', '.join(known.values())} is none of those that the model looks through ({names})"
        )
    return places


def _score_part(
    model: ScoreModel,
    paths: Sequence[Path],
    cache_dir: Path,
    device: str,
    backbone: str | None,
    settings: Mapping[str, Any],
    progress: OnProgress,
) -> Scored:
    """The same with one backbone."""
    with open_hashes(cache_dir) as hashes:
        known = _contents(paths, hashes, settings.get("rehash", False))
        store = None if known is None else _complete_store(model.info, cache_dir, known)
        if store is not None and known is not None:
            # Nothing to compute: neither torch nor the backbone is needed.
            outcomes = ledger(known)
        else:
            places = _places(model.info, backbone, hashes)
            passes, stores = [], []
            for info, place in zip(model.info.backbones, places, strict=True):
                phase = phase_of_model(info, cache_dir, device, place, hashes, every_layer=True)
                passes.append(phase.embed(paths, hashes, progress, **settings))
                stores.append(phase.store)
                settings = {**settings, "rehash": False}  # once is enough
            outcomes = _all_of(passes)
            store = JoinedStore(stores, model.info) if model.info.more else stores[0]
    good = np.flatnonzero(outcomes["status"] != "failed")
    scores = np.full((len(paths), len(model.info.views)), np.nan, np.float32)
    if len(good):
        wanted = outcomes["sha256"][good].tolist()
        # The same picture under two names is scored once: rounding must not order it.
        unique = list(dict.fromkeys(wanted))
        score_of = dict(zip(unique, model.score_views(store, unique), strict=True))
        scores[good] = [score_of[sha] for sha in wanted]
    return Scored(outcomes, scores, store)


def _contents(
    paths: Sequence[Path], hashes: HashMemory, rehash: bool
) -> list[bytes | ImageError] | None:
    """The content hash of each image; None where remote ones would have to be fetched only for that."""
    if any(map(is_remote, paths)):
        remembered = [None] if rehash else list(hashes.recall_many(paths))
        if None in remembered:
            return None  # embedding fetches each once, hashes it, and computes only what is missing
    return list(hashes.sha256_many(paths, rehash=rehash))


def _complete_store(
    info: ModelInfo, cache_dir: Path, known: Sequence[bytes | ImageError]
) -> FeatureStore | None:
    """The model's store, if it has everything the head needs of every readable image."""
    try:
        store = open_store(cache_dir, info)
    except StoreError:
        return None
    wanted = [sha for sha in known if isinstance(sha, bytes)]
    for view in info.views:
        for kind in _kept_kinds(info):
            if (store.rows(series_name(view, kind), wanted) < 0).any():
                return None
    return store


def _kept_kinds(info: ModelInfo) -> tuple[str, ...]:
    """What a model needs: what it looks at, and the CLS token, by which works resemble others."""
    return tuple(dict.fromkeys(("cls", *info.kinds)))


def phase_of_model(
    info: ModelInfo,
    cache_dir: Path,
    device: str,
    backbone: str | None,
    hashes: Any,
    *,
    every_layer: bool = False,
) -> PhaseOne:
    """Phase one as the model was trained, on this machine, with what the model needs.

    A machine that cannot compute in the model's precision computes in fp32, into a store of its own.

    Args:
        info: what the model expects.
        cache_dir: folder of the stores.
        device: where to compute.
        backbone: another place of it, if it moved.
        hashes: of files.
        every_layer: of what is kept: one pass gives the others, too, and the next training may look at them,
            also at works that were only ranked: those of judged pairs.
    """
    from mirip_fast.runtime import resolve_device, supported_precisions

    options = dataclasses.replace(info.embed, cache_dir=str(cache_dir), compile=False)
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
    phase = prepare(options, device, hashes)
    kinds = _kept_kinds(info)
    if every_layer:
        others = (kind for kind in phase.recipe.kinds if not is_patches(kind))
        kinds = tuple(dict.fromkeys((*kinds, *others)))
    phase = with_kinds(phase, kinds)
    ours = {**phase.recipe.fingerprint, "precision": wanted}
    if ours != info.fingerprint:
        raise CheckpointError(
            "The backbone or its preprocessing is not the one this model was trained on "
            f"({differing_fields(info.fingerprint, ours)}). "
            "Give the same backbone with --backbone DIR, or train again."
        )
    return phase
