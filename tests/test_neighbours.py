"""Nearest neighbours and near groups against plain loops; inverted lists against exact search; no faiss."""

from __future__ import annotations

import logging
import sys

import numpy as np
import pandas as pd
import pytest

from mirip_fast.errors import StoreError
from mirip_fast.features import neighbours
from mirip_fast.features.neighbours import WORK, Gallery, unit


def vectors_of(rows: np.ndarray) -> Gallery:
    return Gallery(
        pd.DataFrame(columns=WORK), (b"",) * len(rows), rows.shape[1], lambda numbers: rows[numbers]
    )


def clusters(n: int, width: int = 16, spread: float = 0.1) -> np.ndarray:
    rng = np.random.default_rng(5)
    centres = rng.standard_normal((40, width))
    return unit(centres[rng.integers(0, 40, n)] + spread * rng.standard_normal((n, width)))


def groups_by_loops(rows: np.ndarray, threshold: float) -> list[list[int]]:
    group = list(range(len(rows)))
    for i in range(len(rows)):
        for j in range(i):
            if sum(float(a) * float(b) for a, b in zip(rows[i], rows[j], strict=True)) >= threshold:
                one, two = sorted((group[i], group[j]))
                group = [one if g == two else g for g in group]
    members = [[i for i, g in enumerate(group) if g == number] for number in set(group)]
    return sorted(members, key=lambda numbers: (-len(numbers), numbers))


@pytest.mark.parametrize("threshold", [0.9, 0.99, 0.9999])
@pytest.mark.parametrize("block", [7, 2048])
def test_groups_are_those_of_plain_loops(
    threshold: float, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "_BLOCK", block)
    rows = clusters(120, 5)
    rows[30:40] = rows[3]  # equal to the last bit
    assert vectors_of(rows).groups(threshold) == groups_by_loops(rows, threshold)


def test_nothing_and_one() -> None:
    for n in (0, 1):
        vectors = vectors_of(np.ones((n, 2), np.float32))
        assert vectors.groups(0.5) == [[0]] * n
        numbers, cosines = vectors.nearest(np.ones(2, np.float32), 3)
        assert numbers.tolist() == [*range(n)] and len(cosines) == n


def test_nearest_in_order_and_ties_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "_BLOCK", 2)
    rows = unit(np.array([[1, 0], [0, 1], [1, 1], [0, 1], [-1, 0]]))
    numbers, cosines = vectors_of(rows).nearest(rows[1], 4)
    assert numbers.tolist() == [1, 3, 2, 0]
    np.testing.assert_allclose(cosines, [1, 1, 0.5**0.5, 0], atol=1e-6)


def test_rows_of_zeros_stay_zero() -> None:
    assert unit(np.zeros((2, 3))).tolist() == [[0, 0, 0]] * 2
    assert unit(np.array([[3, 4]], np.float16)).dtype == np.float32


def test_inverted_lists_find_what_exact_search_finds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("faiss")
    rows = clusters(2000)
    rows[1500:1510] = rows[77]
    vectors, labels = vectors_of(rows), np.zeros((2, 2000), int)
    for limit in (10_000, 500):
        monkeypatch.setattr(neighbours, "FLAT_ROWS", limit)
        caplog.set_level(logging.INFO)
        for numbers in vectors.groups(0.999):
            labels[int(limit == 500), numbers] = min(numbers)
    assert caplog.text.count("lists searched") == 1
    assert (labels[0] == labels[1]).mean() > 0.99
    equal = [77, *range(1500, 1510)]
    for threshold in (
        0.999,
        1.5,
    ):  # equal vectors are together whatever rounding does to their cosine
        (group,) = [numbers for numbers in vectors.groups(threshold) if 77 in numbers]
        assert set(equal) <= set(group)


def test_without_faiss_small_sets_work_and_large_ones_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(neighbours, "FLAT_ROWS", 500)
    rows = clusters(500)
    assert vectors_of(rows[:499]).groups(0.99)
    with pytest.raises(StoreError, match="pip install faiss-cpu"):
        vectors_of(rows).groups(0.99)
