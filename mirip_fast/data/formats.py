"""Formats that Pillow does not read by itself: each needs a package, which is loaded where such a file is.

What these packages make of a file is bytes that Pillow reads, or a plugin of Pillow; so whatever holds for
a picture (limits, orientation, transparency) holds for these as well, see :mod:`mirip_fast.data.images`.
"""

from __future__ import annotations

import functools
import importlib
from collections import Counter
from typing import Any, NamedTuple

from mirip_fast.errors import ImageError


class Extra(NamedTuple):
    """What a kind of pictures needs.

    Attributes:
        what: such a file, in words.
        module: what is imported.
        package: what is installed.
        endings: of the names of such files, lower case.
    """

    what: str
    module: str
    package: str
    endings: tuple[str, ...]


EXTRAS = {
    "HEIC": Extra("a HEIC picture", "pillow_heif", "pillow-heif", (".heic", ".heif", ".hif")),
    "JPEG XL": Extra("a JPEG XL picture", "pillow_jxl", "pillow-jxl-plugin", (".jxl",)),
}
#: How a JPEG XL begins: the picture alone, or in boxes.
JXL_STARTS = (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")
#: Ending → kind.
KINDS = {ending: kind for kind, extra in EXTRAS.items() for ending in extra.endings}


@functools.cache
def _module(kind: str) -> Any:
    """The module that reads a kind; None where it is not installed, or does not load."""
    try:
        return importlib.import_module(EXTRAS[kind].module)
    except (ImportError, OSError):
        return None


def can_read(ending: str, passed: Counter[str]) -> bool:
    """Whether pictures with this ending can be read; if not, one more of their kind is counted."""
    kind = KINDS.get(ending)
    if kind is None or _module(kind) is not None:
        return True
    passed[kind] += 1
    return False


def package_for(kind: str) -> Any:
    """The module that reads a kind.

    Raises:
        ImageError: it is not installed; says what to type.
    """
    module = _module(kind)
    if module is None:
        raise ImageError(f"{EXTRAS[kind].what}; to read it: pip install {EXTRAS[kind].package}")
    return module


def jxl_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) in pixels of a JPEG XL picture, before turning; None where there is no header.

    The plugin decodes all pixels when it opens a file, so the size is read here before.
    Layout: ISO/IEC 18181-1, SizeHeader (bits, the lowest of each byte first); -2, boxes.
    """
    at = 0
    while not data.startswith(JXL_STARTS[0], at):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        head = 8
        if length == 1:
            length, head = int.from_bytes(data[at + 8 : at + 16], "big"), 16
        if kind in (b"jxlc", b"jxlp"):
            at += head + (4 if kind == b"jxlp" else 0)
            if not data.startswith(JXL_STARTS[0], at):
                return None
        elif length < head or at + length >= len(data):
            return None
        else:
            at += length
    bits, used = int.from_bytes(data[at + 2 : at + 14], "little"), 0

    def take(count: int) -> int:
        nonlocal used
        value, used = bits >> used & (1 << count) - 1, used + count
        return value

    small = take(1)

    def side() -> int:
        return 8 * (1 + take(5)) if small else 1 + take((9, 13, 18, 30)[take(2)])

    height, ratio = side(), take(3)
    if ratio == 0:
        return side(), height
    over, under = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))[ratio - 1]
    return height * over // under, height
