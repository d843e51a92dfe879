"""The feature store: what is committed stays, what is spoiled is found, what is foreign is refused."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from store_worker import BATCH, FINGERPRINT, SPECS, row, sha

from mirip_fast.errors import DiskFullError, StoreError, StoreLockedError
from mirip_fast.features.shards import SeriesSpec
from mirip_fast.features.store import DIRTY_FILE, FeatureStore

CLS = SPECS[0]


def new_store(path: Path) -> FeatureStore:
    return FeatureStore.create(path / "store", FINGERPRINT)


def append(store: FeatureStore, numbers: list[int], specs: tuple[SeriesSpec, ...] = SPECS) -> None:
    with store.writer() as writer:
        writer.append(
            [sha(n) for n in numbers], {s: np.stack([row(s, n) for n in numbers]) for s in specs}
        )
    store.refresh()


def assert_rows(store: FeatureStore, numbers: list[int]) -> None:
    """Every row is there, and equal to the last bit."""
    for spec in SPECS:
        rows = store.rows(spec.name, [sha(n) for n in numbers])
        assert (rows >= 0).all(), f"{(rows < 0).sum()} committed rows of {spec.name} are lost"
        expected = np.stack([row(spec, n) for n in numbers])
        np.testing.assert_array_equal(store.read(spec.name, rows), expected)


def test_series_are_filled_independently(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    append(store, [0, 1], (SPECS[0],))
    append(store, [1, 2], (SPECS[1],))
    with store.writer() as writer:
        assert writer.missing(SPECS[0].name, [sha(0), sha(1), sha(2)]).tolist() == [
            False,
            False,
            True,
        ]
        assert writer.missing(SPECS[1].name, [sha(0), sha(1), sha(2)]).tolist() == [
            True,
            False,
            False,
        ]


@pytest.mark.parametrize("dataset", ["features", "sha256", "checksum"])
def test_a_flipped_bit_is_found_and_only_that_row_is_computed_again(
    tmp_path: Path, dataset: str
) -> None:
    store = new_store(tmp_path)
    append(store, list(range(20)))
    shard = store.shards(CLS.name)[0]
    rng = random.Random(1)
    for _ in range(20):
        slot = rng.randrange(20)
        start, size = {
            "features": (shard.features_at, CLS.row_bytes),
            "sha256": (shard.sha256_at, 32),
            "checksum": (shard.checksum_at, 8),
        }[dataset]
        position = start + slot * size + rng.randrange(size)
        damaged_number = next(n for n in range(20) if store.rows(CLS.name, [sha(n)])[0] == slot)
        data = bytearray(shard.path.read_bytes())
        data[position] ^= 1 << rng.randrange(8)
        shard.path.write_bytes(data)
        assert not shard.valid()[slot] and shard.valid()[:20].sum() == 19
        with store.writer() as writer:
            lacking = writer.missing(CLS.name, [sha(n) for n in range(20)])
            assert np.flatnonzero(lacking).tolist() == [damaged_number]
            writer.append([sha(damaged_number)], {CLS: row(CLS, damaged_number)[None]})
        store.refresh()
        assert_rows(store, list(range(20)))


def test_readers_verify_after_a_crash(tmp_path: Path) -> None:
    """A checksum on the disk without its features (a power loss) is no row."""
    store = new_store(tmp_path)
    append(store, [0, 1])
    shard = store.shards(CLS.name)[0]
    with shard.path.open("r+b") as stream:
        stream.seek(shard.features_at)
        stream.write(bytes(CLS.row_bytes))
    (store.path / DIRTY_FILE).touch()
    assert store.path and FeatureStore.open(store.path).rows(
        CLS.name, [sha(0), sha(1)]
    ).tolist() == [-1, 1]


def test_another_fingerprint_is_refused(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    with pytest.raises(StoreError, match="image_size: 14 ≠ 28"):
        FeatureStore.create(store.path, {**FINGERPRINT, "image_size": 28})


def start_worker(path: Path, batches: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("store_worker.py")), str(path), str(batches)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_kill_9_loses_nothing_committed(tmp_path: Path) -> None:
    """Killed at random moments and resumed, on one store: no committed row is lost or wrong."""
    path, rng = tmp_path / "store", random.Random(5)
    batches, committed = 400, set()
    missing = batches * BATCH
    for _ in range(12):
        worker = start_worker(path, batches)
        assert worker.stdout is not None
        todo = int(worker.stdout.readline().split()[1])
        # What was told as committed is not computed again; at most one batch was committed untold.
        assert missing - BATCH <= todo <= missing
        time.sleep(rng.uniform(0.0, 0.05))
        worker.send_signal(signal.SIGKILL)
        told = {
            int(number)
            for line in worker.stdout
            if line.startswith("committed") and line.endswith("\n")
            for number in line.split()[1:]
        }
        worker.wait()
        committed |= told
        missing = todo - len(told)
        if committed:
            assert_rows(FeatureStore.open(path), sorted(committed))
    assert committed, "no batch was committed between the kills"
    final = start_worker(path, batches)
    output, _ = final.communicate(timeout=60)
    assert final.returncode == 0 and output.endswith("closed\n")
    assert_rows(FeatureStore.open(path), list(range(batches * BATCH)))


def test_the_second_writer_is_told_who_holds_the_store(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    before = sorted(p.name for p in store.path.iterdir())
    with store.writer(command="mirip-fast embed data"):
        with pytest.raises(
            StoreLockedError, match=rf"process {os.getpid()} .*mirip-fast embed data"
        ):
            FeatureStore.open(store.path).writer()
        assert FeatureStore.open(store.path).series() == {}  # readers are not blocked
    append(store, [1])
    assert set(before) < {p.name for p in store.path.iterdir()}


def test_a_killed_writer_leaves_no_lock(tmp_path: Path) -> None:
    worker = start_worker(tmp_path / "store", 10_000)
    assert worker.stdout is not None
    worker.stdout.readline()
    worker.kill()
    worker.wait()
    with FeatureStore.open(tmp_path / "store").writer():
        pass


def test_a_full_disk_is_a_clean_error(tmp_path: Path) -> None:
    """In a child, because the limit stays: no signal, nothing left behind, and the run goes on later."""
    store = new_store(tmp_path)
    append(store, [0, 1], (SPECS[1],))
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            append(store, [0, 1], (CLS,))
        except DiskFullError as error:
            status = 0 if "needed" in str(error) and "Nothing" in str(error) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert not list(store.path.glob("*.partial")) and not list(store.path.glob(".*.partial"))
    append(store, [0, 1], (CLS,))
    assert_rows(store, [0, 1])


def test_a_newer_store_is_left_alone(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    (store.path / "store.json").write_text(json.dumps({"schema": 99, "fingerprint": {}}))
    with pytest.raises(StoreError, match="another version"):
        FeatureStore.open(store.path)


def test_a_batch_is_on_the_disk_when_append_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a kill cannot show but a power loss would: every file written is synced after its last byte."""
    store, events = new_store(tmp_path), []
    pwrite, fdatasync = os.pwrite, os.fdatasync

    def record_write(handle: int, data: bytes, offset: int) -> int:
        events.append(("write", handle))
        return pwrite(handle, data, offset)

    def record_sync(handle: int) -> None:
        events.append(("sync", handle))
        fdatasync(handle)

    monkeypatch.setattr(os, "pwrite", record_write)
    monkeypatch.setattr(os, "fdatasync", record_sync)
    with store.writer() as writer:
        for start in (0, 5):
            numbers = list(range(start, start + 5))
            writer.append(
                [sha(n) for n in numbers],
                {s: np.stack([row(s, n) for n in numbers]) for s in SPECS},
            )
            written = {handle for what, handle in events if what == "write"}
            assert len(written) == len(SPECS)
            for handle in written:
                assert [what for what, h in events if h == handle][-1] == "sync"
