"""Shards as HDF5 files: making them, opening them with distrust, and plain exports for other programs.

This is the only module that imports h5py. HDF5 lays a new file out in memory; only plain writes to blocks
that are already reserved touch the disk, so that a full disk is an error here and not half a file inside
HDF5. After that HDF5 only tells where the datasets lie; any HDF5 program reads them.

Datasets of a shard: ``features`` (rows, \\*shape), ``sha256`` (rows, 32) uint8 of the image's bytes,
``checksum`` (rows,) uint64.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import DTypeLike, NDArray

from mirip_fast.errors import StoreError
from mirip_fast.features.shard_rows import (
    SeriesSpec,
    Shard,
    parse_shard_name,
    raw_bytes,
    shard_name,
    unreadable,
    write_at,
)
from mirip_fast.files import disk_full, fsync_folder, is_disk_full, open_regular, partial_path

__all__ = ["SCHEMA", "SeriesSpec", "Shard", "parse_shard_name", "shard_name"]

SCHEMA = 1
_FRONT_BYTES = 1 << 20  # HDF5's bookkeeping fits into these, at the start of the file
_SHA_BYTES = 32
_DATASETS = ("features", "sha256", "checksum")
_MOST_ROWS = 4096  # of any shard that a version with this schema wrote


def create_shard(path: Path, spec: SeriesSpec, fingerprint_id: str) -> Shard:
    """Make an empty shard: all its blocks are reserved and on the disk before it gets its name.

    Raises:
        DiskFullError: there is no room for the whole shard; nothing is left behind.
        StoreError: the name is taken.
    """
    if path.exists():
        raise StoreError(f"{path} is there already; it was not touched")
    partial = partial_path(path)
    build_shard(partial, path, spec, fingerprint_id)
    partial.rename(path)
    fsync_folder(path.parent)
    return open_shard(path, fingerprint_id)


def build_shard(partial: Path, path: Path, spec: SeriesSpec, fingerprint_id: str) -> Shard:
    """Make the empty shard that will be called ``path``, for now as ``partial``."""
    with build_file(partial, path, *_content(spec, fingerprint_id)) as (_, at):
        pass
    return Shard(partial, spec, spec.shard_rows, at["features"], at["sha256"], at["checksum"])


def shard_bytes(spec: SeriesSpec, fingerprint_id: str) -> int:
    """The size of a new shard's file: that of all its rows, from the beginning."""
    return _lay_out(*_content(spec, fingerprint_id))[2]


def _content(
    spec: SeriesSpec, fingerprint_id: str
) -> tuple[dict[str, tuple[tuple[int, ...], Any]], dict[str, object]]:
    """The datasets and the attributes of a new shard, as :func:`build_file` takes them."""
    rows = spec.shard_rows
    datasets = {
        "features": ((rows, *spec.shape), np.dtype(spec.dtype).newbyteorder("<")),
        "sha256": ((rows, _SHA_BYTES), np.dtype("u1")),
        "checksum": ((rows,), np.dtype("<u8")),
    }
    attributes: dict[str, object] = {
        "schema": SCHEMA,
        "series": spec.name,
        "fingerprint": fingerprint_id,
        "rows": rows,
    }
    return datasets, attributes


@contextlib.contextmanager
def build_file(
    partial: Path,
    path: Path,
    datasets: Mapping[str, tuple[tuple[int, ...], Any]],
    attributes: Mapping[str, object],
) -> Iterator[tuple[int, dict[str, int]]]:
    """Make an HDF5 file of contiguous datasets, all zeros, every block reserved; a failure removes it.

    Args:
        partial: the file to make.
        path: its later name, for messages.
        datasets: name (``/`` for groups) → shape, number format.
        attributes: of the file.

    Yields:
        A handle for writing and each dataset's offset. The file is on the disk when the block ends.

    Raises:
        DiskFullError: there is no room for it.
    """
    front, offsets, size = _lay_out(datasets, attributes)
    if shutil.disk_usage(path.parent).free < size:
        raise disk_full(path, size)
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)
    try:
        handle = os.open(partial, flags, 0o666)
        try:
            _allocate(handle, size)
            write_at(handle, front, 0)
            yield handle, offsets
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
    """Reserve ``size`` bytes on the disk for an empty file; they read as zeros."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(handle, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
    for start in range(0, size, 1 << 20):  # macOS, Windows, some network file systems
        write_at(handle, bytes(min(1 << 20, size - start)), start)


class _Front(io.RawIOBase):
    """A file in memory that keeps its first bytes, where the bookkeeping goes, and its length."""

    def __init__(self) -> None:
        self.kept = bytearray()
        self.size = 0
        self._at = 0

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self.size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def write(self, data: Any) -> int:
        part = bytes(data)
        if self._at < _FRONT_BYTES:
            end = self._at + len(part)
            self.kept.extend(bytes(max(0, end - len(self.kept))))
            self.kept[self._at : end] = part
        elif any(part):
            raise OSError("HDF5 keeps bookkeeping behind the data")
        self._at += len(part)
        self.size = max(self.size, self._at)
        return len(part)

    def readinto(self, out: Any) -> int:
        part = bytes(self.kept[self._at : self._at + len(out)])
        out[:] = part.ljust(len(out), b"\0")
        return len(out)

    def truncate(self, size: int | None = None) -> int:
        self.size = self._at if size is None else size
        return self.size


def _lay_out(
    datasets: Mapping[str, tuple[tuple[int, ...], DTypeLike]], attributes: Mapping[str, object]
) -> tuple[bytes, dict[str, int], int]:
    """HDF5's bookkeeping for such a file, the offset of each dataset, the size of the file."""
    front = _Front()
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_layout(h5py.h5d.CONTIGUOUS)
    settings.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    settings.set_obj_track_times(False)  # the same shard is the same bytes, whenever it is made
    parents = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    parents.set_create_intermediate_group(True)
    made, offsets = {}, {}
    # "earliest" is the form that every HDF5 program knows; arrays begin at pages.
    with h5py.File(
        front, "w", libver="earliest", alignment_threshold=2048, alignment_interval=4096
    ) as file:
        file.attrs.update(attributes)
        for name, (shape, dtype) in datasets.items():
            stored = h5py.h5t.py_create(np.dtype(dtype), logical=True)
            space = h5py.h5s.create_simple(shape)
            made[name] = h5py.h5d.create(file.id, name.encode(), stored, space, settings, parents)
        # HDF5 places a dataset when its first element comes: after all bookkeeping, so at the end.
        for name, dataset in made.items():
            if all(dataset.shape):
                there = dataset.get_space()
                there.select_hyperslab((0,) * dataset.rank, (1,) * dataset.rank)
                zero = np.zeros(1, np.dtype(datasets[name][1]))
                dataset.write(h5py.h5s.create_simple((1,)), there, zero, dataset.get_type())
            offsets[name] = int(dataset.get_offset() or 0)
    return bytes(front.kept[: front.size]), offsets, front.size


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
    datasets: dict[str, tuple[tuple[int, ...], Any]] = {
        name: ((rows, *spec.shape), np.dtype(spec.dtype).newbyteorder("<"))
        for name, (spec, _) in features.items()
    }
    for name, values in texts.items():
        length = max([1, *map(len, values)])
        datasets[name] = ((rows,), h5py.string_dtype("utf-8", length))
    partial = partial_path(path)
    with build_file(partial, path, datasets, attributes) as (handle, at):
        for name, (_, pieces) in features.items():
            position = at[name]
            for piece in pieces:
                data = raw_bytes(np.ascontiguousarray(piece))
                write_at(handle, data, position)
                position += len(data)
        for name, values in texts.items():
            write_at(handle, np.array(values, datasets[name][1]).tobytes(), at[name])
    partial.replace(path)
    fsync_folder(path.parent)
