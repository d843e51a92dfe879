"""``mirip-fast compare``: two works against each other."""

from __future__ import annotations

from pathlib import Path

import click

from mirip_fast.config import Resolved

from .options import command_line, config_options, moved_backbone

_PATH = click.Path(path_type=Path)


@click.command("compare")
@click.argument("first", type=_PATH)
@click.argument("second", type=_PATH)
@click.option(
    "--checkpoint", type=_PATH, help="Run or .pt file (default: the newest finished run)."
)
@moved_backbone
@config_options("train.output_dir", "embed.cache_dir", "runtime")
def compare_command(
    resolved: Resolved, first: Path, second: Path, checkpoint: Path | None, backbone: str | None
) -> None:
    """Say which of two images scores higher, and by how much."""
    from mirip_fast.evaluation.text_table import format_table
    from mirip_fast.portfolio.rank import compare_images
    from mirip_fast.ranking.judge import pick_model

    model = pick_model(checkpoint, Path(resolved.config.train.output_dir))
    scores = compare_images(
        model, [first, second], resolved.config,
        backbone=backbone, command=command_line(),
    )  # fmt: skip
    rows = [(f"{score:.4f}", path) for score, path in zip(scores, (first, second), strict=True)]
    click.echo(format_table(("score", "file"), rows, align="rl"))
    if scores[0] == scores[1]:
        click.echo("A tie: both score the same")
    else:
        winner = first if scores[0] > scores[1] else second
        click.echo(f"Winner: {winner} (margin {abs(scores[0] - scores[1]):.4f})")
