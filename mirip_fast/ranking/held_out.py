"""Scores of graded images by models that had not trained on them: what every reference is made from.

On its own training images a head scores far better than on new ones, so percentiles, calibration and tier
probabilities look at these scores only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mirip_fast.errors import DataError
from mirip_fast.evaluation.metrics import ranks
from mirip_fast.files import has_file, read_csv, read_json, sha256_of, write_csv
from mirip_fast.models.gp import normal_scores
from mirip_fast.ranking.graded import GradedImages

#: File in a run's folder.
HELD_OUT_FILE = "held_out.csv"
#: File in a run's folder: what held-out scores say about those of the model whose SHA-256 it names.
CALIBRATION_FILE = "calibration.json"
#: Fewer held-out works say too little of how far grades lie from scores.
_LEAST = 30

#: Where a score comes from: a fold that left the image out, the validation split, or a Gaussian process
#: without the image and its group.
SOURCES = ("out-of-fold", "validation", "left-out groups")

_COLUMNS = ("image_id", "path", "tier", "tier_score", "group", "source", "score")


@dataclass(frozen=True)
class HeldOut:
    """n graded images and their held-out scores.

    Attributes:
        ids: image ids, [n].
        paths: image files, [n].
        tiers: [n] int64, 0 is the best tier; all −1 where the images have none.
        tier_scores: [n], None where there is none.
        groups: [n], None for an image that is its own group.
        source: one of :data:`SOURCES`, the same for all.
        scores: [n] float64, in the unit that the run's model scores in; higher is better.
    """

    ids: Sequence[str]
    paths: Sequence[Path]
    tiers: NDArray[np.int64]
    tier_scores: Sequence[float | None]
    groups: Sequence[str | None]
    source: str
    scores: NDArray[np.float64]

    @classmethod
    def of(cls, images: GradedImages, scores: NDArray[np.floating], source: str) -> HeldOut:
        """The scores [n] of these images, in their order."""
        manifest = images.manifest
        return cls(
            ids=manifest.ids,
            paths=manifest.paths,
            tiers=images.tiers if images.has_tiers else np.full(len(images), -1),
            tier_scores=manifest.tier_scores,
            groups=manifest.groups,
            source=source,
            scores=scores.astype(np.float64),
        )

    @property
    def has_tiers(self) -> bool:
        """Whether the images have tiers."""
        return bool((self.tiers >= 0).all())

    @property
    def order(self) -> NDArray[np.int64]:
        """[n] tier, or rank of the finer grade where there are no tiers; 0: the best; all −1: neither."""
        if self.has_tiers or None in self.tier_scores:
            return self.tiers
        return ranks(np.array(self.tier_scores, dtype=np.float64))

    def __len__(self) -> int:
        return len(self.scores)


def save_held_out(folder: Path, held_out: HeldOut, tier_names: Sequence[str]) -> None:
    """Write held_out.csv into a run's folder."""
    rows = [
        {
            "image_id": held_out.ids[i],
            "path": held_out.paths[i],
            "tier": tier_names[int(held_out.tiers[i])] if held_out.has_tiers else None,
            "tier_score": held_out.tier_scores[i],
            "group": held_out.groups[i],
            "source": held_out.source,
            "score": repr(float(held_out.scores[i])),
        }
        for i in range(len(held_out))
    ]
    write_csv(folder / HELD_OUT_FILE, _COLUMNS, rows)


def load_held_out(folder: Path, tier_names: Sequence[str]) -> HeldOut | None:
    """Read a run's held-out scores; None if the run has none.

    Raises:
        DataError: the file is damaged.
    """
    path = folder / HELD_OUT_FILE
    names = list(tier_names)
    try:
        if not has_file(path):
            return None
        rows = read_csv(path, _COLUMNS)
        return HeldOut(
            ids=[row["image_id"] for row in rows],
            paths=[Path(row["path"]) for row in rows],
            tiers=np.array(
                [names.index(row["tier"]) if row["tier"] else -1 for row in rows], dtype=np.int64
            ),
            tier_scores=[float(row["tier_score"]) if row["tier_score"] else None for row in rows],
            groups=[row["group"] or None for row in rows],
            source=rows[0]["source"] if rows else SOURCES[1],
            scores=np.array([float(row["score"]) for row in rows], dtype=np.float64),
        )
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def grade_errors(model: Path, tier_names: Sequence[str]) -> NDArray[np.float64] | None:
    """[m] how far the graded works' own grades lie from their held-out scores, in the unit of the score.

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
    grades = (
        normal_scores(held_out.tiers)
        if held_out.has_tiers
        else np.array(held_out.tier_scores, dtype=np.float64)
    )
    scores = held_out.scores
    slope = np.cov(grades, scores)[0, 1] / (scores.var(ddof=1) or 1.0)
    if slope <= 0:
        return None
    errors: NDArray[np.float64] = (grades - grades.mean()) / slope - (scores - scores.mean())
    return errors
