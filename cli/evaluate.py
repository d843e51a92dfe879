"""``mirip-fast evaluate``: how good a model is on images it has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click

from mirip_fast.config import Config
from mirip_fast.errors import ConfigError
from mirip_fast.progress import Bar
from mirip_fast.settings import Resolved

from .options import (
    FILE,
    PATH,
    SCORES,
    checkpoint_option,
    config_options,
    given_flags,
    moved_backbone,
)
from .say import echo
from .train import warn_of_the_order


@click.command("evaluate")
@click.argument("runs", metavar="[RUN]…", nargs=-1, type=PATH)
@checkpoint_option
@click.option(
    "--test-data", type=PATH, help="CSV file of graded images (default: the run's test split)."
)
@click.option("--image-dir", type=PATH, help="Folder that --test-data's files are relative to.")
@click.option(
    "--split", type=click.Choice(["train", "val", "test"]), default="test", show_default=True
)
@click.option(
    "--out",
    type=FILE,
    help="JSON file to write, with pictures beside it (default: in the run's folder).",
)
@click.option(
    "--html",
    type=PATH,
    help="Page to look at, in one file: the figures in words, drawings, the worst mistakes.",
)
@moved_backbone
@config_options("evaluate", "data", *SCORES)
def evaluate_command(
    resolved: Resolved,
    runs: tuple[Path, ...],
    checkpoint: Path | None,
    backbone: str | None,
    test_data: Path | None,
    image_dir: Path | None,
    split: str,
    out: Path | None,
    html: Path | None,
) -> None:
    """Evaluate a model: pairwise accuracy, whether its probabilities come true, the worst mistakes.

    Intervals are of 95 %, by drawing whole groups of the evaluated images anew. They cover the choice of
    these images; not another training run, nor disagreement among graders.

    A last sentence says whether the model is better than chance, than a ridge regression on the same
    features, and than the last run before it on the same data: differences of pairwise accuracy.

    Several RUNs are compared side by side on the same split, with intervals of the differences.
    """
    from mirip_fast.files import write_json
    from mirip_fast.ranking.baselines import baselines_text
    from mirip_fast.ranking.evaluate import evaluate_files, evaluate_split, pick_model
    from mirip_fast.ranking.judged_pairs import evaluate_pairs

    config = resolved.config
    if len(runs) > 1:
        if checkpoint or test_data or html:
            raise ConfigError(
                "Several runs are compared on their own split and told as a table: leave out --checkpoint, "
                "--test-data and --html (which make sense for one run)"
            )
        return _evaluate_runs(runs, split, config, out)
    if html is not None:
        from mirip_fast.portfolio.page import check_page_path

        check_page_path(html)
    if runs and checkpoint:
        raise ConfigError(f"Two models: {runs[0]} and --checkpoint {checkpoint}. Give one")
    if image_dir is not None and test_data is None:
        raise ConfigError("--image-dir says where --test-data's files are: give both")
    if test_data is not None and given_flags("split"):
        raise ConfigError(
            "--split chooses among a run's own splits, --test-data names other works: give one"
        )
    model = pick_model(checkpoint or next(iter(runs), None), Path(config.train.output_dir))
    pairs = evaluate_pairs(model, split, config) if test_data is None else None
    extra = {} if pairs is None else {"judged_pairs": pairs.to_dict()}
    if pairs is not None:
        echo(pairs.to_text())
    evaluation = None
    if pairs is not None and not pairs.graded:  # nothing but the judged pairs to evaluate on
        path = out or model.checkpoint.parent / f"evaluation_{split}.json"
        write_json(path, {"checkpoint": str(model.checkpoint), **extra})
        files = [path]
    else:
        if test_data is None:
            evaluation = evaluate_split(model, split, config, baselines=True)
        else:
            with Bar(" images") as bar:
                evaluation = evaluate_files(
                    model, test_data, image_dir, config, backbone, bar.embedding, baselines=True
                )
        echo(replace(evaluation.report, better_than="").to_table())
        echo()
        echo(baselines_text(evaluation.baselines), wrap=True)
        warn_of_the_order(evaluation.report)
        files = evaluation.write(out, **extra)
    if html is not None:
        from mirip_fast.portfolio.evaluation_page import write_evaluation_page

        files.append(write_evaluation_page(html, model, evaluation, pairs, config))
    echo(_written(files))


def _written(files: Sequence[Path]) -> str:
    """What was written, folder by folder: a run's pictures are many."""
    lines = []
    for folder in dict.fromkeys(path.parent for path in files):
        names = [path.name for path in files if path.parent == folder]
        several = f"Written to {folder}: {', '.join(names)}"
        lines.append(several if len(names) > 1 else f"Written: {folder / names[0]}")
    return "\n".join(lines)


def _evaluate_runs(runs: tuple[Path, ...], split: str, config: Config, out: Path | None) -> None:
    """Evaluate runs side by side, print the table, and write it where asked."""
    from mirip_fast.files import write_json
    from mirip_fast.ranking.evaluate import evaluate_side_by_side, pick_model

    models = [pick_model(run, Path(config.train.output_dir)) for run in runs]
    table, found = evaluate_side_by_side(models, split, config)
    echo(table)
    if out is not None:
        write_json(out, found)
        echo(f"Written: {out}")
