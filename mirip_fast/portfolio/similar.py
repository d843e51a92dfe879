"""`similar` and `duplicates`: the works that look most like an image, and those that occur more than once."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mirip_fast.config import Config
from mirip_fast.data.manifest import read_manifest
from mirip_fast.data.spreadsheets import absolute
from mirip_fast.errors import DataError
from mirip_fast.features.datasets import find_datasets, newest_dataset
from mirip_fast.features.embed import OnProgress
from mirip_fast.features.neighbours import (
    WORK,
    FloatArray,
    Gallery,
    Work,
    base_series,
    datasets_like,
    open_gallery,
    stores_of,
    unit,
    works_of_datasets,
)
from mirip_fast.features.phase_one import features_of_files
from mirip_fast.features.store import FeatureStore
from mirip_fast.files import spreadsheet_safe, write_csv
from mirip_fast.text import counted, shown

log = logging.getLogger(__name__)

_BLOCK = 1024  # rows compared at once


def find_similar(
    image: Path,
    config: Config,
    top: int,
    *,
    data: Path | None = None,
    caches: Sequence[Path] = (),
    backbone: str | None = None,
    command: str = "",
    progress: OnProgress = lambda *_: None,
) -> pd.DataFrame:
    """The nearest works, the nearest first; the image itself is left out, copies of it are not.

    Args:
        image: an image file, embedded or not.
        config: cache folder, device.
        top: works wanted.
        data: search this data set only; None searches all that were embedded as the newest was.
        caches: further cache folders to search.
        backbone: another place of the backbone, if it moved.
        command: what is running, for whoever finds the store locked.
        progress: called while the image is embedded.

    Returns:
        See :func:`nearest_works`.

    Raises:
        DataError: the image cannot be read.
        RunNotFoundError: nothing is embedded.
        StoreError: a further cache holds other features; names the differing fields.
    """
    reference = newest_dataset(Path(config.embed.cache_dir), data)
    own, series = FeatureStore.open(reference.store_path), base_series(reference)
    here = [reference] if data else datasets_like(own, [Path(config.embed.cache_dir)])
    datasets = [*here, *datasets_like(own, caches)]
    options = reference.embed
    if backbone is not None:
        options.backbone = backbone
    outcomes, store, series = features_of_files(
        [image], options, config, like=own, series=series, command=command, progress=progress
    )
    ((status, reason, sha),) = outcomes.itertuples(index=False)
    if status == "failed":
        raise DataError(f"{image}: {reason}")
    rows = store.read(series, store.rows(series, [sha]))
    gallery = open_gallery(works_of_datasets(datasets), stores_of(datasets), series)
    itself = absolute(image)
    found = nearest_works(gallery, unit(rows)[0], sha, top + 1)
    return found[found["file"] != itself][:top]


def nearest_works(gallery: Gallery, query: FloatArray, sha256: bytes, top: int) -> pd.DataFrame:
    """The ``top`` works nearest to ``query`` [D], whose file's bytes have the hash ``sha256``.

    Returns:
        A row per work, copies first and then the nearest: ``file``, ``image_id``, ``sha256``, ``tier``,
        ``cosine`` of the two images' CLS features (−1 to 1; 1 is the same), ``distance`` (1 − cosine) and
        ``exact``, whether it is a copy of that file.
    """
    numbers, cosines = gallery.nearest(query, top)
    rows = [
        _row(work, cosine, work[2] == sha256)
        for number, cosine in zip(numbers.tolist(), cosines.tolist(), strict=True)
        for work in gallery.works_of(number)
    ]
    return _table(sorted(rows, key=lambda row: (not row[-1], -row[4], str(row[0])))[:top])


_COLUMNS = ("file", "image_id", "sha256", "tier", "cosine", "distance", "exact")


def _row(work: Work, cosine: float, exact: bool) -> tuple[Any, ...]:
    file, *rest = work
    return Path(file), *rest, cosine, max(0.0, 1 - cosine), exact  # rounding may pass 1


def _table(rows: Sequence[tuple[Any, ...]], *more: str) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=[*_COLUMNS, *more])
    return table.astype({"tier": object, "exact": bool, "cosine": float, "distance": float})


def write_matches(path: Path, matches: pd.DataFrame) -> None:
    """Write one line per work of :func:`find_similar`."""
    rows = [
        {"place": place, **_cells(row), "tier": row["tier"], "same_bytes": int(row["exact"])}
        for place, row in enumerate(matches.to_dict("records"), start=1)
    ]
    columns = ("place", "cosine", "distance", "tier", "same_bytes", "image_id", "path")
    write_csv(path, columns, rows)


def _cells(row: Mapping[Any, Any]) -> dict[str, str]:
    return {
        "cosine": f"{row['cosine']:.4f}",
        "distance": f"{row['distance']:.4f}",
        "image_id": spreadsheet_safe(row["image_id"]),
        "path": spreadsheet_safe(str(row["file"])),
    }


def find_duplicates(
    folders: Sequence[Path],
    config: Config,
    *,
    caches: Sequence[Path] = (),
    backbone_given: bool = False,
    rehash: bool = False,
    command: str = "",
    progress: OnProgress = lambda *_: None,
) -> tuple[pd.DataFrame, int, list[tuple[Path, str]]]:
    """Find equal files and near duplicates.

    Args:
        folders: folders or CSV files, embedded where needed; none stands for all that is in the cache.
        config: the sections audit (``near_cosine``), embed, data and runtime are used.
        caches: further cache folders whose works are compared, too.
        backbone_given: embed as ``config.embed`` says; otherwise as the newest data set of the cache was,
            if there is one, so that as little as possible is computed.
        rehash: read every file again instead of trusting size and time.
        command: what is running, for whoever finds the store locked.
        progress: called after every committed batch.

    Returns:
        The copies, see :func:`group_copies`; how many files were searched; and (file, reason) of those that
        could not be read.

    Raises:
        DataError: a folder has no images, or none could be read.
        RunNotFoundError: no folder is given and nothing is embedded.
        StoreError: a further cache holds other features; names the differing fields.
    """
    cache_dir = Path(config.embed.cache_dir)
    failures: list[tuple[Path, str]] = []
    if folders:
        datasets = [] if backbone_given else find_datasets(cache_dir)
        called = [d for folder in folders for d in datasets if d.is_called(folder)]
        reference = next(iter([*called, *datasets]), None)
        if reference is None:
            embed, like, its_series = dataclasses.replace(config.embed, patches="none"), None, None
        else:
            backbone = shown(Path(reference.info["backbone"]))
            log.info("Looking at images as in %s (%s)", shown(reference.source), backbone)
            embed, its_series = reference.embed, base_series(reference)
            like = FeatureStore.open(reference.store_path)
        manifests = [read_manifest(f, config.data, with_grades=False) for f in folders]
        paths = {path: name for m in manifests for path, name in zip(m.paths, m.ids, strict=True)}
        outcomes, store, series = features_of_files(
            list(paths), embed, config,
            like=like, series=its_series, rehash=rehash, command=command, progress=progress,
        )  # fmt: skip
        table = outcomes.assign(file=[*map(str, paths)], image_id=[*paths.values()], tier=None)
        failed = table[table["status"] == "failed"]
        failures = [*zip(map(Path, failed["file"]), failed["reason"], strict=True)]
        works = table.drop(failed.index)[WORK]
        if not len(works):
            path, reason = failures[0]
            raise DataError(
                f"none of {counted(len(paths), 'image')} could be read (first: {path}: {reason})"
            )
        others = datasets_like(like or store, caches)
        stores = [store, *stores_of(others)]
    else:
        newest = newest_dataset(cache_dir, None)
        series = base_series(newest)
        others = datasets_like(FeatureStore.open(newest.store_path), [cache_dir, *caches])
        stores, works = stores_of(others), pd.DataFrame(columns=WORK, dtype=object)
    works = pd.concat([works, works_of_datasets(others)]).drop_duplicates("file")
    gallery = open_gallery(works, stores, series)
    return group_copies(gallery, config.audit.near_cosine), len(works), failures


def group_copies(gallery: Gallery, threshold: float) -> pd.DataFrame:
    """Files that show the same work, directly or through others.

    Args:
        gallery: the works.
        threshold: cosine from which on two different contents are near duplicates.

    Returns:
        A row per file with the columns of :func:`nearest_works`, for the nearest other file of its group;
        that is ``nearest``, and ``group`` its number from 1, the largest group first.
    """
    groups = [_copies(gallery, numbers) for numbers in gallery.groups(threshold)]
    groups = sorted(filter(None, groups), key=lambda rows: (-len(rows), str(rows[0][0])))
    rows = [(*row, number) for number, group in enumerate(groups, start=1) for row in group]
    return _table(rows, "nearest", "group")


def _copies(gallery: Gallery, numbers: Sequence[int]) -> list[tuple[Any, ...]]:
    """Rows of the files of some contents with the nearest other of each; none if it is a single file."""
    contents = [sorted(gallery.works_of(n), key=lambda work: work[0]) for n in numbers]
    if sum(map(len, contents)) < 2:
        return []
    vectors = gallery.read(np.array(numbers))
    rows = []
    for start in range(0, len(vectors), _BLOCK):
        cosines = vectors[start : start + _BLOCK] @ vectors.T
        here = np.arange(len(cosines))
        cosines[here, start + here] = -np.inf
        best = cosines.argmax(axis=1)
        for i, nearest, cosine in zip(here + start, best, cosines[here, best], strict=True):
            for work in contents[i]:
                same = next((other for other in contents[i] if other is not work), None)
                other = same or contents[nearest][0]
                rows.append(
                    (*_row(work, 1.0 if same else float(cosine), bool(same)), Path(other[0]))
                )
    return sorted(rows, key=lambda row: str(row[0]))


def write_duplicates(path: Path, copies: pd.DataFrame) -> None:
    """Write one line per file of :func:`find_duplicates`."""
    rows = [
        {
            "group": row["group"],
            "kind": "exact" if row["exact"] else "near",
            "nearest": spreadsheet_safe(str(row["nearest"])),
            **_cells(row),
        }
        for row in copies.to_dict("records")
    ]
    columns = ("group", "kind", "cosine", "distance", "nearest", "image_id", "path")
    write_csv(path, columns, rows)
