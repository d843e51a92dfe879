"""`export`: a trained model as ONNX files, checked against torch on real images before they are kept."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mirip_fast.config import Config
from mirip_fast.errors import ConfigError, DataError, MiripError, StoreError
from mirip_fast.features.backbone import load_model
from mirip_fast.features.forward import default_batch_size
from mirip_fast.features.phase_one import open_hashes
from mirip_fast.features.recipe import Recipe, series_name
from mirip_fast.features.store import FeatureStore
from mirip_fast.files import list_files, scratch_folder, write_json
from mirip_fast.models.model_info import ModelInfo
from mirip_fast.models.onnx_graph import Graph, require_onnx, write_graph, write_int8
from mirip_fast.portfolio.check_images import pixel_batches, readable_images, run_images
from mirip_fast.portfolio.hub_folder import model_files, put_in_place, refuse_existing, write_model
from mirip_fast.portfolio.preprocessing import HEAD_INPUT, input_name, preprocessing
from mirip_fast.ranking.rows import read_features
from mirip_fast.ranking.scorer import ScoreModel, phase_of_model
from mirip_fast.ranking.torch_score import ImageScorer, MeanHead, view_sizes

log = logging.getLogger(__name__)

HEAD_GRAPH = "head.onnx"
WHOLE_GRAPH = "model.onnx"
INT8_GRAPH = "model.int8.onnx"
PREPROCESSING = "preprocessing.json"

_HEAD_BATCH = 1000  # feature rows per call of the head's graph
_GOOD_TAU = 0.9  # below this an 8-bit model is warned of
_MOST_ROWS = 10_000  # images that the head alone is checked on


@dataclass(frozen=True)
class Parity:
    """How far an ONNX file is from what it was compared with, on n images (or feature rows).

    Attributes:
        file: name of the ONNX file.
        images: n.
        difference: largest absolute difference of a score.
        kendall_tau: agreement of the two orders, −1 … 1; None where all scores are equal.
    """

    file: str
    images: int
    difference: float
    kendall_tau: float | None


@dataclass
class Exported:
    """What was written, and how it compares.

    Attributes:
        files: the files, in their final place.
        parity: each float32 file against torch.
        int8: the 8-bit model against the float32 one; None where it was not asked for.
        ranked: the whole model against the scores that ``rank`` gives from cached features; None where
            none of the images is in the cache, or the whole model was not exported.
    """

    files: list[Path] = field(default_factory=list)
    parity: list[Parity] = field(default_factory=list)
    int8: Parity | None = None
    ranked: Parity | None = None


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
) -> Exported:
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

    Raises:
        ConfigError: the extra is not installed, or ``out`` is a file or has the files already.
        BackboneError, CheckpointError: the backbone can not be found, or is another one.
        DataError: there are no images to check on.
        MiripError: a score differs from torch's by more than the tolerance; nothing is left behind.
    """
    if head_only and config.export.int8:
        raise ConfigError("--int8 makes the backbone smaller: leave --head-only or --int8 away")
    model.require_one_backbone("export")
    require_onnx()
    names = [HEAD_GRAPH, PREPROCESSING]
    if not head_only:
        names += [WHOLE_GRAPH] + [INT8_GRAPH] * config.export.int8
    own = model_files(model) if with_model else []
    refuse_existing(out, [*names, *own], overwrite=overwrite)
    with scratch_folder(out, "export") as folder:
        work = _Export(model, folder, config)
        if head_only:
            work.head(_cached_features(model, config))
        else:
            work.whole(images, backbone)
        write_json(folder / PREPROCESSING, preprocessing(model, work.recipe))
        done = work.done
        if with_model:
            write_model(model, folder, Path(config.embed.cache_dir))
            list_files(folder)
        done.files += put_in_place(folder, out, own)
    return done


@dataclass
class _Export:
    """The state of one call of :func:`export_onnx`; files go into ``folder``."""

    model: ScoreModel
    folder: Path
    config: Config
    recipe: Recipe | None = None
    done: Exported = field(default_factory=Exported)

    def head(self, features: NDArray[np.float32]) -> None:
        """The head's graph, checked on [n, D] features."""
        head = MeanHead(self.model.members)
        path = self.folder / HEAD_GRAPH
        write_graph(path, head, [HEAD_INPUT], [torch.zeros(2, features.shape[1])])
        parts = [features[:1], *_parts(features[1:], _HEAD_BATCH)]
        with torch.inference_mode():
            expected = [head(torch.from_numpy(part)).numpy() for part in parts]
        self._accept(path, np.concatenate(expected), _scores(path, [(part,) for part in parts]))

    def whole(self, images: Path | None, backbone: str | None) -> None:
        """Both graphs, checked on image files."""
        model, options = self.model, self.config.export
        paths = readable_images(model, images, options.check_images)
        cache_dir = Path(self.config.embed.cache_dir)
        with open_hashes(cache_dir) as hashes:
            # On the CPU and in float32, whatever the features were computed in: what ONNX will do.
            phase = phase_of_model(model.info, cache_dir, "cpu", backbone, hashes)
        self.recipe = recipe = phase.recipe
        scorer = ImageScorer(
            load_model(recipe.backbone).requires_grad_(False),
            recipe.backbone, MeanHead(model.members), model.info,
        )  # fmt: skip
        sizes = view_sizes(model.info)
        path = self.folder / WHOLE_GRAPH
        log.info("Writing backbone and head as ONNX (a minute or so) …")
        write_graph(
            path, scorer, [input_name(size) for size in sizes],
            [torch.zeros(2, 3, size, size) for size in sizes],
        )  # fmt: skip
        batch = self.config.embed.embed_batch_size or default_batch_size(recipe, phase.device)
        arrays: list[tuple[NDArray[np.float32], ...]] = []
        hashes_of: list[bytes] = []
        features: list[NDArray[np.float32]] = []
        expected: list[NDArray[np.float32]] = []
        clock = _Clock(len(paths))
        with torch.inference_mode():
            for pixels in pixel_batches(paths, recipe, sizes, batch):
                views = scorer.view_features(*(torch.from_numpy(a) for a in pixels.arrays))
                features.append(views.flatten(0, 1).numpy())
                expected.append(scorer.view_scores(views).numpy())
                arrays.append(pixels.arrays)
                hashes_of += pixels.hashes
                clock(len(pixels.hashes))
        found = _scores(path, arrays)
        self._accept(path, np.concatenate(expected), found)
        self.done.ranked = self._against_rank(hashes_of, found)
        if options.int8:
            self._int8(path, arrays, found)
        self.head(np.concatenate(features))

    def _accept(
        self, path: Path, expected: NDArray[np.float32], found: NDArray[np.float32]
    ) -> None:
        parity = _compare(path.name, expected, found)
        tolerance = self.config.export.tolerance
        if not parity.difference <= tolerance:  # NaN is no agreement
            raise MiripError(
                f"{path.name} was not written: on {parity.images} images a score differs from torch's by "
                f"{parity.difference:.2g}, and {tolerance:g} is allowed (--tolerance)"
            )
        self.done.parity.append(parity)

    def _int8(
        self,
        path: Path,
        arrays: Sequence[tuple[NDArray[np.float32], ...]],
        exact: NDArray[np.float32],
    ) -> None:
        target = path.with_name(INT8_GRAPH)
        write_int8(path, target)
        self.done.int8 = parity = _compare(INT8_GRAPH, exact, _scores(target, arrays))
        if parity.kendall_tau is None or parity.kendall_tau < _GOOD_TAU:
            log.warning(
                "%s orders the images differently: Kendall tau %.2f with the float32 model, below %g. Its "
                "ranks are not those of this model; small backbones lose most by 8 bits.",
                INT8_GRAPH,
                parity.kendall_tau or 0.0,
                _GOOD_TAU,
            )

    def _against_rank(self, hashes: Sequence[bytes], found: NDArray[np.float32]) -> Parity | None:
        """The scores of those images that are in the cache, as ``rank`` gives them."""
        info = self.model.info
        try:
            store = FeatureStore.open(Path(self.config.embed.cache_dir) / info.fingerprint_id)
        except StoreError:
            return None
        known = _cached(info, store, hashes)
        if len(known) < 2:
            return None
        expected = self.model.score(store, [hashes[i] for i in known])
        return _compare(WHOLE_GRAPH, expected, found[known])


def _compare(name: str, expected: NDArray[np.float32], found: NDArray[np.float32]) -> Parity:
    from scipy.stats import kendalltau

    tau = float(kendalltau(expected, found).statistic)
    difference = float(np.abs(found.astype(np.float64) - expected).max())
    return Parity(name, len(found), difference, None if np.isnan(tau) else tau)


def _scores(path: Path, batches: Sequence[tuple[NDArray[np.float32], ...]]) -> NDArray[np.float32]:
    graph = Graph(path)
    return np.concatenate([graph(*arrays) for arrays in batches])


def _parts(rows: NDArray[np.float32], size: int) -> list[NDArray[np.float32]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def _cached_features(model: ScoreModel, config: Config) -> NDArray[np.float32]:
    """[n, D] features of the run's images, as far as they are in the cache."""
    info = model.info
    _, hashes = run_images(model)
    store = FeatureStore.open(Path(config.embed.cache_dir) / info.fingerprint_id)
    known = _cached(info, store, hashes)[:_MOST_ROWS]
    if len(known) < 2:
        raise DataError(
            f"{store.path} has no features of the run's images to check the head on; run "
            "`mirip-fast embed` again, or leave --head-only away"
        )
    wanted = [hashes[i] for i in known]
    features = read_features(store, wanted, info.features, info.views)
    return features.reshape(-1, features.shape[2])


def _cached(info: ModelInfo, store: FeatureStore, hashes: Sequence[bytes]) -> list[int]:
    """The places in ``hashes`` of those whose features are all in the cache."""
    known = np.ones(len(hashes), bool)
    for view in info.views:
        for kind in info.kinds:
            known &= store.rows(series_name(view, kind), hashes) >= 0
    return [int(i) for i in np.flatnonzero(known)]


class _Clock:
    """Tells after the first image how long all of them will take: torch once, ONNX once."""

    def __init__(self, total: int):
        self._total, self._started, self._told = total, time.monotonic(), False

    def __call__(self, count: int) -> None:
        if not self._told:
            seconds = 2 * (time.monotonic() - self._started) / count * self._total
            log.info("Comparing with torch on %d images: about %.0f s", self._total, seconds)
            self._told = True
