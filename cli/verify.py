"""``mirip-fast verify``: whether the files of runs are still what was written."""

from __future__ import annotations

from pathlib import Path

import click

from mirip_fast.evaluation.text_table import printable
from mirip_fast.settings import Resolved
from mirip_fast.text import counted

from .options import PATH, config_options
from .say import echo


@click.command("verify")
@click.argument("runs", metavar="[RUN…]", nargs=-1, type=PATH)
@click.option(
    "--accept",
    is_flag=True,
    help="Take the files of these runs as they are: list their checksums anew.",
)
@config_options("train.output_dir")
def verify_command(resolved: Resolved, runs: tuple[Path, ...], accept: bool) -> int:
    """Check the files of runs against the checksums of what was written (caches: `cache verify`).

    Without RUN every run below --output-dir is checked. Exits with status 1 if a file is damaged, changed or
    gone. A run of before there were checksums has none to compare with, until --accept lists them.
    """
    from mirip_fast.training.run_folder import accept_files, run_folders, verify_run

    if accept and not runs:
        raise click.UsageError("--accept: name the runs whose files are to be taken as they are")
    damaged = 0
    for folder in runs or run_folders(Path(resolved.config.train.output_dir)):
        if accept:
            accept_files(folder)
        for part, (files, faults) in verify_run(folder).items():
            for fault in faults:
                echo(f"Damaged: {printable(fault)}")
            damaged += len(faults)
            state = f"{len(faults)} damaged or gone" if faults else "whole"
            if not files and not faults:
                echo(
                    f"{printable(str(part))}: no checksums (an older version made it); --accept lists its "
                    "files as they are"
                )
            else:
                echo(f"{printable(str(part))}: {counted(files, 'file')} checked, {state}")
    return 1 if damaged else 0
