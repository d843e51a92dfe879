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
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mirip_fast.config import EmbedConfig
from mirip_fast.data.sources import keep_indexes_in
from mirip_fast.errors import ConfigError, MiripError
from mirip_fast.features.embed import Progress, Settings, embed
from mirip_fast.features.outcomes import (
    EmbedInterrupt,
    InputHashes,
    Outcome,
    ledger,
    summarise_stopped,
)
from mirip_fast.features.phase_one import PhaseOne, open_hashes, prepare
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
        self._phase: PhaseOne | None = None
        self._backbone: Backbone | None = None
        self._writer: StoreWriter | None = None

    def start(self) -> Recipe:
        """Find the backbone and open the store, once; weights are loaded with the first missing image."""
        if self._phase is None:
            os.chdir(self._folder)  # relative names are the driver's
            keep_indexes_in(Path(self._options.cache_dir))
            self._hashes = open_hashes(Path(self._options.cache_dir))
            self._phase = prepare(self._options, self._device, self._hashes)
        return self._phase.recipe

    def embed(self, paths: Sequence[Path]) -> list[Outcome]:
        """What became of each image of a chunk."""
        assert self._phase is not None
        recipe, store = self._phase.recipe, self._phase.store
        settings, hashes = self._settings, self._hashes
        return list(embed(paths, recipe, store, self._load, hashes, settings, writer=self._open))

    def close(self) -> None:
        """Give the lock of this part back."""
        if self._writer is not None:
            self._writer.close()

    def _load(self) -> Backbone:
        if self._backbone is None:
            assert self._phase is not None
            self._backbone = self._phase.load()
        return self._backbone

    def _open(self) -> StoreWriter:
        if self._writer is None:
            assert self._phase is not None
            self._writer = self._phase.store.writer(command=self._settings.command, part=self._part)
        return self._writer


def embed_on_ray(
    paths: Sequence[Path],
    options: EmbedConfig,
    device: str,
    settings: Settings,
    actors: int | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
    begin: Callable[[PhaseOne], None] = lambda _: None,
) -> tuple[PhaseOne, Sequence[Outcome]]:
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
        import ray
    except ImportError as error:
        raise ConfigError(
            "--engine ray needs Ray: `pip install ray`. Without it, --engine local."
        ) from error
    ours = not ray.is_initialized()
    if ours:
        ray.init(logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False)
    try:
        return _Driver(ray, paths, options, device, settings, actors, progress, begin).run()
    finally:
        if ours:
            ray.shutdown()


class _Driver:
    def __init__(
        self,
        ray: Any,
        paths: Sequence[Path],
        options: EmbedConfig,
        device: str,
        settings: Settings,
        actors: int | None,
        progress: Callable[[Progress], None],
        begin: Callable[[PhaseOne], None],
    ):
        self._ray, self._paths, self._progress, self._begin = ray, paths, progress, begin
        there = ray.cluster_resources()
        gpus, cpus = int(there.get("GPU", 0)), there.get("CPU", 1)
        gpu = gpus > 0 and device != "cpu"
        count = actors or (gpus if gpu else len(ray.nodes()))
        cores = cpus / count if cpus < count else int(cpus / count)
        workers = min(max(1, int(cores)), settings.workers) if settings.workers else 0
        settings = dataclasses.replace(settings, cores=max(1, int(cores)), workers=workers)
        kind = ray.remote(num_cpus=cores, num_gpus=min(1, gpus / count) if gpu else 0)(Worker)
        self._actors = [
            kind.options(max_restarts=_LOSSES).remote(
                number + 1, options, device, settings, Path.cwd()
            )
            for number in range(count)
        ]
        size = min(_MOST, max(_FEWEST, -(-len(paths) // (_CHUNKS_EACH * count))))
        n = len(paths)
        self._todo = deque(range(i, min(i + size, n)) for i in range(0, n, size))
        self._losses: dict[object, int] = {}  # by actor and by chunk
        self._options = options
        self._phase: PhaseOne | None = None
        self._known = InputHashes(len(paths))
        self._embedded: set[bytes] = set()
        self._failures: dict[bytes, str] = {}
        self._done = np.zeros(len(paths), bool)

    def run(self) -> tuple[PhaseOne, Sequence[Outcome]]:
        started = time.monotonic()
        try:
            self._hand_out()
        except KeyboardInterrupt as stopped:
            raise EmbedInterrupt(
                summarise_stopped(self._known, self._flags(), self._done, self._failures, started)
            ) from stopped
        finally:
            for actor in self._actors:
                self._ray.kill(actor)
        assert self._phase is not None
        return self._phase, ledger(self._known, self._flags(), self._failures)

    def _hand_out(self) -> None:
        ray = self._ray
        busy: dict[Any, Any] = {actor.start.remote(): (actor, None) for actor in self._actors}
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
        for thing in (actor, chunk):
            self._losses[thing] = self._losses.get(thing, 0) + 1
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
        if self._losses[actor] <= _LOSSES:
            return True
        self._actors.remove(actor)
        if not self._actors:
            raise MiripError(
                "Every Ray actor was lost, again and again: see the logs of Ray on the machines. What was "
                "committed stays; the same command goes on from there."
            )
        return False

    def _same_recipe(self, recipe: Recipe) -> None:
        if self._phase is None:
            import torch

            folder = Path(self._options.cache_dir) / recipe.fingerprint_id
            store = FeatureStore.create(folder, recipe.fingerprint)
            self._phase = PhaseOne(recipe, store, torch.device("cpu"))
            self._begin(self._phase)
        elif recipe.fingerprint != self._phase.recipe.fingerprint:
            raise ConfigError(
                "The machines would compute different features "
                f"({differing_fields(self._phase.recipe.fingerprint, recipe.fingerprint)}). Give --device "
                "and --precision that all of them have."
            )

    def _take_in(self, chunk: range, outcomes: Sequence[Outcome]) -> None:
        for i, outcome in zip(chunk, outcomes, strict=True):
            if outcome.sha256 is None:
                self._known.fail(i, outcome.reason or "")
                continue
            self._known[i] = outcome.sha256
            if outcome.status == "failed":
                self._failures[outcome.sha256] = outcome.reason or ""
            else:
                self._done[i] = True
                if outcome.status == "embedded":
                    self._embedded.add(outcome.sha256)
        counts = Progress(total=len(self._paths))
        counts.failed = len(self._failures) + len(self._known.reasons)
        counts.done = int(self._done.sum()) + counts.failed
        self._progress(counts)

    def _flags(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        flags = np.zeros(len(self._paths), bool)
        for inputs, hashes in self._known.parts():
            flags[inputs] = [sha in self._embedded for sha in hashes]
        return flags
