"""``mirip-fast evaluate RUN RUN …``: several runs on the same split."""

from __future__ import annotations

from pathlib import Path

import click

from mirip_fast.config import Config


def evaluate_runs(runs: tuple[Path, ...], split: str, config: Config, out: Path | None) -> None:
    """Evaluate runs side by side, print the table, and write it where asked."""
    from mirip_fast.files import write_json
    from mirip_fast.ranking.evaluate import pick_model
    from mirip_fast.ranking.side_by_side import evaluate_side_by_side

    models = [pick_model(run, Path(config.train.output_dir)) for run in runs]
    result = evaluate_side_by_side(models, split, config)
    click.echo(result.to_table())
    if out is not None:
        write_json(out, result.to_dict())
        click.echo(f"Written: {out}")
