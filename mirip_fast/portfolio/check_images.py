"""The real images that an exported model is compared with torch on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mirip_fast.data.decode_pool import DecodeJob, DecodePool
from mirip_fast.data.image_files import scan_images
from mirip_fast.data.images import UTMOST_PIXELS
from mirip_fast.data.sources import is_gone
from mirip_fast.errors import DataError
from mirip_fast.features.recipe import Recipe
from mirip_fast.ranking.graded import load_split
from mirip_fast.ranking.scorer import ScoreModel
from mirip_fast.runtime import our_cores
from mirip_fast.settings import config_from_dict
from mirip_fast.training.run_folder import SPLIT_FILE, Run


@dataclass(frozen=True)
class Pixels:
    """A batch of images as the backbone sees them.

    Attributes:
        arrays: [B, 3, S, S] float32 per size, normalised.
        hashes: SHA-256 of each file's bytes, [B].
    """

    arrays: tuple[NDArray[np.float32], ...]
    hashes: tuple[bytes, ...]


def run_images(model: ScoreModel) -> tuple[list[Path], list[bytes]]:
    """The graded images of a model's run and their content hashes, those it had not trained on first.

    Raises:
        DataError: the model lies in no run's folder, or its list is damaged.
    """
    folder = model.checkpoint.parent
    data = config_from_dict({"data": Run(folder).info.get("data", {})}).data
    images = load_split(folder / SPLIT_FILE, model.info.tiers, data)
    order = sorted(range(len(images)), key=lambda i: images.splits[i])  # test, train, val
    order.sort(key=lambda i: images.splits[i] == "train")
    records = images.manifest.records
    return [records[i].path for i in order], [images.hashes[i] for i in order]


def readable_images(model: ScoreModel, folder: Path | None, count: int) -> list[Path]:
    """At most ``count`` image files that are there, of a folder or else of the model's run.

    Raises:
        DataError: fewer than two; says how to name others.
    """
    if folder is not None:
        paths = scan_images(folder)
        where = f"--images {folder}"
    else:
        try:
            paths = run_images(model)[0]
        except DataError as error:
            raise DataError(
                f"There are no images to compare with torch on: {error}. Name a folder with --images."
            ) from error
        where = "the run's images"
    found = [path for path in paths if not is_gone(path)][:count]
    if len(found) < 2:
        raise DataError(
            f"{where}: {len(found)} of {len(paths)} are there, and at least 2 are needed to compare "
            "with torch on; name a folder of pictures with --images"
        )
    return found


def pixel_batches(
    paths: Sequence[Path], recipe: Recipe, sizes: Sequence[int], batch: int
) -> Iterator[Pixels]:
    """The images as normalised float32 pixels; the first batch has one image, so that sizes differ.

    Raises:
        DataError: an image can not be read.
    """
    mean, std = (np.array(v, np.float32) for v in (recipe.backbone.mean, recipe.backbone.std))
    how = tuple(sizes), recipe.resize, recipe.decode == "fast"
    jobs = (DecodeJob(i, p, *how, max_pixels=UTMOST_PIXELS) for i, p in enumerate(paths))
    with DecodePool(min(our_cores(), len(paths)), window=2 * batch) as pool:
        decoded = pool.decode(jobs)
        for part in [paths[:1], *(paths[i : i + batch] for i in range(1, len(paths), batch))]:
            squares: list[list[NDArray[np.float32]]] = [[] for _ in sizes]
            hashes = []
            for path, done in zip(part, decoded, strict=False):
                if done.reason is not None:
                    raise DataError(f"{path}: {done.reason}")
                hashes.append(done.sha256)
                for rows, image in zip(squares, done.images, strict=True):
                    values = (image.astype(np.float32) / 255 - mean) / std
                    rows.append(values.transpose(2, 0, 1).astype(np.float32, copy=False))
            yield Pixels(tuple(np.stack(rows) for rows in squares), tuple(hashes))
