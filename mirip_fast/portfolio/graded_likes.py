"""The graded works that a picture looks like: those of the best tier, and of the tier it was put in."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mirip_fast.data.csv_reader import shown
from mirip_fast.data.image_files import is_unchanged
from mirip_fast.errors import DataError, MiripError, StoreError
from mirip_fast.features.gallery import Work, open_gallery
from mirip_fast.features.neighbours import FloatArray, open_index, unit
from mirip_fast.features.recipe import series_name
from mirip_fast.features.store import FeatureStore
from mirip_fast.ranking.graded import GradedImages, load_split
from mirip_fast.ranking.held_out import load_held_out
from mirip_fast.ranking.references import load_calibration
from mirip_fast.ranking.rows import open_store
from mirip_fast.ranking.scorer import ScoreModel
from mirip_fast.settings import config_from_dict
from mirip_fast.training.run_folder import SPLIT_FILE, Run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Likeness:
    """A graded work that another one looks like.

    Attributes:
        path: the image file.
        image_id: its name in the data.
        tier: name of its tier.
        cosine: of the CLS tokens of both, −1 … 1; 1 is the same direction.
    """

    path: Path
    image_id: str
    tier: str
    cosine: float


@dataclass(frozen=True)
class GradedLikes:
    """The graded works nearest to a picture.

    Attributes:
        tier: name of the tier that its score puts it in.
        top: the nearest of the best tier, the nearest first.
        same: the nearest of ``tier``; empty where that is the best tier.
    """

    tier: str
    top: tuple[Likeness, ...]
    same: tuple[Likeness, ...]


class GradedWorks:
    """The graded works of a model's run that are in the cache, and what its scores mean among them.

    Args:
        model: a model in its run's folder.
        cache_dir: folder of the stores.

    Raises:
        DataError: the run has no list of its graded images, or that is damaged.
        StoreError: the cache has no features of them any more.
    """

    def __init__(self, model: ScoreModel, cache_dir: Path):
        self._tiers = model.info.tiers
        self._store = open_store(cache_dir, model.info)
        self._series = series_name(model.info.views[0], "cls")
        images = _graded_images(model)
        if not images.has_tiers:
            raise DataError("the works that the model learned from have no tiers")
        if (self._store.rows(self._series, images.hashes) < 0).all():
            raise StoreError(f"{self._store.path} has no features of the run's graded images")
        self._works: dict[str, list[Work]] = {tier: [] for tier in self._tiers}
        for record, sha in zip(images.manifest.records, images.hashes, strict=True):
            tier = self._tiers[record.tier or 0]
            self._works[tier].append(Work(record.path, record.image_id, sha, tier))
        self._calibration = load_calibration(model)
        self._places = _places(model, images, self._store)

    def tier_of(self, score: float) -> str:
        """The tier that a score is put in: the most probable one, as ``rank`` names it.

        Where probabilities are unknown, it is that of its place among held-out scores of graded works:
        with the works sorted by score, the first as many as there are works of the best tier are put in
        it, the next in the second, and so on (as ``evaluate`` does).
        """
        if self._calibration.ordinal is not None:
            return self._tiers[int(self._calibration.ordinal.most_probable(np.array([score]))[0])]
        scores, counts = self._places
        above = int((scores > score).sum())
        filled = np.flatnonzero(counts)
        tier = int(np.searchsorted(np.cumsum(counts[filled]), above, side="right"))
        return self._tiers[int(filled[min(tier, len(filled) - 1)])]

    def likes(
        self, cls: NDArray[np.floating], sha256: bytes, score: float, *, k: int = 3
    ) -> GradedLikes:
        """The graded works that a picture looks like; never the picture itself.

        Args:
            cls: [D] its CLS token.
            sha256: of its file's bytes.
            score: its score.
            k: works per tier.
        """
        tier = self.tier_of(score)
        best = self._tiers[0]
        query = unit(cls[None])
        return GradedLikes(
            tier=tier,
            top=self._nearest(query, sha256, best, k),
            same=() if tier == best else self._nearest(query, sha256, tier, k),
        )

    def _nearest(self, query: FloatArray, sha256: bytes, tier: str, k: int) -> tuple[Likeness, ...]:
        works = [work for work in self._works[tier] if work.sha256 != sha256]
        if (self._store.rows(self._series, [work.sha256 for work in works]) < 0).all():
            return ()
        gallery = open_gallery(works, [self._store], self._series)
        index = open_index(gallery.vectors, gallery.folder, gallery.series)
        numbers, cosines = index.nearest(query, min(k, gallery.vectors.count))
        found = zip(numbers[0].tolist(), cosines[0].tolist(), strict=True)
        nearest = [(gallery.works_of(number)[0], cosine) for number, cosine in found if number >= 0]
        # Who made the run chose the paths, so other files of this machine might lie there.
        changed = [work for work, _ in nearest if not is_unchanged(work.path, work.sha256)]
        if changed:
            log.warning(
                "%d of the %d graded works of tier %s that it looks like %s not shown: their content changed "
                "since training (first: %s)",
                *(len(changed), len(nearest), tier, "is" if len(changed) == 1 else "are"),
                shown(changed[0].path),
            )
        return tuple(
            Likeness(work.path, work.image_id, tier, cosine)
            for work, cosine in nearest
            if work not in changed
        )


def graded_works(model: ScoreModel, cache_dir: Path) -> GradedWorks | None:
    """The graded works of a model; None, with a remark that says why, where they are not at hand."""
    try:
        return GradedWorks(model, cache_dir)
    except MiripError as error:
        log.warning("The graded works that a picture looks like can not be shown: %s", error)
        return None


def _graded_images(model: ScoreModel) -> GradedImages:
    folder = model.checkpoint.parent
    data = config_from_dict({"data": Run(folder).info.get("data", {})}).data
    return load_split(folder / SPLIT_FILE, model.info.tiers, data)


def _places(
    model: ScoreModel, images: GradedImages, store: FeatureStore
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Held-out scores [n] and the number of works of each tier [K] among them."""
    held_out = load_held_out(model.checkpoint.parent, model.info.tiers)
    if held_out is not None and len(held_out):
        scores, tiers = held_out.scores, held_out.tiers
    else:  # a run of an earlier version
        kept = [i for i, split in enumerate(images.splits) if split != "train"]
        if not kept:
            raise DataError(
                f"{model.checkpoint.parent} has no scores of works it had not trained on"
            )
        scores = model.score(store, [images.hashes[i] for i in kept]).astype(np.float64)
        tiers = images.tiers[kept]
    return scores, np.bincount(tiers, minlength=len(model.info.tiers))
