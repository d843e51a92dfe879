"""Which features each picture still lacks, decided by the content hash."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np

from mirip_fast.features.recipe import Recipe
from mirip_fast.features.store import FeatureStore, SeriesSpec
from mirip_fast.features.store_writer import StoreWriter
from mirip_fast.features.views import View

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

    A cache that has some views or kinds is filled, not redone: a need names exactly what is lacking.

    Args:
        store: what is there already.
        recipe: what is wanted.
        writer: opens the store for writing, or gives the writer that is open; called when something is
            lacking.

    Attributes:
        present: content hashes that had everything when they were asked for.
    """

    def __init__(self, store: FeatureStore, recipe: Recipe, writer: Callable[[], StoreWriter]):
        self._store, self._writer = store, writer
        self._wanted = wanted_series(recipe)
        self._lock = threading.Lock()
        self._given: set[bytes] = set()
        self._open: dict[bytes, Need] = {}
        self.present: set[bytes] = set()

    def claim(self, hashes: Sequence[bytes]) -> list[Need]:
        """What is to be computed of each content; empty where nothing is, or where it was given out."""
        lacking = np.stack(
            [self._store.rows(spec.name, hashes) < 0 for _, _, spec in self._wanted], axis=1
        )
        needs: list[Need] = []
        with self._lock:
            for sha, row in zip(hashes, lacking, strict=True):
                need: Need = ()
                if sha not in self._given and sha not in self.present:
                    if row.any():
                        self._given.add(sha)
                        need = self._open[sha] = self._exact(sha, bool(row.all()))
                    else:
                        self.present.add(sha)
                needs.append(need)
        return needs

    def sizes(self, sha256: bytes) -> tuple[int, ...]:
        """Claim one content; the sizes that have to be decoded for it."""
        return sizes_of(self.claim([sha256])[0])

    def take(self, sha256: bytes) -> Need:
        """The claimed need of a content, to be fulfilled now; empty if there is none (any more)."""
        with self._lock:
            return self._open.pop(sha256, ())

    def release(self, hashes: Sequence[bytes]) -> None:
        """Let contents be claimed again that came to nothing."""
        with self._lock:
            self._given.difference_update(hashes)

    def complete(self, hashes: Sequence[bytes]) -> set[bytes]:
        """Those of the hashes that have a row in every wanted series."""
        unique = list(dict.fromkeys(hashes))
        there = np.ones(len(unique), dtype=bool)
        for _, _, spec in self._wanted:
            there &= self._store.rows(spec.name, unique) >= 0
        return {sha for sha, whole in zip(unique, there, strict=True) if whole}

    def _exact(self, sha: bytes, nothing_there: bool) -> Need:
        writer = self._writer()
        if nothing_there:
            return tuple(self._wanted)
        # The writer has checked the rows: a damaged one counts as lacking.
        return tuple(w for w in self._wanted if writer.missing(w[2].name, [sha])[0])
