"""``mirip-fast train --full``: end to end."""

from __future__ import annotations

from pathlib import Path

import click

from mirip_fast.errors import MiripError, PreemptedError
from mirip_fast.settings import Resolved

from .interrupted import Interrupted
from .train_result import how_to_go_on, say_result

#: Exit status of a run that a signal stopped and that is to be resumed (EX_TEMPFAIL of sysexits.h).
PREEMPTED = 75


def run_full(
    resolved: Resolved,
    data: Path | None,
    resume: str | None,
    only_folds: tuple[int, ...],
    debug: bool,
) -> int:
    """Train, or go on with a run, and tell how it ended; returns the exit status."""
    from mirip_fast.finetune.distributed import told_elsewhere
    from mirip_fast.finetune.train import FullRequest, resume_full, train_full
    from mirip_fast.runtime import rank

    config = resolved.config
    output_dir = Path(config.train.output_dir)
    try:
        if resume:
            run, result = resume_full(resume, output_dir, config.runtime.device, only_folds)
        else:
            request = FullRequest(data, debug, resolved.given, only_folds)
            run, result = train_full(config, request)
    except KeyboardInterrupt:
        raise Interrupted(how_to_go_on(output_dir, "--full", resumed=resume is not None)) from None
    except PreemptedError as error:
        if rank() == 0:
            click.echo(f"{error} {how_to_go_on(output_dir, '--full', resumed=True)}", err=True)
        return PREEMPTED
    except MiripError as error:
        if told_elsewhere(error):
            return 1
        raise
    if rank() == 0:
        say_result(run, result, "--full", debug)
    return 0
