"""A cache whose features are made up, so that a test decides how alike two pictures are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from mirip_fast.config import Config, DataConfig
from mirip_fast.data.manifest import read_manifest
from mirip_fast.errors import ImageError
from mirip_fast.features.datasets import Dataset, save_dataset
from mirip_fast.features.embed import open_hashes, prepare
from mirip_fast.features.outcomes import ledger
from mirip_fast.features.store_writer import StoreWriter


def settings(cache: Path, size: int = 28) -> Config:
    """As a command would have them, with the built-in backbone."""
    config = Config()
    config.embed.backbone, config.embed.image_size, config.embed.workers = "tiny-random", size, 0
    config.embed.cache_dir, config.runtime.device = str(cache), "cpu"
    return config


def picture(path: Path, colour: int, **options: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 12), (colour % 256, colour // 256, 77)).save(path, **options)


def folder_of(folder: Path, degrees: Mapping[str, float]) -> Path:
    """A folder with one different picture per name."""
    for number, name in enumerate(degrees):
        picture(folder / name, number)
    return folder


def put(config: Config, source: Path, degrees: Mapping[str, float]) -> Dataset:
    """Embed ``source`` with made-up features.

    The cosine of two pictures is that of the difference of their degrees; the picture's name without
    its folder counts, and names without degrees fail.
    """
    data = DataConfig()
    manifest = read_manifest(source, data)
    cache = Path(config.embed.cache_dir)
    with open_hashes(cache) as hashes:
        phase = prepare(config.embed, "cpu", hashes)
        known = list(hashes.sha256_many(manifest.paths))
    spec = phase.recipe.series(phase.recipe.views[0], "cls")
    features: dict[bytes, np.ndarray] = {}
    failures = {}
    for path, sha in zip(manifest.paths, known, strict=True):
        angle = degrees.get(path.name)
        if isinstance(sha, ImageError):
            continue
        if angle is None:
            failures[sha] = "no degrees"
            continue
        row = np.zeros(spec.shape[0])
        row[:2] = 3 * math.cos(math.radians(angle)), 3 * math.sin(math.radians(angle))
        features.setdefault(sha, row)
    if features:
        with StoreWriter(phase.store) as writer:
            rows = np.stack(list(features.values())).astype(spec.dtype)
            writer.append(list(features), {spec: rows})
    images = manifest.table.assign(**ledger(known, features, failures))
    return save_dataset(phase.store.path, manifest, images, phase.recipe, data, config.embed)
