"""`duplicates`: works that occur more than once, as equal files or as near duplicates."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mirip_fast.config import Config, EmbedConfig
from mirip_fast.data.csv_reader import counted, shown
from mirip_fast.data.manifest import read_manifest
from mirip_fast.data.records import DataOptions
from mirip_fast.errors import DataError
from mirip_fast.features.datasets import Dataset, find_datasets
from mirip_fast.features.embed import Progress
from mirip_fast.features.gallery import (
    Gallery,
    Work,
    base_series,
    datasets_like,
    open_gallery,
    reference_dataset,
    stores_of,
    works_of_datasets,
)
from mirip_fast.features.neighbours import groups_of, open_index
from mirip_fast.features.on_demand import embed_options, features_of_files
from mirip_fast.features.outcomes import Outcome
from mirip_fast.features.store import FeatureStore
from mirip_fast.files import spreadsheet_safe, write_csv

log = logging.getLogger(__name__)

_COLUMNS = ("group", "kind", "cosine", "distance", "nearest", "image_id", "path")


@dataclass(frozen=True)
class Copy:
    """One file of a group.

    Attributes:
        work: the file.
        exact: whether another file of the group has the same bytes.
        nearest: the nearest other file of the group; one with the same bytes if there is one.
        cosine: of the two images' CLS features, −1 to 1; 1 for the same bytes.
    """

    work: Work
    exact: bool
    nearest: Work
    cosine: float

    @property
    def distance(self) -> float:
        """1 − cosine, 0 to 2."""
        return max(0.0, 1 - self.cosine)  # rounding may pass 1


@dataclass(frozen=True)
class Duplicates:
    """Groups of files that show the same work, the largest first, and what could not be read."""

    groups: list[list[Copy]]
    searched: int  # files
    failures: list[tuple[Path, str]]  # file, reason


def find_duplicates(
    folders: Sequence[Path],
    config: Config,
    *,
    caches: Sequence[Path] = (),
    backbone_given: bool = False,
    rehash: bool = False,
    command: str = "",
    progress: Callable[[Progress], None] = lambda _: None,
) -> Duplicates:
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

    Raises:
        DataError: a folder has no images, or none could be read.
        RunNotFoundError: no folder is given and nothing is embedded.
        StoreError: a further cache holds other features; names the differing fields.
    """
    cache_dir = Path(config.embed.cache_dir)
    if folders:
        reference = None if backbone_given else _reference(cache_dir, folders)
        like = None if reference is None else FeatureStore.open(reference.store_path)
        paths = _paths(folders, config)
        asked = features_of_files(
            list(paths), _options(config, reference), config,
            like=like, series=None if reference is None else base_series(reference),
            rehash=rehash, command=command, progress=progress,
        )  # fmt: skip
        works, failures = _sort_out(paths, asked.outcomes)
        store, series = like or asked.store, asked.series
        others = datasets_like(store, caches)
        stores = [asked.store, *stores_of(others)]
    else:
        newest = reference_dataset(cache_dir, None)
        works, failures = [], []
        store, series = FeatureStore.open(newest.store_path), base_series(newest)
        others = datasets_like(store, [cache_dir, *caches])
        stores = stores_of(others)
    known = {work.path for work in works}
    works += [work for work in works_of_datasets(others) if work.path not in known]
    gallery = open_gallery(works, stores, series)
    return Duplicates(group_copies(gallery, config.audit.near_cosine), len(works), failures)


def group_copies(gallery: Gallery, threshold: float) -> list[list[Copy]]:
    """Files that show the same work, directly or through others.

    Args:
        gallery: the works.
        threshold: cosine from which on two different contents are near duplicates.
    """
    index = open_index(gallery.vectors, gallery.folder, gallery.series)
    group = groups_of(gallery.vectors.count, index.links(threshold))
    members: dict[int, list[int]] = {}
    for number, first in enumerate(group.tolist()):
        members.setdefault(first, []).append(number)
    groups = [_copies(gallery, numbers) for numbers in members.values()]
    found = [group for group in groups if group]
    return sorted(found, key=lambda group: (-len(group), str(group[0].work.path)))


def _copies(gallery: Gallery, numbers: Sequence[int]) -> list[Copy]:
    """The files of some contents with the nearest other of each; none if it is a single file."""
    contents = [sorted(gallery.works_of(n), key=lambda work: str(work.path)) for n in numbers]
    if sum(map(len, contents)) < 2:
        return []
    nearest, cosines = _nearest_others(gallery, numbers)
    copies = []
    for i, works in enumerate(contents):
        for work in works:
            same = next((other for other in works if other is not work), None)
            other = same or contents[nearest[i]][0]
            copies.append(Copy(work, same is not None, other, 1.0 if same else cosines[i]))
    return sorted(copies, key=lambda copy: str(copy.work.path))


def _nearest_others(
    gallery: Gallery, numbers: Sequence[int], block: int = 1024
) -> tuple[list[int], list[float]]:
    """Per content the place of the nearest other one in ``numbers``, and the cosine."""
    rows = gallery.vectors.read(np.array(numbers))
    places: list[int] = []
    cosines: list[float] = []
    for start in range(0, len(rows), block):
        part = rows[start : start + block] @ rows.T
        here = np.arange(len(part))
        part[here, start + here] = -np.inf
        best = part.argmax(axis=1)
        places += best.tolist()
        cosines += part[here, best].tolist()
    return places, cosines


def write_duplicates(path: Path, groups: Sequence[Sequence[Copy]]) -> None:
    """Write one line per file."""
    rows = [
        {
            "group": number,
            "kind": "exact" if copy.exact else "near",
            "cosine": f"{copy.cosine:.4f}",
            "distance": f"{copy.distance:.4f}",
            "nearest": spreadsheet_safe(str(copy.nearest.path)),
            "image_id": spreadsheet_safe(copy.work.image_id),
            "path": spreadsheet_safe(str(copy.work.path)),
        }
        for number, group in enumerate(groups, start=1)
        for copy in group
    ]
    write_csv(path, _COLUMNS, rows)


def _reference(cache_dir: Path, folders: Sequence[Path]) -> Dataset | None:
    """The data set that says how to embed: that of a folder asked for, else the newest, if any."""
    datasets = find_datasets(cache_dir)
    called = [d for folder in folders for d in datasets if d.is_called(folder)]
    return next(iter([*called, *datasets]), None)


def _options(config: Config, reference: Dataset | None) -> EmbedConfig:
    if reference is None:
        return dataclasses.replace(config.embed, patches="none")
    backbone = shown(Path(reference.info["backbone"]))
    log.info("Looking at images as in %s (%s)", shown(reference.source), backbone)
    return embed_options(reference)


def _paths(folders: Sequence[Path], config: Config) -> dict[Path, str]:
    """Every image file once, with its name."""
    options = dataclasses.replace(DataOptions.from_config(config.data), with_grades=False)
    records = [record for folder in folders for record in read_manifest(folder, options).records]
    return {record.path: record.image_id for record in records}


def _sort_out(
    paths: dict[Path, str], outcomes: Sequence[Outcome]
) -> tuple[list[Work], list[tuple[Path, str]]]:
    """The readable files, and the others with the reason.

    Raises:
        DataError: none could be read.
    """
    works, failures = [], []
    for (path, image_id), outcome in zip(paths.items(), outcomes, strict=True):
        if outcome.sha256 is None or outcome.status == "failed":
            failures.append((path, outcome.reason or ""))
        else:
            works.append(Work(path, image_id, outcome.sha256))
    if not works:
        path, reason = failures[0]
        raise DataError(
            f"none of {counted(len(paths), 'image')} could be read (first: {path}: {reason})"
        )
    return works, failures
