"""``mirip-fast label``: judge pairs of works on a local page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mirip_fast.progress import Bar
from mirip_fast.settings import Resolved

from .options import command_line, config_options

if TYPE_CHECKING:
    from mirip_fast.label.server import LabelRun

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
    from mirip_fast.label.server import open_label
    from mirip_fast.serving import require_packages

    require_packages("label")

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
        _say(label)


def _say(label: LabelRun) -> None:
    from mirip_fast.data.csv_reader import counted, shown
    from mirip_fast.label.session import consistency, predicted, share

    session, judged = label.session, label.session.judgements
    click.echo(
        f"{counted(session.made_now, 'judgement')} made now, {len(judged):,} in all: "
        f"{shown(label.file.path)}"
    )
    hits = [hit for _, hit in predicted(judged, measure=True)]
    if hits:
        told = _told(share(sum(hits), len(hits)))
        click.echo(f"Random pairs predicted before they were judged: {told}")
    again = consistency(judged)
    if again["count"]:
        click.echo(f"Same verdict when asked again: {_told(again)}")
    if judged:
        click.echo(f"Next: {label.next_command()}")


def _told(of: dict[str, Any]) -> str:
    return (
        f"{of['value']:.0%} ({of['hits']} of {of['count']}, 95 % interval {of['low']:.0%} – "
        f"{of['high']:.0%})"
    )
