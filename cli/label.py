"""``mirip-fast label``: judge pairs of works, or grade them, on a local page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mirip_fast.progress import Bar
from mirip_fast.settings import Resolved

from .options import FILE, PATH, command_line, config_options
from .say import echo

if TYPE_CHECKING:
    from mirip_fast.label.server import LabelRun


@click.command("label")
@click.argument("folder", type=PATH)
@click.option(
    "--out", type=FILE,
    help="File of judgements; an existing one is gone on from (default: pairs.csv, grades.csv with --grade).",
)  # fmt: skip
@click.option("--grade", is_flag=True, help="Give each work its tier, instead of comparing works.")
@click.option("--again", is_flag=True, help="With --grade, ask for works that have a tier, too.")
@click.option("--four", is_flag=True, help="Begin with four works at once, to be put in order.")
@click.option(
    "--share", is_flag=True,
    help="Let other computers and phones on the network open the page, too, by the address with its token.",
)  # fmt: skip
@click.option(
    "--checkpoint",
    type=PATH,
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
    out: Path | None,
    grade: bool,
    again: bool,
    four: bool,
    share: bool,
    checkpoint: Path | None,
    port: int,
    no_browser: bool,
) -> None:
    """Judge pairs of the works in FOLDER, or grade them, on a page in the browser.

    ← or → says which work is better, 0 that they are equal, space skips, U takes the last verdict back. Each
    verdict is on the disk in --out before the next pair is shown; `train --pairs` reads that file. The pairs
    shown are those that teach most, with random ones in between that tell how good the head is by now. F
    shows four works at once, which are put in order.

    With --grade one work at a time gets its tier, by the keys 1, 2, 3 … or the tier's first letter; `embed`
    reads --out. Give --judge several times for an address for each judge. L lists what was judged, ? the
    keys.

    The page is for this machine only, unless --share says otherwise. Ctrl-C ends it.
    """
    from mirip_fast.label.server import LabelRun
    from mirip_fast.serving import require_packages

    require_packages("label")
    if again and not grade:
        raise click.UsageError("--again is only valid with --grade")
    if four and grade:
        raise click.UsageError(
            "--four compares works and --grade gives each its tier: give one of both"
        )
    out = out or Path("grades.csv" if grade else "pairs.csv")

    with Bar(" images") as bar:
        opened = LabelRun(
            folder, out, resolved,
            checkpoint=checkpoint, port=port, grade=grade, again=again, four=four, share=share,
            command=command_line(), progress=bar.embedding,
        )  # fmt: skip
    with opened as label:
        if share:
            echo(
                "Warning: whoever on the network has an address can see all works and judge in that name; "
                "what is sent is not encrypted. Use it in a network that you trust.",
                err=True,
            )
        for session, address in zip(label.sessions, label.addresses, strict=True):
            who = f" ({session.judge_name})" if len(label.sessions) > 1 else ""
            echo(f"Judge here{who}: {address}")
        echo("Ctrl-C ends it; every verdict is saved at once.")
        if not no_browser and len(label.sessions) == 1:
            click.launch(label.server.address)
        label.server.run()
        _say(label)


def _say(label: LabelRun) -> None:
    from mirip_fast.label.grading import GradeFile
    from mirip_fast.label.session import Session, consistency, pair_agreement, predicted, share
    from mirip_fast.text import counted, shown

    made = sum(session.made_now for session in label.sessions)
    echo(
        f"{counted(made, 'judgement')} made now, {len(label.file.rows):,} in all: {shown(label.file.path)}"
    )
    for session in label.sessions:
        if not isinstance(session, Session):
            continue
        who = f"{session.judge_name}: " if len(label.sessions) > 1 else ""
        hits = [hit for _, hit in predicted(session.judgements, measure=True)]
        if hits:
            told = _told(share(sum(hits), len(hits)))
            echo(f"{who}Random pairs predicted before they were judged: {told}")
        again = consistency(session.judgements)
        if again["count"]:
            echo(f"{who}Same verdict when asked again: {_told(again)}")
    if isinstance(label.file, GradeFile):
        agreed = label.file.agreement()
        if agreed is not None:
            echo(agreed.to_line())
    else:
        for two in pair_agreement(label.session.by_all):
            told = _told(two) if two["count"] else "no pair was judged by both"
            echo(f"Same verdict by {two['first']} and {two['second']}: {told}")
    if label.file.rows:
        echo(f"Next: {label.next_command()}")


def _told(of: dict[str, Any]) -> str:
    return (
        f"{of['value']:.0%} ({of['hits']} of {of['count']}, 95 % interval {of['low']:.0%} – "
        f"{of['high']:.0%})"
    )
