"""Finding content hashes among millions, in 40 bytes each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class HashIndex:
    """Finds content hashes among many: a sorted array of 40 bytes per row, and a dict of newcomers.

    Args:
        hashes: [n, 32]; where one occurs twice, its first row counts.
        rows: [n] the number to give for each.
    """

    _NEWCOMERS = 1 << 16

    def __init__(self, hashes: NDArray[np.uint8], rows: NDArray[np.int64]):
        self._new: dict[bytes, int] = {}
        self._sort(hashes, rows)

    def _sort(self, hashes: NDArray[np.uint8], rows: NDArray[np.int64]) -> None:
        keys = _as_keys(hashes)
        order = np.argsort(keys, kind="stable")
        self._keys, self._rows = keys[order], rows[order]

    def find(self, hashes: Sequence[bytes]) -> NDArray[np.int64]:
        """[n]: the row of each hash, −1 where there is none."""
        result = np.full(len(hashes), -1, np.int64)
        if len(hashes) and len(self._keys):
            wanted = _as_keys(np.frombuffer(b"".join(map(_checked, hashes)), np.uint8))
            at = np.searchsorted(self._keys, wanted)
            at[at == len(self._keys)] = 0
            found = self._keys[at] == wanted
            result[found] = self._rows[at[found]]
        if self._new:
            for i in np.flatnonzero(result < 0).tolist():
                result[i] = self._new.get(hashes[i], -1)
        return result

    def add(self, hashes: Sequence[bytes], rows: Sequence[int]) -> None:
        """Put in hashes that are not there yet."""
        self._new.update(zip(hashes, rows, strict=True))
        if len(self._new) > self._NEWCOMERS:
            new = np.frombuffer(b"".join(self._new), np.uint8).reshape(-1, 32)
            old = self._keys.view(np.uint8).reshape(-1, 32)
            both = np.concatenate([self._rows, np.fromiter(self._new.values(), np.int64)])
            self._new = {}
            self._sort(np.concatenate([old, new]), both)

    def __len__(self) -> int:
        return (len(np.unique(self._keys)) if len(self._keys) else 0) + len(self._new)

    def hashes(self) -> set[bytes]:
        """All of them."""
        table = self._keys.tobytes()
        return {table[i : i + 32] for i in range(0, len(table), 32)} | set(self._new)


def _as_keys(hashes: NDArray[np.uint8]) -> NDArray[np.bytes_]:
    # Fixed-length byte strings of NumPy compare like the 32 bytes: zeros at the end only fill up.
    return np.ascontiguousarray(hashes).reshape(-1, 32).view("S32").ravel()


def _checked(sha: bytes) -> bytes:
    if len(sha) != 32:
        raise ValueError("a content hash has 32 bytes")
    return sha
