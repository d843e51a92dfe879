"""Shards are plain HDF5 files; files of strangers are read as data or refused, never followed."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import h5py
import numpy as np
import pytest

from mirip_fast.errors import DiskFullError, StoreError
from mirip_fast.features import shards
from mirip_fast.features.shards import (
    SeriesSpec,
    ShardWriter,
    create_shard,
    open_shard,
)

SPEC = SeriesSpec("cls.14", (5,), "float16")
NAME = "cls.14-r00-00000.h5"


def make(folder: Path, spec: SeriesSpec = SPEC) -> Path:
    path = folder / f"{spec.name}-r00-00000.h5"
    create_shard(path, spec, "print")
    return path


def test_a_shard_is_what_hdf5_reads(tmp_path: Path) -> None:
    for spec in (SPEC, SeriesSpec("grid2.14-flip", (2, 2, 3), "float32")):
        path = make(tmp_path, spec)
        shard = open_shard(path, "print")
        features = np.arange(3 * spec.row_bytes, dtype=np.uint8).view(spec.dtype)
        features = np.nan_to_num(features[: 3 * int(np.prod(spec.shape))]).reshape(3, *spec.shape)
        hashes = np.arange(96, dtype=np.uint8).reshape(3, 32)
        writer = ShardWriter(shard)
        writer.write(np.array([1, 2, 7]), hashes, features)
        writer.close()
        with h5py.File(path) as file:  # through HDF5, not through the product
            assert set(file) == {"features", "sha256", "checksum"}
            assert file["features"].shape == (4096, *spec.shape)
            assert file["features"].dtype == np.dtype(spec.dtype)
            np.testing.assert_array_equal(file["features"][[1, 2, 7]], features)
            np.testing.assert_array_equal(file["sha256"][[1, 2, 7]], hashes)
            assert np.flatnonzero(file["checksum"][:]).tolist() == [1, 2, 7]
            assert file.attrs["fingerprint"] == "print" and file.attrs["series"] == spec.name
        assert np.flatnonzero(shard.valid()).tolist() == [1, 2, 7]


def test_the_space_of_a_shard_is_reserved(tmp_path: Path) -> None:
    path = make(tmp_path, SeriesSpec("cls.14", (1024,), "float16"))
    info = path.stat()
    assert info.st_blocks * 512 >= info.st_size > 4096 * 2048


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        ("../up", (1,), "float16"),
        ("Cls", (1,), "float16"),
        ("", (1,), "float16"),
        ("a", (), "float16"),
        ("a", (0,), "float16"),
        ("a", (1,), "float64"),
    ],
)
def test_a_series_that_can_not_be_stored(name: str, shape: tuple[int, ...], dtype: str) -> None:
    with pytest.raises(ValueError):
        SeriesSpec(name, shape, dtype)


def test_a_live_shard_is_never_overwritten(tmp_path: Path) -> None:
    path = make(tmp_path)
    before = path.read_bytes()
    with pytest.raises(StoreError, match="not touched"):
        create_shard(path, SPEC, "print")
    assert path.read_bytes() == before


@pytest.mark.parametrize("call", ["posix_fallocate", "fsync"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, call: str) -> None:
    with (
        mock.patch.object(os, call, side_effect=OSError(errno.ENOSPC, "full")),
        pytest.raises(DiskFullError, match="are needed"),
    ):
        make(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_too_little_free_space_is_seen_before_writing(tmp_path: Path) -> None:
    with (
        mock.patch.object(shards.shutil, "disk_usage", return_value=mock.Mock(free=1000)),
        mock.patch.object(os, "posix_fallocate", side_effect=AssertionError),
        pytest.raises(DiskFullError, match="are needed"),
    ):
        make(tmp_path)


def test_without_fallocate_zeros_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "not here")

    expected = make(tmp_path).read_bytes()
    (tmp_path / NAME).unlink()
    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    assert make(tmp_path).read_bytes() == expected
    (tmp_path / NAME).unlink()
    monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.delattr(os, "pwrite")
    assert make(tmp_path).read_bytes() == expected


def test_the_time_of_making_is_not_in_a_shard(tmp_path: Path) -> None:
    first = make(tmp_path).read_bytes()
    (tmp_path / NAME).unlink()
    time.sleep(1.05)  # HDF5 counts seconds
    assert make(tmp_path).read_bytes() == first


def test_short_writes_are_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = open_shard(make(tmp_path), "print")
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, at: real(handle, data[:3], at))
    writer = ShardWriter(shard)
    writer.write(np.arange(4), np.ones((4, 32), np.uint8), np.ones((4, 5), np.float16))
    writer.close()
    assert np.flatnonzero(shard.valid()).tolist() == [0, 1, 2, 3]


def test_after_a_failed_sync_the_memory_of_the_file_is_dropped(tmp_path: Path) -> None:
    """Linux shows what it could not write until the pages are dropped: the next run would trust it."""
    writer = ShardWriter(open_shard(make(tmp_path), "print"))
    with (
        mock.patch.object(shards, "sync_data", side_effect=OSError(errno.EIO, "broken")),
        mock.patch.object(os, "posix_fadvise") as drop,
        pytest.raises(OSError, match="broken"),
    ):
        writer.sync()
    assert drop.call_args.args[3] == os.POSIX_FADV_DONTNEED
    writer.close()


def replaced(file: h5py.File, name: str, make_it: Callable[[], object]) -> None:
    del file[name]
    made = make_it()
    if made is not None:
        file[name] = made


def shape_of(file: h5py.File) -> tuple[int, ...]:
    return tuple(file["features"].shape) if "features" in file else (4096, 5)


def as_group(file: h5py.File) -> None:
    replaced(file, "features", lambda: file.create_group("x"))


def dangling_soft(file: h5py.File) -> None:
    replaced(file, "features", lambda: h5py.SoftLink("/nowhere"))


def soft_to_self(file: h5py.File) -> None:
    replaced(file, "sha256", lambda: h5py.SoftLink("/features"))


def external_link(file: h5py.File) -> None:
    replaced(file, "features", lambda: h5py.ExternalLink("other.h5", "/features"))


def virtual(file: h5py.File) -> None:
    shape = shape_of(file)
    layout = h5py.VirtualLayout(shape, "f2")
    layout[:] = h5py.VirtualSource("other.h5", "features", shape)
    replaced(file, "features", lambda: None)
    file.create_virtual_dataset("features", layout)


def external_storage(file: h5py.File) -> None:
    shape = shape_of(file)
    replaced(file, "features", lambda: None)
    file.create_dataset("features", shape, "f2", external=[("secret", 0, h5py.h5f.UNLIMITED)])


def soft_link_out(file: h5py.File) -> None:
    file["away"] = h5py.ExternalLink("other.h5", "/")
    replaced(file, "features", lambda: h5py.SoftLink("/away/features"))


def remade(**options: object) -> Callable[[h5py.File], None]:
    def spoil(file: h5py.File) -> None:
        arguments = {"shape": shape_of(file), "dtype": "f2", **options}
        replaced(file, "features", lambda: None)
        dataset = file.create_dataset("features", **arguments)
        dataset[...] = np.zeros((), dataset.dtype)

    return spoil


def attribute(name: str, value: object) -> Callable[[h5py.File], None]:
    def spoil(file: h5py.File) -> None:
        file.attrs[name] = value

    return spoil


def without(name: str) -> Callable[[h5py.File], None]:
    def spoil(file: h5py.File) -> None:
        del file[name]

    return spoil


def unknown_filter(file: h5py.File) -> None:
    shape = shape_of(file)
    replaced(file, "features", lambda: None)
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_chunk((8, *shape[1:]))
    settings.set_filter(54_321, h5py.h5z.FLAG_OPTIONAL, (1, 2))
    kind, space = h5py.h5t.py_create(np.dtype("<f2")), h5py.h5s.create_simple(shape)
    h5py.h5d.create(file.id, b"features", kind, space, settings)


def declared(*shape: int) -> Callable[[h5py.File], None]:
    """A shape without any data: nothing is stored until something is written."""

    def spoil(file: h5py.File) -> None:
        replaced(file, "features", lambda: None)
        file.create_dataset("features", shape, "<f2")

    return spoil


SPOILED = {
    "soft link out": soft_link_out,
    "unknown filter": unknown_filter,
    "huge rows declared": declared(4096, 1 << 50),
    "huge number of rows declared": declared(1 << 58, 5),
    "group": as_group,
    "dangling soft link": dangling_soft,
    "soft link": soft_to_self,
    "external link": external_link,
    "virtual": virtual,
    "external storage": external_storage,
    "gzip": remade(compression="gzip"),
    "chunked": remade(chunks=(8, 5)),
    "compact": remade(shape=(8, 5), chunks=None),
    "shuffle": remade(shuffle=True, chunks=(8, 5)),
    "wrong rows": remade(shape=(4095, 5)),
    "too many rows": remade(shape=(5000, 5)),
    "no row shape": remade(shape=(4096,)),
    "float64": remade(dtype="f8"),
    "big-endian": remade(dtype=">f2"),
    "integers": remade(dtype="i2"),
    "records": remade(dtype=[("a", "f2"), ("b", "f2")]),
    "no checksums": without("checksum"),
    "other fingerprint": attribute("fingerprint", "other"),
    "odd fingerprint": attribute("fingerprint", np.arange(4)),
    "empty fingerprint": attribute("fingerprint", h5py.Empty("f4")),
    "newer schema": attribute("schema", 2),
    "schema of text": attribute("schema", "1"),
    "other series": attribute("series", "mean.14"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_hostile_files_are_refused_by_name(tmp_path: Path, case: str) -> None:
    path = make(tmp_path)
    # Whoever opens one of these pipes waits until the alarm.
    os.mkfifo(tmp_path / "secret")
    os.mkfifo(tmp_path / "other.h5")
    with h5py.File(path, "r+") as file:
        SPOILED[case](file)

    def too_late(*_: object) -> None:
        raise AssertionError("another file was opened")

    before = signal.signal(signal.SIGALRM, too_late)
    signal.alarm(5)
    try:
        with pytest.raises(StoreError, match=r"cls\.14-r00-00000\.h5"):
            open_shard(path, "print")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("target", ["features", "superblock", "beyond"])
def test_datasets_that_lie_where_they_must_not(tmp_path: Path, target: str) -> None:
    path = make(tmp_path)
    shard = open_shard(path, "print")
    content = path.read_bytes()
    old = shard.sha256_at.to_bytes(8, "little")
    assert content.count(old) == 1
    new = {"features": shard.features_at + 8, "superblock": 0, "beyond": len(content) - 50}[target]
    path.write_bytes(content.replace(old, new.to_bytes(8, "little")))
    with pytest.raises(StoreError, match=NAME):
        open_shard(path, "print")


@pytest.mark.parametrize("shape", [(4096, 1 << 50), (1 << 60, 5), (4096, 6)])
def test_shapes_beyond_the_file_are_refused(tmp_path: Path, shape: tuple[int, int]) -> None:
    """The numbers in the file's bookkeeping changed, the data left as it was: nothing is allocated."""
    path = make(tmp_path)
    content = path.read_bytes()
    old, new = (b"".join(n.to_bytes(8, "little") for n in s) for s in ((4096, 5), shape))
    assert content.count(old) >= 1
    path.write_bytes(content.replace(old, new))
    tracemalloc.start()
    with pytest.raises(StoreError, match=NAME):
        open_shard(path, "print")
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()


def test_a_shard_as_the_previous_version_made_it(tmp_path: Path) -> None:
    """Laid out by HDF5 itself, its space reserved at once."""
    path = tmp_path / NAME
    with h5py.File(path, "w") as file:
        file.attrs.update({"schema": 1, "series": "cls.14", "fingerprint": "print", "rows": 4096})
        for name, shape, dtype in (
            ("features", (5,), "float16"),
            ("sha256", (32,), "uint8"),
            ("checksum", (), "<u8"),
        ):
            settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            settings.set_layout(h5py.h5d.CONTIGUOUS)
            settings.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            settings.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            space = h5py.h5s.create_simple((4096, *shape))
            kind = h5py.h5t.py_create(np.dtype(dtype))
            h5py.h5d.create(file.id, name.encode(), kind, space, settings)
    os.truncate(path, path.stat().st_size)
    features, hashes = np.arange(10, dtype="f2").reshape(2, 5), np.full((2, 32), 7, np.uint8)
    hashes[1] = 8
    digests = [
        hashlib.blake2b(h.tobytes() + b"cls.14" + f.tobytes(), digest_size=8, person=b"cls.14")
        for h, f in zip(hashes, features, strict=True)
    ]
    with h5py.File(path, "r+") as file:
        file["features"][:2], file["sha256"][:2] = features, hashes
        file["checksum"][:2] = [int.from_bytes(d.digest(), "little") for d in digests]
    shard = open_shard(path, "print")
    assert np.flatnonzero(shard.valid()).tolist() == [0, 1]
    writer = ShardWriter(shard)
    writer.write(np.array([2]), np.full((1, 32), 9, np.uint8), features[:1])
    writer.close()
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["features"][:3], [*features, features[0]])
    assert np.flatnonzero(shard.valid()).tolist() == [0, 1, 2]


def test_what_can_not_be_opened_just_now_is_not_called_damaged(tmp_path: Path) -> None:
    path = make(tmp_path)
    shard = open_shard(path, "print")
    for number, hint in ((errno.EMFILE, "ulimit -n"), (errno.EACCES, "ls -l"), (errno.EIO, "disk")):
        error = OSError(number, os.strerror(number))
        with mock.patch.object(os, "open", side_effect=error):
            for look in (lambda: open_shard(path, "print"), shard.checksums):
                with pytest.raises(StoreError, match=hint) as told:
                    look()
                assert str(path) in str(told.value) and "HDF5" not in str(told.value)


def test_no_file_at_all_is_refused(tmp_path: Path) -> None:
    path = tmp_path / NAME
    path.mkdir()
    with pytest.raises(StoreError, match="no file"):
        open_shard(path, "print")
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(StoreError, match="no file"):
        open_shard(path, "print")
    path.unlink()
    for content in (b"", b"\x89HDF\r\n\x1a\n", b"x" * 5000):
        path.write_bytes(content)
        with pytest.raises(StoreError, match=NAME):
            open_shard(path, "print")


def test_a_shard_cut_short_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path)
    size = path.stat().st_size
    for cut in (1, 8, 5000, size - 3000, size - 100):
        whole = path.read_bytes()
        os.truncate(path, size - cut)
        with pytest.raises(StoreError, match=NAME):
            open_shard(path, "print")
        path.write_bytes(whole)
    open_shard(path, "print")


def test_a_renamed_shard_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path)
    path.rename(tmp_path / "mean.14-r00-00000.h5")
    with pytest.raises(StoreError, match=r"mean\.14-r00-00000\.h5.*series is 'cls\.14'"):
        open_shard(tmp_path / "mean.14-r00-00000.h5", "print")
