"""``mirip-fast benchmark``: this machine against the requirements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mirip_fast.errors import MiripError
from mirip_fast.settings import Resolved

from .options import config_options
from .say import echo


@click.command("benchmark")
@click.option("--pairs-per-step", type=click.IntRange(1),
              help="Pairs of the measured training step [default: 32 on a GPU, 2 on a CPU].")  # fmt: skip
@click.option("--images", type=click.IntRange(100), default=10_000, show_default=True,
              help="Cached rows that the head is trained on.")  # fmt: skip
@config_options("embed.backbone", "embed.image_size", "train.output_dir", "runtime")
def benchmark_command(resolved: Resolved, pairs_per_step: int | None, images: int) -> None:
    """Measure time and memory of all paths: cached features, images through a frozen backbone, fine-tuning.

    The backbone is that of the newest run, unless --backbone names another one.
    """
    from mirip_fast.evaluation.benchmark import REQUIRED_BATCH, PerformanceBenchmarks
    from mirip_fast.evaluation.text_table import format_table
    from mirip_fast.finetune.benchmark import finetune_benchmark
    from mirip_fast.finetune.train import EPOCHS
    from mirip_fast.models.ranking_model import PairwiseRankingModel
    from mirip_fast.ranking.benchmark import cached_benchmark, looks_through, measured_accuracy
    from mirip_fast.runtime import resolve_device

    config = resolved.config
    device = resolve_device(config.runtime.device)
    pairs_per_step = pairs_per_step or (2 if device.type == "cpu" else REQUIRED_BATCH)
    accuracy, source = measured_accuracy(Path(config.train.output_dir))
    embed = config.embed
    own = {k for k in resolved.given if k in ("embed.backbone", "embed.image_size")}
    if "embed.backbone" not in own:
        found = looks_through(Path(config.train.output_dir))
        if found is not None:
            embed.backbone = found.backbone
            embed.image_size = embed.image_size if own else found.image_size
    model = PairwiseRankingModel(embed.backbone)
    spec = model.spec
    cached = cached_benchmark(
        device, input_dim=model.spec.hidden_size, images=images, accuracy=accuracy
    )
    whole = PerformanceBenchmarks(
        model, device, image_size=config.embed.image_size, batch_size=pairs_per_step
    ).run_full_benchmark()
    del model
    tuned: dict[str, Any] = {}
    try:
        tuned = finetune_benchmark(
            spec, device,
            image_size=embed.image_size, batch_size=min(REQUIRED_BATCH, 2 * pairs_per_step),
        )  # fmt: skip
        step = f"{tuned['step_seconds']:.2f} s per step of {tuned['images_per_step']} images"
        if tuned["images_at_once"] < tuned["images_per_step"]:
            step += f" (memory allows {tuned['images_at_once']} at once)"
        step += f", {EPOCHS} epochs; reading and augmenting images not counted."
    except (
        MiripError
    ) as error:  # a backbone that cannot be fine-tuned, or too little memory for one image
        step = f"not measured: {error}"
    rows = [
        (
            f"{name} ({need})",
            *(_cell(report, key, check, form) for report in (cached, whole, tuned)),
        )
        for name, need, key, check, form in _ROWS
    ]
    echo(
        format_table(
            ("figure (required)", "cached features", "images, frozen backbone", "fine-tuning"),
            rows,
            "lrrr",
        )
    )
    echo(f"On {whole['device']}, {config.embed.backbone} at {config.embed.image_size} pixels.")
    echo(
        f"Memory: {whole['memory_kind']}, {pairs_per_step} pairs per step (required at {REQUIRED_BATCH})."
    )
    echo("Training time: reckoned for 10,000 images and all epochs from the measured steps.")
    echo(f"Fine-tuning (`train --full`): {step}")
    echo(f"Accuracy: {source}")


_ROWS = (
    ("ms per pair", "< 100", "inference_time_ms", "meets_inference_requirement", ".2f"),
    ("memory, GB", "< 12", "memory_usage_gb", "meets_memory_requirement", ".2f"),
    ("training, hours", "< 6", "training_hours_per_10k", "meets_training_requirement", ".3f"),
    ("pairwise accuracy", ">= 0.60", "accuracy", "meets_accuracy_requirement", ".3f"),
)


def _cell(report: dict[str, Any], key: str, check: str, form: str) -> str:
    if report.get(key) is None:
        return "not measured"
    verdict = {True: "met", False: "NOT met", None: "not judged"}[report[check]]
    return f"{report[key]:{form}} {verdict}"
