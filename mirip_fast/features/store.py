"""A feature store: a folder of shards, read by the content hash of the images.

``cache/<fingerprint>/`` holds ``store.json`` (schema and fingerprint), ``LOCK`` (who writes), shards named
for their series, and per writing process ``shards-r00.json`` (which of its shards there must be) and, while
it writes, ``DIRTY-r00``. Readers take no lock and are never blocked.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mirip_fast.errors import StoreError
from mirip_fast.features.hash_index import HashIndex
from mirip_fast.features.shard_rows import unreadable
from mirip_fast.features.shards import SCHEMA, SeriesSpec, Shard
from mirip_fast.features.store_files import (
    DIRTY_FILE,
    MOST_JSON_BYTES,
    STORE_FILE,
    dirty_files,
    find_shards,
)
from mirip_fast.files import read_json, write_json

if TYPE_CHECKING:
    from mirip_fast.features.content_numbers import ContentNumbers
    from mirip_fast.features.store_writer import StoreWriter

__all__ = [
    "DIRTY_FILE",
    "STORE_FILE",
    "FeatureStore",
    "SeriesSpec",
    "differing_fields",
    "fingerprint_id",
]

_ID = re.compile("[0-9a-f]{16}")
_READ_BYTES = 32 << 20  # read at once where rows are asked for out of order
_GAP_BYTES = 64 << 10  # reading over a gap of this size is quicker than a second read


def fingerprint_id(fields: Mapping[str, Any]) -> str:
    """Name of a fingerprint: 16 hex digits of the SHA-256 of its canonical JSON."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def differing_fields(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """``image_size: 224 ≠ 756; resize: …``: what two fingerprints do not share."""
    keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    return "; ".join(f"{key}: {ours.get(key)} ≠ {theirs.get(key)}" for key in keys)


@dataclass
class _Series:
    """What is known of one series. Global rows stay what they are when shards are added."""

    spec: SeriesSpec
    shards: list[Shard] = field(default_factory=list)  # in the order they were found
    starts: list[int] = field(default_factory=list)  # global row of each shard's first slot
    sums: list[NDArray[np.uint64]] = field(default_factory=list)  # checksums when indexed
    hashes: list[NDArray[np.uint8]] = field(default_factory=list)
    live: list[int] = field(default_factory=list)  # positions of the shards that are there, by name
    index: HashIndex = field(
        default_factory=lambda: HashIndex(np.empty((0, 32), np.uint8), np.empty(0, np.int64))
    )

    def update(self, shards: Sequence[Shard], *, verify: bool, anew: bool) -> None:
        """Index the rows that came since the last time; ``anew``: rows may have gone, too."""
        position = {shard.path: i for i, shard in enumerate(self.shards)}
        for shard in shards:
            if shard.path not in position:
                position[shard.path] = len(self.shards)
                self.starts.append(self.starts[-1] + self.shards[-1].rows if self.shards else 0)
                self.shards.append(shard)
                self.sums.append(np.zeros(shard.rows, np.uint64))
                self.hashes.append(np.zeros((shard.rows, 32), np.uint8))
        self.live = [position[shard.path] for shard in shards]
        for i in self.live:
            if anew or not self.sums[i].all():
                self._read_keys(i, verify=verify)
        slots = [np.flatnonzero(self.sums[i]) for i in self.live]
        # The first row by name wins where two processes stored the same picture.
        parts = [self.hashes[i][s] for i, s in zip(self.live, slots, strict=True)]
        rows = [self.starts[i] + s for i, s in zip(self.live, slots, strict=True)]
        self.index = HashIndex(np.concatenate(parts), np.concatenate(rows))

    def _read_keys(self, i: int, *, verify: bool) -> None:
        shard = self.shards[i]
        with shard.open() as stream:
            sums, hashes = shard.read_keys(stream)
            if verify:
                fresh = np.where(sums != self.sums[i], sums, 0)
                sums[(fresh != 0) & ~shard.matching(stream, fresh, hashes)] = 0
        self.sums[i], self.hashes[i] = sums, hashes


class FeatureStore:
    """Reads a store. Use :meth:`create` or :meth:`open`.

    Attributes:
        path: the folder.
        fingerprint: the fields that decide what the features are.
    """

    def __init__(self, path: Path, fingerprint: dict[str, Any]):
        self.path = path
        self.fingerprint = fingerprint
        self.fingerprint_id = fingerprint_id(fingerprint)
        self._series: dict[str, _Series] | None = None
        self._verify_always = False
        self._outdated = False

    @classmethod
    def create(cls, path: Path, fingerprint: Mapping[str, Any]) -> FeatureStore:
        """Open the store at ``path``, making it if there is none.

        Raises:
            StoreError: there is one with another fingerprint; names the differing fields.
        """
        if not (path / STORE_FILE).exists():
            try:
                path.mkdir(parents=True, exist_ok=True)
                write_json(path / STORE_FILE, {"schema": SCHEMA, "fingerprint": dict(fingerprint)})
            except StoreError:
                raise
            except OSError as error:
                raise StoreError(
                    f"{path} can not be made ({error.strerror}): give --cache-dir a folder that this "
                    "user may write to."
                ) from error
        store = cls.open(path)
        if store.fingerprint_id != fingerprint_id(fingerprint):
            raise StoreError(
                f"{path} holds other features ({differing_fields(store.fingerprint, fingerprint)})"
            )
        return store

    @classmethod
    def open(cls, path: Path, *, verify: bool = False) -> FeatureStore:
        """Open an existing store.

        Args:
            path: the folder.
            verify: check every row's checksum; without it only after a crash, or while a run writes.

        Raises:
            StoreError: there is none, it is damaged, or a newer version wrote it.
        """
        try:
            content = read_json(path / STORE_FILE, MOST_JSON_BYTES)
        except FileNotFoundError:
            raise StoreError(f"{path} is no feature store: it has no {STORE_FILE}") from None
        except OSError as error:
            raise unreadable(path / STORE_FILE, error) from error
        except ValueError as error:
            raise _damaged(path, error) from error
        if content.get("schema") != SCHEMA or not isinstance(content.get("fingerprint"), dict):
            raise StoreError(
                f"{path} was written by another version of mirip-fast (schema "
                f"{content.get('schema')!r}, this version reads {SCHEMA}). It was left as it is; "
                "give another --cache-dir to embed anew."
            )
        store = cls(path, content["fingerprint"])
        if _ID.fullmatch(path.name) and path.name != store.fingerprint_id:
            raise _damaged(path, f"its fingerprint is that of {store.fingerprint_id}")
        store._verify_always = verify
        return store

    def series(self) -> dict[str, SeriesSpec]:
        """The series that have at least one shard."""
        return {name: series.spec for name, series in self._load().items() if series.live}

    def shards(self, series: str) -> list[Shard]:
        """The shards of a series, by rank and number."""
        known = self._load().get(series)
        return [known.shards[i] for i in known.live] if known else []

    def rows(self, series: str, hashes: Sequence[bytes]) -> NDArray[np.int64]:
        """[n] global row of each content hash, −1 where the series has none."""
        known = self._load().get(series)
        return known.index.find(hashes) if known else np.full(len(hashes), -1, np.int64)

    def count(self, series: str) -> int:
        """How many different images have a row."""
        known = self._load().get(series)
        return len(known.index) if known else 0

    def free_slots(self, series: str) -> dict[int, int]:
        """How many rows fit into the shards that are there, by the rank of the process that fills them."""
        known = self._load().get(series)
        free: dict[int, int] = {}
        if known is None:
            return free
        for i in known.live:
            rank = known.shards[i].rank
            free[rank] = free.get(rank, 0) + int(np.count_nonzero(known.sums[i] == 0))
        return free

    def spoiled(self, series: str) -> int:
        """How many rows were found damaged; 0 where nobody looked (see :meth:`open`)."""
        known = self._load().get(series)
        if known is None:
            return 0
        marked = sum(np.count_nonzero(known.shards[i].checksums()) for i in known.live)
        return int(marked - sum(np.count_nonzero(known.sums[i]) for i in known.live))

    def valid_hashes(self, series: str) -> set[bytes]:
        """The content hashes that have a row."""
        known = self._load().get(series)
        return known.index.hashes() if known else set()

    def read(self, series: str, rows: NDArray[np.int64], *, finite: bool = True) -> NDArray[Any]:
        """Features of the given rows.

        Args:
            series: name of the series.
            rows: [n] global rows from :meth:`rows`.
            finite: refuse rows that are not; no run of mirip-fast writes any.

        Returns:
            [n, \\*shape] in the stored number format, in the order asked.

        Raises:
            StoreError: an unknown series, a row that does not exist (any more), or one that is not finite.
        """
        known = self._load().get(series)
        if known is None or not known.shards:
            there = ", ".join(self.series()) or "none"
            raise StoreError(f"{self.path} has no series {series} (there is: {there})")
        rows = np.asarray(rows, np.int64)
        starts = np.array([*known.starts, known.starts[-1] + known.shards[-1].rows])
        if len(rows) and not (rows.min() >= 0 and rows.max() < starts[-1]):
            raise StoreError(f"{self.path}: {series} was asked for rows that do not exist")
        result = np.empty((len(rows), *known.spec.shape), known.spec.dtype)
        shard_of = np.searchsorted(starts, rows, side="right") - 1
        for number in np.unique(shard_of):
            here = np.flatnonzero(shard_of == number)
            slots = rows[here] - starts[number]
            _read_shard(known.shards[number], known.sums[number], slots, here, result)
        good = np.isfinite(result).all(axis=tuple(range(1, result.ndim)))
        bad = np.flatnonzero(~good)
        if finite and len(bad):
            shard = known.shards[shard_of[bad[0]]].path
            raise StoreError(
                f"{shard}: {len(bad)} of {len(rows)} features that were asked for are not finite, and no "
                "score can be made of them. No run of mirip-fast writes such rows: put back a good copy, or "
                "embed into another --cache-dir."
            )
        return result

    def refresh(self) -> None:
        """Look again for rows that were written since. Row numbers given before stay right."""
        # A run that was killed may have left rows whose bytes never reached the disk.
        verify = self._verify_always or bool(dirty_files(self.path))
        before = self._series or {}
        known = {shard.path: shard for s in before.values() for shard in s.shards}
        found = find_shards(self.path, self.fingerprint_id, known)
        series = {}
        for name, shards in found.items():
            series[name] = before.get(name) or _Series(shards[0].spec)
            series[name].update(shards, verify=verify, anew=self._outdated)
        self._series = series
        self._outdated = False

    def forget(self) -> None:
        """Rows were written, and damaged ones cleared: look at everything again when next asked."""
        self._outdated = True

    def writer(
        self,
        *,
        command: str = "",
        run_id: str | None = None,
        rank: int | None = None,
        stop: threading.Event | None = None,
        contents: ContentNumbers | None = None,
    ) -> StoreWriter:
        """Take the lock and write; use as a context manager.

        Args:
            command: what is running, for whoever finds the store locked.
            run_id: names a distributed run; its processes share the lock.
            rank: number of this process in that run (default: the one torchrun gave it).
            stop: once set, what is being verified is given up.
            contents: numbers that the caller keeps, too, so that no hash is kept twice.

        Raises:
            StoreLockedError: another run holds it; nothing was changed.
        """
        from mirip_fast.features.store_writer import StoreWriter

        return StoreWriter(self, command, run_id=run_id, rank=rank, stop=stop, contents=contents)

    def _load(self) -> dict[str, _Series]:
        if self._series is None or self._outdated:
            self.refresh()
        return self._series or {}


def _damaged(path: Path, why: object) -> StoreError:
    return StoreError(
        f"{path / STORE_FILE} is damaged ({why}). Delete it and run the same `mirip-fast embed` again: it is "
        "written anew, and the features beside it stay."
    )


def _read_shard(
    shard: Shard,
    sums: NDArray[np.uint64],
    slots: NDArray[np.int64],
    places: NDArray[np.int64],
    out: NDArray[Any],
) -> None:
    """``out[places] = features[slots]``, neighbours in one read."""
    with shard.open() as stream:
        ascending = bool((np.diff(slots) == 1).all() and (np.diff(places) == 1).all())
        if ascending:
            shard.read_features(stream, int(slots[0]), out[places[0] : places[-1] + 1])
        else:
            _read_scattered(shard, stream, slots, places, out)
        now = shard.read_checksums(stream)[slots]
    if (now != sums[slots]).any() or not now.all():
        raise StoreError(
            f"{shard.path}: a row that was asked for is not there (any more: damaged rows are "
            "computed anew); run the same command again"
        )


def _read_scattered(
    shard: Shard,
    stream: IO[bytes],
    slots: NDArray[np.int64],
    places: NDArray[np.int64],
    out: NDArray[Any],
) -> None:
    order = np.argsort(slots, kind="stable")
    slots, places = slots[order], places[order]
    gap = max(1, _GAP_BYTES // shard.spec.row_bytes)
    block = slots // max(1, _READ_BYTES // shard.spec.row_bytes)
    breaks = np.flatnonzero((np.diff(slots) > gap) | (np.diff(block) > 0)) + 1
    for part, where in zip(np.split(slots, breaks), np.split(places, breaks), strict=True):
        piece = np.empty((part[-1] + 1 - part[0], *shard.spec.shape), shard.spec.dtype)
        shard.read_features(stream, int(part[0]), piece)
        out[where] = piece[part - part[0]]
