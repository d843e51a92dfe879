"""What fine-tuning adds to a head on cached features, and what an epoch of it costs, strategy by strategy.

    python benchmarks/finetune_quality.py DATA --backbone DIR --out FOLDER [--epochs 5] [-- SPLIT OPTIONS]

Embeds DATA, trains a head, and from that head and with its split every strategy, one after the other; then
prints what ``mirip-fast evaluate`` prints side by side, and processor seconds per epoch: those of training
alone, judging and saving left out, which hardly depend on who else uses the machine. Runs that FOLDER already
holds finished are not trained again. What follows ``--`` goes to ``train --head-only`` (the split's shares).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from common import machine
from mirip_fast_cli.main import run

from mirip_fast.finetune.fit import FullFit
from mirip_fast.training.run_folder import Run, find_runs

#: Name → options. None augments: all are to see the same pixels.
STRATEGIES = {
    "last2": ["--strategy", "last:2"],
    "llrd": ["--strategy", "llrd"],
    "full": ["--strategy", "full"],
    "lora": ["--strategy", "lora"],
}
_FIGURES = "cpu_seconds.json"


def command(*arguments: str) -> None:
    status = run(list(arguments))
    if status:
        raise SystemExit(f"mirip-fast {' '.join(arguments)} ended with status {status}")


def finished(name: str, runs: Path) -> Run | None:
    found = (r for r in find_runs(runs) if r.info["name"] == name)
    return next((r for r in found if r.info["status"] == "finished"), None)


class Clock:
    """Processor seconds of every training epoch in this process, judging and saving left out."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        whole = FullFit.train_epoch

        def timed(fit: FullFit, *arguments: Any) -> None:
            started = time.process_time()
            whole(fit, *arguments)
            self.seconds.append(time.process_time() - started)

        FullFit.train_epoch = timed  # type: ignore[method-assign]


def train(options: argparse.Namespace, split: list[str]) -> list[Run]:
    runs, clock = options.out / "runs", Clock()
    common = [
        "--output-dir",
        str(runs),
        "--cache-dir",
        str(options.out / "cache"),
        "--device",
        options.device,
    ]
    head = finished("head", runs)
    if head is None:
        embedding = ["--backbone", str(options.backbone), "--image-size", str(options.image_size)]
        columns = [] if options.group_column is None else ["--group-column", options.group_column]
        command("embed", str(options.data), *embedding, *columns, *common[2:], "--workers", "0")
        command("train", "--head-only", "--data", str(options.data), *common, *split)
        head = finished("head", runs)
    assert head is not None
    done = [head]
    for name, strategy in STRATEGIES.items():
        found = finished(name, runs)
        if found is None:
            clock.seconds.clear()
            command(
                "train", "--full", "--init-from", str(head.path), *common, *strategy, "--name", name,
                "--augment", "none", "--epochs", str(options.epochs), "--early-stopping-patience", "0",
                "--save-every-n-epochs", "0", "--loader-workers", "0", "--workers", "0",
            )  # fmt: skip
            found = finished(name, runs)
            assert found is not None
            (found.path / _FIGURES).write_text(json.dumps(clock.seconds))
        done.append(found)
    return done


def main() -> None:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--group-column", help="of DATA; image_id leaves groups aside")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    options, split = parser.parse_known_args()
    print(machine(), f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}", flush=True)
    runs = train(options, [word for word in split if word != "--"])
    where = ["--output-dir", str(options.out / "runs"), "--cache-dir", str(options.out / "cache")]
    command("evaluate", *(str(run.path) for run in runs), *where, "--device", options.device)
    for done in runs[1:]:
        seconds = json.loads((done.path / _FIGURES).read_text())
        mean = sum(seconds) / len(seconds)
        print(
            f"{done.info['name']:12} {mean:7.1f} processor seconds per epoch ({len(seconds)} epochs)"
        )


if __name__ == "__main__":
    main()
