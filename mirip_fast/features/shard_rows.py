"""The rows of one shard: where they lie in the file, their checksums, reading and writing them in place.

A shard's HDF5 bookkeeping never changes after it was made, so its rows are plain bytes at known offsets:
``features`` (rows, \\*shape), ``sha256`` (rows, 32), ``checksum`` (rows,). A crash can tear rows that were
being written, never anything else. A row exists only if its checksum is not 0, and is right only if the
checksum matches.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from mirip_fast.errors import StoreError
from mirip_fast.features.stages import StoppedError
from mirip_fast.files import open_regular

_MAX_SHARD_BYTES = 256 << 20
_MAX_ROWS = 4096
_DTYPES = ("float16", "float32")
_SERIES = re.compile(r"[a-z0-9][a-z0-9.+_-]*")
_NAME = re.compile(rf"(?P<series>{_SERIES.pattern})-r(?P<rank>\d{{2,}})-(?P<number>\d{{5,7}})\.h5")
_VERIFY_BYTES = 16 << 20  # verified at once


@dataclass(frozen=True)
class SeriesSpec:
    """One kind of feature of one view: its name, the shape of a row, and the stored number format.

    Raises:
        ValueError: a name, shape or number format that can not be stored.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str  # float16 or float32

    def __post_init__(self) -> None:
        if not _SERIES.fullmatch(self.name) or len(self.name) > 200:
            raise ValueError(f"series name {self.name!r}: a-z 0-9 . + _ - only, 200 at most")
        if not self.shape or not all(n > 0 for n in self.shape):
            raise ValueError(f"series {self.name}: a row of shape {self.shape} can not be stored")
        if self.dtype not in _DTYPES:
            raise ValueError(f"series {self.name}: {self.dtype} is none of {', '.join(_DTYPES)}")

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of features."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def shard_rows(self) -> int:
        """Rows of one shard: at most 4096, and at most 256 MiB of features."""
        return min(_MAX_ROWS, max(1, _MAX_SHARD_BYTES // self.row_bytes))


def shard_name(series: str, rank: int, number: int) -> str:
    """``cls.756-r00-00000.h5``: the series, the process that writes it, and a running number."""
    return f"{series}-r{rank:02d}-{number:05d}.h5"


def parse_shard_name(name: str) -> tuple[str, int, int] | None:
    """(series, rank, number) of a shard's file name, or None for another file."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    parts = (match["series"], int(match["rank"]), int(match["number"]))
    return parts if shard_name(*parts) == name else None


@dataclass(frozen=True)
class Shard:
    """A checked shard file and where its datasets begin, in bytes. Holds no open file."""

    path: Path
    spec: SeriesSpec
    rows: int
    features_at: int
    sha256_at: int
    checksum_at: int

    @property
    def rank(self) -> int:
        """Number of the process that writes it."""
        return int(self.path.name.rsplit("-", 2)[1][1:])

    @property
    def number(self) -> int:
        """Its number among the shards of that process."""
        return int(self.path.name.rsplit("-", 1)[1][:-3])

    def open(self) -> IO[bytes]:
        """The file, for the ``read_…`` methods.

        Raises:
            StoreError: it is gone.
        """
        try:
            return os.fdopen(open_regular(self.path), "rb", buffering=0)
        except OSError as error:
            raise unreadable(self.path, error) from error
        except ValueError as error:
            raise StoreError(f"{self.path} can not be read: {error}") from error

    def read_features(self, stream: IO[bytes], start: int, out: NDArray[Any]) -> None:
        """Fill ``out`` [n, \\*shape], C-contiguous, with the rows from ``start`` on."""
        self._fill(stream, self.features_at + start * self.spec.row_bytes, out)

    def read_checksums(self, stream: IO[bytes]) -> NDArray[np.uint64]:
        """[rows]; 0 for an empty slot."""
        sums = np.empty(self.rows, "<u8")
        self._fill(stream, self.checksum_at, sums)
        return sums

    def read_keys(self, stream: IO[bytes]) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
        """Checksums [rows], 0 where there is no row, and the content hashes [rows, 32].

        While a writer is at work, a checksum that is there before and after the hash was read belongs
        to that hash. A checksum beside a hash of zeros is a flipped bit in an empty slot.
        """
        sums = self.read_checksums(stream)
        hashes = np.empty((self.rows, 32), np.uint8)
        self._fill(stream, self.sha256_at, hashes)
        sums[(sums != self.read_checksums(stream)) | ~hashes.any(axis=1)] = 0
        return sums, hashes

    def checksums(self) -> NDArray[np.uint64]:
        """[rows]; 0 for an empty slot."""
        with self.open() as stream:
            return self.read_checksums(stream)

    def sha256(self) -> NDArray[np.uint8]:
        """[rows, 32]: the content hashes, zeros for a slot that was never used."""
        hashes = np.empty((self.rows, 32), np.uint8)
        with self.open() as stream:
            self._fill(stream, self.sha256_at, hashes)
        return hashes

    def valid(self) -> NDArray[np.bool_]:
        """[rows]: whether each slot holds a row whose checksum matches its bytes."""
        with self.open() as stream:
            sums, hashes = self.read_keys(stream)
            return self.matching(stream, sums, hashes)

    def matching(
        self,
        stream: IO[bytes],
        sums: NDArray[np.uint64],
        hashes: NDArray[np.uint8],
        stop: threading.Event | None = None,
    ) -> NDArray[np.bool_]:
        """[rows]: whether each checksum is not 0 and matches the features in the file.

        Raises:
            StoppedError: ``stop`` was set meanwhile.
        """
        result = np.zeros(self.rows, dtype=bool)
        step = max(1, _VERIFY_BYTES // self.spec.row_bytes)
        for start, end in runs(np.flatnonzero(sums), step):
            if stop is not None and stop.is_set():
                raise StoppedError
            features = np.empty((end - start, *self.spec.shape), self.spec.dtype)
            self.read_features(stream, start, features)
            found = row_checksums(self.spec.name, hashes[start:end], features)
            result[start:end] = found == sums[start:end]
        return result

    def _fill(self, stream: IO[bytes], offset: int, out: NDArray[Any]) -> None:
        view = raw_bytes(out)
        stream.seek(offset)
        while view:
            count: int = stream.readinto(view)  # type: ignore[attr-defined]
            if not count:
                raise StoreError(f"{self.path} is cut short: put back a good copy of the file")
            view = view[count:]


def unreadable(path: Path, error: OSError) -> StoreError:
    """The error for a shard that can not be opened just now; it may well be whole."""
    hint = "look after the disk and run the same command again"
    if isinstance(error, FileNotFoundError):
        hint = "if the cache was pruned meanwhile, run the same command again"
    elif isinstance(error, PermissionError):
        hint = "let this user read it (`ls -l` shows whose it is)"
    elif error.errno in (errno.EMFILE, errno.ENFILE):
        hint = "allow more of them (`ulimit -n 4096`) and run the same command again"
    return StoreError(f"{path} can not be read ({error.strerror}): {hint}.")


class ShardWriter:
    """Writes rows of one shard in place. Nothing is durable before :meth:`sync` returns."""

    def __init__(self, shard: Shard):
        self.shard = shard
        self._handle = os.open(shard.path, os.O_RDWR | getattr(os, "O_BINARY", 0))

    def write(
        self, slots: NDArray[np.int64], hashes: NDArray[np.uint8], features: NDArray[Any]
    ) -> None:
        """Write features [n, \\*shape] and content hashes [n, 32] into ascending slots [n].

        The checksums come last: a reader that sees a checksum sees the whole row.
        """
        shard = self.shard
        sums = row_checksums(shard.spec.name, hashes, features)
        self._write_runs(slots, features, shard.features_at)
        self._write_runs(slots, hashes, shard.sha256_at)
        self._write_runs(slots, sums, shard.checksum_at)

    def clear(self, slots: NDArray[np.int64]) -> None:
        """Mark ascending slots as empty."""
        self._write_runs(slots, np.zeros(len(slots), "<u8"), self.shard.checksum_at)

    def sync(self) -> None:
        """Make what was written survive a power loss.

        Raises:
            OSError: it may not. The system's memory of the file is dropped then: after a failed write
                it may show rows that the disk does not have.
        """
        try:
            sync_data(self._handle)
        except OSError:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._handle, 0, 0, os.POSIX_FADV_DONTNEED)
            raise

    def close(self) -> None:
        """Close the file."""
        os.close(self._handle)

    def _write_runs(self, slots: NDArray[np.int64], array: NDArray[Any], offset: int) -> None:
        """Write ``array[i]`` at slot ``slots[i]``, neighbouring slots in one system call."""
        data = raw_bytes(np.ascontiguousarray(array))
        step, done = len(data) // max(1, len(slots)), 0
        for start, stop in runs(slots):
            size = (stop - start) * step
            write_at(self._handle, data[done : done + size], offset + start * step)
            done += size


def runs(slots: NDArray[np.int64], longest: int = _MAX_ROWS) -> Iterator[tuple[int, int]]:
    """The stretches (start, stop) of neighbours among ascending slots, none over ``longest``."""
    if not len(slots):
        return
    for part in np.split(slots, np.flatnonzero(np.diff(slots) != 1) + 1):
        first, end = int(part[0]), int(part[-1]) + 1
        for start in range(first, end, longest):
            yield start, min(start + longest, end)


def row_checksums(
    series: str, hashes: NDArray[np.uint8], features: NDArray[Any]
) -> NDArray[np.uint64]:
    """[n]: 64 bits of BLAKE2b over content hash, series name and feature bytes; never 0.

    Args:
        series: name of the series (so that a row can not pass for one of another series).
        hashes: [n, 32].
        features: [n, \\*shape] in the stored number format.
    """
    name = series.encode()
    empty = hashlib.blake2b(digest_size=8, person=name[:16])
    keys = raw_bytes(np.ascontiguousarray(hashes))
    data = raw_bytes(np.ascontiguousarray(features))
    step = len(data) // max(1, len(hashes))
    sums = np.empty(len(hashes), "<u8")
    for i in range(len(hashes)):
        digest = empty.copy()
        digest.update(bytes(keys[32 * i : 32 * i + 32]) + name)
        digest.update(data[step * i : step * i + step])
        sums[i] = int.from_bytes(digest.digest(), "little") or 1
    return sums


def raw_bytes(array: NDArray[Any]) -> memoryview:
    """The bytes of a C-contiguous array, not copied."""
    assert array.flags.c_contiguous
    return array.reshape(-1).view(np.uint8).data


def write_at(handle: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset`` of an open file."""
    view = memoryview(data)
    while view:
        if hasattr(os, "pwrite"):
            count = os.pwrite(handle, view, offset)
        else:  # Windows; each handle is used by one thread at a time
            os.lseek(handle, offset, os.SEEK_SET)
            count = os.write(handle, view)
        view, offset = view[count:], offset + count


def sync_data(handle: int) -> None:
    """Wait until an open file's bytes are on the disk."""
    with contextlib.suppress(ImportError):
        import fcntl

        if hasattr(fcntl, "F_FULLFSYNC"):  # macOS: fsync leaves the bytes in the drive's memory
            fcntl.fcntl(handle, fcntl.F_FULLFSYNC)
            return
    getattr(os, "fdatasync", os.fsync)(handle)
