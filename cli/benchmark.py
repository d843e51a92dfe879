"""``mirip-fast benchmark``: this machine against the requirements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mirip_fast.settings import Resolved

from .options import config_options


@click.command("benchmark")
@click.option("--pairs-per-step", type=click.IntRange(1),
              help="Pairs of the measured training step [default: 32 on a GPU, 2 on a CPU].")  # fmt: skip
@click.option("--images", type=click.IntRange(100), default=10_000, show_default=True,
              help="Cached rows that the head is trained on.")  # fmt: skip
@config_options("embed.backbone", "embed.image_size", "train.output_dir", "runtime")
def benchmark_command(resolved: Resolved, pairs_per_step: int | None, images: int) -> None:
    """Measure time and memory of both paths: from cached features, and from images."""
    from mirip_fast.evaluation.benchmark import REQUIRED_BATCH, PerformanceBenchmarks
    from mirip_fast.evaluation.text_table import format_table
    from mirip_fast.models.ranking_model import PairwiseRankingModel
    from mirip_fast.ranking.benchmark import cached_benchmark, measured_accuracy
    from mirip_fast.runtime import resolve_device

    config = resolved.config
    device = resolve_device(config.runtime.device)
    pairs_per_step = pairs_per_step or (2 if device.type == "cpu" else REQUIRED_BATCH)
    accuracy, source = measured_accuracy(Path(config.train.output_dir))
    model = PairwiseRankingModel(config.embed.backbone)
    cached = cached_benchmark(
        device, input_dim=model.spec.hidden_size, images=images, accuracy=accuracy
    )
    whole = PerformanceBenchmarks(
        model, device, image_size=config.embed.image_size, batch_size=pairs_per_step
    ).run_full_benchmark()
    rows = [
        (f"{name} ({need})", *(_cell(report, key, check, form) for report in (cached, whole)))
        for name, need, key, check, form in _ROWS
    ]
    click.echo(
        format_table(("figure (required)", "cached features", "images, end to end"), rows, "lrr")
    )
    click.echo(
        f"On {whole['device']}, {config.embed.backbone} at {config.embed.image_size} pixels."
    )
    click.echo(
        f"Memory: {whole['memory_kind']}, {pairs_per_step} pairs per step (required at {REQUIRED_BATCH})."
    )
    click.echo("Training time: reckoned for 10,000 images and all epochs from the measured steps.")
    click.echo(f"Accuracy: {source}")


_ROWS = (
    ("ms per pair", "< 100", "inference_time_ms", "meets_inference_requirement", ".2f"),
    ("memory, GB", "< 12", "memory_usage_gb", "meets_memory_requirement", ".2f"),
    ("training, hours", "< 6", "training_hours_per_10k", "meets_training_requirement", ".3f"),
    ("pairwise accuracy", ">= 0.60", "accuracy", "meets_accuracy_requirement", ".3f"),
)


def _cell(report: dict[str, Any], key: str, check: str, form: str) -> str:
    if report[key] is None:
        return "not measured"
    verdict = {True: "met", False: "NOT met", None: "not judged"}[report[check]]
    return f"{report[key]:{form}} {verdict}"
