"""Pictures that lie beside a table of images and that none of its rows names."""

from __future__ import annotations

import functools
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from mirip_fast.data.csv_reader import counted, shown
from mirip_fast.data.image_files import folders_below, is_picture_file, named_picture
from mirip_fast.data.records import Manifest
from mirip_fast.data.tar_index import METADATA_NAME
from mirip_fast.text import folded

log = logging.getLogger(__name__)

_SHOWN = 5
_IMAGE_FOLDER = "images"
#: What `split` writes: each names a part of the pictures by nature.
_SPLIT_FILES = {f"{name}_{METADATA_NAME}" for name in ("train", "val", "test")}


def tell_unlisted(manifest: Manifest) -> None:
    """Tell which pictures are named by no row of the CSV file that a manifest was read from.

    Looked through are the folders in which listed images lie and, with all below it, the folder of a
    metadata.csv (of a table by another name: the ``images/`` beside it). Tars and addresses are seen to
    where they are read. Takes some eight bytes of memory per image.
    """
    table = manifest.source
    if table.suffix.lower() == ".tar" or folded(table.name) in _SPLIT_FILES or not table.is_file():
        return
    real = functools.cache(os.path.realpath)  # linked folders have several names
    fold = table.with_name(table.name.swapcase()).exists()  # a disk that takes A.jpg for a.jpg

    def code(folder: str, name: str) -> int:
        return hash((real(folder), name.casefold() if fold else name))

    folders: set[str] = set()

    def listed() -> Iterator[int]:
        for record in manifest.records:
            folder, name = os.path.split(record.path)
            folders.add(folder)
            yield code(folder, name)

    known = np.unique(np.fromiter(listed(), np.int64))
    found: list[str] = []
    for folder, names in _looked_through(table, folders):
        codes = np.fromiter((code(folder, name) for name in names), np.int64)
        for i in np.flatnonzero(np.isin(codes, known, invert=True)):
            path = os.path.join(folder, names[i])  # noqa: PTH118 (thousands of calls)
            taken = named_picture(names[i], Counter())
            if taken or (taken is None and is_picture_file(path)):
                found.append(path)
    tell_unnamed(table, found)


def tell_unnamed(table: Path, pictures: Iterable[str]) -> None:
    """Tell the number and the first of the pictures that no row of a table names, if there are any."""
    paths = sorted(pictures, key=os.fsencode)
    if not paths:
        return
    where = os.path.commonpath([os.path.dirname(path) for path in paths])  # noqa: PTH120
    some = ", ".join(os.path.relpath(path, where) for path in paths[:_SHOWN])
    log.warning(
        "%s in %s %s named by no row of %s: %s%s",
        *(counted(len(paths), "picture"), shown(Path(where)), "is" if len(paths) == 1 else "are"),
        *(shown(table), some, ", …" if len(paths) > _SHOWN else ""),
    )


def _looked_through(table: Path, listed: set[str]) -> Iterator[tuple[str, list[str]]]:
    """Each folder, once, with the names of its files; what can not be listed has none."""
    seen: set[str] = set()
    runs: tuple[str, ...] = ()
    top = str(table.parent)
    if folded(table.name) != METADATA_NAME:
        top = os.path.join(top, _IMAGE_FOLDER)  # noqa: PTH118
    if os.path.isdir(top):  # noqa: PTH112
        for folder, names in folders_below(top, Counter(), refuse=None):
            seen.add(os.path.realpath(folder))
            if "run.json" in names:
                runs += (os.path.join(folder, ""),)  # noqa: PTH118
            if not os.path.join(folder, "").startswith(runs):  # noqa: PTH118 (a run's pictures are ours)
                yield folder, names
    for folder in listed:
        if os.path.realpath(folder) not in seen:
            seen.add(os.path.realpath(folder))
            try:
                with os.scandir(folder) as entries:
                    yield folder, [entry.name for entry in entries if not entry.is_dir()]
            except OSError:
                continue  # its images are missing, which is told
