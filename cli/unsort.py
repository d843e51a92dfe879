"""``mirip-fast unsort``: what ``rank --sort-into`` did is undone."""

from __future__ import annotations

from pathlib import Path

import click

from .options import PATH
from .say import echo


@click.command("unsort")
@click.argument("log", type=PATH, metavar="LOG")
def unsort_command(log: Path) -> int:
    """Undo `rank --sort-into DIR`: moved files go back, copies and links are taken away.

    LOG is DIR, or the file sorted.jsonl in it, which also tells of a sorting that was cut off. A file that
    was changed since is left and named, with exit status 1. The log is called ….undone afterwards.
    """
    from mirip_fast.portfolio.sort_into import undo
    from mirip_fast.text import counted

    undone, left = undo(log)
    echo(f"{counted(undone, 'file')} put back or taken away")
    for path, why in left:
        echo(f"Left as it is: {path}: {why}", err=True)
    return 1 if left else 0
