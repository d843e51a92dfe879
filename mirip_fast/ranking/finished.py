"""The end of a training run: what run.json says of it, its pictures, and what trackers are shown."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mirip_fast.config import Config
from mirip_fast.data.decode_pool import load_pictures
from mirip_fast.errors import ImageError
from mirip_fast.evaluation.plots import (
    GREY,
    MAIN,
    SECOND,
    new_figure,
    save_figure,
    write_contact_sheet,
)
from mirip_fast.evaluation.report import Report
from mirip_fast.files import read_json
from mirip_fast.ranking.evaluate import files_of, shown_mistakes
from mirip_fast.ranking.graded import GradedImages
from mirip_fast.training.run_folder import FOLDS_FILE, Run, fold_name
from mirip_fast.training.trackers import Trackers, start_trackers

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

#: Columns of a learning curve; losses and pairwise accuracies (0–1) are means over pairs.
CURVES = ("train/loss", "val/loss", "train/accuracy", "val/accuracy")
#: (name of the fold, a row per epoch with ``epoch`` and :data:`CURVES`, best epoch or None).
Fit = tuple[str, "pd.DataFrame", int | None]


def read_curves(run: Run) -> list[Fit]:
    """The learning curves of a run, or of each of its folds; none where no history is there.

    Raises:
        ValueError, KeyError: history.csv is damaged.
    """
    import pandas as pd

    runs = [(run, "")]
    if run.has_folds:
        folds = max(read_json(run.path / FOLDS_FILE)["fold_of"]) + 1
        runs = [(Run(run.path / fold_name(i)), f"fold {i}") for i in range(folds)]
    found: list[Fit] = []
    for one, name in runs:
        if history := one.history():
            epochs = pd.DataFrame(history)[["epoch", *CURVES]].astype(float)
            best = one.info.get("best_epoch")
            found.append((name, epochs.astype({"epoch": int}), None if best is None else int(best)))
    return found


def plot_curves(path: Path, curves: Sequence[Fit]) -> Path:
    """Draw loss and pairwise accuracy over the epochs into a PNG file; folds on top of each other.

    Args:
        path: the PNG file.
        curves: one or more fits.
    """
    figure = new_figure(10, 4)
    strength = 1 if len(curves) == 1 else 0.55
    for axes, what in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for number, (_, fit, best) in enumerate(curves):
            lines = (("train", "training", SECOND, "--"), ("val", "validation", MAIN, "-"))
            mark = "o" if len(fit) == 1 else None
            for part, label, colour, dashes in lines:
                axes.plot(fit["epoch"], fit[f"{part}/{what}"], color=colour, linestyle=dashes,
                          marker=mark, alpha=strength, label=None if number else label)  # fmt: skip
            label = f"best epoch {best}" if len(curves) == 1 else "best epochs"
            chosen = fit[fit["epoch"] == best]
            if len(chosen):
                axes.plot(best, chosen[f"val/{what}"].iloc[0], "D", color=MAIN,
                          markeredgecolor="black", markersize=6, zorder=4,
                          label=None if number else label)  # fmt: skip
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


def finish_run(
    run: Run, held_out: GradedImages | None, report: Report | None, **about: Any
) -> None:
    """Say in run.json that a run is finished and how, and draw its learning curves and how good it is.

    The pictures are ``learning_curves.png`` and ``held_out_….png``. They are extras: where they cannot be
    drawn, the run says why in its log and stays what it is.

    Args:
        run: a trained run, or one of folds that are joined.
        held_out: works with scores by models that had not trained on them.
        report: how these order them.
        about: further entries of run.json.
    """
    if "seconds" in about:
        about["seconds"] = round(about["seconds"], 2)
    run.update(status="finished", **about)
    try:
        curves = read_curves(run)
        if curves:
            plot_curves(run.path / "learning_curves.png", curves)
        if report is not None and held_out is not None:
            report.draw(run.path, "held_out", _about(held_out))
    except Exception as error:  # whatever a drawing library or a full disk comes up with
        log.warning(
            "The run is complete, but its pictures could not all be drawn: %s: %s",
            type(error).__name__,
            error,
        )


def _about(held_out: GradedImages) -> str:
    return f"{len(held_out)} held-out works ({_SOURCES[held_out.held_out_by]})"


def show_run(
    trackers: Trackers, run: Run, held_out: GradedImages | None, report: Report | None
) -> None:
    """Report to trackers what a finished run left to look at: its pictures, and the worst mistakes."""
    if not trackers:
        return
    try:
        mistakes = (
            [] if report is None or held_out is None else _worst_mistakes(run, held_out, report)
        )
        trackers.show(sorted(run.path.glob("*.png")), mistakes)
    except Exception as error:  # as of the pictures themselves
        log.warning("The run's pictures could not all be reported: %s", error)


def report_run(
    run: Run, config: Config, held_out: GradedImages | None, report: Report | None
) -> None:
    """Report a run that tells no epochs to trackers once it is finished: figures, pictures, mistakes."""
    if run.info.get("status") != "finished":  # folds are still to come
        return
    trackers = start_trackers(config.tracking, run.path, config.to_dict())
    trackers.log({k: v for k, v in run.info.items() if isinstance(v, float)}, 0)
    show_run(trackers, run, held_out, report)
    trackers.finish(run.model)


def _worst_mistakes(run: Run, held_out: GradedImages, report: Report) -> list[dict[str, Any]]:
    """Rows with thumbnails; ``held_out_mistakes.png`` is drawn, too."""
    mistakes, files = shown_mistakes(report, held_out), files_of(held_out)
    if mistakes.empty:
        return []
    sheet = run.path / "held_out_mistakes.png"
    write_contact_sheet(sheet, mistakes, files, f"Worst mistakes, {_about(held_out)}")
    names = dict.fromkeys(mistakes[["better_id", "worse_id"]].to_numpy().ravel())
    pictures = load_pictures([files[name] for name in names], 320)
    shown = {
        name: None if isinstance(picture, ImageError) else picture
        for name, picture in zip(names, pictures, strict=True)
    }
    return [
        {
            "should be higher": shown[m["better_id"]], "file": files[m["better_id"]].name,
            "tier": m["better_tier"], "score": round(m["better_score"], 4),
            "stands above it": shown[m["worse_id"]], "its file": files[m["worse_id"]].name,
            "its tier": m["worse_tier"], "its score": round(m["worse_score"], 4),
            "gap": round(m["gap"], 4),
        }
        for m in mistakes.to_dict("records")
    ]  # fmt: skip
