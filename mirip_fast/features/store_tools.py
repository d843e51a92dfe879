"""Looking after feature stores: joining, pruning, mending them, and exports for other programs."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mirip_fast.errors import StoreError
from mirip_fast.features.shard_rows import ShardWriter
from mirip_fast.features.shards import (
    SeriesSpec,
    build_shard,
    create_shard,
    open_shard,
    parse_shard_name,
    partial_path,
    shard_name,
    write_export,
)
from mirip_fast.features.store import STORE_FILE, FeatureStore, differing_fields
from mirip_fast.features.store_files import (
    Ranges,
    missing_shards,
    read_ranges,
    shard_files,
    write_ranges,
)
from mirip_fast.features.store_lock import StoreLock
from mirip_fast.files import fsync_folder

_PIECE_BYTES = 16 << 20  # features in memory at once


def export(
    store: FeatureStore,
    file: Path,
    *,
    hashes: Sequence[bytes],
    image_ids: Sequence[str],
    paths: Sequence[str],
    series: Mapping[str, str],
) -> None:
    """Write features as one plain HDF5 file: ``/features/cls`` …, ``/image_id``, ``/path``.

    The file's attributes are ``fingerprint`` (JSON) and ``fingerprint_id``. Names are stored as UTF-8;
    bytes that are none (old file names) come back with ``surrogateescape``.

    Args:
        store: where the features are.
        file: the file to write; an older one is replaced.
        hashes: content hash of each of the n images.
        image_ids: n names.
        paths: n files.
        series: name below ``/features`` → series, for example ``{"cls": "cls.756"}``.

    Raises:
        StoreError: an image has no row in a series, or ``file`` lies in a store.
        DiskFullError: no room.
    """
    if not len(hashes) == len(image_ids) == len(paths):
        raise ValueError(f"{len(hashes)} hashes, {len(image_ids)} ids, {len(paths)} paths")
    if (file.parent / STORE_FILE).exists():
        raise StoreError(f"{file} would lie among a store's shards; choose another folder")
    specs, features = store.series(), {}
    for name, source in series.items():
        rows = store.rows(source, hashes)
        if source not in specs or (rows < 0).any():
            there = ", ".join(specs) or "none"
            raise StoreError(
                f"{store.path}: {int((rows < 0).sum())} of {len(rows)} images have no row in series "
                f"{source} (there is: {there}); run `mirip-fast embed` on them first"
            )
        features[f"features/{name}"] = (specs[source], _pieces(store, specs[source], rows))
    texts = {
        "image_id": [text.encode("utf-8", "surrogateescape") for text in image_ids],
        "path": [text.encode("utf-8", "surrogateescape") for text in paths],
    }
    for text in (text for values in texts.values() for text in values):
        if b"\0" in text:
            raise ValueError(f"{text!r} holds a NUL, which HDF5 texts can not")
    fingerprint = json.dumps(store.fingerprint, sort_keys=True)
    attributes = {"fingerprint": fingerprint, "fingerprint_id": store.fingerprint_id}
    write_export(file, features, texts, attributes)


def _pieces(
    store: FeatureStore, spec: SeriesSpec, rows: NDArray[np.int64]
) -> Iterator[NDArray[Any]]:
    step = max(1, _PIECE_BYTES // spec.row_bytes)
    for start in range(0, len(rows), step):
        yield store.read(spec.name, rows[start : start + step])


def merge(
    target: FeatureStore,
    sources: Sequence[FeatureStore],
    *,
    command: str = "mirip-fast cache merge",
) -> dict[str, int]:
    """Copy into ``target`` every row of ``sources`` that it lacks.

    Only rows whose checksum matches are copied. A merge that is broken off can be run again.

    Returns:
        Series → rows added.

    Raises:
        StoreError: other features (names the differing fields), or a store given twice.
        StoreLockedError: a run writes to ``target``.
    """
    for source in sources:
        if source.path.resolve() == target.path.resolve():
            raise StoreError(f"{source.path} can not be merged into itself")
        if source.fingerprint_id != target.fingerprint_id:
            raise StoreError(
                f"{source.path} and {target.path} hold different features "
                f"({differing_fields(source.fingerprint, target.fingerprint)})"
            )
    added: dict[str, int] = {}
    with target.writer(command=command) as writer:
        for source in sources:
            checked = FeatureStore.open(source.path, verify=True)
            for name, spec in checked.series().items():
                hashes = sorted(checked.valid_hashes(name))
                lacking = np.flatnonzero(writer.missing(name, hashes)).tolist()
                wanted = [hashes[i] for i in lacking]
                rows = checked.rows(name, wanted)
                wanted = [wanted[i] for i in np.argsort(rows)]
                rows = np.sort(rows)
                done = 0
                for piece in _pieces(checked, spec, rows):
                    writer.append(wanted[done : done + len(piece)], {spec: piece})
                    done += len(piece)
                added[name] = added.get(name, 0) + done
    target.refresh()
    return added


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
    kept = dropped = 0
    before = _size(store.path)
    with store.writer(command=command):
        checked = FeatureStore.open(store.path, verify=True)
        for name, spec in checked.series().items():
            valid = checked.valid_hashes(name)
            wanted = sorted(valid.intersection(keep))
            kept, dropped = kept + len(wanted), dropped + len(valid) - len(wanted)
            shards_needed = -(-len(wanted) // spec.shard_rows)
            if len(wanted) < len(valid) or shards_needed < len(checked.shards(name)):
                _rewrite(checked, spec, wanted)
    store.refresh()
    return Pruned(kept, dropped, before - _size(store.path))


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.h5"))


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
        for piece in _pieces(store, spec, rows):
            end = done + len(piece)
            file.write(np.arange(done, end), table[done:end], piece)
            done = end
        file.sync()
    finally:
        file.close()


def repair(store: FeatureStore, *, command: str = "mirip-fast cache verify --repair") -> list[str]:
    """Put an empty shard in the place of each one that is missing or unreadable.

    An unreadable file is kept beside it, with ``.damaged`` after its name. The next embed computes
    the rows that are gone. Single damaged rows need no repair: embed finds them.

    Returns:
        One line for each shard that was replaced.

    Raises:
        StoreLockedError: a run writes to the store.
    """
    path, done = store.path, []
    lock = StoreLock(path, command, None, 0)
    try:
        ranges, files, specs = read_ranges(path), shard_files(path), {}
        for key, numbers in files.items():
            for number, file in list(numbers.items()):
                file.open("rb").close()  # a file that may not be read is not a damaged one
                try:
                    specs[key[0]] = open_shard(file, store.fingerprint_id).spec
                except StoreError as error:
                    aside = file.with_name(f"{file.name}.damaged")
                    file.replace(aside)
                    del numbers[number]
                    first, end = ranges.get(key, (0, 0))
                    ranges[key] = (first, max(end, number + 1))
                    done.append(f"{error}; kept as {aside.name}")
        for name in missing_shards(ranges, files):
            series, rank, number = parse_shard_name(name) or ("", 0, 0)
            if series in specs:
                create_shard(path / name, specs[series], store.fingerprint_id)
                done.append(f"{name} was missing: an empty one is in its place")
            else:  # nothing is left that tells the shape of a row
                end = ranges[series, rank][1]
                ranges[series, rank] = (end, end)
                done.append(f"{name} was missing, and with it all of series {series}")
        for rank in sorted({rank for _, rank in ranges}):
            write_ranges(path, rank, ranges)
        fsync_folder(path)
    finally:
        lock.release()
    store.refresh()
    return done
