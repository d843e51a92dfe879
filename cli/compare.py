"""``mirip-fast compare``: two works against each other."""

from __future__ import annotations

from pathlib import Path

import click

from mirip_fast.settings import Resolved

from .options import PATH, checkpoint_option, command_line, config_options, moved_backbone
from .say import echo


@click.command("compare")
@click.argument("first", type=PATH)
@click.argument("second", type=PATH)
@checkpoint_option
@moved_backbone
@config_options("train.output_dir", "embed.cache_dir", "embed.max_megapixels", "runtime")
def compare_command(
    resolved: Resolved, first: Path, second: Path, checkpoint: Path | None, backbone: str | None
) -> None:
    """Say which of two images scores higher, by how much, and how probably it is the better one.

    The probability was learned from graded works that the model had not trained on.
    """
    from mirip_fast.evaluation.text_table import format_table
    from mirip_fast.portfolio.rank import compare_images
    from mirip_fast.ranking.evaluate import pick_model

    model = pick_model(checkpoint, Path(resolved.config.train.output_dir))
    scores, probability, known = compare_images(
        model, first, second, resolved.config,
        backbone=backbone, command=command_line(),
    )  # fmt: skip
    rows = [(f"{score:.4f}", path) for score, path in zip(scores, (first, second), strict=True)]
    echo(format_table(("score", "file"), rows, align="rl"))
    first_wins = scores[0] > scores[1]
    if scores[0] == scores[1]:
        echo("A tie: both score the same")
    else:
        winner = first if first_wins else second
        echo(f"Winner: {winner} (margin {abs(scores[0] - scores[1]):.4f})")
    if probability is None:
        echo(f"Probability {known.unknown}")
        return

    chance = probability if first_wins else 1 - probability
    echo(f"Probability that it is the better one: {_percent(chance)}")
    echo(f"Learned from {known.images} held-out works ({known.source}).")
    for remark in known.warnings():
        echo(remark)


def _percent(p: float) -> str:
    """A probability in percent; never 0 or 100, as nothing is certain."""
    if p > 0.999:
        return "over 99.9%"
    return "under 0.1%" if p < 0.001 else f"{p:.1%}"
