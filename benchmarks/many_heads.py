"""Many heads: a stack against the same heads one after the other, and the time of bootstrap heads.

python benchmarks/many_heads.py [--images 10000] [--width 1024] [--bootstrap 50]
"""

from __future__ import annotations

import argparse
import dataclasses
import time

import numpy as np
import torch

from mirip_fast.config import Config
from mirip_fast.evaluation.text_table import format_table
from mirip_fast.ranking.bootstrap import bootstrap_config, bootstrap_preset
from mirip_fast.ranking.head_tasks import HeadTask
from mirip_fast.ranking.many_heads import ManyHeads, heads_per_stack, train_heads
from mirip_fast.ranking.rows import Rows
from mirip_fast.runtime import resolve_device
from mirip_fast.training.presets import Preset

_NO_VALIDATION = np.empty(0, np.int64)


def made_up(n: int, width: int) -> Rows:
    """Random rows with random tiers: what is learned does not matter here."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((n, 1, width), dtype=np.float32)
    tiers = rng.integers(4, size=n).astype(np.int64)
    return Rows([str(i) for i in range(n)], features, tiers, [None] * n)


def tasks_of(rows: Rows, config: Config, preset: Preset, heads: int) -> list[HeadTask]:
    """Heads on resamples of the rows, each with a seed of its own."""
    tasks = []
    for seed in range(heads):
        index = np.random.default_rng(seed).integers(len(rows), size=len(rows))
        train = dataclasses.replace(config.train, seed=seed)
        own = dataclasses.replace(config, train=train)
        tasks.append(HeadTask(index, _NO_VALIDATION, own, preset))
    return tasks


def seconds(rows: Rows, stacks: list[list[HeadTask]], device: torch.device) -> tuple[float, float]:
    """Wall clock and processor seconds of training some stacks."""
    wall, processor = time.perf_counter(), time.process_time()
    for stack in stacks:
        ManyHeads(rows, stack, device).run()
    return time.perf_counter() - wall, time.process_time() - processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--bootstrap", type=int, default=50)
    parser.add_argument("--device", default="auto")
    asked = parser.parse_args()
    device = resolve_device(asked.device)
    plain = Config()
    rows = made_up(500, 192)
    lines = []
    for name, config, preset in (
        ("full width, batch 32", plain, Preset(32, 1e-4, 3)),
        ("bootstrap heads, batch 64", bootstrap_config(plain), Preset(64, 3e-3, 3)),
    ):
        count = min(heads_per_stack(192, config.head, device), 20)
        tasks = tasks_of(rows, config, preset, count)
        alone = seconds(rows, [[task] for task in tasks], device)
        stacked = seconds(rows, [tasks], device)
        ratios = [f"{a / s:.1f}" for a, s in zip(alone, stacked, strict=True)]
        lines.append([f"{name}: {count} heads, 500 × 192, one by one ÷ stacked", *ratios])
    print(format_table(["ratio", "wall clock", "processor"], lines, "lrr"))

    rows = made_up(asked.images, asked.width)
    config, preset = bootstrap_config(plain), bootstrap_preset(asked.images)
    tasks = tasks_of(rows, config, preset, asked.bootstrap)
    started, processor = time.perf_counter(), time.process_time()
    train_heads(rows, tasks, device)
    print(
        f"{asked.bootstrap} bootstrap heads, {asked.images:,} × {asked.width} rows, on {device}: "
        f"{time.perf_counter() - started:.1f} s ({time.process_time() - processor:.1f} s of processor)"
    )


if __name__ == "__main__":
    main()
