"""``mirip-fast cache`` as a user types it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import h5py
import pytest
from mirip_fast_cli.main import run
from PIL import Image

from mirip_fast.features.store import FeatureStore
from mirip_fast.features.store_writer import StoreWriter
from mirip_fast.files import list_files

OPTIONS = ["--backbone", "tiny-random", "--image-size", "28", "--workers", "0", "--layers", "last"]
Capture = pytest.CaptureFixture[str]


def draw(folder: Path, numbers: range) -> None:
    for n in numbers:
        path = folder / "SA"[n % 2] / f"작품 {n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (n * 9, 0, 99)).save(path)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture) -> Path:
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "data", range(6))
    assert run(["embed", "data", *OPTIONS]) == 0
    capfd.readouterr()
    return tmp_path


def damage(cache: str = "cache") -> str:
    """Spoil one row; gives the name of its image."""
    (file,) = Path(cache).glob("*/store.json")
    shard = FeatureStore.open(file.parent).shards("cls.28")[0]
    with shard.path.open("r+b") as stream:
        stream.seek(shard.features_at + 2 * shard.spec.row_bytes)
        stream.write(b"\x12\x34")
    ledger = next(Path(cache).glob("*/datasets/*/manifest.csv")).read_text(encoding="utf-8")
    with h5py.File(shard.path) as file:
        sha = file["sha256"][2].tobytes().hex()
    (line,) = [line for line in ledger.splitlines() if sha in line]
    return line.split(",")[1]


def test_info(work: Path, capfd: Capture) -> None:
    assert run(["cache", "info"]) == 0
    out = capfd.readouterr().out
    assert f"{work}/data: 6 images, 0 failed, graded, tiny-random" in out
    assert "cls.28" in out and "4090" in out and "1 store, " in out and "are free" in out
    assert run(["cache", "info", "--json"]) == 0
    info = json.loads(capfd.readouterr().out)
    assert info["stores"][0]["datasets"][0]["images"] == 6
    assert run(["cache", "info", "--cache-dir", "nowhere"]) == 1
    assert "mirip-fast embed" in capfd.readouterr().err


def test_verify_and_repair(work: Path, capfd: Capture) -> None:
    assert run(["cache", "verify"]) == 0
    assert "12 rows in 2 shards checked, whole" in capfd.readouterr().out
    image = damage()
    assert run(["cache", "verify"]) == 1
    out = capfd.readouterr().out
    assert f"row 2: {image}" in out and "mirip-fast cache verify --repair" in out
    assert run(["cache", "verify", "--repair"]) == 0
    out = capfd.readouterr().out
    assert "1 damaged rows are marked as missing" in out
    assert (
        f"Compute what is missing with: mirip-fast embed {work}/data --backbone tiny-random" in out
    )
    assert run(["cache", "verify"]) == 1  # not damaged any more, but missing
    out = capfd.readouterr().out
    assert "1 of 6 images" in out and "--repair" not in out
    assert run(["embed", "data", *OPTIONS]) == 0
    assert "1 embedded + 5 already there" in capfd.readouterr().out
    assert run(["cache", "verify"]) == 0


def test_repair_while_a_run_writes_says_who(work: Path, capfd: Capture) -> None:
    damage()
    (file,) = Path("cache").glob("*/store.json")
    with StoreWriter(FeatureStore.open(file.parent), command="mirip-fast embed other"):
        assert run(["cache", "info"]) == 0
        assert f"being written to by process {os.getpid()}" in capfd.readouterr().out
        assert run(["cache", "verify", "--repair"]) == 1
        err = capfd.readouterr().err
        assert f"process {os.getpid()}" in err and "mirip-fast embed other" in err
    assert run(["cache", "verify"]) == 1


def test_prune(work: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(work / "more", range(6, 9))
    assert run(["embed", "more", *OPTIONS, "--limit", "3"]) == 0
    assert run(["cache", "prune", "--yes"]) == 0
    out = capfd.readouterr().out
    assert "Nothing to free." in out and "--trials" in out
    before = {f: f.read_bytes() for f in Path("cache").rglob("*.h5")}
    assert run(["cache", "prune", "--trials", "--older-than", "0", "--dry-run"]) == 0
    out = capfd.readouterr().out
    assert f"forget the trial of {work}/more" in out
    assert "drop 6 rows that no data set names, keep 12" in out
    monkeypatch.setattr("click.confirm", lambda text: False)
    assert run(["cache", "prune", "--trials", "--older-than", "0"]) == 1
    assert "Nothing was changed." in capfd.readouterr().out
    assert {f: f.read_bytes() for f in Path("cache").rglob("*.h5")} == before
    assert run(["cache", "prune", "--trials", "--older-than", "0", "--yes"]) == 0
    assert "freed" in capfd.readouterr().out
    assert run(["cache", "verify"]) == 0
    assert "12 rows" in capfd.readouterr().out


def test_export(work: Path, capfd: Capture) -> None:
    assert run(["cache", "export", "out.h5"]) == 0
    out, err = capfd.readouterr()
    assert "/features/cls  6 × 64  float16" in out and "Written: out.h5 (6 images" in out
    assert "to write to out.h5" in err and "are free" in err
    with h5py.File("out.h5") as file:
        assert file["features/cls"].shape == (6, 64)
        assert sorted(file["tier"].asstr()[:]) == ["A"] * 3 + ["S"] * 3
    assert run(["cache", "export", "out.h5"]) == 1
    assert "--overwrite" in capfd.readouterr().err
    assert run(["cache", "export", "out.h5", "--overwrite", "--data", "data"]) == 0
    assert run(["cache", "export", "new.h5", "--data", "absent"]) == 1
    assert "mirip-fast embed absent" in capfd.readouterr().err


def test_merge(work: Path, capfd: Capture) -> None:
    draw(work / "more", range(4, 9))
    assert run(["embed", "more", *OPTIONS, "--cache-dir", "other"]) == 0
    assert run(["cache", "merge", "other"]) == 0
    out, err = capfd.readouterr()
    assert "cls.28: 3 rows added, 2 were there" in out and "more came along" in out
    assert "6 rows" in err and "are free" in err
    assert run(["cache", "verify"]) == 0
    assert "18 rows" in capfd.readouterr().out
    assert run(["embed", "more", *OPTIONS]) == 0
    assert "0 embedded + 5 already there" in capfd.readouterr().out
    assert run(["cache", "merge"]) == 2
    assert run(["cache", "merge", "nowhere"]) == 1
    assert "No feature store" in capfd.readouterr().err


def test_names_can_not_move_the_cursor(work: Path, capfd: Capture) -> None:
    (file,) = Path("cache").glob("*/datasets/*/dataset.json")
    info = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**info, "source": "/a\x1b[2Jb\nc", "backbone": "x\x07"}))
    list_files(file.parent)
    assert run(["cache", "info"]) == 0
    out = capfd.readouterr().out
    assert "\x1b" not in out and "\x07" not in out and r"/a\x1b[2Jb\nc" in out
