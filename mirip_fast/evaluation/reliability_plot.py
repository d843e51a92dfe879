"""The reliability diagram: what was said about pairs against what came true."""

from __future__ import annotations

from pathlib import Path

from mirip_fast.evaluation.plot_style import GREY, MAIN, new_figure, save_figure
from mirip_fast.evaluation.plot_text import fonts_for
from mirip_fast.evaluation.reliability import Reliability


def plot_reliability(path: Path, pairs: Reliability, title: str) -> None:
    """Draw a reliability diagram and the number of pairs in each bin into a PNG file.

    Each pair counts half in each orientation, so the right half mirrors the left.

    Args:
        path: the PNG file.
        pairs: the judged probabilities.
        title: whose they are.
    """
    figure = new_figure(6, 7.6)
    fonts = fonts_for([title])
    lines = "\n".join(fonts.text(line, 76) for line in title.split("\n"))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot((0, 1), (0, 1), color=GREY, linestyle=":", label="what is said comes true")
    labelled = False
    level = "" if pairs.interval is None else f"{100 * pairs.interval.confidence:g} % interval"
    for part in pairs.bins:
        if part.said is None or part.came_true is None:
            continue
        for said, true, turn in (
            (part.said, part.came_true, 1),
            (1 - part.said, 1 - part.came_true, -1),
        ):
            below = above = 0.0
            if part.interval is not None:
                # A resampled share may lie to one side of the share itself: a bar has no negative length.
                below = max(0.0, part.came_true - part.interval.low)
                above = max(0.0, part.interval.high - part.came_true)
            span = ((below,), (above,)) if turn == 1 else ((above,), (below,))
            upper.errorbar(
                said, true, yerr=span, fmt="o", color=MAIN, capsize=3,
                label=None if labelled else f"came true{level and f', {level} over groups'}",
            )  # fmt: skip
            labelled = True
        width = part.high - part.low
        for left in (part.low, 1 - part.high):
            lower.bar(left, part.pairs / 2, width, align="edge", color=MAIN, edgecolor="white")
    known = "interval unknown"
    if pairs.interval is not None:
        known = f"{level} {pairs.interval.low:.3f} – {pairs.interval.high:.3f}"
    upper.set_title(
        f"{lines}\nexpected calibration error {pairs.ece:.3f} ({known})",
        fontsize=9,
        parse_math=False,
        family=list(fonts.families),
    )
    upper.set(xlim=(0, 1), ylim=(0, 1), ylabel="share of pairs in which a is better")
    upper.legend(fontsize=8, loc="lower right")
    upper.grid(alpha=0.3)
    lower.set(xlabel="said: P(a beats b)", ylabel="pairs")
    save_figure(figure, path)
