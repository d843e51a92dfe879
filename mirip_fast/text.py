"""Names as one text, whichever system wrote them."""

from __future__ import annotations

import functools
import unicodedata


def nfc(text: str) -> str:
    """``text`` with accents and Korean syllables composed, so that names that look alike are alike.

    macOS decomposes the names of files (NFD), keyboards compose them (NFC). Names are compared in this form;
    a file is opened by the name that the disk has.
    """
    return text if text.isascii() else unicodedata.normalize("NFC", text)


@functools.lru_cache(1 << 14)  # the same few names are asked for with every verdict of a judge
def folded(text: str) -> str:
    """What is left of ``text`` without case, blanks, invisible signs and full-width forms."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return "".join(c for c in plain if not (c.isspace() or unicodedata.category(c) == "Cf"))
