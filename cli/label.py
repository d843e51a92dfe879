"""``mirip-fast label``: judge pairs of works on a local page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mirip_fast.settings import Resolved

from .options import command_line, config_options
from .progress import Bar

if TYPE_CHECKING:
    from mirip_fast.label.command import Ended
    from mirip_fast.label.figures import Share

_PATH = click.Path(path_type=Path)


@click.command("label")
@click.argument("folder", type=_PATH)
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), default=Path("pairs.csv"), show_default=True,
    help="File of judgements; an existing one is gone on from.",
)  # fmt: skip
@click.option(
    "--checkpoint",
    type=_PATH,
    help="Run to begin with (default: the newest one that fits, if any).",
)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=0, help="Port (default: any that is free)."
)
@click.option("--no-browser", is_flag=True, help="Print the page's address without opening it.")
@config_options("label", "embed", "split", "data", "train.output_dir", "train.seed", "runtime")
def label_command(
    resolved: Resolved,
    folder: Path,
    out: Path,
    checkpoint: Path | None,
    port: int,
    no_browser: bool,
) -> None:
    """Judge pairs of the works in FOLDER on a page in the browser, and have the head learn from it.

    ← or → says which work is better, 0 that they are equal, space skips, U takes the last verdict back. Each
    verdict is on the disk in --out before the next pair is shown; `train --pairs` reads that file. The pairs
    shown are those that teach most, with random ones in between that tell how good the head is by now.

    The page is for this machine only. Ctrl-C ends it.
    """
    from mirip_fast.label.server import require_packages

    require_packages()
    from mirip_fast.label.command import open_label

    with Bar(" images") as bar:
        opened = open_label(
            folder, out, resolved,
            checkpoint=checkpoint, port=port, command=command_line(), progress=bar.embedding,
        )  # fmt: skip
    with opened as label:
        click.echo(
            f"Judge here: {label.server.address}\nCtrl-C ends it; every verdict is saved at once."
        )
        if not no_browser:
            click.launch(label.server.address)
        label.server.run()
        _say(label.ended())


def _say(ended: Ended) -> None:
    from mirip_fast.data.csv_reader import counted, shown

    click.echo(
        f"{counted(ended.made, 'judgement')} made now, {ended.judged:,} in all: {shown(ended.file)}"
    )
    if ended.accuracy.count:
        click.echo(f"Random pairs predicted before they were judged: {_share(ended.accuracy)}")
    if ended.consistency.count:
        click.echo(f"Same verdict when asked again: {_share(ended.consistency)}")
    if ended.judged:
        click.echo(f"Next: {ended.next_command}")


def _share(share: Share) -> str:
    low, high = share.interval or (0.0, 1.0)
    return f"{share.value or 0:.0%} ({share.hits} of {share.count}, 95 % interval {low:.0%} – {high:.0%})"
