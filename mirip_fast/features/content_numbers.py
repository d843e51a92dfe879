"""Numbers for content hashes, so that what is known of a million contents needs each hash only once."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterable

from mirip_fast.features.hash_index import checked

_SHA_BYTES = 32
_BLOCK = 1024  # hashes kept together; blocks never move, so growing leaves no holes in the memory
_FEWEST_SLOTS = 1024


class ContentNumbers:
    """Gives content hashes the numbers 0, 1, 2, … in the order they come; 40 to 50 bytes each.

    Several threads may use it.
    """

    def __init__(self) -> None:
        self._blocks: list[bytearray] = []
        self._count = 0
        # Number or −1 by the hash's first bytes; where that slot is taken, in the next that is free.
        self._slots = array("i", [-1]) * _FEWEST_SLOTS
        self._lock = threading.Lock()  # of whoever adds; looking something up needs none

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> bytes:
        """The hash with a number that was given."""
        return bytes(self._hash(number))

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """The number of each hash, −1 where it has none."""
        slots = self._slots  # where more are made meanwhile, these stay as they are
        return [self._look(slots, checked(sha))[1] for sha in hashes]

    def add(self, hashes: Iterable[bytes]) -> list[int]:
        """The number of each hash; one that has none gets the next."""
        numbers = []
        with self._lock:
            for sha in hashes:
                slot, number = self._look(self._slots, checked(sha))
                if number < 0:
                    number = self._append(sha)
                    self._slots[slot] = number
                    if 3 * self._count > 2 * len(self._slots):
                        self._spread()
                numbers.append(number)
        return numbers

    def _hash(self, number: int) -> bytearray:
        start = number % _BLOCK * _SHA_BYTES
        return self._blocks[number // _BLOCK][start : start + _SHA_BYTES]

    def _look(self, slots: array[int], sha: bytes) -> tuple[int, int]:
        """The slot that holds a hash's number, and the number; or the free one where it belongs, and −1."""
        last = len(slots) - 1
        slot = int.from_bytes(sha[:8], "little") & last
        while (number := slots[slot]) >= 0 and self._hash(number) != sha:
            slot = (slot + 1) & last
        return slot, number

    def _append(self, sha: bytes) -> int:
        number = self._count
        start = number % _BLOCK * _SHA_BYTES
        if start == 0:
            self._blocks.append(bytearray(_BLOCK * _SHA_BYTES))
        self._blocks[-1][start : start + _SHA_BYTES] = sha
        self._count += 1
        return number

    def _spread(self) -> None:
        """Twice as many slots."""
        slots = array("i", [-1]) * (2 * len(self._slots))
        last = len(slots) - 1
        for number in range(self._count):  # all are different: no hash need be compared
            slot = int.from_bytes(self._hash(number)[:8], "little") & last
            while slots[slot] >= 0:
                slot = (slot + 1) & last
            slots[slot] = number
        self._slots = slots
