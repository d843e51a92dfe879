"""A run's references: held-out scores, and what was learned from them about the meaning of a score.

``held_out.csv`` and ``calibration.json`` lie in the run's folder. The calibration names the SHA-256 of the
model file it was made for, and is left aside beside another one.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mirip_fast.errors import DataError
from mirip_fast.evaluation.bootstrap import accuracy_interval
from mirip_fast.evaluation.calibration import Calibration, fit_calibration
from mirip_fast.evaluation.metrics import codes_of, pairwise_accuracy
from mirip_fast.features.store import FeatureStore
from mirip_fast.files import has_file, read_csv, read_json, sha256_of, write_json
from mirip_fast.ranking.anchors import keep_anchors
from mirip_fast.ranking.graded import GradedImages
from mirip_fast.ranking.held_out import CALIBRATION_FILE, HeldOut, save_held_out
from mirip_fast.ranking.rows import ListedPairs
from mirip_fast.ranking.scorer import ScoreModel, load_score_model
from mirip_fast.training.run_folder import SPLIT_FILE

log = logging.getLogger(__name__)

#: File of a shared model, which has no split.csv: the contents that it was made with, and no names.
MADE_WITH_FILE = "made_with.csv"
_ROUNDS = 200  # bootstrap resamples behind the accuracy that is kept with a model


def write_validation_references(
    checkpoint: Path, images: GradedImages, store: FeatureStore, within: str | None
) -> Calibration:
    """Score the validation split with a run's best head; write held_out.csv, calibration.json and
    anchors.json.

    The best epoch was chosen by its accuracy on the same split, so these scores are slightly too good;
    out-of-fold scores are not.

    Args:
        checkpoint: the run's best checkpoint.
        images: the run's graded images.
        store: their features.
        within: the column inside whose values works are compared, or None.
    """
    model = load_score_model(checkpoint)
    scores = model.score(store, images.part("val").hashes)
    calibration = write_references_of_scores(model, images, scores, within)
    keep_anchors(model, images, store)
    return calibration


def write_references_of_scores(
    model: ScoreModel, images: GradedImages, scores: NDArray[np.floating], within: str | None
) -> Calibration:
    """The same from the scores [n] of the validation split.

    Args:
        model: the run's model.
        images: the run's graded images.
        scores: the model's, of the validation images in their order.
        within: the column inside whose values works are compared, or None.
    """
    val = images.part("val")
    held_out = HeldOut.of(val, scores, "validation")
    save_held_out(model.checkpoint.parent, held_out, model.info.tiers)
    return write_calibration(model, held_out, images, within)


def write_calibration(
    model: ScoreModel,
    held_out: HeldOut,
    images: GradedImages,
    within: str | None,
    judged: ListedPairs | None = None,
    accuracy: tuple[float, float, float] | None = None,
) -> Calibration:
    """Learn from held-out scores and write calibration.json beside the model.

    Args:
        model: the run's model, an ensemble or one head.
        held_out: scores in the model's unit, of works that were not trained on.
        images: the run's graded images, those of ``held_out`` among them.
        within: the column inside whose values works are compared, or None.
        judged: pairs of the works of ``held_out`` that the probability of a pair is learned from; None: all
            pairs of different grades.
        accuracy: of the judged pairs, and its interval; None computes that of the grades.
    """
    codes = None
    if within is not None:
        value_of = dict(zip(images.manifest.ids, images.column(within), strict=True))
        codes = codes_of([value_of[image_id] for image_id in held_out.ids])
    names = model.info.tiers if held_out.has_tiers else ()
    calibration = fit_calibration(
        held_out.scores, held_out.order, names,
        source=held_out.source, within=codes, within_name=within,
        judged=None if judged is None else judged.better_first,
    )  # fmt: skip
    if judged is None and calibration.unknown is None:
        place = {image_id: i for i, image_id in enumerate(images.manifest.ids)}
        grades = images.subset(place[i] for i in held_out.ids).grades if within is None else None
        pairs: dict[str, Any] = {"within": codes, "finer": not held_out.has_tiers, "grades": grades}
        interval = accuracy_interval(
            held_out.scores, held_out.order, held_out.groups, rounds=_ROUNDS, **pairs
        )
        if interval is not None:
            value = pairwise_accuracy(held_out.scores, held_out.order, **pairs)
            accuracy = (value, interval.low, interval.high)
    calibration = dataclasses.replace(calibration, accuracy=accuracy)
    save_calibration(model.checkpoint, calibration)
    for warning in calibration.warnings():
        log.info("Probabilities %s" if calibration.unknown else "Calibration: %s", warning)
    return calibration


def save_calibration(model: Path, calibration: Calibration) -> None:
    """Write calibration.json beside the model file that it is for."""
    about = {"model": model.name, "model_sha256": sha256_of(model)}
    write_json(model.with_name(CALIBRATION_FILE), {**about, **calibration.to_dict()})


def load_calibration(model: ScoreModel) -> Calibration:
    """What the scores of ``model`` mean; unknown, and why, where its run has no calibration for it.

    Raises:
        DataError: calibration.json is damaged.
    """
    path = model.checkpoint.with_name(CALIBRATION_FILE)
    try:
        if not has_file(path):
            return _unknown(
                model, f"unknown: {path} is missing; training on graded works writes it"
            )
        values = read_json(path)
        if values.get("model_sha256") == sha256_of(model.checkpoint):
            return Calibration.from_dict(values)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return _unknown(
        model,
        f"unknown: {path} was made for {values.get('model')}, not for this {model.checkpoint.name}",
    )


def made_with(model: ScoreModel, hashes: Iterable[bytes | None]) -> int:
    """How many images are in the train or val split of the model's run, by their content.

    Args:
        model: a run's model.
        hashes: SHA-256 of each image's bytes; None for one that could not be read.

    Raises:
        DataError: split.csv is damaged.
    """
    known = learned_from(model)
    return sum(sha is not None and sha.hex() in known for sha in hashes)


def learned_from(model: ScoreModel) -> set[str]:
    """The SHA-256 of each image in the train or val split of the model's run, as hexadecimal digits.

    Raises:
        DataError: split.csv, or the list that a shared model has in its place, is damaged.
    """
    path = model.checkpoint.with_name(SPLIT_FILE)
    try:
        if has_file(path):
            rows = read_csv(path, ("sha256", "split"))
            return {row["sha256"] for row in rows if row["split"] in ("train", "val")}
        path = model.checkpoint.with_name(MADE_WITH_FILE)
        return {row["sha256"] for row in read_csv(path, ("sha256",))} if has_file(path) else set()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _unknown(model: ScoreModel, why: str) -> Calibration:
    names = model.info.tiers
    return Calibration("none", names, (0,) * len(names), None, why, None, None, ())
