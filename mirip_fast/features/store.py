"""A feature store: a folder of shards, read by the content hash of the images.

``cache/<fingerprint>/`` holds ``store.json`` (schema and fingerprint), ``LOCK`` (who writes), and shards
named for their series. Readers take no lock and are never blocked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mirip_fast.errors import StoreError
from mirip_fast.features.shards import SCHEMA, SeriesSpec, Shard, open_shard, parse_shard_name
from mirip_fast.files import read_json, write_json

if TYPE_CHECKING:
    from mirip_fast.features.store_writer import StoreWriter

__all__ = ["FeatureStore", "SeriesSpec", "differing_fields", "fingerprint_id"]

STORE_FILE = "store.json"
DIRTY_FILE = "DIRTY"


def fingerprint_id(fields: Mapping[str, Any]) -> str:
    """Name of a fingerprint: 16 hex digits of the SHA-256 of its canonical JSON."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differing_fields(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """``image_size: 224 ≠ 756; resize: …``: what two fingerprints do not share."""
    keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    return "; ".join(f"{key}: {ours.get(key)} ≠ {theirs.get(key)}" for key in keys)


@dataclass(frozen=True)
class _Index:
    """Where each image's row of one series is."""

    shards: list[Shard]
    row_of: dict[bytes, int]  # content hash → global row (shard position · rows per shard + slot)


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
        self._indexes: dict[str, _Index] | None = None

    @classmethod
    def create(cls, path: Path, fingerprint: Mapping[str, Any]) -> FeatureStore:
        """Open the store at ``path``, making it if there is none.

        Raises:
            StoreError: there is one with another fingerprint; names the differing fields.
        """
        if not (path / STORE_FILE).exists():
            path.mkdir(parents=True, exist_ok=True)
            write_json(path / STORE_FILE, {"schema": SCHEMA, "fingerprint": dict(fingerprint)})
        store = cls.open(path)
        if store.fingerprint != fingerprint:
            raise StoreError(
                f"{path} holds other features ({differing_fields(store.fingerprint, fingerprint)})"
            )
        return store

    @classmethod
    def open(cls, path: Path) -> FeatureStore:
        """Open an existing store.

        Raises:
            StoreError: there is none, it is damaged, or a newer version wrote it.
        """
        try:
            content = read_json(path / STORE_FILE)
        except FileNotFoundError:
            raise StoreError(f"{path} is no feature store: it has no {STORE_FILE}") from None
        except (OSError, ValueError) as error:
            raise StoreError(f"{path / STORE_FILE} can not be read: {error}") from error
        if content.get("schema") != SCHEMA or not isinstance(content.get("fingerprint"), dict):
            raise StoreError(
                f"{path} was written by another version of mirip-fast (schema "
                f"{content.get('schema')!r}, this version reads {SCHEMA}). It was left as it is; "
                "give another --cache-dir to embed anew."
            )
        return cls(path, content["fingerprint"])

    def series(self) -> dict[str, SeriesSpec]:
        """The series that have at least one shard."""
        return {name: index.shards[0].spec for name, index in self._load().items()}

    def shards(self, series: str) -> list[Shard]:
        """The shards of a series, in global row order."""
        index = self._load().get(series)
        return list(index.shards) if index else []

    def rows(self, series: str, hashes: Sequence[bytes]) -> NDArray[np.int64]:
        """[n] global row of each content hash, −1 where the series has none."""
        index = self._load().get(series)
        row_of = index.row_of if index else {}
        return np.array([row_of.get(sha, -1) for sha in hashes], dtype=np.int64)

    def valid_hashes(self, series: str) -> set[bytes]:
        """The content hashes that have a row."""
        index = self._load().get(series)
        return set(index.row_of) if index else set()

    def read(self, series: str, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Features of the given rows.

        Args:
            series: name of the series.
            rows: [n] global rows from :meth:`rows`.

        Returns:
            [n, *shape] in the stored number format, in the order asked.

        Raises:
            StoreError: an unknown series, or a row that does not exist.
        """
        index = self._load().get(series)
        if index is None:
            raise StoreError(f"{self.path} has no series {series}")
        spec = index.shards[0].spec
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(index.shards) * spec.shard_rows):
            raise StoreError(f"{self.path}: {series} was asked for rows that do not exist")
        result = np.empty((len(rows), *spec.shape), dtype=spec.dtype)
        shard_of, slot = np.divmod(rows, spec.shard_rows)
        for number in np.unique(shard_of):
            here = np.flatnonzero(shard_of == number)
            result[here] = index.shards[number].features()[slot[here]]
        return result

    def refresh(self) -> None:
        """Forget what was read of the folder: rows written since then are found again."""
        self._indexes = None

    def writer(self, *, command: str = "") -> StoreWriter:
        """Take the lock and write; use as a context manager.

        Raises:
            StoreLockedError: another run holds it; nothing was changed.
        """
        from mirip_fast.features.store_writer import StoreWriter

        return StoreWriter(self, command)

    def _load(self) -> dict[str, _Index]:
        if self._indexes is None:
            # A run that was killed may have left rows whose bytes never reached the disk.
            verify = (self.path / DIRTY_FILE).exists()
            self._indexes = {
                name: _index(shards, verify=verify)
                for name, shards in find_shards(self.path, self.fingerprint_id).items()
            }
        return self._indexes


def find_shards(path: Path, fingerprint: str) -> dict[str, list[Shard]]:
    """Every shard of a store by series, checked, in the order of rank and number.

    Raises:
        StoreError: a number is missing from a sequence, or a file is no shard of this store.
    """
    numbers: dict[tuple[str, int], set[int]] = {}
    found: dict[str, list[tuple[int, int, Path]]] = {}
    for file in path.glob("*.h5"):
        parsed = parse_shard_name(file.name)
        if parsed is None:
            raise StoreError(f"{file} is no shard of this store; move it elsewhere")
        series, rank, number = parsed
        numbers.setdefault((series, rank), set()).add(number)
        found.setdefault(series, []).append((rank, number, file))
    for (series, rank), present in numbers.items():
        absent = sorted(set(range(max(present) + 1)) - present)
        if absent:
            raise StoreError(
                f"{path} lacks shard {absent[0]} of series {series} (rank {rank}): restore the file, or "
                "move the later ones away and run `mirip-fast embed` again"
            )
    result = {}
    for series, files in sorted(found.items()):
        shards = [open_shard(file, fingerprint) for _, _, file in sorted(files)]
        if len({shard.spec for shard in shards}) > 1:
            raise StoreError(f"{path}: the shards of series {series} have different shapes")
        result[series] = shards
    return result


def _index(shards: list[Shard], *, verify: bool) -> _Index:
    row_of: dict[bytes, int] = {}
    for position, shard in enumerate(shards):
        exists = shard.valid() if verify else shard.checksums() != 0
        slots = np.flatnonzero(exists)
        hashes = np.ascontiguousarray(shard.sha256()[slots]).view("V32").ravel()
        for slot, sha in zip(slots, hashes, strict=True):
            # The first row wins where two processes stored the same picture.
            row_of.setdefault(sha.tobytes(), position * shard.rows + int(slot))
    return _Index(shards, row_of)
