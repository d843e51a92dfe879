"""Dividing train and val into folds, each of which is left out once.

Folds are stratified by tier; groups and copies of one picture stay together; the test split is in none.
While a fold is left out, the others are divided once more, so that early stopping looks at a small inner
validation split and never at the fold itself.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mirip_fast.config import SplitConfig
from mirip_fast.data.csv_reader import counted
from mirip_fast.data.stratify import join_units, stratify
from mirip_fast.errors import ConfigError, DataError
from mirip_fast.ranking.graded import GradedImages

log = logging.getLogger(__name__)

#: Name of the left-out fold in the split of a fold's own run.
LEFT_OUT = "held-out"

#: Share of the inner validation split where the data set's own split has none to go by.
_INNER_SHARE = 0.1


def assign_folds(images: GradedImages, folds: int, seed: int) -> NDArray[np.int64]:
    """[n] number of each image's fold, 0 … folds − 1, or −1 for images of the test split.

    Args:
        images: the graded images with their split.
        folds: K, 2 or more.
        seed: another seed gives other folds.

    Raises:
        ConfigError: ``folds`` is below 2.
        DataError: a fold would have fewer than two tiers.
    """
    if folds < 2:
        raise ConfigError(f"--folds {folds}: 2 or more are needed; 5 is usual")
    inside = np.flatnonzero([split != "test" for split in images.splits])
    fold_of = np.full(len(images), -1, dtype=np.int64)
    fold_of[inside] = _divide(images, inside, [1 / folds] * folds, seed)
    for fold in range(folds):
        left_out = images.tiers[fold_of == fold]
        if len(set(left_out.tolist())) < 2:
            raise DataError(
                f"--folds {folds}: fold {fold} would have {counted(len(left_out), 'image')} of fewer than "
                f"two tiers ({len(inside)} images of train and val are divided, groups and copies kept "
                "together). Ask for fewer folds."
            )
    sizes = np.bincount(fold_of[inside], minlength=folds)
    if sizes.max() > 2 * len(inside) / folds:
        log.warning(
            "The folds are very unequal (%s images): one group holds a large part of the data. What is "
            "measured on a fold of few images says little. If these images need not stay together, `embed` "
            "again with --group-column image_id.",
            ", ".join(map(str, sizes.tolist())),
        )
    return fold_of


def leave_out(
    images: GradedImages, fold_of: NDArray[np.int64], fold: int, *, val_share: float, seed: int
) -> GradedImages:
    """The images as one fold's run sees them: train, val (inner), the fold itself, and test.

    Args:
        images: the graded images.
        fold_of: of :func:`assign_folds`.
        fold: the one to leave out; its images get the split :data:`LEFT_OUT`.
        val_share: share of the remaining images for the inner validation split; 0 takes a tenth.
        seed: of the division.

    Raises:
        DataError: train or val would have fewer than two tiers.
    """
    rest = np.flatnonzero((fold_of >= 0) & (fold_of != fold))
    share = val_share or _INNER_SHARE
    splits = np.where(fold_of == fold, LEFT_OUT, "test").astype(object)
    # Another seed per fold: the same seed would order the same images alike in every fold.
    inner = _divide(images, rest, [1 - share, share], seed + 1 + fold)
    splits[rest] = np.where(inner == 0, "train", "val")
    for name in ("train", "val"):
        tiers = images.tiers[splits == name]
        if len(set(tiers.tolist())) < 2:
            raise DataError(
                f"Without fold {fold}, the inner {name} split has {counted(len(tiers), 'image')} of fewer "
                "than two tiers: there is no pair to compare. Ask for fewer --folds or another --val-ratio."
            )
    return dataclasses.replace(images, splits=tuple(splits.tolist()))


@dataclass(frozen=True)
class Fold:
    """Indices of the images of one fold's training, inner validation and left-out part."""

    train: NDArray[np.int64]
    val: NDArray[np.int64]
    left_out: NDArray[np.int64]


def folds_of(images: GradedImages, fold_of: NDArray[np.int64], split: SplitConfig) -> list[Fold]:
    """Every fold of :func:`assign_folds`, its rest divided as :func:`leave_out` does."""
    share = split.val_ratio / (split.train_ratio + split.val_ratio)
    folds = []
    for number in range(int(fold_of.max()) + 1):
        seen = leave_out(images, fold_of, number, val_share=share, seed=split.split_seed).splits
        train, val = (np.flatnonzero([name == part for name in seen]) for part in ("train", "val"))
        folds.append(Fold(train, val, np.flatnonzero(fold_of == number)))
    return folds


def units_of(images: GradedImages) -> NDArray[np.int64]:
    """[n] number of each image's unit: its group, joined with copies and near duplicates of its pictures."""
    records = images.manifest.records
    groups = [record.group for record in records]
    names = [record.image_id for record in records]
    labelings: list[Sequence[Hashable | None]] = [groups, images.hashes, names]
    if images.near is not None:
        labelings.append(images.near)
    return join_units(len(images), labelings)


def _divide(
    images: GradedImages, index: NDArray[np.int64], ratios: Sequence[float], seed: int
) -> NDArray[np.int64]:
    """The part of each image of ``index``."""
    part = images.manifest.subset(index)
    tiers = [part.tiers[record.tier or 0] for record in part.records]
    names = [record.image_id for record in part.records]
    units = np.unique(units_of(images)[index], return_inverse=True)[1]
    return stratify(tiers, units.astype(np.int64), names, ratios, seed)
