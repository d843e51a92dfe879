"""Appends batches to a store until it is killed; tells every batch that was committed on stdout.

Used by the kill tests: ``python store_worker.py STORE BATCHES``. Rows are a function of their number, so
that the parent can check every committed row bit for bit.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np

from mirip_fast.features.shards import SeriesSpec
from mirip_fast.features.store import FeatureStore

SPECS = (SeriesSpec("cls.14", (48,), "float16"), SeriesSpec("grid2.14", (2, 2, 24), "float32"))
FINGERPRINT = {"backbone": "test", "image_size": 14}
BATCH = 7


def sha(number: int) -> bytes:
    return hashlib.sha256(b"image %d" % number).digest()


def row(spec: SeriesSpec, number: int) -> np.ndarray:
    values = np.random.default_rng([number, len(spec.name)]).standard_normal(spec.shape)
    return values.astype(spec.dtype)


def main(path: str, batches: int) -> None:
    store = FeatureStore.create(Path(path), FINGERPRINT)
    numbers = list(range(batches * BATCH))
    with store.writer(command="store_worker") as writer:
        lacking = np.zeros(len(numbers), dtype=bool)
        for spec in SPECS:
            lacking |= writer.missing(spec.name, [sha(n) for n in numbers])
        todo = [n for n in numbers if lacking[n]]
        print(f"todo {len(todo)}", flush=True)
        for start in range(0, len(todo), BATCH):
            batch = todo[start : start + BATCH]
            writer.append(
                [sha(n) for n in batch],
                {spec: np.stack([row(spec, n) for n in batch]) for spec in SPECS},
            )
            print("committed " + " ".join(map(str, batch)), flush=True)
    print("closed", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
