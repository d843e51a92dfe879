"""Nearest neighbours against plain loops; the saved index against exact search; faiss missing, caches read-only."""

from __future__ import annotations

import builtins
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mirip_fast.errors import StoreError
from mirip_fast.features import neighbours
from mirip_fast.features.neighbours import (
    ExactIndex,
    ListIndex,
    Vectors,
    groups_of,
    open_index,
    unit,
)


def vectors_of(rows: np.ndarray, key: str = "0123456789abcdef0") -> Vectors:
    return Vectors(len(rows), rows.shape[1], lambda numbers: rows[numbers], key)


def clusters(n: int, width: int = 16, spread: float = 0.1) -> np.ndarray:
    rng = np.random.default_rng(5)
    centres = rng.standard_normal((40, width))
    return unit(centres[rng.integers(0, 40, n)] + spread * rng.standard_normal((n, width)))


def groups_by_loops(rows: np.ndarray, threshold: float) -> list[int]:
    group = list(range(len(rows)))
    for i in range(len(rows)):
        for j in range(i):
            if sum(float(a) * float(b) for a, b in zip(rows[i], rows[j], strict=True)) >= threshold:
                one, two = sorted((group[i], group[j]))
                group = [one if g == two else g for g in group]
    return group


@pytest.mark.parametrize("threshold", [0.9, 0.99, 0.9999])
@pytest.mark.parametrize("block", [7, 2048])
def test_groups_are_those_of_plain_loops(
    threshold: float, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "_BLOCK", block)
    monkeypatch.setattr(neighbours, "_MAX_LINKS", 50)  # merged many times
    rows = clusters(120, 5)
    rows[30:40] = rows[3]  # equal to the last bit
    found = groups_of(len(rows), ExactIndex(vectors_of(rows)).links(threshold))
    assert found.tolist() == groups_by_loops(rows, threshold)


def test_all_equal_rows_are_one_group_without_listing_all_pairs() -> None:
    rows = np.tile(unit(np.ones((1, 3))), (3000, 1))
    pieces = list(ExactIndex(vectors_of(rows)).links(0.5))
    assert sum(len(one) for one, _ in pieces) == 2999
    assert not groups_of(3000, iter(pieces)).any()


def test_nothing_and_one() -> None:
    for n in (0, 1):
        index = ExactIndex(vectors_of(np.ones((n, 2), np.float32)))
        assert groups_of(n, index.links(0.5)).tolist() == list(range(n))
        numbers, cosines = index.nearest(np.ones((1, 2), np.float32), 3)
        assert numbers.tolist() == [[*range(n), *[-1] * (3 - n)]]
        assert np.isinf(cosines[0, n:]).all()


def test_nearest_in_order_and_ties_by_number() -> None:
    rows = unit(np.array([[1, 0], [0, 1], [1, 1], [0, 1], [-1, 0]]))
    numbers, cosines = ExactIndex(vectors_of(rows)).nearest(rows[1:2], 4)
    assert numbers.tolist() == [[1, 3, 2, 0]]
    np.testing.assert_allclose(cosines[0], [1, 1, 0.5**0.5, 0], atol=1e-6)


def test_rows_of_zeros_stay_zero() -> None:
    assert unit(np.zeros((2, 3))).tolist() == [[0, 0, 0]] * 2
    assert unit(np.array([[3, 4]], np.float16)).dtype == np.float32


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pytest.importorskip("faiss")
    monkeypatch.setattr(neighbours, "FLAT_ROWS", 500)
    yield


@pytest.mark.usefixtures("small_limit")
def test_the_saved_index_finds_what_exact_search_finds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    rows = clusters(2000)
    rows[1500:1510] = rows[77]
    vectors = vectors_of(rows)
    index = open_index(vectors, tmp_path, "cls.28")
    assert isinstance(index, ListIndex) and "lists searched" in caplog.text
    exact, _ = ExactIndex(vectors).nearest(rows[:200], 5)
    found, cosines = index.nearest(rows[:200], 5)
    assert (exact[:, 0] == found[:, 0]).mean() > 0.98
    np.testing.assert_allclose(cosines, np.einsum("qd,qkd->qk", rows[:200], rows[found]), atol=2e-3)
    groups = groups_of(2000, index.links(0.999))
    true = groups_of(2000, ExactIndex(vectors).links(0.999))
    assert (groups == true).mean() > 0.99
    equal = [77, *range(1500, 1510)]
    for threshold in (
        0.999,
        1.5,
    ):  # equal vectors are linked whatever rounding does to their cosine
        assert len(set(groups_of(2000, index.links(threshold))[equal])) == 1


@pytest.mark.usefixtures("small_limit")
def test_an_index_is_kept_until_the_vectors_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = clusters(700)
    built: list[int] = []
    build = neighbours._build
    monkeypatch.setattr(
        neighbours, "_build", lambda faiss, v: built.append(v.count) or build(faiss, v)
    )
    for _ in range(2):
        open_index(vectors_of(rows), tmp_path, "cls.28")
    assert built == [700] and len(list(tmp_path.iterdir())) == 1
    open_index(vectors_of(rows[:600], "another key of the rows"), tmp_path, "cls.28")
    assert built == [700, 600]
    (path,) = tmp_path.iterdir()  # the old one is gone
    assert path.name == "neighbours-cls.28-600-another key of t.faiss"
    path.write_bytes(path.read_bytes()[:1000])
    open_index(vectors_of(rows[:600], "another key of the rows"), tmp_path, "cls.28")
    assert built == [700, 600, 600]
    open_index(vectors_of(rows[:400]), tmp_path, "cls.28")
    assert built == [700, 600, 600]  # few rows need none


@pytest.mark.usefixtures("small_limit")
def test_a_cache_that_can_not_be_written_to_keeps_the_index_in_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr(neighbours, "write_atomically", refuse)
    rows = clusters(600)
    index = open_index(vectors_of(rows), tmp_path, "cls.28")
    assert index.nearest(rows[:1], 1)[0].tolist() == [[0]]
    assert "in memory only" in caplog.text and not list(tmp_path.iterdir())


def test_without_faiss_small_sets_work_and_large_ones_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = builtins.__import__

    def no_faiss(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "faiss":
            raise ImportError("No module named 'faiss'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_faiss)
    monkeypatch.setattr(neighbours, "FLAT_ROWS", 500)
    rows = clusters(500)
    assert isinstance(open_index(vectors_of(rows[:499]), None, "cls.28"), ExactIndex)
    with pytest.raises(StoreError, match="pip install faiss-cpu"):
        open_index(vectors_of(rows), None, "cls.28")
