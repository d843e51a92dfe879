"""``mirip-fast embed``: phase one."""

from __future__ import annotations

from pathlib import Path

import click

from mirip_fast.config import Resolved

from .options import command_line, config_options
from .progress import EmbedBar


@click.command("embed")
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "--limit", type=click.IntRange(min=1), help="Embed the first N images only, as a trial."
)
@click.option("--rehash", is_flag=True, help="Read every file again instead of trusting its time.")
@click.option("--strict", is_flag=True, help="Exit with status 1 if any image failed.")
@config_options("embed", "data", "runtime")
def embed_command(
    resolved: Resolved, data: Path, limit: int | None, rehash: bool, strict: bool
) -> int:
    """Compute the features of every image in DATA once, and keep them.

    DATA is a folder with images/ and metadata.csv, any folder of images, a folder per tier, or a CSV file.
    """
    from mirip_fast.features.command import embed_data

    with EmbedBar() as bar:
        done = embed_data(
            data,
            resolved.config,
            limit=limit,
            rehash=rehash,
            command=command_line(),
            progress=bar,
        )
    s = done.summary
    click.echo(
        f"{s.inputs} images = {s.embedded} embedded + {s.present} already there + "
        f"{s.duplicate} duplicates + {s.failed} failed, in {s.seconds:.1f} s"
    )
    if s.embedded:
        click.echo(f"{s.embedded / done.compute_seconds:.1f} images/s")
    click.echo(f"Features: {done.dataset.store_path}")
    if s.failed:
        click.echo(f"Failures: {done.dataset.failures_csv}")
    return 1 if strict and s.failed else 0
