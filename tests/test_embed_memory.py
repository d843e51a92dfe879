"""What one more image costs the main process while it embeds, and what is read again at the end."""

from __future__ import annotations

import gc
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mirip_fast.config import EmbedConfig
from mirip_fast.data.hashes import HashMemory
from mirip_fast.data.manifest import read_manifest
from mirip_fast.features import embed as embed_module
from mirip_fast.features.embed import prepare
from mirip_fast.features.outcomes import summarise
from mirip_fast.features.shards import Shard


def pictures(folder: Path, n: int) -> list[Path]:
    folder.mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "one.jpg")
    data = (folder / "one.jpg").read_bytes()
    paths = [folder / f"{i:05d}.jpg" for i in range(n)]
    for i, path in enumerate(paths):  # bytes behind a JPEG's end: another file, the same picture
        path.write_bytes(data + i.to_bytes(4, "big"))
        str(path)  # a path keeps its text
    return paths


def run(folder: Path, paths: list[Path]) -> None:
    with HashMemory(None) as hashes:
        config = EmbedConfig(
            backbone="tiny-random", image_size=28, patches="mean", cache_dir=str(folder / "cache")
        )
        phase = prepare(config, "cpu", hashes)
        outcomes = phase.embed(paths, hashes, batch_size=16, cores=1, workers=1)
        assert summarise(outcomes)["embedded"] == len(paths)


def test_an_image_costs_little_more_than_its_place_in_the_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It keeps a bounded number of images as plain objects; the bound would hide what one costs.
    monkeypatch.setattr(HashMemory, "remember", lambda *_: None)
    live: list[int] = []
    plain = embed_module.ledger

    def watched(*arguments: object) -> object:
        gc.collect()
        live.append(tracemalloc.get_traced_memory()[0])
        return plain(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(embed_module, "ledger", watched)
    sizes, peaks = (100, 200, 2000), []
    for n in sizes:  # the first one warms up
        paths = pictures(tmp_path / str(n), n)
        tracemalloc.start()
        run(tmp_path / f"out {n}", paths)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert live[2] - live[1] < 1800 * 1500  # 150 MB more for 100,000
    assert peaks[2] - peaks[1] < 1800 * 1500


def test_features_are_not_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("features were read")

    monkeypatch.setattr(Shard, "read_features", never)
    run(tmp_path, pictures(tmp_path / "in", 40))


@pytest.mark.parametrize("table", [False, True])
def test_a_name_costs_few_bytes(tmp_path: Path, table: bool) -> None:
    names = [f"{i // 100:02d}/{i * 7919:08d}.jpg" for i in range(3000)]
    for i in range(0, len(names), 100):
        (tmp_path / names[i]).parent.mkdir()
    for name in names:
        (tmp_path / name).touch()
    if table:
        lines = [f"{name},{'SABC'[i % 4]},{i / 7},{i % 50},oil" for i, name in enumerate(names)]
        text = "\n".join(["filename,tier,tier_score,group,dept", *lines])
        (tmp_path / "metadata.csv").write_text(text)
    tracemalloc.start()
    manifest = read_manifest(tmp_path)
    paths = manifest.paths
    assert [os.path.relpath(path, tmp_path) for path in paths] == names
    gc.collect()
    there = tracemalloc.get_traced_memory()[0]
    del manifest, paths  # what goes with it is what it kept; Python's own tables grow now and then
    gc.collect()
    kept = there - tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(names) * 5 < kept < len(names) * 400  # 40 of the 150 MB that 100,000 may take
