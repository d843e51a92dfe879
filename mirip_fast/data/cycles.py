"""Preference cycles: judgements that cannot all be right, such as a > b, b > c, c > a."""

from __future__ import annotations

import posixpath
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mirip_fast.data.pair_files import FIRST, SECOND, read_verdicts
from mirip_fast.text import nfc

#: Images from which cycles are looked for in one component; a larger one is searched in part.
_STARTS = 1000


@dataclass(frozen=True)
class Judgement:
    """One row of a pairs file that prefers an image.

    Attributes:
        better, worse: the images, as :func:`image_name` spells them.
        row: line in the file, 1-based.
    """

    better: str
    worse: str
    row: int


@dataclass(frozen=True)
class Cycle:
    """A shortest cycle.

    Attributes:
        images: each was preferred to the next, and the last to the first.
        rows: the line of each of these judgements, as many as images.
    """

    images: tuple[str, ...]
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Component:
    """Images that are joined by cycles: a strongly connected component with more than one image.

    Attributes:
        images: sorted by name.
        rows: lines of all judgements among them; no order of the images agrees with all of these.
        cycles: its shortest cycles, shortest first; at least one.
    """

    images: tuple[str, ...]
    rows: tuple[int, ...]
    cycles: tuple[Cycle, ...]


def image_name(text: str) -> str:
    """One spelling of a file name: ``./a\\b.png`` is ``a/b.png``, accents and Korean are composed."""
    clean = nfc(text.strip().replace("\\", "/"))
    return posixpath.normpath(clean)


def read_judgements(
    path: Path, *, zero: str | None = None, separator: str | None = None
) -> tuple[list[Judgement], int]:
    """Read the preferences in a pairs file.

    Args:
        path: CSV file with the columns image_path_1, image_path_2 and label: 1 where the first image is
            the better one, −1 where the second is, 0 for a tie. Other columns are not looked at.
        zero: what the label 0 means, see :func:`mirip_fast.data.pair_files.read_pairs`.
        separator: between cells; None finds it out.

    Returns:
        The preferences in the order of the rows, and the number of ties.

    Raises:
        DataError: the file is unreadable, or rows or columns are faulty (all faults in one message).
    """
    table, labels, problems = read_verdicts(path, zero, separator)
    problems.raise_if_any()
    names = ([image_name(cell) for cell in table.cells[column]] for column in (FIRST, SECOND))
    judgements = [
        Judgement(one, other, row) if label > 0 else Judgement(other, one, row)
        for one, other, label, row in zip(*names, labels, table.cells.index, strict=True)
        if label
    ]
    return judgements, labels.count(0)


def find_components(judgements: Sequence[Judgement], *, cycles: int = 5) -> list[Component]:
    """Every set of images that is joined by cycles, the largest first.

    Where there is none, there is an order of the images that agrees with every judgement. An image
    preferred to itself is a cycle of one.

    Args:
        judgements: the preferences; repeated ones count as one, under the first row.
        cycles: shortest cycles named per component, at most.
    """
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import connected_components

    names = sorted(
        {name for judgement in judgements for name in (judgement.better, judgement.worse)}
    )
    number = {name: i for i, name in enumerate(names)}
    rows: dict[tuple[int, int], int] = {}
    for j in judgements:
        rows.setdefault((number[j.better], number[j.worse]), j.row)
    if not rows:
        return []
    edges = np.array(list(rows), dtype=np.int64)
    graph = csr_matrix((np.ones(len(edges), np.int8), edges.T), shape=(len(names), len(names)))
    _, component = connected_components(graph, directed=True, connection="strong")
    inside: dict[int, dict[int, list[int]]] = {}  # component → image → images it beats
    for better, worse in rows:
        if component[better] == component[worse]:
            inside.setdefault(int(component[better]), {}).setdefault(better, []).append(worse)
    lines: dict[int, list[int]] = {}
    for j in judgements:
        code = int(component[number[j.better]])
        if code == component[number[j.worse]]:
            lines.setdefault(code, []).append(j.row)
    found = [
        Component(
            tuple(names[i] for i in sorted(beats)),
            tuple(lines[code]),
            tuple(_as_cycle(nodes, names, rows) for nodes in _shortest_cycles(beats, cycles)),
        )
        for code, beats in inside.items()
    ]
    return sorted(found, key=lambda component: (-len(component.images), component.rows))


def _as_cycle(nodes: tuple[int, ...], names: list[str], rows: dict[tuple[int, int], int]) -> Cycle:
    following = (*nodes[1:], nodes[0])
    edges = zip(nodes, following, strict=True)
    return Cycle(tuple(names[i] for i in nodes), tuple(rows[edge] for edge in edges))


def _shortest_cycles(beats: dict[int, list[int]], limit: int) -> list[tuple[int, ...]]:
    """At most ``limit`` cycles of one component, shortest first; each begins at its smallest image.

    Breadth first from every image: the first way back over each judgement that leads there. Once
    ``limit`` cycles are known, nothing longer than the longest of them is looked for.
    """
    found: set[tuple[int, ...]] = set()
    longest = len(beats)
    for start in sorted(beats)[:_STARTS]:
        for nodes in _cycles_through(start, beats, longest):
            least = nodes.index(min(nodes))
            found.add(nodes[least:] + nodes[:least])
        if len(found) > limit:
            found = set(sorted(found, key=lambda nodes: (len(nodes), nodes))[:limit])
        if len(found) == limit:
            longest = max(map(len, found))
    return sorted(found, key=lambda nodes: (len(nodes), nodes))


def _cycles_through(
    start: int, beats: dict[int, list[int]], longest: int
) -> Iterator[tuple[int, ...]]:
    """Cycles of at most ``longest`` images: one per judgement that leads back to ``start``."""
    before = {start: start}
    depth = {start: 1}
    waiting = deque([start])
    while waiting:
        node = waiting.popleft()
        for other in beats[node]:
            if other == start:
                way = [node]
                while way[-1] != start:
                    way.append(before[way[-1]])
                yield tuple(reversed(way))
            elif other not in before and depth[node] < longest:
                before[other], depth[other] = node, depth[node] + 1
                waiting.append(other)
