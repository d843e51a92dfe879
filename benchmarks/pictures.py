"""Pictures for the benchmarks: a folder of the user's, or generated ones."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from mirip_fast.data.image_files import scan_images
from mirip_fast.data.images import load_rgb
from mirip_fast.runtime import usable_cores


def picture_files(data: Path | None, folder: Path, n: int) -> list[Path]:
    """``n`` files of ``data``, or ``n`` generated photographs of about one megapixel."""
    if data is not None:
        return scan_images(data)[:n]
    folder.mkdir(parents=True, exist_ok=True)
    return [_photograph(folder / f"{i:05d}.jpg", i) for i in range(n)]


def _photograph(path: Path, seed: int) -> Path:
    """Blurred noise at several scales: about as hard to compress as a painting."""
    rng, pixels = np.random.default_rng(seed), np.zeros((1000, 1000, 3), np.float32)
    for side, weight in ((4, 60), (25, 40), (125, 25), (500, 16)):
        noise = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        grown = Image.fromarray(noise).resize((1000, 1000), Image.Resampling.BICUBIC)
        pixels += (np.asarray(grown, np.float32) - 128) * (weight / 64)
    Image.fromarray(np.clip(pixels + 128, 0, 255).astype(np.uint8)).save(path, quality=90)
    return path


def twelve_megapixels(paths: Sequence[Path], folder: Path) -> list[Path]:
    """The same pictures, upscaled to 12 megapixels, as JPEGs of quality 90."""
    folder.mkdir(parents=True, exist_ok=True)
    targets = [folder / f"{number:05d}.jpg" for number in range(len(paths))]
    with ThreadPoolExecutor(usable_cores()) as pool:
        list(pool.map(_upscale, paths, targets))
    return targets


def _upscale(path: Path, target: Path) -> None:
    image = load_rgb(path)
    factor = (12e6 / (image.width * image.height)) ** 0.5
    size = (round(image.width * factor), round(image.height * factor))
    image.resize(size, Image.Resampling.BICUBIC).save(target, quality=90)


def small_pictures(folder: Path, n: int) -> list[Path]:
    """``n`` different JPEGs of 32 pixels that cost next to nothing to decode."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    first = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    first.save(folder / "first.jpg", quality=80)
    data = (folder / "first.jpg").read_bytes()
    (folder / "first.jpg").unlink()
    paths = []
    for i in range(n):  # bytes behind a JPEG's end make it another file with the same picture
        paths.append(folder / f"{i // 1000:03d}" / f"{i:06d}.jpg")
        if i % 1000 == 0:
            paths[-1].parent.mkdir(exist_ok=True)
        paths[-1].write_bytes(data + i.to_bytes(8, "big"))
    return paths
