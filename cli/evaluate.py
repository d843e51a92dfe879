"""``mirip-fast evaluate``: how good a model is on images it has not seen."""

from __future__ import annotations

from pathlib import Path

import click

from mirip_fast.config import Resolved

from .options import config_options, moved_backbone
from .progress import EmbedBar

_PATH = click.Path(path_type=Path)


@click.command("evaluate")
@click.option(
    "--checkpoint", type=_PATH, help="Run or .pt file (default: the newest finished run)."
)
@click.option(
    "--test-data", type=_PATH, help="CSV file of graded images (default: the run's test split)."
)
@click.option("--image-dir", type=_PATH, help="Folder that --test-data's files are relative to.")
@click.option(
    "--split", type=click.Choice(["train", "val", "test"]), default="test", show_default=True
)
@click.option("--out", type=_PATH, help="JSON file to write (default: in the run's folder).")
@moved_backbone
@config_options(
    "evaluate",
    "data",
    "train.output_dir",
    "embed.cache_dir",
    "embed.embed_batch_size",
    "embed.workers",
    "runtime",
)
def evaluate_command(
    resolved: Resolved,
    checkpoint: Path | None,
    backbone: str | None,
    test_data: Path | None,
    image_dir: Path | None,
    split: str,
    out: Path | None,
) -> None:
    """Judge a model: pairwise accuracy with its 95 % interval, per tier pair, and more."""
    from mirip_fast.ranking.judge import judge_files, judge_split, pick_model

    config = resolved.config
    model = pick_model(checkpoint, Path(config.train.output_dir))
    if test_data is None:
        report, path = judge_split(model, split, config)
    else:
        with EmbedBar() as bar:
            report, path = judge_files(model, test_data, image_dir, config, backbone, bar)
    click.echo(report.to_table())
    path = out or path
    from mirip_fast.files import write_json

    write_json(path, {"checkpoint": str(model.checkpoint), **report.to_dict()})
    click.echo(f"Written: {path}")
