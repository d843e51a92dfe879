"""Phase one on many machines: Ray actors, each of which embeds chunks of the data set into a part of its own.

An actor is the same pipeline as a run alone (protected decoding, backbone, durable writing), with the writer
kept open between chunks. The driver hands out chunks and gathers what became of each image; the actors talk
to nobody else. What an actor had in hand when it was lost, another one does again: what it had committed is
there. Machines need the data and the cache at the same place, as on a shared disk.
"""

from __future__ import annotations

import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mirip_fast.config import EmbedConfig
from mirip_fast.data.sources import keep_indexes_in
from mirip_fast.errors import ConfigError, ImageError, MiripError
from mirip_fast.features.embed import OnProgress, PhaseOne, embed, open_hashes, prepare
from mirip_fast.features.outcomes import EmbedInterrupt, ledger
from mirip_fast.features.recipe import Recipe
from mirip_fast.features.store import FeatureStore, differing_fields
from mirip_fast.features.store_writer import StoreWriter

if TYPE_CHECKING:
    import pandas as pd

    from mirip_fast.features.backbone import Backbone

log = logging.getLogger(__name__)

_CHUNKS_EACH = 16  # of every actor, so that all end together
_FEWEST, _MOST = 8, 2048  # images of a chunk
_LOSSES = 3  # of one actor, or with one chunk in hand: more is no accident


class Worker:
    """What runs in an actor."""

    def __init__(
        self, part: int, options: EmbedConfig, device: str, settings: dict[str, Any], folder: Path
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
        return StoreWriter(self._phase.store, command=self._settings["command"], part=self._part)

    def start(self) -> Recipe:
        """Find the backbone and open the store; weights are loaded with the first missing image."""
        return self._phase.recipe

    def embed(self, paths: Sequence[Path]) -> pd.DataFrame:
        """What became of each image of a chunk."""
        phase = self._phase
        return embed(
            paths, phase.recipe, phase.store, lambda: self._backbone, self._hashes,
            writer=lambda: self._writer, **self._settings,
        )  # fmt: skip

    def close(self) -> None:
        """Give the lock of this part back."""
        if "_writer" in vars(self):
            self._writer.close()


def embed_on_ray(
    paths: Sequence[Path],
    options: EmbedConfig,
    device: str,
    settings: dict[str, Any],
    actors: int | None = None,
    progress: OnProgress = lambda *_: None,
    begin: Callable[[PhaseOne], None] = lambda _: None,
) -> tuple[PhaseOne, pd.DataFrame]:
    """Make sure that every readable image has its features, on the cluster of ``RAY_ADDRESS`` or here.

    Args:
        paths: image files, where every machine finds them.
        options: how they are embedded.
        device: as in ``--device``, chosen by each actor on its machine.
        settings: of :func:`mirip_fast.features.embed.embed`; decoding processes are per actor.
        actors: how many; None: one per GPU of the cluster, without GPUs one per machine.
        progress: called from this thread with every chunk.
        begin: told what is computed, before anything is.

    Returns:
        What the actors agree on, and what became of each path as :func:`mirip_fast.features.embed.embed`
        gives it.

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
    there = ray.cluster_resources()
    gpus, cpus = int(there.get("GPU", 0)), there.get("CPU", 1)
    gpu = gpus > 0 and device != "cpu"
    count = actors or (gpus if gpu else len(ray.nodes()))
    cores = cpus / count if cpus < count else int(cpus / count)
    workers = settings["workers"] and min(max(1, int(cores)), settings["workers"])
    settings = {**settings, "cores": max(1, int(cores)), "workers": workers}
    kind = ray.remote(num_cpus=cores, num_gpus=min(1, gpus / count) if gpu else 0)(Worker)
    kind = kind.options(max_restarts=_LOSSES)
    made = [
        kind.remote(part, options, device, settings, Path.cwd()) for part in range(1, count + 1)
    ]
    size = min(_MOST, max(_FEWEST, -(-len(paths) // (_CHUNKS_EACH * count))))
    known: list[bytes | ImageError | None] = [None] * len(paths)
    embedded, failures = set[bytes](), dict[bytes, str]()
    phase, done, failed = None, 0, 0
    try:
        for chunk, found in _answers(ray, made, paths, size):
            if chunk is None:
                if phase is None:
                    phase = _begun(found, options)
                    begin(phase)
                _check_same(phase.recipe, found)
                continue
            for i, (status, reason, sha) in zip(chunk, found.itertuples(index=False), strict=True):
                known[i] = sha or ImageError(reason or "")
                if sha is not None and status == "failed":
                    failures[sha] = reason or ""
                elif sha is not None and status == "embedded":
                    embedded.add(sha)
            done, failed = done + len(chunk), failed + int((found["status"] == "failed").sum())
            progress(done, len(paths), failed)
    except KeyboardInterrupt as stopped:
        raise EmbedInterrupt(ledger(known, embedded, failures, left=())) from stopped
    finally:
        for actor in made:
            ray.kill(actor)
        if ours:
            ray.shutdown()
    assert phase is not None
    return phase, ledger(known, embedded, failures)


def _answers(
    ray: Any, actors: Sequence[Any], paths: Sequence[Path], size: int
) -> Iterator[tuple[range | None, Any]]:
    """Give every actor chunk after chunk of ``size`` images until all are done.

    Yields:
        None and its recipe when an actor has begun; the numbers of a chunk and what became of its images.
    """
    todo = deque(range(i, min(i + size, len(paths))) for i in range(0, len(paths), size))
    losses = Counter[object]()  # by actor and by chunk
    busy: dict[Any, Any] = {actor.start.remote(): (actor, None) for actor in actors}
    idle: list[Any] = []
    while todo or any(chunk is not None for _, chunk in busy.values()):
        ready, _ = ray.wait(list(busy), num_returns=1, timeout=1.0)
        for call in ready:
            actor, chunk = busy.pop(call)
            try:
                found = ray.get(call)
            except ray.exceptions.RayTaskError as error:
                raise error.cause if isinstance(error.cause, MiripError) else error from None
            except ray.exceptions.RayActorError:
                losses.update((actor, chunk))
                if chunk is not None:
                    todo.appendleft(chunk)
                    _tell_lost(paths, chunk, losses[chunk])
                if losses[actor] <= _LOSSES:
                    busy[actor.start.remote()] = (actor, None)  # Ray starts it again
                elif not busy and not idle:
                    raise MiripError(
                        "Every Ray actor was lost, again and again: see the logs of Ray on the "
                        "machines. What was committed stays; the same command goes on from there."
                    ) from None
                continue
            yield chunk, found
            idle.append(actor)
        while idle and todo:
            actor, chunk = idle.pop(), todo.popleft()
            busy[actor.embed.remote([paths[i] for i in chunk])] = (actor, chunk)
    ray.get([actor.close.remote() for actor in idle])


def _tell_lost(paths: Sequence[Path], chunk: range, losses: int) -> None:
    """Tell that an actor was lost with a chunk in hand, which is no accident if it is the fourth."""
    log.warning(
        "An actor was lost; its %d images are done again by another. What it had committed stays.",
        len(chunk),
    )
    if losses > _LOSSES:
        raise MiripError(
            f"{losses} actors were lost with the same images in hand, "
            f"{paths[chunk[0]]} and the {len(chunk) - 1} after it. Is there memory for a "
            "batch on each machine (--batch-size)? What was committed stays."
        )


def _begun(recipe: Recipe, options: EmbedConfig) -> PhaseOne:
    """What the first actor computes, seen from here."""
    import torch

    store = FeatureStore.create(Path(options.cache_dir) / recipe.fingerprint_id, recipe.fingerprint)
    return PhaseOne(recipe, store, torch.device("cpu"))


def _check_same(ours: Recipe, theirs: Recipe) -> None:
    if theirs.fingerprint != ours.fingerprint:
        raise ConfigError(
            "The machines would compute different features "
            f"({differing_fields(ours.fingerprint, theirs.fingerprint)}). Give --device "
            "and --precision that all of them have."
        )
