"""Drawing an explanation: the map over the picture, its legend, and the graded works that look like it."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mirip_fast.data.decode_pool import load_pictures
from mirip_fast.errors import ImageError
from mirip_fast.portfolio.graded_likes import GradedLikes, Likeness

if TYPE_CHECKING:
    from mirip_fast.portfolio.explain import Explained

#: Longer side of a drawn picture, in pixels.
SHOWN_SIDE = 900

_THUMB_SIDE = 360
_MOVED = Image.new("RGB", (_THUMB_SIDE, _THUMB_SIDE // 2), (225, 225, 225))  # since it was graded
# Orange and blue: told apart with every common kind of colour blindness, and in grey by their labels.
_RAISES = (230, 97, 1)
_LOWERS = (33, 102, 216)
_STRONGEST = 0.8  # of the colour at the strongest place; the rest is the picture
# The first that has the letter is taken, letter by letter: tiers may be named in Korean.
_FONTS = (
    "DejaVu Sans", "Noto Sans CJK KR", "Noto Sans KR", "NanumGothic", "Malgun Gothic",
    "Apple SD Gothic Neo",
)  # fmt: skip


def overlay(
    picture: Image.Image,
    values: NDArray[np.float32],
    resize: str,
    *,
    limit: float | None = None,
) -> Image.Image:
    """A picture in pale grey under its map: orange raises the score, blue lowers it.

    Args:
        picture: RGB, upright, of any size.
        values: [rows, columns] of the square that the backbone saw.
        resize: how the picture became that square: squash, pad or crop.
        limit: the change that gets the full colour (default: the strongest of this map); give the same
            to compare pictures.

    Returns:
        RGB, of the picture's size. What the backbone did not see stays grey.
    """
    limit = limit or float(np.abs(values).max()) or 1.0
    strength = np.clip(_on_picture(values, picture.size, resize) / limit, -1, 1)[..., None]
    # Grey and pale, so that both colours show on dark paintings, too.
    grey = 95 + 0.6 * np.asarray(picture.convert("L"), np.float32)[..., None]
    colour = np.where(strength > 0, np.array(_RAISES, np.float32), np.array(_LOWERS, np.float32))
    share = _STRONGEST * np.abs(strength)
    mixed = grey * (1 - share) + colour * share
    return Image.fromarray(np.clip(mixed, 0, 255).astype(np.uint8), "RGB")


def draw(explained: Explained) -> bytes:
    """The whole explanation as a PNG file: picture, map with legend, and the graded look-alikes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    aspect = explained.picture.height / explained.picture.width
    heights = [1.0 + min(max(5.6 * aspect, 2.8), 8.5)]
    groups = _groups(explained.likes)
    files = list(dict.fromkeys(work.path for _, works in groups for work in works))
    shown = {
        path: _MOVED if isinstance(picture, ImageError) else picture
        for path, picture in zip(files, load_pictures(files, _THUMB_SIDE), strict=True)
    }
    if groups:
        heights.append(2.5)
    with rc_context({"font.family": _fonts(), "font.size": 11}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # no font has the letter: a box is drawn
        figure = Figure(figsize=(12.5, sum(heights)), facecolor="white")
        parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        _draw_map(parts[0], explained, heights[0])
        if groups:
            for half, (title, works) in zip(parts[1].subfigures(1, 2), groups, strict=False):
                _draw_works(half, title, works, shown)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def _fonts() -> list[str]:
    from matplotlib.font_manager import fontManager

    installed = set(fontManager.get_font_names())
    return [name for name in _FONTS if name in installed] or ["sans-serif"]


def where(values: NDArray[np.float32], *, raises: bool) -> tuple[str, float] | None:
    """The ninth of the square that raises (or lowers) the score most, in words, and its mean value.

    Returns:
        None where no part does.
    """
    rows = np.array_split(values, 3, axis=0) if len(values) >= 3 else [values]
    names = ("top", "middle", "bottom") if len(rows) == 3 else ("",)
    best: tuple[str, float] | None = None
    for name, row in zip(names, rows, strict=True):
        sides = ("left", "centre", "right") if row.shape[1] >= 3 else ("",)
        for side, part in zip(sides, np.array_split(row, len(sides), axis=1), strict=True):
            mean = float(part.mean())
            if (mean > 0) == raises and mean and (best is None or abs(mean) > abs(best[1])):
                best = (" ".join(filter(None, (name, side))) or "the whole", mean)
    return best


def _on_picture(
    values: NDArray[np.float32], size: tuple[int, int], resize: str
) -> NDArray[np.float32]:
    """[height, width]: the map on the picture's own pixels, 0 where the square does not reach."""
    width, height = size
    result = np.zeros((height, width), np.float32)
    if resize == "squash":
        square = (width, height)
    else:
        side = min(size) if resize == "crop" else max(size)
        square = (side, side)
    smooth = Image.fromarray(values.astype(np.float32)).resize(square, Image.Resampling.BICUBIC)
    left, top = (width - square[0]) // 2, (height - square[1]) // 2
    inner = np.asarray(smooth)[max(0, -top) :, max(0, -left) :][:height, :width]
    y, x = max(0, top), max(0, left)
    result[y : y + inner.shape[0], x : x + inner.shape[1]] = inner
    return result


def _draw_map(figure: Any, explained: Explained, inches: float) -> None:
    values, picture = explained.map.values, explained.picture
    limit = float(np.abs(values).max()) or 1.0
    tier = f"   ·   tier {explained.likes.tier}" if explained.likes else ""
    figure.suptitle(
        f"Score {explained.score:.4f}{tier}",
        fontsize=15,
        fontweight="bold",
        y=1 - 0.2 / inches,
        va="center",
    )
    places = {
        "left": 0.02, "right": 0.92, "wspace": 0.04,
        "top": 1 - 0.75 / inches, "bottom": 0.12 / inches,
    }  # fmt: skip
    left, right, legend = figure.subplots(1, 3, width_ratios=[1, 1, 0.03], gridspec_kw=places)
    left.imshow(picture)
    left.set_title("the picture")
    right.imshow(overlay(picture, values, explained.resize))
    right.set_title(
        "orange raises the score (blurred away, it would fall), blue lowers it", fontsize=11
    )
    for axes in (left, right):
        axes.set_axis_off()
    _draw_legend(legend, limit)


def _draw_legend(axes: Any, limit: float) -> None:
    strip = np.linspace(1, -1, 256, dtype=np.float32)[:, None]
    pale = Image.new("RGB", (1, 256), (200, 200, 200))
    colours = overlay(pale, strip, "squash", limit=1.0)
    axes.imshow(colours, aspect="auto", extent=(0, 1, -limit, limit))
    axes.yaxis.tick_right()
    axes.set_xticks([])
    ticks = [limit, limit / 2, 0.0, -limit / 2, -limit]
    axes.set_yticks(ticks, ["0" if tick == 0 else f"{tick:+.2g}" for tick in ticks])


def _groups(likes: GradedLikes | None) -> list[tuple[str, Sequence[Likeness]]]:
    if likes is None:
        return []
    because = f"tier {likes.tier}, because it looks like these"
    groups: list[tuple[str, Sequence[Likeness]]] = [
        (
            because if work.tier == likes.tier else f"nearest graded works of tier {work.tier}",
            likes.top,
        )
        for work in likes.top[:1]
    ]
    return groups + [(because, likes.same)] * bool(likes.same)


def _draw_works(
    figure: Any, title: str, works: Sequence[Likeness], pictures: Mapping[Path, Image.Image]
) -> None:
    figure.suptitle(title, fontsize=12)
    axes = figure.subplots(
        1, 3, gridspec_kw={"left": 0.03, "right": 0.97, "top": 0.84, "bottom": 0.12, "wspace": 0.06}
    )
    for place, work in zip(axes, works, strict=False):
        place.imshow(np.asarray(pictures[work.path]))
        place.set_title(f"cosine {work.cosine:.2f}", y=-0.16, fontsize=10)
    for place in axes:
        place.set_axis_off()
