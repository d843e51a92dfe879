"""How all pictures look, and how they are written: colours that colour-blind people tell apart.

Figures are matplotlib objects of their own; nothing touches pyplot's global state or opens a window.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from mirip_fast.files import write_atomically

#: Blue and orange of the Okabe–Ito palette (Okabe & Ito 2008, Color Universal Design).
MAIN, SECOND = "#0072b2", "#d55e00"
GREY = "#767676"

_BEST, _LOWEST = (0x17, 0x73, 0x6B), (0xC3, 0x9A, 0x6B)  # teal to sand, differing in lightness too


def tier_colours(count: int) -> list[str]:
    """One colour per tier, best first: from dark teal to light sand."""
    steps = [i / max(1, count - 1) for i in range(count)]
    mixed = (
        [round(a + (b - a) * step) for a, b in zip(_BEST, _LOWEST, strict=True)] for step in steps
    )
    return ["#{:02x}{:02x}{:02x}".format(*rgb) for rgb in mixed]


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
