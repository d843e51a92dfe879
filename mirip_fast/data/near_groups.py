"""A list of near duplicates that stay in one split: ``near_groups.csv``, made by ``audit`` or by hand."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from mirip_fast.data.csv_reader import counted, read_table, shown, with_known_names
from mirip_fast.data.table import Manifest
from mirip_fast.errors import DataError
from mirip_fast.files import open_file, write_csv
from mirip_fast.text import nfc

log = logging.getLogger(__name__)

NEAR_GROUPS_FILE = "near_groups.csv"
GROUP, ID = "near_group", "image_id"


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
    if path.is_file() and not _has_rows(path):
        return [None] * len(manifest)  # audit found none
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


def near_labels(near_groups: str | None, manifest: Manifest) -> list[str | None] | None:
    """The group of each record by the list that the setting ``near_groups`` names; None without one.

    Raises:
        DataError: see :func:`read_near_groups`.
    """
    return None if near_groups is None else read_near_groups(Path(near_groups), manifest)


def _has_rows(path: Path) -> bool:
    """Whether there is more than a header."""
    with open_file(path) as stream:
        return sum(1 for line in stream if line.strip()) > 1
