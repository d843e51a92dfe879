"""Near pairs of cached features: inverted lists against exact comparison, in one run.

``python benchmarks/neighbours.py [--rows N] [--width D]`` prints times and how many planted copies are
found, for clustered features and for random ones (the worst case: no neighbourhoods at all).
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from mirip_fast.evaluation.text_table import format_table
from mirip_fast.features import neighbours
from mirip_fast.features.neighbours import WORK, Gallery, unit

COPIES = 1000
QUESTIONS = 20


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
    vectors = Gallery(
        pd.DataFrame(columns=WORK), (b"",) * n, width, lambda numbers: unit(rows[numbers])
    )
    ask = [vectors.read(np.array([i]))[0] for i in range(QUESTIONS)]
    question, _ = timed(lambda: [vectors.nearest(row, 2) for row in ask])
    links, groups = timed(lambda: vectors.groups(0.95))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    part = Gallery(pd.DataFrame(columns=WORK), (b"",) * (n // 20), width, vectors.read)
    share, _ = timed(lambda: part.groups(0.95))
    group = np.empty(n, int)
    for number, members in enumerate(groups):
        group[members] = number
    together = (group[:COPIES] == group[-COPIES:]).mean()
    return [
        *(kind, f"{1000 * question / QUESTIONS:.0f} ms", f"{links:.0f} s"),
        *(f"about {400 * share:.0f} s", f"{together:.1%}", f"{peak:.1f} GiB"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=1024)
    options = parser.parse_args()
    n, width = options.rows, options.width
    neighbours.FLAT_ROWS = min(neighbours.FLAT_ROWS, n)
    print(f"{n:,} rows of {width} numbers, {COPIES} planted copies at cosine 0.98")
    header = [
        *("features", "a question", "all near pairs", "exact (from 1/20)", "copies found"),
        "peak memory",
    ]
    table = [measure(kind, n, width) for kind in ("clustered", "random")]
    print(format_table(header, table, "l" + "r" * 5))


if __name__ == "__main__":
    main()
