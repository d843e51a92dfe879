"""``mirip-fast demo``: the whole tool on generated pictures, without a download."""

from __future__ import annotations

import os
import time
from pathlib import Path

import click

_COMMANDS = (
    ("embed", "data", "--backbone", "tiny-random", "--image-size", "224"),
    ("train", "--head-only", "--name", "demo"),
    ("evaluate",),
    ("rank", "portfolio", "--html", "report.html"),
)


@click.command("demo")
@click.argument("folder", type=click.Path(path_type=Path), default=Path("demo"))
@click.pass_context
def demo_command(context: click.Context, folder: Path) -> None:
    """Make a small sample portfolio in FOLDER and run embed, train, evaluate and rank on it.

    Uses the built-in untrained backbone: it shows how the tool works, not what it can do. FOLDER/report.html
    is the page to look at.
    """
    from mirip_fast.data.sample import make_portfolio, make_sample
    from mirip_fast.errors import DataError

    if folder.exists() and any(folder.iterdir()) and not (folder / "data").is_dir():
        raise DataError(
            f"{folder} holds something else; give another folder: mirip-fast demo FOLDER"
        )
    started = time.monotonic()
    click.echo(f"Drawing sample pictures in {folder}/data and {folder}/portfolio …")
    click.echo(
        "The better the tier, the cleaner the colours and the less noise: even an untrained backbone tells\n"
        "these apart, so the accuracy below is high. It says nothing about works that people graded."
    )
    make_sample(folder / "data")
    make_portfolio(folder / "portfolio")
    group = context.find_root().command
    before = Path.cwd()
    os.chdir(folder)
    try:
        for arguments in _COMMANDS:
            click.secho(f"\n$ mirip-fast {' '.join(arguments)}", bold=True)
            group.main(list(arguments), prog_name="mirip-fast", standalone_mode=False)
    finally:
        os.chdir(before)
    click.echo(f"\nThe demo took {time.monotonic() - started:.0f} s. Everything is in {folder}/.")
    click.echo(f"Look at the sorted pictures: open {folder}/report.html in a browser.")
    click.echo(
        "Go on with your own works: mirip-fast embed YOUR_FOLDER, in a folder of your choice."
    )
