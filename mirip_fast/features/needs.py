"""Which features each picture still lacks, decided by the content hash."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mirip_fast.features.recipe import Recipe, View
from mirip_fast.features.shards import SeriesSpec
from mirip_fast.features.store import FeatureStore
from mirip_fast.features.store_writer import StoreWriter

#: A wanted series: which view it is of, which kind of token it holds, and its row's shape.
Wanted = tuple[View, str, SeriesSpec]
#: The series that a picture lacks.
Need = tuple[Wanted, ...]


def wanted_series(recipe: Recipe) -> list[Wanted]:
    """Every series that a recipe asks for, view by view."""
    return [(v, kind, recipe.series(v, kind)) for v in recipe.views for kind in recipe.kinds]


def sizes_of(need: Need) -> tuple[int, ...]:
    """Side lengths of the squares from which a need is computed: one decoding serves all its views."""
    return tuple(dict.fromkeys(view.size for view, _, _ in need))


class Needs:
    """Gives each picture's work out once, however many files hold it. Several threads may use it.

    A cache that has some views or kinds is filled, not redone: a need names exactly what is lacking. Only
    work under way and failures are kept here; what is done, the writer knows.

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
        self._given: set[bytes] = set()
        self._open: dict[bytes, Need] = {}
        self.failures: dict[bytes, str] = {}
        self.completed: set[bytes] = set()

    def reserve(self, hashes: Sequence[bytes]) -> list[Need]:
        """What is to be computed of each content; empty where nothing is, or where it was given out."""
        needs: list[Need] = [()] * len(hashes)
        maybe = np.flatnonzero(~self.there(hashes)).tolist()
        with self._lock:
            # In this order: what was completed is no longer given out, and the store has it.
            free = [i for i in maybe if not self._closed(hashes[i])]
            lacking = self._lacking([hashes[i] for i in free])
            for i, row in zip(free, lacking, strict=True):
                need = tuple(itertools.compress(self._wanted, row))
                if need and not self._closed(hashes[i]):
                    needs[i] = self._open[hashes[i]] = need
                    self._given.add(hashes[i])
        return needs

    def sizes(self, sha256: bytes) -> tuple[int, ...]:
        """Reserve one content; the sizes that have to be decoded for it."""
        return sizes_of(self.reserve([sha256])[0])

    def take(self, sha256: bytes, sizes: Sequence[int]) -> Need:
        """The reserved need of a content, to be fulfilled now from squares of these sizes.

        Empty if there is none (any more), or if it needs other sizes: then it stays for whoever has them.
        """
        with self._lock:
            need = self._open.get(sha256, ())
            if not set(sizes_of(need)) <= set(sizes):
                return ()
            self._open.pop(sha256, None)
            return need

    def complete(self, hashes: Sequence[bytes], failures: Mapping[bytes, str]) -> None:
        """Note what came of contents: rows that are written, or a failure."""
        with self._lock:
            self.failures.update(failures)
            self.completed.update(sha for sha in hashes if sha not in failures)
            self._given.difference_update(hashes, failures)
            for sha in failures:
                self._open.pop(sha, None)

    def release(self, hashes: Sequence[bytes]) -> None:
        """Let contents be reserved again: the file that was to be computed vanished or changed."""
        with self._lock:
            self._given.difference_update(hashes)

    def left(self, hashes: Sequence[bytes]) -> list[int]:
        """Positions of the contents that still lack something by now, without a failure to explain it."""
        rows = enumerate(self._lacking(hashes))
        return [i for i, row in rows if any(row) and hashes[i] not in self.failures]

    def there(self, hashes: Sequence[bytes]) -> NDArray[np.bool_]:
        """[n]: whether a content has everything by now, as far as the store's index knows."""
        result = np.ones(len(hashes), bool)
        for _, _, spec in self._wanted:
            result &= self._store.rows(spec.name, hashes) >= 0
        return result

    def _lacking(self, hashes: Sequence[bytes]) -> list[tuple[bool, ...]]:
        """[n][wanted series]: whether a content lacks it, once the writer has verified what there is."""
        if not hashes:
            return []
        writer = self._writer()
        columns = [writer.missing(spec.name, hashes).tolist() for _, _, spec in self._wanted]
        return list(zip(*columns, strict=True))

    def _closed(self, sha: bytes) -> bool:
        return sha in self._given or sha in self.failures
