"""Tars of small pictures, honest and hostile."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from made_tables import images_of
from PIL import Image

from mirip_fast.config import Config
from mirip_fast.data import remote, sources
from mirip_fast.features.phase_one import EmbedDone, embed_data

OLD = 1_700_000_000  # a time stamp that is settled


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((24, 24)).save(stream, "PNG")
    return stream.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes | dict | str) -> None:
    if isinstance(content, dict):
        content = json.dumps(content).encode()
    elif isinstance(content, str):
        content = content.encode()
    info = tarfile.TarInfo(name)
    info.size, info.mtime = len(content), OLD
    tar.addfile(info, io.BytesIO(content))


def special(tar: tarfile.TarFile, name: str, kind: bytes, target: str = "") -> None:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    tar.addfile(info)


def make_tar(path: Path, members: Mapping[str, bytes | dict | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members.items():
            add(tar, name, content)
    return aged(path)


def aged(path: Path, seconds: int = OLD) -> Path:
    os.utime(path, (seconds, seconds))
    return path


def config_of(folder: Path, workers: int = 0) -> Config:
    config = Config()
    config.embed.backbone, config.embed.image_size = "tiny-random", 28
    config.embed.cache_dir, config.embed.workers = str(folder / "cache"), workers
    config.runtime.device = "cpu"
    return config


def embedded(source: Path | str, folder: Path, **options: object) -> EmbedDone:
    return embed_data(source, config_of(folder, options.pop("workers", 0)), **options)


def counts(done: EmbedDone) -> tuple[int, int, int, int]:
    _, embedded, present, duplicate, failed, left = done.summary.values()
    assert left == 0
    return embedded, present, duplicate, failed


def reasons(done: EmbedDone) -> dict[str, str]:
    assert done.dataset is not None
    return {
        e.image_id: e.reason or "" for e in images_of(done.dataset.images()) if e.status == "failed"
    }


def samples(start: int, n: int = 4) -> dict[str, bytes | dict | str]:
    made: dict[str, bytes | dict | str] = {}
    for i in range(start, start + n):
        made[f"{i:04d}.png"] = picture(i)
        made[f"{i:04d}.json"] = {
            "tier": "SABC"[i % 4],
            "tier_score": i / 2,
            "dept": "oil",
            "box": [1],
        }
    return made


def another_process() -> None:
    """Forget what this process has learned of tars and addresses, as if it were another."""
    sources._tars.clear()
    sources._index_folder = None
    remote._files.clear()
