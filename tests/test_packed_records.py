"""Packed records: the same as a tuple of them, in a few bytes each."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from mirip_fast.data import packed_records
from mirip_fast.data.packed_records import PackedRecords, PathsOf
from mirip_fast.data.records import Manifest, Record


def records(n: int) -> tuple[Record, ...]:
    """Records of all kinds: with and without grades, names that are no UTF-8, further columns."""
    made = []
    for i in range(n):
        name = ("plain.jpg", "한글 그림.png", "\udcff\ud800.png", "", " a\n\0b", "x" * 300)[i % 6]
        made.append(
            Record(
                image_id=f"{name} {i}",
                path=Path("/data") / str(i // 10) / f"{i}{name}".replace("\0", ""),
                tier=(None, 0, 3)[i % 3],
                tier_score=(None, 0.1 + i, -1e300, float(2**53 + 1))[i % 4],
                group=(None, "", "g\udc80")[i % 3],
                extra={} if i % 5 else {"dept": "oil", "학과": str(i)},
                row=None if i % 7 else 10**12 + i,
                filename=name,
            )
        )
    return tuple(made)


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 300])
def test_they_are_the_records_that_were_packed(n: int) -> None:
    plain = records(n)
    packed = PackedRecords(iter(plain))
    assert len(packed) == n and list(packed) == [packed[i] for i in range(n)] == list(plain)
    assert [packed[-i - 1] for i in range(n)] == list(reversed(plain)) == list(reversed(packed))
    for part in (slice(None), slice(3, 200, 7), slice(None, 5), slice(1000), slice(None, None, -1)):
        assert packed[part] == plain[part] and isinstance(packed[part], PackedRecords)
    for index in (n, -n - 1):
        with pytest.raises(IndexError):
            packed[index]
    assert pickle.loads(pickle.dumps(packed)) == packed


def test_equal_is_what_holds_equal_records_in_the_same_order() -> None:
    plain = records(70)
    packed = PackedRecords(plain)
    assert packed == plain and plain == packed and packed == PackedRecords(plain)
    assert packed != plain[:-1] and packed != (*plain[:-1], plain[0]) and packed != 70
    assert packed != PackedRecords(reversed(plain))


def test_a_record_that_was_looked_at_is_the_callers_own() -> None:
    packed = PackedRecords(records(5))
    packed[0].extra["dept"] = "changed"
    assert packed == records(5)


def test_readers_at_several_places_unpack_each_part_once(monkeypatch: pytest.MonkeyPatch) -> None:
    unpacked, plain = [], packed_records._unpacked

    def watched(blocks: list[bytes], number: int) -> object:
        unpacked.append(number)
        return plain(blocks, number)

    monkeypatch.setattr(packed_records, "_unpacked", watched)
    packed = PackedRecords(records(640))
    for i in range(640):  # what is to be read, and what was decoded meanwhile
        packed[i], packed[max(0, i - 150)]
    assert len(unpacked) <= 2 * 10


def test_paths_are_those_of_the_records() -> None:
    packed = PackedRecords(records(100))
    paths, some = PathsOf(packed), PathsOf(packed, [5, 3, 99])
    assert list(paths) == [record.path for record in packed] and len(paths) == 100
    assert paths[10:12] == [packed[10].path, packed[11].path]
    assert list(some) == [packed[5].path, packed[3].path, packed[99].path] and len(some) == 3
    assert some[-1] == packed[99].path and some[1:] == [packed[3].path, packed[99].path]
    with pytest.raises(IndexError):
        some[3]


def test_parts_of_a_manifest() -> None:
    manifest = Manifest(Path("/data"), Path("/data"), ("S",), PackedRecords(records(80)))
    assert manifest.first(70).records == records(80)[:70]
    assert isinstance(manifest.first(70).records, PackedRecords)
    assert len(manifest.first(1000)) == 80
    assert manifest.subset([79, 0, 3]).records == tuple(records(80)[i] for i in (79, 0, 3))
