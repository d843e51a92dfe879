"""What an epoch of end-to-end training costs, by strategy, in one run.

``python benchmarks/finetune_epochs.py --backbone DIR`` trains on random pictures: ``full``, then ``last:N``
with and without kept prefixes, in turns, and prints processor time (and wall time) per epoch as a share
of full's. Processor time is what a busy machine does not spoil; with a GPU, wall time is the one to read.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mirip_fast.config import Config, EmbedConfig, FinetuneConfig
from mirip_fast.data.hashes import HashMemory
from mirip_fast.features.backbone import load_model
from mirip_fast.features.backbone_files import find_backbone
from mirip_fast.features.recipe import make_recipe
from mirip_fast.finetune.fit import FullFit
from mirip_fast.finetune.fit_parts import Graded, Plan
from mirip_fast.finetune.model import ScoringModel
from mirip_fast.finetune.plan import Sample
from mirip_fast.finetune.prefix import Prefix
from mirip_fast.finetune.strategy import parse_strategy, prepare_model
from mirip_fast.models.head import RankingHead
from mirip_fast.runtime import resolve_device, resolve_precision
from mirip_fast.training.run_folder import Run


class Bench:
    def __init__(self, arguments: argparse.Namespace, scratch: Path):
        self.scratch, self.device = scratch, resolve_device(arguments.device)
        with HashMemory(None) as hashes:
            spec = find_backbone(arguments.backbone, hashes.sha256)
        self.spec, self.batch = spec, arguments.batch_size
        self.precision = resolve_precision("auto", self.device)
        options = EmbedConfig(backbone=arguments.backbone, image_size=arguments.image_size)
        self.recipe = make_recipe(options, spec, self.precision)
        n, size = arguments.images, self.recipe.size
        self.images = torch.randint(0, 256, (n, size, size, 3), dtype=torch.uint8)
        self.tiers = np.arange(n) % 4
        self.runs = 0

    def fit(self, strategy: str, *, kept: bool = False) -> FullFit:
        config = Config(finetune=FinetuneConfig(strategy=strategy, augment="none"))
        config.train.save_every_n_epochs = 0
        head = RankingHead(self.spec.hidden_size, config.head)
        model = ScoringModel(self.spec, load_model(self.spec), head, "cls")
        parsed = parse_strategy(config.finetune, self.spec.num_layers)
        prepare_model(model, parsed, config.finetune)
        model.to(self.device)
        cut = self.spec.num_layers - parsed.blocks
        load = self._tokens(model, cut) if kept else self._pixels
        plan = Plan(1, self.batch, 0, 0, self.precision, self.recipe.size, cut if kept else None)
        train = Graded(self.tiers, -1.0 * self.tiers, [None] * len(self.tiers), None, load)
        return FullFit(model, parsed, train, train, config, plan, {})

    def _pixels(self, lists: Sequence[Sequence[Sample]]) -> Iterator[torch.Tensor]:
        for samples in lists:
            yield self.images[[sample.image for sample in samples]]

    def _tokens(self, model: ScoringModel, cut: int) -> Any:
        prefix = Prefix(model, cut, self.recipe, self.scratch / "cache")
        hashes = [i.to_bytes(32, "big") for i in range(1, len(self.images) + 1)]
        with prefix.store.writer() as writer:
            for i in range(0, len(hashes), 16):
                tokens = prefix._tokens(self.images[i : i + 16])
                writer.append(hashes[i : i + 16], {prefix.spec: tokens})
        prefix.store.refresh()
        return lambda lists: prefix.load(hashes, lists)

    def epoch(self, fit: FullFit) -> tuple[float, float]:
        """Processor and wall seconds of one epoch's training, judging and saving left out."""
        self.runs += 1
        run = Run(self.scratch / f"run-{self.runs}")
        run.path.mkdir()
        self._wait()
        cpu, wall = time.process_time(), time.perf_counter()
        fit._train_epoch(run)
        self._wait()
        fit.now.steps = 0
        return time.process_time() - cpu, time.perf_counter() - wall

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments, Path(folder))
        fits: dict[str, Callable[[], FullFit]] = {"full": lambda: bench.fit("full")}
        for n in arguments.blocks:
            fits[f"last:{n}"] = lambda n=n: bench.fit(f"last:{n}")  # type: ignore[misc]
            fits[f"last:{n} kept"] = lambda n=n: bench.fit(f"last:{n}", kept=True)  # type: ignore[misc]
        made = {name: make() for name, make in fits.items()}
        for fit in made.values():
            bench.epoch(fit)  # warm-up
        rounds = [[bench.epoch(fit) for fit in made.values()] for _ in range(arguments.rounds)]
        seconds = dict(zip(made, np.median(rounds, axis=0), strict=True))
        layers = bench.spec.num_layers
        print(
            f"{arguments.images} images, {bench.recipe.size} pixels, batch {bench.batch}, "
            f"{bench.precision} on {bench.device}, {layers} blocks; medians of {arguments.rounds}"
        )
        whole = seconds["full"]
        for name, (cpu, wall) in seconds.items():
            n = int(name.split(":")[1].split()[0]) if ":" in name else layers
            print(
                f"{name:14} processor {cpu:7.2f} s = {cpu / whole[0]:.3f} of full   wall {wall:7.2f} s = "
                f"{wall / whole[1]:.3f}   N/{layers} = {n / layers:.3f}, ×1.15 = {1.15 * n / layers:.3f}"
            )


if __name__ == "__main__":
    main()
