"""Preference cycles: found exactly where no order agrees with every judgement, and the shortest named."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from mirip_fast.data.cycles import Judgement, find_components, read_judgements
from mirip_fast.errors import DataError


def judged(*pairs: str) -> list[Judgement]:
    return [Judgement(pair[0], pair[1], row) for row, pair in enumerate(pairs, start=2)]


def shortest_by_trying(edges: set[tuple[int, int]], n: int) -> int | None:
    """Length of the shortest cycle, by trying every sequence of images."""
    for length in range(1, n + 1):
        for nodes in itertools.permutations(range(n), length):
            if all(edge in edges for edge in zip(nodes, (*nodes[1:], nodes[0]), strict=True)):
                return length
    return None


def test_judgements_that_agree_have_no_tangle() -> None:
    assert find_components(judged("ab", "bc", "ac", "ab", "ad")) == []
    assert find_components([]) == []


def test_the_shortest_cycle_is_named_with_its_rows() -> None:
    (component,) = find_components(judged("ab", "bc", "cd", "da", "ca", "xa"))
    assert component.images == ("a", "b", "c", "d")
    assert component.rows == (2, 3, 4, 5, 6)
    assert component.cycles[0].images == ("a", "b", "c") and component.cycles[0].rows == (2, 3, 6)
    assert component.cycles[1].images == ("a", "b", "c", "d")


def test_opposite_judgements_and_an_image_against_itself_are_cycles() -> None:
    two, one = find_components(judged("ab", "ba", "ab", "cc"))
    assert two.cycles[0].rows == (2, 3) and two.rows == (2, 3, 4)
    assert one.images == ("c",) and one.cycles[0].rows == (5,)


def test_against_trying_everything() -> None:
    rng = np.random.default_rng(3)
    seen = set()
    for _ in range(300):
        n = int(rng.integers(2, 7))
        drawn = rng.integers(0, n, (int(rng.integers(1, 11)), 2))
        edges = {(int(a), int(b)) for a, b in drawn if a != b or rng.random() < 0.1}
        components = find_components([Judgement(str(a), str(b), 7) for a, b in edges])
        lengths = [len(cycle.images) for component in components for cycle in component.cycles]
        assert min(lengths, default=None) == shortest_by_trying(edges, n)
        for component in components:
            for cycle in component.cycles:
                nodes = [int(name) for name in cycle.images]
                assert set(zip(nodes, [*nodes[1:], nodes[0]], strict=True)) <= edges
                assert len(set(nodes)) == len(nodes)
        seen.add(min(lengths, default=0))
    assert seen >= {0, 1, 2, 3}


def test_a_long_cycle_is_found_whole() -> None:
    (component,) = find_components(judged("ef", "bc", "ab", "de", "cd", "fa"))
    (cycle,) = component.cycles
    assert cycle.images == ("a", "b", "c", "d", "e", "f") and cycle.rows == (4, 3, 6, 5, 2, 7)


def test_named_cycles_are_limited_and_still_the_shortest() -> None:
    ring = [f"{a:02d}" for a in range(30)]
    pairs = [Judgement(a, b, 2) for a, b in zip(ring, ring[1:] + ring[:1], strict=True)]
    pairs += [Judgement(b, a, 3) for a, b in itertools.pairwise(ring[:10])]
    (component,) = find_components(pairs, cycles=4)
    assert [len(cycle.images) for cycle in component.cycles] == [2, 2, 2, 2]


def test_reading(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(
        "image_path_1;image_path_2;label;judge\n./가.png;b\\c.png;1;kim\nx;y;-1.0;\nx;y;0;\n",
        "utf-8-sig",
    )
    judgements, ties = read_judgements(path)
    assert judgements == [Judgement("가.png", "b/c.png", 2), Judgement("y", "x", 3)]
    assert ties == 1


def test_all_faults_are_told_with_their_rows(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("image_path_1,image_path_2,label\na,b,2\n,b,1\na,b,nan\n")
    with pytest.raises(DataError) as caught:
        read_judgements(path)
    assert [line.partition("pairs.csv")[2][:2] for line in str(caught.value).splitlines()] == [
        ":2", ":3", ":4",
    ]  # fmt: skip
    path.write_text("image_path_1,image_path_2,label\na,b,−1\n", "utf-8")
    assert read_judgements(path) == ([Judgement("b", "a", 2)], 0)  # as training reads it
    path.write_text("image_1,image_path_2,label\na,b,1\n")
    with pytest.raises(DataError, match=r"no column 'image_path_1'.*Is it 'image_1'"):
        read_judgements(path)
