"""``mirip-fast rank``: a portfolio sorted by score."""

from __future__ import annotations

from pathlib import Path

import click

from mirip_fast.config import Resolved

from .options import command_line, config_options, moved_backbone
from .progress import EmbedBar

_PATH = click.Path(path_type=Path)


@click.command("rank")
@click.argument("folder", type=_PATH)
@click.option(
    "--checkpoint", type=_PATH, help="Run or .pt file (default: the newest finished run)."
)
@click.option("--top", type=click.IntRange(min=1), help="Show the best N only; the files have all.")
@click.option(
    "--out", type=_PATH, default=Path(), help="Folder for ranking.csv and .json (default: here)."
)
@click.option("--rehash", is_flag=True, help="Read every file again instead of trusting its time.")
@click.option("--strict", is_flag=True, help="Exit with status 1 if any image failed.")
@moved_backbone
@config_options(
    "train.output_dir",
    "embed.cache_dir",
    "embed.embed_batch_size",
    "embed.workers",
    "data.id_column",
    "data.image_column",
    "data.image_root",
    "data.separator",
    "data.encoding",
    "runtime",
)
def rank_command(
    resolved: Resolved,
    folder: Path,
    checkpoint: Path | None,
    backbone: str | None,
    top: int | None,
    out: Path,
    rehash: bool,
    strict: bool,
) -> int:
    """Sort the images in FOLDER by score, best first."""
    from mirip_fast.portfolio.rank import rank_folder
    from mirip_fast.portfolio.ranking import ranking_table
    from mirip_fast.ranking.judge import pick_model

    model = pick_model(checkpoint, Path(resolved.config.train.output_dir))
    with EmbedBar() as bar:
        done = rank_folder(
            model, folder, resolved.config, out,
            backbone=backbone, rehash=rehash, command=command_line(), progress=bar,
        )  # fmt: skip
    click.echo(ranking_table(done.ranking[:top]))
    if top is not None and top < len(done.ranking):
        click.echo(f"… and {len(done.ranking) - top} more in {done.files[0]}")
    click.echo("Written: " + ", ".join(str(path) for path in done.files))
    for path, reason in done.failures[:10]:
        click.echo(f"Not ranked: {path}: {reason}", err=True)
    if len(done.failures) > 10:
        click.echo(f"… and {len(done.failures) - 10} more in failures.csv", err=True)
    return 1 if strict and done.failures else 0
