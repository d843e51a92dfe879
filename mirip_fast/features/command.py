"""`embed` as a whole: read the data set, compute what is missing, write the ledger."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mirip_fast.config import Config
from mirip_fast.data.csv_reader import shown
from mirip_fast.data.manifest import read_manifest
from mirip_fast.data.records import DataOptions
from mirip_fast.features.datasets import Dataset, save_dataset
from mirip_fast.features.embed import Progress, Settings, Summary, summarise
from mirip_fast.features.phase_one import open_hashes, prepare
from mirip_fast.runtime import usable_cores

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EmbedDone:
    """What `embed` leaves behind."""

    dataset: Dataset
    summary: Summary
    compute_seconds: float  # from the first to the last batch, start-up left out


def default_workers(configured: int | None) -> int:
    """Processes that decode, when none are asked for: one per core, at most 16."""
    return min(16, usable_cores()) if configured is None else configured


def embed_data(
    source: Path,
    config: Config,
    *,
    limit: int | None = None,
    rehash: bool = False,
    command: str = "",
    progress: Callable[[Progress], None] = lambda _: None,
) -> EmbedDone:
    """Embed a data set and write its ledger.

    Args:
        source: folder or CSV file.
        config: the sections data, embed and runtime are used.
        limit: a trial of the first ``limit`` images.
        rehash: read every file again instead of trusting size and time.
        command: what is running, for whoever finds the store locked.
        progress: called after every committed batch.

    Raises:
        MiripError: see :func:`mirip_fast.features.phase_one.prepare` and
            :func:`mirip_fast.features.embed.embed`.
    """
    started = time.monotonic()
    options = config.embed
    if Path(options.backbone).expanduser().is_dir():  # found again from any working folder
        folder = str(Path(options.backbone).expanduser().resolve())
        options = dataclasses.replace(options, backbone=folder)
    data = config.data
    if data.image_root is not None:
        data = dataclasses.replace(data, image_root=str(Path(data.image_root).absolute()))
    manifest = read_manifest(source, DataOptions.from_config(data))
    if limit is not None:
        manifest = manifest.subset(range(min(limit, len(manifest))))
    settings = Settings(
        workers=default_workers(options.workers),
        batch_size=options.embed_batch_size,
        rehash=rehash,
        command=command,
    )
    log.info("%d images in %s", len(manifest), shown(manifest.source))
    clock = _Clock(progress)
    with open_hashes(Path(options.cache_dir)) as hashes:
        phase = prepare(options, config.runtime.device, hashes)
        log.info(
            "Backbone %s at %d × %d pixels, %s on %s",
            _backbone_text(options.backbone),
            phase.recipe.size,
            phase.recipe.size,
            phase.recipe.precision,
            phase.device,
        )
        phase.say_size(len(manifest))
        clock.start()
        outcomes = phase.embed(
            [record.path for record in manifest.records], hashes, settings, clock
        )
    dataset = save_dataset(
        phase.store.path, manifest, outcomes, phase.recipe, data, options, limit=limit
    )
    return EmbedDone(dataset, summarise(outcomes, started), clock.seconds)


def _backbone_text(name: str) -> str:
    return shown(Path(name)) if Path(name).is_dir() else name


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
