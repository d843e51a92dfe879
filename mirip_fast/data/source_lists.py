"""What a source is that is no folder or table here: several tars, addresses; and the list of their images."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mirip_fast.data import remote
from mirip_fast.data.csv_reader import Problems, Table, counted, shown
from mirip_fast.data.formats import can_read
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
    tell_passed_over,
)
from mirip_fast.data.locate import FileFinder, tell_unnamed
from mirip_fast.data.manifest_rows import (
    IMAGE_COLUMNS,
    Columns,
    images_from,
    records_from_csv,
)
from mirip_fast.data.sources import (
    DAMAGED,
    METADATA_NAME,
    METADATA_NAMES,
    UNREADABLE,
    is_tar,
    safe_name,
    tar_index,
)
from mirip_fast.data.table import (
    DataOptions,
    Manifest,
    image_table,
    joined,
    tier_column,
    tier_reader,
)
from mirip_fast.errors import DataError
from mirip_fast.text import folded, nfc

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

_TABLES = (".csv", ".tsv", ".txt", ".xlsx", ".xlsm")
_LIST = re.compile(r"\.tar,.*\.tar$", re.IGNORECASE | re.DOTALL)
_SHOWN = 5
_QUESTIONS = 16  # to a service, at once
_THREADS = 8  # tars looked through at once


def is_pattern(source: Path) -> bool:
    """Whether a path is no file or folder but stands for several tars, ``x/*.tar`` or ``x/0.tar,1.tar``."""
    several = any(mark in str(source) for mark in "*?[{") or _LIST.search(source.name) is not None
    return several and (remote.is_remote(source) or not os.path.lexists(source))


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
        if remote.is_remote(source):
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
    return remote.file_info(path) is not None if remote.is_remote(path) else path.is_file()


def is_there(source: Path) -> bool:
    """Whether a data set's source can be read again without a network: a file, a folder, or tars."""
    if is_pattern(source) and not remote.is_remote(source):
        try:
            return bool(expand(source))
        except DataError:
            return False
    return source.exists()


def tiers_by_folder(
    source: Path, names: Sequence[str], options: DataOptions, *, lacking: str = METADATA_NAME
) -> dict[str, int]:
    """First-level folder → its tier; empty where the folders give no grades.

    They do where all images lie in folders named for tiers, or two tiers have images and there are no more
    other folders than theirs (an alphabet of folders is none of tiers). What decides is told in one line,
    with how many images lie elsewhere and have no grade.

    Args:
        source: of the images, for messages.
        names: of the images below it, with ``/``.
        options: the names of the tiers.
        lacking: what else would have given grades.
    """
    known, code = {nfc(tier) for tier in options.tiers}, tier_reader(options.tiers)
    counts = Counter(name.partition("/")[0] if "/" in name else "" for name in names)
    found = {top: code(top) for top in counts}
    tiers = {top: tier for top, tier in found.items() if tier is not None}
    graded = Counter[int]()  # one tier may have two folders, spelled composed and decomposed
    for top, tier in tiers.items():
        graded[tier] += counts[top]
    listed = ", ".join(f"{options.tiers[tier]} {graded[tier]:,}" for tier in sorted(graded))
    others = {f"{top}/" if top else "at the top": counts[top] for top in counts if top not in tiers}
    elsewhere = f"{counted(sum(others.values()), 'image')} elsewhere ({by_number(others)})"
    spelled = [f"{top}/ as {options.tiers[i]}" for top, i in tiers.items() if nfc(top) not in known]
    as_read = f". Folders are read as tiers: {', '.join(sorted(spelled))}" if spelled else ""
    enough = len(graded) > 1 and sum(top.endswith("/") for top in others) <= len(tiers)
    where = shown(source)
    if not tiers:
        deeper = {n.split("/")[0] for n in names if nfc("/".join(n.split("/")[1:2])) in known}
        logger.info(
            "%s: images without grades: no %s, and no folder is named for a tier (%s; others: --tiers)%s",
            *(where, lacking, ", ".join(options.tiers)),
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
    return tiers if enough or not others else {}


def read_tars(source: Path, tars: Sequence[Path], options: DataOptions) -> Manifest:
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
    with ThreadPoolExecutor(_THREADS, "mirip-tar") as pool:
        indexes = dict(zip(tars, pool.map(tar_index, tars), strict=True))
    tables = {tar: index.tables() for tar, index in indexes.items()}
    if any(tables.values()):
        return _from_tables(source, tables, options)
    root = Path(os.path.commonpath([tar.parent for tar in tars]))
    passed = sum((index.passed for index in indexes.values()), Counter[str]())
    names = [
        (tar, name, os.path.relpath(tar, root) + "/" + name)
        for tar, index in indexes.items()
        for name in index.images()
        if can_read(ending_of(name), passed)
    ]
    if not names:
        files = sum(index.files for index in indexes.values())
        known = " ".join(sorted(IMAGE_EXTENSIONS))
        raise DataError(
            f"{shown(source)}: none of {files:,} files in it is an image ({known}). {passed_over(passed)}"
        )
    tell_passed_over(shown(source), passed)
    labels = [indexes[tar].labels_of(name) for tar, name, _ in names]
    if options.with_grades and any(labels):
        ids = [image_id for _, _, image_id in names]
        table = _from_labels(source, root, ids, labels, options)
        if table["tier"].notna().any():
            return Manifest(source, root, options.tiers, table, options, (root,))
    else:
        ids = [image_id for _, _, image_id in names]
        places = [str(root / image_id) for image_id in ids]
        table = image_table({"image_id": ids, "file": places, "named": ids}, options.tiers)
    tops = [name.partition("/")[0] if "/" in name else "" for _, name, _ in names]
    if options.with_grades:
        lacking = f"{METADATA_NAME} in the tars, no .json or .cls with a {options.tier_column}"
        tiers = tiers_by_folder(source, [name for _, name, _ in names], options, lacking=lacking)
        table["tier"] = tier_column([tiers.get(top) for top in tops], options.tiers)
    return Manifest(source, root, options.tiers, table, options, (root,))


def remark_on_tars(folder: Path, number: int) -> None:
    """Say that the tars beside images are not looked into."""
    if number:
        logger.warning(
            "%s: its images are taken, and %s not looked into; to embed those, name them: '%s/*.tar'",
            *(shown(folder), f"{number} tar{' is' if number == 1 else 's are'}", shown(folder)),
        )


def read_remote(source: Path, options: DataOptions) -> Manifest | tuple[Path, list[str]]:
    """The manifest of an address that is no tar; or a folder and its images' names, where it has no table.

    Raises:
        DataError: there is nothing, or nothing that can be read.
    """
    manifest = _from_remote_file(source, options)
    if manifest is not None:
        return manifest
    images, tars, unsure, refused = list[str](), list[Path](), list[str](), 0
    tables = list[str]()
    passed = Counter[str]()
    for raw in [raw for raw, info in remote.list_files(source, deep=True) if info is not None]:
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
        return _from_table(source, pick_table(source, tables), images, options)
    with ThreadPoolExecutor(_THREADS, "mirip-look") as pool:
        for name, there in zip(
            unsure, pool.map(_is_picture, [source / n for n in unsure]), strict=True
        ):
            images.append(name) if there else passed.update([kind_of(name)])
    if refused:
        logger.warning("%s: %d images left out: // or .. in their names", shown(source), refused)
    tell_passed_over(shown(source), passed)
    if images:
        remark_on_tars(source, len(tars))
        return source, sorted(images, key=os.fsencode)
    if tars:
        return read_tars(source, sorted(tars, key=os.fsencode), options)
    raise DataError(f"{shown(source)}: no such folder, or no images, {METADATA_NAME} or tars in it")


def _from_remote_file(source: Path, options: DataOptions) -> Manifest | None:
    """What the table behind an address lists; None where there is no file, but perhaps a folder."""
    is_table = source.suffix.lower() in _TABLES
    if remote.is_web(source) and not is_table:
        url = remote.address(source)
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


def pick_table(folder: Path, names: Sequence[str]) -> str:
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


def _from_table(where: Path, name: str, pictures: Sequence[str], options: DataOptions) -> Manifest:
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


def _from_tables(source: Path, tables: dict[Path, list[str]], options: DataOptions) -> Manifest:
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
        manifests.append(_from_table(tar, pick_table(tar, names), pictures, options))
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
    return Manifest(source, root, options.tiers, whole, manifests[0].options, places)


def _from_labels(
    source: Path,
    root: Path,
    ids: Sequence[str],
    labels: Sequence[dict[str, str]],
    options: DataOptions,
) -> pd.DataFrame:
    """Images with what the samples' ``.json`` and ``.cls`` files say, read like the rows of a table."""
    import pandas as pd

    keys = dict.fromkeys(key for known in labels for key in known)
    tier, own_id = options.tier_column, options.id_column
    # Numbers that JSON files call image_id are rarely unique over many tars: such ids are asked for by name.
    no_column = {UNREADABLE, "cls", *IMAGE_COLUMNS, DataOptions().id_column}
    keys = {key: None for key in keys if key not in no_column}
    has_tier = tier in keys or any("cls" in known for known in labels)
    columns = list(dict.fromkeys(["filename", *keys, *([tier] if has_tier else [])]))
    rows, problems = [], Problems(source, named=ids)
    for number, (image_id, known) in enumerate(zip(ids, labels, strict=True)):
        if UNREADABLE in known:
            problems.add(known[UNREADABLE], row=number)
        values = {**known, "filename": image_id, tier: known.get(tier, known.get("cls", ""))}
        rows.append([values.get(column, "") for column in columns])
    there = set(columns)
    meaning = Columns(
        image="filename",
        id=own_id if own_id in there else None,
        tier=tier if has_tier else None,
        score=options.score_column if options.score_column in there else None,
        group=options.group_column if options.group_column in there else None,
    )
    table = Table(source, pd.DataFrame(rows, columns=columns, dtype=object))
    return images_from(table, meaning, options, FileFinder((root,)), problems).assign(row=0)
