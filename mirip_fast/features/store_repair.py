"""Putting a damaged store right, so that the next embed computes exactly what is gone."""

from __future__ import annotations

import contextlib
import os

import numpy as np

from mirip_fast.errors import StoreError
from mirip_fast.features.shard_rows import Shard, ShardWriter
from mirip_fast.features.shards import create_shard, open_shard, parse_shard_name
from mirip_fast.features.store import FeatureStore
from mirip_fast.features.store_files import (
    Ranges,
    dirty_files,
    missing_shards,
    ranges_files,
    read_list,
    shard_files,
    write_ranges,
)
from mirip_fast.features.store_lock import StoreLock
from mirip_fast.files import fsync_folder, open_regular


def repair(store: FeatureStore, *, command: str = "mirip-fast cache verify --repair") -> list[str]:
    """Mark damaged rows as missing, and put an empty shard in the place of each bad or missing one.

    An unreadable file is kept beside it, with ``.damaged`` after its name. Damaged lists of shards are
    written anew from the shards that are there. The next embed computes the rows that are gone.

    Returns:
        One line for each thing that was put right.

    Raises:
        StoreLockedError: a run writes to the store; nothing was changed.
        StoreError: a file that can not be read just now, or that is no shard at all.
    """
    path = store.path
    done: list[str] = []
    lock = StoreLock(path, command, None, 0)
    try:
        ranges = _lists(store, done)
        files = shard_files(path)
        shards: dict[str, list[Shard]] = {}
        for key, numbers in files.items():
            for number, file in list(numbers.items()):
                with contextlib.suppress(ValueError):  # no file at all
                    os.close(open_regular(file))  # one that may not be read is not a damaged one
                try:
                    shard = open_shard(file, store.fingerprint_id)
                    shards.setdefault(key[0], []).append(shard)
                except StoreError as error:
                    aside = file.with_name(f"{file.name}.damaged")
                    file.replace(aside)
                    del numbers[number]
                    first, end = ranges.get(key, (0, 0))
                    ranges[key] = (first, max(end, number + 1))
                    done.append(f"{error}; kept as {aside.name}")
        for name in list(missing_shards(ranges, files)):
            series, rank, number = parse_shard_name(name) or ("", 0, 0)
            if series in shards:
                create_shard(path / name, shards[series][0].spec, store.fingerprint_id)
                done.append(f"{name} was missing: an empty one is in its place")
            else:  # nothing is left that tells the shape of a row
                end = ranges[series, rank][1]
                ranges[series, rank] = (end, end)
                done.append(f"{name} was missing, and with it all of series {series}")
        for rank in sorted({rank for _, rank in ranges}):
            write_ranges(path, rank, ranges)
        cleared = sum(_clear_damaged(shard) for there in shards.values() for shard in there)
        if cleared:
            done.append(f"{cleared} damaged rows are marked as missing")
        for marker in dirty_files(path):  # what a killed run left was just looked after
            marker.unlink(missing_ok=True)
        fsync_folder(path)
    finally:
        lock.release()
    store.refresh()
    return done


def _lists(store: FeatureStore, done: list[str]) -> Ranges:
    """Which shards there must be; a damaged list is put aside."""
    ranges: Ranges = {}
    rebuilt = set()
    for file in ranges_files(store.path):
        try:
            ranges |= read_list(file)
        except StoreError:
            aside = file.with_name(f"{file.name}.damaged")
            file.replace(aside)
            done.append(f"{file.name} was damaged: the shards beside it are listed anew")
            rebuilt.add(int(file.stem.rpartition("-r")[2]))
    for key, numbers in shard_files(store.path).items():
        first, end = ranges.get(key, (min(numbers) if key[1] in rebuilt else 0, 0))
        ranges[key] = (first, max([end, *(number + 1 for number in numbers)]))
    return ranges


def _clear_damaged(shard: Shard) -> int:
    damaged = np.flatnonzero((shard.checksums() != 0) & ~shard.valid())
    if len(damaged):
        writer = ShardWriter(shard)
        try:
            writer.clear(damaged)
            writer.sync()
        finally:
            writer.close()
    return len(damaged)
