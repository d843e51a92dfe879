"""Which batch size and learning rate suit which number of training images.

    python benchmarks/presets.py [--images 1500,4000,8000] [--seeds 3] [--presets 64:2e-4,256:4e-4]

Every preset trains the default head on the same made-up rows, stops early on the same validation rows (an
eighth of the training images), and is judged by the pairwise accuracy on 4,000 rows that it has not seen.
Three kinds of grades, each with noise: a linear one, one that is bent as well, and one that goes by clusters.
Differences are paired over kinds × seeds with the first preset; processor seconds are those of the whole fit.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import measured
from made_cache import bent_rows, clustered_rows, made_up_rows
from numpy.typing import NDArray

from mirip_fast.config import Config
from mirip_fast.evaluation.metrics import pairwise_accuracy
from mirip_fast.evaluation.text_table import format_table
from mirip_fast.models.checkpoint import load_checkpoint
from mirip_fast.ranking.fit import HeadFit
from mirip_fast.ranking.objective import score_rows
from mirip_fast.ranking.rows import Rows
from mirip_fast.runtime import cpu_threads
from mirip_fast.training.optim import Preset, choose_preset
from mirip_fast.training.run_folder import Run
from mirip_fast.training.trackers import Trackers

Array = NDArray[Any]
Maker = Callable[[int, int, int], tuple[Array, Array]]

KINDS: dict[str, Maker] = {"linear": made_up_rows, "bent": bent_rows, "clusters": clustered_rows}
WIDTH, UNSEEN = 384, 4_000
PRESETS = "64:2e-4,64:4e-4,128:3e-4,128:6e-4,256:3e-4,256:6e-4,256:1e-3,512:1e-3"


def fit(rows: list[Rows], preset: Preset, seed: int) -> tuple[float, int, float]:
    """Accuracy (0–1) on unseen rows, the best epoch, and processor seconds."""
    config = Config()
    config.train.seed = seed
    train, val, unseen = rows
    with tempfile.TemporaryDirectory() as name, measured() as cost:
        fitted = HeadFit(train, val, config, preset, {}, torch.device("cpu"))
        run = Run(Path(name))
        result = fitted.run(run, Trackers({}))
        fitted.head.load_state_dict(load_checkpoint(run.best)["model_state_dict"])
    scores = score_rows(fitted.head, torch.from_numpy(unseen.features)).numpy()
    return pairwise_accuracy(scores, unseen.tiers), result["best_epoch"], cost.cpu


def rows_of(maker: Maker, n: int, seed: int) -> list[Rows]:
    """Training, validation and unseen rows of one made-up world."""
    sizes = np.cumsum([n, n // 8, UNSEEN])
    features, tiers = maker(int(sizes[-1]), WIDTH, seed)
    parts = np.split(np.arange(sizes[-1]), sizes[:-1])
    return [Rows([str(i) for i in p], features[p, None], tiers[p], [None] * len(p)) for p in parts]


def compare(n: int, presets: list[Preset], seeds: int) -> None:
    """Print the table of one number of training images."""
    found: dict[Preset, list[tuple[float, int, float]]] = {preset: [] for preset in presets}
    kinds = []
    for seed in range(seeds):
        for kind, maker in KINDS.items():
            rows = rows_of(maker, n, seed)
            kinds.append(kind)
            for preset in presets:
                found[preset].append(fit(rows, preset, seed))
    lines = []
    first = np.array([accuracy for accuracy, _, _ in found[presets[0]]])
    for preset, fits in found.items():
        accuracy, best, seconds = (np.array(column) for column in zip(*fits, strict=True))
        by_kind = [
            f"{np.mean([a for a, k in zip(accuracy, kinds, strict=True) if k == kind]):.4f}"
            for kind in KINDS
        ]
        difference = accuracy - first
        error = difference.std(ddof=1) / len(difference) ** 0.5 if len(difference) > 1 else 0.0
        compared = f"{100 * difference.mean():+.2f} ± {100 * error:.2f}"
        of_preset = (str(preset.batch_size), f"{preset.learning_rate:g}")
        lines.append(
            (*of_preset, *by_kind, compared, f"{best.mean():.0f}", f"{seconds.mean():.1f}")
        )
    head = ("batch", "rate", *KINDS, "points (± s.e.)", "best epoch", "cpu s")
    print(f"\n{n:,} training images, {seeds} seeds")
    print(format_table(head, lines, align="r" * len(head)), flush=True)


def main() -> None:
    """Print one table per number of training images."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", default="1500,4000,8000")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--presets", default=PRESETS, help="batch:learning rate, separated by commas"
    )
    options = parser.parse_args()
    logging.getLogger("mirip_fast").setLevel(logging.WARNING)
    with cpu_threads(1):
        for n in map(int, options.images.split(",")):
            epochs = choose_preset(Config().train, n).epochs
            parts = [entry.split(":") for entry in options.presets.split(",")]
            compare(n, [Preset(int(b), float(rate), epochs) for b, rate in parts], options.seeds)


if __name__ == "__main__":
    main()
