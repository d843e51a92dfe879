"""Reading, sharing and looking after feature stores."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import subprocess
import threading
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from torture import BATCH, FINGERPRINT, SPECS, in_child, rows_of, sha

from mirip_fast.errors import DiskFullError, StoppedError, StoreError, StoreLockedError
from mirip_fast.features import shards, store_writer
from mirip_fast.features import store as store_files
from mirip_fast.features.maintenance import prune_rows, repair_store
from mirip_fast.features.shards import SeriesSpec, shard_name
from mirip_fast.features.store import FeatureStore
from mirip_fast.features.store_writer import StoreWriter
from mirip_fast.files import partial_path

CLS, GRID = SPECS


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_MAX_ROWS", 16)


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return FeatureStore.create(tmp_path / "store", FINGERPRINT)


def put(writer: StoreWriter, numbers: Sequence[int], specs: Sequence[SeriesSpec] = SPECS) -> None:
    writer.append([sha(n) for n in numbers], {s: rows_of(s, numbers) for s in specs})


def fill(store: FeatureStore, numbers: Sequence[int], specs: Sequence[SeriesSpec] = SPECS) -> None:
    with StoreWriter(store) as writer:
        put(writer, numbers, specs)
    store.refresh()


def assert_served(store: FeatureStore, numbers: Sequence[int], spec: SeriesSpec = CLS) -> None:
    rows = store.rows(spec.name, [sha(n) for n in numbers])
    assert (rows >= 0).all()
    np.testing.assert_array_equal(store.read(spec.name, rows), rows_of(spec, numbers))


# ---- index and reading


def test_series_share_the_hashes_of_their_contents(store: FeatureStore) -> None:
    n, hashes = 4_000, np.random.default_rng(0).integers(0, 256, (4_000, 32), dtype=np.uint8)
    names = [h.tobytes() for h in hashes]
    specs = [SeriesSpec(f"{name}.1", (1,), "float16") for name in "abcdefgh"]
    with (
        mock.patch.object(shards, "_MAX_ROWS", 4096),
        mock.patch.object(shards, "row_checksums", lambda s, h, f: np.ones(len(h), "<u8")),
        StoreWriter(store) as writer,
    ):
        writer.append(names, {spec: np.ones((n, 1), "f2") for spec in specs})
        tracemalloc.start()
        reader = FeatureStore.open(store.path)
        assert all(reader.rows(spec.name, names[7:8]) == [7] for spec in specs)
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert held / n < 420  # bytes per image; each series with hashes of its own: over 1,000


def test_a_store_knows_what_its_writer_writes(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mirip_fast.features.store._SPARE_ROWS", 3)
    with StoreWriter(store) as writer:
        for start in range(0, 100, 5):
            put(writer, range(start, start + 10))
            assert store.count(CLS.name) == start + 10
            assert_served(store, range(start + 10))
            assert writer.missing(CLS.name, [sha(start), sha(start + 10)]).tolist() == [False, True]
    assert_served(FeatureStore.open(store.path), range(105))


def test_series_are_filled_independently(store: FeatureStore) -> None:
    fill(store, [0, 1], [CLS])
    fill(store, [1, 2], [GRID])
    with StoreWriter(store) as writer:
        asked = [sha(n) for n in range(3)]
        assert writer.missing(CLS.name, asked).tolist() == [False, False, True]
        assert writer.missing(GRID.name, asked).tolist() == [True, False, False]


def test_any_selection_of_rows_is_read_right(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store, range(100))
    rng = np.random.default_rng(0)
    monkeypatch.setattr("mirip_fast.features.store._GAP_BYTES", 3 * CLS.row_bytes)
    monkeypatch.setattr("mirip_fast.features.store._READ_BYTES", 6 * CLS.row_bytes)
    choices = [
        np.arange(100),
        np.arange(100)[::-1],
        rng.permutation(100),
        np.array([5, 5, 99, 5, 0]),
    ]
    choices += [rng.integers(0, 100, rng.integers(0, 60)) for _ in range(30)]
    for numbers in choices:
        for spec in SPECS:
            assert_served(store, numbers.tolist(), spec)


def test_a_row_that_was_replaced_meanwhile_is_not_served(store: FeatureStore) -> None:
    """A damaged row's slot is used again; a reader that still knows the old row must not get the new."""
    fill(store, range(4))
    reader = FeatureStore.open(store.path)
    rows = reader.rows(CLS.name, [sha(n) for n in range(4)])
    shard = reader.shards(CLS.name)[0]
    slot = int(rows[2])
    with shard.path.open("r+b") as stream:
        stream.seek(shard.features_at + slot * CLS.row_bytes)
        stream.write(b"\xff")
    with StoreWriter(store) as writer:
        assert writer.missing(CLS.name, [sha(n) for n in range(4)]).tolist() == [False] * 2 + [
            True,
            False,
        ]
        put(writer, [77], [CLS])
    with pytest.raises(StoreError, match="again"):
        reader.read(CLS.name, rows)
    reader.refresh()
    assert reader.rows(CLS.name, [sha(77)]).tolist() == [slot]
    assert_served(reader, [0, 1, 77, 3])


def test_readers_verify_after_a_crash(store: FeatureStore) -> None:
    """A checksum on the disk without its features (a power loss) is no row."""
    fill(store, [0, 1])
    shard = store.shards(CLS.name)[0]
    with shard.path.open("r+b") as stream:
        stream.seek(shard.features_at)
        stream.write(bytes(CLS.row_bytes))
    (store.path / store_files.DIRTY_FILE).touch()
    assert FeatureStore.open(store.path).rows(CLS.name, [sha(0), sha(1)]).tolist() == [-1, 1]


def test_another_fingerprint_and_a_newer_store_are_left_alone(store: FeatureStore) -> None:
    with pytest.raises(StoreError, match="backbone: torture ≠ other"):
        FeatureStore.create(store.path, {"backbone": "other"})
    (store.path / "store.json").write_text('{"schema": 99, "fingerprint": {}}')
    with pytest.raises(StoreError, match="another version"):
        FeatureStore.open(store.path)


def test_a_shard_that_vanishes_is_told(store: FeatureStore) -> None:
    fill(store, range(4))
    reader = FeatureStore.open(store.path)
    rows = reader.rows(CLS.name, [sha(n) for n in range(4)])
    reader.shards(CLS.name)[0].path.unlink()
    with pytest.raises(StoreError, match="if the cache was pruned meanwhile, run the same command"):
        reader.read(CLS.name, rows)
    with pytest.raises(StoreError, match="lacks shard 0 of series cls.14"):
        reader.refresh()


# ---- writing


def test_a_closed_writer_refuses(store: FeatureStore) -> None:
    writer = StoreWriter(store)
    writer.close()
    with pytest.raises(StoreError, match="closed"):
        put(writer, [1])


def test_a_batch_with_one_bad_series_changes_nothing(store: FeatureStore) -> None:
    with StoreWriter(store) as writer:
        with pytest.raises(ValueError, match=r"grid2\.14"):
            writer.append([sha(0)], {CLS: rows_of(CLS, [0]), GRID: rows_of(GRID, [0]) + np.inf})
        assert writer.missing(CLS.name, [sha(0)]).all()
    assert not list(store.path.glob("*.h5"))


def test_another_shape_in_a_series_is_refused(store: FeatureStore) -> None:
    fill(store, [0])
    with StoreWriter(store) as writer, pytest.raises(StoreError, match=r"holds \(24,\) float16"):
        writer.append([sha(1)], {SeriesSpec("cls.14", (9,), "float16"): np.ones((1, 9), "f2")})


def test_a_full_disk_stops_a_batch_before_it_begins(store: FeatureStore) -> None:
    with StoreWriter(store) as writer:
        put(writer, range(10))
        with (
            mock.patch.object(os, "posix_fallocate", side_effect=OSError(errno.ENOSPC, "full")),
            pytest.raises(DiskFullError),
        ):
            put(writer, range(10, 20))
        assert writer.missing(CLS.name, [sha(n) for n in range(10, 20)]).all()
        put(writer, range(10, 20))  # there is room again
    store.refresh()
    assert_served(store, range(20))


def test_a_list_that_could_not_be_written_takes_its_shard_along(store: FeatureStore) -> None:
    with StoreWriter(store) as writer:
        full = DiskFullError("full")
        with (
            mock.patch.object(store_writer, "write_ranges", side_effect=full),
            pytest.raises(DiskFullError),
        ):
            put(writer, [0])
        assert not list(store.path.glob("*.h5"))
        put(writer, [0])
    store.refresh()
    assert_served(store, [0])


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_after_a_failed_write_the_writer_stops_and_readers_verify(
    store: FeatureStore, number: int
) -> None:
    with StoreWriter(store) as writer:
        put(writer, range(5))
        with (
            mock.patch.object(os, "fdatasync", side_effect=OSError(number, "broken")),
            pytest.raises(StoreError),
        ):
            put(writer, range(5, 9))
        with pytest.raises(StoreError, match="open the store again"):
            put(writer, range(5, 9))
    assert store_files.dirty_files(store.path)
    with StoreWriter(store) as writer:
        assert not writer.missing(CLS.name, [sha(n) for n in range(5)]).any()
        put(writer, range(9))
    assert not store_files.dirty_files(store.path)
    store.refresh()
    assert_served(store, range(9))


def test_several_threads_may_append(store: FeatureStore) -> None:
    with StoreWriter(store) as writer:
        threads = [
            threading.Thread(target=lambda s=start: [put(writer, [n]) for n in range(s, s + 20)])
            for start in range(0, 100, 10)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    store.refresh()
    assert len(store.valid_hashes(CLS.name)) == 110
    assert_served(store, range(110))


def test_the_marker_is_there_while_rows_are_written(store: FeatureStore) -> None:
    with StoreWriter(store) as writer:
        writer.missing(CLS.name, [sha(1)])
        assert not store_files.dirty_files(store.path)
        put(writer, [1])
        assert [f.name for f in store_files.dirty_files(store.path)] == ["DIRTY-r00"]
    assert not store_files.dirty_files(store.path)


# ---- which shards there must be


def test_the_last_shard_is_missed_too(store: FeatureStore) -> None:
    fill(store, range(40))
    names = [shard_name(CLS.name, 0, number) for number in range(3)]
    for name in names:
        (store.path / name).rename(store.path / "away")
        with pytest.raises(StoreError, match=name):
            FeatureStore.open(store.path).series()
        with pytest.raises(StoreError, match=name):
            StoreWriter(FeatureStore.open(store.path))
        (store.path / "away").rename(store.path / name)
    assert_served(FeatureStore.open(store.path), range(40))


def test_a_shard_finished_just_before_a_kill_counts(store: FeatureStore) -> None:
    fill(store, range(40))
    (store.path / "shards-r00.json").unlink()
    assert_served(FeatureStore.open(store.path), range(40))
    fill(FeatureStore.open(store.path), range(40, 80))
    assert_served(FeatureStore.open(store.path), range(80))
    assert store_files.read_ranges(store.path)[CLS.name, 0] == (0, 5)


def test_a_strange_hdf5_file_is_named(store: FeatureStore) -> None:
    fill(store, range(3))
    (store.path / "mine.h5").write_bytes(b"")
    with pytest.raises(StoreError, match=r"mine\.h5"):
        FeatureStore.open(store.path).series()


def test_leftovers_of_killed_runs_are_deleted(store: FeatureStore) -> None:
    fill(store, range(3))
    keep = store.path / ".manifest.json.77.partial"  # somebody else's, perhaps at work
    for name in (f".{shard_name(CLS.name, 0, 1)}.77.partial", ".shards-r00.json.77.partial"):
        (store.path / name).touch()  # as earlier versions named them
    for name in (shard_name(CLS.name, 0, 1), "shards-r00.json"):
        partial_path(store.path / name).touch()
    keep.touch()
    StoreWriter(store).close()
    assert list(store.path.glob(".*.partial")) == [keep]


# ---- locks and ranks


def test_several_processes_write_side_by_side(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_writer, "_SIGNING_SECONDS", 0.05)
    first = StoreWriter(store, part=1, command="embed")
    second = StoreWriter(FeatureStore.open(store.path), part=2)
    put(first, range(20))
    put(second, range(20, 40))
    assert_served(FeatureStore.open(store.path), range(40))  # readers are never blocked
    with pytest.raises(StoreLockedError, match=rf"process {os.getpid()} .*embed"):
        StoreWriter(FeatureStore.open(store.path))
    with pytest.raises(StoreLockedError, match="RANK of its own"):
        StoreWriter(FeatureStore.open(store.path), part=2)
    first.close()
    put(second, range(40, 60))
    with pytest.raises(StoreLockedError, match="Nothing was changed"):
        StoreWriter(FeatureStore.open(store.path))
    second.close()
    with StoreWriter(FeatureStore.open(store.path), command="alone") as alone:
        with pytest.raises(StoreLockedError, match="alone"):
            StoreWriter(FeatureStore.open(store.path), part=1)
        put(alone, range(60, 64))  # into the free slots of any part
    assert all(file.read_bytes() == b"" for file in store.path.glob("LOCK*"))
    assert_served(FeatureStore.open(store.path), range(64))
    assert {s.part for s in FeatureStore.open(store.path).shards(CLS.name)} == {1, 2}


def test_verifying_can_be_ended_within_a_shard(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store, range(16), [CLS])
    monkeypatch.setattr(shards, "_VERIFY_BYTES", CLS.row_bytes)
    stop, pieces = threading.Event(), []
    sums = shards.row_checksums

    def counted(*arguments: Any) -> Any:
        pieces.append(1)
        if len(pieces) == 3:
            stop.set()
        return sums(*arguments)

    monkeypatch.setattr(shards, "row_checksums", counted)
    with (
        StoreWriter(FeatureStore.open(store.path), stop=stop) as writer,
        pytest.raises(StoppedError),
    ):
        writer.missing(CLS.name, [sha(0)])
    assert len(pieces) == 3


def test_many_damaged_shards_need_few_open_files(store: FeatureStore) -> None:
    fill(store, range(16 * 40), [CLS])
    for shard in store.shards(CLS.name):
        with shard.path.open("r+b") as stream:
            stream.seek(shard.features_at)
            byte = stream.read(1)
            stream.seek(shard.features_at)
            stream.write(bytes([byte[0] ^ 1]))

    def look() -> None:
        few = max(int(name) for name in os.listdir("/dev/fd")) + 26
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, few))
        with StoreWriter(FeatureStore.open(store.path)) as writer:
            missing = writer.missing(CLS.name, [sha(n) for n in range(16 * 40)])
            assert missing.sum() == 40
            put(writer, np.flatnonzero(missing).tolist(), [CLS])

    assert in_child(look) is None
    assert_served(FeatureStore.open(store.path), range(16 * 40))


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_told(store: FeatureStore, number: int) -> None:
    fill(store, range(3))
    with mock.patch("fcntl.flock", side_effect=OSError(number, os.strerror(number))):
        with pytest.raises(StoreError, match="cannot lock files.*--cache-dir"):
            StoreWriter(store)
        assert store_writer.holder_of(store.path) is None
        assert_served(FeatureStore.open(store.path), range(3))
    StoreWriter(store).close()


def test_a_disk_without_room_for_a_name_is_told(store: FeatureStore) -> None:
    full = OSError(errno.ENOSPC, "full")
    with (
        mock.patch.object(os, "write", side_effect=full),
        pytest.raises(DiskFullError, match="LOCK"),
    ):
        StoreWriter(store)
    with StoreWriter(store) as writer:
        put(writer, range(3))
    with StoreWriter(store) as writer:
        assert not any(writer.missing(spec.name, [sha(0)])[0] for spec in SPECS)
        with mock.patch.object(os, "open", side_effect=full), pytest.raises(DiskFullError):
            put(writer, range(3, 6))
        put(writer, range(3, 6))  # nothing was begun: there is room again
    store.refresh()
    assert_served(store, range(6))


def test_who_holds_a_store(store: FeatureStore) -> None:
    assert store_writer.holder_of(store.path) is None
    with StoreWriter(store, command="embed data"):
        assert f"process {os.getpid()} on" in (store_writer.holder_of(store.path) or "")
        assert "(embed data)" in (store_writer.holder_of(store.path) or "")
    with StoreWriter(store, part=4, command="torchrun"):
        assert "(torchrun)" in (store_writer.holder_of(store.path) or "")
    assert store_writer.holder_of(store.path) is None

    def die() -> None:
        StoreWriter(store)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(die) == "died by signal 9"
    assert (store.path / "LOCK").read_bytes()  # its name is still there, its lock is not
    assert store_writer.holder_of(store.path) is None


def test_a_lock_that_was_deleted_meanwhile_is_taken_anew(store: FeatureStore) -> None:
    """Whoever waits for the lock of a store that is pruned away must not hold a deleted file."""
    real = store_writer._try_lock
    deleted: list[int] = []

    def deleting(handle: int, *, shared: bool) -> bool:
        if not deleted:
            deleted.append(handle)
            (store.path / "LOCK").unlink()
        return real(handle, shared=shared)

    with mock.patch.object(store_writer, "_try_lock", deleting):
        writer = StoreWriter(store, command="first")
    with pytest.raises(StoreLockedError, match="first"):
        StoreWriter(FeatureStore.open(store.path))
    writer.close()
    (store.path / "store.json").unlink()
    with pytest.raises(StoreError, match="pruned meanwhile"):
        StoreWriter(store)


def test_a_read_only_cache_is_read_and_not_written(tmp_path: Path) -> None:
    mount = tmp_path / "mount"
    mount.mkdir()

    def tmpfs(*options: str) -> bool:
        command = ["mount", *options, str(mount)]
        return subprocess.run(command, check=False, capture_output=True).returncode == 0

    if os.geteuid() or not tmpfs("-t", "tmpfs", "none"):
        pytest.skip("mounting is not possible here")
    try:
        store = FeatureStore.create(mount / "store", FINGERPRINT)
        fill(store, range(20))
        assert tmpfs("-o", "remount,ro")
        opened = FeatureStore.open(store.path, verify=True)
        assert_served(opened, range(20))
        with pytest.raises(StoreError, match=r"cannot be written to \(Read-only file system\)"):
            StoreWriter(opened)
        with pytest.raises(StoreError, match="cannot be made"):
            FeatureStore.create(mount / "new", FINGERPRINT)
    finally:
        subprocess.run(["umount", str(mount)], check=True, capture_output=True)


def test_few_files_may_be_open(store: FeatureStore) -> None:
    """Shards are opened one at a time; where not even that goes, the error says what to do."""
    fill(store, range(16 * 40))

    def look(spare: int) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
        taken = []
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        for handle in taken[:spare]:
            os.close(handle)
        if spare:
            assert_served(FeatureStore.open(store.path), range(16 * 40))
            with StoreWriter(FeatureStore.open(store.path)) as writer:
                put(writer, range(640, 700))
        else:
            with pytest.raises(StoreError, match="ulimit -n"):
                store.read(CLS.name, np.arange(10))
            with pytest.raises(StoreError, match=r"store\.json cannot be read .*ulimit -n"):
                FeatureStore.open(store.path)
            with pytest.raises(StoreError, match="ulimit -n"):
                store.refresh()

    assert in_child(lambda: look(10)) is None
    assert in_child(lambda: look(0)) is None


def test_a_picture_that_two_ranks_stored_is_answered_once(store: FeatureStore) -> None:
    first = StoreWriter(store, part=1)
    second = StoreWriter(FeatureStore.open(store.path), part=2)
    # What rank 1 computed differs a little, as in another batch; either is right, but always the same.
    second.append([sha(7)], {CLS: rows_of(CLS, [7]) + np.float16(0.25)})
    put(first, [5, 7], [CLS])
    first.close()
    second.close()
    opened = FeatureStore.open(store.path)
    assert opened.valid_hashes(CLS.name) == {sha(5), sha(7)}
    assert_served(opened, [5, 7])
    with StoreWriter(opened) as writer:
        assert not writer.missing(CLS.name, [sha(5), sha(7)]).any()


def test_a_restarted_rank_looks_after_its_own_rows(store: FeatureStore) -> None:
    other = StoreWriter(store, part=1)

    def die_while_writing() -> None:
        put(StoreWriter(FeatureStore.open(store.path), part=2), range(4))
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(die_while_writing) == "died by signal 9"
    shard = store.path / shard_name(CLS.name, 2, 0)
    position = next(s for s in FeatureStore.open(store.path).shards(CLS.name)).features_at
    with shard.open("r+b") as stream:  # as a power loss of that machine would leave it
        stream.seek(position)
        stream.write(b"\x7f\x11")
    with StoreWriter(FeatureStore.open(store.path), part=2) as again:
        assert again.missing(CLS.name, [sha(n) for n in range(4)]).tolist() == [True] + [False] * 3
    other.close()


def test_a_forked_child_does_not_keep_the_lock(store: FeatureStore) -> None:
    """Decode workers are forked while the lock is held; they may outlive a killed run for a while."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        writer = StoreWriter(store)
        put(writer, [1])
        worker = os.fork()
        if worker == 0:
            time.sleep(30)
            os._exit(0)
        os.write(write, b"%d\n" % worker)
        time.sleep(30)
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as stream:
        worker = int(stream.readline())
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        StoreWriter(FeatureStore.open(store.path)).close()
        os.kill(worker, signal.SIGKILL)


def test_readers_see_whole_rows_while_a_run_writes(store: FeatureStore) -> None:
    """Never an error, never a part of a row, and rows only ever come."""
    pid = os.fork()
    if pid == 0:
        with StoreWriter(store) as writer:
            for start in range(0, 20_000, BATCH):
                put(writer, range(start, start + BATCH))
        os._exit(0)
    try:
        known = {sha(n): n for n in range(20_000)}
        reader, seen, until = FeatureStore.open(store.path), 0, time.monotonic() + 2
        while time.monotonic() < until:
            reader.refresh()
            hashes = sorted(reader.valid_hashes(CLS.name))
            assert len(hashes) >= seen
            seen = len(hashes)
            if seen:
                assert_served(reader, [known[h] for h in hashes])
        assert seen
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


# ---- tools


def prune(store: FeatureStore, keep: set[bytes]) -> None:
    with StoreWriter(store) as writer:
        prune_rows(writer, keep, ())


def test_a_full_disk_while_pruning_changes_nothing(store: FeatureStore) -> None:
    fill(store, range(60))
    before = {f.name: f.read_bytes() for f in store.path.glob("*.h5")}
    with (
        mock.patch.object(
            store_writer,
            "create_shard",
            wraps=store_writer.create_shard,
            side_effect=[mock.DEFAULT, DiskFullError("full")],
        ),
        pytest.raises(DiskFullError),
    ):
        prune(store, {sha(n) for n in range(0, 60, 2)})
    assert {f.name: f.read_bytes() for f in store.path.glob("*.h5")} == before
    assert_served(FeatureStore.open(store.path), range(60))


@pytest.mark.parametrize("call", ["rename", "replace", "unlink", "pwrite", "fsync"])
def test_prune_killed_at_any_step_keeps_what_was_to_be_kept(tmp_path: Path, call: str) -> None:
    for step in range(1, 200):
        store = FeatureStore.create(tmp_path / f"s{step}", FINGERPRINT)
        fill(store, range(40))
        keep = list(range(0, 40, 3))
        wanted = {sha(n) for n in keep}

        def die(store: FeatureStore = store, step: int = step, wanted: set[bytes] = wanted) -> None:
            real, calls = getattr(os, call), [0]

            def deadly(*args: object, **more: object) -> object:
                calls[0] += 1
                if calls[0] == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **more)

            setattr(os, call, deadly)
            prune(store, wanted)

        finished = in_child(die) is None
        opened = FeatureStore.open(store.path)
        assert_served(opened, keep)
        assert_served(opened, keep, GRID)
        prune(opened, {sha(n) for n in keep})
        assert opened.valid_hashes(CLS.name) == {sha(n) for n in keep}
        assert len(list(store.path.glob("*.h5"))) == 2 and not list(store.path.glob(".*.partial"))
        if finished:
            break
    assert finished and step > 1


def test_a_reader_survives_pruning(store: FeatureStore) -> None:
    fill(store, range(40))
    reader = FeatureStore.open(store.path)
    rows = reader.rows(CLS.name, [sha(n) for n in range(40)])
    prune(store, {sha(n) for n in range(7)})
    with pytest.raises(StoreError, match="again"):
        reader.read(CLS.name, rows)
    reader.refresh()
    assert_served(reader, range(7))


def test_repair_where_a_whole_series_is_gone(store: FeatureStore) -> None:
    fill(store, range(20))
    for file in store.path.glob("cls.*.h5"):
        file.unlink()
    assert repair_store(store.path)
    opened = FeatureStore.open(store.path)
    assert set(opened.series()) == {GRID.name}
    fill(opened, range(20))
    assert_served(opened, range(20))
