"""Names, numbers and places as messages spell them, and names as one text, whichever system wrote them."""

from __future__ import annotations

import difflib
import functools
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

#: An address such as s3://bucket/a.jpg stands in tables as the path /s3:/bucket/a.jpg.
AS_PATH = re.compile(r"/([a-z][a-z0-9+.-]+):/")


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


def shown(path: Path) -> str:
    """``path`` as a message should spell it: relative below the working folder, or an address."""
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, OSError):
        return address(path)


def counted(number: int, thing: str) -> str:
    """A number with its noun: ``counted(1, "image") == "1 image"``, else with an s."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def closest(name: str, known: Iterable[str]) -> str | None:
    """The one of ``known`` that ``name`` is probably a misspelling of; upper and lower case are one."""
    names = {candidate.casefold(): candidate for candidate in known}
    found = difflib.get_close_matches(name.casefold(), names, n=1, cutoff=0.6)
    return names[found[0]] if found else None


def address(path: Path) -> str:
    """A path as a person would write it: an address where it stands for one."""
    text = str(path)
    match = AS_PATH.match(text)
    return text if match is None else f"{match[1]}://{text[match.end() :]}"


def path_of(text: str) -> Path:
    """The path that :func:`address` wrote as ``text``."""
    scheme, there, rest = text.partition("://")
    return Path(f"/{scheme}:", rest) if there else Path(text)
