"""Giving disk space back: a store without the rows that nobody wants any more."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mirip_fast.features.shard_rows import ShardWriter
from mirip_fast.features.shards import SeriesSpec, build_shard, shard_name
from mirip_fast.features.store import FeatureStore
from mirip_fast.features.store_files import Ranges, listed, read_ranges, write_ranges
from mirip_fast.features.store_tools import pieces
from mirip_fast.files import fsync_folder, partial_path


@dataclass(frozen=True)
class Pruned:
    """What pruning did: rows kept and dropped, bytes given back to the disk."""

    kept: int
    dropped: int
    freed: int


def prune(
    store: FeatureStore, keep: Collection[bytes], *, command: str = "mirip-fast cache prune"
) -> Pruned:
    """Drop every row whose content hash is not in ``keep``, second rows of one picture, damaged rows.

    New shards are written first; then a list says, in one step, that they count and the old ones do
    not; then the old ones are deleted. A crash at any point loses no row that was to be kept.

    Raises:
        DiskFullError: no room for the rows that are kept; nothing was changed.
        StoreLockedError: a run writes to the store.
    """
    with store.writer(command=command):
        return prune_locked(store, keep)


def prune_locked(
    store: FeatureStore, keep: Collection[bytes], unwanted: Collection[str] = ()
) -> Pruned:
    """:func:`prune` for whoever holds the store's lock.

    Args:
        store: the store.
        keep: content hashes whose rows stay.
        unwanted: series that go as a whole.
    """
    kept = dropped = 0
    before = _size(store.path)
    checked = FeatureStore.open(store.path, verify=True)
    for name, spec in checked.series().items():
        valid = checked.valid_hashes(name)
        wanted = [] if name in unwanted else sorted(valid.intersection(keep))
        kept, dropped = kept + len(wanted), dropped + len(valid) - len(wanted)
        shards_needed = -(-len(wanted) // spec.shard_rows)
        if len(wanted) < len(valid) or shards_needed < len(checked.shards(name)):
            _rewrite(checked, spec, wanted)
    store.refresh()
    return Pruned(kept, dropped, before - _size(store.path))


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in listed(path, "*.h5"))


def _rewrite(store: FeatureStore, spec: SeriesSpec, hashes: Sequence[bytes]) -> None:
    """Replace a series' shards by new ones of rank 0 that hold exactly these rows."""
    path, ranges = store.path, read_ranges(store.path)
    old = store.shards(spec.name)
    ends: Ranges = {key: (end, end) for key, (_, end) in ranges.items() if key[0] == spec.name}
    for shard in old:
        key = (spec.name, shard.rank)
        end = max(shard.number + 1, ends.get(key, (0, 0))[1])
        ends[key] = (end, end)
    own = (spec.name, 0)
    start = ends.get(own, (0, 0))[1]
    rows = store.rows(spec.name, hashes)
    order = np.argsort(rows)
    made: list[tuple[Path, Path]] = []
    try:
        for number, first in enumerate(range(0, len(rows), spec.shard_rows), start):
            final = path / shard_name(spec.name, 0, number)
            made.append((partial_path(final), final))
            part = order[first : first + spec.shard_rows]
            _fill(store, spec, made[-1], [hashes[i] for i in part.tolist()], rows[part])
        for partial, final in made:
            partial.rename(final)
    except BaseException:
        for partial, final in made:
            partial.unlink(missing_ok=True)
            final.unlink(missing_ok=True)
        raise
    fsync_folder(path)
    ends[own] = (start, start + len(made))
    # Rank 0 first: until the others' lists say so, their rows are only there twice.
    for rank in sorted({0, *(rank for _, rank in ends)}):
        write_ranges(path, rank, {**ranges, **ends})
    for shard in old:
        shard.path.unlink()
    fsync_folder(path)


def _fill(
    store: FeatureStore,
    spec: SeriesSpec,
    names: tuple[Path, Path],
    hashes: Sequence[bytes],
    rows: NDArray[np.int64],
) -> None:
    shard = build_shard(*names, spec, store.fingerprint_id)
    table = np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 32)
    file, done = ShardWriter(shard), 0
    try:
        for piece in pieces(store, spec, rows):
            end = done + len(piece)
            file.write(np.arange(done, end), table[done:end], piece)
            done = end
        file.sync()
    finally:
        file.close()
