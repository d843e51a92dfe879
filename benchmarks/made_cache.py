"""A cache of made-up features, for measuring phase two without a large backbone."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mirip_fast.config import Config
from mirip_fast.data.manifest import read_manifest
from mirip_fast.features.datasets import save_dataset
from mirip_fast.features.embed import open_hashes, prepare
from mirip_fast.features.outcomes import ledger
from mirip_fast.features.recipe import series_name
from mirip_fast.features.store_writer import StoreWriter

Array = NDArray[Any]


def made_up_rows(n: int, width: int, seed: int = 0) -> tuple[Array, Array]:
    """Features [n, width] float32 and tiers [n], which are a noisy function of them."""
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((n, width), dtype=np.float32)
    grade = features @ rng.standard_normal(width, dtype=np.float32) / width**0.5
    grade += rng.standard_normal(n, dtype=np.float32)
    return features, as_tiers(grade)


def bent_grades(n: int, width: int, seed: int = 0) -> tuple[Array, Array]:
    """Correlated features [n, width] float32; the grade [n] is a linear and a bent part, and noise."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, width)) @ (rng.normal(size=(width, width)) / width**0.5)
    straight = features @ rng.normal(size=width)
    bent = np.abs(features @ rng.normal(size=width))
    grade = straight / straight.std() + bent / bent.std()
    grade += grade.std() * rng.normal(size=n)
    return features.astype(np.float32), grade


def bent_rows(n: int, width: int, seed: int = 0) -> tuple[Array, Array]:
    """:func:`bent_grades`, with tiers [n] in place of the grades."""
    features, grade = bent_grades(n, width, seed)
    return features, as_tiers(grade)


def clustered_rows(n: int, width: int, seed: int = 0, clusters: int = 40) -> tuple[Array, Array]:
    """Features [n, width] float32 in clusters; what is good (tiers [n]) differs from one to the next."""
    rng = np.random.default_rng(seed)
    cluster = rng.integers(clusters, size=n)
    around = rng.normal(size=(clusters, width))
    own = rng.normal(size=(n, width))
    tastes = rng.normal(size=(clusters, width)) + rng.normal(size=width)
    grade = rng.normal(size=clusters)[cluster]
    grade += (own * tastes[cluster]).sum(1) / (2 * width) ** 0.5
    grade += 0.7 * rng.normal(size=n)
    return (around[cluster] + own).astype(np.float32), as_tiers(grade)


def as_tiers(grade: Array) -> Array:
    """[n] tiers, 0 the best: 5 % S, 32 % A, 42 % B, 21 % C."""
    return np.searchsorted(np.quantile(-grade, [0.05, 0.37, 0.79]), -grade)


def made_cache(folder: Path, n: int, width: int = 1024) -> tuple[Path, Path]:
    """Pictures of one pixel, grades, and a cache with made-up CLS features for them.

    Returns:
        The data folder and the cache folder.
    """
    data, cache = folder / "data", folder / "cache"
    (data / "images").mkdir(parents=True)
    features, tiers = made_up_rows(n, width)
    lines = ["image_id,filename,tier"]
    hashes = []
    for i in range(n):
        path = data / "images" / f"{i:06d}.bmp"
        Image.new("RGB", (1, 1), (i >> 16, i >> 8 & 255, i & 255)).save(path)  # no two are the same
        hashes.append(hashlib.sha256(path.read_bytes()).digest())
        lines.append(f"{i},{path.name},{'SABC'[tiers[i]]}")
    (data / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = Config()
    config.embed = dataclasses.replace(
        config.embed, backbone=str(_backbone(folder / "backbone", width)), image_size=56,
        patches="none", cache_dir=str(cache),
    )  # fmt: skip
    manifest = read_manifest(data / "metadata.csv", config.data)
    order = [int(image_id) for image_id in manifest.ids]
    with open_hashes(cache) as memory:
        phase = prepare(config.embed, "cpu", memory)
        list(memory.sha256_many(manifest.paths))
    spec = phase.recipe.series(phase.recipe.views[0], "cls")
    assert spec.name == series_name(phase.recipe.views[0], "cls")
    with StoreWriter(phase.store, command="benchmark") as writer:
        for start in range(0, n, 4096):
            some = order[start : start + 4096]
            rows = features[some].astype(spec.dtype)
            writer.append([hashes[i] for i in some], {spec: rows})
    images = manifest.table.assign(**ledger([hashes[i] for i in order], set(hashes)))
    save_dataset(phase.store.path, manifest, images, phase.recipe, config.data, config.embed)
    return data, cache


def _backbone(folder: Path, width: int) -> Path:
    """A backbone of one block: phase two only asks for its name and width."""
    from transformers import Dinov2Config, Dinov2Model

    shape = Dinov2Config(
        hidden_size=width, num_hidden_layers=1, num_attention_heads=width // 64, patch_size=14,
        image_size=56, mlp_ratio=1,
    )  # fmt: skip
    Dinov2Model(shape).save_pretrained(folder)
    return folder
