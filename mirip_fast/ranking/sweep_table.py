"""What a sweep found: each cell's held-out accuracy, its difference to the settings as they were, and how
sure both are.

Pairs count inside one fold and seed, since heads share no scale. The intervals come from drawing groups anew
(the same draws for all cells, so differences are paired); they do not cover other training runs, which is
what several seeds are for. Of many cells the best one looks better than it is: its figure was picked for
being high. :attr:`SweepTable.honest` is the same choice made without the fold that judges it (compare
Tibshirani & Tibshirani 2009, «A bias correction for the minimum error rate in cross-validation»).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mirip_fast.errors import TrainingError
from mirip_fast.evaluation.bootstrap import Interval, accuracy_interval, paired_bootstrap
from mirip_fast.evaluation.metrics import PairCounter, codes_of
from mirip_fast.evaluation.text_table import format_table
from mirip_fast.ranking.search_space import Cell, cell_text
from mirip_fast.ranking.sweep_fits import CellFits

#: Rows of the printed table; the file has all.
_SHOWN = 20


@dataclass(frozen=True)
class Graded:
    """The n images of a sweep.

    Attributes:
        tiers: [n], 0 is best.
        fold_of: [n] the fold that leaves the image out.
        groups: [n] names of what is drawn together.
        within: [n] codes inside which pairs count, or None.
    """

    tiers: NDArray[np.int64]
    fold_of: NDArray[np.int64]
    groups: Sequence[str]
    within: NDArray[np.int64] | None


@dataclass(frozen=True)
class SweepRow:
    """One cell.

    Attributes:
        number: of the cell; 0 is the configuration as it was.
        cell: how it differs from that.
        accuracy: mean held-out pairwise accuracy over folds and seeds, by their pairs (0–1).
        interval: of it.
        difference: to cell 0.
        difference_interval: of it, paired.
        spread: standard deviation of the accuracies of single fits.
        epoch: median of the epochs that its heads are of.
    """

    number: int
    cell: Cell
    accuracy: float
    interval: Interval | None
    difference: float
    difference_interval: Interval | None
    spread: float
    epoch: float


@dataclass(frozen=True)
class SweepTable:
    """All cells, the best one first.

    Attributes:
        rows: the cells that could be trained.
        failed: those whose loss was not finite.
        honest: accuracy of choosing the best cell without the fold that judges it.
        fits: heads per cell.
        n_groups: groups that the intervals draw from.
    """

    rows: tuple[SweepRow, ...]
    failed: tuple[Cell, ...]
    honest: float
    fits: int
    n_groups: int

    @property
    def best(self) -> SweepRow:
        """The cell with the highest accuracy."""
        return self.rows[0]

    def to_text(self) -> str:
        """The table and how to read it, for a terminal."""
        span = "95 % interval"
        headers = ["cell", "settings", "accuracy", span, "to cell 0", span, "sd", "epoch"]
        shown = [row for i, row in enumerate(self.rows) if i < _SHOWN or row.number == 0]
        cells = [
            [
                row.number,
                cell_text(row.cell),
                f"{row.accuracy:.4f}",
                _span(row.interval, ""),
                "" if row.number == 0 else f"{row.difference:+.4f}",
                "" if row.number == 0 else _span(row.difference_interval, "+"),
                f"{row.spread:.4f}",
                f"{row.epoch:.0f}",
            ]
            for row in shown
        ]
        lines = [format_table(headers, cells, "rlrlrlrr"), ""]
        if len(shown) < len(self.rows):
            lines.append(f"{len(self.rows) - len(shown)} more cells are in sweep.csv.")
        lines += [f"Not finite, left out: {cell_text(cell)}" for cell in self.failed]
        return "\n".join([*lines, *self._remarks()])

    def to_rows(self) -> list[dict[str, Any]]:
        """One flat dict per cell, for a CSV file."""
        return [
            {
                "cell": row.number,
                "settings": cell_text(row.cell),
                "accuracy": row.accuracy,
                "accuracy_low": row.interval.low if row.interval else None,
                "accuracy_high": row.interval.high if row.interval else None,
                "difference": row.difference,
                "difference_low": row.difference_interval.low if row.difference_interval else None,
                "difference_high": row.difference_interval.high
                if row.difference_interval
                else None,
                "sd_of_fits": row.spread,
                "median_epoch": row.epoch,
            }
            for row in self.rows
        ]

    def _remarks(self) -> list[str]:
        best = self.best
        remarks = [
            f"Each figure is the mean over {self.fits} heads, judged on the folds they left out and weighed "
            f"by the pairs there; sd is that of single heads. Intervals: {self.n_groups} groups drawn anew, "
            "training not repeated."
        ]
        if best.number == 0:
            return [*remarks, "No cell does better than the settings as they are."]
        remarks.append(
            f"The best of {len(self.rows)} cells is picked for its figure, so {best.accuracy:.4f} flatters "
            f"it: chosen without the fold that judges, the best cell has {self.honest:.4f}."
        )
        interval = best.difference_interval
        if interval is None or interval.low <= 0:
            remarks.append(
                f"Cell {best.number} is not surely better than cell 0: its difference may as well be chance."
            )
        return remarks


def compare_cells(
    cells: Sequence[Cell], fits: Sequence[CellFits], graded: Graded, rounds: int
) -> SweepTable:
    """Compare all cells of a sweep.

    Args:
        cells: the cells, cell 0 first.
        fits: what came of each.
        graded: the images.
        rounds: bootstrap rounds behind each interval.

    Raises:
        TrainingError: not even cell 0 could be trained.
    """
    good = [i for i, fit in enumerate(fits) if fit.finite]
    if 0 not in good:
        raise TrainingError(
            "The loss was not finite with the settings as they are (cell 0), so there is nothing to compare "
            "with: give a lower --learning-rate."
        )
    seeds = fits[0].scores.shape[0]
    codes = _codes(graded, seeds)
    repeated = {
        "tiers": np.tile(graded.tiers, seeds),
        "groups": list(graded.groups) * seeds,
        "within": codes,
        "rounds": rounds,
    }
    by_fit = {i: accuracies(fits[i], graded) for i in good}
    rows = []
    for i in good:
        scores = fits[i].scores.reshape(-1).astype(np.float64)
        paired = paired_bootstrap(scores, fits[0].scores.reshape(-1), **repeated)
        rows.append(
            SweepRow(
                number=i,
                cell=cells[i],
                accuracy=paired.first,
                interval=accuracy_interval(scores, **repeated),
                difference=paired.difference,
                difference_interval=paired.interval,
                spread=float(np.nanstd(by_fit[i])),
                epoch=float(np.median(fits[i].epochs)),
            )
        )
    rows.sort(key=lambda row: (-row.accuracy, row.number))
    return SweepTable(
        rows=tuple(rows),
        failed=tuple(cells[i] for i in range(len(cells)) if i not in good),
        honest=_honest(np.stack([by_fit[i] for i in good]), _pairs_by_fold(graded)),
        fits=int(fits[0].epochs.size),
        n_groups=len(set(graded.groups)),
    )


def _codes(graded: Graded, seeds: int) -> NDArray[np.int64]:
    """[S · n] codes of seed, fold and within value: pairs count inside one of them."""
    inner = np.zeros_like(graded.fold_of) if graded.within is None else graded.within
    names = [
        f"{seed}/{fold}/{code}"
        for seed in range(seeds)
        for fold, code in zip(graded.fold_of.tolist(), inner.tolist(), strict=True)
    ]
    return codes_of(names)


def accuracies(fit: CellFits, graded: Graded) -> NDArray[np.float64]:
    """[S, K] accuracy of each head on its fold; NaN where that has no pair."""
    folds = int(graded.fold_of.max()) + 1
    result = np.full((len(fit.scores), folds), np.nan)
    for fold in range(folds):
        index = graded.fold_of == fold
        within = None if graded.within is None else graded.within[index]
        for seed, scores in enumerate(fit.scores):
            counter = PairCounter(scores[index], graded.tiers[index], within=within)
            result[seed, fold] = counter.accuracy()
    return result


def mean_accuracy(fit: CellFits, graded: Graded) -> float:
    """The accuracy of a cell as the table has it: mean over seeds and folds, these by their pairs."""
    pairs = _pairs_by_fold(graded)
    by_fold = accuracies(fit, graded).mean(axis=0)[pairs > 0]
    return float((by_fold * pairs[pairs > 0]).sum() / pairs.sum())


def _honest(by_fit: NDArray[np.float64], pairs: NDArray[np.int64]) -> float:
    """Mean over folds of the accuracy there of the cell that is best on all the others.

    Args:
        by_fit: [cells, S, K].
        pairs: [K] pairs of each fold, by which folds weigh; 0 leaves a fold out.
    """
    by_fold = np.where(pairs > 0, by_fit.mean(axis=1), 0.0)  # [cells, K]
    chosen = 0.0
    for fold, weight in enumerate(pairs):
        others = np.delete(by_fold * pairs, fold, axis=1).sum(axis=1)
        chosen += weight * by_fold[int(np.argmax(others)), fold]
    return float(chosen / pairs.sum())


def _pairs_by_fold(graded: Graded) -> NDArray[np.int64]:
    """[K] pairs that count in each fold."""
    folds = int(graded.fold_of.max()) + 1
    counts = np.zeros(folds, dtype=np.int64)
    for fold in range(folds):
        index = graded.fold_of == fold
        within = None if graded.within is None else graded.within[index]
        counter = PairCounter(np.zeros(int(index.sum())), graded.tiers[index], within=within)
        counts[fold] = counter.table()[1].sum()
    return counts


def _span(interval: Interval | None, sign: str) -> str:
    if interval is None:
        return "unknown"
    return f"{interval.low:{sign}.4f} – {interval.high:{sign}.4f}"
