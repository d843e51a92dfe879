"""Names of files in pictures: with fonts that have their letters, and nothing that breaks a line.

Matplotlib's own font has no Korean, Chinese or Japanese letters and no emoji. Fonts of the machine that do
are looked for; a letter that none has becomes □.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from mirip_fast.evaluation.text_table import printable, shorten

#: Stands for a letter that no font of this machine has.
NO_GLYPH = "□"

_BASE = "DejaVu Sans"  # comes with matplotlib
_LAST_RESORT = "Last Resort"  # has a frame for every character, and a picture of none
# Joiners and variation selectors have no picture of their own.
_INVISIBLE = frozenset("\u200d\ufe0e\ufe0f")


@dataclass(frozen=True)
class PlotFonts:
    """Font families to draw with, in order of preference, and the characters that they have."""

    families: tuple[str, ...]
    has: frozenset[int]

    def text(self, name: str, width: int) -> str:
        """``name`` as drawable text of at most ``width`` terminal cells, cut in the middle with «…»."""
        shown = "".join(
            ch if ord(ch) in self.has else NO_GLYPH
            for ch in printable(name)
            if ch not in _INVISIBLE
        )
        return shorten(shown, width)


def fonts_for(names: Iterable[str]) -> PlotFonts:
    """Fonts that together have as many of the characters of ``names`` as this machine offers."""
    from matplotlib import font_manager

    wanted = {ord(ch) for name in names for ch in printable(name) if ch not in _INVISIBLE}
    families = [_BASE]
    has = _characters(font_manager.findfont(_BASE))
    lacking = wanted - has
    tried = set()
    for entry in font_manager.fontManager.ttflist if lacking else ():
        if entry.name in tried or entry.style != "normal" or entry.name.startswith(_LAST_RESORT):
            continue
        tried.add(entry.name)
        more = _characters(entry.fname)
        if lacking & more:
            families.append(entry.name)
            has |= more
            lacking -= more
            if not lacking:
                break
    return PlotFonts(tuple(families), frozenset(has))


def _characters(path: str) -> set[int]:
    """Code points of a font file; none where it can not be drawn with (fonts of coloured bitmaps)."""
    from matplotlib.ft2font import FT2Font

    try:
        return set(FT2Font(path).get_charmap())
    except (OSError, RuntimeError) as error:
        logging.getLogger(__name__).debug("%s: %s", path, error)
        return set()
