"""Train, val and test: stratified by tier, with groups and copies of a file kept together."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mirip_fast.config import SplitConfig
from mirip_fast.data.spreadsheets import (
    alike_columns,
    misspelled,
    read_table,
    spelled,
    with_known_names,
)
from mirip_fast.data.stratify import TOLERANCE, join_units, stratify
from mirip_fast.data.table import Manifest, or_none
from mirip_fast.errors import ConfigError, DataError
from mirip_fast.files import open_file, write_csv
from mirip_fast.text import closest, counted, nfc, shown

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
#: A list of near duplicates that stay in one split, made by `audit` or by hand, and its columns.
NEAR_GROUPS_FILE = "near_groups.csv"
GROUP, ID = "near_group", "image_id"
_UNGRADED = ""


@dataclass(frozen=True)
class Split:
    """Which image is used for what.

    Attributes:
        manifest: the images.
        assignment: ``train``, ``val`` or ``test`` for each image of the manifest.
        near: [n] its group of near duplicates, where a list was given.
    """

    manifest: Manifest
    assignment: tuple[str, ...]
    near: list[str | None] | None = None

    def __getitem__(self, index: int) -> str:
        return self.assignment[index]

    def indexes(self, name: str) -> NDArray[np.int64]:
        """Indexes of the images of one split, ascending: int64 ``[n]``."""
        return np.flatnonzero(np.array(self.assignment) == name).astype(np.int64)

    def part(self, name: str) -> Manifest:
        """The images of one split as a manifest of their own."""
        return self.manifest.subset(self.indexes(name))

    def shares(self) -> dict[str, dict[str, float]]:
        """Per split that has images: each occurring tier's share of them, 0 to 1."""
        tiers = [name for name, count in self.manifest.tier_counts().items() if count]
        parts = {name: self.part(name) for name in SPLITS}
        counts = {name: part.tier_counts() for name, part in parts.items() if len(part)}
        return {name: {t: n[t] / len(parts[name]) for t in tiers} for name, n in counts.items()}

    def deviation(self) -> float:
        """How far a tier's share in a split is from that in the whole at most, in percentage points."""
        whole, n = self.manifest.tier_counts(), len(self.manifest)
        off = (
            abs(100 * (share - whole[tier] / n))
            for shares in self.shares().values()
            for tier, share in shares.items()
        )
        return max(off, default=0.0)


def split_manifest(
    manifest: Manifest, how: SplitConfig, duplicates: Sequence[Hashable] | None = None
) -> Split:
    """Divide a data set into train, val and test.

    Every split gets the tiers in about their shares in the whole. Without groups and copies the number of
    images is exact (largest remainders per tier); with them it is as near as they allow. A tier with
    as many groups as there are splits reaches every split. The order of the records does not matter.

    Args:
        manifest: the images; their groups are respected.
        how: shares of the splits, seed, and a list of near duplicates, which stay together.
        duplicates: per record a hash of the file's content; equal ones stay together. ``None`` entries
            stand alone.

    Raises:
        ConfigError: the ratios are no shares that sum to 1.
        DataError: there are too few images or groups for a split that can be used, or the list is faulty.
    """
    ratios = (how.train_ratio, how.val_ratio, how.test_ratio)
    check_ratios(ratios)
    near = None if how.near_groups is None else read_near_groups(Path(how.near_groups), manifest)
    tiers = manifest.table["tier"].astype(object).fillna(_UNGRADED).tolist()
    _tell_two_grades(manifest.ids, tiers, duplicates or ())
    labels: tuple[Sequence[Hashable | None] | None, ...] = (manifest.groups, duplicates, near)
    parts = _divide(tiers, manifest.ids, list(filter(None, labels)), ratios, how.split_seed)
    return Split(manifest, tuple(parts), near)


def write_near_groups(path: Path, rows: Iterable[tuple[str, str, Path]]) -> None:
    """Write the list.

    Args:
        path: the file.
        rows: (group, image_id, image file) of every image that has near duplicates.
    """
    cells = [{GROUP: group, ID: image_id, "path": file} for group, image_id, file in rows]
    write_csv(path, (GROUP, ID, "path"), cells)


def read_near_groups(path: Path, manifest: Manifest) -> list[str | None]:
    """The group of each record of ``manifest``, None for an image that is not in the list.

    Args:
        path: CSV file with the columns near_group and image_id; others are not looked at.
        manifest: the images. Those listed and not in it are told and do nothing.

    Raises:
        DataError: the file is unreadable, lacks a column, puts an image in two groups, or has none of
            the manifest's images.
    """
    if path.is_file():
        with open_file(path) as stream:
            if sum(1 for line in stream if line.strip()) < 2:
                return [None] * len(manifest)  # a header alone: audit found none
    table = read_table(path, expected=(GROUP, ID), encoding_errors="surrogateescape")
    table = with_known_names(table, (GROUP, ID), required=(GROUP, ID))
    problems, group_of = table.problems(), dict[str, str]()
    for row, *cells in table.cells[[GROUP, ID]].itertuples():
        group, image_id = (nfc(cell.strip()) for cell in cells)
        if not group or not image_id:
            problems.add("a group and an image_id are expected", row=row)
        elif group_of.setdefault(image_id, group) != group:
            problems.add(
                f"{image_id!r} is in group {group!r} here and in {group_of[image_id]!r} above; "
                "give both groups one name",
                row=row,
                column=GROUP,
            )
    problems.raise_if_any()
    ids = [nfc(image_id.strip()) for image_id in manifest.ids]
    labels = [group_of.get(image_id) for image_id in ids]
    unknown = len(group_of) - len(set(ids) & set(group_of))
    if unknown == len(group_of):
        raise DataError(
            f"{shown(path)}: none of its {counted(unknown, 'image')} is in {shown(manifest.source)} "
            f"(first: {next(iter(group_of))!r}). Is it the list of another data set? "
            "`mirip-fast audit` makes one."
        )
    if unknown:
        log.warning(
            "%s: %s not in %s", shown(path), counted(unknown, "image"), shown(manifest.source)
        )
    return labels


def _tell_two_grades(
    names: Sequence[str], tiers: Sequence[str], duplicates: Sequence[Hashable]
) -> None:
    """Warn of pictures that are there several times, in different tiers."""
    first: dict[Hashable, int] = {}
    found: dict[Hashable, tuple[int, int]] = {}
    for i, content in enumerate(duplicates):
        if content is not None and tiers[i] != _UNGRADED:
            other = first.setdefault(content, i)
            if tiers[other] != tiers[i]:
                found.setdefault(content, (other, i))
    if found:
        one, two = next(iter(found.values()))
        log.warning(
            "%s in more than one tier (first: %r in %s, %r in %s); `mirip-fast audit` lists them",
            "1 picture is" if len(found) == 1 else f"{len(found):,} pictures are",
            *(names[one], tiers[one], names[two], tiers[two]),
        )


def check_ratios(ratios: Sequence[float]) -> None:
    """Refuse shares that cannot be used.

    Raises:
        ConfigError: one is not within 0 and 1, train has none, or they do not sum to 1.
    """
    listed = ", ".join(f"{name} {ratio:g}" for name, ratio in zip(SPLITS, ratios, strict=True))
    if not all(math.isfinite(ratio) and 0 <= ratio <= 1 for ratio in ratios) or ratios[0] == 0:
        raise ConfigError(f"Split ratios ({listed}): each lies within 0 and 1, and train is not 0")
    if abs(sum(ratios) - 1) > 1e-6:
        raise ConfigError(
            f"Split ratios ({listed}) sum to {sum(ratios):g}, not to 1; correct --train-ratio, "
            "--val-ratio or --test-ratio"
        )


def _divide(
    tiers: list[str],
    names: list[str],
    labelings: list[Sequence[Hashable | None]],
    ratios: Sequence[float],
    seed: int,
) -> list[str]:
    """The split of each image, checked for use."""
    if not tiers:
        raise DataError("There are no images to split")
    units = join_units(len(tiers), [*labelings, names])
    parts = [SPLITS[part] for part in stratify(tiers, units, names, ratios, seed).tolist()]
    counts = Counter(zip(parts, tiers, strict=True))
    occurring = sorted(set(tiers))
    wanted = min(2, len(occurring))
    asked = [split for split, ratio in zip(SPLITS, ratios, strict=True) if ratio > 0]
    tiers_in = {split: [t for t in occurring if counts[split, t]] for split in asked}
    if any(len(found) < wanted for found in tiers_in.values()):
        raise DataError(_too_few(tiers, int(units.max()) + 1, tiers_in, counts, wanted))
    n_units, sizes = int(units.max()) + 1, [parts.count(split) for split in SPLITS]
    shares = [size / len(parts) for size in sizes]
    if max(abs(s - r) for s, r in zip(shares, ratios, strict=True)) > TOLERANCE:
        log.warning(
            "Split (%s): asked %s, came %s (%s images): %s cannot be divided nearer to it with the tiers in "
            "every split. More groups help, or --val-ratio 0 or --test-ratio 0.",
            "/".join(SPLITS), _percents(ratios), _percents(shares), "/".join(map(str, sizes)),
            counted(n_units, "image" if n_units == len(parts) else "separate group"),
        )  # fmt: skip
    return parts


def _percents(shares: Sequence[float]) -> str:
    return "/".join(f"{100 * share:.0f}" for share in shares) + " %"


def _too_few(
    tiers: list[str],
    units: int,
    tiers_in: dict[str, list[str]],
    counts: Counter[tuple[str, str]],
    wanted: int,
) -> str:
    """The message for data that no usable split exists for."""
    groups = "" if units == len(tiers) else f" in {counted(units, 'separate group')}"
    parts = "; ".join(
        f"{split} "
        + (", ".join(f"{tier} {counts[split, tier]}".strip() for tier in found) or "none")
        for split, found in tiers_in.items()
    )
    need = "images of two tiers, or it has no pair to compare" if wanted == 2 else "an image"
    return (
        f"{counted(len(tiers), 'image')}{groups} cannot be divided into {', '.join(tiers_in)}: each "
        f"needs {need}. The nearest is: {parts}. Add images (three groups of each tier are enough), set "
        "--val-ratio or --test-ratio to 0, or give your own split with --metadata, --val-metadata and "
        "--test-metadata."
    )


class DataSplitter:
    """Splits a table of images as :func:`split_manifest` does.

    Args:
        train_ratio: share of the rows to train on.
        val_ratio: share of the rows to validate on.
        test_ratio: share of the rows to test on; the three sum to 1.
        seed: another seed gives another split.
        stratify_column: column whose values keep their shares; ``None`` for none.
        group_column: column naming rows that stay together. The default is used where the table
            has it; another name must be there; ``None`` ignores groups.

    Raises:
        ConfigError: the ratios are no shares that sum to 1.
    """

    def __init__(
        self,
        train_ratio: float = 0.8,
        val_ratio: float = 0.1,
        test_ratio: float = 0.1,
        seed: int = 42,
        stratify_column: str | None = "tier",
        group_column: str | None = "group",
    ) -> None:
        self.ratios = (train_ratio, val_ratio, test_ratio)
        check_ratios(self.ratios)
        self.seed = seed
        self.stratify_column = stratify_column
        self.group_column = group_column

    def split(self, df: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
        """Divide the rows of ``df``.

        Rows with the same ``image_id`` (without that column: the same file name) stay together.

        Returns:
            The train, val and test rows, in the order of ``df``, each with a fresh index from 0.

        Raises:
            DataError: a column is missing, rows have no tier, or there are too few rows.
        """
        tiers = [""] * len(df)
        if self.stratify_column is not None:
            values = self._column(df, self.stratify_column)
            empty = [position for position, value in enumerate(values) if value is None]
            if empty:
                listed = ", ".join(map(str, empty[:10])) + (", …" if len(empty) > 10 else "")
                raise DataError(
                    f"{counted(len(empty), 'row')} without a value in {self.stratify_column!r} "
                    f"(counted from 0: {listed})"
                )
            tiers = [str(value) for value in values]
        group = self.group_column
        labelings: list[Sequence[Hashable | None]] = []
        if group == "group" and group not in df.columns:
            group = self._group_like(list(map(str, df.columns)))
        if group is not None:
            labelings.append(self._column(df, group))
        named = next((c for c in ("image_id", "filename", "image_path") if c in df.columns), None)
        names = [str(name) for name in (range(len(df)) if named is None else df[named].tolist())]
        parts = np.array(_divide(tiers, names, labelings, self.ratios, self.seed))
        train, val, test = (df[parts == split].reset_index(drop=True) for split in SPLITS)
        return train, val, test

    @staticmethod
    def _group_like(columns: list[str]) -> str | None:
        """The column that is read as group, such as Group; what else comes near is told."""
        alike = alike_columns("group", columns)
        near = misspelled("group", columns)
        if len(alike) == 1:
            log.warning("Column '%s' is read as group", spelled(alike[0]))
            return alike[0]
        if alike or near is not None:
            log.warning(
                "Column '%s' is not read as group; say so with group_column=%r",
                *(spelled(alike[0] if alike else near or ""), alike[0] if alike else near),
            )
        return None

    def _column(self, df: pd.DataFrame, name: str) -> list[Hashable | None]:
        """The values of a column; missing ones (NaN, None) as ``None``."""
        if name not in df.columns:
            close = closest(name, map(str, df.columns))
            raise DataError(
                f"No column {name!r}. There are: {', '.join(map(str, df.columns))}."
                + (f" Did you mean {close!r}?" if close else "")
            )
        return or_none(df[name])
