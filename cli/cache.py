"""``mirip-fast cache``: what is in the feature stores, and whether it is whole."""

from __future__ import annotations

from pathlib import Path

import click

from mirip_fast.config import Resolved

from .options import config_options


@click.group("cache")
def cache_command() -> None:
    """Look after the feature stores."""


@cache_command.command("info")
@config_options("embed.cache_dir")
def info_command(resolved: Resolved) -> None:
    """List stores, series, rows, sizes and data sets."""
    from mirip_fast.evaluation.text_table import format_table
    from mirip_fast.features.inspect import describe_stores
    from mirip_fast.files import format_bytes

    for store in describe_stores(Path(resolved.config.embed.cache_dir)):
        click.echo(f"{store.path}  ({', '.join(store.backbones) or 'no data set'})")
        rows = [
            (s.name, s.shape, s.dtype, s.rows, s.free, format_bytes(s.bytes)) for s in store.series
        ]
        header = ("series", "row", "format", "rows", "free slots", "on disk")
        click.echo(format_table(header, rows, align="lllrrr"))
        for dataset in store.datasets:
            click.echo(f"  {dataset}")


@cache_command.command("verify")
@config_options("embed.cache_dir")
def verify_command(resolved: Resolved) -> int:
    """Check every stored row against its checksum; exit with status 1 if one is damaged."""
    from mirip_fast.features.inspect import damaged_rows

    checked, damaged = damaged_rows(Path(resolved.config.embed.cache_dir))
    for row in damaged:
        click.echo(f"Damaged: {row.shard} row {row.slot} (image {row.sha256.hex()[:16]})")
    click.echo(f"{checked} rows checked, {len(damaged)} damaged")
    if damaged:
        click.echo(
            "Run `mirip-fast embed` on their data again: exactly these rows are computed anew."
        )
    return 1 if damaged else 0
