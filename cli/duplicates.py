"""``mirip-fast duplicates``: works that occur more than once."""

from __future__ import annotations

from pathlib import Path

import click

from mirip_fast.progress import Bar
from mirip_fast.settings import Resolved
from mirip_fast.text import counted

from .options import command_line, config_options
from .say import echo

_PATH = click.Path(path_type=Path)


@click.command("duplicates")
@click.argument("folders", type=_PATH, nargs=-1)
@click.option(
    "--cache",
    "caches",
    type=_PATH,
    multiple=True,
    help="Compare with the works of another cache, too.",
)
@click.option(
    "--top", type=click.IntRange(min=0), default=20, show_default=True, help="Groups shown."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
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
        done = find_duplicates(
            folders, resolved.config,
            caches=caches, backbone_given="embed.backbone" in resolved.given, rehash=rehash,
            command=command_line(), progress=bar.embedding,
        )  # fmt: skip
    rows = [
        (
            number,
            "exact" if copy.exact else "near",
            f"{copy.distance:.4f}",
            _shown(copy.work.path),
        )
        for number, group in enumerate(done.groups[:top], start=1)
        for copy in group
    ]
    if rows:
        echo(format_table(("group", "kind", "distance", "file"), rows, align="rlrl"))
    if len(done.groups) > top:
        echo(f"… and {len(done.groups) - top} more groups in {out}")
    extra = sum(len(group) - 1 for group in done.groups)
    files, groups = counted(done.searched, "file"), counted(len(done.groups), "group")
    echo(f"{files}: {groups}, {counted(extra, 'file')} more than works")
    write_duplicates(out, done.groups)
    echo(f"Written: {out}")
    for path, reason in done.failures[:10]:
        echo(f"Not compared: {path}: {reason}", err=True)
    if len(done.failures) > 10:
        echo(f"… and {len(done.failures) - 10} more", err=True)


def _shown(path: Path) -> str:
    from mirip_fast.text import shown

    return shown(path)
