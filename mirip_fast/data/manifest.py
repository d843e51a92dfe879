"""Reading and writing the list of images and grades: of a CSV file, a folder, a folder per tier, tars."""

from __future__ import annotations

import glob
import itertools
import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mirip_fast.config import DataConfig
from mirip_fast.data import remote
from mirip_fast.data.applicants import with_applicants
from mirip_fast.data.decode_pool import DecodeJob, DecodePool
from mirip_fast.data.formats import can_read, package_for
from mirip_fast.data.graders import PREFIX, grader_names
from mirip_fast.data.image_files import (
    HEAD_BYTES,
    IMAGE_EXTENSIONS,
    by_number,
    ending_of,
    hidden_part,
    is_picture,
    kind_of,
    named_picture,
    passed_over,
    scan_folder,
    tell_passed_over,
)
from mirip_fast.data.images import FIT
from mirip_fast.data.locate import FileFinder, tell_unnamed
from mirip_fast.data.manifest_rows import (
    IMAGE_COLUMNS,
    IMAGE_FOLDER,
    RowReader,
    records_from_csv,
)
from mirip_fast.data.remote import is_remote, located
from mirip_fast.data.sources import (
    DAMAGED,
    METADATA_NAME,
    METADATA_NAMES,
    UNREADABLE,
    is_tar,
    safe_name,
    tar_index,
)
from mirip_fast.data.spreadsheets import Problems, Table, absolute
from mirip_fast.data.table import (
    Manifest,
    given_name,
    image_table,
    joined,
    or_none,
    own_columns,
    tier_column,
    tier_reader,
)
from mirip_fast.errors import DataError
from mirip_fast.files import write_csv
from mirip_fast.runtime import usable_cores
from mirip_fast.text import address, closest, counted, folded, nfc, shown

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

_COUNT_PAGES = "mirip_fast.data.decode_worker:count_pages"

_READ = (".csv", ".tsv", ".txt", ".xlsx", ".xlsm")
#: Endings of tables, and how the names of those begin that hold grades.
_TABLES = (".csv", ".tsv", ".xlsx", ".xlsm", ".xls", ".ods", ".parquet", ".jsonl")
_TEXTS = (".txt", ".json")  # tables only by their names
_GRADES = ("metadata", "meta", "grade", "label", "tier", "score", "등급", "성적", "평가")
#: Tables that mirip-fast itself writes and nobody means.
_OURS = {
    "ranking", "applicants", "failures", "audit", "near_groups", "duplicates", "similar", "sweep", "pairs",
}  # fmt: skip
_LIST = re.compile(r"\.tar,.*\.tar$", re.IGNORECASE | re.DOTALL)
_SHOWN = 5
_QUESTIONS = 16  # to a service, at once
_THREADS = 8  # tars looked through at once

_COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


class _Ungraded(DataConfig):
    with_grades = False


def read_manifest(
    source: Path | str, data: DataConfig | None = None, *, with_grades: bool = True
) -> Manifest:
    """Read what is known about the images of a data set.

    Args:
        source: a CSV file or Excel workbook; a folder with a ``metadata.csv`` or ``.xlsx`` (file names are
            relative to it, its ``images/`` or ``data.image_root``); a folder with one folder per tier;
            any folder of images, searched recursively; a tar, several as ``data/*.tar`` or
            ``data/0.tar,1.tar``, or a folder of tars; or an address of one of these, such as ``s3://bucket/folder``.
        data: column names, tiers, encoding; ``None`` takes the defaults.
        with_grades: whether tiers, scores and groups are read; without, their columns are like any other.

    Returns:
        The manifest. Rows whose image file is missing are in it: see :meth:`Manifest.missing`.

    Raises:
        DataError: the source does not exist, holds no images, or is faulty; all faults of a CSV file
            are told at once, each with its line and column.
        ConfigError: the tiers have no names that differ.
    """
    options = (data or DataConfig()).as_read()
    if not with_grades:
        options = _Ungraded(**vars(options))
    return with_applicants(_by_page(_read(source, options)))


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
        before, after = counted(len(manifest), "work"), f"{len(table):,}"
        logger.info("%s: %s in %s; each page is a work: %s become %s", where, *there, before, after)
    return replace(manifest, table=table)


def _read(source: Path | str, options: DataConfig) -> Manifest:
    source = located(source)
    if options.image_root is not None:
        image_root = absolute(options.image_root)
        if not image_root.is_dir():
            raise DataError(f"--image-root {options.image_root}: there is no such folder")
        options = replace(options, image_root=str(image_root))
    tars = expand(source) if is_pattern(source) else [source] if _may_be_tar(source) else []
    if tars:
        for other in (tar for tar in tars if not _may_be_tar(tar)):
            raise DataError(
                f"{shown(source)}: {shown(other)} is no .tar; only tars go by a pattern"
            )
        return _read_tars(source, tars, options)
    if is_remote(source):
        return _read_remote(source, options)
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


def _read_folder(folder: Path, options: DataConfig) -> Manifest:
    """A folder without a CSV file: its images, else those of its tars."""
    pictures, tars, passed = scan_folder(folder)
    if not pictures and not tars:
        known = " ".join(sorted(IMAGE_EXTENSIONS))
        told = passed_over(passed)
        raise DataError(
            f"{shown(folder)}: no {METADATA_NAME}, and no images or tars in it or its folders ({known})"
            + (f". {told}" if told else "")
        )
    tell_passed_over(shown(folder), passed)
    if not pictures:
        return _read_tars(folder, [folder / name for name in tars], options)
    _remark_on_tars(folder, len(tars))
    return _from_names(folder, pictures, options)


def _may_be_tar(source: Path) -> bool:
    """Whether a path is named like a tar, also like one that will be refused for its compression."""
    named = is_tar(source) or source.name.lower().endswith(_COMPRESSED_TARS)
    return named and not source.is_dir() and (is_remote(source) or source.exists())


def _from_names(folder: Path, found: Sequence[str], options: DataConfig) -> Manifest:
    """The images of a folder, graded by its first-level folders where these are named for tiers.

    Args:
        folder: absolute.
        found: names below it.
        options: the names of the tiers.
    """
    names = found if os.sep == "/" else [name.replace(os.sep, "/") for name in found]
    table = _named(folder, names, options)
    if options.with_grades:
        table["tier"] = _tiers_by_folder(folder, names, options)
    options = replace(options, sheet=None)  # there is no workbook
    return Manifest(folder, folder, options.tier_names(), table, options, (folder,))


def _named(root: Path, names: Sequence[str], options: DataConfig) -> pd.DataFrame:
    start = os.path.join(root, "")  # noqa: PTH118 (thousands of calls)
    files = [str(Path(start + name)) for name in names]
    return image_table({"image_id": names, "file": files, "named": names}, options.tier_names())


def _remark_on_tars(folder: Path, number: int) -> None:
    """Say that the tars beside images are not looked into."""
    if number:
        logger.warning(
            "%s: its images are taken, and %s not looked into; to embed those, name them: '%s/*.tar'",
            *(shown(folder), f"{number} tar{' is' if number == 1 else 's are'}", shown(folder)),
        )


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
    path = folder / _pick_table(folder, names or [METADATA_NAME])
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
    for path in near[:_SHOWN]:
        way = f"save it as CSV UTF-8, named {METADATA_NAME}"
        if path.suffix.lower() in _READ:
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


# Several tars, and addresses.


def is_pattern(source: Path) -> bool:
    """Whether a path is no file or folder but stands for several tars, ``x/*.tar`` or ``x/0.tar,1.tar``."""
    several = any(mark in str(source) for mark in "*?[{") or _LIST.search(source.name) is not None
    return several and (is_remote(source) or not os.path.lexists(source))


def as_one(sources: Sequence[str]) -> str:
    """One source for a command's arguments: several tars are ``x/0.tar,1.tar``, all of a folder ``x/*.tar``.

    Raises:
        DataError: several that are no tars of one folder.
    """
    if len(sources) == 1:
        return sources[0]
    joined = " ".join(sources)
    if Path(joined).exists():
        raise DataError(f"A name with blanks goes in quotes: '{joined}'")
    folders = {source[: source.rfind("/") + 1] for source in sources}
    if not all(is_tar(Path(source)) for source in sources) or len(folders) > 1:
        raise DataError(
            f"{len(sources)} sources: {', '.join(sources[:3])}{', …' if len(sources) > 3 else ''}. "
            "One folder, CSV file or address is expected, or tars of one folder"
        )
    (folder,) = folders
    names = sorted(source[len(folder) :] for source in sources)
    if any(mark in name for name in names for mark in ",*?[{"):
        raise DataError(
            f"{folder}: put the pattern in quotes, as file names have signs of patterns in them"
        )
    every = sorted(glob.glob("*.tar", root_dir=folder or "."))  # noqa: PTH207
    return folder + ("*.tar" if names == every else ",".join(names))


def expand(source: Path) -> list[Path]:
    """The files that a pattern or a list stands for: those of ``*`` sorted, those of a list in its order.

    Raises:
        DataError: one of a list is missing, nothing matches, or there are braces, which a shell writes out.
    """
    if "{" in (source.name if os.path.lexists(source.parent) else str(source)):
        raise DataError(
            f"{shown(source)}: braces are written out by a shell alone (no quotes around them); "
            f"in quotes, use {re.sub(r'{[^{}]*}', '*', shown(source))}"
        )
    if any(mark in str(source) for mark in "*?["):
        if is_remote(source):
            matches = remote.matching(source)
        else:
            matches = [Path(match) for match in sorted(glob.glob(str(source)), key=os.fsencode)]  # noqa: PTH207
        if not matches:
            raise DataError(f"{shown(source)}: nothing has such a name")
        return [match for match in matches if not hidden_part(match.name)]
    paths = [source.parent / name for name in dict.fromkeys(source.name.split(","))]
    with ThreadPoolExecutor(_QUESTIONS, "mirip-look") as pool:
        there = list(pool.map(_is_file, paths))
    missing = [shown(path) for path, is_file in zip(paths, there, strict=True) if not is_file]
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise DataError(
            f"{', '.join(missing[:_SHOWN])}{more} of {counted(len(paths), 'tar')} "
            f"{'is' if len(missing) == 1 else 'are'} not there"
        )
    return paths


def _is_file(path: Path) -> bool:
    return remote.file_info(path) is not None if is_remote(path) else path.is_file()


def is_there(source: Path) -> bool:
    """Whether a data set's source can be read again without a network: a file, a folder, or tars."""
    if is_pattern(source) and not is_remote(source):
        try:
            return bool(expand(source))
        except DataError:
            return False
    return source.exists()


def _tiers_by_folder(
    source: Path, names: Sequence[str], options: DataConfig, lacking: str = METADATA_NAME
) -> pd.Categorical[Any]:
    """[n] tiers by the images' first-level folders; none where the folders give no grades.

    They do where all images lie in folders named for tiers, or two tiers have images and there are no more
    other folders than theirs (an alphabet of folders is none of tiers). What decides is told in one line,
    with how many images lie elsewhere and have no grade.

    Args:
        source: of the images, for messages.
        names: of the images below it, with ``/``.
        options: the names of the tiers.
        lacking: what else would have given grades.
    """
    tier_names = options.tier_names()
    known, code = set(tier_names), tier_reader(tier_names)
    tops = [name.partition("/")[0] if "/" in name else "" for name in names]
    counts = Counter(tops)
    found = {top: code(top) for top in counts}
    tiers = {top: tier for top, tier in found.items() if tier is not None}
    graded = Counter[int]()  # one tier may have two folders, spelled composed and decomposed
    for top, tier in tiers.items():
        graded[tier] += counts[top]
    listed = ", ".join(f"{tier_names[tier]} {graded[tier]:,}" for tier in sorted(graded))
    others = {f"{top}/" if top else "at the top": counts[top] for top in counts if top not in tiers}
    elsewhere = f"{counted(sum(others.values()), 'image')} elsewhere ({by_number(others)})"
    spelled = [f"{top}/ as {tier_names[i]}" for top, i in tiers.items() if nfc(top) not in known]
    as_read = f". Folders are read as tiers: {', '.join(sorted(spelled))}" if spelled else ""
    enough = len(graded) > 1 and sum(top.endswith("/") for top in others) <= len(tiers)
    where = shown(source)
    if not tiers:
        deeper = {n.split("/")[0] for n in names if nfc("/".join(n.split("/")[1:2])) in known}
        logger.info(
            "%s: images without grades: no %s, and no folder is named for a tier (%s; others: --tiers)%s",
            *(where, lacking, ", ".join(tier_names)),
            "".join(f". Such folders are in {top}/: name that" for top in sorted(deeper)[:1]),
        )
    elif not others:
        logger.info("%s: graded by folders: %s%s", where, listed, as_read)
    elif enough:
        logger.warning(
            "%s: graded by folders: %s%s. Without a grade, so not trained on: %s",
            *(where, listed, as_read, elsewhere),
        )
    else:
        logger.warning(
            "%s: images without grades: folders are named for tiers (%s), but there are %s. For grades, "
            "move those away, or list the images in a %s",
            *(where, listed, elsewhere, METADATA_NAME),
        )
    graded_here = enough or not others
    return tier_column([tiers.get(top) if graded_here else None for top in tops], tier_names)


def _read_tars(source: Path, tars: Sequence[Path], options: DataConfig) -> Manifest:
    """The images of tars: one record per member that is named like an image.

    Grades come from a ``metadata.csv`` inside the tars, else from the ``.json`` and ``.cls`` files beside the
    images (as WebDataset has them), else from one folder per tier inside the tars. A member's id is its name
    below the folder of the tars, such as ``000.tar/a.jpg``.

    Args:
        source: what was given: a tar, a folder of tars, a pattern.
        tars: the tars.
        options: column names and tiers.

    Raises:
        DataError: a tar cannot be read, there are no images, or grades are faulty.
    """
    import pandas as pd

    with ThreadPoolExecutor(_THREADS, "mirip-tar") as pool:
        indexes = dict(zip(tars, pool.map(tar_index, tars), strict=True))
    tables = {tar: index.tables() for tar, index in indexes.items()}
    if any(tables.values()):
        return _from_tables(source, tables, options)
    root = Path(os.path.commonpath([tar.parent for tar in tars]))
    passed = sum((index.passed for index in indexes.values()), Counter[str]())
    members = {
        os.path.relpath(tar, root) + "/" + name: (index, name)
        for tar, index in indexes.items()
        for name in index.images()
        if can_read(ending_of(name), passed)
    }
    if not members:
        files = sum(index.files for index in indexes.values())
        known = " ".join(sorted(IMAGE_EXTENSIONS))
        raise DataError(
            f"{shown(source)}: none of {files:,} files in it is an image ({known}). {passed_over(passed)}"
        )
    tell_passed_over(shown(source), passed)
    manifest = Manifest(source, root, options.tier_names(), pd.DataFrame(), options, (root,))
    labels = [index.labels_of(name) for index, name in members.values()]
    if options.with_grades and any(labels):
        table = _from_labels(source, root, [*members], labels, options)
        if table["tier"].notna().any():
            return replace(manifest, table=table)
    else:
        table = _named(root, [*members], options)
    if options.with_grades:
        inside = [name for _, name in members.values()]
        lacking = f"{METADATA_NAME} in the tars, no .json or .cls with a {options.tier_column}"
        table["tier"] = _tiers_by_folder(source, inside, options, lacking)
    return replace(manifest, table=table)


def _read_remote(source: Path, options: DataConfig) -> Manifest:
    """The images at an address that is no tar.

    Raises:
        DataError: there is nothing, or nothing that can be read.
    """
    manifest = _from_remote_file(source, options)
    if manifest is not None:
        return manifest
    images, tars, unsure, refused = list[str](), list[Path](), list[str](), 0
    tables = list[str]()
    passed = Counter[str]()
    for raw in [raw for raw, is_file in remote.listing(source, deep=True) if is_file]:
        name, reason = safe_name(raw)
        if reason is not None or name != raw:  # it could not be asked for by this name
            refused += ending_of(raw) in IMAGE_EXTENSIONS
            continue
        path = source / name
        if folded(name) in METADATA_NAMES:
            tables.append(name)
            continue
        taken = named_picture(name, passed)
        if taken and can_read(ending_of(name), passed):
            images.append(name)
        elif taken is None:
            tars.append(path) if is_tar(path) else unsure.append(name)
    if tables:
        return _from_table(source, _pick_table(source, tables), images, options)
    with ThreadPoolExecutor(_THREADS, "mirip-look") as pool:
        for name, there in zip(
            unsure, pool.map(_is_picture, [source / n for n in unsure]), strict=True
        ):
            images.append(name) if there else passed.update([kind_of(name)])
    if refused:
        logger.warning("%s: %d images left out: // or .. in their names", shown(source), refused)
    tell_passed_over(shown(source), passed)
    if images:
        _remark_on_tars(source, len(tars))
        return _from_names(source, sorted(images, key=os.fsencode), options)
    if tars:
        return _read_tars(source, sorted(tars, key=os.fsencode), options)
    raise DataError(f"{shown(source)}: no such folder, or no images, {METADATA_NAME} or tars in it")


def _from_remote_file(source: Path, options: DataConfig) -> Manifest | None:
    """What the table behind an address lists; None where there is no file, but perhaps a folder."""
    is_table = source.suffix.lower() in _READ
    if remote.is_web(source) and not is_table:
        url = address(source)
        raise DataError(
            f"{url}: of a web server, tars and tables are read, but no folders: each lists its files in its "
            f"own way. Give tars by name ({url}/000.tar {url}/001.tar), a table of the pictures "
            f"({url}/{METADATA_NAME}), or a copy (wget -r -np {url}/)"
        )
    if remote.file_info(source) is None:
        return None
    if not is_table:
        raise DataError(f"{shown(source)}: one file; a folder, a .tar or a .csv file is expected")
    return records_from_csv(source, options)


def _pick_table(folder: Path, names: Sequence[str]) -> str:
    """The one of a folder's metadata.csv and metadata.xlsx to read; what is doubtful in it is told.

    Raises:
        DataError: several could be meant.
    """
    for usual in METADATA_NAMES:
        alike = [name for name in names if folded(name.rpartition("/")[2]) == usual]
        found = [name for name in alike if name == usual] or alike
        if len(found) > 1:
            raise DataError(f"{shown(folder)}: {' and '.join(found)}; leave one, as {usual}")
        if found:
            break
    if not found[0].endswith(usual):  # it has capital letters
        logger.warning("%s is read as %s", shown(folder / found[0]), usual)
    others = [name for name in names if name not in alike]
    if others:
        logger.warning(
            "%s is read, and %s beside it is not: give its name to read it instead",
            *(shown(folder / found[0]), " and ".join(others)),
        )
    return found[0]


def _from_table(where: Path, name: str, pictures: Sequence[str], options: DataConfig) -> Manifest:
    """What a table in a tar or at an address lists; pictures beside it that it does not name are told."""
    table = where / name
    manifest = records_from_csv(table, options)
    listed = set(manifest.table["file"])
    beside = (str(where / picture) for picture in pictures)
    tell_unnamed(table, (path for path in beside if path not in listed))
    return manifest


def _is_picture(path: Path) -> bool:
    """Whether what lies behind an address is a picture by its first bytes."""
    try:
        return is_picture(remote.read_bytes(path, 0, HEAD_BYTES))
    except DataError:
        return False


def _from_tables(source: Path, tables: dict[Path, list[str]], options: DataConfig) -> Manifest:
    """One manifest of tars that each have a ``metadata.csv``."""
    import pandas as pd

    manifests = []
    for tar, names in tables.items():
        if len(names) != 1:
            raise DataError(
                f"{shown(tar)}: {len(names) or 'no'} {METADATA_NAME} in it"
                + (f" ({', '.join(names)}); one is expected" if names else ", as other tars have")
            )
        pictures = [name for name in tar_index(tar).images() if name != DAMAGED]
        manifests.append(_from_table(tar, _pick_table(tar, names), pictures, options))
    if len(manifests) == 1:
        return replace(manifests[0], source=source)
    table = joined([manifest.table for manifest in manifests])
    first: dict[str, str] = {}
    problems = Problems(source)
    for image_id, file in zip(table["image_id"], table["file"], strict=True):
        other = first.setdefault(image_id, file)
        if other != file:
            problems.add(f"{image_id!r} names {shown(Path(other))} and {shown(Path(file))}")
    problems.raise_if_any()
    root = Path(os.path.commonpath([tar.parent for tar in tables]))
    places = tuple(place for manifest in manifests for place in manifest.places)
    # Rows of several tables have no one number; file names start from the folder of the tars.
    named = [os.path.relpath(file, root) for file in table["file"]]
    whole = table.assign(row=0, named=pd.Series(named, dtype=object))
    return Manifest(source, root, options.tier_names(), whole, manifests[0].options, places)


def _from_labels(
    source: Path,
    root: Path,
    ids: Sequence[str],
    labels: Sequence[dict[str, str]],
    options: DataConfig,
) -> pd.DataFrame:
    """Images with what the samples' ``.json`` and ``.cls`` files say, read like the rows of a table."""
    import pandas as pd

    keys = dict.fromkeys(key for known in labels for key in known)
    tier, own_id = options.tier_column, options.id_column
    # Numbers that JSON files call image_id are rarely unique over many tars: such ids are asked for by name.
    no_column = {UNREADABLE, "cls", *IMAGE_COLUMNS, DataConfig.id_column}
    keys = {key: None for key in keys if key not in no_column}
    has_tier = tier in keys or any("cls" in known for known in labels)
    columns = list(dict.fromkeys(["filename", *keys, *([tier] if has_tier else [])]))
    rows, problems = [], Problems(source, named=ids)
    for number, (image_id, known) in enumerate(zip(ids, labels, strict=True)):
        if UNREADABLE in known:
            problems.add(known[UNREADABLE], row=number)
        values = {**known, "filename": image_id, tier: known.get(tier, known.get("cls", ""))}
        rows.append([values.get(column, "") for column in columns])
    others = {"id": own_id, "score": options.score_column, "group": options.group_column}
    meaning: dict[str, Any] = {name: column for name, column in others.items() if column in columns}
    table = Table(source, pd.DataFrame(rows, columns=columns, dtype=object))
    reader = RowReader(
        table,
        options,
        FileFinder((root,)),
        problems,
        "filename",
        tier=tier if has_tier else None,
        **meaning,
    )
    return reader.images().assign(row=0)
