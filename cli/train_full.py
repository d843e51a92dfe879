"""``mirip-fast train --full``: end to end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mirip_fast.config import Resolved
from mirip_fast.errors import MiripError

from .interrupted import Interrupted

if TYPE_CHECKING:
    from mirip_fast.ranking.fit import FitResult
    from mirip_fast.training.run_folder import Run

#: Exit status of a run that a signal stopped and that is to be resumed (EX_TEMPFAIL of sysexits.h).
PREEMPTED = 75


def run_full(resolved: Resolved, data: Path | None, resume: str | None, debug: bool) -> int:
    """Train, or go on with a run, and tell how it ended; returns the exit status."""
    from mirip_fast.finetune.fit_parts import PreemptedError
    from mirip_fast.finetune.peers import told_elsewhere
    from mirip_fast.finetune.train import FullRequest, resume_full, train_full
    from mirip_fast.runtime import rank

    config = resolved.config
    go_on = "`mirip-fast train --full --resume latest` goes on from there."
    try:
        if resume:
            run, result = resume_full(resume, Path(config.train.output_dir), config.runtime.device)
        else:
            run, result = train_full(config, FullRequest(data, debug, resolved.given))
    except KeyboardInterrupt:
        raise Interrupted(go_on) from None
    except PreemptedError as error:
        if rank() == 0:
            click.echo(f"{error} {go_on}", err=True)
        return PREEMPTED
    except MiripError as error:
        if told_elsewhere(error):
            return 1
        raise
    if rank() == 0:
        _say_result(run, result, debug)
    return 0


def _say_result(run: Run, result: FitResult, debug: bool) -> None:
    why = "no better epoch for a while" if result.stopped_early else "all epochs done"
    click.echo(
        f"Finished after {result.epochs} epochs in {result.seconds:.1f} s ({why}). "
        f"Best: epoch {result.best_epoch}, validation pairwise accuracy {result.best_accuracy:.4f}"
    )
    click.echo(f"Run: {run.path}")
    if not debug:
        click.echo("Next: mirip-fast evaluate, or mirip-fast rank FOLDER")
