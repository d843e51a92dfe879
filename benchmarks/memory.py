"""Peak memory of phase one for more and more images: its loop, and the whole command.

``python benchmarks/memory.py`` runs each number in processes of their own and prints a table.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common import Line, machine, show
from mirip_fast_cli.main import run

from mirip_fast.data.manifest import read_manifest


def make(folder: Path, n: int) -> None:
    """Make ``n`` pictures; whoever embeds them shall not have had their names in memory before."""
    from pictures import small_pictures

    small_pictures(folder / "pictures", n)


def loop(folder: Path, n: int) -> None:
    """Embed the pictures with a backbone that takes no time; print the peak before and after, in MiB."""
    from embedding import PhaseOne, Stub, load  # torch, which the command loads after the names

    spec, _ = load("tiny-random")
    spec = dataclasses.replace(spec, hidden_size=1024)
    phase = PhaseOne(spec, Stub(spec), 224, folder / "store")
    paths = read_manifest(folder / "pictures").paths
    phase.run(paths[:1000])
    before = _peak()
    phase.run(paths)
    print(before, _peak())


def command(folder: Path, n: int) -> None:
    """Run ``mirip-fast embed`` on the pictures, with a tiny backbone; print the peak, in MiB."""
    options = ["--backbone", "tiny-random", "--image-size", "28", "--strict"]
    cache = ["--cache-dir", str(folder / "cache")]
    if run(["--quiet", "embed", str(folder / "pictures"), *options, *cache]):
        raise SystemExit("embed failed")
    print(_peak())


PARTS = {part.__name__: part for part in (make, loop, command)}


def _peak() -> float:
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _measure(folder: Path, n: int, part: str) -> list[float]:
    words = [sys.executable, __file__, "--part", part, "--images", str(n), "--folder", str(folder)]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    return [float(number) for number in done.stdout.splitlines()[-1].split()] if done.stdout else []


def _lines(numbers: Sequence[int], parent: Path | None) -> tuple[list[Line], list[Line]]:
    """The lines of both tables: of the loop, and of the whole command."""
    of_loop, of_command, peaks = [], [], []
    for n in numbers:
        with tempfile.TemporaryDirectory(dir=parent) as name:
            folder = Path(name)
            _measure(folder, n, "make")
            before, peak = _measure(folder, n, "loop")
            peaks += _measure(folder, n, "command")
        of_loop += [
            Line(f"{n} images: peak of the main process", peak, "MiB"),
            Line(f"{n} images: more than before the run", peak - before, "MiB"),
            Line(f"{n} images: the same per image", (peak - before) * 2**20 / n, "bytes"),
        ]
        of_command.append(Line(f"{n} images: peak of the command", peaks[-1], "MiB"))
        if n != numbers[0]:
            more = f"{n} images: more than {numbers[0]}"
            of_command.append(Line(more, peaks[-1] - peaks[0], "MiB", most=143))
    return of_loop, of_command


def main() -> None:
    """Print the tables, or measure one part of one number of images."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--part", choices=PARTS, help="do this here")
    parser.add_argument("--folder", type=Path, help="where to put files (default: the system's)")
    arguments = parser.parse_args()
    if arguments.part is not None:
        PARTS[arguments.part](arguments.folder, arguments.images[0])
        return
    print(machine())
    of_loop, of_command = _lines(arguments.images, arguments.folder)
    show("the loop, 224 × 224 pixels, a backbone that takes no time", of_loop)
    show("`mirip-fast embed --backbone tiny-random --image-size 28`", of_command)


if __name__ == "__main__":
    main()
