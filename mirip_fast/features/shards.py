"""Shards: plain HDF5 files of a fixed number of rows, which are written in place.

A shard's HDF5 bookkeeping never changes after it was made, so its rows are plain bytes at known offsets:
``features`` (rows, \\*shape), ``sha256`` (rows, 32) uint8 of the image's bytes, ``checksum`` (rows,) uint64.
All blocks are reserved when the file is made, so that a full disk is an error then and not half a row
later. A crash can tear rows that were being written, never anything else. A row exists only if its checksum
is not 0, and is right only if the checksum matches. This is the only module that imports h5py.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np
from numpy.typing import NDArray

from mirip_fast.errors import StoppedError, StoreError
from mirip_fast.files import disk_full, fsync_folder, is_disk_full, open_regular, partial_path

SCHEMA = 1
_SHA_BYTES = 32
_DATASETS = ("features", "sha256", "checksum")
_MOST_ROWS = 4096  # of any shard that a version with this schema wrote
_HEADER_BYTES = 16 << 10  # HDF5's bookkeeping and the gaps between datasets are less
_MAX_SHARD_BYTES = 256 << 20
_MAX_ROWS = 4096
_DTYPES = ("float16", "float32")
_SERIES = re.compile(r"[a-z0-9][a-z0-9.+_-]*")
_NAME = re.compile(rf"(?P<series>{_SERIES.pattern})-r(?P<part>\d{{2,}})-(?P<number>\d{{5,7}})\.h5")
_VERIFY_BYTES = 16 << 20  # verified at once


@dataclass(frozen=True)
class SeriesSpec:
    """One kind of feature of one view: its name, the shape of a row, and the stored number format.

    Raises:
        ValueError: a name, shape or number format that cannot be stored.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str  # float16 or float32

    def __post_init__(self) -> None:
        if not _SERIES.fullmatch(self.name) or len(self.name) > 200:
            raise ValueError(f"series name {self.name!r}: a-z 0-9 . + _ - only, 200 at most")
        if not self.shape or not all(n > 0 for n in self.shape):
            raise ValueError(f"series {self.name}: a row of shape {self.shape} cannot be stored")
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


def shard_name(series: str, part: int, number: int) -> str:
    """``cls.756-r00-00000.h5``: the series, the part, and a running number."""
    return f"{series}-r{part:02d}-{number:05d}.h5"


def parse_shard_name(name: str) -> tuple[str, int, int] | None:
    """(series, part, number) of a shard's file name, or None for another file."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    parts = (match["series"], int(match["part"]), int(match["number"]))
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
    def part(self) -> int:
        """Which part of the store it belongs to: 0 for a run alone, n + 1 for process n of several."""
        return int(self.path.name.rsplit("-", 2)[1][1:])

    @property
    def number(self) -> int:
        """Its number among the shards of that part."""
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
            raise StoreError(f"{self.path} cannot be read: {error}") from error

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
    """The error for a shard that cannot be opened just now; it may well be whole."""
    hint = "look after the disk and run the same command again"
    if isinstance(error, FileNotFoundError):
        hint = "if the cache was pruned meanwhile, run the same command again"
    elif isinstance(error, PermissionError):
        hint = "let this user read it (`ls -l` shows whose it is)"
    elif error.errno in (errno.EMFILE, errno.ENFILE):
        hint = "allow more of them (`ulimit -n 4096`) and run the same command again"
    return StoreError(f"{path} cannot be read ({error.strerror}): {hint}.")


class ShardWriter:
    """Writes rows of one shard in place. Nothing is durable before :meth:`sync` returns."""

    def __init__(self, shard: Shard):
        self.shard = shard
        self._handle = os.open(shard.path, os.O_RDWR | getattr(os, "O_BINARY", 0))

    def write(
        self, slots: NDArray[np.int64], hashes: NDArray[np.uint8], features: NDArray[Any]
    ) -> NDArray[np.uint64]:
        """Write features [n, \\*shape] and content hashes [n, 32] into ascending slots [n]; their checksums.

        The checksums come last: a reader that sees a checksum sees the whole row.
        """
        shard = self.shard
        sums = row_checksums(shard.spec.name, hashes, features)
        self._write_runs(slots, features, shard.features_at)
        self._write_runs(slots, hashes, shard.sha256_at)
        self._write_runs(slots, sums, shard.checksum_at)
        return sums

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
        series: name of the series (so that a row cannot pass for one of another series).
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


def create_shard(path: Path, spec: SeriesSpec, fingerprint_id: str) -> Shard:
    """Make an empty shard: all its blocks are reserved and on the disk before it gets its name.

    Raises:
        DiskFullError: there is no room for the whole shard; nothing is left behind.
        StoreError: the name is taken.
    """
    if path.exists():
        raise StoreError(f"{path} is there already; it was not touched")
    rows, partial = spec.shard_rows, partial_path(path)
    about = {"schema": SCHEMA, "series": spec.name, "fingerprint": fingerprint_id, "rows": rows}
    with _new_file(partial, path, shard_bytes(spec)) as file:
        file.attrs.update(about)
        _reserve(file, "features", (rows, *spec.shape), spec.dtype)
        _reserve(file, "sha256", (rows, _SHA_BYTES), "u1")
        _reserve(file, "checksum", (rows,), "u8")
    partial.rename(path)
    fsync_folder(path.parent)
    return open_shard(path, fingerprint_id)


def shard_bytes(spec: SeriesSpec) -> int:
    """The size that a new shard's file has at most: that of all its rows, from the beginning."""
    return _HEADER_BYTES + spec.shard_rows * (spec.row_bytes + _SHA_BYTES + 8)


def _reserve(file: h5py.File, name: str, shape: tuple[int, ...], dtype: str) -> None:
    """Make a contiguous dataset whose place in the file is fixed at once."""
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_layout(h5py.h5d.CONTIGUOUS)
    settings.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    settings.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    settings.set_obj_track_times(False)  # the same shard is the same bytes, whenever it is made
    parents = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    parents.set_create_intermediate_group(True)
    stored = h5py.h5t.py_create(np.dtype(dtype).newbyteorder("<"), logical=True)
    h5py.h5d.create(
        file.id, name.encode(), stored, h5py.h5s.create_simple(shape), settings, parents
    )


@contextlib.contextmanager
def _new_file(partial: Path, path: Path, size: int) -> Iterator[h5py.File]:
    """Make an HDF5 file; when the block ends every block is reserved and on the disk. A failure removes it.

    Args:
        partial: the file to make.
        path: its later name, for messages.
        size: bytes that it will have at most.

    Raises:
        DiskFullError: there is no room for it.
    """
    if shutil.disk_usage(path.parent).free < size:
        raise disk_full(path, size)
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)
    try:
        handle = os.open(partial, flags, 0o666)
        try:
            _allocate(handle, size)  # HDF5 should not be the one to meet a full disk
            # "earliest" is the form that every HDF5 program knows; arrays begin at pages.
            with h5py.File(
                partial, "w", libver="earliest", alignment_threshold=2048,
                alignment_interval=4096, locking=False,
            ) as file:  # fmt: skip
                yield file
            _allocate(handle, os.fstat(handle).st_size)
            os.fsync(handle)
        finally:
            os.close(handle)
    except BaseException as error:
        with contextlib.suppress(OSError):  # the first error tells what is wrong
            partial.unlink(missing_ok=True)
        if is_disk_full(error):
            raise disk_full(path, size) from error
        raise


def _allocate(handle: int, size: int) -> None:
    """Reserve ``size`` bytes on the disk for a file; what is in it stays, holes read as zeros."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(handle, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
    for start in range(0, size, 1 << 20):  # macOS, Windows, some network file systems
        count = min(1 << 20, size - start)
        os.lseek(handle, start, os.SEEK_SET)
        write_at(handle, os.read(handle, count).ljust(count, b"\0"), start)


def open_shard(path: Path, fingerprint_id: str) -> Shard:
    """Check a shard file from outside and find its datasets; nothing in it is trusted.

    Raises:
        FileNotFoundError: it is not there.
        StoreError: not a shard of this store, cut short, or with anything but plain contiguous data
            (links, external storage, virtual datasets and filters are refused).
    """
    try:
        handle = open_regular(path)  # what the system has against it is no damage
        size = os.fstat(handle).st_size
        os.close(handle)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError:
        raise StoreError(f"{path} is no file; move it out of the store") from None
    try:
        with h5py.File(path, "r", locking=False) as file:
            return _check(path, file, fingerprint_id, size)
    except (StoreError, FileNotFoundError):
        raise
    except Exception as error:  # anything that HDF5 finds in a damaged file
        raise StoreError(f"{path} is no readable HDF5 shard: {error}") from error


def _check(path: Path, file: h5py.File, fingerprint_id: str, size: int) -> Shard:
    def refuse(what: str) -> StoreError:
        return StoreError(f"{path} is no shard of this store: {what}")

    name = parse_shard_name(path.name)
    series = _attribute(file, "series")
    if name is None or series != name[0]:
        raise refuse(f"its series is {series!r}")
    if (schema := _attribute(file, "schema")) != SCHEMA:
        raise refuse(f"its schema is {schema!r}, this version writes {SCHEMA}")
    if (fingerprint := _attribute(file, "fingerprint")) != fingerprint_id:
        raise refuse(f"its fingerprint is {fingerprint!r}, not {fingerprint_id!r}")
    datasets = {key: _plain_dataset(file, key, refuse) for key in _DATASETS}
    features = datasets["features"]
    dtype = next((d for d in ("float16", "float32") if _stores(features, d)), None)
    if dtype is None or features.rank < 2:
        raise refuse("its features are no rows of float16 or float32")
    try:
        spec = SeriesSpec(name[0], tuple(int(n) for n in features.shape[1:]), dtype)
    except ValueError as error:
        raise refuse(str(error)) from error
    rows = int(features.shape[0])
    if not 0 < rows <= _MOST_ROWS:
        raise refuse(f"it has {rows} rows")
    for key, shape, kind in (("sha256", (rows, _SHA_BYTES), "u1"), ("checksum", (rows,), "<u8")):
        if datasets[key].shape != shape or not _stores(datasets[key], kind):
            raise refuse(f"{key} is not {shape} of {np.dtype(kind)}")
    sizes = {"features": rows * spec.row_bytes, "sha256": rows * _SHA_BYTES, "checksum": rows * 8}
    base = file.id.get_create_plist().get_userblock()  # offsets are counted behind it
    at = {key: base + int(dataset.get_offset() or 0) for key, dataset in datasets.items()}
    end = 1  # no dataset begins at byte 0
    for key in sorted(_DATASETS, key=lambda key: at[key]):
        if at[key] < end:
            raise refuse(f"{key} has no place of its own")
        end = at[key] + sizes[key]
    if end > size:
        raise refuse(f"it is cut short ({size} bytes of {end})")
    return Shard(path, spec, rows, at["features"], at["sha256"], at["checksum"])


def _attribute(file: h5py.File, name: str) -> int | str | None:
    """A single number or short text; None for anything else."""
    if not h5py.h5a.exists(file.id, name.encode()):
        return None
    attribute = h5py.h5a.open(file.id, name.encode())
    kind = attribute.get_type()
    if attribute.shape != () or kind.get_size() > 1024:
        return None
    if not isinstance(kind, h5py.h5t.TypeIntegerID | h5py.h5t.TypeStringID):
        return None
    value = file.attrs[name]
    if isinstance(value, bytes):
        return value.decode("ascii", "replace")
    return value if isinstance(value, str) else int(value)


def _plain_dataset(file: h5py.File, name: str, refuse: Callable[[str], StoreError]) -> Any:
    """Open a dataset only if it lies, plainly stored, in this very file."""
    key = name.encode()
    if not file.id.links.exists(key) or file.id.links.get_info(key).type != h5py.h5l.TYPE_HARD:
        raise refuse(f"{name} is missing or a link")
    if h5py.h5o.get_info(file.id, key).type != h5py.h5o.TYPE_DATASET:
        raise refuse(f"{name} is no dataset")
    dataset = h5py.h5d.open(file.id, key)
    settings = dataset.get_create_plist()
    if (
        settings.get_layout() != h5py.h5d.CONTIGUOUS
        or settings.get_nfilters()
        or settings.get_external_count()
    ):
        raise refuse(f"{name} is not plain contiguous data")
    return dataset


def _stores(dataset: Any, dtype: str) -> bool:
    """Whether the stored number format is exactly this one, little-endian."""
    wanted = h5py.h5t.py_create(np.dtype(dtype).newbyteorder("<"), logical=True)
    return bool(dataset.get_type().equal(wanted))


def write_export(
    path: Path,
    features: Mapping[str, tuple[SeriesSpec, Iterable[NDArray[Any]]]],
    texts: Mapping[str, Sequence[bytes]],
    attributes: Mapping[str, str],
) -> None:
    """Write one plain HDF5 file for other programs; it appears whole or not at all.

    Args:
        path: the file; an older one is replaced.
        features: dataset name → its series and its rows, in pieces [n, \\*shape].
        texts: dataset name → one text per row, in UTF-8 (stored with a fixed length).
        attributes: of the file.

    Raises:
        DiskFullError: there is no room for it.
    """
    rows = len(next(iter(texts.values())))
    kinds = {
        name: h5py.string_dtype("utf-8", max([1, *map(len, values)]))
        for name, values in texts.items()
    }
    size = rows * sum(spec.row_bytes for spec, _ in features.values())
    size += rows * sum(kind.itemsize for kind in kinds.values())
    size += _HEADER_BYTES + sum(len(value.encode()) + 4096 for value in attributes.values())
    partial = partial_path(path)
    with _new_file(partial, path, size) as file:
        file.attrs.update(attributes)
        for name, (spec, pieces) in features.items():
            _reserve(file, name, (rows, *spec.shape), spec.dtype)
            done = 0
            for piece in pieces:
                file[name][done : done + len(piece)] = piece
                done += len(piece)
        for name, values in texts.items():
            file.create_dataset(name, data=np.array(values, kinds[name]), dtype=kinds[name])
    partial.replace(path)
    fsync_folder(path.parent)
