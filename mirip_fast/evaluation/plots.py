"""The pictures of a report: scores by tier, confusion matrix, accuracy by tier pair, group and within.

Each function draws one PNG file from a report and says in its title whose figures they are and how many
works they rest on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mirip_fast.evaluation.intervals import Interval
from mirip_fast.evaluation.plot_style import (
    GREY,
    MAIN,
    SECOND,
    new_figure,
    save_figure,
    tier_colours,
)
from mirip_fast.evaluation.plot_text import fonts_for
from mirip_fast.evaluation.reliability_plot import plot_reliability
from mirip_fast.evaluation.report import Report

_MANY_TIERS = 7  # more of them make a matrix of the tier pairs, in place of one line each
_LINES = 40  # of groups or within values in one picture
_NAME_CELLS = 36  # terminal cells of a name beside its line
_SWARM = 12  # tiers of fewer works show each work as a point in place of a shape


def draw_report(report: Report, folder: Path, stem: str, about: str) -> list[Path]:
    """Draw what the report has, from ``<stem>_scores_by_tier.png`` to ``<stem>_within.png``.

    Args:
        report: the figures.
        folder: where the files go.
        stem: their names' beginning.
        about: which images were judged, for the titles.

    Returns:
        The files written.
    """
    files = []
    if report.tier_names:
        files = [
            plot_scores_by_tier(folder / f"{stem}_scores_by_tier.png", report, about),
            plot_confusion(folder / f"{stem}_confusion.png", report, about),
            plot_tier_pairs(folder / f"{stem}_tier_pairs.png", report, about),
        ]
    known = report.probabilities
    if known is not None and known.pairs is not None:
        files.append(folder / f"{stem}_reliability.png")
        title = f"{about}\nprobabilities learned from {known.images} works ({known.source})"
        plot_reliability(files[-1], known.pairs, title)
    rows = [
        (f"{row.group} ({row.images} works)", row.pairs, row.accuracy, row.interval)
        for row in report.groups
    ]
    if len(rows) > 1:
        title = "Works of a group against all others, right order"
        path = folder / f"{stem}_groups.png"
        files.append(_plot_shares(path, rows, title, about, report))
    values = sorted(report.within_values, key=lambda row: row.accuracy)
    if len(values) > 1:
        lines = [(row.value, row.pairs, row.accuracy, row.interval) for row in values]
        title = "Pairs inside the same within value in the right order"
        files.append(_plot_shares(folder / f"{stem}_within.png", lines, title, about, report))
    return files


def plot_scores_by_tier(path: Path, report: Report, about: str) -> Path:
    """The scores of each true tier as a violin, best tier on top, with the median.

    The width of a violin is a Gaussian kernel density (bandwidth: Scott 1992). Of tiers with few works,
    or with one score only, each work is a point.
    """
    names, counts = report.tier_names, report.tier_counts
    fonts = fonts_for(names)
    figure = new_figure(8, max(2.6, 1.6 + 0.55 * len(names)))
    axes = figure.subplots()
    places = np.arange(len(names))[::-1]
    for tier, colour in enumerate(tier_colours(len(names))):
        scores = report.judged.scores[report.judged.tiers == tier]
        if not len(scores):
            axes.annotate("no work", (0.5, places[tier]), xycoords=axes.get_yaxis_transform(),
                          ha="center", va="center", color=GREY, fontsize=9)  # fmt: skip
            continue
        if len(scores) >= _SWARM and np.ptp(scores) > 0:
            shape = axes.violinplot(
                scores, positions=[places[tier]], orientation="horizontal", widths=0.85,
                showextrema=False, points=200,
            )  # fmt: skip
            shape["bodies"][0].set(facecolor=colour, edgecolor=colour, alpha=0.65)
        else:
            axes.scatter(scores, np.full(len(scores), places[tier]), color=colour, s=22, zorder=3)
        middle = float(np.median(scores))
        axes.plot([middle] * 2, places[tier] + np.array([-0.34, 0.34]), color="black", linewidth=2)
    labels = [f"{fonts.text(n, 16)}  (n = {c:,})" for n, c in zip(names, counts, strict=True)]
    axes.set_yticks(places, labels, family=list(fonts.families), parse_math=False)
    axes.set(ylim=(-0.6, len(names) - 0.4), xlabel="score (higher is better); line: median")
    axes.grid(axis="x", alpha=0.3)
    _title(figure, "Scores by the true tier", about)
    return save_figure(figure, path)


def plot_confusion(path: Path, report: Report, about: str) -> Path:
    """True tiers against predicted ones: shade by the share of the true tier, number of works written in.

    Predicted is the most probable tier where probabilities are known, else the tier by quota.
    """
    known = report.probabilities
    figures, by = report.by_quota, "by quota (as many of each as there are)"
    if known is not None and known.tiers is not None:
        figures, by = known.tiers, "most probable"
    assert figures is not None  # there are tiers
    counts = np.array(figures.confusion)
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    figure, axes = _matrix(shares, report.tier_names, label="share of the true tier")
    # Of 26 tiers, zeros would hide what is there.
    for i, j in np.argwhere(counts > (0 if len(counts) > _MANY_TIERS else -1)):
        axes.text(j, i, f"{counts[i, j]:,}", ha="center", va="center",
                  fontsize=11 if len(counts) <= _MANY_TIERS else 7,
                  color="white" if shares[i, j] > 0.55 else "black")  # fmt: skip
    axes.set(xlabel=f"predicted tier: {by}", ylabel="true tier")
    _title(figure, f"{figures.accuracy:.1%} of the works in their tier", about)
    return save_figure(figure, path)


def plot_tier_pairs(path: Path, report: Report, about: str) -> Path:
    """Pairwise accuracy of each tier against each worse one: lines with intervals, or a matrix of many."""
    if len(report.tier_names) <= _MANY_TIERS:
        rows = [
            (f"{row.better} over {row.worse}", row.pairs, row.accuracy, row.interval)
            for row in report.tier_pairs
        ]
        return _plot_shares(path, rows, "Pairs of two tiers in the right order", about, report)
    place = {name: i for i, name in enumerate(report.tier_names)}
    shares = np.full((len(place), len(place)), np.nan)
    for row in report.tier_pairs:
        shares[place[row.better], place[row.worse]] = row.accuracy
    figure, axes = _matrix(shares, report.tier_names, label="share of pairs in the right order")
    axes.set(xlabel="worse tier", ylabel="better tier")
    _title(figure, "Pairs of two tiers in the right order (empty: no pair)", about)
    return save_figure(figure, path)


def _plot_shares(
    path: Path,
    rows: Sequence[tuple[str, int, float, Interval | None]],
    title: str,
    about: str,
    report: Report,
) -> Path:
    """One line per (name, pairs, share, interval), with the mark of chance and of all pairs together."""
    shown, left = rows[:_LINES], len(rows) - _LINES
    fonts = fonts_for([name for name, *_ in shown])
    figure = new_figure(8, 1.9 + 0.3 * len(shown))
    axes = figure.subplots()
    places = np.arange(len(shown))[::-1]
    for place, (_, _, share, interval) in zip(places, shown, strict=True):
        if interval is not None:
            axes.plot([interval.low, interval.high], [place] * 2, color=MAIN, linewidth=2)
        axes.plot([share], [place], "o", color=MAIN, markersize=6)
    axes.axvline(0.5, color=GREY, linestyle=":", label="chance")
    overall = report.pairwise_accuracy
    axes.axvline(overall, color=SECOND, linestyle="--", linewidth=1, label=f"all {overall:.1%}")
    labels = [f"{fonts.text(name, _NAME_CELLS)}  n = {pairs:,}" for name, pairs, *_ in shown]
    axes.set_yticks(places, labels, family=list(fonts.families), parse_math=False, fontsize=9)
    axes.xaxis.set_major_formatter("{x:.0%}")
    known = any(interval is not None for *_, interval in shown)
    level = f"; bars: {100 * report.confidence:g} % interval" if known else "; intervals unknown"
    axes.set(ylim=(-0.7, len(shown) - 0.3), xlabel=f"share of n pairs in the right order{level}")
    axes.margins(x=0.04)
    axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    axes.grid(axis="x", alpha=0.3)
    more = f"; the {len(shown)} lowest, {left} more in the JSON file" if left > 0 else ""
    _title(figure, title, about + more)
    return save_figure(figure, path)


def _matrix(shares: Any, names: Sequence[str], *, label: str) -> tuple[Any, Any]:
    """A figure with a shaded matrix of shares [K, K], its names at both sides, and a colour bar."""
    fonts = fonts_for(names)
    side = max(4.6, min(11.0, 2.6 + 0.42 * len(names)))
    figure = new_figure(side + 1.2, side)
    axes = figure.subplots()
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(image, ax=axes, format="{x:.0%}", label=label, shrink=0.85)
    labels = [fonts.text(name, 12) for name in names]
    turn = 90 if max(map(len, labels)) * len(labels) > 40 else 0
    style: dict[str, Any] = {"family": list(fonts.families), "parse_math": False, "fontsize": 9}
    axes.set_xticks(np.arange(len(names)), labels, rotation=turn, **style)
    axes.set_yticks(np.arange(len(names)), labels, **style)
    return figure, axes


def _title(figure: Any, title: str, about: str) -> None:
    fonts = fonts_for([about])
    figure.suptitle(f"{title}\n{fonts.text(about, 90)}", fontsize=11, parse_math=False,
                    family=list(fonts.families))  # fmt: skip
