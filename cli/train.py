"""``mirip-fast train``: phase two."""

from __future__ import annotations

from pathlib import Path

import click

from mirip_fast.config import Resolved
from mirip_fast.errors import ConfigError

from .interrupted import Interrupted
from .options import config_options

_PATH = click.Path(path_type=Path)


@click.command("train")
@click.option(
    "--head-only", is_flag=True, help="Train projector and score head on cached features."
)
@click.option(
    "--data", "--data-dir", type=_PATH, help="The embedded data set (default: the newest)."
)
@click.option("--metadata", type=_PATH, help="CSV file of the training split.")
@click.option("--val-metadata", type=_PATH, help="CSV file of the validation split.")
@click.option("--test-metadata", type=_PATH, help="CSV file of the test split.")
@click.option("--resume", metavar="latest|PATH", help="Go on with an interrupted run.")
@click.option("--debug", is_flag=True, help="A trial: 100 images, 2 epochs, no tracking.")
@config_options(
    "train", "head", "split", "tracking", "evaluate.within", "runtime", "embed.cache_dir"
)
def train_command(
    resolved: Resolved,
    head_only: bool,
    data: Path | None,
    metadata: Path | None,
    val_metadata: Path | None,
    test_metadata: Path | None,
    resume: str | None,
    debug: bool,
) -> None:
    """Learn to score from graded images whose features are cached."""
    from mirip_fast.ranking.train import Request, resume_head, train_head

    if not head_only:
        raise ConfigError("Say what to train: `mirip-fast train --head-only`")
    config = resolved.config
    try:
        if resume:
            run, result = resume_head(resume, Path(config.train.output_dir))
        else:
            files = {"train": metadata, "val": val_metadata, "test": test_metadata}
            split_files = {name: path for name, path in files.items() if path is not None}
            run, result = train_head(config, Request(data, split_files, debug))
    except KeyboardInterrupt:
        raise Interrupted(
            "`mirip-fast train --head-only --resume latest` goes on from there."
        ) from None
    why = "no better epoch for a while" if result.stopped_early else "all epochs done"
    click.echo(
        f"Finished after {result.epochs} epochs in {result.seconds:.1f} s ({why}). "
        f"Best: epoch {result.best_epoch}, validation pairwise accuracy {result.best_accuracy:.4f}"
    )
    click.echo(f"Run: {run.path}")
    if not debug:
        click.echo("Next: mirip-fast evaluate, or mirip-fast rank FOLDER")
