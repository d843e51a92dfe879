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
    from mirip_fast.data.splits import deviation, tier_shares
    from mirip_fast.evaluation.text_table import format_table
    from mirip_fast.ranking.graded import write_split_files

    divided, files = write_split_files(data, resolved.config, out)
    tiers, counts = divided.tiers, divided.table["split"].value_counts()
    rows = [
        (name, counts[name], *(f"{share:.1%}" for share in shares))
        for name, *shares in tier_shares(divided).itertuples()
    ]
    echo(format_table(("split", "images", *tiers), rows, align="lr" + "r" * len(tiers)))
    echo(f"Tier shares are within {deviation(divided):.1f} points of the whole.")
    echo("Written: " + ", ".join(str(path) for path in files))
