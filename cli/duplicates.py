"""``mirip-fast duplicates``: works that occur more than once."""

from __future__ import annotations

from pathlib import Path

import click

from mirip_fast.progress import Bar
from mirip_fast.settings import Resolved
from mirip_fast.text import counted, shown

from .options import FILE, PATH, command_line, config_options
from .say import echo


@click.command("duplicates")
@click.argument("folders", type=PATH, nargs=-1)
@click.option(
    "--cache",
    "caches",
    type=PATH,
    multiple=True,
    help="Compare with the works of another cache, too.",
)
@click.option(
    "--top", type=click.IntRange(min=0), default=20, show_default=True, help="Groups shown."
)
@click.option(
    "--out",
    type=FILE,
    default=Path("duplicates.csv"),
    show_default=True,
    help="CSV file to write.",
)
@click.option("--rehash", is_flag=True, help="Read every file again instead of trusting its time.")
@config_options("audit.near_cosine", "embed", "data", "runtime")
def duplicates_command(
    resolved: Resolved,
    folders: tuple[Path, ...],
    caches: tuple[Path, ...],
    top: int,
    out: Path,
    rehash: bool,
) -> None:
    """Find equal files and near duplicates in FOLDERS (default: all works in the cache).

    What is not embedded yet is embedded as the newest data set of the cache was, or as --backbone and its
    options say. Distance is 1 − cosine of the CLS features; 0 is the same.
    """
    from mirip_fast.evaluation.text_table import format_table
    from mirip_fast.portfolio.similar import find_duplicates, write_duplicates

    with Bar(" images") as bar:
        copies, searched, failures = find_duplicates(
            folders, resolved.config,
            caches=caches, backbone_given="embed.backbone" in resolved.given, rehash=rehash,
            command=command_line(), progress=bar.embedding,
        )  # fmt: skip
    rows = [
        (
            row["group"],
            "exact" if row["exact"] else "near",
            f"{row['distance']:.4f}",
            shown(row["file"]),
        )
        for row in copies[copies["group"] <= top].to_dict("records")
    ]
    if rows:
        echo(format_table(("group", "kind", "distance", "file"), rows, align="rlrl"))
    groups = copies["group"].nunique()
    if groups > top:
        echo(f"… and {groups - top} more groups in {out}")
    extra = counted(len(copies) - groups, "file")
    echo(f"{counted(searched, 'file')}: {counted(groups, 'group')}, {extra} more than works")
    write_duplicates(out, copies)
    echo(f"Written: {out}")
    for path, reason in failures[:10]:
        echo(f"Not compared: {path}: {reason}", err=True)
    if len(failures) > 10:
        echo(f"… and {len(failures) - 10} more", err=True)
