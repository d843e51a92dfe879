"""Several processes embed one data set: shares without talking, one killed, the same features in the end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from made_tables import images_of
from mirip_fast_cli.main import run
from test_embed import draw

from mirip_fast.errors import ConfigError
from mirip_fast.features.datasets import Dataset, find_datasets
from mirip_fast.features.store import FeatureStore
from mirip_fast.runtime import Ranks, distributed

EMBED = [
    "embed",
    "data",
    "--backbone",
    "tiny-random",
    "--image-size",
    "28",
    "--store-dtype",
    "float32",
]
SIZE = 3


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for i in range(60):
        draw(tmp_path / "data" / f"{i:02d}.png", i)
    for i in range(0, 60, 10):  # copies, which may be another rank's share
        (tmp_path / "data" / f"copy {i}.png").write_bytes(
            (tmp_path / f"data/{i:02d}.png").read_bytes()
        )
    (tmp_path / "data" / "broken.png").write_text("no picture")
    return tmp_path


def start(rank: int, *options: str) -> subprocess.Popen[str]:
    env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(SIZE), "LOCAL_RANK": str(rank)}
    return subprocess.Popen(
        [sys.executable, "-m", "mirip_fast_cli", *EMBED, "--cache-dir", "many", *options],
        env={**env, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def features(cache: str) -> tuple[dict[str, np.ndarray], Dataset]:
    """Image → its features; and the data set, whose ledger has to name every image once."""
    (dataset,) = find_datasets(Path(cache))
    store = FeatureStore.open(dataset.store_path, verify=True)
    found = {}
    for entry in images_of(dataset.images()):
        if entry.status != "failed":
            assert entry.sha256 is not None
            row = store.rows("cls.28", [entry.sha256])
            found[entry.path.name] = store.read("cls.28", row)[0]
    return found, dataset


def test_three_processes_one_of_them_killed(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run([*EMBED, "--cache-dir", "one", "--workers", "0"]) == 0
    capfd.readouterr()
    whole, _ = features("one")
    assert len(whole) == 66

    ranks = [start(rank, "--workers", "0", "--batch-size", "1") for rank in range(SIZE)]
    deadline = time.monotonic() + 60
    while not list(Path("many").glob("*/cls.28-r02-*.h5")) and time.monotonic() < deadline:
        time.sleep(0.002)
    ranks[1].send_signal(signal.SIGKILL)
    said = [rank.communicate(timeout=60) for rank in ranks]
    assert ranks[1].returncode == -signal.SIGKILL, "it ended before it could be killed"
    for rank in (0, 2):
        assert ranks[rank].returncode == 0, said[rank]
    assert said[0][0].startswith("Rank 0 of 3: ") and "without torchrun" in said[0][0]
    assert not find_datasets(Path("many"))

    # A run alone computes the share that is missing, and writes the list of the images.
    assert run([*EMBED, "--cache-dir", "many", "--workers", "0"]) == 0
    counted = re.search(r"67 images = (\d+) embedded \+ (\d+) already", capfd.readouterr().out)
    assert counted is not None and int(counted[1]) > 0 and int(counted[2]) > 30
    many, dataset = features("many")
    assert many.keys() == whole.keys()
    for name, row in whole.items():
        np.testing.assert_allclose(many[name], row, atol=1e-5, err_msg=name)
    statuses = [entry.status for entry in images_of(dataset.images())]
    assert statuses.count("failed") == 1 and statuses.count("duplicate") == 6
    assert len(statuses) == 67


def test_one_of_several_exports_nothing(
    work: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run([*EMBED, "--export", "all.h5"]) == 1
    assert "run alone" in capfd.readouterr().err


def test_ray_actors_of_which_one_is_killed(
    work: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the lost actor had in hand another does again; the features are those of one process, to the bit."""
    pytest.importorskip("ray", reason="Ray is not installed")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    one_by_one = ["--batch-size", "1", "--workers", "0"]
    assert run([*EMBED, "--cache-dir", "one", *one_by_one]) == 0
    whole, _ = features("one")
    capfd.readouterr()

    def kill() -> None:  # in the midst of its first images
        deadline = time.monotonic() + 300
        while not list(Path("many").glob("*/cls.28-r02-*.h5")) and time.monotonic() < deadline:
            time.sleep(0.002)
        (lock,) = Path("many").glob("*/LOCK-r02")
        os.kill(json.loads(lock.read_text())["pid"], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    ray = ["--engine", "ray", "--actors", str(SIZE)]
    assert run([*EMBED, "--cache-dir", "many", *one_by_one, *ray]) == 0
    killer.join()
    out, err = capfd.readouterr()
    assert "An actor was lost" in err and "67 images = " in out
    many, dataset = features("many")
    assert many.keys() == whole.keys()
    for name, row in whole.items():
        assert many[name].tobytes() == row.tobytes(), name
    statuses = [entry.status for entry in images_of(dataset.images())]
    assert statuses.count("failed") == 1 and statuses.count("duplicate") == 6
    parts = {s.part for s in FeatureStore.open(dataset.store_path).shards("cls.28")}
    assert len(parts) > 1 and 0 not in parts
    assert run([*EMBED, "--cache-dir", "many", "--workers", "0"]) == 0
    assert "0 embedded + 60 already there + 6 duplicates + 1 failed" in capfd.readouterr().out


def test_what_does_not_go_with_ray(
    work: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run([*EMBED, "--actors", "2"]) == 1
    assert "only valid with --engine ray" in capfd.readouterr().err
    assert run([*EMBED, "--engine", "ray", "--explain-speed"]) == 1
    assert "only valid with --engine local" in capfd.readouterr().err
    monkeypatch.setitem(sys.modules, "ray", None)
    assert run([*EMBED, "--engine", "ray"]) == 1
    assert "pip install ray" in capfd.readouterr().err
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run([*EMBED, "--engine", "ray"]) == 1
    assert "leave torchrun" in capfd.readouterr().err


def ranks(rank: int, size: int = SIZE, run_id: str = "a") -> Ranks:
    return Ranks(rank, size, rank, size, run_id, bound=False)


def test_every_image_is_one_rank_s_share() -> None:
    paths = [Path(f"/data/{i}.png") for i in range(3000)]
    owners = [[r for r in range(7) if ranks(r, 7).takes(path)] for path in paths]
    assert all(len(owner) == 1 for owner in owners)
    counts = np.bincount([owner[0] for owner in owners])
    assert counts.min() > 350 and counts.max() < 510
    # What one rank left is spread over the next run.
    left = [path for path, owner in zip(paths, owners, strict=True) if owner == [3]]
    again = np.bincount([r for path in left for r in range(7) if ranks(r, 7, "b").takes(path)])
    assert again.min() > 0.08 * len(left)


def test_what_torchrun_and_slurm_say() -> None:
    assert distributed({}) is None
    assert distributed({"RANK": "0", "WORLD_SIZE": "1"}) is None
    assert distributed({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}) is None
    names = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    got = distributed({**names, "TORCHELASTIC_RUN_ID": "job", "SLURM_PROCID": "0"})
    assert got is not None and (got.rank, got.size, got.local, got.local_size) == (5, 8, 1, 4)
    assert "job" in got.run_id
    other = distributed({**names, "RANK": "2", "TORCHELASTIC_RUN_ID": "job", "SLURM_PROCID": "0"})
    assert other is not None and other.run_id == got.run_id
    slurm = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "77"}
    got = distributed(slurm)
    assert got is not None and (got.rank, got.size, got.local) == (3, 4, 1) and "77" in got.run_id
    with pytest.raises(ConfigError, match="WORLD_SIZE=x"):
        distributed({"RANK": "0", "WORLD_SIZE": "x"})
    with pytest.raises(ConfigError, match="number 8 of 8"):
        distributed({"RANK": "8", "WORLD_SIZE": "8"})
