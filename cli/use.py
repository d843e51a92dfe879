"""``mirip-fast use``: the run that commands take where none is named."""

from __future__ import annotations

from pathlib import Path

import click

from mirip_fast.settings import Resolved

from .options import PATH, config_options
from .say import echo


@click.command("use")
@click.argument("run", required=False, type=PATH)
@click.option("--newest", is_flag=True, help="Go back to the newest finished run.")
@config_options("train.output_dir")
def use_command(resolved: Resolved, run: Path | None, newest: bool) -> None:
    """Name the RUN that rank, evaluate and the others use from now on; without RUN, show which one it is.

    Training goes on to make new runs, and none of them takes its place until it is named here.
    """
    from mirip_fast.training.run_folder import default_run, run_in_use, use_run

    if newest and run:
        raise click.UsageError("RUN and --newest: give one")
    output_dir = Path(resolved.config.train.output_dir)
    if newest or run:
        use_run(output_dir, run)
    named = run_in_use(output_dir)
    how = "in use" if named else "the newest finished run (none is named)"
    echo(f"{(named or default_run(output_dir)).path}: {how}")
