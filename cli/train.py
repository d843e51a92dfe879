"""``mirip-fast train``: phase two, or end to end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mirip_fast.errors import ConfigError
from mirip_fast.settings import Resolved

from .interrupted import Interrupted
from .options import config_options, given_flags
from .train_result import how_to_go_on, say_result

if TYPE_CHECKING:
    from mirip_fast.evaluation.report import Report
    from mirip_fast.ranking.fit import FitResult
    from mirip_fast.ranking.fold_runs import FoldsResult

_PATH = click.Path(path_type=Path)
#: What grades are called can be said anew when training: they are read again from the data set's own file.
_GRADES = {
    "--tiers": "tiers",
    "--tier-column": "tier_column",
    "--score-column": "score_column",
    "--group-column": "group_column",
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
    "runtime",
    "embed.cache_dir",
    "embed.backbone",
    "embed.image_size",
    "embed.resize",
    "embed.decode",
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
        from .train_full import run_full

        return run_full(resolved, data, resume, only, debug)
    typed = given_flags("finetune_", "embed_", "data_")
    grades = {} if resume else {flag: name for flag, name in _GRADES.items() if flag in typed}
    wrong = [flag for flag in typed if flag != "--cache-dir" and flag not in grades]
    if wrong and resume:
        raise ConfigError(
            f"{', '.join(wrong)}: of no use with --resume, which keeps its own settings"
        )
    if wrong:
        raise ConfigError(f"{', '.join(wrong)}: of no use with --head-only, only with --full")
    from mirip_fast.ranking.train import Request, resume_head, train_head

    config = resolved.config
    result: FitResult | FoldsResult | Report
    try:
        if resume:
            given = "train.bootstrap" in resolved.given
            bootstrap = config.train.bootstrap if given else None
            run, result = resume_head(resume, Path(config.train.output_dir), only, bootstrap)
        else:
            files = {"train": metadata, "val": val_metadata, "test": test_metadata}
            split_files = {name: path for name, path in files.items() if path is not None}
            reread = {name: getattr(config.data, name) for name in grades.values()}
            run, result = train_head(config, Request(data, split_files, debug, only, reread))
    except KeyboardInterrupt:
        output_dir = Path(config.train.output_dir)
        raise Interrupted(
            how_to_go_on(output_dir, "--head-only", resumed=resume is not None)
        ) from None
    say_result(run, result, "--head-only", debug)
    return 0


def _data_set(data: Path | None, resolved: Resolved) -> Path | None:
    """The data set that is meant: ``data/images`` beside ``data/metadata.csv`` is ``data``.

    Unless ``data/images`` was embedded itself.
    """
    if data is None or not data.is_dir() or (data / "metadata.csv").is_file():
        return data
    parent = data.absolute().parent
    if data.name.lower() != "images" or not (parent / "metadata.csv").is_file():
        return data
    from mirip_fast.features.datasets import find_datasets

    if any(known.is_called(data) for known in find_datasets(Path(resolved.config.embed.cache_dir))):
        return data
    click.echo(
        f"{data} is described by {parent / 'metadata.csv'}: that data set is meant", err=True
    )
    return data.parent


def _numbers(text: str | None) -> tuple[int, ...]:
    """``0,1`` → (0, 1)."""
    try:
        return tuple(sorted({int(part) for part in text.split(",")})) if text else ()
    except ValueError:
        raise ConfigError(f"--only-folds {text}: give numbers like 0,1") from None
