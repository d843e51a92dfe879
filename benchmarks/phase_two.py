"""How long phase two takes: the all-pairs engine against a bare pass, and whole commands.

    python benchmarks/phase_two.py [--rows 10000] [--large-rows 100000] [--parts ce]

Prints tables of ratios, all from this one run. What is compared is measured in turns, and the fastest of
several turns counts, because other programs only ever make a turn slower.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as mirip-fast itself does; before torch

import numpy as np
import torch
from common import Line, in_turns, machine, measured, show
from made_cache import made_cache, made_up_rows
from torch.utils.data import DataLoader, Dataset

from mirip_fast.config import Config
from mirip_fast.models.losses import count_pairs, pair_loss
from mirip_fast.ranking.fit import HeadFit
from mirip_fast.ranking.objective import draw_partners
from mirip_fast.ranking.rows import Rows
from mirip_fast.training.optim import Preset, choose_preset

WIDTH = 1024
TURNS = 5
EPOCHS = 100
CLASSIC_STEPS = 30
COMMAND = ("-m", "mirip_fast_cli")

_STARTER = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status) != 0)
"""


class DrawnPairs(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """The classic recipe over cached features: one drawn pair per image, two rows per item."""

    def __init__(self, rows: Rows):
        self.features = torch.from_numpy(rows.features[:, 0])
        self.pairs = draw_partners(-rows.tiers, None, np.random.default_rng(0))

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        better, worse = self.pairs[index]
        return self.features[better], self.features[worse]


def rows_of(n: int) -> Rows:
    """Made-up rows as phase two holds them."""
    features, tiers = made_up_rows(n, WIDTH)
    return Rows([str(i) for i in range(n)], features[:, None], tiers, [None] * n)


def fit_of(rows: Rows, batch_size: int) -> HeadFit:
    """The product's fit over these rows."""
    return HeadFit(
        rows, rows, Config(), Preset(batch_size, 1e-4, EPOCHS), {}, torch.device("cpu")
    )  # fmt: skip


def bare_pass(rows: Rows) -> Callable[[], None]:
    """Forward and backward of the same head over the same rows, with the sum of scores as the loss."""
    fit = fit_of(rows, len(rows))
    features = torch.from_numpy(rows.features[:, 0])

    def work() -> None:
        fit.head.train()
        fit.head.zero_grad(set_to_none=True)
        fit.head(features).sum().backward()

    return work


def all_pairs_pass(rows: Rows) -> Callable[[], None]:
    """The same with the exact margin loss over all pairs, as `train` does it."""
    fit = fit_of(rows, len(rows))
    everything, rng = np.arange(len(rows)), np.random.default_rng(0)

    def work() -> None:
        fit.head.train()
        fit.head.zero_grad(set_to_none=True)
        fit.objective.batch_loss(fit.head, fit.train, everything, rng).backward()  # type: ignore[no-untyped-call]

    return work


def epochs(fit: HeadFit) -> Callable[[], None]:
    """Whole training epochs as `train` runs them: batches, clipping, optimizer, schedule."""
    return lambda: fit._train_epoch(1) and None


def classic_steps(rows: Rows, steps: int) -> Callable[[], None]:
    """Steps of the classic loader: batches of 32 drawn pairs, both images scored."""
    fit = fit_of(rows, 32)
    loader = DataLoader(DrawnPairs(rows), batch_size=32, shuffle=True)

    def work() -> None:
        fit.head.train()
        for step, (better, worse) in enumerate(loader):
            if step == steps:
                return
            first = torch.ones(len(better))
            pair_loss(
                fit.head(better), fit.head(worse), first, kind="margin", margin=1.0
            ).backward()  # type: ignore[no-untyped-call]
            fit.optimizer.step()
            fit.optimizer.zero_grad(set_to_none=True)

    return work


def engine(n: int, large: int) -> list[Line]:
    """The all-pairs engine against a bare pass and against the classic loader."""
    rows = rows_of(n)
    pairs = count_pairs(torch.from_numpy(rows.tiers))
    usual = choose_preset(Config().train, n).batch_size
    cost = in_turns(
        TURNS,
        pick=min,
        bare=bare_pass(rows),
        exact=all_pairs_pass(rows),
        whole=epochs(fit_of(rows, len(rows))),
        default=epochs(fit_of(rows, usual)),
        classic=classic_steps(rows, CLASSIC_STEPS),
    )
    more = rows_of(large)
    grown = in_turns(2, pick=min, grown=all_pairs_pass(more))["grown"]
    bare, exact = cost["bare"], cost["exact"]
    per_pair, per_classic = exact.wall / pairs, cost["classic"].wall / (CLASSIC_STEPS * 32)
    return [
        Line(f"bare forward + backward, {n} rows", bare.wall, "s"),
        Line(f"the same over all {pairs:,} pairs (margin)", exact.wall, "s"),
        Line("all pairs ÷ bare", exact.wall / bare.wall, most=1.15),
        Line("the same in processor seconds", exact.cpu / bare.cpu),
        Line("a whole epoch, one batch ÷ bare", cost["whole"].wall / bare.wall),
        Line(f"a whole epoch, default batch of {usual} ÷ bare", cost["default"].wall / bare.wall),
        Line("classic loader, per pair", per_classic * 1e6, "µs"),
        Line("all pairs, per pair", per_pair * 1e9, "ns"),
        Line("classic loader ÷ all pairs, per pair", per_classic / per_pair, least=1000),
        Line(f"all pairs, {large} rows", grown.wall, "s"),
        Line(f"all pairs, {large} rows ÷ {n}", grown.wall / exact.wall, most=large / n * 1.1),
        Line("the same in processor seconds", grown.cpu / exact.cpu),
    ]


def commands(n: int) -> list[Line]:
    """Whole processes: training 100 epochs, and ranking a cached folder of 1,000 images."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data, _ = made_cache(folder, n, WIDTH)
        options = ["--epochs", str(EPOCHS), "--early-stopping-patience", "0"]
        with measured() as train:
            memory = _run(folder, *COMMAND, "train", "--head-only", *options)
        works = folder / "works"
        works.mkdir()
        for path in sorted((data / "images").iterdir())[:1000]:
            path.rename(works / path.name)
        _run(folder, *COMMAND, "rank", "works")  # puts them into the cache's memory of files
        cost = in_turns(
            TURNS,
            pick=min,
            rank=lambda: _run(folder, *COMMAND, "rank", "works"),
            torch=lambda: _run(folder, "-c", "import torch"),
        )
    rank, torch_import = cost["rank"].wall, cost["torch"].wall
    return [
        Line(f"train --head-only, {n} rows, {EPOCHS} epochs", train.wall, "s", most=60),
        Line("the same in processor seconds", train.cpu, "s"),
        Line("its memory at most", memory, "GB", most=1.5),
        Line("rank, 1,000 cached images", rank, "s"),
        Line("import torch", torch_import, "s"),
        Line("rank ÷ import torch", rank / torch_import, most=1),
    ]


def _run(folder: Path, *words: str) -> float:
    """Run a Python process; returns its peak memory in GB.

    A small process starts it and is told its peak: a process counts the memory of the one that started it as
    its own, and this one is not small.
    """
    command = [sys.executable, "-c", _STARTER, sys.executable, *words]
    done = subprocess.run(command, check=False, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stderr}")
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return int(done.stdout) * unit / 1e9


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--large-rows", type=int, default=100_000)
    parser.add_argument("--parts", default="ce", help="c: whole commands, e: the engine")
    options = parser.parse_args()
    logging.getLogger("mirip_fast").setLevel(logging.WARNING)
    print(machine())
    if "c" in options.parts:
        show("whole commands, start-up included", commands(options.rows))
    if "e" in options.parts:
        lines = engine(options.rows, options.large_rows)
        show(f"the engine, {torch.get_num_threads()} threads of torch", lines)


if __name__ == "__main__":
    main()
