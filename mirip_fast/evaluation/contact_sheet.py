"""The worst mistakes as one picture: the two works of each wrongly ordered pair side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mirip_fast.data.decode_pool import load_pictures
from mirip_fast.errors import ImageError
from mirip_fast.evaluation.plot_style import new_figure, save_figure
from mirip_fast.evaluation.plot_text import NO_GLYPH, PlotFonts, fonts_for
from mirip_fast.evaluation.report_parts import Mistake
from mirip_fast.runtime import our_cores

if TYPE_CHECKING:
    from PIL.Image import Image

_THUMBNAIL = 320  # pixels, the longer side
_NAME_CELLS = 30  # width of a name below its picture
_PAIRS_PER_LINE = 2


def write_contact_sheet(
    path: Path, mistakes: Sequence[Mistake], images: Mapping[str, Path], title: str
) -> None:
    """Draw wrongly ordered pairs into a PNG file, the work that should be higher on the left.

    A work that can not be read any more is drawn as an empty frame with the reason.

    Args:
        path: the PNG file.
        mistakes: one or more, the worst first.
        images: image id → file.
        title: the line above all.
    """
    files = {name: images[name] for m in mistakes for name in (m.better_id, m.worse_id)}
    tiers = {tier for m in mistakes for tier in (m.better_tier, m.worse_tier)}
    fonts = fonts_for([title, NO_GLYPH, *tiers, *(file.name for file in files.values())])
    workers = min(len(files), our_cores())
    shown = dict(
        zip(files, load_pictures(files.values(), _THUMBNAIL, workers=workers), strict=True)
    )
    lines = -(-len(mistakes) // _PAIRS_PER_LINE)
    figure = new_figure(13, 3.3 * lines + 0.7)
    figure.suptitle(fonts.text(title, 110), family=list(fonts.families), parse_math=False)
    note = (
        ""
        if _all_drawn(files, fonts)
        else f"  {NO_GLYPH}: no font of this machine has the letter (the JSON file has the names)."
    )
    figure.supxlabel(
        "Left: the better tier, but the lower score. Right: the worse tier, but the higher score."
        + note,
        fontsize=9,
    )
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
            caption = f"tier {fonts.text(tier, 12)}, score {score:.3g}"
            _draw(axes, files[name], shown[name], fonts, caption)
    save_figure(figure, path, dpi=100)


def _draw(
    axes: Any, file: Path, picture: Image | ImageError, fonts: PlotFonts, caption: str
) -> None:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color("lightgrey")
    if isinstance(picture, ImageError):
        axes.set(xlim=(0, 1), ylim=(0, 1))
        axes.text(0.5, 0.5, fonts.text(f"not readable: {picture}", 40), ha="center", parse_math=False,
                  family=list(fonts.families), fontsize=8)  # fmt: skip
    else:
        axes.imshow(np.asarray(picture))
    axes.text(
        0.5, -0.02, f"{fonts.text(file.name, _NAME_CELLS)}\n{caption}", transform=axes.transAxes,
        ha="center", va="top", fontsize=9, family=list(fonts.families), parse_math=False,
    )  # fmt: skip


def _all_drawn(files: Mapping[str, Path], fonts: PlotFonts) -> bool:
    return not any(NO_GLYPH in fonts.text(file.name, 10_000) for file in files.values())
