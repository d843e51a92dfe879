"""The end of a training run: what run.json says of it, and its pictures."""

from __future__ import annotations

import logging
from pathlib import Path

from mirip_fast.evaluation.plots import draw_report
from mirip_fast.evaluation.report import Report, evaluate
from mirip_fast.ranking.fit import FitResult
from mirip_fast.ranking.graded import GradedImages
from mirip_fast.ranking.held_out import load_held_out
from mirip_fast.ranking.plots import plot_curves, read_curves
from mirip_fast.ranking.references import load_calibration
from mirip_fast.ranking.scorer import load_score_model
from mirip_fast.training.run_folder import Run

log = logging.getLogger(__name__)

#: In words, where held-out scores come from.
_SOURCES = {
    "validation": "validation split, which also chose the model",
    "out-of-fold": "each work by the fold that left it out",
    "left-out groups": "each work without its group",
}
_ROUNDS = 200  # bootstrap resamples behind the pictures of a training run


def finish_run(run: Run, result: FitResult, images: GradedImages, within: str | None) -> None:
    """Say in run.json that a run is finished and how, and draw its pictures.

    Args:
        run: its folder, with its best checkpoint.
        result: how the fit ended.
        images: the run's graded images.
        within: the column inside whose values works are compared, or None.
    """
    run.update(
        status="finished",
        epochs=result.epochs,
        best_epoch=result.best_epoch,
        val_pairwise_accuracy=result.best_accuracy,
        seconds=round(result.seconds, 2),
    )
    draw_run(run, images, within)


def draw_run(run: Run, images: GradedImages, within: str | None) -> None:
    """Draw the learning curves and, from the held-out scores where there are any, how good the model is.

    The pictures are ``learning_curves.png`` and ``held_out_….png``. They are extras: where they can not be
    drawn, the run says why in its log and stays what it is.

    Args:
        run: a trained run, or one of folds that are joined.
        images: its graded images.
        within: the column inside whose values works are compared, or None.
    """
    try:
        curves = read_curves(run)
        if curves:
            plot_curves(run.path / "learning_curves.png", curves)
        report, about = _held_out_report(run, images, within)
        if report is not None:
            draw_report(report, run.path, "held_out", about)
    except Exception as error:  # whatever a drawing library or a full disk comes up with
        log.warning(
            "The run is complete, but its pictures could not all be drawn: %s: %s",
            type(error).__name__,
            error,
        )


def _held_out_report(
    run: Run, images: GradedImages, within: str | None
) -> tuple[Report | None, str]:
    tiers = images.manifest.tiers
    held_out = load_held_out(Path(run.path), tiers)
    if held_out is None or len(set(held_out.order.tolist())) < 2:
        return None, ""
    value_of: dict[str, str | None] = {}
    if within is not None:
        ids = (record.image_id for record in images.manifest.records)
        value_of = dict(zip(ids, images.column(within), strict=True))
    report = evaluate(
        held_out.scores,
        held_out.tiers if held_out.has_tiers else None,
        tier_scores=held_out.tier_scores,
        tier_names=tiers,
        image_ids=held_out.ids,
        groups=held_out.groups,
        within=None if within is None else [value_of[name] for name in held_out.ids],
        calibration=load_calibration(load_score_model(run.model)),
        rounds=_ROUNDS,
    )
    return report, f"{len(held_out)} held-out works ({_SOURCES[held_out.source]})"
