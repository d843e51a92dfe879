"""Phase one on many machines: Ray actors, each of which embeds chunks of the data set into a part of its own.

An actor is the same pipeline as a run alone (protected decoding, backbone, durable writing), with the writer
kept open between chunks. The driver hands out chunks and gathers what became of each image; the actors talk
to nobody else. What an actor had in hand when it was lost, another one does again: what it had committed is
there. Machines need the data and the cache at the same place, as on a shared disk.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mirip_fast.config import EmbedConfig
from mirip_fast.data.sources import keep_indexes_in
from mirip_fast.errors import ConfigError, ImageError, MiripError
from mirip_fast.features.embed import PhaseOne, Progress, Settings, embed, open_hashes, prepare
from mirip_fast.features.outcomes import (
    EmbedInterrupt,
    Outcome,
    ledger,
    summarise,
)
from mirip_fast.features.recipe import Recipe
from mirip_fast.features.store import FeatureStore, differing_fields

if TYPE_CHECKING:
    from mirip_fast.features.backbone import Backbone
    from mirip_fast.features.store_writer import StoreWriter

log = logging.getLogger(__name__)

_CHUNKS_EACH = 16  # of every actor, so that all end together
_FEWEST, _MOST = 8, 2048  # images of a chunk
_LOSSES = 3  # of one actor, or with one chunk in hand: more is no accident


class Worker:
    """What runs in an actor."""

    def __init__(
        self, part: int, options: EmbedConfig, device: str, settings: Settings, folder: Path
    ):
        self._part, self._options, self._device = part, options, device
        self._settings, self._folder = settings, folder

    @cached_property
    def _phase(self) -> PhaseOne:
        os.chdir(self._folder)  # relative names are the driver's
        keep_indexes_in(Path(self._options.cache_dir))
        self._hashes = open_hashes(Path(self._options.cache_dir))
        return prepare(self._options, self._device, self._hashes)

    @cached_property
    def _backbone(self) -> Backbone:
        return self._phase.load()

    @cached_property
    def _writer(self) -> StoreWriter:
        return StoreWriter(self._phase.store, command=self._settings.command, part=self._part)

    def start(self) -> Recipe:
        """Find the backbone and open the store; weights are loaded with the first missing image."""
        return self._phase.recipe

    def embed(self, paths: Sequence[Path]) -> list[Outcome]:
        """What became of each image of a chunk."""
        phase = self._phase
        return embed(
            paths, phase.recipe, phase.store, lambda: self._backbone, self._hashes, self._settings,
            writer=lambda: self._writer,
        )  # fmt: skip

    def close(self) -> None:
        """Give the lock of this part back."""
        if "_writer" in vars(self):
            self._writer.close()


def embed_on_ray(
    paths: Sequence[Path],
    options: EmbedConfig,
    device: str,
    settings: Settings,
    actors: int | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
    begin: Callable[[PhaseOne], None] = lambda _: None,
) -> tuple[PhaseOne, list[Outcome]]:
    """Make sure that every readable image has its features, on the cluster of ``RAY_ADDRESS`` or here.

    Args:
        paths: image files, where every machine finds them.
        options: how they are embedded.
        device: as in ``--device``, chosen by each actor on its machine.
        settings: batch size and so on; decoding processes are per actor.
        actors: how many; None: one per GPU of the cluster, without GPUs one per machine.
        progress: called from this thread with every chunk.
        begin: told what is computed, before anything is.

    Returns:
        What the actors agree on, and one outcome per path as :func:`mirip_fast.features.embed.embed` gives.

    Raises:
        ConfigError: Ray is not installed, or machines would compute different features.
        MiripError: what went wrong in an actor, or too many were lost.
        EmbedInterrupt: stopped by a KeyboardInterrupt.
    """
    try:
        import ray as installed
    except ImportError as error:
        raise ConfigError(
            "--engine ray needs Ray: `pip install ray`. Without it, --engine local."
        ) from error
    ray: Any = installed
    ours = not ray.is_initialized()
    if ours:
        ray.init(logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False)
    started, there = time.monotonic(), ray.cluster_resources()
    gpus, cpus = int(there.get("GPU", 0)), there.get("CPU", 1)
    gpu = gpus > 0 and device != "cpu"
    count = actors or (gpus if gpu else len(ray.nodes()))
    cores = cpus / count if cpus < count else int(cpus / count)
    workers = min(max(1, int(cores)), settings.workers) if settings.workers else 0
    settings = dataclasses.replace(settings, cores=max(1, int(cores)), workers=workers)
    kind = ray.remote(num_cpus=cores, num_gpus=min(1, gpus / count) if gpu else 0)(Worker)
    kind = kind.options(max_restarts=_LOSSES)
    made = [
        kind.remote(part, options, device, settings, Path.cwd()) for part in range(1, count + 1)
    ]
    size = min(_MOST, max(_FEWEST, -(-len(paths) // (_CHUNKS_EACH * count))))
    driver = _Driver(ray, paths, size, options, progress, begin)
    try:
        driver.hand_out(made)
    except KeyboardInterrupt as stopped:
        outcomes = ledger(driver.known, driver.embedded, driver.failures, left=())
        raise EmbedInterrupt(summarise(outcomes, started)) from stopped
    finally:
        for actor in made:
            ray.kill(actor)
        if ours:
            ray.shutdown()
    assert driver.phase is not None
    return driver.phase, ledger(driver.known, driver.embedded, driver.failures)


class _Driver:
    """Hands out chunks of ``size`` images, and gathers what became of each."""

    def __init__(
        self,
        ray: Any,
        paths: Sequence[Path],
        size: int,
        options: EmbedConfig,
        progress: Callable[[Progress], None],
        begin: Callable[[PhaseOne], None],
    ):
        self._ray, self._paths, self._progress, self._begin = ray, paths, progress, begin
        self._folder = Path(options.cache_dir)
        n = len(paths)
        self._todo = deque(range(i, min(i + size, n)) for i in range(0, n, size))
        self._losses = Counter[object]()  # by actor and by chunk
        self.phase: PhaseOne | None = None
        self.known: list[bytes | ImageError | None] = [None] * n
        self.embedded: set[bytes] = set()
        self.failures: dict[bytes, str] = {}
        self._counts = Progress(n)

    def hand_out(self, actors: Sequence[Any]) -> None:
        """Give every actor chunk after chunk until all are done."""
        ray = self._ray
        busy: dict[Any, Any] = {actor.start.remote(): (actor, None) for actor in actors}
        idle: list[Any] = []
        while self._todo or any(chunk is not None for _, chunk in busy.values()):
            ready, _ = ray.wait(list(busy), num_returns=1, timeout=1.0)
            for call in ready:
                actor, chunk = busy.pop(call)
                try:
                    found = ray.get(call)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause if isinstance(error.cause, MiripError) else error from None
                except ray.exceptions.RayActorError:
                    if self._lost(actor, chunk):
                        busy[actor.start.remote()] = (actor, None)  # Ray starts it again
                    elif not busy and not idle:
                        raise MiripError(
                            "Every Ray actor was lost, again and again: see the logs of Ray on the machines. "
                            "What was committed stays; the same command goes on from there."
                        ) from None
                    continue
                if chunk is None:
                    self._same_recipe(found)
                else:
                    self._take_in(chunk, found)
                idle.append(actor)
            while idle and self._todo:
                actor, chunk = idle.pop(), self._todo.popleft()
                busy[actor.embed.remote([self._paths[i] for i in chunk])] = (actor, chunk)
        ray.get([actor.close.remote() for actor in idle])

    def _lost(self, actor: Any, chunk: range | None) -> bool:
        """Put back what an actor had in hand; whether it may come again."""
        self._losses.update((actor, chunk))
        if chunk is not None:
            self._todo.appendleft(chunk)
            log.warning(
                "An actor was lost; its %d images are done again by another. What it had committed stays.",
                len(chunk),
            )
            if self._losses[chunk] > _LOSSES:
                raise MiripError(
                    f"{self._losses[chunk]} actors were lost with the same images in hand, "
                    f"{self._paths[chunk[0]]} and the {len(chunk) - 1} after it. Is there memory for a "
                    "batch on each machine (--batch-size)? What was committed stays."
                )
        return self._losses[actor] <= _LOSSES

    def _same_recipe(self, recipe: Recipe) -> None:
        if self.phase is None:
            import torch

            folder = self._folder / recipe.fingerprint_id
            store = FeatureStore.create(folder, recipe.fingerprint)
            self.phase = PhaseOne(recipe, store, torch.device("cpu"))
            self._begin(self.phase)
        elif recipe.fingerprint != self.phase.recipe.fingerprint:
            raise ConfigError(
                "The machines would compute different features "
                f"({differing_fields(self.phase.recipe.fingerprint, recipe.fingerprint)}). Give --device "
                "and --precision that all of them have."
            )

    def _take_in(self, chunk: range, outcomes: Sequence[Outcome]) -> None:
        self._counts.done += len(chunk)
        self._counts.failed += sum(outcome.status == "failed" for outcome in outcomes)
        for i, (status, sha, reason) in zip(chunk, outcomes, strict=True):
            self.known[i] = sha or ImageError(reason or "")
            if sha is not None and status == "failed":
                self.failures[sha] = reason or ""
            elif sha is not None and status == "embedded":
                self.embedded.add(sha)
        self._progress(self._counts)
