"""Looking into the feature stores of a cache folder: what they hold, and whether it is whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mirip_fast.errors import RunNotFoundError
from mirip_fast.features.datasets import find_datasets
from mirip_fast.features.store import STORE_FILE, FeatureStore


@dataclass(frozen=True)
class SeriesInfo:
    """One series: rows that exist, slots that are free, bytes on the disk."""

    name: str
    shape: str
    dtype: str
    rows: int
    free: int
    bytes: int


@dataclass(frozen=True)
class StoreInfo:
    """One store: its series and the data sets embedded into it."""

    path: Path
    backbones: list[str]
    series: list[SeriesInfo]
    datasets: list[str]


@dataclass(frozen=True)
class DamagedRow:
    """A row whose bytes do not match its checksum."""

    shard: Path
    slot: int
    sha256: bytes


def stores(cache_dir: Path) -> Iterator[FeatureStore]:
    """Every store below a cache folder.

    Raises:
        RunNotFoundError: there is none.
    """
    found = sorted(cache_dir.glob(f"*/{STORE_FILE}"))
    if not found:
        raise RunNotFoundError(
            f"No feature store in {cache_dir.resolve()}: run `mirip-fast embed data/` first."
        )
    for path in found:
        yield FeatureStore.open(path.parent)


def describe_stores(cache_dir: Path) -> list[StoreInfo]:
    """What every store below a cache folder holds."""
    datasets = find_datasets(cache_dir)
    result = []
    for store in stores(cache_dir):
        here = [dataset for dataset in datasets if dataset.store_path == store.path]
        series = []
        for name, spec in store.series().items():
            shards = store.shards(name)
            rows = len(store.valid_hashes(name))
            slots = sum(shard.rows for shard in shards)
            size = sum(shard.path.stat().st_size for shard in shards)
            shape = " × ".join(str(n) for n in spec.shape)
            series.append(SeriesInfo(name, shape, spec.dtype, rows, slots - rows, size))
        texts = [
            f"{dataset.source}: {dataset.info['images']} images, {dataset.info['failed']} failed, "
            f"{'graded' if dataset.info['graded'] else 'no grades'}"
            for dataset in here
        ]
        backbones = sorted({str(dataset.info["backbone"]) for dataset in here})
        result.append(StoreInfo(store.path, backbones, series, texts))
    return result


def damaged_rows(cache_dir: Path) -> tuple[int, list[DamagedRow]]:
    """Check the checksum of every row of every store.

    Returns:
        How many rows were checked, and the damaged ones. An empty slot whose checksum alone was
        flipped counts as damaged, too: it is no row, and `embed` frees it.
    """
    checked, damaged = 0, []
    for store in stores(cache_dir):
        for name in store.series():
            for shard in store.shards(name):
                marked = np.flatnonzero(shard.checksums())
                valid = shard.valid()
                checked += len(marked)
                damaged += [
                    DamagedRow(shard.path, int(slot), shard.sha256()[slot].tobytes())
                    for slot in marked
                    if not valid[slot]
                ]
    return checked, damaged
