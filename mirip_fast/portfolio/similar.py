"""`similar` and `duplicates`: the works that look most like an image, and those that occur more than once."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mirip_fast.config import Config
from mirip_fast.data.manifest import read_manifest
from mirip_fast.data.spreadsheets import absolute
from mirip_fast.errors import DataError
from mirip_fast.features.datasets import find_datasets, newest_dataset
from mirip_fast.features.embed import Progress
from mirip_fast.features.neighbours import (
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


@dataclass(frozen=True)
class Match:
    """A work that looks like another image.

    Attributes:
        work: the file and what is known about it.
        cosine: of the two images' CLS features, −1 to 1; 1 is the same.
        exact: whether it is a copy of that image's file.
        nearest: the other image, where it is a work of a group, too.
    """

    work: Work
    cosine: float
    exact: bool = False
    nearest: Work | None = None

    @property
    def distance(self) -> float:
        """1 − cosine, 0 to 2."""
        return max(0.0, 1 - self.cosine)  # rounding may pass 1


def find_similar(
    image: Path,
    config: Config,
    top: int,
    *,
    data: Path | None = None,
    caches: Sequence[Path] = (),
    backbone: str | None = None,
    command: str = "",
    progress: Callable[[Progress], None] = lambda _: None,
) -> list[Match]:
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
    (outcome,), store, series = features_of_files(
        [image], options, config, like=own, series=series, command=command, progress=progress
    )
    if outcome.sha256 is None or outcome.status == "failed":
        raise DataError(f"{image}: {outcome.reason}")
    rows = store.read(series, store.rows(series, [outcome.sha256]))
    gallery = open_gallery(works_of_datasets(datasets), stores_of(datasets), series)
    itself = absolute(image)
    found = nearest_works(gallery, unit(rows)[0], outcome.sha256, top + 1)
    return [match for match in found if match.work.path != itself][:top]


def nearest_works(gallery: Gallery, query: FloatArray, sha256: bytes, top: int) -> list[Match]:
    """The ``top`` works nearest to ``query`` [D]; ``sha256`` is that of its file's bytes."""
    numbers, cosines = gallery.vectors.nearest(query, top)
    matches = [
        Match(work, cosine, work.sha256 == sha256)
        for number, cosine in zip(numbers.tolist(), cosines.tolist(), strict=True)
        for work in gallery.works_of(number)
    ]
    return sorted(matches, key=lambda m: (not m.exact, -m.cosine, str(m.work.path)))[:top]


def write_matches(path: Path, matches: Sequence[Match]) -> None:
    """Write one line per match."""
    rows = [
        {"place": place, **_cells(match), "tier": match.work.tier, "same_bytes": int(match.exact)}
        for place, match in enumerate(matches, start=1)
    ]
    columns = ("place", "cosine", "distance", "tier", "same_bytes", "image_id", "path")
    write_csv(path, columns, rows)


def _cells(match: Match) -> dict[str, str]:
    return {
        "cosine": f"{match.cosine:.4f}",
        "distance": f"{match.distance:.4f}",
        "image_id": spreadsheet_safe(match.work.image_id),
        "path": spreadsheet_safe(str(match.work.path)),
    }


@dataclass(frozen=True)
class Duplicates:
    """Groups of files that show the same work, the largest first, and what could not be read."""

    groups: list[list[Match]]
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
    works: list[Work] = []
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
        others = datasets_like(like or store, caches)
        stores = [store, *stores_of(others)]
    else:
        newest = newest_dataset(cache_dir, None)
        series = base_series(newest)
        others = datasets_like(FeatureStore.open(newest.store_path), [cache_dir, *caches])
        stores = stores_of(others)
    known = {work.path for work in works}
    works += [work for work in works_of_datasets(others) if work.path not in known]
    gallery = open_gallery(works, stores, series)
    return Duplicates(group_copies(gallery, config.audit.near_cosine), len(works), failures)


def group_copies(gallery: Gallery, threshold: float) -> list[list[Match]]:
    """Files that show the same work, directly or through others, each with the nearest other of its group.

    Args:
        gallery: the works.
        threshold: cosine from which on two different contents are near duplicates.
    """
    groups = [_copies(gallery, numbers) for numbers in gallery.vectors.groups(threshold)]
    found = [group for group in groups if group]
    return sorted(found, key=lambda group: (-len(group), str(group[0].work.path)))


def _copies(gallery: Gallery, numbers: Sequence[int]) -> list[Match]:
    """The files of some contents with the nearest other of each; none if it is a single file."""
    contents = [sorted(gallery.works_of(n), key=lambda work: str(work.path)) for n in numbers]
    if sum(map(len, contents)) < 2:
        return []
    rows = gallery.vectors.read(np.array(numbers))
    matches = []
    for start in range(0, len(rows), _BLOCK):
        cosines = rows[start : start + _BLOCK] @ rows.T
        here = np.arange(len(cosines))
        cosines[here, start + here] = -np.inf
        best = cosines.argmax(axis=1)
        for i, nearest, cosine in zip(here + start, best, cosines[here, best], strict=True):
            for work in contents[i]:
                same = next((other for other in contents[i] if other is not work), None)
                if same is not None:
                    matches.append(Match(work, 1.0, True, same))
                else:
                    matches.append(Match(work, float(cosine), False, contents[nearest][0]))
    return sorted(matches, key=lambda match: str(match.work.path))


def write_duplicates(path: Path, groups: Sequence[Sequence[Match]]) -> None:
    """Write one line per file."""
    rows = [
        {
            "group": number,
            "kind": "exact" if match.exact else "near",
            "nearest": spreadsheet_safe(str(match.nearest.path)) if match.nearest else "",
            **_cells(match),
        }
        for number, group in enumerate(groups, start=1)
        for match in group
    ]
    columns = ("group", "kind", "cosine", "distance", "nearest", "image_id", "path")
    write_csv(path, columns, rows)
