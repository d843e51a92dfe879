"""End-to-end training on a GPU, against a plain PyTorch loop. `--dry-run` tries the script on a CPU.

The DINOv2-Large architecture with random weights, images of noise in memory (nothing is decoded). For each
size: images/s, pairs/s and peak memory of a step of ``train --full`` with 32 images, one strategy or way of
saving memory after the other, and of the documented two-image recipe as a plain loop, 32 pairs to a batch, in
the same run and the same precision. Then the time to score one pair. It says whether the documented
requirements are met: less than 100 ms per pair, less than 12 GB at batch 32.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from common import machine, verdict
from embedding import large, load
from torch import nn
from torch.nn import functional

from mirip_fast.config import Config, FinetuneConfig
from mirip_fast.evaluation.benchmark import REQUIREMENTS, peak_memory_gb
from mirip_fast.evaluation.text_table import format_table
from mirip_fast.features.backbone_files import BackboneSpec
from mirip_fast.finetune.data import Batches, Pictures
from mirip_fast.finetune.fit import FullFit, Plan
from mirip_fast.finetune.model import ScoringModel
from mirip_fast.finetune.strategy import parse_strategy, prepare_model, unfreeze
from mirip_fast.models.head import RankingHead
from mirip_fast.ranking.rows import Rows

FEATURES = "cls"  # what the documented recipe's head sees


@dataclass
class Way:
    """One way to train: name, settings of ``train --full``."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)


WAYS = (
    Way("full"),
    Way("full, --gradient-checkpointing", {"gradient_checkpointing": True}),
    Way(
        "full, checkpointing, 8 micro-batches",
        {"gradient_checkpointing": True, "accumulation_steps": 8},
    ),
    Way("llrd, --patch-dropout 0.5", {"strategy": "llrd", "patch_dropout": 0.5}),
    Way("last:2", {"strategy": "last:2"}),
    Way("lora", {"strategy": "lora"}),
    Way("lora, 4 micro-batches", {"strategy": "lora", "accumulation_steps": 4}),
)


@dataclass
class Bench:
    """What is measured, and on what."""

    spec: BackboneSpec
    backbone: nn.Module  # float32, on the CPU
    device: torch.device
    precision: str
    batch: int
    steps: int

    def images(self, size: int, count: int) -> torch.Tensor:
        """[count, size, size, 3] uint8 on the CPU, pinned where there is a GPU."""
        pixels = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8)
        return pixels.pin_memory() if self.device.type == "cuda" else pixels

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def clear(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def memory(self) -> float:
        """Peak, GiB: allocated on the GPU, else resident of the whole process so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        return peak_memory_gb()

    def seconds(self, step: Callable[[], object]) -> float:
        """Median of a step, after two to warm up."""
        times = []
        for number in range(2 + self.steps):
            self.wait()
            started = time.perf_counter()
            step()
            self.wait()
            if number > 1:
                times.append(time.perf_counter() - started)
        return statistics.median(times)


def our_step(
    bench: Bench, size: int, way: Way, compiled: bool
) -> tuple[Callable[[], None], FullFit]:
    """A step of ``train --full``: 32 images, all pairs of four tiers, optimizer included."""
    config = Config(finetune=FinetuneConfig(augment="none", compile=compiled, **way.settings))
    config.train.gradient_clip_norm = 1.0
    head = RankingHead(bench.spec.hidden_size, config.head)
    model = ScoringModel(bench.spec, copy.deepcopy(bench.backbone), head, FEATURES)
    strategy = parse_strategy(config.finetune, bench.spec.num_layers)
    prepare_model(model, strategy, config.finetune)
    model.to(bench.device)
    tiers = np.arange(bench.batch) % 4
    data = Rows([""] * bench.batch, np.empty((bench.batch, 0, 0)), tiers, [None] * bench.batch)
    none = Batches(Pictures([], size), 0, 0, pinned=False)
    plan = Plan(1, bench.batch, 0, 0, bench.precision, size)
    fit = FullFit(model, strategy, data, none, data, none, config, plan, {})
    unfreeze(model, strategy, strategy.blocks_at(1, 0))
    model.train()
    (step,) = fit._steps(1)
    images = bench.images(size, bench.batch)
    return lambda: fit._step(step, images), fit


def two_image_step(bench: Bench, size: int, *, frozen: bool) -> Callable[[], None]:
    """The documented recipe as anybody would write it: two images, two passes, a margin loss."""
    backbone = copy.deepcopy(bench.backbone).to(bench.device).requires_grad_(not frozen)
    head = RankingHead(bench.spec.hidden_size, Config().head).to(bench.device)
    learning = [p for part in (backbone, head) for p in part.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-5, weight_decay=0.01)
    backbone.train(not frozen)
    first, second = (
        bench.images(size, bench.batch).permute(0, 3, 1, 2).float() / 255 for _ in range(2)
    )
    labels = torch.ones(bench.batch, device=bench.device)

    def score(images: torch.Tensor) -> torch.Tensor:
        with torch.set_grad_enabled(not frozen):
            cls = backbone(images.to(bench.device)).last_hidden_state[:, 0]
        result: torch.Tensor = head(cls)
        return result

    def step() -> None:
        with bench.autocast():
            score1, score2 = score(first), score(second)
            loss = functional.margin_ranking_loss(score1.float(), score2.float(), labels, margin=1)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def row(
    bench: Bench, name: str, make: Callable[[], tuple[Callable[[], None], FullFit | None]],
    images: int, pairs: int,
) -> tuple[str, ...]:  # fmt: skip
    """Measure one way of training."""
    bench.clear()
    parts = "1"
    try:
        step, fit = make()
        seconds = bench.seconds(step)
        if fit is not None:
            parts = str(fit.parts_per_step)
    except torch.OutOfMemoryError:
        return name, parts, "out of memory", "", "", ""
    memory = bench.memory()
    most = REQUIREMENTS["memory_gb"]
    return (
        name, parts, f"{images / seconds:.1f}", f"{pairs / seconds:.0f}", f"{memory:.2f}",
        verdict(memory, most=most) if bench.batch == 32 else "",
    )  # fmt: skip


def training_table(bench: Bench, size: int, compiled: bool) -> None:
    """All ways of training at one size."""
    batch = bench.batch
    tiers = np.bincount(np.arange(batch) % 4)
    pairs = (batch**2 - int((tiers**2).sum())) // 2
    rows = []
    for frozen in (False, True):
        name = f"plain two-image loop, backbone {'frozen' if frozen else 'learns'}"
        made = lambda frozen=frozen: (two_image_step(bench, size, frozen=frozen), None)  # noqa: E731
        rows.append(row(bench, name, made, 2 * batch, batch))
        print(" ", *rows[-1], sep="  ", flush=True)
    for way in WAYS:
        if (
            int(way.settings.get("strategy", "last:0").partition(":")[2] or 0)
            > bench.spec.num_layers
        ):
            continue
        made = lambda way=way: our_step(bench, size, way, compiled)  # noqa: E731
        rows.append(row(bench, f"train --full: {way.name}", made, batch, pairs))
        print(" ", *rows[-1], sep="  ", flush=True)
    header = ("way", "micro-batches", "images/s", "pairs/s", "peak memory, GiB", "< 12 GB")
    print(
        f"\n{size} pixels, {batch} images (two-image loop: {batch} pairs) per step, {bench.precision}"
    )
    print(format_table(header, rows, align="lrrrrl"), flush=True)


def pair_time(bench: Bench, size: int) -> None:
    """Milliseconds to score one pair."""
    bench.clear()
    head = RankingHead(bench.spec.hidden_size, Config().head)
    model = ScoringModel(bench.spec, copy.deepcopy(bench.backbone), head, FEATURES)
    model.to(bench.device).eval()
    images = bench.images(size, 2)

    @torch.inference_mode()
    def score() -> None:
        with bench.autocast():
            model(images)

    ms = 1000 * bench.seconds(score)
    need = REQUIREMENTS["inference_ms"]
    print(
        f"{size} pixels: {ms:.2f} ms per pair (required: < {need:g} ms): {verdict(ms, most=need)}"
    )


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--sizes", type=int, nargs="+", default=[756, 224])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10, help="measured steps per way")
    parser.add_argument("--compile", action="store_true", help="train --full with --compile")
    options = parser.parse_args()
    if options.dry_run:
        spec, backbone = load("tiny-random")
        bench = Bench(spec, backbone.model, torch.device("cpu"), "fp32", 8, 2)
        options.sizes = [56, 28]
    elif not torch.cuda.is_available():
        raise SystemExit("There is no GPU here; try the script with --dry-run")
    else:
        spec, model = large()
        bench = Bench(
            spec, model, torch.device("cuda", 0), "bf16", options.batch_size, options.steps
        )
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    print(machine())
    print(
        f"{spec.name}; images/s and pairs/s from the median step; peak memory with weights and optimizer"
    )
    for size in options.sizes:
        training_table(bench, size, options.compile)
    print()
    for size in options.sizes:
        pair_time(bench, size)


if __name__ == "__main__":
    main()
