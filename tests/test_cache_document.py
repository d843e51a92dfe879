"""docs/cache.md: every snippet runs, every file it names is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from mirip_fast_cli.main import run
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "cache.md").read_text(encoding="utf-8")


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for n in range(4):
        path = tmp_path / "data" / "SA"[n % 2] / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (n * 60, 0, 99)).save(path)
    (tmp_path / "picture.png").write_bytes((tmp_path / "data" / "S" / "0.png").read_bytes())
    options = [
        "--backbone",
        "tiny-random",
        "--image-size",
        "28",
        "--workers",
        "0",
        "--layers",
        "last",
    ]
    assert run(["embed", "data", *options, "--export", "features.h5"]) == 0
    return tmp_path


def test_the_snippets_run(work: Path) -> None:
    snippets = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert len(snippets) == 3
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    code = "\n".join(snippets) + (
        "\nassert len(rows) == len(features) == 4 and len(paths) == 4"
        "\nassert (rows[sha256.hex()] == feature).all()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(4, 64) ")


def test_the_layout_is_as_described(work: Path) -> None:
    (layout,) = re.findall(r"```text\ncache/\n(.*?)```", TEXT, flags=re.DOTALL)
    named = {line.split()[0].rstrip("/") for line in layout.splitlines()}
    generic = {"7e672877deae735a", "datasets", "silhouettes-1c2d3e4f", "DIRTY-r00"}
    named = {name.replace("224", "28") for name in named} - generic
    named -= {"datasets/silhouettes-1c2d3e4f"}
    there = {path.name for path in (work / "cache").rglob("*") if path.is_file()}
    assert named == there


def test_a_shard_is_as_described(work: Path) -> None:
    import hashlib

    (path,) = (work / "cache").glob("*/cls.28-r00-00000.h5")
    with h5py.File(path) as file:
        assert set(file) == {"features", "sha256", "checksum"}
        slot = int(np.flatnonzero(file["checksum"][:])[0])
        sha, feature = file["sha256"][slot].tobytes(), file["features"][slot].tobytes()
        digest = hashlib.blake2b(sha + b"cls.28" + feature, digest_size=8, person=b"cls.28")
        assert int.from_bytes(digest.digest(), "little") == file["checksum"][slot]
