"""What a step sees: balanced batches, mixtures, augmentation, loading; and copies of checkpoints."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import start
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image
from test_decode_pool import wait_until_gone

from mirip_fast.data.images import decode_squares, to_array
from mirip_fast.errors import ConfigError, DataError, TrainingError
from mirip_fast.finetune.data import (
    PRESETS,
    Batches,
    Pictures,
    Sample,
    balanced_batches,
    decode_all,
    mixed_grades,
    plan_epoch,
)
from mirip_fast.training.remote import RemoteSync

SIZE = 24


def tiers_of(*counts: int) -> np.ndarray:
    tiers = np.repeat(np.arange(len(counts)), counts).astype(np.int64)
    return np.random.default_rng(1).permutation(tiers)


@pytest.mark.parametrize("counts", [(30, 90, 110, 40), (8, 8), (1, 50, 50), (2, 100, 3, 60, 5)])
@pytest.mark.parametrize("batch_size", [8, 32, 500])
def test_every_batch_has_every_tier_and_group_and_every_image_comes(
    counts: tuple[int, ...], batch_size: int
) -> None:
    tiers = tiers_of(*counts)
    groups = ["big" if i % 2 else f"g{i % 8}" for i in range(len(tiers))]
    batches = balanced_batches(tiers, groups, batch_size, np.random.default_rng(0))
    sizes = [len(batch) for batch in batches]
    assert max(sizes) <= batch_size and max(sizes) - min(sizes) <= 1
    for batch in batches:
        assert set(tiers[batch]) == set(tiers)
    for tier, count in enumerate(counts):
        per_batch = [int((tiers[batch] == tier).sum()) for batch in batches]
        assert max(per_batch) - min(per_batch) <= 1
        assert sum(per_batch) == max(count, len(batches))
        if count >= len(batches):
            rows = [Counter(groups[i] for i in batch if tiers[i] == tier) for batch in batches]
            for group in set(groups):
                assert max(row[group] for row in rows) - min(row[group] for row in rows) <= 1
    seen = Counter(np.concatenate(batches).tolist())
    assert set(seen) == set(range(len(tiers)))
    many = {i for i, n in seen.items() if n > 1}
    assert all(counts[tiers[i]] < len(batches) for i in many)


def test_mixtures_have_the_grades_of_their_shares() -> None:
    tiers = tiers_of(16, 16, 16)
    within = np.arange(48) % 2
    steps = plan_epoch(
        tiers, [None] * 48, 12, 3, 1, mixing={"mixup": 0.5, "cutmix": 1.0}, size=SIZE, within=within
    )  # fmt: skip
    kinds = set()
    for step in steps:
        kinds |= {sample.box is None for sample in step}
        assert len({sample.box is None for sample in step}) == 1  # one kind per batch
        for sample, grade in zip(step, mixed_grades(step, -1.0 * tiers), strict=True):
            assert within[sample.image] == within[sample.partner] and 0 <= sample.share <= 1
            mixed = sample.share * tiers[sample.image] + (1 - sample.share) * tiers[sample.partner]
            assert grade == pytest.approx(-mixed)
            if sample.box is not None:
                left, top, right, bottom = sample.box
                assert 0 <= left <= right <= SIZE and 0 <= top <= bottom <= SIZE
                assert 1 - sample.share == pytest.approx((right - left) * (bottom - top) / SIZE**2)
    assert kinds == {True, False}
    plain = plan_epoch(tiers, [None] * 48, 12, 3, 1)
    assert all(sample.partner < 0 for step in plain for sample in step)
    for step in plain:
        assert mixed_grades(step, -1.0 * tiers).tolist() == [-tiers[s.image] for s in step]


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    files = []
    for i in range(6):
        pixels = rng.integers(0, 256, (40 + i, 60, 3)).astype(np.uint8)
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(pixels).save(files[-1])
    return files


def square(path: Path) -> torch.Tensor:
    squares = decode_squares(path.read_bytes(), [SIZE], "squash", draft=True)
    return torch.from_numpy(to_array(squares.images[0]))


def test_without_augmentation_pixels_are_those_of_phase_one(paths: list[Path]) -> None:
    pictures = Pictures(paths, SIZE)
    for i, path in enumerate(paths):
        assert torch.equal(pictures[Sample(i, 7)], square(path))  # type: ignore[arg-type]


def test_mixup_and_cutmix_mix_pixels_by_their_shares(paths: list[Path]) -> None:
    pictures = Pictures(paths, SIZE)
    first, second = square(paths[0]).float(), square(paths[3]).float()
    mixed = pictures[Sample(0, 1, partner=3, share=0.25)]
    assert isinstance(mixed, torch.Tensor)
    assert float((mixed.float() - (0.25 * first + 0.75 * second)).abs().max()) <= 0.5
    augmented = Pictures(paths, SIZE, preset="light")
    partner = augmented[Sample(3, 2)]
    assert torch.equal(augmented[Sample(0, 1, partner=3, share=0.0)], partner)  # type: ignore[arg-type]
    assert not torch.equal(augmented[Sample(3, 1)], partner)  # type: ignore[arg-type]
    cut = pictures[Sample(0, 1, partner=3, share=0.5, box=(4, 2, 10, 20))]
    assert isinstance(cut, torch.Tensor)
    inside = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    inside[2:20, 4:10] = True
    assert torch.equal(cut[inside].float(), second[inside])
    assert torch.equal(cut[~inside].float(), first[~inside])


@pytest.mark.parametrize("preset", PRESETS)
def test_augmentation_is_replayed_by_its_seed(paths: list[Path], preset: str) -> None:
    pictures = Pictures(paths, SIZE, preset=preset)
    before = torch.get_rng_state()
    first, again, other = (pictures[Sample(2, seed)] for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert isinstance(first, torch.Tensor) and isinstance(other, torch.Tensor)
    assert first.shape == (SIZE, SIZE, 3) and first.dtype == torch.uint8
    assert torch.equal(first, again)  # type: ignore[arg-type]
    assert torch.equal(first, other) == (preset == "none")


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order_whatever_loads_them(paths: list[Path], workers: int) -> None:
    pictures = Pictures(paths, SIZE, preset="strong")
    lists = [[Sample(i, i + j) for i in range(3)] for j in range(4)]
    lists.insert(2, [])
    with Batches(pictures, workers=workers, prefetch=2, pinned=False) as batches:
        for left in (True, False, False):  # the workers stay for the next epoch
            loaded = []
            for pixels in batches.load(lists):
                loaded.append(pixels)
                if left:  # an epoch that is given up leaves nothing behind for the next
                    break
            if left:
                continue
            assert [len(each) for each in loaded] == [3, 3, 0, 3, 3]
            for samples, pixels in zip(lists, loaded, strict=True):
                for sample, one in zip(samples, pixels, strict=True):
                    assert torch.equal(one, pictures[sample])  # type: ignore[arg-type]
        assert batches.waited > 0


def test_a_killed_worker_is_told(paths: list[Path]) -> None:
    """Batches that are larger than what a socket holds: the process stops half-way through sending one."""
    lists = [[Sample(i % 6, 0) for i in range(4)] for _ in range(9)]
    with Batches(Pictures(paths, 400), workers=2, prefetch=1, pinned=False) as batches:
        loading = batches.load(lists)
        next(loading)
        assert len(multiprocessing.active_children()) == 2
        for number in (
            signal.SIGTERM,
            signal.SIGKILL,
        ):  # to the whole job: leaves the workers alone
            for worker in multiprocessing.active_children():
                os.kill(worker.pid or 0, number)
            if number == signal.SIGTERM:
                next(loading)
        with pytest.raises(TrainingError, match=r"gone \(killed by SIGKILL\).*--loader-workers"):
            list(loading)


def hold(path: Path) -> int:
    """Loads in a thread that ends: the workers do not end with that."""
    batches = Batches(Pictures([path], SIZE), workers=2, prefetch=1, pinned=False)
    loading = batches.load([[Sample(0, 0)]] * 50)
    thread = threading.Thread(target=lambda: [next(loading) for _ in range(2)])
    thread.start()
    thread.join()
    time.sleep(0.3)
    for _ in range(3):
        next(loading)
    print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
    time.sleep(60)
    return 0


def test_workers_end_with_their_parent(paths: list[Path], tmp_path: Path) -> None:
    (process,) = start(lambda: hold(paths[0]), 1, tmp_path / "process")
    pids = {int(word) for word in process.said(1)[0].split()}
    assert len(pids) == 2
    os.kill(process.pid, signal.SIGKILL)  # nothing of the parent's own can tidy up
    process.wait()
    wait_until_gone(pids)


SMALL_SHM = """
import os, subprocess, sys
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/dev/shm"], check=True)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def unshared(*arguments: str) -> list[str]:
    """A command in a mount namespace of its own, where /dev/shm holds a megabyte."""
    command = ["unshare", "--mount", sys.executable, "-c", SMALL_SHM]
    try:
        tried = subprocess.run([*command, "-c", ""], capture_output=True, timeout=60, check=False)
    except FileNotFoundError:
        pytest.skip("no unshare")
    if tried.returncode:
        pytest.skip("no mount namespaces for this user")
    return [*command, *arguments]


def test_a_small_dev_shm_is_no_hindrance(paths: list[Path]) -> None:
    """Containers have 64 MiB of it. Here are 1, and 6 batches of 1.4 MiB in flight, and kept pictures."""
    code = (
        "import sys; from pathlib import Path\n"
        "from mirip_fast.finetune.data import Batches, Pictures, Sample, decode_all\n"
        "pictures = Pictures([Path(p) for p in sys.argv[1:]], 400)\n"
        "for kept in (False, True):\n"
        "    pictures.kept = decode_all(pictures, 1) if kept else None\n"
        "    with Batches(pictures, workers=2, prefetch=3, pinned=False) as batches:\n"
        "        print(sum(len(b) for b in batches.load([[Sample(i % 6, 0) for i in range(3)]] * 12)))"
    )
    done = subprocess.run(
        unshared("-c", code, *map(str, paths)), capture_output=True, text=True, timeout=60, check=False
    )  # fmt: skip
    assert done.stdout.split() == ["36", "36"], done.stderr


def test_processes_that_can_not_be_started_are_told(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refuse)
    with (
        Batches(Pictures(paths, SIZE), workers=2, prefetch=1, pinned=False) as batches,
        pytest.raises(TrainingError, match=r"only 0 could be started.*--loader-workers"),
    ):
        list(batches.load([[Sample(0, 0)]]))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_is_gone_is_named(paths: list[Path], workers: int) -> None:
    paths[4].unlink()
    with (
        Batches(Pictures(paths, SIZE), workers=workers, prefetch=1, pinned=False) as batches,
        pytest.raises(DataError, match=r"4\.png: .*bring it back") as error,
    ):
        list(batches.load([[Sample(0, 0)], [Sample(4, 0)]]))
    assert "Traceback" not in str(error.value)
    with pytest.raises(DataError, match=r"4\.png"):
        decode_all(Pictures(paths, SIZE), 0)


def test_a_failing_remote_is_told_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionRefusedError("nobody\nlistens")

    # Some services are asked for a login as soon as they are named; some fail at one file.
    monkeypatch.setattr(MemoryFileSystem, "__init__", unreachable)
    monkeypatch.setattr(MemoryFileSystem, "_cache", {})
    (tmp_path / "a.pt").write_bytes(b"a")
    with caplog.at_level("WARNING", logger="mirip_fast"):
        sync = RemoteSync("memory://far/x", "run-1", pause_s=0.01)
        sync.add(tmp_path / "a.pt")
        assert not sync.finish(20)
        with monkeypatch.context() as patch:
            patch.setattr(LocalFileSystem, "put_file", unreachable)
            sync = RemoteSync(str(tmp_path / "far"), "run-1", pause_s=0.01)
            sync.add(tmp_path / "a.pt")
            while not sync.failed:
                threading.Event().wait(0.01)
        (tmp_path / "b.pt").write_bytes(b"b")
        sync.add(tmp_path / "b.pt")
        assert not sync.finish()
    assert "a.pt could not be copied to memory://far/x: nobody listens" in caplog.text
    assert caplog.text.count("a.pt could not") == 2 and "b.pt" not in caplog.text
    assert (tmp_path / "far" / "run-1" / "b.pt").read_bytes() == b"b"


@pytest.mark.parametrize(
    "url", ["sftp://me:SECRET@host/runs", "s3://SECRET@bucket/x", "https://host/runs?sig=SECRET"]
)
def test_a_remote_with_a_password_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="--remote-sync: .*(password|signature)") as caught:
        RemoteSync(url, "run")
    assert "SECRET" not in str(caught.value)
