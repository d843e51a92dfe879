"""Plain-text tables for a terminal in which Korean, Chinese and Japanese text stays in its columns.

Widths follow Unicode Standard Annex 11 (East Asian Width): W and F take two cells, combining marks
none, "ambiguous" ones one, as terminals do outside legacy East Asian encodings.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from mirip_fast.language import tr

_GAP = "  "
# File names may hold what moves the cursor, ends the line, reverses the text or cannot be encoded.
_UNPRINTABLE = frozenset({"Cc", "Cs", "Zl", "Zp"})
_BIDI_CONTROLS = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str) -> str:
    """``text`` with control characters, lone surrogates and direction overrides written as escapes."""
    if text.isprintable():  # most are, and thousands of rows are shown
        return text
    return "".join(
        ch.encode("unicode_escape").decode("ascii")
        if unicodedata.category(ch) in _UNPRINTABLE or ch in _BIDI_CONTROLS
        else ch
        for ch in text
    )


def display_width(text: str) -> int:
    """Terminal cells that ``text`` takes (0 or more)."""
    return len(text) if text.isascii() and text.isprintable() else sum(map(_char_width, text))


def shorten(text: str, width: int) -> str:
    """``text`` in at most ``width`` terminal cells (1 or more), its middle replaced by «…» if need be."""
    if display_width(text) <= width:
        return text
    right = (width - 1) // 2
    return _start(text, width - 1 - right) + "…" + _start(text[::-1], right)[::-1]


def format_table(
    headers: Sequence[str], rows: Sequence[Sequence[object]], align: str | None = None
) -> str:
    """A table as text: a header line, a rule, one line per row; no line break at the end.

    Args:
        headers: one name per column.
        rows: cells, turned into text by ``str``; every row as long as ``headers``.
        align: one letter per column, ``l`` (left) or ``r`` (right); all left when not given.

    Raises:
        ValueError: a row or ``align`` has another number of columns, or an unknown letter is used.
    """
    align = "l" * len(headers) if align is None else align
    if len(align) != len(headers) or set(align) - {"l", "r"}:
        raise ValueError(f"align={align!r}: give one of l, r for each of {len(headers)} columns")
    cells = [
        [printable(str(cell)) for cell in row] for row in [[tr(name) for name in headers], *rows]
    ]
    for number, row in enumerate(cells[1:], start=1):
        if len(row) != len(headers):
            raise ValueError(f"row {number} has {len(row)} cells, the header has {len(headers)}")
    widths = [max(display_width(row[c]) for row in cells) for c in range(len(headers))]
    lines = [_line(row, widths, align) for row in cells]
    lines.insert(1, _line(["-" * width for width in widths], widths, align))
    return "\n".join(lines)


def _start(text: str, width: int) -> str:
    used = 0
    for place, ch in enumerate(text):
        used += _char_width(ch)
        if used > width:
            return text[:place]
    return text


def _line(cells: Sequence[str], widths: Sequence[int], align: str) -> str:
    padded = []
    for cell, width, side in zip(cells, widths, align, strict=True):
        fill = " " * (width - display_width(cell))
        padded.append(cell + fill if side == "l" else fill + cell)
    return _GAP.join(padded).rstrip()


def _char_width(ch: str) -> int:
    # Decomposed Hangul (file names from macOS): the leading consonant takes the syllable's two cells.
    if "\u1160" <= ch <= "\u11ff" or "\ud7b0" <= ch <= "\ud7ff":
        return 0
    if unicodedata.category(ch) in {"Mn", "Me", "Cf"}:
        return 0
    return 2 if unicodedata.east_asian_width(ch) in {"W", "F"} else 1
