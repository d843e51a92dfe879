"""One shard of a feature store: an HDF5 file of fixed shape whose rows are written in place.

This is the only module that imports h5py. A shard is made once, whole and zeroed, with its blocks
allocated; after that HDF5 only tells where the three datasets lie in the file, and rows are written there
with plain ``pwrite``. So a kill or a power loss can spoil rows in flight, never the file; any HDF5 program
reads it.

Datasets: ``features`` (rows, *shape), ``sha256`` (rows, 32) uint8 of the image's bytes, ``checksum``
(rows,) uint64. A row exists only if its checksum matches; 0 means that the slot is empty.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from mirip_fast.errors import StoreError
from mirip_fast.files import disk_full, fsync_folder, is_disk_full

SCHEMA = 1
_MAX_SHARD_BYTES = 256 << 20
_MAX_ROWS = 4096
_NAME = re.compile(r"(?P<series>[a-z0-9][a-z0-9.+_-]*)-r(?P<rank>\d{2,})-(?P<number>\d{5})\.h5")
_DTYPES = ("float16", "float32")
_SHA_BYTES = 32


@dataclass(frozen=True)
class SeriesSpec:
    """One kind of feature of one view: its name, the shape of a row, and the stored number format."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # float16 or float32

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of features."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize

    @property
    def shard_rows(self) -> int:
        """Rows of one shard: at most 4096, and at most 256 MiB of features."""
        return int(min(_MAX_ROWS, max(1, _MAX_SHARD_BYTES // self.row_bytes)))


@dataclass(frozen=True)
class Shard:
    """A checked shard file and where its datasets begin, in bytes."""

    path: Path
    spec: SeriesSpec
    features_at: int
    sha256_at: int
    checksum_at: int

    @property
    def rows(self) -> int:
        """Slots in this shard, filled or not."""
        return self.spec.shard_rows

    def features(self) -> NDArray[Any]:
        """[rows, *shape], mapped from the file, read-only."""
        return self._map(self.spec.dtype, self.features_at, (self.rows, *self.spec.shape))

    def sha256(self) -> NDArray[np.uint8]:
        """[rows, 32], mapped from the file, read-only."""
        return self._map("uint8", self.sha256_at, (self.rows, _SHA_BYTES))

    def checksums(self) -> NDArray[np.uint64]:
        """[rows], mapped from the file, read-only; 0 for an empty slot."""
        return self._map("uint64", self.checksum_at, (self.rows,))

    def _map(self, dtype: str, offset: int, shape: tuple[int, ...]) -> NDArray[Any]:
        return np.memmap(self.path, dtype=np.dtype(dtype), mode="r", offset=offset, shape=shape)

    def valid(self) -> NDArray[np.bool_]:
        """[rows]: whether each row's checksum matches its bytes."""
        checksums, hashes, features = self.checksums(), self.sha256(), self.features()
        result = np.zeros(self.rows, dtype=bool)
        for slot in np.flatnonzero(checksums):
            actual = row_checksum(self.spec.name, hashes[slot].tobytes(), features[slot].tobytes())
            result[slot] = actual == int(checksums[slot])
        return result

    def write_rows(
        self,
        handle: int,
        slots: NDArray[np.int64],
        hashes: Sequence[bytes],
        features: NDArray[Any],
    ) -> None:
        """Write rows in place; not durable before :func:`sync`.

        Features and hash first, the checksum last: a reader that sees a checksum sees the whole row.

        Args:
            handle: the shard, opened for writing.
            slots: [n] ascending slot numbers.
            hashes: n content hashes.
            features: [n, *shape], stored dtype.
        """
        sha = np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, _SHA_BYTES)
        sums = np.array(
            [
                row_checksum(self.spec.name, hashes[i], features[i].tobytes())
                for i in range(len(hashes))
            ],
            dtype="<u8",
        )
        for array, offset in (
            (features, self.features_at),
            (sha, self.sha256_at),
            (sums, self.checksum_at),
        ):
            _write_runs(handle, slots, np.ascontiguousarray(array), offset)

    def clear_rows(self, handle: int, slots: NDArray[np.int64]) -> None:
        """Mark slots as empty."""
        _write_runs(handle, slots, np.zeros(len(slots), "<u8"), self.checksum_at)


def row_checksum(series: str, sha256: bytes, features: bytes) -> int:
    """64 bits of BLAKE2b over series name, content hash and feature bytes; never 0."""
    digest = hashlib.blake2b(sha256, digest_size=8, person=series.encode()[:16])
    digest.update(series.encode())
    digest.update(features)
    return int.from_bytes(digest.digest(), "little") or 1


def shard_name(series: str, rank: int, number: int) -> str:
    """``cls.756-r00-00000.h5``: the series, the process that writes it, and a running number."""
    return f"{series}-r{rank:02d}-{number:05d}.h5"


def parse_shard_name(name: str) -> tuple[str, int, int] | None:
    """(series, rank, number) of a shard's file name, or None for another file."""
    match = _NAME.fullmatch(name)
    return (match["series"], int(match["rank"]), int(match["number"])) if match else None


def create_shard(path: Path, spec: SeriesSpec, fingerprint_id: str) -> Shard:
    """Make an empty shard: all its blocks are allocated and on disk before it gets its name.

    Raises:
        DiskFullError: there is no room for the whole shard; nothing is left behind.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    needed = spec.shard_rows * (spec.row_bytes + _SHA_BYTES + 8) + (64 << 10)
    try:
        # Ask for the room first: HDF5 reports a full disk late and not always by an exception.
        with partial.open("wb") as probe:
            _allocate(probe.fileno(), needed)
        _create_hdf5(partial, spec, fingerprint_id)
        with partial.open("r+b") as stream:
            _allocate(stream.fileno(), stream.seek(0, os.SEEK_END))
            os.fsync(stream.fileno())
        partial.rename(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if is_disk_full(error):
            raise disk_full(path, needed) from error
        raise
    fsync_folder(path.parent)
    return open_shard(path, fingerprint_id)


def _create_hdf5(path: Path, spec: SeriesSpec, fingerprint_id: str) -> None:
    with h5py.File(path, "w", locking=False) as file:
        file.attrs.update(
            {
                "schema": SCHEMA,
                "series": spec.name,
                "fingerprint": fingerprint_id,
                "rows": spec.shard_rows,
            }
        )
        for name, shape, dtype in (
            ("features", spec.shape, spec.dtype),
            ("sha256", (_SHA_BYTES,), "uint8"),
            ("checksum", (), "<u8"),
        ):
            settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            settings.set_layout(h5py.h5d.CONTIGUOUS)
            settings.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            settings.set_fill_time(h5py.h5d.FILL_TIME_NEVER)  # fresh blocks read as zeros
            space = h5py.h5s.create_simple((spec.shard_rows, *shape))
            stored = h5py.h5t.py_create(np.dtype(dtype))
            h5py.h5d.create(file.id, name.encode(), stored, space, settings)


def open_shard(path: Path, fingerprint_id: str) -> Shard:
    """Check a shard file from outside and find its datasets; nothing in it is trusted.

    Raises:
        StoreError: not a shard of this store, cut short, or with anything but plain contiguous data
            (links, external storage, virtual datasets and filters are refused).
    """
    try:
        with h5py.File(path, "r", locking=False) as file:
            return _check(path, file, fingerprint_id)
    except StoreError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise StoreError(f"{path} is no readable HDF5 shard: {error}") from error


def _check(path: Path, file: h5py.File, fingerprint_id: str) -> Shard:
    def refuse(what: str) -> StoreError:
        return StoreError(f"{path} is no shard of this store: {what}")

    name = parse_shard_name(path.name)
    if name is None or file.attrs.get("series") != name[0]:
        raise refuse(f"its series is {file.attrs.get('series')!r}")
    if file.attrs.get("schema") != SCHEMA:
        raise refuse(f"its schema is {file.attrs.get('schema')!r}, this version writes {SCHEMA}")
    if file.attrs.get("fingerprint") != fingerprint_id:
        raise refuse(
            f"its fingerprint is {file.attrs.get('fingerprint')!r}, not {fingerprint_id!r}"
        )
    offsets = {}
    size = path.stat().st_size
    for dataset_name in ("features", "sha256", "checksum"):
        if not isinstance(file.get(dataset_name, getlink=True), h5py.HardLink):
            raise refuse(f"{dataset_name} is missing or a link")
        dataset = file[dataset_name]
        if not isinstance(dataset, h5py.Dataset):
            raise refuse(f"{dataset_name} is no dataset")
        settings = dataset.id.get_create_plist()
        if (
            settings.get_layout() != h5py.h5d.CONTIGUOUS
            or settings.get_nfilters()
            or settings.get_external_count()
        ):
            raise refuse(f"{dataset_name} is not plain contiguous data")
        offset = dataset.id.get_offset()
        if offset is None or offset + dataset.nbytes > size:
            raise refuse(f"it is cut short ({size} bytes)")
        offsets[dataset_name] = int(offset)
    features = file["features"]
    spec = SeriesSpec(name[0], tuple(int(n) for n in features.shape[1:]), features.dtype.name)
    if spec.dtype not in _DTYPES or features.dtype.byteorder == ">":
        raise refuse(f"its number format is {features.dtype}")
    expected = {
        "features": (spec.shard_rows, *spec.shape),
        "sha256": (spec.shard_rows, _SHA_BYTES),
        "checksum": (spec.shard_rows,),
    }
    for dataset_name, shape in expected.items():
        if file[dataset_name].shape != shape:
            raise refuse(f"{dataset_name} has shape {file[dataset_name].shape}, not {shape}")
    if file["sha256"].dtype != np.uint8 or file["checksum"].dtype != np.dtype("<u8"):
        raise refuse("its hashes or checksums have another number format")
    return Shard(path, spec, offsets["features"], offsets["sha256"], offsets["checksum"])


def sync(handle: int) -> None:
    """Make what was written to an open shard survive a power loss."""
    getattr(os, "fdatasync", os.fsync)(handle)


def _write_runs(handle: int, slots: NDArray[np.int64], array: NDArray[Any], offset: int) -> None:
    """Write ``array[i]`` at slot ``slots[i]``, neighbouring slots in one system call."""
    row_bytes = array.nbytes // max(1, len(array))
    starts = np.flatnonzero(np.diff(slots, prepend=-2) != 1)
    for start, stop in zip(starts, [*starts[1:], len(slots)], strict=True):
        view = array[start:stop].data.cast("B")
        position = offset + int(slots[start]) * row_bytes
        while len(view):
            written = os.pwrite(handle, view, position)
            view, position = view[written:], position + written


def _allocate(handle: int, size: int) -> None:
    """Reserve ``size`` bytes on the disk; they read as zeros."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
        return
    for start in range(os.fstat(handle).st_size, size, 1 << 20):  # macOS
        os.pwrite(handle, bytes(min(1 << 20, size - start)), start)
