"""Judging a trained head on a split of its run, or on graded images from elsewhere."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mirip_fast.config import Config, config_from_dict
from mirip_fast.data.manifest import read_manifest
from mirip_fast.data.records import DataOptions
from mirip_fast.errors import DataError, StoreError
from mirip_fast.evaluation.report import Report, judge
from mirip_fast.features.embed import Progress, Settings
from mirip_fast.features.store import FeatureStore
from mirip_fast.ranking.graded import GradedImages, load_split
from mirip_fast.ranking.scorer import ScoreModel, load_score_model, score_files
from mirip_fast.training.run_folder import SPLIT_FILE, Run, newest_model, run_of_checkpoint

log = logging.getLogger(__name__)


def pick_model(checkpoint: Path | None, output_dir: Path) -> ScoreModel:
    """The model that ``--checkpoint`` names, or that of the newest finished run; says which.

    Raises:
        RunNotFoundError: there is none.
        CheckpointError: it can not be read.
    """
    if checkpoint is None:
        run = newest_model(output_dir)
        path = run.model
    else:
        run, path = run_of_checkpoint(checkpoint)
    log.info("Model %s", path)
    return load_score_model(path)


def judge_split(model: ScoreModel, split: str, config: Config) -> tuple[Report, Path]:
    """Judge a model on one split of its own run, from the cache.

    Returns:
        The report, and where to write it.

    Raises:
        DataError: the run has no such split.
        StoreError: the features are not in the cache any more.
    """
    folder = model.checkpoint.parent
    info = Run(folder).info
    data = config_from_dict({"data": info.get("data", {})}).data
    if config.evaluate.within is None and info.get("within"):  # judged as it was trained
        evaluate = dataclasses.replace(config.evaluate, within=info["within"])
        config = dataclasses.replace(config, evaluate=evaluate)
    images = load_split(folder / SPLIT_FILE, model.info.tiers, data).part(split)
    if not len(images):
        raise DataError(f"{folder / SPLIT_FILE} has no images in the {split} split")
    log.info("%s split: %d images", split.capitalize(), len(images))
    try:
        store = FeatureStore.open(Path(config.embed.cache_dir) / model.info.fingerprint_id)
        scores = model.score(store, images.hashes)
    except StoreError as error:
        log.info("The cached features are not all there (%s): they are computed again", error)
        scores = _score_again(model, images, config)
    return _report(scores, images, config), folder / f"evaluation_{split}.json"


def _score_again(model: ScoreModel, images: GradedImages, config: Config) -> NDArray[np.float32]:
    """Scores of a split's image files; every file has to be the one that was split."""
    paths = [record.path for record in images.manifest.records]
    scored = score_files(
        model, paths, cache_dir=Path(config.embed.cache_dir), device=config.runtime.device
    )
    for path, outcome, sha in zip(paths, scored.outcomes, images.hashes, strict=True):
        if outcome.reason or outcome.sha256 != sha:
            why = outcome.reason or "its content changed since training"
            raise DataError(f"{path} of the run's split can not be scored: {why}")
    return scored.scores


def judge_files(
    model: ScoreModel,
    source: Path,
    image_dir: Path | None,
    config: Config,
    backbone: str | None,
    progress: Callable[[Progress], None],
) -> tuple[Report, Path]:
    """Judge a model on graded images from anywhere, embedding what is not cached.

    Returns:
        The report, and where to write it.

    Raises:
        DataError: faulty grades, other tiers than the model's, or images that can not be read.
    """
    data = dataclasses.replace(config.data, tiers=",".join(model.info.tiers))
    if image_dir is not None:
        data = dataclasses.replace(data, image_root=str(image_dir))
    manifest = read_manifest(source, DataOptions.from_config(data))
    manifest.require_files()
    if not manifest.has_grades:
        raise DataError(f"{source} has no grades to judge by: a tier column is needed")
    scored = score_files(
        model,
        [record.path for record in manifest.records],
        cache_dir=Path(config.embed.cache_dir),
        device=config.runtime.device,
        backbone=backbone,
        settings=Settings(batch_size=config.embed.embed_batch_size),
        progress=progress,
    )
    good = [i for i, outcome in enumerate(scored.outcomes) if outcome.sha256 and not outcome.reason]
    if len(good) < len(scored.outcomes):
        log.warning(
            "%d images could not be read and are left out", len(scored.outcomes) - len(good)
        )
    images = GradedImages(
        manifest.subset(good),
        tuple(scored.outcomes[i].sha256 or b"" for i in good),
        tuple("test" for _ in good),
    )
    path = model.checkpoint.parent / f"evaluation_{source.stem}.json"
    return _report(scored.scores[good], images, config), path


def _report(scores: np.ndarray, images: GradedImages, config: Config) -> Report:
    records = images.manifest.records
    within = config.evaluate.within
    return judge(
        scores,
        images.tiers,
        tier_names=images.manifest.tiers,
        image_ids=[record.image_id for record in records],
        groups=[record.group for record in records],
        tier_scores=[record.tier_score for record in records],
        within=None if within is None else images.column(within),
        rounds=config.evaluate.bootstrap_rounds,
    )
