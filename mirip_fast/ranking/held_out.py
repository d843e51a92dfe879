"""Held-out scores: what models said of graded works that they had not trained on, and what follows from it.

On its own training images a head scores far better than on new ones, so percentiles, calibration and tier
probabilities look at these scores only. ``held_out.csv`` and ``calibration.json`` lie in the run's folder.
The latter has the SHA-256 of the model file that it was made for; it is left aside beside another one.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mirip_fast.data.table import Manifest, image_table, or_none
from mirip_fast.errors import DataError
from mirip_fast.evaluation.calibration import Calibration, fit_calibration
from mirip_fast.evaluation.metrics import codes_of
from mirip_fast.evaluation.report import Report, evaluate
from mirip_fast.files import has_file, read_csv, read_json, sha256_of, write_csv, write_json
from mirip_fast.models.gp import errors_in_tiers, normal_scores
from mirip_fast.ranking.graded import GradedImages
from mirip_fast.ranking.rows import ListedPairs
from mirip_fast.training.run_folder import SPLIT_FILE

if TYPE_CHECKING:
    from mirip_fast.ranking.score_model import ScoreModel

log = logging.getLogger(__name__)

#: File in a run's folder.
HELD_OUT_FILE = "held_out.csv"
#: File in a run's folder: what held-out scores say about those of the model whose SHA-256 it names.
CALIBRATION_FILE = "calibration.json"
#: File of a shared model, which has no split.csv: the contents that it was made with, and no names.
MADE_WITH_FILE = "made_with.csv"
#: Fewer held-out works say too little of how far grades lie from scores.
_LEAST = 30
_ROUNDS = 200  # bootstrap resamples behind the accuracy that a training tells and keeps

#: Where a score comes from: a fold that left the image out, the validation split (which chose the best epoch,
#: so that these are slightly too good), or a Gaussian process without the image and its group.
SOURCES = ("out-of-fold", "validation", "left-out groups")

_COLUMNS = ("image_id", "path", "tier", "tier_score", "group", "source", "score")


def save_held_out(folder: Path, held_out: GradedImages) -> None:
    """Write held_out.csv into a run's folder."""
    known = [or_none(held_out.table[name]) for name in ("image_id", "file", "tier")]
    if not held_out.has_tiers:
        known[2] = [None] * len(held_out)
    grades, scores = held_out.tier_scores, map(repr, held_out.scores.tolist())
    rows = zip(
        *known, grades, held_out.groups, [held_out.held_out_by] * len(held_out), scores, strict=True
    )
    write_csv(folder / HELD_OUT_FILE, _COLUMNS, [dict(zip(_COLUMNS, r, strict=True)) for r in rows])


def load_held_out(folder: Path, tier_names: Sequence[str]) -> GradedImages | None:
    """A run's works with held-out scores, without content and split; None if the run has none.

    Raises:
        DataError: the file is damaged.
    """
    path = folder / HELD_OUT_FILE
    number = {"": None} | {name: i for i, name in enumerate(tier_names)}
    try:
        if not has_file(path):
            return None
        rows = read_csv(path, _COLUMNS)
        columns: dict[str, list[Any]] = {
            "image_id": [row["image_id"] for row in rows],
            "file": [row["path"] for row in rows],
            "tier": [number[row["tier"]] for row in rows],
            "tier_score": [float(row["tier_score"]) if row["tier_score"] else None for row in rows],
            "group": [row["group"] or None for row in rows],
        }
        scores = np.array([float(row["score"]) for row in rows], dtype=np.float64)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    known = Manifest(path, folder, tuple(tier_names), image_table(columns, tier_names))
    images = GradedImages.of(known, [None] * len(rows), [""] * len(rows))
    return images.with_scores(scores, rows[0]["source"] if rows else SOURCES[1])


def grade_errors(model: Path, tier_names: Sequence[str]) -> NDArray[np.float64] | None:
    """[m] how far the graded works' own grades lie from their held-out scores, in the unit of the score; of
    tiers, what graders may have meant by them (:func:`mirip_fast.models.gp.errors_in_tiers`).

    Args:
        model: a run's model file.
        tier_names: its tiers, best first.

    Returns:
        None where the run's held-out scores are few, without grades, not of this model, or do not rise with
        the grades.
    """
    calibration = model.with_name(CALIBRATION_FILE)
    try:
        ours = has_file(calibration) and read_json(calibration).get("model_sha256")
        if not ours or ours != sha256_of(model):
            return None
    except (OSError, ValueError):  # whoever reads the calibration tells what is wrong with it
        return None
    held_out = load_held_out(model.parent, tier_names)
    if held_out is None or len(held_out) < _LEAST or (held_out.order < 0).any():
        return None
    grades = normal_scores(held_out.tier_codes) if held_out.has_tiers else held_out.needed_scores
    apart = held_out.scores - held_out.scores.mean()
    slope = float(np.cov(grades, apart)[0, 1] / (apart.var(ddof=1) or 1.0))
    if slope <= 0:
        return None
    errors: NDArray[np.float64] = (grades - grades.mean()) / slope - apart
    if held_out.has_tiers:
        errors = errors_in_tiers(held_out.tier_codes, slope * apart, np.ones(len(apart))) / slope
    return errors


def keep_references(
    model: ScoreModel,
    held_out: GradedImages,
    within: str | None,
    *,
    rounds: int = _ROUNDS,
    judged: ListedPairs | None = None,
    accuracy: tuple[float, float, float] | None = None,
) -> Report | None:
    """Write held_out.csv, and beside the model calibration.json: what is learned from held-out scores.

    Args:
        model: the run's model, an ensemble or one head.
        held_out: works that were not trained on, with scores in the model's unit.
        within: the column inside whose values works are compared, or None.
        rounds: bootstrap resamples behind the report.
        judged: pairs of the works that the probability of a pair is learned from; None: all pairs of
            different grades.
        accuracy: of the judged pairs, and its interval.

    Returns:
        How these scores order the works; None where no two have different grades.
    """
    save_held_out(model.checkpoint.parent, held_out)
    column = None if within is None else held_out.column(within)
    names = model.info.tiers if held_out.has_tiers else ()
    calibration = fit_calibration(
        held_out.scores, held_out.order, names,
        source=held_out.held_out_by, within=None if column is None else codes_of(column), within_name=within,
        judged=None if judged is None else judged.better_first,
    )  # fmt: skip
    report = None
    if len(set(held_out.order.tolist())) > 1:
        report = evaluate(
            held_out.scores, held_out.tier_codes if held_out.has_tiers else None,
            tier_names=held_out.tiers, image_ids=held_out.ids, groups=held_out.groups,
            tier_scores=held_out.tier_scores, within=column, grades=held_out.grades,
            calibration=calibration, rounds=rounds,
        )  # fmt: skip
        if judged is None and calibration.unknown is None:
            value, interval = report.pairwise_accuracy, report.pairwise_accuracy_interval
            if within is not None and report.within_accuracy is not None:
                value, interval = report.within_accuracy, report.within_accuracy_interval
            if interval is not None:
                accuracy = (value, interval.low, interval.high)
    calibration = dataclasses.replace(calibration, accuracy=accuracy)
    save_calibration(model.checkpoint, calibration)
    for warning in calibration.warnings():
        log.info("Probabilities %s" if calibration.unknown else "Calibration: %s", warning)
    return report


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
    why = f"unknown: {path} is missing; training on graded works writes it"
    try:
        if has_file(path):
            values = read_json(path)
            if values.get("model_sha256") == sha256_of(model.checkpoint):
                return Calibration.from_dict(values)
            why = f"unknown: {path} was made for {values.get('model')}, not for this {model.checkpoint.name}"
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    names = model.info.tiers
    return Calibration("none", names, (0,) * len(names), None, why, None, None, ())


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
