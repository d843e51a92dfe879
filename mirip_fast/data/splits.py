"""Train, val and test: stratified by tier, with groups and copies of a file kept together.

Words used here: a *unit* is a set of images that must stay in one part (one group, copies of one file, or
a single image); a *part* is train, val or test; its *quota* is the number of images of a tier that it
would get if images could be cut. Nothing here depends on the order of the images: units are ordered by
a hash of their names and the seed, so that images added later move few of the others.

scikit-learn's StratifiedGroupKFold, its folds dealt to 80/10/10, is further off: over five seeds the largest
difference of a tier's share was 11 points of silhouettes by group (here 5), 9 of 267 paintings in groups of
seven (1.5), 11 of 20 groups of 20 (4); and a part's size by 18 points (1.7).
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from mirip_fast.data.table import Manifest, or_none
from mirip_fast.errors import ConfigError, DataError
from mirip_fast.files import open_file
from mirip_fast.text import closest, counted, nfc, shown

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

Counts = NDArray[np.int64]

SPLITS = ("train", "val", "test")
#: A list of near duplicates that stay in one split, made by `audit` or by hand, and its columns.
NEAR_GROUPS_FILE = "near_groups.csv"
GROUP, ID = "near_group", "image_id"
_UNGRADED = ""

#: A tier's share in a part may differ by this much from its share in the whole before it weighs heavily.
_TOLERANCE = 0.05
_STEPS = 1000
_MOST_SWAPS = 320_000  # times tiers: more pairs of units of two parts are not compared, only moves


def tier_shares(manifest: Manifest) -> pd.DataFrame:
    """Per split that has images (rows, in their order) each tier's share of them (columns), 0 to 1."""
    import pandas as pd

    of_split = pd.get_dummies(manifest.table["tier"]).groupby(manifest.table["split"]).mean()
    return of_split.loc[[name for name in SPLITS if name in of_split.index]]


def deviation(manifest: Manifest) -> float:
    """How far a tier's share in a split is from that in the whole at most, in percentage points."""
    import pandas as pd

    whole = pd.get_dummies(manifest.table["tier"]).mean()
    return 100 * float((tier_shares(manifest) - whole).abs().to_numpy().max())


def split_manifest(
    manifest: Manifest, how: SplitConfig, duplicates: Sequence[Hashable] | None = None
) -> Manifest:
    """Divide a data set into train, val and test.

    Every split gets the tiers in about their shares in the whole. Without groups and copies the number of
    images is exact (largest remainders per tier); with them it is as near as they allow. A tier with
    as many groups as there are splits reaches every split. The order of the records does not matter.

    Args:
        manifest: the images; their groups are respected.
        how: shares of the splits, seed, and a list of near duplicates, which stay together.
        duplicates: per record a hash of the file's content; equal ones stay together. ``None`` entries
            stand alone.

    Returns:
        The images with the columns ``split`` and ``near_group`` (None where no list was given).

    Raises:
        ConfigError: the ratios are no shares that sum to 1.
        DataError: there are too few images or groups for a split that can be used, or the list is faulty.
    """
    import pandas as pd

    ratios = (how.train_ratio, how.val_ratio, how.test_ratio)
    check_ratios(ratios)
    near = None if how.near_groups is None else read_near_groups(Path(how.near_groups), manifest)
    tiers = manifest.table["tier"].astype(object).fillna(_UNGRADED).tolist()
    _tell_two_grades(manifest.ids, tiers, duplicates or ())
    labels: tuple[Sequence[Hashable | None] | None, ...] = (manifest.groups, duplicates, near)
    parts = _divide(tiers, manifest.ids, list(filter(None, labels)), ratios, how.split_seed)
    columns = {"split": parts, GROUP: near or [None] * len(manifest)}
    more = {name: pd.Series(values, dtype=object) for name, values in columns.items()}
    return replace(manifest, table=manifest.table.assign(**more))


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
    if max(abs(s - r) for s, r in zip(shares, ratios, strict=True)) > _TOLERANCE:
        log.warning(
            "Split (%s): asked %s, came %s (%s images): %s cannot be divided nearer to it with the tiers in "
            "every split. More groups help, or --val-ratio 0 or --test-ratio 0.",
            "/".join(SPLITS), _percents(ratios), _percents(shares), "/".join(map(str, sizes)),
            counted(n_units, "image" if n_units == len(parts) else "separate group"),
        )  # fmt: skip
    return parts


def members_of(labels: Iterable[Any]) -> tuple[list[Any], list[Counts]]:
    """The different labels, None left aside, in order of first appearance, and the places of each."""
    places: dict[Any, list[int]] = {}
    for place, label in enumerate(labels):
        if label is not None:
            places.setdefault(label, []).append(place)
    return list(places), [np.array(found, dtype=np.int64) for found in places.values()]


def join_units(count: int, labelings: Iterable[Sequence[Hashable | None]]) -> Counts:
    """Put images that share any label into one unit, directly or through others.

    Args:
        count: number of images n.
        labelings: sequences of n labels each, e.g. groups and content hashes; ``None`` joins nothing.

    Returns:
        int64 ``[n]``: the unit of each image, numbered from 0.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    images, labels, total = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], count
    for labeling in labelings:  # a label is one more node of the graph, which its images lead to
        known, places = members_of(labeling)
        images += places
        labels += [np.full(len(place), total + i) for i, place in enumerate(places)]
        total += len(known)
    edges = np.concatenate(images), np.concatenate(labels)
    graph = coo_matrix((np.ones(len(edges[0]), np.int8), edges), shape=(total, total))
    units = connected_components(graph, directed=False)[1]
    return np.array(units[:count], dtype=np.int64)


def stratify(
    tiers: Sequence[str],
    units: Counts,
    names: Sequence[str],
    ratios: Sequence[float],
    seed: int,
) -> Counts:
    """Choose a part for every image.

    Units are placed by kind (so many images of each tier), the largest first, where they are lacking most;
    then they are moved and swapped while that brings the parts nearer to their quotas. A tier with as many
    units as there are parts reaches every part if that is possible at all.

    Args:
        tiers: the tier of each image, n strings.
        units: int ``[n]``, the unit of each image.
        names: the name of each image, n strings; images of different units have different names.
        ratios: share of the images for each part, summing to 1; a part with 0 stays empty.
        seed: draws which units go where.

    Returns:
        int64 ``[n]``: index into ``ratios`` for each image.
    """
    tier_of, unit_of = (np.unique(x, return_inverse=True)[1] for x in (np.array(tiers), units))
    counts = np.zeros((int(unit_of.max()) + 1, int(tier_of.max()) + 1), dtype=np.int64)
    np.add.at(counts, (unit_of, tier_of), 1)
    kinds, kind_of = np.unique(counts, axis=0, return_inverse=True)
    kind_of = kind_of.reshape(-1)
    keys: dict[int, bytes] = {}
    for unit, name in zip(unit_of.tolist(), names, strict=True):
        text = f"{seed}\n{name}".encode("utf-8", "surrogateescape")
        key = hashlib.blake2b(text, digest_size=16).digest()
        keys[unit] = min(key, keys.get(unit, key))
    drawn = np.array(sorted(keys, key=lambda unit: keys[unit]), dtype=np.int64)
    active = np.flatnonzero(ratios)
    # The largest first, but not strictly: the seed changes who is ahead of whom.
    first = drawn[np.unique(kind_of[drawn], return_index=True)[1]]
    chance = np.array([int.from_bytes(keys[unit][-4:], "big") for unit in first.tolist()]) / 2**32
    order = np.argsort(-kinds.sum(axis=1) * (0.6 + 0.4 * chance), kind="stable")
    shares = np.array(ratios, dtype=np.float64)[active]
    amounts = _amounts(kinds[order], np.bincount(kind_of)[order], shares)
    part_of_unit = np.empty(len(counts), dtype=np.int64)
    for kind, amount in zip(order, amounts, strict=True):
        part_of_unit[drawn[kind_of[drawn] == kind]] = np.repeat(active, amount)
    return part_of_unit[unit_of]


def _amounts(kinds: Counts, number: Counts, ratios: NDArray[np.float64]) -> Counts:
    """How many units of each kind go to each part: int64 ``[K, P]``.

    Args:
        kinds: ``[K, T]``, the different counts of images per tier that units have, in the order of placing.
        number: ``[K]`` units of each kind.
        ratios: ``[P]``, above 0.
    """
    totals = number @ kinds
    wanted = ratios * totals.sum()
    needed = np.tile(number @ (kinds > 0) >= len(ratios), (len(ratios), 1))
    needed[0] = True  # what is not in train cannot be learned

    def cost(placed: Counts, tolerance: NDArray[np.float64]) -> NDArray[np.float64]:
        """[…] of divisions ``[…, P, T]`` into images per part and tier, 0 or more.

        In order of weight: parts with fewer than two tiers (they hold no pair), needed tiers that are absent,
        tier shares off by more than the tolerance, sizes and shares.
        """
        sizes = placed.sum(axis=-1)
        off = placed / np.maximum(sizes, 1)[..., None] - totals / totals.sum()
        excess = np.maximum(np.abs(off) - tolerance[:, None], 0)
        pairless = np.maximum(min(2, len(totals)) - (placed > 0).sum(axis=-1), 0)
        total: NDArray[np.float64] = (
            1e6 * pairless.sum(axis=-1)
            + 1e4 * (needed & (placed == 0)).sum(axis=(-1, -2))
            + 1e3 * (excess**2).sum(axis=(-1, -2))
            + ((sizes / wanted - 1) ** 2).sum(axis=-1)
            + (off**2).sum(axis=(-1, -2))
        )
        return total

    def improved(tolerance: NDArray[np.float64]) -> Counts:
        # Single images are right by construction, unless a needed tier is absent.
        if kinds.sum(axis=1).max() == 1 and cost(first.T @ kinds, tolerance) < 1e4:
            return first
        return _improve(kinds, first, lambda placed: cost(placed, tolerance))

    first = _place(kinds, number, ratios)
    found = improved(np.full(len(ratios), _TOLERANCE))
    if np.abs((found.T @ kinds).sum(axis=1) / totals.sum() - ratios).max() > _TOLERANCE:
        # Tier shares cost the sizes too much: in a part of few units they may be off by a unit of mean size.
        rough = np.maximum(_TOLERANCE, totals.sum() / number.sum() / wanted)
        both = found, improved(rough)
        found = min(both, key=lambda amounts: float(cost(amounts.T @ kinds, rough)))
    return found


def _place(kinds: Counts, number: Counts, ratios: NDArray[np.float64]) -> Counts:
    """A first division: the units of a kind in the shares that are lacking, what is left over one by one."""
    amounts = np.zeros((len(kinds), len(ratios)), dtype=np.int64)
    quotas = np.outer(ratios, number @ kinds)
    placed = np.zeros(quotas.shape, dtype=np.int64)
    for kind, images in enumerate(kinds):
        lacking = np.maximum(quotas - placed, 0) @ images
        shares = lacking / lacking.sum() if lacking.any() else ratios
        amounts[kind] = np.floor(shares * number[kind] + 1e-9)
        placed += np.outer(amounts[kind], images)
        for _ in range(number[kind] - amounts[kind].sum()):
            # Chi-square: what a unit adds is weighed by the quota, so that parts fill up at the same pace.
            added = ((2 * (placed - quotas) * images + images**2) / quotas).sum(axis=1)
            behind = 1 - placed.sum(axis=1) / quotas.sum(axis=1)
            part = np.lexsort((-behind.round(9), added.round(9)))[0]
            amounts[kind, part] += 1
            placed[part] += images
    return amounts


def _improve(
    kinds: Counts, amounts: Counts, cost: Callable[[Counts], NDArray[np.float64]]
) -> Counts:
    """Move one unit, or swap two, as long as that lowers the cost; the best such step each time."""
    amounts, parts = amounts.copy(), range(amounts.shape[1])
    units = np.vstack(
        [kinds, np.zeros_like(kinds[:1])]
    )  # the last one is nothing given back: a move
    for _ in range(_STEPS):
        placed = amounts.T @ kinds
        best = (float(cost(placed)) - 1e-12, -1, -1, -1, -1)
        for source, target in ((a, b) for a in parts for b in parts if a != b):
            out = np.flatnonzero(amounts[:, source])
            back = np.append(np.flatnonzero(amounts[:, target]), len(kinds))
            if len(out) * len(back) * kinds.shape[1] > _MOST_SWAPS:
                back = back[-1:]
            change = units[out][:, None] - units[back]
            tried = np.tile(placed, (*change.shape[:2], 1, 1))
            tried[:, :, source] -= change
            tried[:, :, target] += change
            costs = cost(tried).reshape(-1)
            if len(costs) and costs.min() < best[0]:
                i, j = divmod(int(costs.argmin()), len(back))
                best = (float(costs.min()), source, target, int(out[i]), int(back[j]))
        _, giver, taker, given, returned = best
        if given < 0:
            break
        amounts[given, [giver, taker]] += (-1, 1)
        if returned < len(kinds):
            amounts[returned, [giver, taker]] += (1, -1)
    return amounts


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
