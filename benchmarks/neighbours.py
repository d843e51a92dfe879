"""Neighbour search over cached features: the saved index against exact search, in one run.

``python benchmarks/neighbours.py [--rows N] [--width D]`` prints times, recall@1 and how many planted copies
are found, for clustered features and for random ones (the worst case: no neighbourhoods at all).
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mirip_fast.evaluation.text_table import format_table
from mirip_fast.features import neighbours
from mirip_fast.features.neighbours import ExactIndex, Vectors, groups_of, unit

COPIES = 1000
QUERIES = 300


def features(kind: str, n: int, width: int) -> np.ndarray:
    """[n, width] unit rows in half precision as stored; the last COPIES resemble the first ones."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((n, width), dtype=np.float32)
    if kind == "clustered":
        centres = rng.standard_normal((n // 50, width), dtype=np.float32)
        rows *= 0.7
        rows += centres[rng.integers(0, len(centres), n)]
    noise = rng.standard_normal((COPIES, width), dtype=np.float32)
    size = np.linalg.norm(rows[:COPIES], axis=1, keepdims=True) / width**0.5
    rows[-COPIES:] = rows[:COPIES] + 0.2 * size * noise  # cosine about 0.98
    return rows.astype(np.float16)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and the result."""
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def measure(kind: str, n: int, width: int) -> list[str]:
    """One line of the table."""
    rows = features(kind, n, width)
    vectors = Vectors(n, width, lambda numbers: unit(rows[numbers]), f"{kind:16s}")
    ask = np.r_[np.arange(QUERIES // 3), np.arange(n // 2, n // 2 + QUERIES - QUERIES // 3)]
    queries = vectors.read(ask)
    with tempfile.TemporaryDirectory() as folder:
        build, index = timed(lambda: neighbours.open_index(vectors, Path(folder), "cls"))
        size = next(Path(folder).iterdir()).stat().st_size
        read, _ = timed(lambda: neighbours.open_index(vectors, Path(folder), "cls"))
    search, (found, _) = timed(lambda: index.nearest(queries, 2))
    links, groups = timed(lambda: groups_of(n, index.links(0.95)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    exact = ExactIndex(vectors)
    plain, (true, _) = timed(lambda: exact.nearest(queries, 2))
    part = ExactIndex(Vectors(n // 20, width, lambda numbers: unit(rows[numbers])))
    share, _ = timed(lambda: groups_of(n // 20, part.links(0.95)))
    recall = (_other(found, ask) == _other(true, ask)).mean()
    together = (groups[:COPIES] == groups[-COPIES:]).mean()
    return [
        *(kind, f"{build:.1f} s", f"{size / 2**20:.0f} MiB", f"{read:.2f} s"),
        f"{index.index.nprobe} of {index.index.nlist}",
        *(f"{1000 * search / QUERIES:.2f} ms", f"{1000 * plain / QUERIES:.2f} ms"),
        *(
            f"{plain / search:.1f} ×",
            f"{recall:.3f}",
            f"{links:.0f} s",
            f"about {400 * share:.0f} s",
        ),
        *(f"{together:.1%}", f"{peak:.1f} GiB"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=1024)
    options = parser.parse_args()
    n, width = options.rows, options.width
    neighbours.FLAT_ROWS = min(neighbours.FLAT_ROWS, n)
    print(
        f"{n:,} rows of {width} numbers, {QUERIES} questions, {COPIES} planted copies at cosine 0.98"
    )
    header = [
        *("features", "build", "file", "read", "lists", "question", "exact", "faster", "recall@1"),
        *("all near pairs", "exact (from 1/20)", "copies found", "peak memory"),
    ]
    table = [measure(kind, n, width) for kind in ("clustered", "random")]
    print(format_table(header, table, "l" + "r" * 12))


def _other(found: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """The nearest that is not the question itself."""
    return np.where(found[:, 0] == asked, found[:, 1], found[:, 0])


if __name__ == "__main__":
    main()
