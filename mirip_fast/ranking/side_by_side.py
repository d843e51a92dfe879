"""Several runs evaluated on the same images, and how sure the differences between them are."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mirip_fast.config import Config
from mirip_fast.errors import DataError
from mirip_fast.evaluation.bootstrap import Interval, PairedDifference, paired_bootstrap
from mirip_fast.evaluation.metrics import codes_of
from mirip_fast.evaluation.text_table import format_table
from mirip_fast.ranking.evaluate import evaluate_split
from mirip_fast.ranking.graded import GradedImages, load_split
from mirip_fast.ranking.scorer import ScoreModel
from mirip_fast.settings import config_from_dict
from mirip_fast.training.run_folder import SPLIT_FILE, Run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One run's figures.

    Attributes:
        run: its folder's name.
        accuracy: pairwise accuracy (0–1) on the common images.
        interval: of it; None means unknown.
        difference: its accuracy minus the first run's, on the same resamples; None for the first run.
        seconds_per_epoch: of its training; None where its history is gone.
    """

    run: str
    accuracy: float
    interval: Interval | None
    difference: PairedDifference | None
    seconds_per_epoch: float | None


@dataclass(frozen=True)
class SideBySide:
    """Runs beside each other, in the order given; differences are from the first one."""

    split: str
    n_images: int
    rows: tuple[Row, ...]

    def to_table(self) -> str:
        """Text for a terminal."""
        headers = [
            *("run", "pairwise accuracy", "95 % interval"),
            *("minus the first", "95 % interval", "s per epoch"),
        ]
        cells = [
            [
                row.run,
                f"{row.accuracy:.4f}",
                _span(row.interval),
                "" if row.difference is None else f"{row.difference.difference:+.4f}",
                "" if row.difference is None else _span(row.difference.interval, "+"),
                "" if row.seconds_per_epoch is None else f"{row.seconds_per_epoch:.2f}",
            ]
            for row in self.rows
        ]
        head = f"{self.split.capitalize()} split, {self.n_images} images, the same for all runs"
        return f"{head}\n\n{format_table(headers, cells, 'lrlrlr')}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def evaluate_side_by_side(models: Sequence[ScoreModel], split: str, config: Config) -> SideBySide:
    """Evaluate several models on one split, which has to be the same in all their runs.

    Args:
        models: at least two.
        split: train, val or test.
        config: the sections evaluate, embed and runtime are used.

    Raises:
        DataError: their splits differ, so that one may have learnt from what another is evaluated on.
    """
    parts = [_part(model, split) for model in models]
    first = parts[0]
    for model, part in zip(models[1:], parts[1:], strict=True):
        _require_same(models[0], first, model, part, split)
    rows: list[Row] = []
    tiers, groups = first.order, [record.group for record in first.manifest.records]
    within = config.evaluate.within
    codes = None if within is None else codes_of(first.column(within))
    base = np.empty(0)
    for model, part in zip(models, parts, strict=True):
        report = evaluate_split(model, split, config).report
        place = {sha: i for i, sha in enumerate(part.hashes)}
        scores = np.asarray(report.scores)[[place[sha] for sha in first.hashes]]
        difference = None
        if rows:
            difference = paired_bootstrap(
                scores, base, tiers, groups, within=codes, finer=not first.has_tiers,
                rounds=config.evaluate.bootstrap_rounds,
            )  # fmt: skip
        else:
            base = scores
        run = Run(model.checkpoint.parent)
        inside = codes is not None and report.within_accuracy is not None
        accuracy = report.within_accuracy if inside else report.pairwise_accuracy
        interval = report.within_accuracy_interval if inside else report.pairwise_accuracy_interval
        assert accuracy is not None
        rows.append(Row(run.path.name, accuracy, interval, difference, _epoch_seconds(run)))
    return SideBySide(split, len(first), tuple(rows))


def _part(model: ScoreModel, split: str) -> GradedImages:
    folder = model.checkpoint.parent
    data = config_from_dict({"data": Run(folder).info.get("data", {})}).data
    return load_split(folder / SPLIT_FILE, model.info.tiers, data).part(split)


def _require_same(
    model: ScoreModel, part: GradedImages, other: ScoreModel, its: GradedImages, split: str
) -> None:
    ours, theirs = (
        dict(zip(images.hashes, images.order.tolist(), strict=True)) for images in (part, its)
    )
    if ours == theirs and model.info.tiers == other.info.tiers:
        return
    common = ours.keys() & theirs.keys()
    graded = sum(ours[sha] != theirs[sha] for sha in common)
    raise DataError(
        f"The {split} splits of {model.checkpoint.parent} and {other.checkpoint.parent} differ: "
        f"{len(ours)} and {len(theirs)} images, {len(common)} in common"
        + (f", {graded} of them graded differently" if graded else "")
        + ". One run may have learnt from what the other is evaluated on. Runs share a split when they are "
        "trained on the same data with the same --split-seed, or with --full --init-from the other; or "
        "evaluate each on --test-data that neither has seen."
    )


def _epoch_seconds(run: Run) -> float | None:
    seconds = [float(row["epoch_seconds"]) for row in run.history() if row.get("epoch_seconds")]
    return float(np.mean(seconds)) if seconds else None


def _span(interval: Interval | None, sign: str = "") -> str:
    if interval is None:
        return "unknown"
    return f"{interval.low:{sign}.4f} – {interval.high:{sign}.4f}"
