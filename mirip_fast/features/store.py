"""A feature store: a folder of shards, read by the content hash of the images.

``cache/<fingerprint>/`` holds ``store.json`` (schema and fingerprint), ``LOCK`` (who writes), shards named
for their series, and per part ``shards-r00.json`` and, while it is written, ``DIRTY-r00``. Part 0 is that of
a run alone, part n + 1 that of process n of several. Readers take no lock and are never blocked.

``shards-r00.json`` holds, per series, the numbers [first, end) of the shards that part 0 has. One of them
that is absent is an error, not a hole. A shard from ``end`` on was finished just before a kill and counts;
one before ``first`` was replaced (pruned) and only waits to be deleted.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mirip_fast.errors import StoreError
from mirip_fast.features.shards import (
    SCHEMA,
    SeriesSpec,
    Shard,
    open_shard,
    parse_shard_name,
    shard_name,
    unreadable,
)
from mirip_fast.files import read_json, write_json

STORE_FILE = "store.json"
#: With ``-r00`` …: there while a part is written, and after its process was killed: then checksums count.
DIRTY_FILE = "DIRTY"
_ID = re.compile("[0-9a-f]{16}")
_READ_BYTES = 32 << 20  # read at once where rows are asked for out of order
_PIECE_BYTES = 16 << 20  # in memory at once where many rows are copied
_GAP_BYTES = 64 << 10  # reading over a gap of this size is quicker than a second read
_SPARE_ROWS = 1 << 12  # room in the index for what is written next
_RANGES_FILE = re.compile(r"shards-r(\d{2,})\.json")
_TRIES = 20
_MOST_JSON_BYTES = 16 << 20  # of the small JSON files of a store
_MOST_SHARDS = 10_000_000  # of one part and series, by their names

#: (series, part) → numbers [first, end) of its shards
Ranges = dict[tuple[str, int], tuple[int, int]]


def fingerprint_id(fields: Mapping[str, Any]) -> str:
    """Name of a fingerprint: 16 hex digits of the SHA-256 of its canonical JSON."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def differing_fields(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """``image_size: 224 ≠ 756; resize: …``: what two fingerprints do not share."""
    keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    return "; ".join(f"{key}: {ours.get(key)} ≠ {theirs.get(key)}" for key in keys)


class Series:
    """What is known of one series: which content has which row.

    Global rows stay what they are when shards are added. One thread may change it while others look.

    Args:
        spec: of the series.
        numbers: content hash → its number, counted from 0; all series of a store share them.

    Attributes:
        shards: in the order they were found.
        starts: global row of each shard's first slot.
        sums: checksums of each shard's rows, 0 for a slot without a valid one.
        live: positions of the shards that are there, by name.
    """

    def __init__(self, spec: SeriesSpec, numbers: dict[bytes, int]):
        self.spec = spec
        self.shards: list[Shard] = []
        self.starts: list[int] = []
        self.sums: list[NDArray[np.uint64]] = []
        self.live: list[int] = []
        self._numbers = numbers
        self._contents: list[NDArray[np.int32]] = []  # number of the content in each shard's slots
        self._rows = np.empty(0, np.int64)  # of each content, −1 where it has none

    def count(self) -> int:
        """How many different contents have a row."""
        return int(np.count_nonzero(self._rows >= 0))

    def find(self, hashes: Sequence[bytes]) -> NDArray[np.int64]:
        """[n]: global row of each content hash, −1 where there is none."""
        numbers = np.fromiter((self._numbers.get(sha, -1) for sha in hashes), np.int64, len(hashes))
        rows = self._rows
        known = (numbers >= 0) & (numbers < len(rows))
        result = np.full(len(hashes), -1, np.int64)
        result[known] = rows[numbers[known]]
        return result

    def hashes(self) -> set[bytes]:
        """The content hashes that have a row."""
        return set(compress(list(self._numbers), self._rows >= 0))

    def add_shard(self, shard: Shard) -> int:
        """Make a shard known; its rows are not. Gives its position."""
        self.starts.append(self.starts[-1] + self.shards[-1].rows if self.shards else 0)
        self.shards.append(shard)
        self.sums.append(np.zeros(shard.rows, np.uint64))
        self._contents.append(np.zeros(shard.rows, np.int32))
        return len(self.shards) - 1

    def update(self, shards: Sequence[Shard], verify: Callable[[Shard], bool]) -> None:
        """Index the rows that came since the last time, checked where ``verify(shard)``."""
        position = {shard.path: i for i, shard in enumerate(self.shards)}
        there = [(shard, position.get(shard.path, -1)) for shard in shards]
        self.live = [i if i >= 0 else self.add_shard(shard) for shard, i in there]
        for i in self.live:
            if not self.sums[i].all():
                shard = self.shards[i]
                with shard.open() as stream:
                    sums, hashes = shard.read_keys(stream)
                    if verify(shard):
                        fresh = np.where(sums != self.sums[i], sums, 0)
                        sums[(fresh != 0) & ~shard.matching(stream, fresh, hashes)] = 0
                self.set_keys(i, sums, hashes)
        self.sort()

    def set_keys(self, i: int, sums: NDArray[np.uint64], hashes: NDArray[np.uint8]) -> None:
        """Replace what is known of a shard's rows; :meth:`sort` makes it found."""
        slots = np.flatnonzero(sums)
        table = hashes[slots].tobytes()
        self._contents[i][slots] = self._number(
            [table[j : j + 32] for j in range(0, len(table), 32)]
        )
        self.sums[i] = sums

    def sort(self) -> None:
        """Build the index from what is known of the shards."""
        rows = np.full(len(self._numbers), -1, np.int64)
        # Backwards: the first row by name wins where two processes stored the same picture.
        for i in reversed(self.live):
            slots = np.flatnonzero(self.sums[i])[::-1]
            rows[self._contents[i][slots]] = self.starts[i] + slots
        self._rows = rows

    def add(
        self, i: int, slots: NDArray[np.int64], sums: NDArray[np.uint64], hashes: Sequence[bytes]
    ) -> None:
        """Note rows [n] that were written to a shard and are durable."""
        numbers = self._number(hashes)
        self._contents[i][slots] = numbers
        self.sums[i][slots] = sums
        lacking = len(self._numbers) - len(self._rows)
        if lacking > 0:
            spare = np.full(max(lacking, len(self._rows) // 8, _SPARE_ROWS), -1, np.int64)
            self._rows = np.concatenate([self._rows, spare])
        self._rows[numbers] = self.starts[i] + slots

    def _number(self, hashes: Sequence[bytes]) -> list[int]:
        """The number of each content; new ones get one."""
        numbers = self._numbers
        return [numbers.setdefault(sha, len(numbers)) for sha in hashes]


_NOTHING = Series(SeriesSpec("none", (1,), "float16"), {})


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
        self._numbers: dict[bytes, int] = {}  # of every content that any series has
        self._series: dict[str, Series] | None = None
        self._verify_always = False

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
                    f"{path} cannot be made ({error.strerror}): give --cache-dir a folder that this "
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
            content = read_json(path / STORE_FILE, _MOST_JSON_BYTES)
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
        return {name: series.spec for name, series in self.indexes().items() if series.live}

    def shards(self, series: str) -> list[Shard]:
        """The shards of a series, by part and number."""
        known = self._index(series)
        return [known.shards[i] for i in known.live]

    def rows(self, series: str, hashes: Sequence[bytes]) -> NDArray[np.int64]:
        """[n] global row of each content hash, −1 where the series has none."""
        return self._index(series).find(hashes)

    def count(self, series: str) -> int:
        """How many different images have a row."""
        return self._index(series).count()

    def valid_hashes(self, series: str) -> set[bytes]:
        """The content hashes that have a row."""
        return self._index(series).hashes()

    def slots(self, series: str) -> Iterator[tuple[Shard, int, int]]:
        """Of each shard how many rows fit into it yet, and how many were found damaged.

        Nothing is found damaged where nobody looked (see :meth:`open`).
        """
        known = self._index(series)
        for i in known.live:
            shard, empty = known.shards[i], known.sums[i] == 0
            yield shard, int(empty.sum()), int((empty & (shard.checksums() != 0)).sum())

    def pieces(self, series: str, rows: NDArray[np.int64]) -> Iterator[NDArray[Any]]:
        """Features of the given rows, finite or not, a few MiB at a time: [m, \\*shape] each."""
        step = max(1, _PIECE_BYTES // self._index(series).spec.row_bytes)
        for start in range(0, len(rows), step):
            yield self.read(series, rows[start : start + step], finite=False)

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
        known = self._index(series)
        if not known.shards:
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
        dirty = dirty_parts(self.path)
        before = self._series or {}
        known = {shard.path: shard for s in before.values() for shard in s.shards}
        series = {}
        for name, shards in find_shards(self.path, self.fingerprint_id, known).items():
            series[name] = before.get(name) or self.new_index(shards[0].spec)
            series[name].update(shards, lambda s: self._verify_always or dirty(s))
        self._series = series

    def _index(self, series: str) -> Series:
        return self.indexes().get(series, _NOTHING)

    def new_index(self, spec: SeriesSpec) -> Series:
        """An index of a series that has no shards yet."""
        return Series(spec, self._numbers)

    def indexes(self) -> dict[str, Series]:
        """What is known of each series, for the writer."""
        if self._series is None:
            self.refresh()
        assert self._series is not None
        return self._series


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
        if (np.diff(slots) == 1).all() and (np.diff(places) == 1).all():
            shard.read_features(stream, int(slots[0]), out[places[0] : places[-1] + 1])
        else:
            order = np.argsort(slots, kind="stable")
            near, places = slots[order], places[order]
            gap = max(1, _GAP_BYTES // shard.spec.row_bytes)
            block = near // max(1, _READ_BYTES // shard.spec.row_bytes)
            breaks = np.flatnonzero((np.diff(near) > gap) | (np.diff(block) > 0)) + 1
            for part, where in zip(np.split(near, breaks), np.split(places, breaks), strict=True):
                piece = np.empty((part[-1] + 1 - part[0], *shard.spec.shape), shard.spec.dtype)
                shard.read_features(stream, int(part[0]), piece)
                out[where] = piece[part - part[0]]
        now = shard.read_checksums(stream)[slots]
    if (now != sums[slots]).any() or not now.all():
        raise StoreError(
            f"{shard.path}: a row that was asked for is not there (any more: damaged rows are "
            "computed anew); run the same command again"
        )


# ------------------------------------------------------------------------- the files of a store


def listed(folder: Path, pattern: str) -> list[Path]:
    """What lies in a folder, by name; none where there is no such folder.

    ``Path.glob`` takes a folder that cannot be listed (too many open files, no permission) for an empty
    one, from Python 3.13 on without a word.

    Raises:
        StoreError: the folder cannot be listed.
    """
    try:
        names = os.listdir(folder)  # noqa: PTH208 - Path.iterdir is no shorter
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise unreadable(folder, error) from error
    return [folder / name for name in sorted(names) if fnmatch.fnmatchcase(name, pattern)]


def dirty_files(path: Path) -> list[Path]:
    """The markers of processes that write, or were killed while writing."""
    return listed(path, f"{DIRTY_FILE}*")


def dirty_parts(path: Path) -> Callable[[Shard], bool]:
    """Whether a shard's rows count by their checksums only; a run alone writes to those of every part."""
    parts = {file.name.rpartition("-r")[2] for file in dirty_files(path)}
    own = {int(part) for part in parts if part.isdecimal()}
    return lambda shard: len(own) < len(parts) or 0 in own or shard.part in own


def read_ranges(path: Path) -> Ranges:
    """Which shards there must be.

    Raises:
        StoreError: a list is damaged.
    """
    result: Ranges = {}
    for file in ranges_files(path):
        try:
            result |= read_list(file)
        except StoreError:
            raise
        except OSError as error:
            raise unreadable(file, error) from error
    return result


def ranges_files(path: Path) -> list[Path]:
    """The lists of a store."""
    return [f for f in listed(path, "shards-r*.json") if _RANGES_FILE.fullmatch(f.name)]


def read_list(file: Path) -> Ranges:
    """The list of one part.

    Raises:
        StoreError: it is damaged.
        OSError: it cannot be read just now.
    """
    match = _RANGES_FILE.fullmatch(file.name)
    assert match is not None
    result: Ranges = {}
    try:
        content = read_json(file, _MOST_JSON_BYTES)
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']!r}")
        for series, (first, end) in content["shards"].items():
            whole = type(first) is int and type(end) is int
            if not (whole and 0 <= first <= end < _MOST_SHARDS):
                raise ValueError(f"{series}: {first}, {end}")
            result[series, int(match[1])] = (first, end)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            f"{file} is damaged ({error}). It only lists the shards beside it: `mirip-fast cache verify "
            "--repair` writes it anew."
        ) from error
    return result


def write_ranges(path: Path, part: int, ranges: Ranges) -> None:
    """Replace one part's list, in one step."""
    own = {series: list(numbers) for (series, p), numbers in sorted(ranges.items()) if p == part}
    write_json(path / f"shards-r{part:02d}.json", {"schema": SCHEMA, "shards": own})


def shard_files(path: Path) -> dict[tuple[str, int], dict[int, Path]]:
    """(series, part) → number → file, of every shard in the folder, wanted or not.

    Raises:
        StoreError: an HDF5 file that is no shard by its name.
    """
    found: dict[tuple[str, int], dict[int, Path]] = {}
    for file in listed(path, "*.h5"):
        if file.name.startswith("."):
            continue  # being made
        parsed = parse_shard_name(file.name)
        if parsed is None:
            raise StoreError(f"{file} is no shard of this store; move it elsewhere")
        series, part, number = parsed
        found.setdefault((series, part), {})[number] = file
    return found


def find_shards(
    path: Path, fingerprint: str, known: Mapping[Path, Shard] | None = None
) -> dict[str, list[Shard]]:
    """Every shard of a store by series, checked, in the order of part and number.

    Args:
        path: the store's folder.
        fingerprint: its fingerprint's name.
        known: shards that need no second look.

    Raises:
        StoreError: a shard is missing, or a file is no shard of this store; names it.
    """
    for _ in range(_TRIES):
        ranges = read_ranges(path)  # before looking at the files: a listed shard is there already
        try:
            return _find(path, fingerprint, known or {}, ranges)
        except (StoreError, FileNotFoundError) as error:
            if read_ranges(path) == ranges:  # else pruning replaced shards between the two looks
                if isinstance(error, StoreError):
                    raise
                raise StoreError(f"{error.filename} vanished while it was read") from error
    raise StoreError(f"{path} does not stop changing; try again")


def missing_shards(ranges: Ranges, files: dict[tuple[str, int], dict[int, Path]]) -> Iterator[str]:
    """The names of shards that must be there and are not; a damaged list may claim very many."""
    for series, part in sorted({*ranges, *files}):
        present = files.get((series, part), {})
        first, end = ranges.get((series, part), (0, 0))
        for number in range(first, max([end, *(n + 1 for n in present)])):
            if number not in present:
                yield shard_name(series, part, number)


def _find(
    path: Path, fingerprint: str, known: Mapping[Path, Shard], ranges: Ranges
) -> dict[str, list[Shard]]:
    files = shard_files(path)
    for name in missing_shards(ranges, files):
        series, part, number = parse_shard_name(name) or ("", 0, 0)
        raise StoreError(
            f"{path} lacks shard {number} of series {series} (part {part}), {name}: put the file back, "
            "or let `mirip-fast cache verify --repair` put an empty one in its place and "
            "`mirip-fast embed` compute its rows again"
        )
    result: dict[str, list[Shard]] = {}
    for series, part in sorted(files):
        first, _ = ranges.get((series, part), (0, 0))
        for number, file in sorted(files[series, part].items()):
            if number >= first:
                shard = known.get(file) or open_shard(file, fingerprint)
                result.setdefault(series, []).append(shard)
    for series, shards in result.items():
        if len({shard.spec for shard in shards}) > 1:
            raise StoreError(f"{path}: the shards of series {series} have different shapes")
    return result


def clean_up(path: Path, part: int | None = None) -> None:
    """Delete what killed runs left: unfinished files, replaced shards (of one part, or of all)."""
    own = "*" if part is None else f"{part:02d}"
    for pattern in (f".*-r{own}-*.h5.*.partial", f".shards-r{own}.json.*.partial"):
        for partial in listed(path, pattern):
            partial.unlink(missing_ok=True)
    for (series, p), (first, _) in read_ranges(path).items():
        if part in (None, p):
            for number, file in shard_files(path).get((series, p), {}).items():
                if number < first:
                    file.unlink(missing_ok=True)
