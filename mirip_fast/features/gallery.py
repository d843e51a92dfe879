"""A gallery: the works of embedded data sets, of one or several caches, whose features can be compared."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from mirip_fast.data.csv_reader import counted, shown
from mirip_fast.errors import RunNotFoundError, StoreError
from mirip_fast.features.datasets import Dataset, find_datasets
from mirip_fast.features.neighbours import (
    FloatArray,
    Index,
    IntArray,
    Vectors,
    groups_of,
    open_index,
    unit,
)
from mirip_fast.features.recipe import series_name
from mirip_fast.features.store import FeatureStore, differing_fields

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Work:
    """One image file, and what is known about it.

    Attributes:
        path: the file.
        image_id: its name in its data set.
        sha256: of the file's bytes.
        tier: name of its tier, None where it has no grade.
    """

    path: Path
    image_id: str
    sha256: bytes
    tier: str | None = None


@dataclass(frozen=True)
class Gallery:
    """Works, and the features of their contents: n vectors for n different contents.

    Attributes:
        works: every file, also several with the same content.
        hashes: SHA-256 of each content, [n].
        vectors: the CLS token of each content's base view, scaled to length 1.
        folder: the store's folder, where an index of the vectors may be kept.
        series: name of the series the vectors come from.
    """

    works: tuple[Work, ...]
    hashes: tuple[bytes, ...]
    vectors: Vectors
    folder: Path
    series: str

    def works_of(self, number: int) -> list[Work]:
        """The files that have content ``number``."""
        return self._files[self.hashes[number]]

    @cached_property
    def _files(self) -> dict[bytes, list[Work]]:
        files: dict[bytes, list[Work]] = {}
        for work in self.works:
            files.setdefault(work.sha256, []).append(work)
        return files


def reference_dataset(cache_dir: Path, source: Path | None) -> Dataset:
    """The data set that says how images are looked at: that of ``source``, else the newest.

    Raises:
        RunNotFoundError: nothing is embedded, or not ``source``.
    """
    datasets = find_datasets(cache_dir)
    if not datasets:
        raise RunNotFoundError(
            f"Nothing is embedded in {cache_dir.resolve()} yet: run `mirip-fast embed data/` first."
        )
    if source is None:
        return datasets[0]
    for dataset in datasets:
        if dataset.is_called(source):
            return dataset
    raise RunNotFoundError(
        f"{source}: not embedded in {cache_dir.resolve()} yet (there is: "
        f"{', '.join(shown(dataset.source) for dataset in datasets[:5])}); "
        f"run `mirip-fast embed {source}` first."
    )


def datasets_like(store: FeatureStore, caches: Iterable[Path]) -> list[Dataset]:
    """The data sets in cache folders whose features can be compared with those in ``store``.

    Raises:
        RunNotFoundError: a cache has no data set.
        StoreError: a cache has other features only; names the differing fields.
    """
    found = []
    for cache in caches:
        datasets = find_datasets(cache)
        if not datasets:
            raise RunNotFoundError(f"{cache}: no data set is embedded in this cache")
        same = [d for d in datasets if d.store_path.name == store.fingerprint_id]
        if not same:
            other = FeatureStore.open(datasets[0].store_path)
            raise StoreError(
                f"The features in {cache} can not be compared with those in {store.path} "
                f"({differing_fields(store.fingerprint, other.fingerprint)}). Embed "
                f"{shown(datasets[0].source)} in the same way, with the same --backbone, "
                "--image-size and so on."
            )
        if len(same) < len(datasets):
            other_way = counted(len(datasets) - len(same), "data set")
            log.info("%s: %s embedded in another way left out", cache, other_way)
        found += same
    return found


def works_of_datasets(datasets: Iterable[Dataset]) -> list[Work]:
    """Every embedded file once; a file of several data sets as the first of them knows it."""
    found: dict[Path, Work] = {}
    for dataset in datasets:
        tiers = list(dataset.info["tiers"])
        for entry in dataset.entries():
            record, outcome = entry.record, entry.outcome
            if outcome.sha256 is not None and outcome.status != "failed":
                tier = None if record.tier is None else tiers[record.tier]
                work = Work(record.path, record.image_id, outcome.sha256, tier)
                found.setdefault(record.path, work)
    return list(found.values())


def base_series(dataset: Dataset) -> str:
    """The series with the CLS token of the whole image."""
    return series_name(dataset.views()[0], "cls")


def open_gallery(works: Sequence[Work], stores: Sequence[FeatureStore], series: str) -> Gallery:
    """Find the features of works.

    Args:
        works: image files; those without features in any store are left out, and told.
        stores: stores of one fingerprint; the first that has a row wins.
        series: the series to compare.

    Raises:
        StoreError: none of the works has features.
    """
    hashes = sorted({work.sha256 for work in works})  # one order, whatever the order of the works
    store_of = np.full(len(hashes), -1, np.int64)
    row_of = np.full(len(hashes), -1, np.int64)
    for i, store in enumerate(stores):
        rows = store.rows(series, hashes)
        new = (store_of < 0) & (rows >= 0)
        store_of[new], row_of[new] = i, rows[new]
    there = np.flatnonzero(store_of >= 0)
    if not len(there):
        raise StoreError(
            f"{stores[0].path} has no features ({series}) of any of the {len(works)} images: run "
            "`mirip-fast embed` again."
        )
    kept = tuple(hashes[i] for i in there.tolist())
    known = set(kept)
    present = tuple(work for work in works if work.sha256 in known)
    if len(present) < len(works):
        lost = counted(len(works) - len(present), "image")
        log.warning("%s without features in the cache left out; embed again to include them", lost)
    store_of, row_of = store_of[there], row_of[there]
    first = stores[int(store_of[0])]
    width = int(first.series()[series].shape[0])

    def read(numbers: IntArray) -> FloatArray:
        found = np.empty((len(numbers), width), np.float32)
        for i, store in enumerate(stores):
            here = np.flatnonzero(store_of[numbers] == i)
            if len(here):
                found[here] = unit(store.read(series, row_of[numbers[here]]))
        return found

    key = hashlib.sha256(f"{first.fingerprint_id}/{series}/".encode() + b"".join(kept)).hexdigest()
    return Gallery(present, kept, Vectors(len(kept), width, read, key), stores[0].path, series)


def near_groups(gallery: Gallery, threshold: float, index: Index | None = None) -> list[list[int]]:
    """Contents that look alike, directly or through others, the largest group first; each is in one.

    Args:
        gallery: the works.
        threshold: cosine from which on two contents are near duplicates.
        index: searches ``gallery.vectors``, where it is open already.
    """
    index = index or open_index(gallery.vectors, gallery.folder, gallery.series)
    members: dict[int, list[int]] = {}
    group = groups_of(gallery.vectors.count, index.links(threshold))
    for number, first in enumerate(group.tolist()):
        members.setdefault(first, []).append(number)
    return sorted(members.values(), key=lambda numbers: (-len(numbers), numbers))


def stores_of(datasets: Iterable[Dataset]) -> list[FeatureStore]:
    """The stores of data sets, each once."""
    paths = dict.fromkeys(dataset.store_path for dataset in datasets)
    return [FeatureStore.open(path) for path in paths]
