"""How a training command ended, in words."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mirip_fast.errors import MiripError

if TYPE_CHECKING:
    from mirip_fast.evaluation.report import Report
    from mirip_fast.ranking.fit import FitResult
    from mirip_fast.ranking.fold_runs import FoldsResult
    from mirip_fast.training.run_folder import Run


def how_to_go_on(output_dir: Path, mode: str, *, resumed: bool) -> str:
    """What to type after Ctrl-C: a run that this process began may have no checkpoint yet, or never have any.

    Args:
        output_dir: folder of the runs.
        mode: ``--head-only`` or ``--full``.
        resumed: whether the run went on from a checkpoint.
    """
    from mirip_fast.training.run_folder import resumable_run

    try:
        run, _ = resumable_run(output_dir, "latest", full=mode == "--full")
        resumed = resumed or run.info.get("pid") == os.getpid()
    except MiripError:
        pass
    if resumed:
        return f"`mirip-fast train {mode} --resume latest` goes on from there."
    return "Nothing of this run was saved yet: the same command begins it again."


def say_result(run: Run, result: FitResult | FoldsResult | Report, mode: str, debug: bool) -> None:
    """Say what came of a run and what to type next.

    Args:
        run: the run.
        result: what its training gave.
        mode: ``--head-only`` or ``--full``.
        debug: whether it was a trial.
    """
    from mirip_fast.evaluation.report import Report
    from mirip_fast.ranking.fold_runs import FoldsResult

    missing = False
    if isinstance(result, Report):
        click.echo(
            f"Each work by a model without its group: pairwise accuracy {result.pairwise_accuracy:.4f} "
            f"({_span(result)})"
        )
        _warn_of_the_order(result)
    elif not isinstance(result, FoldsResult):
        why = "no better epoch for a while" if result.stopped_early else "all epochs done"
        click.echo(
            f"Finished after {result.epochs} epochs in {result.seconds:.1f} s ({why}). "
            f"Best: epoch {result.best_epoch}, validation pairwise accuracy {result.best_accuracy:.4f}"
        )
    elif result.missing:
        missing = True
        click.echo(f"Folds still missing: {', '.join(map(str, result.missing))} of {result.folds}.")
        click.echo(f"`mirip-fast train {mode} --resume {run.path}` trains them and joins all.")
    elif result.report is not None:
        folds = ", ".join(f"{accuracy:.4f}" for accuracy in result.by_fold)
        what = "heads" if mode == "--head-only" else "fine-tuned models"
        click.echo(f"{result.folds} {what}, each judged on the fold it left out: {folds}")
        click.echo(
            f"Out-of-fold pairwise accuracy {result.report.pairwise_accuracy:.4f} "
            f"({_span(result.report)})"
        )
        _warn_of_the_order(result.report)
    click.echo(f"Run: {run.path}")
    if not missing and not debug:
        click.echo("Next: mirip-fast evaluate, or mirip-fast rank FOLDER")


def _warn_of_the_order(report: Report) -> None:
    interval = report.pairwise_accuracy_interval
    if interval is not None and interval.high < 0.5:
        click.echo(
            f"Warning: --tiers {','.join(report.tier_names)} may be the wrong way round, or these features "
            "say nothing of the grades: works that were left out are ordered worse than by chance",
            err=True,
        )


def _span(report: Report) -> str:
    interval = report.pairwise_accuracy_interval
    span = "unknown" if interval is None else f"{interval.low:.4f} to {interval.high:.4f}"
    return f"95 % interval over {report.n_groups} groups: {span}"
