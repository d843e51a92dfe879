"""Writing to a feature store: one run at a time, every batch durable before the next begins."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mirip_fast.errors import StoreError, StoreLockedError
from mirip_fast.features.shards import SeriesSpec, Shard, create_shard, shard_name, sync
from mirip_fast.features.store import DIRTY_FILE, find_shards
from mirip_fast.files import disk_full, fsync_folder, is_disk_full
from mirip_fast.runtime import rank

if TYPE_CHECKING:
    from mirip_fast.features.store import FeatureStore

LOCK_FILE = "LOCK"


class StoreWriter:
    """Appends rows; holds the store's lock until it is closed.

    On opening, every row's checksum is verified: rows that a kill or a power loss spoiled are free again,
    so that exactly what is missing gets computed.

    Args:
        store: the store to write to.
        command: what is running, for whoever finds the store locked.

    Raises:
        StoreLockedError: another run writes; names it. Nothing was changed.
    """

    def __init__(self, store: FeatureStore, command: str = ""):
        self.store = store
        self._stack = ExitStack()
        self._series: dict[str, _Series] = {}
        self._dirty = (store.path / DIRTY_FILE).exists()  # left by a run that was killed
        try:
            self._stack.enter_context(_lock(store.path, command))
            for partial in store.path.glob(".*.partial"):
                partial.unlink(missing_ok=True)
            for name, shards in find_shards(store.path, store.fingerprint_id).items():
                self._series[name] = _Series(self, shards[0].spec, shards)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the shards and give the lock back. Committed rows need no closing."""
        if self._dirty:
            (self.store.path / DIRTY_FILE).unlink(missing_ok=True)
            fsync_folder(self.store.path)
            self._dirty = False
        self._stack.close()

    def missing(self, series: str, hashes: Sequence[bytes]) -> NDArray[np.bool_]:
        """[n]: whether each content hash has no verified row in the series."""
        known = self._series[series].hashes if series in self._series else set()
        return np.array([sha not in known for sha in hashes], dtype=bool)

    def append(self, hashes: Sequence[bytes], features: Mapping[SeriesSpec, NDArray[Any]]) -> None:
        """Write one batch to one or more series; durable when this returns.

        Args:
            hashes: n content hashes of 32 bytes.
            features: per series [n, *shape] in the stored number format, finite.

        Raises:
            ValueError: another shape or number format, or a number that is not finite.
            DiskFullError: a new shard does not fit; batches before this one stay.
        """
        for spec, rows in features.items():
            _check_rows(spec, rows, hashes)
        self._mark_dirty()
        for spec, rows in features.items():
            series = self._series.get(spec.name)
            if series is None:
                series = self._series[spec.name] = _Series(self, spec, [])
            if series.spec != spec:
                raise StoreError(
                    f"{self.store.path}: series {spec.name} holds {series.spec.shape} "
                    f"{series.spec.dtype}, not {spec.shape} {spec.dtype}"
                )
            series.append(hashes, rows)

    def _mark_dirty(self) -> None:
        """Tell readers that come after a crash to verify checksums."""
        if not self._dirty:
            (self.store.path / DIRTY_FILE).touch()
            fsync_folder(self.store.path)
            self._dirty = True

    def open_for_writing(self, path: Path) -> int:
        """A file handle that is closed with the writer."""
        handle = os.open(path, os.O_RDWR)
        self._stack.callback(os.close, handle)
        return handle


class _Series:
    """The shards of one series and their free slots."""

    def __init__(self, writer: StoreWriter, spec: SeriesSpec, shards: Sequence[Shard]):
        self.writer, self.spec = writer, spec
        self.hashes: set[bytes] = set()
        self._open: list[
            tuple[Shard, int, list[int]]
        ] = []  # shard, handle, free slots (descending)
        self._next_number = 0
        own = f"-r{rank():02d}-"
        for shard in shards:
            valid = shard.valid()
            hashes = shard.sha256()
            self.hashes.update(hashes[slot].tobytes() for slot in np.flatnonzero(valid))
            if own in shard.path.name:
                self._next_number += 1
                self._reclaim(shard, valid)

    def _reclaim(self, shard: Shard, valid: NDArray[np.bool_]) -> None:
        """Free every slot that holds no valid row."""
        free = np.flatnonzero(~valid)
        if not len(free):
            return
        handle = self.writer.open_for_writing(shard.path)
        spoiled = np.flatnonzero(~valid & (shard.checksums() != 0))
        if len(spoiled):
            shard.clear_rows(handle, spoiled)
            sync(handle)
        self._open.append((shard, handle, free[::-1].tolist()))

    def append(self, hashes: Sequence[bytes], features: NDArray[Any]) -> None:
        done = 0
        while done < len(hashes):
            shard, handle, free = self._with_room()
            count = min(len(free), len(hashes) - done)
            slots = np.array([free.pop() for _ in range(count)], dtype=np.int64)
            part = slice(done, done + count)
            try:
                shard.write_rows(handle, slots, hashes[part], features[part])
                sync(handle)
            except OSError as error:
                if is_disk_full(error):
                    raise disk_full(shard.path) from error
                raise
            done += count
        self.hashes.update(hashes)

    def _with_room(self) -> tuple[Shard, int, list[int]]:
        for item in self._open:
            if item[2]:
                return item
        path = self.writer.store.path / shard_name(self.spec.name, rank(), self._next_number)
        shard = create_shard(path, self.spec, self.writer.store.fingerprint_id)
        self._next_number += 1
        handle = self.writer.open_for_writing(shard.path)
        item = (shard, handle, list(range(shard.rows - 1, -1, -1)))
        self._open = [item]
        return item


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


def _lock(path: Path, command: str) -> IO[bytes]:
    """Take the store's lock and write into it who holds it; closing the file gives it back."""
    stream = (path / LOCK_FILE).open("a+b")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.seek(0)
        who = _who(stream.read())
        stream.close()
        raise StoreLockedError(
            f"{path} is being written to by {who}. Nothing was changed; wait for it, or stop it "
            "(what it committed stays) and run the same command again."
        ) from None
    except BaseException:
        stream.close()
        raise
    stream.truncate(0)
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": started,
        "command": command,
    }
    stream.write(json.dumps(holder).encode())
    stream.flush()
    return stream


def _who(content: bytes) -> str:
    try:
        holder = json.loads(content)
        what = f" ({holder['command']})" if holder.get("command") else ""
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}{what}"
    except (ValueError, KeyError, TypeError):
        return "another process"
