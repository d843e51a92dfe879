"""Names as one text, whichever system wrote them."""

from __future__ import annotations

import unicodedata


def nfc(text: str) -> str:
    """``text`` with accents and Korean syllables composed, so that names that look alike are alike.

    macOS decomposes the names of files (NFD), keyboards compose them (NFC). Names are compared in this form;
    a file is opened by the name that the disk has.
    """
    return text if text.isascii() else unicodedata.normalize("NFC", text)
