"""The pictures of an evaluation: figures of a report, and the worst mistakes side by side.

Each function draws one PNG file and says in its title whose figures they are and how many works they rest on.
Figures are matplotlib objects of their own; nothing touches pyplot's global state or opens a window. Colours
are such that colour-blind people tell them apart. Names of files are drawn with fonts that have them:
matplotlib's own font has no Korean, Chinese or Japanese letters and no emoji, so fonts of the machine that do
are looked for; a letter that none has becomes □.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mirip_fast.data.decode_pool import load_pictures
from mirip_fast.errors import ImageError
from mirip_fast.evaluation.reliability import Reliability
from mirip_fast.evaluation.report import Mistake, Report, Row
from mirip_fast.evaluation.text_table import printable, shorten
from mirip_fast.files import write_atomically
from mirip_fast.runtime import our_cores

if TYPE_CHECKING:
    from PIL.Image import Image

#: Blue and orange of the Okabe–Ito palette (Okabe & Ito 2008, Color Universal Design).
MAIN, SECOND = "#0072b2", "#d55e00"
GREY = "#767676"

_BASE = "DejaVu Sans"  # comes with matplotlib
_LAST_RESORT = "Last Resort"  # has a frame for every character, and a picture of none
# Joiners and variation selectors have no picture of their own.
_INVISIBLE = frozenset("\u200d\ufe0e\ufe0f")

_MANY_TIERS = 7  # more of them make a matrix of the tier pairs, in place of one line each
_LINES = 40  # of groups or within values in one picture
_LABEL_CELLS = 36  # terminal cells of a name beside its line
_SWARM = 12  # tiers of fewer works show each work as a point in place of a shape
_THUMBNAIL = 320  # pixels, the longer side
_NAME_CELLS = 30  # width of a name below its picture
_PAIRS_PER_LINE = 2


def draw_report(report: Report, folder: Path, stem: str, about: str) -> list[Path]:
    """Draw what the report has, from ``<stem>_scores_by_tier.png`` to ``<stem>_within.png``.

    Args:
        report: the figures.
        folder: where the files go.
        stem: their names' beginning.
        about: which images were evaluated, for the titles.

    Returns:
        The files written.
    """
    names = [row.name for row in (*report.groups, *report.within_values)]
    with drawing([about, *report.tier_names, *names]):
        return _draw_report(report, folder, stem, about)


def _draw_report(report: Report, folder: Path, stem: str, about: str) -> list[Path]:
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
    if len(report.groups) > 1:
        title = "Works of a group against all others, right order"
        path = folder / f"{stem}_groups.png"
        files.append(_plot_shares(path, report.groups, title, about, report))
    values = sorted(report.within_values, key=lambda row: row.accuracy)
    if len(values) > 1:
        title = "Pairs inside the same within value in the right order"
        files.append(_plot_shares(folder / f"{stem}_within.png", values, title, about, report))
    return files


def plot_scores_by_tier(path: Path, report: Report, about: str) -> Path:
    """The scores of each true tier as a violin, best tier on top, with the median.

    The width of a violin is a Gaussian kernel density (bandwidth: Scott 1992). Of tiers with few works,
    or with one score only, each work is a point.
    """
    names, counts = report.tier_names, report.tier_counts
    figure = new_figure(8, max(2.6, 1.6 + 0.55 * len(names)))
    axes = figure.subplots()
    places = np.arange(len(names))[::-1]
    for tier, colour in enumerate(tier_colours(len(names))):
        scores = report.scores[report.tiers == tier]
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
    labels = [f"{label(n, 16)}  (n = {c:,})" for n, c in zip(names, counts, strict=True)]
    axes.set_yticks(places, labels)
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
    figure, axes = _matrix(shares, report.tier_names, "share of the true tier")
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
        title = "Pairs of two tiers in the right order"
        return _plot_shares(path, report.tier_pairs, title, about, report)
    place = {name: i for i, name in enumerate(report.tier_names)}
    shares = np.full((len(place), len(place)), np.nan)
    for row in report.tier_pairs:
        shares[place[row.name], place[str(row.worse)]] = row.accuracy
    figure, axes = _matrix(shares, report.tier_names, "share of pairs in the right order")
    axes.set(xlabel="worse tier", ylabel="better tier")
    _title(figure, "Pairs of two tiers in the right order (empty: no pair)", about)
    return save_figure(figure, path)


def _plot_shares(path: Path, rows: Sequence[Row], title: str, about: str, report: Report) -> Path:
    """One line per row, with the mark of chance and of all pairs together."""
    shown, left = rows[:_LINES], len(rows) - _LINES
    names = [
        row.name
        + ("" if row.worse is None else f" over {row.worse}")
        + ("" if row.images is None else f" ({row.images} works)")
        for row in shown
    ]
    figure = new_figure(8, 1.9 + 0.3 * len(shown))
    axes = figure.subplots()
    places = np.arange(len(shown))[::-1]
    for place, row in zip(places, shown, strict=True):
        if row.interval is not None:
            axes.plot([row.interval.low, row.interval.high], [place] * 2, color=MAIN, linewidth=2)
        axes.plot([row.accuracy], [place], "o", color=MAIN, markersize=6)
    axes.axvline(0.5, color=GREY, linestyle=":", label="chance")
    overall = report.pairwise_accuracy
    axes.axvline(overall, color=SECOND, linestyle="--", linewidth=1, label=f"all {overall:.1%}")
    labels = [
        f"{label(name, _LABEL_CELLS)}  n = {row.pairs:,}"
        for name, row in zip(names, shown, strict=True)
    ]
    axes.set_yticks(places, labels, fontsize=9)
    axes.xaxis.set_major_formatter("{x:.0%}")
    known = any(row.interval is not None for row in shown)
    level = f"; bars: {100 * report.confidence:g} % interval" if known else ""
    axes.set(ylim=(-0.7, len(shown) - 0.3), xlabel=f"share of n pairs in the right order{level}")
    axes.margins(x=0.04)
    axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    axes.grid(axis="x", alpha=0.3)
    more = f"; the {len(shown)} lowest, {left} more in the JSON file" if left > 0 else ""
    _title(figure, title, about + more)
    return save_figure(figure, path)


def _matrix(shares: Any, names: Sequence[str], what: str) -> tuple[Any, Any]:
    """A figure with a shaded matrix of shares [K, K], its names at both sides, and a colour bar."""
    side = max(4.6, min(11.0, 2.6 + 0.42 * len(names)))
    figure = new_figure(side + 1.2, side)
    axes = figure.subplots()
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(image, ax=axes, format="{x:.0%}", label=what, shrink=0.85)
    labels = [label(name, 12) for name in names]
    turn = 90 if max(map(len, labels)) * len(labels) > 40 else 0
    axes.set_xticks(np.arange(len(names)), labels, rotation=turn, fontsize=9)
    axes.set_yticks(np.arange(len(names)), labels, fontsize=9)
    return figure, axes


def _title(figure: Any, title: str, about: str) -> None:
    figure.suptitle(f"{title}\n{label(about, 90)}", fontsize=11)


def plot_reliability(path: Path, pairs: Reliability, title: str) -> None:
    """Draw a reliability diagram and the number of pairs in each bin into a PNG file.

    Each pair counts half in each orientation, so the right half mirrors the left.

    Args:
        path: the PNG file.
        pairs: predicted probabilities against observed frequencies.
        title: whose they are.
    """
    figure = new_figure(6, 7.6)
    lines = "\n".join(label(line, 76) for line in title.split("\n"))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot((0, 1), (0, 1), color=GREY, linestyle=":", label="observed as predicted")
    level = "" if pairs.interval is None else f"{100 * pairs.interval.confidence:g} % interval"
    legend: str | None = f"observed{level and f', {level} over groups'}"
    for part in pairs.bins:
        if part.predicted is None or part.observed is None:
            continue
        below = above = 0.0
        if part.interval is not None:
            # A resampled share may lie to one side of the share itself: a bar has no negative length.
            below = max(0.0, part.observed - part.interval.low)
            above = max(0.0, part.interval.high - part.observed)
        for x, y, span in (
            (part.predicted, part.observed, ((below,), (above,))),
            (1 - part.predicted, 1 - part.observed, ((above,), (below,))),
        ):
            upper.errorbar(x, y, yerr=span, fmt="o", color=MAIN, capsize=3, label=legend)
            legend = None
        for left in (part.low, 1 - part.high):
            width = part.high - part.low
            lower.bar(left, part.pairs / 2, width, align="edge", color=MAIN, edgecolor="white")
    known = "interval unknown"
    if pairs.interval is not None:
        known = f"{level} {pairs.interval.low:.3f} – {pairs.interval.high:.3f}"
    upper.set_title(f"{lines}\nexpected calibration error {pairs.ece:.3f} ({known})", fontsize=9)
    upper.set(xlim=(0, 1), ylim=(0, 1), ylabel="share of pairs in which a is better")
    upper.legend(fontsize=8, loc="lower right")
    upper.grid(alpha=0.3)
    lower.set(xlabel="predicted: P(a beats b)", ylabel="pairs")
    save_figure(figure, path)


def write_contact_sheet(
    path: Path, mistakes: Sequence[Mistake], images: Mapping[str, Path], title: str
) -> None:
    """Draw wrongly ordered pairs into a PNG file, the work that should be higher on the left.

    A work that cannot be read any more is drawn as an empty frame with the reason.

    Args:
        path: the PNG file.
        mistakes: one or more, the worst first.
        images: image id → file.
        title: the line above all.
    """
    files = {name: images[name] for m in mistakes for name in (m.better_id, m.worse_id)}
    names, tiers = [file.name for file in files.values()], [m.better_tier for m in mistakes]
    with drawing([title, *names, *tiers, *(m.worse_tier for m in mistakes)]) as lacking:
        figure = _sheet(mistakes, files, title)
        note = "Left: the better tier, but the lower score. Right: the worse tier, but the higher score."
        if lacking & set(map(ord, "".join(map(label, names)))):
            note += "  □: no font of this machine has the letter (the JSON file has the names)."
        figure.supxlabel(note, fontsize=9)
        save_figure(figure, path, dpi=100)


def _sheet(mistakes: Sequence[Mistake], files: Mapping[str, Path], title: str) -> Any:
    workers = min(len(files), our_cores())
    shown = dict(
        zip(files, load_pictures(files.values(), _THUMBNAIL, workers=workers), strict=True)
    )
    lines = -(-len(mistakes) // _PAIRS_PER_LINE)
    figure = new_figure(13, 3.3 * lines + 0.7)
    figure.suptitle(label(title, 110))
    frames = figure.subplots(lines, 2 * _PAIRS_PER_LINE, squeeze=False).ravel()
    for axes in frames[2 * len(mistakes) :]:
        axes.set_axis_off()
    for number, mistake in enumerate(mistakes):
        left, right = frames[2 * number : 2 * number + 2]
        left.set_title(f"{number + 1}. gap {mistake.gap:.3g}", fontsize=10, loc="left")
        sides = (
            (left, mistake.better_id, mistake.better_tier, mistake.better_score),
            (right, mistake.worse_id, mistake.worse_tier, mistake.worse_score),
        )
        for axes, name, tier, score in sides:
            caption = f"tier {label(tier, 12)}, score {score:.3g}"
            _draw(axes, files[name], shown[name], caption)
    return figure


def _draw(axes: Any, file: Path, picture: Image | ImageError, caption: str) -> None:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color("lightgrey")
    if isinstance(picture, ImageError):
        axes.set(xlim=(0, 1), ylim=(0, 1))
        axes.text(0.5, 0.5, label(f"not readable: {picture}", 40), ha="center", fontsize=8)
    else:
        axes.imshow(np.asarray(picture))
    named = f"{label(file.name, _NAME_CELLS)}\n{caption}"
    axes.text(0.5, -0.02, named, transform=axes.transAxes, ha="center", va="top", fontsize=9)


def tier_colours(count: int) -> list[str]:
    """One colour per tier, best first: from dark teal to light sand, which differ in lightness too."""
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    shades = LinearSegmentedColormap.from_list("tiers", ["#17736b", "#c39a6b"])
    return [to_hex(shades(i / max(1, count - 1))) for i in range(count)]


def new_figure(width: float, height: float) -> Any:
    """An empty figure; width and height in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path, *, dpi: int = 120) -> Path:
    """Write a figure as a PNG file, whole or not at all; returns ``path``."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=dpi)
    write_atomically(path, lambda stream: stream.write(picture.getvalue()))
    return path


@contextmanager
def drawing(texts: Iterable[str]) -> Iterator[set[int]]:
    """Figures made and saved inside have the fonts that ``texts`` need, as far as this machine offers them.

    Gives the letters (code points) that none of its fonts has: they become □.
    """
    from matplotlib import font_manager, rc_context

    lacking = {ord(ch) for text in texts for ch in label(text)}
    families, tried = [_BASE], {_BASE}
    lacking -= _characters(font_manager.findfont(_BASE))
    for entry in font_manager.fontManager.ttflist if lacking else ():
        if entry.name in tried or entry.style != "normal" or entry.name.startswith(_LAST_RESORT):
            continue
        tried.add(entry.name)
        more = _characters(entry.fname)
        if lacking & more:
            families.append(entry.name)
            lacking -= more
    with rc_context({"font.family": families, "text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # no font has the letter: a box is drawn
        yield lacking


def label(name: str, width: int = 10_000) -> str:
    """``name`` as drawable text of at most ``width`` terminal cells, cut in the middle with «…»."""
    return shorten("".join(ch for ch in printable(name) if ch not in _INVISIBLE), width)


def _characters(path: str) -> set[int]:
    """Code points of a font file; none where it cannot be drawn with (fonts of coloured bitmaps)."""
    from matplotlib.ft2font import FT2Font

    try:
        return set(FT2Font(path).get_charmap())
    except (OSError, RuntimeError) as error:
        logging.getLogger(__name__).debug("%s: %s", path, error)
        return set()
