"""``mirip-fast train``: phase two, or end to end."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mirip_fast.data.sources import METADATA_NAMES
from mirip_fast.errors import ConfigError, MiripError, PreemptedError
from mirip_fast.settings import Resolved

from .interrupted import Interrupted
from .options import config_options, given_flags
from .say import echo

if TYPE_CHECKING:
    from mirip_fast.evaluation.report import Report
    from mirip_fast.ranking.judged_pairs import PairReport
    from mirip_fast.training.run_folder import Run

_PATH = click.Path(path_type=Path)
#: Exit status of a run that a signal stopped and that is to be resumed (EX_TEMPFAIL of sysexits.h).
_PREEMPTED = 75
_PAIRWISE = (
    "Pairwise accuracy: of two works with different grades, how often the better one scores higher; guessing "
    "gives 0.5."
)
#: What grades are called can be said anew when training: they are read again from the data set's own file.
_GRADES = {
    "--tiers": "tiers",
    "--tier-column": "tier_column",
    "--score-column": "score_column",
    "--group-column": "group_column",
    "--by": "by",
    "--applicants": "applicants",
    "--grader-column": "grader_column",
}


@click.command("train")
@click.argument("source", metavar="[DATA]", required=False, type=_PATH)
@click.option(
    "--head-only", is_flag=True, help="Train projector and score head on cached features."
)
@click.option("--full", is_flag=True, help="Train backbone and head on the images of DATA.")
@click.option(
    "--data", "--data-dir", type=_PATH, help="The embedded data set (default: the newest)."
)
@click.option("--metadata", type=_PATH, help="CSV file of the training split.")
@click.option("--val-metadata", type=_PATH, help="CSV file of the validation split.")
@click.option("--test-metadata", type=_PATH, help="CSV file of the test split.")
@click.option("--resume", metavar="latest|PATH", help="Go on with an interrupted run.")
@click.option(
    "--only-folds",
    metavar="0,1,…",
    help="With --folds: train these now, the rest later or elsewhere.",
)
@click.option("--debug", is_flag=True, help="A trial: 100 images, 2 epochs, no tracking.")
@config_options(
    "train",
    "head",
    "finetune",
    "split",
    "data",
    "tracking",
    "evaluate.within",
    "evaluate.grader",
    "runtime",
    "embed.cache_dir",
    "embed.backbone",
    "embed.image_size",
    "embed.resize",
    "embed.decode",
    "embed.colours",
    "embed.precision",
    "embed.workers",
    "embed.max_megapixels",
)
def train_command(
    resolved: Resolved,
    source: Path | None,
    head_only: bool,
    full: bool,
    data: Path | None,
    metadata: Path | None,
    val_metadata: Path | None,
    test_metadata: Path | None,
    resume: str | None,
    only_folds: str | None,
    debug: bool,
) -> int:
    """Learn to score from graded images: a head on cached features, or backbone and head together."""
    if head_only == full:
        raise ConfigError(
            "Say what to train: `mirip-fast train --head-only` (a head on cached features, in seconds) "
            "or `mirip-fast train --full DATA` (backbone and head, on a GPU)"
        )
    asked = sorted(key for key in resolved.given if key.startswith("tracking.wandb_"))
    if asked and "tracking.report_to" not in resolved.given:  # a wandb setting asks for wandb
        resolved.config.tracking.report_to = "wandb"
    if data and source and data.absolute() != source.absolute():
        raise ConfigError(f"Two data sets: {source} and --data {data}. Give one")
    data, only = _data_set(data or source, resolved), _numbers(only_folds)
    if full:
        if metadata or val_metadata or test_metadata:
            raise ConfigError(
                "--metadata goes with --head-only: --full takes the split of the head-only run that it "
                "starts from"
            )
        return _run_full(resolved, data, resume, only, debug)
    typed = given_flags("finetune_", "embed_", "data_")
    grades = {} if resume else {flag: name for flag, name in _GRADES.items() if flag in typed}
    heeded = {"--cache-dir", *grades, *(() if resume else ("--backbone",))}
    wrong = [flag for flag in typed if flag not in heeded]
    if wrong and resume:
        raise ConfigError(
            f"{', '.join(wrong)}: of no use with --resume, which keeps its own settings"
        )
    if wrong:
        raise ConfigError(f"{', '.join(wrong)}: of no use with --head-only, only with --full")
    from mirip_fast.features.backbone_files import names_of_backbones
    from mirip_fast.ranking.train import resume_head, train_head

    config = resolved.config
    found: Report | PairReport | None
    try:
        if resume:
            run, found = resume_head(resume, Path(config.train.output_dir), only)
        else:
            files = {"train": metadata, "val": val_metadata, "test": test_metadata}
            split_files = {name: path for name, path in files.items() if path is not None}
            reread = {name: getattr(config.data, name) for name in grades.values()}
            chosen = "--backbone" in typed
            through = names_of_backbones(config.embed.backbone) if chosen else ()
            served = "train.pairs" not in resolved.given and config.train.label != "pairs"
            run, found = train_head(
                config, data, split_files=split_files, debug=debug, only_folds=only,
                grades=reread, served=served, backbones=through,
            )  # fmt: skip
    except KeyboardInterrupt:
        output_dir = Path(config.train.output_dir)
        raise Interrupted(
            _how_to_go_on(output_dir, "--head-only", resumed=resume is not None)
        ) from None
    say_result(run, found, "--head-only", debug)
    return 0


def _run_full(
    resolved: Resolved,
    data: Path | None,
    resume: str | None,
    only_folds: tuple[int, ...],
    debug: bool,
) -> int:
    """Train, or go on with a run, and tell how it ended; returns the exit status."""
    from mirip_fast.finetune.distributed import told_elsewhere
    from mirip_fast.finetune.train import resume_full, train_full
    from mirip_fast.runtime import rank

    config = resolved.config
    output_dir = Path(config.train.output_dir)
    try:
        if resume:
            run, found = resume_full(resume, output_dir, config.runtime.device, only_folds)
        else:
            run, found = train_full(
                config, data, debug=debug, given=resolved.given, only_folds=only_folds
            )
    except KeyboardInterrupt:
        raise Interrupted(_how_to_go_on(output_dir, "--full", resumed=resume is not None)) from None
    except PreemptedError as error:
        if rank() == 0:
            echo(f"{error} {_how_to_go_on(output_dir, '--full', resumed=True)}", err=True)
        return _PREEMPTED
    except MiripError as error:
        if told_elsewhere(error):
            return 1
        raise
    if rank() == 0:
        say_result(run, found, "--full", debug)
    return 0


def _data_set(data: Path | None, resolved: Resolved) -> Path | None:
    """The data set that is meant: ``data/images`` beside ``data/metadata.csv`` is ``data``.

    Unless ``data/images`` was embedded itself.
    """
    if data is None or not data.is_dir() or any((data / name).is_file() for name in METADATA_NAMES):
        return data
    parent = data.absolute().parent
    tables = [parent / name for name in METADATA_NAMES if (parent / name).is_file()]
    if data.name.lower() != "images" or not tables:
        return data
    from mirip_fast.features.datasets import find_datasets

    if any(known.is_called(data) for known in find_datasets(Path(resolved.config.embed.cache_dir))):
        return data
    echo(f"{data} is described by {tables[0]}: that data set is meant", err=True)
    return data.parent


def _numbers(text: str | None) -> tuple[int, ...]:
    """``0,1`` → (0, 1)."""
    try:
        return tuple(sorted({int(part) for part in text.split(",")})) if text else ()
    except ValueError:
        raise ConfigError(f"--only-folds {text}: give numbers like 0,1") from None


def _how_to_go_on(output_dir: Path, mode: str, *, resumed: bool) -> str:
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


def say_result(run: Run, found: Report | PairReport | None, mode: str, debug: bool) -> None:
    """Say what came of a run and what to type next.

    Args:
        run: the run.
        found: how it orders works, or judged pairs, that were left out; None: its run.json says how it ended.
        mode: ``--head-only`` or ``--full``.
        debug: whether it was a trial.
    """
    from mirip_fast.evaluation.calibration import MIN_IMAGES
    from mirip_fast.ranking.held_out import load_calibration
    from mirip_fast.ranking.judged_pairs import PairReport
    from mirip_fast.ranking.scorer import load_score_model
    from mirip_fast.training.run_folder import run_in_use

    about = run.info
    missing = about.get("missing_folds")
    if isinstance(found, PairReport):
        span = "unknown" if found.interval is None else "{:.4f} to {:.4f}".format(*found.interval)
        echo(
            f"Each judged pair by a model without its works' groups: {found.accuracy:.4f} in the right "
            f"order (95 % interval: {span}) of {found.pairs:,}; {found.ties:,} ties left aside"
        )
        if found.pairs < MIN_IMAGES and not debug:
            echo(
                f"Only {found.pairs} judged pairs: too few to rank by. `mirip-fast use RUN` keeps an "
                "earlier run in use.",
                err=True,
                red=True,
            )
    elif missing:
        echo(f"Folds still missing: {', '.join(map(str, missing))} of {about['folds']}.")
        echo(f"`mirip-fast train {mode} --resume {run.path}` trains them and joins all.")
    elif found is None:
        why = "no better epoch for a while" if about["stopped_early"] else "all epochs done"
        echo(
            f"Finished after {about['epochs']} epochs in {about['seconds']:.1f} s ({why}). Best: epoch "
            f"{about['best_epoch']}, validation pairwise accuracy {about['val_pairwise_accuracy']:.4f}"
        )
    elif run.has_folds:
        folds = ", ".join(f"{accuracy:.4f}" for accuracy in about["fold_pairwise_accuracies"])
        what = "heads" if mode == "--head-only" else "fine-tuned models"
        echo(f"{about['folds']} {what}, each judged on the fold it left out: {folds}")
        echo(f"Out-of-fold pairwise accuracy {found.pairwise_accuracy:.4f} ({_span(found)})")
        warn_of_the_order(found)
    else:
        echo(
            f"Each work by a model without its group: pairwise accuracy {found.pairwise_accuracy:.4f} "
            f"({_span(found)})"
        )
        echo(_PAIRWISE)
        if found.applicants is not None:
            echo(f"Left out, too: {found.applicants['said']}")
        warn_of_the_order(found)
    echo(f"Run: {run.path}")
    if missing or debug:
        return
    if chance := load_calibration(load_score_model(run.model)).chance:
        echo(f"{chance} `rank` refuses to sort by it without --anyway.", red=True, err=True)
    used = run_in_use(run.path.parent)
    if used is not None and used.path.name != run.path.name:
        echo(f"{used.path} stays in use; `mirip-fast use {run.path}` takes this one")
    people = None if found is None or isinstance(found, PairReport) else found.applicants
    echo(
        f"Next: mirip-fast evaluate, or mirip-fast rank FOLDER --by {shlex.quote(people['by'])}"
        if people
        else "Next: mirip-fast evaluate, or mirip-fast rank FOLDER"
    )


def warn_of_the_order(report: Report) -> None:
    """Ask about an order of the tiers that a model clearly contradicts on works it had not trained on."""
    tiers = list(report.tier_names)
    interval = report.pairwise_accuracy_interval
    if interval is not None and interval.high < 0.5:
        grades = f"--tiers {','.join(tiers)}" if tiers else "The column of grades"
        echo(
            f"Warning: {grades} may be the wrong way round, or these features "
            "say nothing of the grades: works that were left out are ordered worse than by chance",
            err=True,
        )
        if tiers:
            _ask(tiers[-1], tiers[0], tiers[::-1])
        return
    for pair in report.tier_pairs.to_dict("records"):
        better, worse, span = pair["better"], pair["worse"], pair["interval"]
        place = tiers.index(better)
        if worse == tiers[place + 1] and span is not None and span.high < 0.5:
            echo(
                f"Warning: of works that were left out, those of tier {worse!r} score higher than those "
                f"of {better!r}, although --tiers {','.join(tiers)} says that {better!r} is better",
                err=True,
            )
            swapped = [*tiers[:place], tiers[place + 1], tiers[place], *tiers[place + 2 :]]
            _ask(tiers[place + 1], tiers[place], swapped)


def _ask(better: str, worse: str, tiers: list[str]) -> None:
    order = shlex.quote(",".join(tiers))
    echo(
        f"Is {better!r} better than {worse!r}? Then type: mirip-fast train --head-only --tiers {order}",
        err=True,
    )


def _span(report: Report) -> str:
    interval = report.pairwise_accuracy_interval
    span = "unknown" if interval is None else f"{interval.low:.4f} to {interval.high:.4f}"
    return f"95 % interval over {report.n_groups} groups: {span}"
