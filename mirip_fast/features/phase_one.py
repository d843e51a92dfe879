"""Phase one as a whole: from embed's options to a store that has every image's features."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mirip_fast.config import Config, EmbedConfig
from mirip_fast.data.hashes import HashMemory
from mirip_fast.data.locate import tell_unlisted
from mirip_fast.data.manifest import read_manifest
from mirip_fast.data.sources import keep_indexes_in
from mirip_fast.errors import BackboneError, StoreError
from mirip_fast.features.backbone_files import find_backbone, names_of_backbones
from mirip_fast.features.datasets import Dataset, save_dataset
from mirip_fast.features.embed import OnProgress, PhaseOne, open_hashes, prepare, with_kinds
from mirip_fast.features.engine import Speed
from mirip_fast.features.outcomes import ledger, summarise
from mirip_fast.features.ray_engine import embed_on_ray
from mirip_fast.features.store import FeatureStore, differing_fields
from mirip_fast.files import temporary_folder
from mirip_fast.runtime import Ranks, distributed, our_cores, resolve_device
from mirip_fast.text import shown

if TYPE_CHECKING:
    import pandas as pd


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EmbedDone:
    """What `embed` leaves behind.

    One of several processes (see :class:`mirip_fast.runtime.Ranks`) has the images of its share, and no data
    set: a run alone writes that, once all have ended.
    """

    dataset: Dataset | None
    images: pd.DataFrame  # and what became of each, see mirip_fast.data.table
    summary: dict[str, int]  # inputs = embedded + present + duplicate + failed
    compute_seconds: float  # from the first to the last batch, start-up left out
    store_path: Path
    speed: Speed | None = None  # where the time went, if anything was computed here
    ranks: Ranks | None = None


def default_workers(configured: int | None) -> int:
    """Processes that decode, when none are asked for: one per core, at most 16."""
    return min(16, our_cores()) if configured is None else configured


def settings_of(
    options: EmbedConfig, count: int, *, rehash: bool = False, command: str = ""
) -> dict[str, Any]:
    """How ``count`` images are embedded by the options of a command: arguments of
    :func:`mirip_fast.features.embed.embed`.
    """
    return {
        "workers": min(count, default_workers(options.workers)),
        "max_pixels": round(options.max_megapixels * 1e6),
        "batch_size": options.embed_batch_size,
        "rehash": rehash,
        "command": command,
    }


def embed_data(
    source: Path | str,
    config: Config,
    *,
    limit: int | None = None,
    rehash: bool = False,
    command: str = "",
    progress: OnProgress = lambda *_: None,
    engine: str = "local",
    actors: int | None = None,
    backbones: Sequence[str] = (),
) -> EmbedDone:
    """Embed a data set and write its ledger.

    Started by torchrun or srun, each process takes its share and writes a part of the store of its own; no
    process waits for another, or knows of it. The ledger is written by a run alone after them.

    Args:
        source: folder, CSV file, tar, pattern of tars, or address of one.
        config: the sections data, embed and runtime are used.
        limit: a trial of the first ``limit`` images.
        rehash: read every file again instead of trusting size and time.
        command: what is running, for whoever finds the store locked.
        progress: called from this thread while it goes on.
        engine: ``local``, or ``ray`` for the actors of a cluster.
        actors: of Ray: how many; None: one per GPU, without GPUs one per machine.
        backbones: all that the data set is embedded with, if there are more; see :func:`each_backbone`.

    Raises:
        MiripError: see :func:`mirip_fast.features.embed.prepare` and
            :func:`mirip_fast.features.embed.embed`.
    """
    options = config.embed
    names = names_of_backbones(options.backbone)  # found again from any working folder
    options = dataclasses.replace(options, backbone=",".join(names))
    if len(backbones) > 1:
        number = backbones.index(options.backbone) + 1
        log.info("Pass %d of %d, with %s", number, len(backbones), options.backbone)
    data = config.data
    if data.image_root is not None:
        data = dataclasses.replace(data, image_root=str(Path(data.image_root).absolute()))
    keep_indexes_in(Path(options.cache_dir))
    manifest = read_manifest(source, data)
    ranks = distributed()
    if ranks is None or ranks.rank == 0:
        tell_unlisted(manifest.source, manifest.table["file"])
    if limit is not None:
        manifest = manifest.subset(range(min(limit, len(manifest))))
    log.info("%d images in %s", len(manifest), shown(manifest.source))
    paths = manifest.paths
    settings = settings_of(options, len(manifest), rehash=rehash, command=command)
    if ranks is not None:
        settings["part"] = ranks.rank + 1
    began = ended = 0.0

    def told(*counts: int) -> None:
        nonlocal ended
        ended = time.monotonic()
        progress(*counts)

    def begin(phase: PhaseOne) -> None:
        nonlocal began, ended
        phase.say(len(manifest))
        began = ended = time.monotonic()

    device, speed = config.runtime.device, list[Speed]()
    if engine == "ray":
        phase, outcomes = embed_on_ray(paths, options, device, settings, actors, told, begin)
        images = manifest.table.assign(**outcomes)
    else:
        with open_hashes(Path(options.cache_dir)) as hashes:
            phase = prepare(options, device, hashes)
            begin(phase)
            if ranks is not None:
                manifest = manifest.subset([i for i, path in enumerate(paths) if ranks.takes(path)])
                share = len(manifest)
                log.info("Rank %d of %d: its share is %d images", ranks.rank, ranks.size, share)
            found = phase.embed(manifest.paths, hashes, told, on_speed=speed.append, **settings)
            images = manifest.table.assign(**found)
    dataset = None
    if ranks is None:
        dataset = save_dataset(
            phase.store.path, manifest, images, phase.recipe, data, options,
            limit=limit, backbones=backbones,
        )  # fmt: skip
    return EmbedDone(
        dataset=dataset,
        images=images,
        summary=summarise(images),
        compute_seconds=ended - began,
        store_path=phase.store.path,
        speed=speed[-1] if speed else None,
        ranks=ranks,
    )


def each_backbone(config: Config) -> list[Config]:
    """The settings of each pass of `embed`: one for every backbone that ``config`` names, by commas.

    All are looked for before the first pass begins.

    Raises:
        BackboneError: one cannot be found, or is named twice.
    """
    names = names_of_backbones(config.embed.backbone)
    if len(names) > 1:
        with open_hashes(Path(config.embed.cache_dir)) as hashes:
            for name in names:
                find_backbone(name, hashes.sha256)
    embeds = [dataclasses.replace(config.embed, backbone=name) for name in names]
    return [dataclasses.replace(config, embed=embed) for embed in embeds]


def features_of_files(
    paths: Sequence[Path],
    options: EmbedConfig,
    config: Config,
    *,
    like: FeatureStore | None = None,
    series: str | None = None,
    rehash: bool = False,
    command: str = "",
    progress: OnProgress = lambda *_: None,
) -> tuple[pd.DataFrame, FeatureStore, str]:
    """The CLS tokens of image files, embedding those that are not in the cache.

    Neither torch nor the backbone is needed where ``like`` has all of them. A cache that cannot be
    written to (read-only, full, in use) is left alone: the features are then kept until the program ends.

    Args:
        paths: image files.
        options: backbone and preprocessing.
        config: cache folder, device, batch size, workers.
        like: the store whose features they will be compared with; None for none.
        series: the series compared in ``like``.
        rehash: read every file again instead of trusting size and time.
        command: what is running, for whoever finds the store locked.
        progress: called after every committed batch.

    Returns:
        What became of the files, the store that has the features of the readable ones, and their series.

    Raises:
        StoreError: the backbone or its preprocessing is not that of ``like``; names the fields.
        BackboneError: features are missing and the backbone cannot be found.
    """
    cache_dir = Path(config.embed.cache_dir)
    with open_hashes(cache_dir) as hashes:
        if like is not None and series is not None:
            known = list(hashes.sha256_many(paths, rehash=rehash))
            readable = [sha for sha in known if isinstance(sha, bytes)]
            if (like.rows(series, readable) >= 0).all():
                return ledger(known), like, series
        phase = _prepare(options, config, like, hashes)
        settings = settings_of(config.embed, len(paths), rehash=rehash, command=command)
        store = phase.store
        try:
            outcomes = phase.embed(paths, hashes, progress, **settings)
        except BackboneError:
            raise
        except (StoreError, OSError) as error:
            log.warning("%s (the features computed now are not kept)", error)
            ending = contextlib.ExitStack()
            folder = ending.enter_context(temporary_folder()) / phase.recipe.fingerprint_id
            store = FeatureStore.create(folder, phase.recipe.fingerprint)
            weakref.finalize(store, ending.close)
            spare = dataclasses.replace(phase, store=store)
            outcomes = spare.embed(paths, hashes, progress, **settings)
        series = phase.recipe.series(phase.recipe.views[0], "cls").name
    return outcomes, store, series


def _prepare(
    options: EmbedConfig, config: Config, like: FeatureStore | None, hashes: HashMemory
) -> PhaseOne:
    """Phase one for the CLS token of the whole image, on this machine."""
    from mirip_fast.runtime import supported_precisions

    options = dataclasses.replace(options, cache_dir=config.embed.cache_dir, tta="none")
    if like is not None:
        wanted = like.fingerprint["precision"]
        possible = supported_precisions(resolve_device(config.runtime.device))
        options.precision = wanted if wanted in possible else "fp32"
    phase = with_kinds(prepare(options, config.runtime.device, hashes), ("cls",))
    if like is not None:
        ours = {**phase.recipe.fingerprint, "precision": like.fingerprint["precision"]}
        if ours != like.fingerprint:
            raise StoreError(
                f"The backbone or its preprocessing is not that of {like.path} "
                f"({differing_fields(like.fingerprint, ours)}). Give the same backbone with "
                "--backbone DIR."
            )
        if phase.recipe.precision != like.fingerprint["precision"]:
            log.warning(
                "The cache holds %s features; this machine computes in fp32, which differs by about 1 %%",
                like.fingerprint["precision"],
            )
    return phase
