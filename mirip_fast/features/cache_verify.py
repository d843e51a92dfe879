"""Whether the stores of a cache folder are whole: every row against its checksum, every shard that must
be there, every data set's images; and putting right what can be put right.

A damaged row is named by its image where a ledger knows it. A row whose content hash itself was damaged is
recognised where putting a known hash in its place makes the checksum match.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mirip_fast.errors import MiripError, StoreError
from mirip_fast.features.cache_info import datasets_of, store_folders
from mirip_fast.features.canary import CANARY_FILE, read_canary
from mirip_fast.features.datasets import Dataset, unfinished_datasets
from mirip_fast.features.shard_rows import Shard, row_checksums
from mirip_fast.features.shards import open_shard
from mirip_fast.features.store import FeatureStore
from mirip_fast.features.store_files import (
    dirty_files,
    missing_shards,
    read_ranges,
    shard_files,
)
from mirip_fast.features.store_lock import holder_of
from mirip_fast.features.store_repair import repair
from mirip_fast.files import damaged_files

_MOST_FLIPPED = 64  # bits of a content hash that may be wrong for it to be recognised
_TOLD_MISSING = 100


@dataclass(frozen=True)
class DamagedRow:
    """A row whose bytes do not match its checksum."""

    shard: Path
    slot: int
    sha256: bytes  # of the image, where it can be told; else what stands there
    images: tuple[Path, ...]  # files of that image, in any data set of the store


@dataclass(frozen=True)
class Lacking:
    """A data set some of whose images have no features (any more)."""

    source: str
    images: int
    of: int
    command: str  # what to type


@dataclass
class StoreReport:
    """What was found in one store."""

    path: Path
    rows: int = 0  # rows that were checked, damaged ones included
    shards: int = 0
    damaged: list[DamagedRow] = field(default_factory=list)
    faults: list[str] = field(
        default_factory=list
    )  # missing and unreadable files, one sentence each
    lacking: list[Lacking] = field(default_factory=list)
    killed: bool = False  # a run was killed while it wrote: the next embed looks after these rows
    writing: str | None = None  # who writes at this moment

    @property
    def whole(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.damaged or self.faults or self.lacking)


def verify_cache(
    cache_dir: Path, progress: Callable[[Path], None] = lambda _: None
) -> list[StoreReport]:
    """Check every store below a cache folder; changes nothing, and never waits for a run.

    Args:
        cache_dir: the cache folder.
        progress: called with each shard when it was checked.

    Raises:
        RunNotFoundError: there is no store.
    """
    return [verify_store(path, progress) for path in store_folders(cache_dir)]


def verify_store(path: Path, progress: Callable[[Path], None] = lambda _: None) -> StoreReport:
    """Check one store."""
    report = StoreReport(path, writing=holder_of(path))
    report.killed = bool(dirty_files(path)) and report.writing is None
    datasets, bad_ledgers = datasets_of(path)
    report.faults += [str(error) for error in bad_ledgers]
    report.faults += [
        f"{folder} is no data set: a run was stopped while it was written. The next one completes it, and "
        "`mirip-fast cache prune` removes it."
        for folder in unfinished_datasets(path)
    ]
    names = _Names(datasets, report.faults)
    try:
        store = FeatureStore.open(path)
        files = shard_files(path)
    except StoreError as error:
        report.faults.append(str(error))
        return report
    ranges = {}
    try:
        ranges = read_ranges(path)
    except StoreError as error:
        report.faults.append(str(error))
    for number, name in enumerate(missing_shards(ranges, files)):
        if number == _TOLD_MISSING:
            report.faults.append(f"{path} lacks more shards than these")
            break
        report.faults.append(f"{path / name} is missing")
    for key, numbers in sorted(files.items()):
        first, _ = ranges.get(key, (0, 0))
        for file in (numbers[number] for number in sorted(numbers) if number >= first):
            try:
                shard = open_shard(file, store.fingerprint_id)
                _check_shard(shard, names, report)
            except (StoreError, FileNotFoundError) as error:
                report.faults.append(str(error))
            progress(file)
    _check_datasets(store, datasets, report)
    _check_canary(store, report)
    return report


def repair_store(report: StoreReport, *, command: str = "") -> list[str]:
    """Put right what a report found wrong with the shards of its store.

    Damaged rows are marked as missing, so that the next embed computes exactly these; missing and
    unreadable shards get an empty one in their place; the unreadable file is kept beside it.

    Returns:
        What was done, a sentence each.

    Raises:
        StoreLockedError: a run writes to the store; nothing was changed.
    """
    return repair(FeatureStore.open(report.path), command=command)


class _Names:
    """The image files of content hashes, read from the ledgers when they are first needed."""

    def __init__(self, datasets: Sequence[Dataset], faults: list[str]):
        self._datasets, self._faults = datasets, faults
        self._files: dict[bytes, list[Path]] | None = None

    @property
    def files(self) -> Mapping[bytes, list[Path]]:
        if self._files is None:
            self._files = {}
            for dataset in self._datasets:
                try:
                    entries = dataset.entries()
                except StoreError:
                    continue  # told with the data sets
                for entry in entries:
                    if entry.outcome.sha256 is not None:
                        known = self._files.setdefault(entry.outcome.sha256, [])
                        if entry.record.path not in known:
                            known.append(entry.record.path)
        return self._files


def _check_shard(shard: Shard, names: _Names, report: StoreReport) -> None:
    with shard.open() as stream:
        before = shard.read_checksums(stream)
        sums, hashes = shard.read_keys(stream)
        good = shard.matching(stream, sums, hashes)
        # A run may have been at work on a row meanwhile: what changed since is not damaged.
        unchanged = before == shard.read_checksums(stream)
    report.shards += 1
    report.rows += int(np.count_nonzero(before))
    for slot in np.flatnonzero((before != 0) & ~good & unchanged).tolist():
        sha = _recognised(shard, slot, hashes[slot], names)
        images = tuple(names.files.get(sha, ()))
        report.damaged.append(DamagedRow(shard.path, slot, sha, images))


def _recognised(shard: Shard, slot: int, found: NDArray[np.uint8], names: _Names) -> bytes:
    """The content hash of a damaged row: as it stands there, or the known one that it was."""
    known = names.files
    if not known or found.tobytes() in known:
        return bytes(found)
    table = np.frombuffer(b"".join(known), np.uint8).reshape(-1, 32)
    flipped = np.unpackbits(table ^ found, axis=1).sum(axis=1, dtype=np.int64)
    nearest = int(flipped.argmin())
    if flipped[nearest] <= _MOST_FLIPPED:  # two hashes differ in about 128 of 256 bits
        features = np.empty((1, *shard.spec.shape), shard.spec.dtype)
        with shard.open() as stream:
            shard.read_features(stream, slot, features)
            total = shard.read_checksums(stream)[slot]
        if row_checksums(shard.spec.name, table[nearest : nearest + 1], features)[0] == total:
            return bytes(table[nearest])
    return bytes(found)


def _check_canary(store: FeatureStore, report: StoreReport) -> None:
    """Whether the features of the built-in test picture are there and are this store's."""
    file = store.path / CANARY_FILE
    why = (
        "Put it back; without it `mirip-fast embed` keeps the features that today's libraries give."
    )
    try:
        read_canary(file, store.fingerprint_id)
    except FileNotFoundError:
        if report.rows:
            report.faults.append(f"{file} is missing. {why}")
    except (OSError, ValueError) as error:
        report.faults.append(f"{file} can not be read ({error}). {why}")


def _check_datasets(store: FeatureStore, datasets: Sequence[Dataset], report: StoreReport) -> None:
    """Find the images of data sets that have no features, damaged rows counted in."""
    spoiled = {row.sha256 for row in report.damaged}
    for dataset in datasets:
        try:
            wanted = sorted(dataset.hashes())
            lacking = np.array([sha in spoiled for sha in wanted], dtype=bool)
            for name in dataset.series():
                lacking |= store.rows(name, wanted) < 0
        except MiripError as error:
            if not report.faults or str(error) not in report.faults:
                report.faults.append(str(error))
            continue
        _, faults = damaged_files(dataset.folder)
        report.faults += [fault for fault in faults if fault not in report.faults]
        if lacking.any():
            source, count = str(dataset.source), int(lacking.sum())
            report.lacking.append(Lacking(source, count, len(wanted), dataset.embed_command()))
