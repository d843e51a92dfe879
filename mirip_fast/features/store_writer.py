"""Writing to a feature store: who may, and every batch durable before the next begins.

The lock lives in the system, not in the file, so that it is free the moment its holder dies. What is
written in the file tells others who holds it. A run alone holds ``LOCK`` exclusively. Processes that write
side by side share it, and each holds the lock of its own part (``LOCK-r01`` …); they need not know of each
other.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mirip_fast.errors import DiskFullError, StoreError, StoreLockedError
from mirip_fast.features.shards import SeriesSpec, Shard, ShardWriter, create_shard, shard_name
from mirip_fast.features.store import (
    DIRTY_FILE,
    STORE_FILE,
    FeatureStore,
    Series,
    clean_up,
    dirty_files,
    dirty_parts,
    listed,
    read_ranges,
    shard_files,
    write_ranges,
)
from mirip_fast.files import disk_full, fsync_folder, is_disk_full, open_regular, read_json
from mirip_fast.runtime import Closing

LOCK_FILE = "LOCK"
#: How long to look again where the file names a holder that is gone: the real one is about to sign.
_SIGNING_SECONDS = 2.0
_PAUSE = 0.005
_MOST_BYTES = 64 << 10  # of what is read of a lock's file
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
#: Written to before they are synced and closed: corrupt rows may lie in thousands of shards.
_FILES_AT_ONCE = 16


class StoreWriter(Closing):
    """Appends rows; holds the store's lock until it is closed. Several threads may use it.

    What is written the store knows at once.

    Rows that a kill or a power loss corrupt are found by their checksums and their slots used again, so
    that exactly what is missing gets computed. A run alone verifies a series when it first needs it, and
    everything after a crash. One of several processes verifies and writes its own part only, and what others
    left when they were killed it takes for missing.

    Args:
        store: the store to write to; its index knows each row once it is durable.
        command: what is running, for whoever finds the store locked.
        part: 0 for a run alone; n + 1 for process n of several.
        stop: once set, from any thread, verifying a large cache ends soon, by StoppedError.

    Attributes:
        cleared: damaged rows that were found and made free.

    Raises:
        StoreLockedError: another run writes; names it. Nothing was changed.
    """

    def __init__(
        self,
        store: FeatureStore,
        command: str = "",
        *,
        part: int = 0,
        stop: threading.Event | None = None,
    ):
        self.store, self.part, self.cleared = store, part, 0
        self._stop = stop or threading.Event()
        self._mutex = threading.RLock()
        self._marker = store.path / f"{DIRTY_FILE}-r{part:02d}"
        self._dirty = False
        self._broken = False  # a batch was broken off: what it wrote may not be on the disk
        #: By series that were verified.
        self._free: dict[str, list[tuple[int, NDArray[np.int64]]]] = {}
        self._files: dict[Path, ShardWriter] = {}
        self._lock = StoreLock(store.path, command, part)
        try:
            if not (store.path / STORE_FILE).exists():
                raise StoreError(f"{store.path} was pruned meanwhile; run the same command again")
            self._recover()
        except BaseException:
            self._release()
            raise

    def close(self) -> None:
        """Close the shards and give the lock back. Committed rows need no closing."""
        with self._mutex:
            if self._dirty and not self._broken:
                self._marker.unlink(missing_ok=True)
                fsync_folder(self.store.path)
            self._dirty = False
            self._release()

    def missing(self, series: str, hashes: Sequence[bytes]) -> NDArray[np.bool_]:
        """[n]: whether each content hash has no row in the series.

        The first call for a series verifies it; from then on ``store.rows`` tells the same.
        """
        self._check_open()
        if series not in self._free and series in self.store.series():
            with self._mutex:
                self._verify(series)
        return self.store.rows(series, hashes) < 0

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
        first = {sha: i for i, sha in reversed(list(enumerate(hashes)))}
        with self._mutex:
            self._check_open()
            if self._broken:
                raise StoreError(
                    f"{self.store.path}: an earlier write failed; open the store again"
                )
            jobs = []
            for spec, rows in features.items():
                index = self.store.indexes().setdefault(spec.name, self.store.new_index(spec))
                if index.spec != spec:
                    raise StoreError(
                        f"{self.store.path}: series {spec.name} holds {index.spec.shape} "
                        f"{index.spec.dtype}, not {spec.shape} {spec.dtype}"
                    )
                self._verify(spec.name)
                lacking = index.find(hashes) < 0
                new = [i for i, sha in enumerate(hashes) if lacking[i] and first[sha] == i]
                if new:
                    jobs.append((index, [hashes[i] for i in new], rows[new]))
            if jobs:
                with self._plain_errors():  # a full disk is found before anything is written
                    for index, sha, _ in jobs:
                        self._make_room(index, len(sha))
                    self._mark_dirty()
                self._broken = True
                with self._plain_errors():
                    written = [row for job in jobs for row in self._write(*job)]
                    self._sync()
                self._broken = False
                for series, i, slots, sums, sha in written:
                    series.add(i, slots, sums, sha)

    def copy(
        self,
        source: FeatureStore,
        spec: SeriesSpec,
        hashes: Sequence[bytes],
        progress: Callable[[int], None] = lambda _: None,
    ) -> int:
        """Append rows of another store, in its order, those that are finite; gives how many.

        Args:
            source: a store of the same fingerprint.
            spec: of the series.
            hashes: contents that have a row there.
            progress: called with the bytes copied, piece by piece.
        """
        rows = source.rows(spec.name, hashes)
        order = np.argsort(rows)
        names, done = [hashes[i] for i in order], 0
        before = self.store.count(spec.name)
        for piece in source.pieces(spec.name, rows[order]):
            finite = np.isfinite(piece.reshape(len(piece), -1)).all(axis=1)
            self.append(
                list(compress(names[done : done + len(piece)], finite)), {spec: piece[finite]}
            )
            done += len(piece)
            progress(piece.nbytes)
        return self.store.count(spec.name) - before

    def rewrite(self, source: FeatureStore, series: str, hashes: Sequence[bytes]) -> None:
        """Keep these rows of a series alone, in new shards of this part; the old ones are deleted.

        Killed at any step, the rows are there once or twice.

        Args:
            source: this store, as it is on the disk.
            series: one that is there.
            hashes: contents that have a row.

        Raises:
            DiskFullError: no room for them; nothing was changed.
        """
        path, indexes = self.store.path, self.store.indexes()
        before, ranges, old = indexes[series], read_ranges(path), source.shards(series)
        made = indexes[series] = self.store.new_index(before.spec)
        self._free[series] = []
        try:
            self.copy(source, before.spec, hashes)
        except BaseException:
            indexes[series] = before
            with contextlib.suppress(OSError, DiskFullError):  # else they stay beside the old ones
                write_ranges(path, self.part, ranges)
                for shard in made.shards:
                    shard.path.unlink()
            raise
        finally:
            del self._free[series]
            self._close_files()
        ranges = read_ranges(path)
        for shard in old:
            _, end = ranges.get((series, shard.part), (0, 0))
            ranges[series, shard.part] = (max(end, shard.number + 1),) * 2
        for part in [p for name, p in ranges if name == series]:
            ranges[series, part] = (ranges[series, part][1],) * 2
        if made.shards:
            ranges[series, self.part] = (made.shards[0].number, made.shards[-1].number + 1)
        # This part first: until the others' lists say so, their rows are only there twice.
        for part in sorted({p for _, p in ranges}, key=lambda part: (part != self.part, part)):
            write_ranges(path, part, ranges)
        for shard in old:
            shard.path.unlink()
        fsync_folder(path)

    def _check_open(self) -> None:
        if not self._lock.held:
            raise StoreError(f"{self.store.path}: this writer is closed")

    def _write(
        self, index: Series, hashes: list[bytes], rows: NDArray[Any]
    ) -> Iterator[tuple[Series, int, NDArray[np.int64], NDArray[np.uint64], list[bytes]]]:
        """Put rows into free slots; gives what to note in the index once they are durable."""
        table = np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 32)
        free, done = self._free[index.spec.name], 0
        while done < len(hashes):
            i, slots = free[0]
            part, left = slots[: len(hashes) - done], slots[len(hashes) - done :]
            free[:1] = [(i, left)] if len(left) else []
            end = done + len(part)
            sums = self._file(index.shards[i]).write(part, table[done:end], rows[done:end])
            yield index, i, part, sums, hashes[done:end]
            done = end
            if len(self._files) >= _FILES_AT_ONCE:
                self._sync()

    def _sync(self) -> None:
        """Make what was written durable, and close what has no free slot."""
        for file in self._files.values():
            file.sync()
        known = self.store.indexes()
        open_ones = {known[n].shards[free[0][0]].path for n, free in self._free.items() if free}
        for path in [path for path in self._files if path not in open_ones]:
            self._files.pop(path).close()

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

    def _recover(self) -> None:
        """Bring in order what a crash left, and look what is there."""
        path = self.store.path
        clean_up(path, self.part or None)
        self.store.refresh()
        markers = [m for m in dirty_files(path) if not self.part or m == self._marker]
        if markers:
            for name in self.store.series():
                self._verify(name)
            for marker in markers:
                marker.unlink(missing_ok=True)
            fsync_folder(path)

    def _verify(self, name: str) -> None:
        """Check a series' rows, once; corrupt ones of our parts become free slots."""
        if name in self._free:
            return
        index = self.store.indexes()[name]
        dirty, free = dirty_parts(self.store.path), []
        for i in index.live:
            shard = index.shards[i]
            own = self.part in (0, shard.part)
            with shard.open() as stream:
                sums, hashes = shard.read_keys(stream)
                if own or dirty(shard):
                    sums[~shard.matching(stream, sums, hashes, self._stop)] = 0
                corrupt = np.flatnonzero((sums == 0) & (shard.read_checksums(stream) != 0))
            index.set_keys(i, sums, hashes)
            if own and len(corrupt):
                self.cleared += len(corrupt)
                with contextlib.closing(ShardWriter(shard)) as file:
                    file.clear(corrupt)
                    file.sync()
            if own and not sums.all():
                free.append((i, np.flatnonzero(sums == 0)))
        index.sort()
        self._free[name] = free

    def _make_room(self, index: Series, count: int) -> None:
        """Make new shards until ``count`` slots are free."""
        path, key = self.store.path, (index.spec.name, self.part)
        free = self._free[index.spec.name]
        while sum(len(slots) for _, slots in free) < count:
            ranges = read_ranges(path)
            first, end = ranges.get(key, (0, 0))
            number = max([end, *(n + 1 for n in shard_files(path).get(key, ()))])
            name = shard_name(index.spec.name, self.part, number)
            shard = create_shard(path / name, index.spec, self.store.fingerprint_id)
            try:
                write_ranges(path, self.part, {**ranges, key: (first, number + 1)})
            except BaseException:
                if number >= read_ranges(path).get(key, (0, 0))[1]:  # else listed: a sync failed
                    shard.path.unlink()
                raise
            index.live.append(index.add_shard(shard))
            free.append((index.live[-1], np.arange(shard.rows)))

    def _mark_dirty(self) -> None:
        """Tell readers that come after a crash to verify checksums."""
        if not self._dirty:
            handle = os.open(self._marker, os.O_WRONLY | os.O_CREAT | _NO_LINK, 0o666)
            os.fsync(handle)
            os.close(handle)
            fsync_folder(self.store.path)
            self._dirty = True

    def _file(self, shard: Shard) -> ShardWriter:
        if shard.path not in self._files:
            self._files[shard.path] = ShardWriter(shard)
        return self._files[shard.path]

    def _close_files(self) -> None:
        while self._files:
            self._files.popitem()[1].close()

    def _release(self) -> None:
        self._close_files()
        self._lock.release()


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


class StoreLock:
    """The lock, held from the construction to :meth:`release`.

    Args:
        folder: the store's.
        command: what is running.
        part: 0 for a run alone, which keeps all others out; else the part that this process writes.

    Raises:
        StoreLockedError: another run has it; names it.
        StoreError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, command: str, part: int = 0):
        self._folder = folder
        self._handles: list[int] = []
        _held.add(self)
        try:
            if part:
                self._take(LOCK_FILE, shared=True)
            self._take(f"{LOCK_FILE}-r{part:02d}" if part else LOCK_FILE, shared=False)
            self._sign(command)
        except BaseException:
            self._close()
            raise

    @property
    def held(self) -> bool:
        """Whether this process has the lock."""
        return bool(self._handles)

    def release(self) -> None:
        """Give the lock back."""
        with contextlib.suppress(OSError, IndexError):
            os.ftruncate(self._handles[-1], 0)  # nobody else holds it: no name is left behind
        self._close()

    def _close(self) -> None:
        _held.discard(self)
        while self._handles:
            os.close(self._handles.pop())

    def _take(self, name: str, *, shared: bool) -> None:
        """Take a lock if it is free; who has it is waited for only until it has signed."""
        until = time.monotonic() + _SIGNING_SECONDS
        while True:
            handle = self._open(name)
            self._handles.append(handle)
            if _try_lock(handle, shared=shared):
                if _is_file(handle, self._folder / name):  # whole stores are pruned with their lock
                    return
            elif (
                (holder := _holder(self._folder)) and _seems_alive(holder)
            ) or time.monotonic() > until:
                own = "" if name == LOCK_FILE else " Each process of a run needs a RANK of its own."
                raise StoreLockedError(
                    f"{self._folder} is being written to by {_named(holder or {})}. Nothing was changed; "
                    "wait for it, or stop it (what it committed stays) and run the same command again."
                    f"{own}"
                )
            os.close(self._handles.pop())
            time.sleep(_PAUSE)

    def _sign(self, command: str) -> None:
        holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": command,
        }
        handle = self._handles[-1]
        try:
            os.ftruncate(handle, 0)
            os.lseek(handle, 0, os.SEEK_SET)
            os.write(handle, json.dumps(holder).encode())
        except OSError as error:
            if is_disk_full(error):
                raise disk_full(self._folder / LOCK_FILE) from error
            raise

    def _open(self, name: str) -> int:
        """Open a lock's file; links are not followed, since what the file holds is replaced."""
        file = self._folder / name
        try:
            handle = open_regular(file, os.O_RDWR | os.O_CREAT | _NO_LINK)
            if os.fstat(handle).st_nlink > 1 and not _is_ours(os.read(handle, _MOST_BYTES)):
                os.close(handle)
                raise ValueError("it is another name of a file that is no lock")
            return handle
        except ValueError as error:
            raise StoreError(
                f"{file} is no lock of mirip-fast ({error}). Remove it, and it is made anew."
            ) from error
        except OSError as error:
            if file.is_symlink():
                raise StoreError(
                    f"{file} is a link, and a lock is never one. Remove it, and it is made anew."
                ) from error
            if is_disk_full(error):
                raise disk_full(self._folder / name) from error
            raise StoreError(
                f"{self._folder} cannot be written to ({error.strerror}). The features in it can be "
                "read; to compute more, make it writable or give another --cache-dir."
            ) from error


def holder_of(folder: Path) -> str | None:
    """Who writes to a store at this moment, for people; None where nobody does."""
    try:
        holder = _holder(folder)
    except StoreError:
        return None  # without locks nobody writes
    return None if holder is None else _named(holder)


def _holder(folder: Path) -> dict[str, Any] | None:
    """What the first holder of a lock wrote into it; None where nobody holds one."""
    for file in listed(folder, f"{LOCK_FILE}*"):
        try:
            handle = open_regular(file)
        except (OSError, ValueError):
            continue
        try:
            if _try_lock(handle, shared=file.name == LOCK_FILE):
                continue
        finally:
            os.close(handle)
        try:
            return read_json(file, _MOST_BYTES)
        except (OSError, ValueError):
            return {}
    return None


def _is_file(handle: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except FileNotFoundError:
        return False


def _is_ours(content: bytes) -> bool:
    """Whether a lock's file holds what is written into one: nothing, or who holds it."""
    try:
        return not content or "pid" in json.loads(content)
    except (ValueError, RecursionError, TypeError):
        return False


def _named(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    what = f" ({holder['command']})" if holder.get("command") else ""
    return f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}{what}"


def _seems_alive(holder: dict[str, Any]) -> bool:
    """Whether the signed holder may be the real one: it lives, or is on another machine."""
    if holder.get("host") != socket.gethostname() or os.name == "nt":
        return True
    try:
        os.kill(int(holder.get("pid", 0)), 0)
    except (OSError, ValueError, TypeError) as error:
        return not isinstance(error, ProcessLookupError)
    return True


def _try_lock(handle: int, *, shared: bool) -> bool:
    """Take the lock of an open file; False where somebody else stands against it."""
    try:
        import fcntl
    except ImportError:  # Windows, where none can be shared
        import msvcrt

        os.lseek(handle, 1 << 30, os.SEEK_SET)  # beyond the text, which others must be able to read
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        except OSError:
            return False
        return True
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # a network file system without a lock service
        raise StoreError(
            f"the file system of the cache cannot lock files ({error.strerror}): two runs that write "
            "at once would not see each other. Mount it with locks, or give --cache-dir on a disk of "
            "this machine and join it later with `mirip-fast cache merge`."
        ) from error
    return True


#: Locks of this process. A forked child (a decode worker) must not keep them when this process dies.
_held: weakref.WeakSet[StoreLock] = weakref.WeakSet()


def _forget_in_child() -> None:
    for lock in list(_held):
        lock._close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
