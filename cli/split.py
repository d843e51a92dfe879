"""``mirip-fast split``: train, val and test CSV files."""

from __future__ import annotations

from pathlib import Path

import click

from mirip_fast.settings import Resolved

from .options import FOLDER, PATH, config_options
from .say import echo


@click.command("split")
@click.argument("data", type=PATH)
@click.option("--out", type=FOLDER, help="Folder for the files (default: DATA).")
@config_options("split", "data", "embed.cache_dir", split_seed="--seed")
def split_command(resolved: Resolved, data: Path, out: Path | None) -> None:
    """Divide graded images into train, val and test, stratified by tier.

    Groups and exact duplicates stay together. Writes train_metadata.csv, val_metadata.csv and
    test_metadata.csv.
    """
    from mirip_fast.evaluation.text_table import format_table
    from mirip_fast.ranking.graded import write_split_files

    divided, files = write_split_files(data, resolved.config, out)
    tiers = list(divided.manifest.tiers)
    shares = divided.shares()
    rows = [
        (name, divided.assignment.count(name), *(f"{share.get(t, 0):.1%}" for t in tiers))
        for name, share in shares.items()
    ]
    echo(format_table(("split", "images", *tiers), rows, align="lr" + "r" * len(tiers)))
    echo(f"Tier shares are within {divided.deviation():.1f} points of the whole.")
    echo("Written: " + ", ".join(str(path) for path in files))
