"""The language that people are spoken to in: English, or a translation of it.

Messages are written in English where they arise, with what varies filled in. A translation is found by the
whole text, or by its form: the entry «{} of {} images» of a catalogue fits «3 of 7 images», and so do its
parts. What no entry fits stays English. Catalogues are gettext's (``locale/<language>/LC_MESSAGES``, compiled
by ``python docs/messages.py``); click takes its own words from the same ones.
"""

from __future__ import annotations

import functools
import gettext
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

_FOLDER = Path(__file__).with_name("locale")
_LEAST = 6  # letters of an entry, beside its blanks, that say enough to be known by
_SENTENCES = re.compile(r"(?<=[.;:!?)»]) (?=\S)")  # columns of tables have more blanks between
#: Blanks that hold words of the program, rather than a user's name or path, are translated too.
_WORDS = re.compile(r"[\d,.]* ?[a-z][a-z-]*( [a-z-]+)*|.*\S \S.*")

#: What stands before a blank that holds a name, not words.
_BEFORE_NAME = re.compile(r"(['«]|--[\w-]+[ =]|\[default: |row , )$")

_PROSE = re.compile(r"([a-z]+ ){4}[a-z]+")
_BULLET = re.compile(r"^\s*(?:[-→] )?")

_language = "en"


def languages() -> list[str]:
    """The languages there are, English first."""
    return ["en", *sorted(path.name for path in _FOLDER.glob("*") if path.is_dir())]


def language_of_terminal() -> str:
    """The language that the environment asks for (LC_ALL, LC_MESSAGES, LANG), else English."""
    names = (os.environ.get(name, "") for name in ("LC_ALL", "LC_MESSAGES", "LANG"))
    wanted = next((name for name in names if name), "")[:2].lower()
    return wanted if wanted in languages() else "en"


def set_language(name: str) -> None:
    """Speak this language from now on; one of :func:`languages`."""
    global _language  # noqa: PLW0603 (the language of a process)
    _language = name
    os.environ["LANGUAGE"] = name
    gettext.bindtextdomain("messages", str(_FOLDER))


def language() -> str:
    """The language that is spoken."""
    return _language


def tr(text: str, language: str | None = None) -> str:
    """``text`` in a language; None: in the one that is spoken."""
    language = language or _language
    return text if language == "en" or not text else _translated(text, language)


def _translated(text: str, language: str) -> str:
    found = _known(text, language)
    if found is not None:
        return found
    lines = text.split("\n")
    if len(lines) > 1:
        return "\n".join(_translated(line, language) for line in lines)
    if "  " in text.strip():  # a line of a table, whose columns have to stay
        return text
    pieces = _SENTENCES.split(text)
    for count in range(len(pieces) - 1, 0, -1):  # as many sentences together as an entry holds
        first = " ".join(pieces[:count])
        found = _translated(first, language) if count == 1 else _known(first, language)
        if found is not None:
            return f"{found} {_translated(' '.join(pieces[count:]), language)}"
    return text


def in_other_languages(texts: Iterable[str]) -> dict[str, dict[str, str]]:
    """Language → what was said in English → the same in that language, for pages that are read in several."""
    said = list(texts)
    return {one: {text: tr(text, one) for text in said} for one in languages()[1:]}


def _known(text: str, language: str) -> str | None:
    """The translation of an entry that is, or whose form fits, the whole text; None where there is none."""
    exact, forms = _catalogue(language)
    core = _BULLET.sub("", text)
    start = len(text) - len(core)
    core = core.rstrip()
    found = exact.get(core)
    for known, form, names, translation in forms if found is None else ():
        if known not in core or not (match := re.fullmatch(form, core)):
            continue
        parts = [
            part if quoted else _part(part, language)
            for part, quoted in zip(match.groups(), names, strict=True)
        ]
        # Half a sentence in a blank is no name: the form belongs to another message.
        if any(
            _PROSE.search(part) and not quoted for part, quoted in zip(parts, names, strict=True)
        ):
            continue
        found = translation.format(*parts)
        break
    if found is None and core.endswith("."):  # a message without one that another goes on from
        found = _known(core[:-1], language)
        found = found and f"{found}."
    return None if found is None else text[:start] + found + text[start + len(core) :]


def _part(text: str, language: str) -> str:
    return _translated(text, language) if _WORDS.fullmatch(text) else text


@functools.cache
def _catalogue(
    language: str,
) -> tuple[Mapping[str, str], list[tuple[str, str, list[bool], str]]]:
    """Whole texts, and forms with blanks: a part that each has to hold, its expression, which of its blanks
    hold names, its translation."""
    found = gettext.translation("messages", str(_FOLDER), [language], fallback=True)
    entries: dict[str, str] = getattr(found, "_catalog", {})
    exact, forms = {}, []
    for text, translation in entries.items():
        if not isinstance(text, str) or not text:
            continue
        if "{}" not in text:
            exact[text] = translation
            continue
        fixed = text.split("{}")
        longest = max(fixed, key=len)
        if not longest.strip():
            continue
        letters = len(re.sub(r"\W", "", "".join(fixed)))
        # «{} rows» and «{} pictures» are known by their number, too
        short = not fixed[0] and (letters < _LEAST or re.fullmatch(r"\{\} [a-z]+( [a-z]+)?", text))
        form = (r"([\d,.]+)" if short else "(.*?)").join(map(re.escape, fixed))
        numbered = translation.replace("{}", "\0").replace("{", "{{").replace("}", "}}")
        numbered = re.sub(r"\{\{(\d+)\}\}", r"{\1}", numbered).replace("\0", "{}")
        before = ["".join(fixed[: i + 1]) for i in range(len(fixed) - 1)]
        names = [bool(_BEFORE_NAME.search(part)) or part.count("`") % 2 == 1 for part in before]
        forms.append((longest, form, names, numbered))
    forms.sort(key=lambda entry: -len(entry[1]))
    return exact, forms
