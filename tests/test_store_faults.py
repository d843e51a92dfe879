"""Kills, power losses, flipped bits, full disks, races: a small round of ``tests/torture.py``.

The same harness finds losses where a safeguard of the store is taken away, so it can fail.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torture

from mirip_fast.features import shards

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork") or not Path("/proc/self/fd").exists(), reason="needs Linux"
)


@pytest.fixture(autouse=True)
def shard_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness makes shards small; afterwards they have their usual size again."""
    monkeypatch.setattr(shards, "_MAX_ROWS", shards._MAX_ROWS)


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory where there is such a place: power losses are modelled, and syncing takes no time there."""
    with tempfile.TemporaryDirectory(dir=torture.memory_folder()) as name:
        yield Path(name)


def test_kill_9_loses_nothing_committed(folder: Path) -> None:
    count = torture.kill_runs(torture.Shards(), folder, 10, seed=1)
    assert count.failures == [] and count.trials == 10
    assert count.notes["committed rows"] > 100
    assert count.notes["most rows saved untold"] <= torture.BATCH


def test_every_moment_lived_again(folder: Path) -> None:
    """Kills at and within every write; power losses that keep any part of what was not synced."""
    kills, power = torture.replays(torture.Shards(16), folder, batches=3, every=3, losses=3)
    assert kills.failures == [] and power.failures == []
    assert kills.trials > 30 and power.trials > 60


@pytest.mark.parametrize("fault", ["no sync", "checksum first", "no folder sync", "no checksum"])
def test_the_replay_finds_faults_of_the_store(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Each safeguard taken away in turn must be noticed."""
    if fault == "no sync":
        monkeypatch.setattr(shards, "sync_data", lambda handle: None)
    elif fault == "no folder sync":
        monkeypatch.setattr("mirip_fast.features.shards.fsync_folder", lambda folder: None)
        monkeypatch.setattr("mirip_fast.features.store_writer.fsync_folder", lambda folder: None)
        monkeypatch.setattr("mirip_fast.files.fsync_folder", lambda folder: None)
    elif fault == "checksum first":

        def backwards(self, slots, hashes, features):  # type: ignore[no-untyped-def]
            shard = self.shard
            sums = shards.row_checksums(shard.spec.name, hashes, features)
            self._write_runs(slots, sums, shard.checksum_at)
            self._write_runs(slots, hashes, shard.sha256_at)
            self._write_runs(slots, features, shard.features_at)
            return sums

        monkeypatch.setattr(shards.ShardWriter, "write", backwards)
        # Without the reader's checksums (a live system) the order alone protects.
        monkeypatch.setattr("mirip_fast.features.store.dirty_files", lambda path: [])
    else:
        monkeypatch.setattr(shards.Shard, "matching", lambda self, s, sums, *_: sums != 0)
    kills, power = torture.replays(torture.Shards(16), folder, batches=3, losses=4, enough=1)
    assert kills.failures if fault == "checksum first" else power.failures


def test_the_kills_find_faults(folder: Path) -> None:
    """A store that tells a batch before it is written loses it."""

    class Hasty(torture.Shards):
        def writer(self, path: Path) -> torture.Writer:
            writer, waiting = super().writer(path), []
            append = writer.append

            def later(numbers):  # type: ignore[no-untyped-def]
                if waiting:
                    append(waiting.pop())
                waiting.append(numbers)

            writer.append = later  # type: ignore[method-assign]
            return writer

    assert torture.kill_runs(Hasty(), folder, 6, seed=1).failures


def test_any_flipped_bit_is_found(folder: Path) -> None:
    stored, empty = torture.flips(folder, 300)
    assert stored.failures == [] and stored.trials > 200
    assert empty.failures == [] and empty.trials > 50


def test_every_bit_of_a_row_counts(folder: Path) -> None:
    count = torture.every_bit(folder)
    assert count.failures == [] and count.trials == 8 * (48 + 24 + 2 * 40)


def test_flipped_bits_of_the_hdf5_header_are_refused_or_harmless(folder: Path) -> None:
    count = torture.header_flips(folder, step=61)
    assert count.failures == [] and count.notes["refused"] > 10


def test_full_disks_by_a_file_size_limit(folder: Path) -> None:
    count = torture.full_disks(folder, torture.limits(6))
    assert count.failures == [] and count.trials == 6


def test_full_disks_by_a_small_file_system(folder: Path) -> None:
    count = torture.full_tmpfs(folder, [3 * 2**16, 2**19])
    if count is None:
        pytest.skip("mounting is not possible here")
    assert count.failures == [] and count.trials == 2


def test_lock_races(folder: Path) -> None:
    count = torture.lock_races(folder, 4)
    assert count.failures == []
