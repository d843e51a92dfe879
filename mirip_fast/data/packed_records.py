"""Records of images in some bytes each, for lists that are too long for objects."""

from __future__ import annotations

import itertools
import marshal
import operator
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, overload

from mirip_fast.data.records import Record

_BLOCK = 64  # records packed together
_FASTEST = 1  # zlib's level; names of one folder become a fifth already


class PackedRecords(Sequence[Record]):
    """Records in order, like a tuple of them. A record is made when it is looked at.

    As an object with a path, a record takes about a kilobyte; here some ten to thirty bytes. Neighbours are
    packed together: going through all is about as quick as making the records, while a loop that jumps
    about makes a tuple first.

    Args:
        records: taken one after the other.
    """

    def __init__(self, records: Iterable[Record]):
        self._blocks: list[bytes] = []
        self._length = 0
        iterator = iter(records)
        while block := [_fields(record) for record in itertools.islice(iterator, _BLOCK)]:
            # marshal keeps every text as it is, names that are no UTF-8 too.
            self._blocks.append(zlib.compress(marshal.dumps(block), _FASTEST))
            self._length += len(block)
        # Several, as readers go through at several places at once.
        self._block = lru_cache(maxsize=4)(partial(_unpacked, self._blocks))

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> PackedRecords: ...
    def __getitem__(self, index: int | slice) -> Record | PackedRecords:
        if isinstance(index, slice):
            return PackedRecords(self[i] for i in range(*index.indices(self._length)))
        number, place = divmod(range(self._length)[index], _BLOCK)
        return _record(self._block(number)[place])

    def __iter__(self) -> Iterator[Record]:
        for number in range(len(self._blocks)):
            yield from map(_record, _unpacked(self._blocks, number))

    def __eq__(self, other: object) -> bool:
        """Whether the other holds equal records in the same order, packed or as a tuple."""
        if not isinstance(other, PackedRecords | tuple):
            return NotImplemented
        return len(self) == len(other) and all(map(operator.eq, self, other))

    __hash__ = None  # type: ignore[assignment]  # as a record has none

    def __reduce__(self) -> tuple[type[PackedRecords], tuple[list[Record]]]:
        return PackedRecords, (list(self),)


def _unpacked(blocks: Sequence[bytes], number: int) -> list[Any]:
    block: list[Any] = marshal.loads(zlib.decompress(blocks[number]))
    return block


def _fields(record: Record) -> tuple[Any, ...]:
    r = record
    return (
        r.image_id, str(r.path), r.tier, r.tier_score, r.group, r.extra, r.row, r.filename,
    )  # fmt: skip


def _record(fields: tuple[Any, ...]) -> Record:
    image_id, path, tier, tier_score, group, extra, row, filename = fields
    return Record(image_id, Path(path), tier, tier_score, group, dict(extra), row, filename)


class PathsOf(Sequence[Path]):
    """The files of records, or of some of them. A path is made when it is looked at.

    Args:
        records: the records.
        index: positions of those that are wanted; None: of all.
    """

    def __init__(self, records: Sequence[Record], index: Sequence[int] | None = None):
        self._records = records
        self._index = range(len(records)) if index is None else index

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> list[Path]: ...
    def __getitem__(self, index: int | slice) -> Path | list[Path]:
        if isinstance(index, slice):
            return [self._records[i].path for i in self._index[index]]
        return self._records[self._index[index]].path
