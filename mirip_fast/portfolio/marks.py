"""What users say of ranked works on a served page: stars, tags, notes, and an order of their own.

Each change is a line of JSON at the end of a file, on the disk before the page is told that it is kept. The
moves in the order become judged pairs, in the format of ``label``, which ``train --pairs`` takes.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import threading
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from mirip_fast.data.pair_files import CONTENT, FIRST, LABEL, SECOND
from mirip_fast.errors import DataError
from mirip_fast.files import append_durably, fsync_folder, try_lock, write_csv
from mirip_fast.runtime import Closing
from mirip_fast.text import counted, shown

log = logging.getLogger(__name__)

_KEY = re.compile("[0-9a-f]{16}")
_OVERTAKEN = 10  # works that one move is compared with, at most


def _is_tags(value: Any) -> bool:
    return (
        isinstance(value, list)
        and 0 < len(value) <= 50
        and all(isinstance(tag, str) and tag.strip() and len(tag) <= 100 for tag in value)
    )


#: What may be said of a work, as `page_files/marks.js` has it.
FIELDS: dict[str, Callable[[Any], bool]] = {
    "stars": lambda value: type(value) is int and 1 <= value <= 5,
    "tags": _is_tags,
    "note": lambda value: isinstance(value, str) and bool(value.strip()) and len(value) <= 5000,
    "at": lambda value: type(value) in (int, float) and math.isfinite(value),
}


class Marks(Closing):
    """The marks of a ranking's works, in a file that this process alone writes to.

    Args:
        path: the file; an existing one is gone on from.
        ranking: name of the ranking, which the file's first line holds.

    Attributes:
        now: key of a work → field → what was said last.

    Raises:
        DataError: the file cannot be written, is in use, or holds the marks of another ranking.
    """

    def __init__(self, path: Path, ranking: str):
        self.path = path
        self.now: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise DataError(f"{shown(path)} cannot be written ({error.strerror})") from error
        try:
            if not try_lock(self._handle):
                raise DataError(
                    f"{shown(path)} is in use: another `mirip-fast serve` writes to it. Open that one's "
                    "page, or give another folder with --out."
                )
            self._read(ranking)
        except BaseException:
            os.close(self._handle)
            raise

    def close(self) -> None:
        """Let others write."""
        os.close(self._handle)

    def take(self, said: Mapping[str, Any]) -> None:
        """Keep what was said; it is on the disk when this returns. What makes no sense is left out.

        Args:
            said: key of a work → field → value, None to take it away.

        Raises:
            DiskFullError: no room; nothing has changed.
        """
        clean = {key: fields for key, given in said.items() if (fields := _clean(key, given))}
        if not clean:
            return
        with self._lock:
            self._append({"time": datetime.now().astimezone().isoformat(), "marks": clean})
            self._merge(clean)

    def _read(self, ranking: str) -> None:
        lines = self.path.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):  # cut short by a power loss
            os.ftruncate(self._handle, sum(map(len, lines[:-1])))
            log.warning("%s: the last line was cut short, and is left out", shown(self.path))
            lines.pop()
        if not lines:
            self._append({"marks_of": ranking})
            fsync_folder(self.path.parent)
            return
        try:
            first, *rest = map(json.loads, lines)
            if first["marks_of"] != ranking:
                raise DataError(
                    f"{shown(self.path)} holds the marks of another folder of works. Give another folder "
                    "with --out."
                )
            for line in rest:
                self._merge({k: f for k, g in line["marks"].items() if (f := _clean(k, g))})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"{shown(self.path)} is no file of marks. Give another folder with --out."
            ) from error

    def _append(self, line: Mapping[str, Any]) -> None:
        append_durably(self._handle, json.dumps(line).encode() + b"\n", self.path)

    def _merge(self, said: Mapping[str, Mapping[str, Any]]) -> None:
        now = dict(self.now)  # others may be reading the one before
        for key, fields in said.items():
            merged = {**now.get(key, {}), **fields}
            now[key] = {field: value for field, value in merged.items() if value is not None}
            if not now[key]:
                del now[key]
        self.now = now


def _clean(key: Any, given: Any) -> dict[str, Any]:
    if not (isinstance(key, str) and _KEY.fullmatch(key) and isinstance(given, dict)):
        return {}
    return {
        field: given[field]
        for field, holds in FIELDS.items()
        if field in given and (given[field] is None or holds(given[field]))
    }


def write_pairs(
    path: Path,
    works: Mapping[str, str],
    marks: Mapping[str, Mapping[str, Any]],
    hashes: Mapping[str, bytes],
) -> int:
    """Write what the user's own order says against the model's, as judged pairs.

    A work that was moved is compared with those that it went past, at most ten of them, evenly chosen.

    Args:
        path: a CSV file that ``train --pairs`` reads; replaced.
        works: key → file name of the works, in the model's order.
        marks: of :class:`Marks`.
        hashes: file name → SHA-256 of the work, by which training finds its features.

    Returns:
        The number of pairs.
    """
    keys, names = list(works), list(works.values())
    at = np.array([marks.get(key, {}).get("at", place) for place, key in enumerate(keys)], float)
    order = np.argsort(at, kind="stable")
    own = np.empty(len(keys), np.int64)
    own[order] = places = np.arange(len(keys))
    pairs: dict[tuple[int, int], None] = {}  # the better one first
    for moved in (i for i, key in enumerate(keys) if "at" in marks.get(key, {})):
        past = np.flatnonzero((places < moved) != (own < own[moved]))
        past = past[past != moved]
        past = past[np.argsort(own[past])]
        chosen = np.unique(np.linspace(0, len(past) - 1, min(len(past), _OVERTAKEN)).round())
        for other in past[chosen.astype(int)].tolist():
            pairs[(moved, other) if own[moved] < own[other] else (other, moved)] = None
    rows = [
        {FIRST: names[better], SECOND: names[worse], LABEL: 1, "kind": "moved", "predicted": -1}
        | {c: hashes[names[i]].hex() for c, i in zip(CONTENT, (better, worse), strict=True)}
        for better, worse in pairs
        if _can_be_written(names[better]) and _can_be_written(names[worse])
    ]
    if len(rows) < len(pairs):
        log.warning(
            "%s of works with a name that no CSV file can hold are left out",
            counted(len(pairs) - len(rows), "pair"),
        )
    if rows or path.exists():
        write_csv(path, (FIRST, SECOND, LABEL, "kind", "predicted", *CONTENT), rows)
    return len(rows)


def _can_be_written(name: str) -> bool:
    return name == name.strip() and name.isprintable()
