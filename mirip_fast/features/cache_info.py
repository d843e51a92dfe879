"""What a cache folder holds: its stores, their series, the data sets that use them, who writes now."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from mirip_fast.errors import MiripError, RunNotFoundError, StoreError
from mirip_fast.features.datasets import Dataset, datasets_beside
from mirip_fast.features.store import STORE_FILE, FeatureStore
from mirip_fast.features.store_files import listed
from mirip_fast.features.store_lock import holder_of


@dataclass(frozen=True)
class SeriesInfo:
    """One series: rows that exist, slots that are free, bytes on the disk."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    rows: int
    free: int
    bytes: int


@dataclass(frozen=True)
class DatasetInfo:
    """One embedded data set: where it came from, how many images, when."""

    source: str
    backbone: str
    images: int
    failed: int
    graded: bool
    limit: int | None  # the number of images of a trial
    embedded_at: datetime


@dataclass(frozen=True)
class StoreInfo:
    """One store: what its features are, its series, and the data sets embedded into it."""

    path: Path
    fingerprint: dict[str, Any]
    series: list[SeriesInfo]
    datasets: list[DatasetInfo]
    unused_rows: int  # rows of images that no data set names
    bytes: int  # on the disk, everything in the folder
    changed: datetime  # when a shard was last written to
    writing: str | None  # who writes at this moment
    problem: str | None  # why there is nothing more to tell


@dataclass(frozen=True)
class CacheInfo:
    """A cache folder and the disk it lies on."""

    path: Path
    stores: list[StoreInfo]
    bytes: int
    free: int


def store_folders(cache_dir: Path) -> list[Path]:
    """The folder of every store below a cache folder.

    Raises:
        RunNotFoundError: there is none.
    """
    found = [folder for folder in listed(cache_dir, "*") if listed(folder, STORE_FILE)]
    if not found:
        raise RunNotFoundError(
            f"No feature store in {cache_dir.resolve()}: run `mirip-fast embed data/` first, or name the "
            "cache folder with --cache-dir."
        )
    return found


def datasets_of(store: Path) -> tuple[list[Dataset], list[StoreError]]:
    """The data sets beside a store, the newest first, and what is wrong with those that are damaged."""
    good, bad = [], []
    for dataset in datasets_beside(store):
        try:
            good.append((dataset.embedded_at, dataset))
        except StoreError as error:
            bad.append(error)
    newest = sorted(good, key=lambda pair: pair[0], reverse=True)
    return [dataset for _, dataset in newest], bad


def used_hashes(datasets: Sequence[Dataset]) -> set[bytes]:
    """The content hashes that the ledgers of some data sets name.

    Raises:
        StoreError: a ledger is damaged.
    """
    used: set[bytes] = set()
    for dataset in datasets:
        used |= dataset.hashes()
    return used


def folder_bytes(folder: Path) -> int:
    """Bytes of the files in a folder and below it."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def describe_cache(cache_dir: Path) -> CacheInfo:
    """What every store below a cache folder holds; a damaged store is told, not raised.

    Raises:
        RunNotFoundError: there is none.
    """
    stores = [describe_store(path) for path in store_folders(cache_dir)]
    total = sum(store.bytes for store in stores)
    return CacheInfo(cache_dir, stores, total, shutil.disk_usage(cache_dir).free)


def describe_store(path: Path) -> StoreInfo:
    """What one store holds."""
    fingerprint: dict[str, Any] = {}
    series: list[SeriesInfo] = []
    unused, problem = 0, None
    datasets, damaged = datasets_of(path)
    try:
        store = FeatureStore.open(path)
        fingerprint = store.fingerprint
        series = [_describe_series(store, name) for name in store.series()]
        unused = _unused(store, used_hashes(datasets)) if not damaged else 0
    except MiripError as error:
        problem = str(error)
    if problem is None and damaged:
        problem = str(damaged[0])
    shards = [file.stat().st_mtime for file in listed(path, "*.h5")]
    return StoreInfo(
        path=path,
        fingerprint=fingerprint,
        series=series,
        datasets=[_describe_dataset(dataset) for dataset in datasets],
        unused_rows=unused,
        bytes=folder_bytes(path),
        changed=datetime.fromtimestamp(max(shards, default=path.stat().st_mtime)).astimezone(),
        writing=holder_of(path),
        problem=problem,
    )


def _describe_series(store: FeatureStore, name: str) -> SeriesInfo:
    spec, shards = store.series()[name], store.shards(name)
    rows, slots = store.count(name), sum(shard.rows for shard in shards)
    size = sum(shard.path.stat().st_size for shard in shards)
    return SeriesInfo(name, spec.shape, spec.dtype, rows, slots - rows, size)


def _describe_dataset(dataset: Dataset) -> DatasetInfo:
    info = dataset.info
    return DatasetInfo(
        source=info["source"],
        backbone=info["backbone"],
        images=info["images"],
        failed=info["failed"],
        graded=info["graded"],
        limit=info["limit"],
        embedded_at=dataset.embedded_at,
    )


def _unused(store: FeatureStore, used: Collection[bytes]) -> int:
    hashes = list(used)
    return sum(
        store.count(name) - int(np.count_nonzero(store.rows(name, hashes) >= 0))
        for name in store.series()
    )
