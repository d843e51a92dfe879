"""``mirip-fast sweep``: which settings rank best."""

from __future__ import annotations

from pathlib import Path

import click

from mirip_fast.files import write_text
from mirip_fast.progress import Bar
from mirip_fast.settings import Resolved

from .interrupted import Interrupted
from .options import config_options
from .say import echo


@click.command("sweep")
@click.option(
    "--grid",
    multiple=True,
    metavar="SETTING=A,B,…",
    help="A setting of the sections head or train and its values, or a range LOW..HIGH to draw from; "
    "give it once per setting.",
)
@click.option("--random", type=click.IntRange(min=1), help="Draw N cells instead of trying all.")
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Heads per cell and fold.",
)
@click.option(
    "--data", type=click.Path(path_type=Path), help="The embedded data set (default: the newest)."
)
@click.option(
    "--wandb-sweep",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Try nothing here: write the sweep as a YAML file for `wandb sweep`.",
)
@click.option("--resume", metavar="latest|PATH", help="Go on with an interrupted sweep.")
@config_options(
    "train", "head", "split", "evaluate.within", "evaluate.bootstrap_rounds", "runtime",
    "embed.cache_dir",
)  # fmt: skip
def sweep_command(
    resolved: Resolved,
    grid: tuple[str, ...],
    random: int | None,
    seeds: int,
    data: Path | None,
    wandb_sweep: Path | None,
    resume: str | None,
) -> None:
    """Try settings by cross-validation inside train and val; the test split is not looked at.

    \b
    mirip-fast sweep --grid learning_rate=1e-4,3e-4 --grid features=cls,cls+mean
    mirip-fast sweep --random 20 --grid learning_rate=1e-5..1e-3 --grid dropout=0..0.5
    """
    from mirip_fast.ranking.sweep import (
        BEST_FILE,
        find_sweep,
        run_sweep,
        start_sweep,
    )
    from mirip_fast.ranking.sweep import wandb_sweep as sweep_of_wandb

    config = resolved.config
    if wandb_sweep is not None:
        text = sweep_of_wandb(config, grid, random=random, data=data, given=resolved.given)
        write_text(wandb_sweep, text)
        echo(f"Written: {wandb_sweep}")
        echo(
            "Its runs are compared on the validation split of one head each, not by cross-validation. "
            "Keep the winner only if `mirip-fast evaluate` says that it is better."
        )
        echo(f"Next: wandb sweep {wandb_sweep}")
        return
    if resume:
        folder = find_sweep(Path(config.train.output_dir), resume)
    else:
        folder = start_sweep(
            config, grid, random=random, seeds=seeds, data=data, given=resolved.given
        )
    try:
        with Bar(" heads") as bar:
            table = run_sweep(folder, bar)
    except KeyboardInterrupt:
        raise Interrupted("`mirip-fast sweep --resume latest` goes on from there.") from None
    echo(table)
    echo(f"Sweep: {folder}")
    echo(f"Next: mirip-fast train --head-only --config {folder / BEST_FILE}")
