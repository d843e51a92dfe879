"""Writing to a feature store: one run at a time, every batch durable before the next begins."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mirip_fast.closing import Closing
from mirip_fast.errors import StoreError
from mirip_fast.features.content_numbers import ContentNumbers
from mirip_fast.features.shard_rows import ShardWriter
from mirip_fast.features.shards import SeriesSpec, Shard, create_shard, shard_name
from mirip_fast.features.store_files import (
    DIRTY_FILE,
    STORE_FILE,
    clean_up,
    dirty_files,
    find_shards,
    read_ranges,
    write_ranges,
)
from mirip_fast.features.store_lock import StoreLock
from mirip_fast.files import disk_full, fsync_folder, is_disk_full
from mirip_fast.runtime import rank as process_rank

if TYPE_CHECKING:
    from mirip_fast.features.store import FeatureStore


#: Written to before they are synced and closed: spoiled rows may lie in thousands of shards.
_FILES_AT_ONCE = 16
_NONE, _FOUND, _ADDED = 0, 1, 2  # no row; one that was there before; one of this writer


class StoreWriter(Closing):
    """Appends rows; holds the store's lock until it is closed. Several threads may use it.

    Rows that a kill or a power loss spoiled are found by their checksums and their slots used again, so
    that exactly what is missing gets computed. A run alone verifies a series when it first needs it, and
    everything after a crash. The processes of a distributed run (``run_id``) share the lock: the first to
    come verifies everything before the others are let in; each writes only to shards of its own rank.

    Args:
        store: the store to write to.
        command: what is running, for whoever finds the store locked.
        run_id: names the distributed run; None for a run alone.
        rank: number of this process in it (default: the one torchrun gave it).
        stop: once set, from any thread, verifying a large cache and waiting for another process that
            does it end soon, by StoppedError.
        contents: numbers that the caller keeps, too, so that no hash is kept twice.

    Raises:
        StoreLockedError: another run writes; names it. Nothing was changed.
    """

    def __init__(
        self,
        store: FeatureStore,
        command: str = "",
        *,
        run_id: str | None = None,
        rank: int | None = None,
        stop: threading.Event | None = None,
        contents: ContentNumbers | None = None,
    ):
        self.store = store
        self._stop = stop or threading.Event()
        self._contents = ContentNumbers() if contents is None else contents
        self.rank = process_rank() if rank is None else rank
        self._mutex = threading.RLock()
        self._marker = store.path / f"{DIRTY_FILE}-r{self.rank:02d}"
        self._dirty = False
        self._unsettled = False  # a batch was broken off: what it wrote may not be on the disk
        self._series: dict[str, _Series] = {}
        self._lock = StoreLock(store.path, command, run_id, self.rank, self._stop)
        try:
            if not (store.path / STORE_FILE).exists():
                raise StoreError(f"{store.path} was pruned meanwhile; run the same command again")
            self._recover(alone=run_id is None)
            self._lock.share()
        except BaseException:
            self._release()
            raise

    def close(self) -> None:
        """Close the shards and give the lock back. Committed rows need no closing."""
        with self._mutex:
            if self._dirty and not self._unsettled:
                self._marker.unlink(missing_ok=True)
                fsync_folder(self.store.path)
            self._dirty = False
            self._release()

    def missing(self, series: str, hashes: Sequence[bytes]) -> NDArray[np.bool_]:
        """[n]: whether each content hash has no verified row in the series.

        The first call for a series reads and verifies it.
        """
        return np.array([state == _NONE for state in self._states(series, hashes)], bool)

    def added(self, series: str, hashes: Sequence[bytes]) -> NDArray[np.bool_]:
        """[n]: whether this writer gave each content hash its row in the series."""
        return np.array([state == _ADDED for state in self._states(series, hashes)], bool)

    def append(self, hashes: Sequence[bytes], features: Mapping[SeriesSpec, NDArray[Any]]) -> None:
        """Write one batch to one or more series; durable when this returns.

        A picture that a series has already, or that comes twice in the batch, keeps its first row.

        Args:
            hashes: n content hashes of 32 bytes.
            features: per series [n, \\*shape] in the stored number format, finite.

        Raises:
            ValueError: another shape or number format, or a number that is not finite.
            DiskFullError: a new shard does not fit; batches before this one stay.
            StoreError: the disk failed, or the writer is closed.
        """
        for spec, rows in features.items():
            _check_rows(spec, rows, hashes)
        with self._mutex:
            self._check_open()
            jobs = []
            for spec, rows in features.items():
                series = self._of(spec)
                new = series.new_among(hashes)
                if len(new):
                    jobs.append((series, [hashes[i] for i in new], rows[new]))
            if jobs:
                with self._plain_errors():  # a full disk is found before anything is written
                    for series, sha, _ in jobs:
                        series.make_room(len(sha))
                    self._mark_dirty()
                self._unsettled = True
                with self._plain_errors():
                    self._write(jobs)
                self._unsettled = False
                for series, sha, _ in jobs:
                    series.note(sha, _ADDED)

    def _states(self, series: str, hashes: Sequence[bytes]) -> list[int]:
        if not self._lock.held:
            raise StoreError(f"{self.store.path}: this writer is closed")
        known = self._series.get(series)
        if known is None:
            return [_NONE] * len(hashes)
        if not known.looked_at:
            with self._mutex:
                return known.states(hashes)
        return known.states(hashes)

    def _write(self, jobs: Sequence[tuple[_Series, list[bytes], NDArray[Any]]]) -> None:
        written: list[ShardWriter] = []
        for series, sha, rows in jobs:
            for file in series.write(sha, rows):
                written.append(file)
                if len(written) == _FILES_AT_ONCE:
                    self._settle(written, [job[0] for job in jobs])
        self._settle(written, [job[0] for job in jobs])

    @staticmethod
    def _settle(written: list[ShardWriter], of: Sequence[_Series]) -> None:
        for file in written:
            file.sync()
        written.clear()
        for series in of:
            series.close_full()

    @contextlib.contextmanager
    def _plain_errors(self) -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise
        except OSError as error:
            if is_disk_full(error):  # file systems that copy on write need room even here
                raise disk_full(self.store.path) from error
            raise StoreError(
                f"{self.store.path}: writing failed ({error}). What was committed before stays; look "
                "after the disk and run the same command again."
            ) from error

    def _check_open(self) -> None:
        if not self._lock.held:
            raise StoreError(f"{self.store.path}: this writer is closed")
        if self._unsettled:
            raise StoreError(f"{self.store.path}: an earlier write failed; open the store again")

    def _of(self, spec: SeriesSpec) -> _Series:
        series = self._series.get(spec.name)
        if series is None:
            series = self._new_series(spec, [], alone=True)
        if series.spec != spec:
            raise StoreError(
                f"{self.store.path}: series {spec.name} holds {series.spec.shape} "
                f"{series.spec.dtype}, not {spec.shape} {spec.dtype}"
            )
        return series

    def _new_series(self, spec: SeriesSpec, shards: Sequence[Shard], *, alone: bool) -> _Series:
        series = _Series(
            self.store, spec, shards, self.rank, self._contents, alone=alone, stop=self._stop
        )
        self._series[spec.name] = series
        return series

    def _recover(self, *, alone: bool) -> None:
        """Bring in order what a crash left, and look what is there."""
        path, first = self.store.path, self._lock.exclusive
        clean_up(path, None if first else self.rank)
        markers = [m for m in dirty_files(path) if first or m == self._marker]
        for shards in find_shards(path, self.store.fingerprint_id).values():
            series = self._new_series(shards[0].spec, shards, alone=alone)
            if not first:  # the process that let us in has verified what was there
                series.look(lambda shard: bool(markers) and shard.rank == self.rank)
            elif markers or not alone:
                series.look(lambda _: True)
        for marker in markers:
            marker.unlink(missing_ok=True)
        if markers:
            fsync_folder(path)

    def _mark_dirty(self) -> None:
        """Tell readers that come after a crash to verify checksums."""
        if not self._dirty:
            flags = os.O_WRONLY | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
            handle = os.open(self._marker, flags, 0o666)
            os.fsync(handle)
            os.close(handle)
            fsync_folder(self.store.path)
            self._dirty = True

    def _release(self) -> None:
        for series in self._series.values():
            series.close()
        self._series = {}
        self._lock.release()


class _Series:
    """What one series holds, and the free slots that this process may fill."""

    def __init__(
        self,
        store: FeatureStore,
        spec: SeriesSpec,
        shards: Sequence[Shard],
        rank: int,
        contents: ContentNumbers,
        *,
        alone: bool,
        stop: threading.Event,
    ):
        self.spec = spec
        self._store, self._rank, self._alone, self._stop = store, rank, alone, stop
        self._shards = list(shards)
        self._contents = contents
        self._known: bytearray | None = None  # by a content's number; the latest may not be in it
        self._free: list[tuple[Shard, NDArray[np.int64]]] = []
        self._files: dict[Path, ShardWriter] = {}

    @property
    def looked_at(self) -> bool:
        """Whether it is known what there is."""
        return self._known is not None

    def states(self, hashes: Sequence[bytes]) -> list[int]:
        """Whether each content has a valid row, and whose; the first look verifies them."""
        if self._known is None:
            self.look(lambda _: True)
        known = self._known
        assert known is not None
        return [
            known[number] if 0 <= number < len(known) else _NONE
            for number in self._contents.find(hashes)
        ]

    def note(self, hashes: Sequence[bytes], state: int) -> None:
        """Keep that contents have rows."""
        assert self._known is not None
        self._note(self._known, hashes, state)

    def _note(self, known: bytearray, hashes: Sequence[bytes], state: int) -> None:
        numbers = self._contents.add(hashes)
        lacking = max(numbers, default=-1) + 1 - len(known)
        known.extend(bytes(max(0, lacking)))
        for number in numbers:
            known[number] = state

    def look(self, verify: Callable[[Shard], bool]) -> None:
        """Read what the shards hold; where ``verify(shard)``, spoiled rows become free slots."""
        found: list[NDArray[np.uint8]] = []
        self._free = []
        for shard in self._shards:
            with shard.open() as stream:
                sums, hashes = shard.read_keys(stream)
                own = self._alone or shard.rank == self._rank
                checked = verify(shard)
                good = shard.matching(stream, sums, hashes, self._stop) if checked else sums != 0
                spoiled = np.flatnonzero(~good & (shard.read_checksums(stream) != 0))
            found.append(hashes[good])
            if (checked or own) and len(spoiled):
                file = self._file(shard)
                file.clear(spoiled)
                file.sync()
                self._files.pop(shard.path).close()  # there may be thousands
            if own:
                self._free.append((shard, np.flatnonzero(~good)))
        self.close_full()
        known = bytearray()
        for part in found:
            table = part.tobytes()
            self._note(known, [table[i : i + 32] for i in range(0, len(table), 32)], _FOUND)
        self._known = known  # others may look without the lock from now on

    def new_among(self, hashes: Sequence[bytes]) -> NDArray[np.int64]:
        """Positions of the hashes that are not there, each hash once."""
        first = {sha: i for i, sha in reversed(list(enumerate(hashes)))}
        states = self.states(hashes)
        return np.array(
            [i for i, sha in enumerate(hashes) if first[sha] == i and states[i] == _NONE], np.int64
        )

    def make_room(self, count: int) -> None:
        """Make new shards until ``count`` slots are free."""
        while sum(len(slots) for _, slots in self._free) < count:
            shard = self._new_shard()
            self._shards.append(shard)
            self._free.append((shard, np.arange(shard.rows)))

    def _new_shard(self) -> Shard:
        path, key = self._store.path, (self.spec.name, self._rank)
        ranges = read_ranges(path)
        first, end = ranges.get(key, (0, 0))
        number = max([end, *(s.number + 1 for s in self._shards if s.rank == self._rank)])
        name = shard_name(self.spec.name, self._rank, number)
        shard = create_shard(path / name, self.spec, self._store.fingerprint_id)
        try:
            write_ranges(path, self._rank, {**ranges, key: (first, number + 1)})
        except BaseException:
            if number >= read_ranges(path).get(key, (0, 0))[1]:  # else it is listed: a sync failed
                shard.path.unlink()
            raise
        return shard

    def write(self, hashes: Sequence[bytes], rows: NDArray[Any]) -> Iterator[ShardWriter]:
        """Put rows into free slots; gives the files to sync, one after the other."""
        table = np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 32)
        done = 0
        while done < len(hashes):
            shard, slots = self._free[0]
            part = slots[: len(hashes) - done]
            if len(part) == len(slots):
                self._free.pop(0)
            else:
                self._free[0] = (shard, slots[len(part) :])
            if len(part):
                end = done + len(part)
                file = self._file(shard)
                file.write(part, table[done:end], rows[done:end])
                done = end
                yield file

    def close_full(self) -> None:
        """Close the files in which no slot is free."""
        self._free = [(shard, slots) for shard, slots in self._free if len(slots)]
        open_ones = {shard.path for shard, _ in self._free}
        for path in [p for p in self._files if p not in open_ones]:
            self._files.pop(path).close()

    def close(self) -> None:
        """Close all files."""
        while self._files:
            self._files.popitem()[1].close()

    def _file(self, shard: Shard) -> ShardWriter:
        if shard.path not in self._files:
            self._files[shard.path] = ShardWriter(shard)
        return self._files[shard.path]


def _check_rows(spec: SeriesSpec, rows: NDArray[Any], hashes: Sequence[bytes]) -> None:
    if rows.shape != (len(hashes), *spec.shape) or rows.dtype != np.dtype(spec.dtype):
        raise ValueError(
            f"{spec.name}: rows of {rows.shape} {rows.dtype} where ({len(hashes)}, "
            f"{', '.join(map(str, spec.shape))}) {spec.dtype} belong"
        )
    if any(len(sha) != 32 for sha in hashes):
        raise ValueError("a content hash has 32 bytes")
    if not np.isfinite(rows).all():
        raise ValueError(f"{spec.name}: a feature is not finite")
