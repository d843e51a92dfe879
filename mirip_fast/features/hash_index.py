"""Finding content hashes among the millions of a cache, in 40 bytes each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


class HashIndex:
    """Finds content hashes among many: a sorted array.

    Args:
        hashes: [n, 32]; where one occurs twice, its first value counts.
        values: [n] the number to give for each, signed, not negative.
    """

    def __init__(self, hashes: NDArray[np.uint8], values: NDArray[np.signedinteger[Any]]):
        keys = _as_keys(hashes)
        order = np.argsort(keys, kind="stable")
        self._keys, self._values = keys[order], values[order]

    def find(self, hashes: Sequence[bytes]) -> NDArray[np.signedinteger[Any]]:
        """[n]: the value of each hash, −1 where there is none."""
        result = np.full(len(hashes), -1, self._values.dtype)
        if len(hashes) and len(self._keys):
            wanted = _as_keys(np.frombuffer(b"".join(map(checked, hashes)), np.uint8))
            at = np.searchsorted(self._keys, wanted)
            at[at == len(self._keys)] = 0
            found = self._keys[at] == wanted
            result[found] = self._values[at[found]]
        return result

    def __len__(self) -> int:
        return len(np.unique(self._keys)) if len(self._keys) else 0

    def hashes(self) -> set[bytes]:
        """All of them."""
        table = self._keys.tobytes()
        return {table[i : i + 32] for i in range(0, len(table), 32)}


def checked(sha256: bytes) -> bytes:
    """The content hash that was given.

    Raises:
        ValueError: it does not have 32 bytes.
    """
    if len(sha256) != 32:
        raise ValueError("a content hash has 32 bytes")
    return sha256


def _as_keys(hashes: NDArray[np.uint8]) -> NDArray[np.bytes_]:
    # Fixed-length byte strings of NumPy compare like the 32 bytes: zeros at the end only fill up.
    return np.ascontiguousarray(hashes).reshape(-1, 32).view("S32").ravel()
