"""Finding content hashes among millions, in 33 to 40 bytes each."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


class HashIndex:
    """Finds content hashes among many: a sorted array, and a dict of the newcomers.

    One thread at a time may add; others may look things up meanwhile.

    Args:
        hashes: [n, 32]; where one occurs twice, its first value counts.
        values: [n] the number to give for each, signed, not negative.
    """

    _FEWEST = 1024  # newcomers before they are sorted in
    _SHARE = 32  # more where there are many hashes: one newcomer in so many

    def __init__(self, hashes: NDArray[np.uint8], values: NDArray[np.signedinteger[Any]]):
        keys = _as_keys(hashes)
        order = np.argsort(keys, kind="stable")
        self._sorted = keys[order], values[order]
        self._new: dict[bytes, int] = {}

    def find(self, hashes: Sequence[bytes]) -> NDArray[np.signedinteger[Any]]:
        """[n]: the value of each hash, −1 where there is none."""
        # In this order: what add() moves in between is found in the older of the two as well.
        new, (keys, values) = self._new, self._sorted
        result = np.full(len(hashes), -1, values.dtype)
        if len(hashes) and len(keys):
            wanted = _as_keys(np.frombuffer(b"".join(map(_checked, hashes)), np.uint8))
            at = np.searchsorted(keys, wanted)
            at[at == len(keys)] = 0
            found = keys[at] == wanted
            result[found] = values[at[found]]
        if new:
            for i in np.flatnonzero(result < 0).tolist():
                result[i] = new.get(hashes[i], -1)
        return result

    def add(self, hashes: Sequence[bytes], values: Sequence[int]) -> None:
        """Put in hashes that are not there yet."""
        self._new.update(zip(map(_checked, hashes), values, strict=True))
        keys, numbers = self._sorted
        if len(self._new) > max(self._FEWEST, len(keys) // self._SHARE):
            new = _as_keys(np.frombuffer(b"".join(self._new), np.uint8))
            order = np.argsort(new, kind="stable")
            added = np.fromiter(self._new.values(), numbers.dtype, len(new))
            places = np.searchsorted(keys, new[order]) + np.arange(len(new))
            self._sorted = (
                _with(keys, new[order], places),
                _with(numbers, added[order], places),
            )
            self._new = {}

    def __len__(self) -> int:
        keys, _ = self._sorted
        return (len(np.unique(keys)) if len(keys) else 0) + len(self._new)

    def hashes(self) -> set[bytes]:
        """All of them."""
        table = self._sorted[0].tobytes()
        return {table[i : i + 32] for i in range(0, len(table), 32)} | set(self._new)


def _with(old: NDArray[Any], new: NDArray[Any], places: NDArray[np.int64]) -> NDArray[Any]:
    """Both in one array, the new ones at ``places``; in pages of its own, which leave no holes behind."""
    size = (len(old) + len(new)) * old.itemsize
    both: NDArray[Any] = np.frombuffer(mmap.mmap(-1, size), old.dtype)
    is_old = np.ones(len(both), bool)
    is_old[places] = False
    both[is_old] = old
    both[places] = new
    return both


def _as_keys(hashes: NDArray[np.uint8]) -> NDArray[np.bytes_]:
    # Fixed-length byte strings of NumPy compare like the 32 bytes: zeros at the end only fill up.
    return np.ascontiguousarray(hashes).reshape(-1, 32).view("S32").ravel()


def _checked(sha: bytes) -> bytes:
    if len(sha) != 32:
        raise ValueError("a content hash has 32 bytes")
    return sha
