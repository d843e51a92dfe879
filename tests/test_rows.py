"""Features read for training: the right rows in the right order, and never held twice."""

from __future__ import annotations

import hashlib
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from mirip_fast.errors import StoreError
from mirip_fast.features.recipe import View
from mirip_fast.features.shards import SeriesSpec
from mirip_fast.features.store import FeatureStore
from mirip_fast.features.store_writer import StoreWriter
from mirip_fast.ranking import rows as rows_module
from mirip_fast.ranking.rows import read_features

VIEWS = (View(28, False), View(28, True))


def fill(path: Path, n: int, width: int) -> tuple[FeatureStore, list[bytes], np.ndarray]:
    """A store with CLS and mean features of two views; all [n, views, 2 · width] as they should be read."""
    store = FeatureStore.create(path, {"some": "fingerprint"})
    hashes = [hashlib.sha256(str(i).encode()).digest() for i in range(n)]
    whole = np.random.default_rng(0).standard_normal((n, 2, 2 * width)).astype(np.float16)
    with StoreWriter(store) as writer:
        for v, view in enumerate(VIEWS):
            for k, kind in enumerate(("cls", "mean")):
                # Each series in an order of its own, as when views are filled in later.
                order = np.random.default_rng(2 * v + k).permutation(n)
                part = np.ascontiguousarray(whole[order, v, k * width : (k + 1) * width])
                spec = SeriesSpec(f"{kind}.{view.name}", (width,), "float16")
                writer.append([hashes[i] for i in order], {spec: part})
    return FeatureStore.open(path), hashes, whole.astype(np.float32)


@pytest.mark.parametrize("piece", [7, 4096])
def test_every_image_gets_its_own_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(rows_module, "_PIECE", piece)
    store, hashes, whole = fill(tmp_path / "store", 50, 4)
    wanted = np.random.default_rng(9).integers(0, 50, 80)  # some of them more than once
    asked = [hashes[i] for i in wanted]
    both = read_features(store, asked, "cls+mean", VIEWS)
    assert both.dtype == np.float32 and np.array_equal(both, whole[wanted])
    mean = read_features(store, asked, "mean", VIEWS[1:])
    assert np.array_equal(mean, whole[wanted][:, 1:, 4:])
    assert read_features(store, [], "cls", VIEWS).shape == (0, 2, 4)
    with pytest.raises(StoreError, match=r"1 of 2 images have no cls\.28"):
        read_features(store, [hashes[0], b"?" * 32], "cls", VIEWS)


def test_features_are_never_held_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "_PIECE", 256)
    store, hashes, _ = fill(tmp_path / "store", 6000, 64)
    asked = [hashes[i] for i in np.random.default_rng(1).permutation(6000)]
    read_features(store, asked[:10], "cls", VIEWS)  # whatever is loaded once
    tracemalloc.start()
    try:
        features = read_features(store, asked, "cls+mean", VIEWS)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.25 * features.nbytes
