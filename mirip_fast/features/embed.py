"""The embed loop: which images have no features yet, compute those, commit them batch by batch.

Images are known by the SHA-256 of their bytes. Rows are placed by that hash, so the same picture under
two names is computed once, and renaming or moving a file costs nothing.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mirip_fast.data.decode_pool import Decoded, DecodeJob, DecodePool
from mirip_fast.data.hashes import HashMemory
from mirip_fast.errors import ImageError
from mirip_fast.features.pooling import pool_tokens
from mirip_fast.features.recipe import Recipe
from mirip_fast.features.store import FeatureStore, SeriesSpec
from mirip_fast.features.store_writer import StoreWriter
from mirip_fast.features.views import View

if TYPE_CHECKING:
    import torch

    from mirip_fast.features.backbone import Backbone

log = logging.getLogger(__name__)
T = TypeVar("T")

#: What became of an input; every input has exactly one.
STATUSES = ("embedded", "present", "duplicate", "failed")


@dataclass(frozen=True)
class Outcome:
    """One line of the ledger."""

    status: str  # one of STATUSES
    sha256: bytes | None = None  # of the file's bytes; None if it could not be read
    reason: str | None = None  # why it failed


@dataclass(frozen=True)
class Settings:
    """How the work is done; none of it changes the numbers."""

    workers: int = 0
    batch_size: int | None = None  # None: by the device and the number of tokens
    rehash: bool = False
    command: str = ""  # told to whoever finds the store locked


@dataclass
class Progress:
    """Counts while computing, handed to the progress callback after every batch."""

    total: int
    done: int = 0
    failed: int = 0


#: A wanted series: which view it is of, which kind of token it holds, and its row's shape.
Wanted = tuple[View, str, SeriesSpec]


def wanted_series(recipe: Recipe) -> list[Wanted]:
    """Every series that a recipe asks for, view by view."""
    return [(v, kind, recipe.series(v, kind)) for v in recipe.views for kind in recipe.kinds]


def hash_files(
    paths: Sequence[Path], hashes: HashMemory, *, rehash: bool
) -> list[bytes | ImageError]:
    """The content hash of every file, or why it can not be read, in order."""
    return list(hashes.sha256_many(paths, rehash=rehash))


def embed(
    paths: Sequence[Path],
    recipe: Recipe,
    store: FeatureStore,
    load: Callable[[], Backbone],
    hashes: HashMemory,
    settings: Settings,
    progress: Callable[[Progress], None] = lambda _: None,
) -> list[Outcome]:
    """Make sure that every readable image has a row in every series of the recipe.

    Args:
        paths: image files, in the order of the wanted outcomes.
        recipe: what to compute.
        store: the store of ``recipe.fingerprint``.
        load: loads the backbone; called only if something has to be computed.
        hashes: remembers content hashes.
        settings: batch size, workers and so on.
        progress: called after every committed batch.

    Returns:
        One outcome per path: embedded (computed now), present (was there), duplicate (the bytes of an
        earlier path of this call), or failed with its reason.

    Raises:
        StoreLockedError: another run writes to the store, and something is missing from it.
        DiskFullError: no room; what was committed stays.
    """
    known = hash_files(paths, hashes, rehash=settings.rehash)
    present = _complete(store, recipe, known)
    run = _Run(paths, recipe, load, settings, progress)
    missing = [i for i, sha in _first_of_each(known).items() if sha not in present]
    if missing:
        with store.writer(command=settings.command) as writer:
            run.compute(missing, known, writer)
        store.refresh()
        complete = _complete(store, recipe, known)
        for sha in {sha for sha in known if isinstance(sha, bytes)} - complete - set(run.failures):
            run.failures[sha] = "the file changed while it was read; run the same command again"
    return ledger(known, present, run.failures)


def ledger(
    known: Sequence[bytes | ImageError], present: set[bytes], failures: Mapping[bytes, str]
) -> list[Outcome]:
    """What became of each input.

    Args:
        known: content hash of each input, or why it could not be read.
        present: hashes whose features were there before.
        failures: hash → reason, for files that could be read but not embedded.
    """
    outcomes = []
    first = set(_first_of_each(known))
    for i, sha in enumerate(known):
        if isinstance(sha, ImageError):
            outcomes.append(Outcome("failed", None, str(sha)))
        elif sha in failures:
            outcomes.append(Outcome("failed", sha, failures[sha]))
        elif i not in first:
            outcomes.append(Outcome("duplicate", sha))
        else:
            outcomes.append(Outcome("present" if sha in present else "embedded", sha))
    return outcomes


def _first_of_each(known: Sequence[bytes | ImageError]) -> dict[int, bytes]:
    """index → hash of the first file with each content, readable ones only."""
    seen: dict[bytes, int] = {}
    for i, sha in enumerate(known):
        if isinstance(sha, bytes):
            seen.setdefault(sha, i)
    return {i: sha for sha, i in seen.items()}


def _complete(
    store: FeatureStore, recipe: Recipe, known: Sequence[bytes | ImageError]
) -> set[bytes]:
    """The hashes that have a row in every wanted series."""
    unique = list({sha for sha in known if isinstance(sha, bytes)})
    there = np.ones(len(unique), dtype=bool)
    for _, _, spec in wanted_series(recipe):
        there &= store.rows(spec.name, unique) >= 0
    return {sha for sha, complete in zip(unique, there, strict=True) if complete}


@dataclass
class _Run:
    """The state of one call of :func:`embed`."""

    paths: Sequence[Path]
    recipe: Recipe
    load: Callable[[], Backbone]
    settings: Settings
    report: Callable[[Progress], None]
    failures: dict[bytes, str] = field(default_factory=dict)

    def compute(
        self, missing: Sequence[int], known: list[bytes | ImageError], writer: StoreWriter
    ) -> None:
        """Compute and commit what ``missing`` (indices into paths) lacks; updates ``known`` and failures."""
        backbone = self.load()
        self.batch_size = self.settings.batch_size or default_batch_size(
            self.recipe, backbone.device
        )
        counts = Progress(total=len(missing))
        with DecodePool(self.settings.workers) as pool:
            for wanted, indices in self._by_need(missing, known, writer):
                sizes = tuple(dict.fromkeys(view.size for view, _, _ in wanted))
                jobs = (
                    DecodeJob(
                        i, self.paths[i], sizes, self.recipe.resize, self.recipe.decode == "fast"
                    )
                    for i in indices
                )
                decoded = pool.decode(jobs)
                while batch := list(islice(decoded, self.batch_size)):
                    good = self._accept(batch, known)
                    if good:
                        self._commit(good, wanted, sizes, backbone, writer)
                    counts.done += len(batch)
                    counts.failed = len(self.failures)
                    self.report(counts)

    def _by_need(
        self, missing: Sequence[int], known: Sequence[bytes | ImageError], writer: StoreWriter
    ) -> Iterator[tuple[list[Wanted], list[int]]]:
        """Group the images by the series they lack: a cache that has some views is filled, not redone."""
        series = wanted_series(self.recipe)
        hashes = [sha for sha in (known[i] for i in missing) if isinstance(sha, bytes)]
        lacking = np.stack([writer.missing(spec.name, hashes) for _, _, spec in series], axis=1)
        for need in np.unique(lacking, axis=0)[::-1]:
            wanted = [item for item, needed in zip(series, need, strict=True) if needed]
            rows = np.flatnonzero((lacking == need).all(axis=1))
            if wanted:
                yield wanted, [missing[int(row)] for row in rows]

    def _accept(self, batch: Sequence[Decoded], known: list[bytes | ImageError]) -> list[Decoded]:
        """The decodable images of a batch. A file is known by the bytes that were decoded."""
        good: dict[bytes, Decoded] = {}
        for item in batch:
            if item.sha256:
                known[item.index] = item.sha256
            if item.reason is None:
                good[item.sha256] = item
            elif item.sha256:
                self.failures[item.sha256] = item.reason
            else:
                known[item.index] = ImageError(item.reason)
        return list(good.values())

    def _commit(
        self,
        items: Sequence[Decoded],
        wanted: Sequence[Wanted],
        sizes: tuple[int, ...],
        backbone: Backbone,
        writer: StoreWriter,
    ) -> None:
        features = self._forward(items, wanted, sizes, backbone)
        finite = np.ones(len(items), dtype=bool)
        for rows in features.values():
            finite &= np.isfinite(rows.reshape(len(items), -1)).all(axis=1)
        for item in (item for item, ok in zip(items, finite, strict=True) if not ok):
            self.failures[item.sha256] = (
                f"a feature does not fit {self.recipe.store_dtype} (not finite)"
                + ("; try --store-dtype float32" if self.recipe.store_dtype == "float16" else "")
            )
        keep = [item.sha256 for item, ok in zip(items, finite, strict=True) if ok]
        if keep:
            writer.append(keep, {spec: rows[finite] for spec, rows in features.items()})

    def _forward(
        self,
        items: Sequence[Decoded],
        wanted: Sequence[Wanted],
        sizes: tuple[int, ...],
        backbone: Backbone,
    ) -> dict[SeriesSpec, NDArray[Any]]:
        """Features of a batch; out of memory halves the batch for the rest of the run."""
        from mirip_fast.runtime import is_out_of_memory

        try:
            return _features(items, wanted, sizes, backbone, self.recipe.store_dtype)
        except Exception as error:
            if not is_out_of_memory(error) or len(items) == 1:
                raise
        self.batch_size = max(1, len(items) // 2)
        log.warning("Out of memory: going on with batches of %d images", self.batch_size)
        _free_memory(backbone.device)
        halves = [items[: self.batch_size], items[self.batch_size :]]
        parts = [self._forward(half, wanted, sizes, backbone) for half in halves if half]
        return {spec: np.concatenate([part[spec] for part in parts]) for spec in parts[0]}


def _features(
    items: Sequence[Decoded],
    wanted: Sequence[Wanted],
    sizes: tuple[int, ...],
    backbone: Backbone,
    dtype: str,
) -> dict[SeriesSpec, NDArray[Any]]:
    """One forward pass per view; every wanted kind of token from it."""
    import torch

    result: dict[SeriesSpec, NDArray[Any]] = {}
    with torch.inference_mode(), np.errstate(over="ignore"):
        for view in dict.fromkeys(view for view, _, _ in wanted):
            images = np.stack([item.images[sizes.index(view.size)] for item in items])
            pixels = backbone.normalise(torch.from_numpy(images))
            cls, patches = backbone.tokens(pixels.flip(-1) if view.flip else pixels)
            for _, kind, spec in (item for item in wanted if item[0] == view):
                result[spec] = pool_tokens(kind, cls, patches).cpu().numpy().astype(dtype)
    return result


def default_batch_size(recipe: Recipe, device: torch.device) -> int:
    """Images per forward pass when none is given: a fixed budget of tokens per pass.

    A CPU gains nothing from large batches; on a GPU the budget keeps DINOv2-Large under about 8 GiB, and
    a GPU that has less halves the batch by itself.
    """
    side = max(view.size for view in recipe.views) // recipe.backbone.patch_size
    budget, most = (16_384, 32) if device.type == "cpu" else (131_072, 256)
    return max(1, min(most, budget // (side * side + 1)))


def _free_memory(device: torch.device) -> None:
    import gc

    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Summary:
    """The accounting of a run: inputs = embedded + present + duplicate + failed."""

    inputs: int
    embedded: int
    present: int
    duplicate: int
    failed: int
    seconds: float


def summarise(outcomes: Sequence[Outcome], started: float) -> Summary:
    """Count the outcomes and assert that none was lost.

    Args:
        outcomes: one per input.
        started: ``time.monotonic()`` when the run began.
    """
    counts = Counter(outcome.status for outcome in outcomes)
    assert sum(counts[status] for status in STATUSES) == len(outcomes), counts
    return Summary(
        inputs=len(outcomes),
        **{status: counts[status] for status in STATUSES},
        seconds=time.monotonic() - started,
    )
