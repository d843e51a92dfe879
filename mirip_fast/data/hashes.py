"""The SHA-256 of files, remembered between runs so that an unchanged file is not read again."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import sqlite3
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from mirip_fast.data.image_files import (
    MAX_FILE_BYTES,
    Stamp,
    one_line,
    open_image_file,
    settled_stamp,
    stamp_of,
)
from mirip_fast.data.sources import piece_of
from mirip_fast.errors import ImageError
from mirip_fast.runtime import Closing, usable_cores

log = logging.getLogger(__name__)

_READ_BYTES = 1 << 20
_PATHS_PER_QUERY = 500  # SQLite takes at least 999 parameters
_ROWS_PER_COMMIT = 2000
_BUSY_SECONDS = 10.0
_CREATE = (
    "CREATE TABLE sha256_v1 "
    "(path BLOB PRIMARY KEY, size INTEGER, mtime_ns INTEGER, sha256 BLOB) WITHOUT ROWID"
)
_QUERY_SECONDS = (
    20.0  # a query takes milliseconds; of a file that somebody made it may take for ever
)
_STEPS = 100_000  # of SQLite between two looks at the clock

_Known = dict[bytes, tuple[Stamp, bytes]]


class HashMemory(Closing):
    """SHA-256 of files, with a small SQLite file that remembers them by (absolute path, size, mtime).

    It is a shortcut only: when its file cannot be read or written, or another process keeps it busy,
    one warning is logged and hashes are remembered in memory alone. A damaged file, or one that holds
    anything but this table (a view, a trigger, texts for hashes), is put aside and begun anew. Hashes are
    written in batches; after a kill those of the last batch are computed again. May be used from several
    threads, and by several processes at once. A context manager.

    Args:
        path: the SQLite file, made if missing; None remembers in memory alone.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lock = threading.RLock()
        self._fresh: _Known = {}  # not written yet, or not writable
        self._unsaved: set[bytes] = set()
        self._database: sqlite3.Connection | None = None
        if path is not None:
            self._guarded(self._connect)

    def close(self) -> None:
        """Write what is not written yet and let go of the file."""
        with self._lock:
            self._guarded(self._save)
            self._close_quietly()

    def sha256(self, path: Path, *, rehash: bool = False) -> bytes:
        """The SHA-256 of a file of any size, 32 bytes.

        Args:
            path: a regular file or a link to one.
            rehash: read the file even if its hash is remembered.

        Raises:
            ImageError: the file cannot be read, is empty, or changed meanwhile.
        """
        known = None if rehash else next(self.recall_many([path]))
        return known or self._read(path, None)

    def sha256_many(
        self, paths: Iterable[Path], *, threads: int | None = None, rehash: bool = False
    ) -> Iterator[bytes | ImageError]:
        """The SHA-256 of many image files, in order.

        Args:
            paths: taken lazily, a few hundred ahead.
            threads: how many files are read at once; None takes one per usable core.
            rehash: read every file, also those whose hash is remembered.

        Yields:
            32 bytes each; or the error, not raised, for a file that is no readable image file.
        """
        waiting: deque[bytes | Future[bytes]] = deque()
        with ThreadPoolExecutor(threads or usable_cores(), "mirip-hash") as pool:
            try:
                for chunk in _chunks(paths):
                    known = [None] * len(chunk) if rehash else self.recall_many(chunk)
                    for path, sha in zip(chunk, known, strict=True):
                        waiting.append(sha or pool.submit(self._read, path, MAX_FILE_BYTES))
                    while len(waiting) > _PATHS_PER_QUERY:
                        yield _value(waiting.popleft())
                while waiting:
                    yield _value(waiting.popleft())
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def recall_many(self, paths: Iterable[Path]) -> Iterator[bytes | None]:
        """What is remembered of many files, in order, without reading any of them.

        Args:
            paths: taken lazily, a few hundred at a time.

        Yields:
            32 bytes for a file that still has its remembered size and time, else None.
        """
        for chunk in _chunks(paths):
            keys = [_key(path) for path in chunk]
            known = self._recall(keys)
            for path, key in zip(chunk, keys, strict=True):
                stamp, sha = known.get(key, (None, None))
                yield sha if sha and _stamp_now(path) == stamp else None

    def remember(self, path: Path, sha256: bytes, stamp: Stamp) -> None:
        """Keep a hash that was computed elsewhere.

        Args:
            path: the file.
            sha256: of its content, 32 bytes.
            stamp: from :func:`mirip_fast.data.image_files.settled_stamp`.
        """
        with self._lock:
            self._fresh[_key(path)] = (stamp, sha256)
            self._unsaved.add(_key(path))
            if len(self._unsaved) >= _ROWS_PER_COMMIT:
                self._guarded(self._save)

    def _read(self, path: Path, max_bytes: int | None) -> bytes:
        """Hash a file; it is remembered unless it is too young for that."""
        if piece := piece_of(path):
            data, stamp = piece.read()
            digest = hashlib.sha256(data).digest()
        else:
            digest, stamp = _hash_file(path, max_bytes)
        if stamp is not None:
            self.remember(path, digest, stamp)
        return digest

    def _recall(self, keys: Sequence[bytes]) -> _Known:
        """What is remembered of at most ``_PATHS_PER_QUERY`` paths."""
        known: _Known = {}

        def query() -> None:
            if self._database is not None:
                marks = ",".join("?" * len(keys))
                rows = self._query(
                    f"SELECT path, size, mtime_ns, sha256 FROM sha256_v1 WHERE path IN ({marks})",
                    keys,
                )
                for path, size, mtime, sha in rows:
                    kinds = [*map(type, (path, size, mtime, sha))]
                    if kinds != [bytes, int, int, bytes] or len(sha) != 32:
                        raise sqlite3.DatabaseError(f"a hash is {sha!r}")
                    known[path] = ((size, mtime), sha)

        with self._lock:
            self._guarded(query)
            known.update({key: self._fresh[key] for key in keys if key in self._fresh})
        return known

    def _connect(self) -> None:
        assert self._path is not None
        self._close_quietly()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        for name in ("", "-journal", "-wal", "-shm"):  # SQLite would wait for a pipe
            file = self._path.with_name(self._path.name + name)
            if os.path.lexists(file) and not stat.S_ISREG(file.lstat().st_mode):
                raise OSError(f"{file.name} is no regular file")
        # One connection for all threads, as the lock lets one at a time use it.
        self._database = sqlite3.connect(
            self._path, timeout=_BUSY_SECONDS, check_same_thread=False, isolation_level=None
        )
        # A kill loses nothing; a power loss may lose the last batch but damages nothing.
        self._database.execute("PRAGMA synchronous = NORMAL")
        made = self._query("SELECT type, name, sql FROM sqlite_master LIMIT 2").fetchall()
        if not made:
            self._database.execute(_CREATE.replace("TABLE", "TABLE IF NOT EXISTS"))
        elif made != [("table", "sha256_v1", _CREATE)]:
            raise sqlite3.DatabaseError("it holds something else")
        self._database.execute("PRAGMA query_only = ON")  # but for what is new, see _save

    def _query(self, text: str, values: Sequence[bytes] = ()) -> sqlite3.Cursor:
        """Ask the file, for so long as a sound one may take."""
        assert self._database is not None
        until = time.monotonic() + _QUERY_SECONDS
        self._database.set_progress_handler(lambda: time.monotonic() > until, _STEPS)
        return self._database.execute(text, values)

    def _save(self) -> None:
        if self._database is None or not self._unsaved:
            return
        rows = [(key, *self._fresh[key][0], self._fresh[key][1]) for key in self._unsaved]
        self._database.execute("PRAGMA query_only = OFF")
        try:
            self._database.execute("BEGIN IMMEDIATE")
            self._database.executemany("INSERT OR REPLACE INTO sha256_v1 VALUES (?, ?, ?, ?)", rows)
            self._database.execute("COMMIT")
        except BaseException:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            raise
        finally:
            self._database.execute("PRAGMA query_only = ON")
        self._fresh.clear()
        self._unsaved.clear()

    def _guarded(self, work: Callable[[], None]) -> None:
        """Do ``work`` on the file; go on without the file where that fails."""
        with self._lock:
            try:
                try:
                    work()
                except sqlite3.OperationalError:
                    raise  # busy, read-only, full, …: the file itself is sound
                except sqlite3.DatabaseError:
                    self._put_aside()
                    self._connect()
                    work()
            except (sqlite3.Error, OSError) as error:
                self._give_up(error)

    def _put_aside(self) -> None:
        assert self._path is not None
        self._close_quietly()
        aside = self._path.with_name(self._path.name + ".damaged")
        self._path.replace(aside)
        log.warning(
            "%s was damaged; it lies as %s now, and files are hashed anew", self._path, aside.name
        )

    def _give_up(self, error: Exception) -> None:
        self._close_quietly()
        log.warning(
            "Hashes of files are not remembered between runs: %s cannot be used (%s)",
            self._path,
            one_line(str(error)),
        )

    def _close_quietly(self) -> None:
        if self._database is not None:
            with suppress(sqlite3.Error):
                self._database.close()
            self._database = None


def _value(found: bytes | Future[bytes]) -> bytes | ImageError:
    try:
        return found if isinstance(found, bytes) else found.result()
    except ImageError as error:
        return error


def _key(path: Path) -> bytes:
    return os.fsencode(os.path.abspath(path))  # noqa: PTH100 - links are not resolved


def _chunks(paths: Iterable[Path]) -> Iterator[list[Path]]:
    iterator = iter(paths)
    while chunk := list(itertools.islice(iterator, _PATHS_PER_QUERY)):
        yield chunk


def _stamp_now(path: Path) -> Stamp | None:
    try:
        return stamp_of(path.stat())
    except (OSError, ValueError):  # no file of its own; or reading it will tell why
        with suppress(ImageError):
            if piece := piece_of(path):
                return piece.stamp
        return None


def _hash_file(path: Path, max_bytes: int | None) -> tuple[bytes, Stamp | None]:
    now, sha, size = time.time_ns(), hashlib.sha256(), 0
    with open_image_file(path, max_bytes=max_bytes) as stream:
        before = os.fstat(stream.fileno())
        try:
            while block := stream.read(_READ_BYTES):
                sha.update(block)
                size += len(block)
        except OSError as error:
            raise ImageError(one_line(error.strerror or str(error))) from error
        after = os.fstat(stream.fileno())
    if stamp_of(after) != stamp_of(before) or size != before.st_size:
        raise ImageError("the file changed while it was being read")
    return sha.digest(), settled_stamp(after, now)
