"""Peak memory of phase one for more and more images, with a backbone that takes no time.

``python benchmarks/memory.py`` runs each number in a process of its own and prints a table.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from common import Line, machine, show
from embedding import PhaseOne, Stub, load
from pictures import small_pictures


def one(folder: Path, n: int) -> None:
    """Embed ``n`` pictures and print the peak memory of this process before and after, in MiB."""
    spec, _ = load("tiny-random")
    spec = dataclasses.replace(spec, hidden_size=1024)
    phase = PhaseOne(spec, Stub(spec), 224, folder / f"store-{n}")
    paths = small_pictures(folder / f"pictures-{n}", n)
    for path in paths:
        str(path)  # a path keeps its text: the list of names is what phase one is given
    phase.run(paths[:1000])
    before = _peak()
    phase.run(paths)
    print(before, _peak())


def _peak() -> float:
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def main() -> None:
    """Print the table, or measure one number of images."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--one", type=int, help="measure this number here")
    parser.add_argument("--folder", type=Path, help="where to put files (default: the system's)")
    arguments = parser.parse_args()
    if arguments.one is not None:
        one(arguments.folder, arguments.one)
        return
    print(machine())
    lines = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for n in arguments.images:
            command = [sys.executable, __file__, "--one", str(n), "--folder", folder]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            before, peak = map(float, done.stdout.split())
            lines += [
                Line(f"{n} images: peak of the main process", peak, "MiB"),
                Line(f"{n} images: more than before the run", peak - before, "MiB"),
                Line(f"{n} images: the same per image", (peak - before) * 2**20 / n, "bytes"),
            ]
    show("memory for 224 × 224 pixels, a backbone that takes no time", lines)


if __name__ == "__main__":
    main()
