"""The picture of a run's learning curves."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from mirip_fast.files import write_atomically


def plot_curves(path: Path, history: Sequence[Mapping[str, str]], best_epoch: int) -> None:
    """Draw loss and pairwise accuracy over the epochs into a PNG file.

    Args:
        path: the PNG file.
        history: rows of history.csv.
        best_epoch: marked with a line; best_model.pt is of this epoch.
    """
    from matplotlib.figure import Figure

    epochs = [int(row["epoch"]) for row in history]
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, what in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for part in ("train", "val"):
            axes.plot(epochs, [float(row[f"{part}/{what}"]) for row in history], label=part)
        axes.axvline(best_epoch, color="grey", linestyle=":", label=f"best epoch {best_epoch}")
        axes.set_xlabel("epoch")
        axes.set_ylabel("pairwise loss" if what == "loss" else "pairwise accuracy")
        axes.legend()
        axes.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_atomically(path, lambda stream: stream.write(picture.getvalue()))
