"""The embed loop: which images have no features yet, compute those, commit them batch by batch.

Images are known by the SHA-256 of their bytes. Rows are placed by that hash, so the same picture under
two names is computed once, and renaming or moving a file costs nothing.

The stages overlap: processes read, hash and decode ahead of the backbone; threads run the backbone (and the
copies to and from a GPU); one thread writes. Short queues between them keep memory flat.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, compress, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mirip_fast.config import EmbedConfig
from mirip_fast.data.decode_pool import Decoded, DecodeJob, DecodePool
from mirip_fast.data.hashes import HashMemory
from mirip_fast.data.images import MAX_PIXELS
from mirip_fast.errors import ImageError, MiripError, StoppedError
from mirip_fast.features.backbone_files import find_backbone
from mirip_fast.features.engine import Engine, Speed
from mirip_fast.features.outcomes import EmbedInterrupt, ledger, warn_of
from mirip_fast.features.recipe import Need, Recipe, make_recipe, sizes_of, wanted_series
from mirip_fast.features.shards import shard_bytes
from mirip_fast.features.store import FeatureStore
from mirip_fast.features.store_writer import StoreWriter
from mirip_fast.files import format_bytes
from mirip_fast.runtime import distributed, our_cores, resolve_device, resolve_precision
from mirip_fast.text import shown

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from mirip_fast.features.backbone import Backbone

log = logging.getLogger(__name__)

HASHES_FILE = "hashes.sqlite"

_ASKED_AT_ONCE = 500
_CHANGED = "the file changed while it was read; run the same command again"


#: Told now and then while embedding goes on: images done, how many there are to look at (fewer when some turn
#: out to be known), and failures.
OnProgress = Callable[[int, int, int], None]


@dataclass(frozen=True)
class PhaseOne:
    """A recipe, the store that holds its features, and the device that would compute them."""

    recipe: Recipe
    store: FeatureStore
    device: torch.device
    compile: bool = False  # have code made for the backbone

    def embed(
        self,
        paths: Sequence[Path],
        hashes: HashMemory,
        progress: OnProgress = lambda *_: None,
        **settings: Any,
    ) -> pd.DataFrame:
        """Compute what is missing; see :func:`embed`."""
        return embed(paths, self.recipe, self.store, self.load, hashes, progress, **settings)

    def load(self) -> Backbone:
        """The backbone with its weights."""
        from mirip_fast.features.backbone import load_backbone

        backbone = load_backbone(self.recipe.backbone, self.device, self.recipe.precision)
        if self.compile:
            backbone.compile()
        return backbone

    def most_bytes(self, n_images: int) -> int:
        """The most room on the disk that the features of ``n_images`` can take beyond what is taken.

        Shards are made at their full size, so their number counts: of those that are made if no image is
        there yet, by all processes of a distributed run together. Which images are there is not known
        before they are hashed.
        """
        ranks, total = distributed(), 0
        for _, _, spec in wanted_series(self.recipe):
            there = [(shard.part, free) for shard, free, _ in self.store.slots(spec.name)]
            parts = [None] if ranks is None else range(1, ranks.size + 1)  # alone: those of all
            free = [sum(n for p, n in there if part in (None, p)) for part in parts]
            shards = _most_shards(n_images, free, spec.shard_rows)
            total += shards * shard_bytes(spec)
        return total

    def say(self, n_images: int) -> None:
        """Tell how ``n_images`` are embedded, what room that takes at most, and what is free."""
        size, name = self.recipe.size, self.recipe.backbone.name
        log.info(
            "Backbone %s at %d × %d pixels, %s on %s",
            shown(Path(name)) if Path(name).is_dir() else name,
            *(size, size, self.recipe.precision, self.device),
        )
        size = self.most_bytes(n_images)
        free = shutil.disk_usage(self.store.path).free
        log.info(
            "The features of %d images take %s in %s; %s are free",
            n_images,
            f"at most {format_bytes(size)} more" if size else "no further space",
            self.store.path,
            format_bytes(free),
        )
        if size > free:
            log.warning(
                "There may be too little room: if none of these images is in the cache yet, %s are "
                "needed, and %s are free. What fits is kept; --patches mean or none stores less, "
                "--cache-dir chooses another disk.",
                format_bytes(size),
                format_bytes(free),
            )


def _most_shards(n_rows: int, free: Sequence[int], shard_rows: int) -> int:
    """The most shards that ``n_rows`` new rows can ask for, however they fall on the parts.

    Args:
        n_rows: rows to come.
        free: per part, the slots that are free in its shards.
        shard_rows: rows of a new shard.
    """
    if len(free) == 1:
        return -(-max(0, n_rows - free[0]) // shard_rows)
    short = sum(slots < n_rows for slots in free)  # each may begin one that it does not fill
    return min(n_rows, short + n_rows // shard_rows) if short else 0


def open_hashes(cache_dir: Path) -> HashMemory:
    """The memory of content hashes that lies in a cache folder."""
    return HashMemory(cache_dir / HASHES_FILE)


def prepare(options: EmbedConfig, device_name: str, hashes: HashMemory) -> PhaseOne:
    """Find the backbone, decide the recipe, open its store. No weights are loaded yet.

    Raises:
        BackboneError: the backbone cannot be found.
        ConfigError: device, precision, patches or image size do not go.
        StoreError: the cache folder holds something else under that name.
    """
    backbone = find_backbone(options.backbone, hashes.sha256)
    device = resolve_device(device_name)
    precision = resolve_precision(options.precision, device)
    recipe = make_recipe(options, backbone, precision)
    if recipe.size != options.image_size:
        log.info(
            "Image size %d is no multiple of the patch (%d pixels): %d is used, the same tokens",
            options.image_size,
            backbone.patch_size,
            recipe.size,
        )
    folder = Path(options.cache_dir) / recipe.fingerprint_id
    before = folder.with_name(dataclasses.replace(recipe, colours="stored").fingerprint_id)
    if recipe.srgb and before.exists() and not folder.exists():
        log.warning(
            "%s holds features made without the colour profiles of pictures. They stay, as do the models "
            "trained on them. With profiles, features are made anew in %s; --colours stored adds to the "
            "old ones",
            *(shown(before), shown(folder)),
        )
    store = FeatureStore.create(folder, recipe.fingerprint)
    return PhaseOne(recipe, store, device, options.compile)


def with_kinds(phase: PhaseOne, kinds: tuple[str, ...]) -> PhaseOne:
    """The same phase one, restricted to the token kinds that a head needs."""
    return dataclasses.replace(phase, recipe=dataclasses.replace(phase.recipe, kinds=kinds))


def embed(
    paths: Sequence[Path],
    recipe: Recipe,
    store: FeatureStore,
    load: Callable[[], Backbone],
    hashes: HashMemory,
    progress: OnProgress = lambda *_: None,
    *,
    workers: int = 1,
    max_pixels: int = MAX_PIXELS,
    batch_size: int | None = None,
    rehash: bool = False,
    command: str = "",
    cores: int | None = None,
    part: int = 0,
    on_speed: Callable[[Speed], None] = lambda _: None,
    writer: Callable[[], StoreWriter] | None = None,
) -> pd.DataFrame:
    """Make sure that every readable image has a row in every series of the recipe.

    Args:
        paths: image files, in the order of the wanted outcomes.
        recipe: what to compute.
        store: the store of ``recipe.fingerprint``.
        load: loads the backbone; called only if something has to be computed.
        hashes: remembers content hashes.
        progress: called from this thread while it goes on.
        workers: processes that decode; 0: this one, without protection from what a file can do.
        max_pixels: of the largest picture that is decoded.
        batch_size: images per pass; None: by the device and the number of tokens.
        rehash: read every file again instead of trusting size and time.
        command: what is running, for whoever finds the store locked.
        cores: processor cores to use; None: all that this process may.
        part: of the store: 0 for a run alone, n + 1 for process n of several.
        on_speed: told where the time went, if anything was computed.
        writer: gives the store's writer, which the caller closes; None: opened and closed here.

    Returns:
        What became of each path, see :func:`mirip_fast.features.outcomes.ledger`: embedded (computed now),
        present (was there), duplicate (the bytes of an earlier path of this call), or failed.

    Raises:
        StoreLockedError: another run writes to the store, and something is missing from it.
        DiskFullError: no room; what was committed stays.
        StoreError: the backbone gives other features than those in the store.
        EmbedInterrupt: stopped by a KeyboardInterrupt; says how far it was.
    """

    def opened(stop: threading.Event) -> StoreWriter:
        return StoreWriter(store, command, part=part, stop=stop)

    speed = Speed(workers, cores or our_cores())
    run = _Embedding(
        paths, recipe, store, load, hashes, progress, max_pixels, batch_size, rehash, speed,
        opened if writer is None else lambda _: writer(), keep_writer=writer is not None,
    )  # fmt: skip
    try:
        run.go()
        images = ledger(run.known, run.needs.completed, run.needs.failures)
    except KeyboardInterrupt as stopped:
        with suppress(MiripError, OSError):  # where the cache fails now, this stays as it is
            raise EmbedInterrupt(run.so_far()) from stopped
        raise
    finally:
        run.close()
    warn_of(run.flat, "of a single colour")
    warn_of(
        run.bad_profiles,
        "read without the colour profile in it, which is damaged or of another kind",
    )
    if run.speed.images:
        on_speed(run.speed)
    return images


class _Embedding:
    """The state of one call of :func:`embed`."""

    def __init__(
        self,
        paths: Sequence[Path],
        recipe: Recipe,
        store: FeatureStore,
        load: Callable[[], Backbone],
        hashes: HashMemory,
        progress: OnProgress,
        max_pixels: int,
        batch_size: int | None,
        rehash: bool,
        speed: Speed,
        make_writer: Callable[[threading.Event], StoreWriter],
        *,
        keep_writer: bool,
    ):
        self._paths, self._recipe, self._load = paths, recipe, load
        self._hashes, self._progress = hashes, progress
        self._max_pixels, self._batch_size, self._rehash = max_pixels, batch_size, rehash
        self.speed = speed  # of all passes together
        self._make_writer, self._keep_writer = make_writer, keep_writer
        self._writer: StoreWriter | None = None
        self._writer_lock = threading.Lock()
        self._stop = threading.Event()  # the run is over for every thread
        self._engine: Engine | None = None
        self._reading: dict[int, Path] = {}  # inputs that are being read and decoded
        self._filling: dict[Need, list[tuple[bytes, tuple[NDArray[np.uint8], ...]]]] = {}
        self._total = len(paths)  # images to look at; falls when some turn out to be known
        self._settled = 0  # images that needed no computing, or failed
        self._unread = 0  # files that could not be read
        self._backbone: Backbone | None = None
        self.known: list[bytes | ImageError | None] = [None] * len(paths)
        self.needs = Needs(store, recipe, self._open_writer)
        self.flat: list[Path] = []  # pictures of a single colour
        self.bad_profiles: list[Path] = []  # pictures whose colour profile could not be used

    def go(self) -> None:
        """Look at every image; compute what is missing."""
        self._pass(range(len(self._paths)))
        # Where the file that was to be computed vanished or changed, another with its bytes serves as well.
        if left := self._left():
            self._total += len(left)
            self._pass(sorted(left.values()))
            again = self._left()
            self.needs.complete([], dict.fromkeys(again, _CHANGED))

    def so_far(self) -> pd.DataFrame:
        """What became of the images in a run that was stopped."""
        self._stop.set()
        left = {sha for _, sha in self._lacking()}
        return ledger(self.known, self.needs.completed, self.needs.failures, left)

    def close(self) -> None:
        """Give the store's lock back; every committed row stays."""
        self._stop.set()
        with self._writer_lock:
            if self._writer is not None and not self._keep_writer:
                self._writer.close()
            self._writer = None

    def _left(self) -> dict[bytes, int]:
        """Contents that should have rows by now and have not, with their inputs; to be reserved again."""
        left: dict[bytes, int] = {}
        for i, sha in self._lacking() if self._writer is not None else ():
            if sha not in self.needs.failures:
                left.setdefault(sha, i)
        self.needs.release(left)
        return left

    def _lacking(self) -> Iterator[tuple[int, bytes]]:
        """Inputs whose content lacks something by now, as far as the store's index knows."""
        known = ((i, sha) for i, sha in enumerate(self.known) if isinstance(sha, bytes))
        while part := list(islice(known, _ASKED_AT_ONCE)):
            lacking = self.needs.lacking([sha for _, sha in part])
            yield from (pair for pair, need in zip(part, lacking, strict=True) if need)

    def _pass(self, indices: Sequence[int]) -> None:
        jobs = self._jobs(indices)
        first = next(jobs, None)
        if first is None:  # all is known and there: no process, no backbone, no lock
            return
        with DecodePool(self.speed.workers) as pool:
            try:
                for item in pool.decode(chain([first], jobs), self.needs.sizes):
                    self._accept(item)
                    self._cut(ahead=len(indices) - bisect_right(indices, item.index))
                    self._tell()
                self._cut(ahead=0, all_of_it=True)
                if self._engine is not None:
                    self._engine.finish(self._tell)
            except BaseException:
                self._stop.set()  # first of all: a decoding thread may be verifying a large cache
                pool.close()
                if self._engine is not None:
                    self._engine.stop()
                raise
        if self._engine is not None:
            self._settled += self._engine.done
            self.speed.images += self._engine.done
            self.speed.seconds = time.perf_counter() - self._speed_from
            self._engine = None
        self._tell()

    def _jobs(self, indices: Sequence[int]) -> Iterator[DecodeJob]:
        """What has to be read: files whose content is not known, or known to lack something."""
        sizes = tuple(dict.fromkeys(view.size for view in self._recipe.views))
        fast = self._recipe.decode == "fast"
        iterator = iter(indices)
        while part := list(islice(iterator, _ASKED_AT_ONCE)):
            paths = [self._paths[i] for i in part]
            remembered: list[bytes | None] = [None] * len(part)
            if not self._rehash:
                remembered = list(self._hashes.recall_many(paths))
            known = [sha for sha in remembered if sha is not None]
            needs = iter(self.needs.reserve(known))
            for index, path, sha in zip(part, paths, remembered, strict=True):
                need = next(needs) if sha is not None else ()
                if sha is not None:
                    self.known[index] = sha
                if sha is not None and not need:
                    self._total -= 1
                    continue
                self._reading[index] = path
                wanted = sizes if sha is None else sizes_of(need)
                yield DecodeJob(
                    index, path, wanted, self._recipe.resize, fast,
                    ask=sha is None, max_pixels=self._max_pixels, srgb=self._recipe.srgb,
                )  # fmt: skip

    def _accept(self, item: Decoded) -> None:
        """Take in what became of one file. It is known by the bytes that were decoded."""
        sha, before, path = item.sha256, self.known[item.index], self._reading.pop(item.index)
        if not sha:
            self.known[item.index] = ImageError(item.reason or "")
            self._settled += 1
            self._unread += 1
            return
        self.known[item.index] = sha
        if item.stamp is not None:
            self._hashes.remember(path, sha, item.stamp)
        if before is not None and sha != before:
            self.needs.reserve([sha])
        # A copy whose pixels nobody asked for must not take the need that another's are for.
        need = self.needs.take(sha, item.sizes)
        if item.flat and need:
            self.flat.append(path)
        if item.bad_profile and need:
            self.bad_profiles.append(path)
        if item.reason is not None:
            self.needs.complete([sha], {sha: item.reason})
            self._settled += 1
        elif need:
            images = tuple(item.images[item.sizes.index(size)] for size in sizes_of(need))
            if self._engine is None:
                self._engine = self._start_engine()
            self.speed.add("read + decode", item.seconds, item.cpu_seconds)
            self._filling.setdefault(need, []).append((sha, images))
        else:
            self._settled += 1

    def _cut(self, *, ahead: int, all_of_it: bool = False) -> None:
        """Hand over what has become a whole batch.

        Args:
            ahead: how many images may follow, at most.
            all_of_it: nothing follows; hand over the rest too.
        """
        engine, threads = self._engine, self.speed.threads
        if engine is None:
            return
        for need in list(self._filling):
            waiting = self._filling[need]
            while waiting:
                size = engine.forward.batch_size
                if threads > 1:  # towards the end batches become smaller, so that all end together
                    size = min(size, -(-(ahead + len(waiting)) // (2 * threads)))
                if len(waiting) < size and not all_of_it:
                    break
                part, self._filling[need] = waiting[:size], waiting[size:]
                waiting = self._filling[need]
                engine.put((need, [sha for sha, _ in part], [images for _, images in part]))
            if not waiting:
                del self._filling[need]

    def _start_engine(self) -> Engine:
        if self._backbone is None:
            self._backbone = self._load()
            self._speed_from = time.perf_counter()  # what came before was starting up
        return Engine(
            self._backbone,
            self._recipe,
            self._open_writer(),
            self._batch_size,
            self.needs.complete,
            self.speed,
        )

    def _open_writer(self) -> StoreWriter:
        with self._writer_lock:
            if self._writer is None:
                if self._stop.is_set():
                    raise StoppedError
                self._writer = self._make_writer(self._stop)
            return self._writer

    def _tell(self) -> None:
        done = self._settled + (self._engine.done if self._engine else 0)
        self._progress(done, self._total, len(self.needs.failures) + self._unread)


class Needs:
    """Gives each picture's work out once, however many files hold it. Several threads may use it.

    A cache that has some views or kinds is filled, not redone: a need names exactly what is lacking. Only
    work under way and failures are kept here; what is done, the store's index knows.

    Args:
        store: what is there already.
        recipe: what is wanted.
        writer: opens the store for writing, or gives the writer that is open; called when something is
            lacking.

    Attributes:
        failures: content hash → why it could not be embedded.
        completed: contents that got rows in this run.
    """

    def __init__(self, store: FeatureStore, recipe: Recipe, writer: Callable[[], StoreWriter]):
        self._store, self._writer = store, writer
        self._wanted = wanted_series(recipe)
        self._lock = threading.Lock()
        #: What was given out; nothing of a content once it is being fulfilled.
        self._given: dict[bytes, Need] = {}
        self._verified = False
        self.failures: dict[bytes, str] = {}
        self.completed: set[bytes] = set()

    def reserve(self, hashes: Sequence[bytes]) -> list[Need]:
        """What is to be computed of each content; empty where nothing is, or where it was given out."""
        with self._lock:
            needs = self.lacking(hashes)
            if any(needs) and not self._verified:
                # What is found damaged by that lacks as well: a second pass of the run sees it.
                for _, _, spec in self._wanted:
                    self._writer().missing(spec.name, ())
                self._verified = True
            for i, sha in enumerate(hashes):
                if needs[i] and (sha in self._given or sha in self.failures):
                    needs[i] = ()
                elif needs[i]:
                    self._given[sha] = needs[i]
        return needs

    def sizes(self, sha256: bytes) -> tuple[int, ...]:
        """Reserve one content; the sizes that have to be decoded for it."""
        return sizes_of(self.reserve([sha256])[0])

    def take(self, sha256: bytes, sizes: Sequence[int]) -> Need:
        """The reserved need of a content, to be fulfilled now from squares of these sizes.

        Empty if there is none (any more), or if it needs other sizes: then it stays for whoever has them.
        """
        with self._lock:
            need = self._given.get(sha256, ())
            if not need or not set(sizes_of(need)) <= set(sizes):
                return ()
            self._given[sha256] = ()
            return need

    def complete(self, hashes: Sequence[bytes], failures: Mapping[bytes, str]) -> None:
        """Note what came of contents: rows that are written, or a failure."""
        with self._lock:
            self.failures.update(failures)
            self.completed.update(sha for sha in hashes if sha not in failures)
            for sha in (*hashes, *failures):
                self._given.pop(sha, None)

    def release(self, hashes: Iterable[bytes]) -> None:
        """Let contents be reserved again: the file that was to be computed vanished or changed."""
        with self._lock:
            for sha in hashes:
                self._given.pop(sha, None)

    def lacking(self, hashes: Sequence[bytes]) -> list[Need]:
        """What each content lacks, as far as the store's index knows."""
        missing = [self._store.rows(spec.name, hashes) < 0 for _, _, spec in self._wanted]
        needs: list[Need] = [()] * len(hashes)
        for i in np.flatnonzero(np.any(missing, axis=0)).tolist():
            needs[i] = tuple(compress(self._wanted, (row[i] for row in missing)))
        return needs
