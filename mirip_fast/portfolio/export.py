"""`export`: a trained model as ONNX files, checked against torch on real images before they are kept."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from mirip_fast.config import Config
from mirip_fast.data.decode_pool import DecodeJob, DecodePool
from mirip_fast.data.image_files import scan_images
from mirip_fast.data.images import UTMOST_PIXELS
from mirip_fast.data.sources import is_gone
from mirip_fast.errors import ConfigError, DataError, MiripError, StoreError
from mirip_fast.features.backbone import load_model
from mirip_fast.features.embed import open_hashes
from mirip_fast.features.engine import default_batch_size
from mirip_fast.features.recipe import Recipe, series_name
from mirip_fast.features.store import FeatureStore
from mirip_fast.files import list_files, scratch_folder, write_json
from mirip_fast.models.model_info import ModelInfo
from mirip_fast.models.onnx_graph import OUTPUT, require_onnx, run_graph, write_graph, write_int8
from mirip_fast.portfolio.hub_folder import model_files, put_in_place, refuse_existing, write_model
from mirip_fast.ranking.graded import load_split
from mirip_fast.ranking.rows import read_features
from mirip_fast.ranking.score_model import ScoreModel
from mirip_fast.ranking.scorer import phase_of_model
from mirip_fast.ranking.torch_score import ImageScorer, MeanHead, view_sizes
from mirip_fast.runtime import our_cores
from mirip_fast.training.run_folder import SPLIT_FILE

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

HEAD_GRAPH = "head.onnx"
WHOLE_GRAPH = "model.onnx"
INT8_GRAPH = "model.int8.onnx"
PREPROCESSING = "preprocessing.json"
_HEAD_INPUT = "features"

_HEAD_BATCH = 1000  # feature rows per call of the head's graph
_GOOD_TAU = 0.9  # below this an 8-bit model is warned of
_MOST_ROWS = 10_000  # images that the head alone is checked on

_STEPS = (
    "decode the first frame (that is not of a single colour); apply the EXIF orientation; leave colour "
    "profiles aside",
    "lay transparency over white (over black, where nothing is seen on white); scale 16-bit pixels to 8 "
    "bits; convert to RGB",
    "make it square as `resize` says, `size` pixels a side: bicubic with antialiasing (as Pillow does)",
    "divide by 255; subtract `mean` and divide by `std`, per channel",
    "order the axes: batch, channel, row, column; float32",
)

Rows = NDArray[np.float32]
Compared = tuple[str, str, int, float, float]  # a row of what :func:`export_onnx` returns


def export_onnx(
    model: ScoreModel,
    out: Path,
    config: Config,
    *,
    head_only: bool = False,
    backbone: str | None = None,
    images: Path | None = None,
    overwrite: bool = False,
    with_model: bool = True,
) -> tuple[list[Path], pd.DataFrame]:
    """Write the head, and backbone and head together, as ONNX files with a free batch size.

    The members of an ensemble are pooled in one graph, as are the views of test-time augmentation: views
    of another size are further inputs. Beside the graphs lies the model itself with what gives its scores a
    meaning, so that ``rank --checkpoint OUT`` sorts as from the run. Files appear in ``out`` only when all of
    them have passed.

    Args:
        model: one head or an ensemble.
        out: folder for the files; made if missing.
        config: cache folder, and how the files are checked.
        head_only: leave the backbone out; checked on cached features.
        backbone: another place of the model's backbone, if it moved.
        images: folder of images to check on (default: those of the model's run).
        overwrite: replace files of an earlier export.
        with_model: write the model itself, too.

    Returns:
        The files in their final place, and how they compare: each float32 file against torch; the whole
        model, where some of the images are in the cache, against the scores that ``rank`` gives from there;
        the 8-bit model, where it was asked for, against the float32 one. A row has ``file``, ``against`` what
        it was compared, on how many ``images`` (or feature rows), the largest absolute ``difference`` of a
        score, and ``kendall_tau``, the agreement of the two orders (−1 … 1; NaN where all are equal).

    Raises:
        ConfigError: the extra is not installed, or ``out`` is a file or has the files already.
        BackboneError, CheckpointError: the backbone cannot be found, or is another one.
        DataError: there are no images to check on.
        MiripError: a score differs from torch's by more than the tolerance; nothing is left behind.
    """
    import pandas as pd

    if head_only and config.export.int8:
        raise ConfigError("--int8 makes the backbone smaller: leave --head-only or --int8 away")
    model.require_one_backbone("export")
    require_onnx()
    names = [HEAD_GRAPH, PREPROCESSING]
    if not head_only:
        names += [WHOLE_GRAPH] + [INT8_GRAPH] * config.export.int8
    own = model_files(model) if with_model else []
    refuse_existing(out, [*names, *own], overwrite=overwrite)
    found: list[Compared] = []
    recipe = None
    with scratch_folder(out, "export") as folder:
        if head_only:
            features = _cached_features(model, config)
        else:
            features, recipe = _export_whole(model, folder, config, images, backbone, found)
        _export_head(model, folder, config, features, found)
        found.sort(key=lambda row: row[1] != "torch")
        write_json(folder / PREPROCESSING, preprocessing(model, recipe))
        if with_model:
            write_model(model, folder, Path(config.embed.cache_dir))
            list_files(folder)
        files = put_in_place(folder, out, own)
    return files, pd.DataFrame(
        found, columns=["file", "against", "images", "difference", "kendall_tau"]
    )


def _export_head(
    model: ScoreModel, folder: Path, config: Config, features: Rows, found: list[Compared]
) -> None:
    """The head's graph, checked on [n, D] features."""
    head, path = MeanHead(model.members), folder / HEAD_GRAPH
    write_graph(path, head, [_HEAD_INPUT], [torch.zeros(2, features.shape[1])])
    # One row first, so that sizes differ.
    parts = np.split(features, [1, *range(1 + _HEAD_BATCH, len(features), _HEAD_BATCH)])
    with torch.inference_mode():
        expected = [head(torch.from_numpy(part)).numpy() for part in parts]
    scores = run_graph(path, [(part,) for part in parts])
    found.append(_accepted(path, np.concatenate(expected), scores, config))


def _export_whole(
    model: ScoreModel,
    folder: Path,
    config: Config,
    images: Path | None,
    backbone: str | None,
    found: list[Compared],
) -> tuple[Rows, Recipe]:
    """The graph of backbone and head, checked on image files; their features [n · V, D] and the recipe."""
    paths = _readable_images(model, images, config.export.check_images)
    cache_dir = Path(config.embed.cache_dir)
    with open_hashes(cache_dir) as known_hashes:
        # On the CPU and in float32, whatever the features were computed in: what ONNX will do.
        phase = phase_of_model(model.info, cache_dir, "cpu", backbone, known_hashes)
    recipe = phase.recipe
    scorer = ImageScorer(
        load_model(recipe.backbone).requires_grad_(False),
        recipe.backbone, MeanHead(model.members), model.info,
    )  # fmt: skip
    sizes, path = view_sizes(model.info), folder / WHOLE_GRAPH
    log.info("Writing backbone and head as ONNX (a minute or so) …")
    inputs = [torch.zeros(2, 3, size, size) for size in sizes]
    write_graph(path, scorer, [_input_name(size) for size in sizes], inputs)
    batch = config.embed.embed_batch_size or default_batch_size(recipe, phase.device)
    arrays: list[tuple[Rows, ...]] = []
    hashes: list[bytes] = []
    features: list[Rows] = []
    expected: list[Rows] = []
    started = time.monotonic()
    with torch.inference_mode():
        for pixels, contents in _pixel_batches(paths, recipe, sizes, batch):
            views = scorer.view_features(*(torch.from_numpy(a) for a in pixels))
            features.append(views.flatten(0, 1).numpy())
            expected.append(scorer.view_scores(views).numpy())
            arrays.append(pixels)
            if not hashes:  # the first batch: torch once, ONNX once
                seconds = 2 * (time.monotonic() - started) / len(contents) * len(paths)
                log.info("Comparing with torch on %d images: about %.0f s", len(paths), seconds)
            hashes += contents
    scores = run_graph(path, arrays)
    found.append(_accepted(path, np.concatenate(expected), scores, config))
    info = model.info
    try:  # the scores of those images that are in the cache, as ``rank`` gives them
        store = FeatureStore.open(cache_dir / info.fingerprint_id)
        known = _cached(info, store, hashes)
    except StoreError:
        known = []
    if len(known) >= 2:
        ranked = model.score(store, [hashes[i] for i in known])
        found.append(_compare(WHOLE_GRAPH, "rank, from the cache", ranked, scores[known]))
    if config.export.int8:
        write_int8(path, folder / INT8_GRAPH)
        small = run_graph(folder / INT8_GRAPH, arrays)
        found.append(_compare(INT8_GRAPH, WHOLE_GRAPH, scores, small))
        tau = found[-1][-1]
        if not tau >= _GOOD_TAU:
            log.warning(
                "%s orders the images differently: Kendall tau %.2f with the float32 model, below %g. Its "
                "ranks are not those of this model; small backbones lose most by 8 bits.",
                *(INT8_GRAPH, np.nan_to_num(tau), _GOOD_TAU),
            )
    return np.concatenate(features), recipe


def _accepted(path: Path, expected: Rows, found: Rows, config: Config) -> Compared:
    row = _compare(path.name, "torch", expected, found)
    (*_, images, difference, _), tolerance = row, config.export.tolerance
    if not difference <= tolerance:  # NaN is no agreement
        raise MiripError(
            f"{path.name} was not written: on {images} images a score differs from torch's by "
            f"{difference:.2g}, and {tolerance:g} is allowed (--tolerance)"
        )
    return row


def _compare(name: str, against: str, expected: Rows, found: Rows) -> Compared:
    from scipy.stats import kendalltau

    tau = float(kendalltau(expected, found).statistic)
    difference = float(np.abs(found.astype(np.float64) - expected).max())
    return name, against, len(found), difference, tau


def _cached_features(model: ScoreModel, config: Config) -> Rows:
    """[n, D] features of the run's images, as far as they are in the cache."""
    info = model.info
    _, hashes = _run_images(model)
    store = FeatureStore.open(Path(config.embed.cache_dir) / info.fingerprint_id)
    known = _cached(info, store, hashes)[:_MOST_ROWS]
    if len(known) < 2:
        raise DataError(
            f"{store.path} has no features of the run's images to check the head on; run "
            "`mirip-fast embed` again, or leave --head-only away"
        )
    features = read_features(store, [hashes[i] for i in known], info.features, info.views)
    return features.reshape(-1, features.shape[2])


def _cached(info: ModelInfo, store: FeatureStore, hashes: Sequence[bytes]) -> list[int]:
    """The places in ``hashes`` of those whose features are all in the cache."""
    series = [series_name(view, kind) for view in info.views for kind in info.kinds]
    known = np.all([store.rows(name, hashes) >= 0 for name in series], axis=0)
    return [int(i) for i in np.flatnonzero(known)]


def _run_images(model: ScoreModel) -> tuple[list[Path], list[bytes]]:
    """The graded images of a model's run and their content hashes, those it had not trained on first.

    Raises:
        DataError: the model lies in no run's folder, or its list is damaged.
    """
    folder = model.checkpoint.parent
    images = load_split(folder / SPLIT_FILE, model.info.tiers)
    order = sorted(range(len(images)), key=lambda i: images.splits[i])  # test, train, val
    order.sort(key=lambda i: images.splits[i] == "train")
    paths = images.paths
    return [paths[i] for i in order], [images.hashes[i] for i in order]


def _readable_images(model: ScoreModel, folder: Path | None, count: int) -> list[Path]:
    """At most ``count`` image files that are there, of a folder or else of the model's run.

    Raises:
        DataError: fewer than two; says how to name others.
    """
    if folder is not None:
        paths = scan_images(folder)
        where = f"--images {folder}"
    else:
        try:
            paths = _run_images(model)[0]
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


def _pixel_batches(
    paths: Sequence[Path], recipe: Recipe, sizes: Sequence[int], batch: int
) -> Iterator[tuple[tuple[Rows, ...], list[bytes]]]:
    """Normalised pixels, [B, 3, S, S] per size, and SHA-256 of each file; first of one image, so B differs.

    Raises:
        DataError: an image cannot be read.
    """
    mean, std = (np.array(v, np.float32) for v in (recipe.backbone.mean, recipe.backbone.std))
    how = tuple(sizes), recipe.resize, recipe.decode == "fast"
    jobs = (
        DecodeJob(i, p, *how, max_pixels=UTMOST_PIXELS, srgb=recipe.srgb)
        for i, p in enumerate(paths)
    )
    with DecodePool(min(our_cores(), len(paths)), window=2 * batch) as pool:
        decoded = pool.decode(jobs)
        for part in [paths[:1], *(paths[i : i + batch] for i in range(1, len(paths), batch))]:
            squares: list[list[Rows]] = [[] for _ in sizes]
            hashes = []
            for path, done in zip(part, decoded, strict=False):
                if done.reason is not None:
                    raise DataError(f"{path}: {done.reason}")
                hashes.append(done.sha256)
                for rows, image in zip(squares, done.images, strict=True):
                    values = (image.astype(np.float32) / 255 - mean) / std
                    rows.append(values.transpose(2, 0, 1).astype(np.float32, copy=False))
            yield tuple(np.stack(rows) for rows in squares), hashes


def _input_name(size: int) -> str:
    return f"pixels_{size}"


def preprocessing(model: ScoreModel, recipe: Recipe | None) -> dict[str, Any]:
    """What a user of the graphs has to do to an image first, and what goes in and comes out.

    Args:
        model: what was exported.
        recipe: the backbone's preprocessing; None where the backbone was not exported.
    """
    info = model.info

    def entry(name: str, *shape: int) -> dict[str, Any]:
        return {"name": name, "shape": ["batch", *shape], "dtype": "float32"}

    about: dict[str, Any] = {
        "output": {"name": OUTPUT, "shape": ["batch"], "meaning": "higher is better"},
        "tiers": list(info.tiers),
        "members": len(model.members),
        "views": [{"size": view.size, "mirrored": view.flip} for view in info.views],
        "fingerprint": info.fingerprint,
        "head": {
            "file": HEAD_GRAPH,
            "inputs": [entry(_HEAD_INPUT, info.input_dim)],
            "features": list(info.kinds),
            "note": "one row per image and view; an image's score is the mean over its views",
        },
    }
    if recipe is None:
        return about
    image = {
        "file": WHOLE_GRAPH,
        "inputs": [entry(_input_name(size), 3, size, size) for size in view_sizes(info)],
        "steps": list(_STEPS),
        "resize": recipe.resize,
        "colours": recipe.colours,
        "mean": list(recipe.backbone.mean),
        "std": list(recipe.backbone.std),
        "jpeg": "decoded at 1/2, 1/4 or 1/8 where both sides stay at least twice `size`; a full decode "
        "differs slightly"
        if recipe.decode == "fast"
        else "decoded at full size",
        "note": "mirroring and the mean over views and members happen inside",
    }
    return {"model": image, **about}
