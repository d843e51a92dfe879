"""The end of a training run: what run.json says of it, and its pictures."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirip_fast.config import Config
from mirip_fast.data.decode_pool import load_pictures
from mirip_fast.errors import ImageError
from mirip_fast.evaluation.plots import (
    GREY,
    MAIN,
    SECOND,
    draw_report,
    new_figure,
    save_figure,
    write_contact_sheet,
)
from mirip_fast.evaluation.report import Report, evaluate
from mirip_fast.files import read_json
from mirip_fast.ranking.evaluate import Evaluation
from mirip_fast.ranking.fit import FitResult
from mirip_fast.ranking.graded import GradedImages
from mirip_fast.ranking.held_out import load_held_out
from mirip_fast.ranking.references import load_calibration
from mirip_fast.ranking.scorer import load_score_model
from mirip_fast.training.run_folder import FOLDS_FILE, Run
from mirip_fast.training.trackers import Trackers, start_trackers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Curves:
    """How one fit went, epoch by epoch; all lists are of equal length.

    Attributes:
        name: of the fold; empty for a run without folds.
        epochs: from 1.
        train_loss, val_loss: mean pairwise loss.
        train_accuracy, val_accuracy: pairwise accuracy (0–1).
        best_epoch: the model is of this one; None if unknown.
    """

    name: str
    epochs: list[int]
    train_loss: list[float]
    val_loss: list[float]
    train_accuracy: list[float]
    val_accuracy: list[float]
    best_epoch: int | None


def read_curves(run: Run) -> list[Curves]:
    """The learning curves of a run, or of each of its folds; none where no history is there.

    Raises:
        ValueError, KeyError: history.csv is damaged.
    """
    runs = [(run, "")]
    if run.has_folds:
        folds = max(read_json(run.path / FOLDS_FILE)["fold_of"]) + 1
        runs = [(Run(run.path / f"fold_{i}"), f"fold {i}") for i in range(folds)]
    return [_curves(one, name, history) for one, name in runs if (history := one.history())]


def _curves(run: Run, name: str, history: Sequence[dict[str, str]]) -> Curves:
    def column(key: str) -> list[float]:
        return [float(row[key]) for row in history]

    best = run.info.get("best_epoch")
    return Curves(
        name=name,
        epochs=[int(row["epoch"]) for row in history],
        train_loss=column("train/loss"),
        val_loss=column("val/loss"),
        train_accuracy=column("train/accuracy"),
        val_accuracy=column("val/accuracy"),
        best_epoch=None if best is None else int(best),
    )


def plot_curves(path: Path, curves: Sequence[Curves]) -> Path:
    """Draw loss and pairwise accuracy over the epochs into a PNG file; folds on top of each other.

    Args:
        path: the PNG file.
        curves: one or more fits.
    """
    figure = new_figure(10, 4)
    strength = 1 if len(curves) == 1 else 0.55
    for axes, what in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for number, fit in enumerate(curves):
            lines = (
                ("training", getattr(fit, f"train_{what}"), SECOND, "--"),
                ("validation", getattr(fit, f"val_{what}"), MAIN, "-"),
            )
            mark = "o" if len(fit.epochs) == 1 else None
            for part, values, colour, dashes in lines:
                axes.plot(fit.epochs, values, color=colour, linestyle=dashes, marker=mark,
                          alpha=strength, label=None if number else part)  # fmt: skip
            if fit.best_epoch in fit.epochs:
                best = fit.epochs.index(fit.best_epoch)
                value = getattr(fit, f"val_{what}")[best]
                label = f"best epoch {fit.best_epoch}" if len(curves) == 1 else "best epochs"
                axes.plot(fit.best_epoch, value, "D", color=MAIN, markeredgecolor="black",
                          markersize=6, zorder=4, label=None if number else label)  # fmt: skip
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel="epoch", ylabel=f"pairwise {what}")
        if what == "accuracy":
            axes.yaxis.set_major_formatter("{x:.0%}")
            axes.axhline(0.5, color=GREY, linestyle=":", label="chance")
        axes.legend(fontsize=9)
        axes.grid(alpha=0.3)
    folds = f" of {len(curves)} folds" if len(curves) > 1 else ""
    figure.suptitle(f"Learning curves{folds}", fontsize=11)
    return save_figure(figure, path)


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

    The pictures are ``learning_curves.png`` and ``held_out_….png``. They are extras: where they cannot be
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


def show_run(trackers: Trackers, run: Run, images: GradedImages, config: Config) -> None:
    """Report to trackers what a finished run left to look at: its pictures, and the worst mistakes."""
    within = config.evaluate.within
    if not trackers:
        return
    try:
        mistakes = _worst_mistakes(run, images, within)
        trackers.show(sorted(run.path.glob("*.png")), mistakes)
    except Exception as error:  # as of the pictures themselves
        log.warning("The run's pictures could not all be reported: %s", error)


def report_run(run: Run, images: GradedImages, config: Config) -> None:
    """Report a run that tells no epochs to trackers once it is finished: figures, pictures, mistakes."""
    if run.info.get("status") != "finished":  # folds are still to come
        return
    trackers = start_trackers(config.tracking, run.path, config.to_dict())
    trackers.log({k: v for k, v in run.info.items() if isinstance(v, float)}, 0)
    show_run(trackers, run, images, config)
    trackers.finish(run.model)


def _worst_mistakes(run: Run, images: GradedImages, within: str | None) -> list[dict[str, Any]]:
    """Rows with thumbnails; ``held_out_mistakes.png`` is drawn, too."""
    report, about = _held_out_report(run, images, within)
    if report is None:
        return []
    known = images.manifest
    evaluation = Evaluation(
        report, run.path / "held_out.json", dict(zip(known.ids, known.paths, strict=True)),
        load_score_model(run.model), about, within, dict(zip(known.ids, images.hashes, strict=True)),
    )  # fmt: skip
    mistakes = evaluation.shown_mistakes()
    if not mistakes:
        return []
    sheet = run.path / "held_out_mistakes.png"
    write_contact_sheet(sheet, mistakes, evaluation.images, f"Worst mistakes, {about}")
    names = dict.fromkeys(name for m in mistakes for name in (m.better_id, m.worse_id))
    pictures = load_pictures([evaluation.images[name] for name in names], 320)
    shown = {
        name: None if isinstance(picture, ImageError) else picture
        for name, picture in zip(names, pictures, strict=True)
    }
    return [
        {
            "should be higher": shown[m.better_id], "file": evaluation.images[m.better_id].name,
            "tier": m.better_tier, "score": round(m.better_score, 4),
            "stands above it": shown[m.worse_id], "its file": evaluation.images[m.worse_id].name,
            "its tier": m.worse_tier, "its score": round(m.worse_score, 4), "gap": round(m.gap, 4),
        }
        for m in mistakes
    ]  # fmt: skip


def _held_out_report(
    run: Run, images: GradedImages, within: str | None
) -> tuple[Report | None, str]:
    tiers = images.manifest.tiers
    held_out = load_held_out(Path(run.path), tiers)
    if held_out is None or len(set(held_out.order.tolist())) < 2:
        return None, ""
    value_of: dict[str, str | None] = {}
    if within is not None:
        value_of = dict(zip(images.manifest.ids, images.column(within), strict=True))
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
