"""How long phase two takes: the all-pairs engine against a bare pass, and whole commands.

    python benchmarks/phase_two.py [--rows 10000] [--large-rows 100000]

Prints a table of ratios, all from this one run. What is compared is measured in turns, and the fastest of
several turns counts, because other programs only ever make a turn slower.
"""

from __future__ import annotations

import argparse
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from made_cache import made_cache, made_up_rows
from torch.utils.data import DataLoader, Dataset

from mirip_fast.config import Config
from mirip_fast.evaluation.text_table import format_table
from mirip_fast.models.losses import PairLoss, count_pairs, pair_loss
from mirip_fast.ranking.batches import PartnerDraw
from mirip_fast.ranking.fit import HeadFit
from mirip_fast.ranking.rows import Rows
from mirip_fast.training.presets import Pace, choose_pace

WIDTH = 1024
TURNS = 5
EPOCHS = 100


class DrawnPairs(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """The classic recipe over cached features: one drawn pair per image, two rows per item."""

    def __init__(self, rows: Rows):
        self.features = torch.from_numpy(rows.features[:, 0])
        self.pairs = PartnerDraw(-rows.tiers).draw(np.random.default_rng(0))

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
        rows, rows, Config(), Pace(batch_size, 1e-4, EPOCHS), {}, torch.device("cpu")
    )  # fmt: skip


def fastest(*works: Callable[[], Any], turns: int = TURNS) -> list[float]:
    """Seconds of each work: the fastest of several turns, taken alternately after a warm-up."""
    for work in works:
        work()
    seconds = [[_seconds(work) for work in works] for _ in range(turns)]
    return [min(column) for column in zip(*seconds, strict=True)]


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


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
    """The same with the exact margin loss over all pairs."""
    fit = fit_of(rows, len(rows))
    features, tiers = torch.from_numpy(rows.features[:, 0]), torch.from_numpy(rows.tiers)
    loss = PairLoss()

    def work() -> None:
        fit.head.train()
        fit.head.zero_grad(set_to_none=True)
        loss(fit.head(features), tiers).backward()

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


def engine(n: int, large: int) -> list[tuple[str, str, str]]:
    """The all-pairs engine against a bare pass and against the classic loader."""
    rows = rows_of(n)
    pairs = count_pairs(torch.from_numpy(rows.tiers))
    bare, exact, whole = fastest(
        bare_pass(rows), all_pairs_pass(rows), epochs(fit_of(rows, len(rows)))
    )
    usual = choose_pace(Config().train, n).batch_size
    (default,) = fastest(epochs(fit_of(rows, usual)), turns=2)
    steps = 30
    (classic,) = fastest(classic_steps(rows, steps), turns=3)
    per_pair, per_classic = exact / pairs, classic / (steps * 32)
    table = [
        (f"bare forward + backward, {n} rows", f"{bare:.3f} s", ""),
        ("the same with all pairs (margin)", f"{exact:.3f} s", f"{exact / bare:.3f} (≤ 1.15)"),
        (f"a whole epoch, one batch, {pairs:,} pairs", f"{whole:.3f} s", f"{whole / bare:.3f}"),
        (
            f"a whole epoch, the default batch of {usual}",
            f"{default:.3f} s",
            f"{default / bare:.2f}",
        ),
        (
            "classic loader ÷ all pairs, seconds per pair",
            f"{per_classic * 1e6:.0f} µs, {per_pair * 1e9:.1f} ns",
            f"{per_classic / per_pair:,.0f} (≥ 1,000)",
        ),
    ]
    del rows
    more = rows_of(large)
    (grown,) = fastest(all_pairs_pass(more), turns=2)
    table.append(
        (f"all pairs, {large} rows ÷ {n}", f"{grown:.2f} s", f"{grown / exact:.1f} (≤ 11)")
    )
    return table


def commands(n: int) -> list[tuple[str, str, str]]:
    """Whole processes: training 100 epochs, and ranking a cached folder of 1,000 images."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data, _ = made_cache(folder, n, WIDTH)
        train, memory = _command(
            folder,
            "train",
            "--head-only",
            "--epochs",
            str(EPOCHS),
            "--early-stopping-patience",
            "0",
        )
        works = folder / "works"
        works.mkdir()
        for path in sorted((data / "images").iterdir())[:1000]:
            path.rename(works / path.name)
        _command(folder, "rank", "works")
        turns = [
            (_command(folder, "rank", "works")[0], _run(folder, "-c", "import torch")[0])
            for _ in range(TURNS)
        ]
    rank, torch_import = (min(column) for column in zip(*turns, strict=True))
    return [
        (f"train --head-only, {n} rows, {EPOCHS} epochs", f"{train:.1f} s", "(≤ 60 s)"),
        ("its memory at most", f"{memory:.2f} GB", "(≤ 1.5 GB)"),
        (
            "rank, 1,000 cached images ÷ import torch",
            f"{rank:.2f} s, {torch_import:.2f} s",
            f"{rank / torch_import:.2f} (≤ 1)",
        ),
    ]


def _command(folder: Path, *words: str) -> tuple[float, float]:
    return _run(folder, "-m", "mirip_fast_cli", *words)


def _run(folder: Path, *words: str) -> tuple[float, float]:
    """Seconds, and peak memory in GB, of a Python process."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *words], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    message = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{message.decode(errors='replace')}")
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return time.perf_counter() - started, usage.ru_maxrss * unit / 1e9


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--large-rows", type=int, default=100_000)
    options = parser.parse_args()
    logging.getLogger("mirip_fast").setLevel(logging.WARNING)
    head = ("what", "measured", "ratio (goal)")
    # First the commands: a process counts the memory of the one that started it as its own peak.
    print(format_table(head, commands(options.rows), align="lrr"), flush=True)
    print()
    print(format_table(head, engine(options.rows, options.large_rows), align="lrr"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{torch.get_num_threads()} threads; this process took at most {peak / 1e6:.1f} GB")


if __name__ == "__main__":
    main()
