"""Reading and writing the list of images and grades: a CSV file, a folder, a folder per tier."""

from __future__ import annotations

import itertools
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from mirip_fast.data.applicants import with_applicants
from mirip_fast.data.csv_reader import Problems, absolute, closest, counted, shown
from mirip_fast.data.decode_pool import DecodeJob, DecodePool
from mirip_fast.data.formats import can_read, package_for
from mirip_fast.data.graders import PREFIX, grader_names
from mirip_fast.data.image_files import (
    IMAGE_EXTENSIONS,
    ending_of,
    passed_over,
    scan_folder,
    tell_passed_over,
)
from mirip_fast.data.images import FIT
from mirip_fast.data.manifest_rows import IMAGE_FOLDER, records_from_csv
from mirip_fast.data.remote import is_remote, located
from mirip_fast.data.source_lists import (
    expand,
    is_pattern,
    pick_table,
    read_remote,
    read_tars,
    remark_on_tars,
    tiers_by_folder,
)
from mirip_fast.data.sources import METADATA_NAME, METADATA_NAMES, is_tar
from mirip_fast.data.table import (
    DataOptions,
    Manifest,
    given_name,
    image_table,
    or_none,
    own_columns,
)
from mirip_fast.errors import DataError
from mirip_fast.files import write_csv
from mirip_fast.runtime import usable_cores
from mirip_fast.text import folded

__all__ = [
    "DataOptions",
    "Manifest",
    "check_trainable",
    "grade_remarks",
    "only_graded",
    "read_manifest",
    "write_manifest_csv",
]

logger = logging.getLogger(__name__)

_COUNT_PAGES = "mirip_fast.data.decode_worker:count_pages"

#: Endings of tables, and how the names of those begin that hold grades.
_TABLES = (".csv", ".tsv", ".xlsx", ".xlsm", ".xls", ".ods", ".parquet", ".jsonl")
_TEXTS = (".txt", ".json")  # tables only by their names
_GRADES = ("metadata", "meta", "grade", "label", "tier", "score", "등급", "성적", "평가")
#: Tables that mirip-fast itself writes and nobody means.
_OURS = {
    "ranking", "applicants", "failures", "audit", "near_groups", "duplicates", "similar", "sweep", "pairs",
}  # fmt: skip
_TABLES_SHOWN = 5

_COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def read_manifest(source: Path | str, options: DataOptions | None = None) -> Manifest:
    """Read what is known about the images of a data set.

    Args:
        source: a CSV file or Excel workbook; a folder with a ``metadata.csv`` or ``.xlsx`` (file names are
            relative to it, its ``images/`` or ``options.image_root``); a folder with one folder per tier;
            any folder of images, searched recursively; a tar, several as ``data/*.tar`` or
            ``data/0.tar,1.tar``, or a folder of tars; or an address of one of these, such as ``s3://bucket/folder``.
        options: column names, tiers, encoding; ``None`` takes the defaults.

    Returns:
        The manifest. Rows whose image file is missing are in it: see :meth:`Manifest.missing`.

    Raises:
        DataError: the source does not exist, holds no images, or is faulty; all faults of a CSV file
            are told at once, each with its line and column.
    """
    return with_applicants(_by_page(_read(source, options or DataOptions())))


def _by_page(manifest: Manifest) -> Manifest:
    """The same with a row for each page of a PDF, which has all that the PDF's row had.

    A PDF that cannot be read keeps its row: decoding it tells why.

    Raises:
        DataError: a page is also in the table by itself.
    """
    table, where = manifest.table, shown(manifest.source)
    pdfs = [i for i, file in enumerate(table["file"]) if ending_of(file) == ".pdf"]
    if not pdfs or not can_read(".pdf", Counter()):
        return manifest
    counts = np.zeros(len(table), int)
    jobs = (DecodeJob(i, Path(table["file"].iloc[i]), (1,), FIT, True) for i in pdfs)
    with DecodePool(min(len(pdfs), usable_cores()), loader=_COUNT_PAGES) as pool:
        for done in pool.decode(jobs):
            counts[done.index] = done.height
    rows = np.repeat(np.arange(len(table)), np.maximum(counts, 1))
    number = np.arange(len(rows)) - np.searchsorted(rows, rows) + 1
    marks = [f"#page={n}" if counts[i] else "" for i, n in zip(rows, number, strict=True)]
    table = table.iloc[rows].reset_index(drop=True)
    for column in ("file", "named"):
        table[column] = [name + mark for name, mark in zip(table[column], marks, strict=True)]
    table["image_id"] = [
        name + (mark if counts[i] > 1 else "")
        for name, mark, i in zip(table["image_id"], marks, rows, strict=True)
    ]
    twice = table["image_id"][table["image_id"].duplicated()]
    if len(twice):
        raise DataError(
            f"{where}: {twice.iloc[0]!r} is there twice, by itself and as a page of its PDF; leave one"
        )
    there = counted(int(counts.sum()), "page"), counted(int((counts > 0).sum()), "PDF")
    if counts.any():
        logger.info("%s: %s in %s; each page is a work", where, *there)
    return replace(manifest, table=table)


def _read(source: Path | str, options: DataOptions) -> Manifest:
    source = located(source)
    if options.image_root is not None:
        image_root = absolute(options.image_root)
        if not image_root.is_dir():
            raise DataError(f"--image-root {options.image_root}: there is no such folder")
        options = replace(options, image_root=image_root)
    tars = expand(source) if is_pattern(source) else [source] if _may_be_tar(source) else []
    if tars:
        for other in (tar for tar in tars if not _may_be_tar(tar)):
            raise DataError(
                f"{shown(source)}: {shown(other)} is no .tar; only tars go by a pattern"
            )
        return read_tars(source, tars, options)
    if is_remote(source):
        found = read_remote(source, options)
        return found if isinstance(found, Manifest) else _from_names(*found, options)
    if source.is_dir():
        table = _metadata_in(source)
        if table is not None:
            return records_from_csv(table, options)
        if options.with_grades:
            _remark_on_tables(source)
        return _read_folder(source, options)
    if not source.exists():
        raise DataError(_not_found(source))
    if source.suffix.lower() == ".pdf":
        package_for("PDF")
        return replace(_from_names(source.parent, [source.name], options), source=source)
    if source.suffix.lower() in IMAGE_EXTENSIONS:
        raise DataError(f"{shown(source)}: one image; a folder of images or a CSV file is expected")
    return records_from_csv(source, options)


def write_manifest_csv(path: Path, manifest: Manifest) -> None:
    """Write a manifest so that :func:`read_manifest` with the same options gives it back.

    Column names, an explicit separator and the encoding are those of ``manifest.options``. File names
    stay as they were written where they can be found from the new file's folder; otherwise they
    become relative to that folder, or absolute when the image lies outside it.

    Raises:
        DataError: a value cannot be written in the manifest's encoding.
        DiskFullError: there is no room.
    """
    options, table = manifest.options, manifest.table
    folder = absolute(path).parent
    files = zip(table["named"], table["file"], strict=True)
    cells = {
        options.id_column: manifest.ids,
        manifest.image_column: [name_from(folder, named, Path(file)) for named, file in files],
    }
    for name, usual, column in (
        (options.tier_column, "tier", table["tier"]),
        (options.score_column, "tier_score", table["tier_score"]),
        (options.group_column, "group", table["group"]),
    ):
        if name != usual or column.notna().any():  # one asked for by name has to be there
            cells[name] = or_none(column)
    graders = {PREFIX + name: f"{options.tier_column}_{name}" for name in grader_names(table)}
    for own in own_columns(table):
        cells.setdefault(graders.get(own, given_name(own)), table[own].tolist())
    rows = (dict(zip(cells, row, strict=True)) for row in zip(*cells.values(), strict=True))
    try:
        write_csv(
            path,
            cells,
            rows,
            separator=options.separator or ",",
            encoding=options.encoding,
        )
    except UnicodeEncodeError as error:
        raise DataError(
            f"{shown(path)}: {error.object[error.start : error.end]!r} cannot be written as "
            f"{options.encoding}; use utf-8"
        ) from error


def only_graded(manifest: Manifest) -> Manifest:
    """The images that have a tier; where none has one, or all the same, those with a finer grade; else all.

    Reading the manifest told how many have no tier; how many have no finer grade is told here.
    """
    table, options = manifest.table, manifest.options
    graded, finer = table["tier"].notna(), table["tier_score"].notna()
    if table["tier"].nunique() > 1 or table["tier_score"].nunique() < 2:
        return manifest.subset(np.flatnonzero(graded)) if graded.any() else manifest
    if graded.any():
        logger.warning(
            "%s: all tiers are %r: they are left aside, and the column %r counts",
            *(shown(manifest.source), table["tier"][graded].iloc[0], options.score_column),
        )
    if not finer.all():
        logger.warning(
            "%s: %s of %s have a number in the column %r; the others (first: %r) are left out",
            *(shown(manifest.source), f"{finer.sum():,}", counted(len(table), "work")),
            *(options.score_column, table["image_id"][~finer].iloc[0]),
        )
    return manifest.subset(np.flatnonzero(finer)).without_tiers()


def check_trainable(manifest: Manifest) -> None:
    """Refuse a data set that no ranking can be learned from.

    Args:
        manifest: images that all have a tier, or none (:func:`only_graded`).

    Raises:
        DataError: no tiers and no finer grades, fewer than two, or a tier with a single image; names the
            file, the rows and the column.
    """
    if manifest.has_scores:
        return
    column = manifest.options.tier_column
    problems = Problems(manifest.source, sheet=manifest.options.sheet)
    if manifest.table["tier"].isna().all():
        problems.add(
            f"the images have no grades. A column {column!r} with {'/'.join(manifest.tiers)} is "
            "needed (another name: --tier-column), one of numbers "
            f"{manifest.options.score_column!r} (--score-column), or one folder per tier"
        )
        if manifest.table["tier_score"].notna().any():
            problems.hint(
                f"The column {manifest.options.score_column!r} has the same number everywhere."
            )
        problems.raise_if_any()
    counts = {name: count for name, count in manifest.tier_counts().items() if count}
    if len(counts) == 1:
        (only,) = counts
        problems.add(f"every image has tier {only!r}; at least two tiers are needed", column=column)
    for tier, image_id, row in manifest.table[["tier", "image_id", "row"]].itertuples(index=False):
        if counts.get(tier) == 1:
            problems.add(
                f"tier {tier!r} has one image, {image_id!r}; training "
                "and testing need two or more. Add images, or give it a neighbouring tier",
                row=row or None,
                column=column,
            )
    problems.raise_if_any()


def grade_remarks(manifest: Manifest) -> list[str]:
    """What has to be said of the grades before they are learned from, in sentences."""
    return [text for text in (_imbalance(manifest), _order(manifest)) if text is not None]


def _imbalance(manifest: Manifest) -> str | None:
    """What to say when the largest tier has ten times the images of the smallest, else ``None``."""
    counts = {name: count for name, count in manifest.tier_counts().items() if count}
    if len(counts) < 2 or max(counts.values()) < 10 * min(counts.values()):
        return None
    listed = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    rare = min(counts, key=lambda name: counts[name])
    return (
        f"The tiers are very unequal ({listed}): what is learned and measured about tier {rare!r} "
        f"rests on {counted(counts[rare], 'image')}."
    )


def _order(manifest: Manifest) -> str | None:
    """What to say when the finer grades contradict the order of the tiers, else ``None``.

    They do where, of two tiers with five such grades and more each, a work of the better tier has the lower
    grade in three of four pairs.
    """
    graded = manifest.table.dropna(subset=["tier", "tier_score"])
    of_tier = graded.groupby("tier", observed=True)["tier_score"]
    grades = {str(tier): np.sort(scores) for tier, scores in of_tier if len(scores) >= 5}
    for better, worse in itertools.combinations(grades, 2):
        places = (
            np.searchsorted(grades[worse], grades[better], side) for side in ("left", "right")
        )
        if sum(float(place.mean()) for place in places) / 2 < len(grades[worse]) / 4:
            by_grade = sorted(grades, key=lambda tier: -float(np.mean(grades[tier])))
            return (
                f"--tiers {','.join(manifest.tiers)} may be the wrong way round: by the column "
                f"{manifest.options.score_column!r} (higher is better) the order is "
                f"{', '.join(by_grade)}"
            )
    return None


def _read_folder(folder: Path, options: DataOptions) -> Manifest:
    """A folder without a CSV file: its images, else those of its tars."""
    found = scan_folder(folder)
    if not found.pictures and not found.tars:
        known = " ".join(sorted(IMAGE_EXTENSIONS))
        told = passed_over(found.passed)
        raise DataError(
            f"{shown(folder)}: no {METADATA_NAME}, and no images or tars in it or its folders ({known})"
            + (f". {told}" if told else "")
        )
    tell_passed_over(shown(folder), found.passed)
    if not found.pictures:
        return read_tars(folder, [folder / name for name in found.tars], options)
    remark_on_tars(folder, len(found.tars))
    return _from_names(folder, found.pictures, options)


def _may_be_tar(source: Path) -> bool:
    """Whether a path is named like a tar, also like one that will be refused for its compression."""
    named = is_tar(source) or source.name.lower().endswith(_COMPRESSED_TARS)
    return named and not source.is_dir() and (is_remote(source) or source.exists())


def _from_names(folder: Path, found: Sequence[str], options: DataOptions) -> Manifest:
    """The images of a folder, graded by its first-level folders where these are named for tiers.

    Args:
        folder: absolute.
        found: names below it.
        options: the names of the tiers.
    """
    names = found if os.sep == "/" else [name.replace(os.sep, "/") for name in found]
    tiers = tiers_by_folder(folder, names, options) if options.with_grades else {}
    start = os.path.join(folder, "")  # noqa: PTH118 (thousands of calls)
    tops = (name.partition("/")[0] if "/" in name else "" for name in names)
    columns = {
        "image_id": names,
        "file": [str(Path(start + name)) for name in names],
        "named": names,
        "tier": [tiers.get(top) for top in tops],
    }
    table = image_table(columns, options.tiers)
    options = replace(options, sheet=None)  # there is no workbook
    return Manifest(folder, folder, options.tiers, table, options, (folder,))


def _metadata_in(folder: Path) -> Path | None:
    """The folder's metadata.csv or metadata.xlsx, also with capital letters; None without one.

    Raises:
        DataError: several could be meant, or it is no file.
    """
    names = [entry.name for entry in _entries(folder) if folded(entry.name) in METADATA_NAMES]
    if (
        not names and not (folder / METADATA_NAME).is_file()
    ):  # also where the folder cannot be listed
        return None
    path = folder / pick_table(folder, names or [METADATA_NAME])
    if not path.is_file():
        raise DataError(f"{shown(path)}: no file that can be read")
    return path


def _remark_on_tables(folder: Path) -> None:
    """Tell which tables near a folder without a metadata.csv may hold the grades, and how they are used."""
    inside = _entries(folder)
    below = [e for e in inside if e.is_dir() and e.name[0] not in ".@"]
    near = [folder / e.name for e in inside if _is_table(e, by_ending=True)]
    for other in (folder.parent, *(folder / e.name for e in below)):
        near += [other / e.name for e in _entries(other) if _is_table(e)]
    ways = []
    for path in near[:_TABLES_SHOWN]:
        way = f"save it as CSV UTF-8, named {METADATA_NAME}"
        if path.suffix.lower() in (".csv", ".tsv", ".txt", ".xlsx", ".xlsm"):
            named = path.parent != folder and folded(path.name) in METADATA_NAMES
            way = f"to use it, give {shown(path.parent) if named else 'its name'} instead"
        ways.append(f"{shown(path)} ({way})")
    if ways:
        more = f", and {len(near) - len(ways)} more" if len(near) > len(ways) else ""
        logger.warning(
            "%s: it has no %s. Not read: %s%s", shown(folder), METADATA_NAME, ", ".join(ways), more
        )


def _is_table(entry: os.DirEntry[str], *, by_ending: bool = False) -> bool:
    """Whether a file may hold grades: by its name, or by its ending alone."""
    stem, ending = os.path.splitext(folded(entry.name))  # noqa: PTH122 (thousands of calls)
    if ending not in _TABLES + _TEXTS or stem in _OURS or stem[:1] in ("", ".", "~"):
        return False
    likely = stem.startswith(_GRADES) or stem.endswith("metadata")
    return (likely or (by_ending and ending in _TABLES)) and entry.is_file()


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder, by name; nothing where it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError:
        return []


def _not_found(source: Path) -> str:
    """The message for a source that does not exist, with a likely misspelling."""
    folder = next(parent for parent in source.parents if parent.exists())
    try:
        close = closest(source.name, (entry.name for entry in folder.iterdir()))
    except OSError:
        close = None
    hint = "" if close is None else f" Did you mean {shown(folder / close)}?"
    return f"{shown(source)}: no such file or folder.{hint}"


def name_from(folder: Path, named: str, file: Path) -> str:
    """How a CSV file in ``folder`` names a file that its source calls ``named``."""
    if named and file in (folder / named, folder / IMAGE_FOLDER / named):
        return named
    if file.is_relative_to(folder):
        return file.relative_to(folder).as_posix()
    return str(file)
