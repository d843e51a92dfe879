"""Learning curves: reading them from a run's folder, and their picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mirip_fast.evaluation.plots import GREY, MAIN, SECOND, new_figure, save_figure
from mirip_fast.files import read_json
from mirip_fast.training.run_folder import FOLDS_FILE, Run


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
