"""The files of a store's folder: which shards there are, which there must be, and what a crash leaves.

``shards-r00.json`` holds, per series, the numbers [first, end) of the shards that process 0 has. One of
them that is absent is an error, not a hole. A shard from ``end`` on was finished just before a kill and
counts; one before ``first`` was replaced (pruned) and only waits to be deleted.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from mirip_fast.errors import StoreError
from mirip_fast.features.shard_rows import unreadable
from mirip_fast.features.shards import SCHEMA, Shard, open_shard, parse_shard_name, shard_name
from mirip_fast.files import read_json, write_json

STORE_FILE = "store.json"
#: There while a process writes (with ``-r00`` …), and after it was killed: then checksums count.
DIRTY_FILE = "DIRTY"
_RANGES_FILE = re.compile(r"shards-r(\d{2,})\.json")
_TRIES = 20
#: Of the small JSON files of a store.
MOST_JSON_BYTES = 16 << 20
_MOST_SHARDS = 10_000_000  # of one process and series, by their names

#: (series, rank) → numbers [first, end) of its shards
Ranges = dict[tuple[str, int], tuple[int, int]]


def listed(folder: Path, pattern: str) -> list[Path]:
    """What lies in a folder, by name; none where there is no such folder.

    ``Path.glob`` takes a folder that can not be listed (too many open files, no permission) for an empty
    one, from Python 3.13 on without a word.

    Raises:
        StoreError: the folder can not be listed.
    """
    try:
        names = os.listdir(folder)  # noqa: PTH208 - Path.iterdir is no shorter
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise unreadable(folder, error) from error
    return [folder / name for name in sorted(names) if fnmatch.fnmatchcase(name, pattern)]


def ranges_file(path: Path, rank: int) -> Path:
    """The list of one process's shards."""
    return path / f"shards-r{rank:02d}.json"


def dirty_files(path: Path) -> list[Path]:
    """The markers of processes that write, or were killed while writing."""
    return listed(path, f"{DIRTY_FILE}*")


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
    """The list of one process.

    Raises:
        StoreError: it is damaged.
        OSError: it can not be read just now.
    """
    match = _RANGES_FILE.fullmatch(file.name)
    assert match is not None
    result: Ranges = {}
    try:
        content = read_json(file, MOST_JSON_BYTES)
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


def write_ranges(path: Path, rank: int, ranges: Ranges) -> None:
    """Replace one process's list, in one step."""
    own = {series: list(numbers) for (series, r), numbers in sorted(ranges.items()) if r == rank}
    write_json(ranges_file(path, rank), {"schema": SCHEMA, "shards": own})


def shard_files(path: Path) -> dict[tuple[str, int], dict[int, Path]]:
    """(series, rank) → number → file, of every shard in the folder, wanted or not.

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
        series, rank, number = parsed
        found.setdefault((series, rank), {})[number] = file
    return found


def find_shards(
    path: Path, fingerprint: str, known: Mapping[Path, Shard] | None = None
) -> dict[str, list[Shard]]:
    """Every shard of a store by series, checked, in the order of rank and number.

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
            if read_ranges(path) != ranges:
                continue  # pruning replaced shards between the two looks
            if isinstance(error, StoreError):
                raise
            raise StoreError(f"{error.filename} vanished while it was read") from error
    raise StoreError(f"{path} does not stop changing; try again")


def missing_shards(ranges: Ranges, files: dict[tuple[str, int], dict[int, Path]]) -> Iterator[str]:
    """The names of shards that must be there and are not; a damaged list may claim very many."""
    for series, rank in sorted({*ranges, *files}):
        present = files.get((series, rank), {})
        first, end = ranges.get((series, rank), (0, 0))
        for number in range(first, max([end, *(n + 1 for n in present)])):
            if number not in present:
                yield shard_name(series, rank, number)


def _find(
    path: Path, fingerprint: str, known: Mapping[Path, Shard], ranges: Ranges
) -> dict[str, list[Shard]]:
    files = shard_files(path)
    for name in missing_shards(ranges, files):
        series, rank, number = parse_shard_name(name) or ("", 0, 0)
        raise StoreError(
            f"{path} lacks shard {number} of series {series} (rank {rank}), {name}: put the file back, "
            "or let `mirip-fast cache verify --repair` put an empty one in its place and "
            "`mirip-fast embed` compute its rows again"
        )
    result: dict[str, list[Shard]] = {}
    for series, rank in sorted(files):
        first, _ = ranges.get((series, rank), (0, 0))
        for number, file in sorted(files[series, rank].items()):
            if number >= first:
                shard = known.get(file) or open_shard(file, fingerprint)
                result.setdefault(series, []).append(shard)
    for series, shards in result.items():
        if len({shard.spec for shard in shards}) > 1:
            raise StoreError(f"{path}: the shards of series {series} have different shapes")
    return result


def clean_up(path: Path, rank: int | None = None) -> None:
    """Delete what killed runs left: unfinished files, replaced shards (of one process, or of all)."""
    own = "*" if rank is None else f"{rank:02d}"
    for pattern in (f".*-r{own}-*.h5.*.partial", f".shards-r{own}.json.*.partial"):
        for partial in listed(path, pattern):
            partial.unlink(missing_ok=True)
    for (series, r), (first, _) in read_ranges(path).items():
        if rank in (None, r):
            for number, file in shard_files(path).get((series, r), {}).items():
                if number < first:
                    file.unlink(missing_ok=True)
