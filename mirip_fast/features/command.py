"""`embed` as a whole: read the data set, compute what is missing, write the ledger."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mirip_fast.config import Config, EmbedConfig
from mirip_fast.data.csv_reader import shown
from mirip_fast.data.locate import tell_unlisted
from mirip_fast.data.manifest import read_manifest
from mirip_fast.data.packed_records import PathsOf
from mirip_fast.data.records import DataOptions
from mirip_fast.data.sources import keep_indexes_in
from mirip_fast.errors import StoreError
from mirip_fast.features.backbone_files import find_backbone, names_of_backbones
from mirip_fast.features.datasets import Dataset, save_dataset
from mirip_fast.features.embed import Progress, Settings
from mirip_fast.features.engine import SpeedReport
from mirip_fast.features.outcomes import Outcome, Summary, summarise
from mirip_fast.features.phase_one import PhaseOne, open_hashes, prepare
from mirip_fast.features.recipe import Recipe
from mirip_fast.features.store import FeatureStore
from mirip_fast.files import open_file
from mirip_fast.runtime import Ranks, distributed, our_cores

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EmbedDone:
    """What `embed` leaves behind.

    One of several processes (see :class:`mirip_fast.runtime.Ranks`) has the summary of its share, and no data
    set: a run alone writes that, once all have ended.
    """

    dataset: Dataset | None
    summary: Summary
    compute_seconds: float  # from the first to the last batch, start-up left out
    store_path: Path
    speed: SpeedReport | None = None  # where the time went, if anything was computed here
    failures: Sequence[tuple[str, str]] = ()  # name and reason of each image that could not be read
    ranks: Ranks | None = None


def default_workers(configured: int | None) -> int:
    """Processes that decode, when none are asked for: one per core, at most 16."""
    return min(16, our_cores()) if configured is None else configured


def settings_of(
    options: EmbedConfig, count: int, *, rehash: bool = False, command: str = ""
) -> Settings:
    """How ``count`` images are embedded by the options of a command; see :class:`Settings`."""
    return Settings(
        workers=min(count, default_workers(options.workers)),
        max_pixels=round(options.max_megapixels * 1e6),
        batch_size=options.embed_batch_size,
        rehash=rehash,
        command=command,
    )


def embed_data(
    source: Path | str,
    config: Config,
    *,
    limit: int | None = None,
    rehash: bool = False,
    command: str = "",
    progress: Callable[[Progress], None] = lambda _: None,
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
        MiripError: see :func:`mirip_fast.features.phase_one.prepare` and
            :func:`mirip_fast.features.embed.embed`.
    """
    started = time.monotonic()
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
    manifest = read_manifest(source, DataOptions.from_config(data))
    ranks = distributed()
    if ranks is None or ranks.rank == 0:
        tell_unlisted(manifest)
    if limit is not None:
        manifest = manifest.first(limit)
    log.info("%d images in %s", len(manifest), shown(manifest.source))
    paths = PathsOf(manifest.records)
    settings = settings_of(options, len(manifest), rehash=rehash, command=command)
    if ranks is not None:
        settings = dataclasses.replace(settings, part=ranks.rank + 1)
    clock = _Clock(progress)
    speed: list[SpeedReport] = []
    if engine == "ray":
        phase, outcomes = _on_ray(paths, options, config.runtime.device, settings, actors, clock)
    else:
        with open_hashes(Path(options.cache_dir)) as hashes:
            phase = prepare(options, config.runtime.device, hashes)
            _say_backbone(phase)
            phase.say_size(len(manifest))
            if ranks is not None:
                mine = [i for i, path in enumerate(paths) if ranks.takes(path)]
                paths = PathsOf(manifest.records, mine)
                log.info("Rank %d of %d: its share is %d images", ranks.rank, ranks.size, len(mine))
            clock.start()
            outcomes = phase.embed(paths, hashes, settings, clock, speed.append)
    dataset = None
    if ranks is None:
        dataset = save_dataset(
            phase.store.path, manifest, outcomes, phase.recipe, data, options,
            limit=limit, backbones=backbones,
        )  # fmt: skip
    failures = [
        (shown(paths[i]), outcome.reason or "")
        for i, outcome in enumerate(outcomes)
        if outcome.status == "failed"
    ]
    return EmbedDone(
        dataset=dataset,
        summary=summarise(outcomes, started),
        compute_seconds=clock.seconds,
        store_path=phase.store.path,
        speed=speed[-1] if speed else None,
        failures=failures,
        ranks=ranks,
    )


def _on_ray(
    paths: Sequence[Path],
    options: EmbedConfig,
    device: str,
    settings: Settings,
    actors: int | None,
    clock: _Clock,
) -> tuple[PhaseOne, Sequence[Outcome]]:
    """What became of the images on a cluster, and the phase one that its actors agree on."""
    import torch

    from mirip_fast.features.ray_engine import embed_on_ray

    phases: list[PhaseOne] = []

    def begin(recipe: Recipe) -> None:
        store = FeatureStore.create(
            Path(options.cache_dir) / recipe.fingerprint_id, recipe.fingerprint
        )
        phases.append(PhaseOne(recipe, store, torch.device("cpu"), options.compile))
        _say_backbone(phases[0])
        phases[0].say_size(len(paths))
        clock.start()

    outcomes = embed_on_ray(paths, options, device, settings, actors, clock, begin)
    return phases[0], outcomes


def _say_backbone(phase: PhaseOne) -> None:
    recipe = phase.recipe
    name = recipe.backbone.name
    log.info(
        "Backbone %s at %d × %d pixels, %s on %s",
        shown(Path(name)) if Path(name).is_dir() else name,
        *(recipe.size, recipe.size, recipe.precision, phase.device),
    )


def each_backbone(config: Config) -> list[Config]:
    """The settings of each pass of `embed`: one for every backbone that ``config`` names, by commas.

    All are looked for before the first pass begins.

    Raises:
        BackboneError: one can not be found, or is named twice.
    """
    names = names_of_backbones(config.embed.backbone)
    if len(names) > 1:
        with open_hashes(Path(config.embed.cache_dir)) as hashes:
            for name in names:
                find_backbone(name, hashes.sha256)
    embeds = [dataclasses.replace(config.embed, backbone=name) for name in names]
    return [dataclasses.replace(config, embed=embed) for embed in embeds]


def check_export(file: Path) -> None:
    """See before hours of work that an export can be written there.

    Raises:
        StoreError: no folder for it, or something else than an HDF5 file is there.
    """
    if not file.parent.is_dir():
        raise StoreError(f"--export {file}: there is no folder {file.parent}")
    if file.is_dir():
        raise StoreError(f"--export {file} is a folder; name a file in it, such as features.h5")
    if file.exists():
        start = b""
        with contextlib.suppress(ValueError), open_file(file) as stream:  # a pipe, a device
            start = stream.read(8)
        if start != b"\x89HDF\r\n\x1a\n":
            raise StoreError(f"--export {file} is there and no HDF5 file; choose another name")


class _Clock:
    """Passes progress on and measures the time until the last batch."""

    def __init__(self, inner: Callable[[Progress], None]):
        self._inner = inner
        self._started = self.seconds = 0.0

    def start(self) -> None:
        self._started = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        self.seconds = time.monotonic() - self._started
        self._inner(progress)
