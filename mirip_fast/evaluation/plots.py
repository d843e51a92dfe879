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
from mirip_fast.evaluation.metrics import FloatArray, IntArray
from mirip_fast.evaluation.text_table import printable, shorten
from mirip_fast.files import write_bytes
from mirip_fast.runtime import our_cores

if TYPE_CHECKING:
    import pandas as pd
    from PIL.Image import Image

#: Blue and orange of the Okabe–Ito palette (Okabe & Ito 2008, Color Universal Design).
MAIN, SECOND = "#0072b2", "#d55e00"
GREY = "#767676"

#: More tiers than these make a matrix of the tier pairs, in place of one line each.
MANY_TIERS = 7

_BASE = "DejaVu Sans"  # comes with matplotlib
_LAST_RESORT = "Last Resort"  # has a frame for every character, and a picture of none
# Joiners and variation selectors have no picture of their own.
_INVISIBLE = frozenset("\u200d\ufe0e\ufe0f")

_LINES = 40  # of groups or within values in one picture
_LABEL_CELLS = 36  # terminal cells of a name beside its line
_SWARM = 12  # tiers of fewer works show each work as a point in place of a shape
_THUMBNAIL = 320  # pixels, the longer side
_NAME_CELLS = 30  # width of a name below its picture
_PAIRS_PER_LINE = 2


def plot_scores_by_tier(
    path: Path, scores: FloatArray, tiers: IntArray, names: Sequence[str], about: str
) -> Path:
    """The scores of each true tier as a violin, best tier on top, with the median.

    The width of a violin is a Gaussian kernel density (bandwidth: Scott 1992). Of tiers with few works,
    or with one score only, each work is a point.
    """
    counts = np.bincount(tiers, minlength=len(names)).tolist()
    figure = new_figure(8, max(2.6, 1.6 + 0.55 * len(names)))
    axes = figure.subplots()
    places = np.arange(len(names))[::-1]
    for tier, colour in enumerate(tier_colours(len(names))):
        own = scores[tiers == tier]
        if not len(own):
            axes.annotate("no work", (0.5, places[tier]), xycoords=axes.get_yaxis_transform(),
                          ha="center", va="center", color=GREY, fontsize=9)  # fmt: skip
            continue
        if len(own) >= _SWARM and np.ptp(own) > 0:
            shape = axes.violinplot(
                own, positions=[places[tier]], orientation="horizontal", widths=0.85,
                showextrema=False, points=200,
            )  # fmt: skip
            shape["bodies"][0].set(facecolor=colour, edgecolor=colour, alpha=0.65)
        else:
            axes.scatter(own, np.full(len(own), places[tier]), color=colour, s=22, zorder=3)
        middle = float(np.median(own))
        axes.plot([middle] * 2, places[tier] + np.array([-0.34, 0.34]), color="black", linewidth=2)
    labels = [f"{label(n, 16)}  (n = {c:,})" for n, c in zip(names, counts, strict=True)]
    axes.set_yticks(places, labels)
    axes.set(ylim=(-0.6, len(names) - 0.4), xlabel="score (higher is better); line: median")
    axes.grid(axis="x", alpha=0.3)
    _title(figure, "Scores by the true tier", about)
    return save_figure(figure, path)


def plot_confusion(
    path: Path, judged: Mapping[str, Any], names: Sequence[str], by: str, about: str
) -> Path:
    """True tiers against predicted ones: shade by the share of the true tier, number of works written in.

    Args:
        path: the PNG file.
        judged: ``accuracy`` and ``confusion``, works by [true tier][predicted tier].
        names: of the tiers, best first.
        by: how tiers were predicted.
        about: which works.
    """
    counts = np.array(judged["confusion"])
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    figure, axes = _matrix(shares, names, "share of the true tier")
    # Of 26 tiers, zeros would hide what is there.
    for i, j in np.argwhere(counts > (0 if len(counts) > MANY_TIERS else -1)):
        axes.text(j, i, f"{counts[i, j]:,}", ha="center", va="center",
                  fontsize=11 if len(counts) <= MANY_TIERS else 7,
                  color="white" if shares[i, j] > 0.55 else "black")  # fmt: skip
    axes.set(xlabel=f"predicted tier: {by}", ylabel="true tier")
    _title(figure, f"{judged['accuracy']:.1%} of the works in their tier", about)
    return save_figure(figure, path)


def plot_tier_pairs(
    path: Path, pairs: pd.DataFrame, names: Sequence[str], title: str, about: str
) -> Path:
    """Pairwise accuracy of each tier against each worse one, as a matrix."""
    shares = np.full((len(names), len(names)), np.nan)
    for row in pairs.to_dict("records"):
        shares[names.index(row["better"]), names.index(row["worse"])] = row["accuracy"]
    figure, axes = _matrix(shares, names, "share of pairs in the right order")
    axes.set(xlabel="worse tier", ylabel="better tier")
    _title(figure, f"{title} (empty: no pair)", about)
    return save_figure(figure, path)


def plot_shares(
    path: Path, names: Sequence[str], table: pd.DataFrame, title: str, about: str,
    overall: float, confidence: float,
) -> Path:  # fmt: skip
    """One line per row, with the mark of chance and of all pairs together.

    Args:
        path: the PNG file.
        names: of the rows.
        table: ``pairs``, ``accuracy`` (share of them in the right order) and ``interval``, if there is one.
        title: what is shown.
        about: which works.
        overall: share of all pairs in the right order.
        confidence: of the intervals.
    """
    shown, left = table[:_LINES], len(table) - _LINES
    spans = [*shown["interval"]] if "interval" in shown else [None] * len(shown)
    figure = new_figure(8, 1.9 + 0.3 * len(shown))
    axes = figure.subplots()
    places = np.arange(len(shown))[::-1]
    for place, accuracy, ends in zip(places, shown["accuracy"], spans, strict=True):
        if ends is not None:
            axes.plot([ends.low, ends.high], [place] * 2, color=MAIN, linewidth=2)
        axes.plot([accuracy], [place], "o", color=MAIN, markersize=6)
    axes.axvline(0.5, color=GREY, linestyle=":", label="chance")
    axes.axvline(overall, color=SECOND, linestyle="--", linewidth=1, label=f"all {overall:.1%}")
    labels = [
        f"{label(name, _LABEL_CELLS)}  n = {pairs:,}"
        for name, pairs in zip(names, shown["pairs"], strict=False)
    ]
    axes.set_yticks(places, labels, fontsize=9)
    axes.xaxis.set_major_formatter("{x:.0%}")
    level = f"; bars: {100 * confidence:g} % interval" if any(spans) else ""
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


def plot_reliability(path: Path, pairs: Mapping[str, Any], title: str) -> None:
    """Draw a reliability diagram and the number of pairs in each bin into a PNG file.

    Each pair counts half in each orientation, so the right half mirrors the left.

    Args:
        path: the PNG file.
        pairs: predicted probabilities against observed frequencies, see
            :func:`mirip_fast.evaluation.reliability.reliability`.
        title: whose they are.
    """
    figure = new_figure(6, 7.6)
    lines = "\n".join(label(line, 76) for line in title.split("\n"))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot((0, 1), (0, 1), color=GREY, linestyle=":", label="observed as predicted")
    ends = pairs["interval"]
    level = "" if ends is None else f"{100 * ends.confidence:g} % interval"
    legend: str | None = f"observed{level and f', {level} over groups'}"
    for part in pairs["bins"]:
        x, y, span = part["predicted"], part["observed"], part["interval"]
        if x is None:
            continue
        below = above = 0.0
        if span is not None:
            # A resampled share may lie to one side of the share itself: a bar has no negative length.
            below, above = max(0.0, y - span.low), max(0.0, span.high - y)
        for place, share, bar in (
            (x, y, ((below,), (above,))),
            (1 - x, 1 - y, ((above,), (below,))),
        ):
            upper.errorbar(place, share, yerr=bar, fmt="o", color=MAIN, capsize=3, label=legend)
            legend = None
        for left in (part["low"], 1 - part["high"]):
            width = part["high"] - part["low"]
            lower.bar(left, part["pairs"] / 2, width, align="edge", color=MAIN, edgecolor="white")
    known = "interval unknown" if ends is None else f"{level} {ends.low:.3f} – {ends.high:.3f}"
    upper.set_title(f"{lines}\nexpected calibration error {pairs['ece']:.3f} ({known})", fontsize=9)
    upper.set(xlim=(0, 1), ylim=(0, 1), ylabel="share of pairs in which a is better")
    upper.legend(fontsize=8, loc="lower right")
    upper.grid(alpha=0.3)
    lower.set(xlabel="predicted: P(a beats b)", ylabel="pairs")
    save_figure(figure, path)


def write_contact_sheet(
    path: Path, mistakes: pd.DataFrame, images: Mapping[str, Path], title: str
) -> None:
    """Draw wrongly ordered pairs into a PNG file, the work that should be higher on the left.

    A work that cannot be read any more is drawn as an empty frame with the reason.

    Args:
        path: the PNG file.
        mistakes: one or more, the worst first; see
            :meth:`mirip_fast.evaluation.report.Report.worst_mistakes`.
        images: image id → file.
        title: the line above all.
    """
    both = mistakes[["better_id", "worse_id"]].to_numpy().ravel()
    files = {name: images[name] for name in both}
    names = [file.name for file in files.values()]
    with drawing([title, *names, *mistakes["better_tier"], *mistakes["worse_tier"]]) as lacking:
        figure = _sheet(mistakes, files, title)
        note = "Left: the better tier, but the lower score. Right: the worse tier, but the higher score."
        if lacking & set(map(ord, "".join(map(label, names)))):
            note += "  □: no font of this machine has the letter (the JSON file has the names)."
        figure.supxlabel(note, fontsize=9)
        save_figure(figure, path, dpi=100)


def _sheet(mistakes: pd.DataFrame, files: Mapping[str, Path], title: str) -> Any:
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
    for number, mistake in enumerate(mistakes.to_dict("records")):
        left, right = frames[2 * number : 2 * number + 2]
        left.set_title(f"{number + 1}. gap {mistake['gap']:.3g}", fontsize=10, loc="left")
        for axes, side in ((left, "better"), (right, "worse")):
            name, tier, score = (mistake[f"{side}_{what}"] for what in ("id", "tier", "score"))
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
    write_bytes(path, picture.getvalue())
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
