"""Several tars by one name: ``data/{000..127}.tar``, ``'data/*.tar'``, or as the shell spelled them out."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mirip_fast.data import remote
from mirip_fast.data.csv_reader import shown
from mirip_fast.data.image_files import hidden_part
from mirip_fast.data.places import is_tar, remote_info
from mirip_fast.errors import DataError

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST = 1_000_000  # names that braces may stand for
_SHOWN = 5
_THREADS = 16  # questions to a service at once


def is_pattern(source: Path) -> bool:
    """Whether a path is no file or folder but stands for several."""
    name = str(source)
    several = _BRACES.search(name) is not None or any(mark in name for mark in "*?[")
    return several and not (not remote.is_remote(source) and os.path.lexists(source))


def as_one(sources: Sequence[str]) -> str:
    """One source for the arguments of a command: the shell may have spelled a pattern out.

    Raises:
        DataError: several that are no tars of one folder.
    """
    if len(sources) == 1:
        return sources[0]
    joined = " ".join(sources)
    if Path(joined).exists():
        raise DataError(f"A name with blanks goes in quotes: '{joined}'")
    folders = {source[: source.rfind("/") + 1] for source in sources}
    if not all(is_tar(Path(source)) for source in sources) or len(folders) > 1:
        raise DataError(
            f"{len(sources)} sources: {', '.join(sources[:3])}{', …' if len(sources) > 3 else ''}. "
            "One folder, CSV file or address is expected, or tars of one folder"
        )
    (folder,) = folders
    names = sorted(source[len(folder) :] for source in sources)
    if any(mark in name for name in names for mark in "{},*?["):
        raise DataError(
            f"{folder}: put the pattern in quotes, as file names have signs of patterns in them"
        )
    return folder + _folded(names)


def expand(source: Path) -> list[Path]:
    """The files that a pattern stands for: those of braces in their order, those of ``*`` sorted.

    Raises:
        DataError: one of those that braces name is missing, or nothing matches.
    """
    found: list[Path] = []
    missing: list[str] = []
    paths = [Path(name) for name in _without_braces(str(source))]
    for path, there in zip(paths, _are_there(paths), strict=True):
        name = str(path)
        if any(mark in name for mark in "*?["):
            matches = (
                remote.matching(path)
                if remote.is_remote(path)
                else [Path(match) for match in sorted(glob.glob(name), key=os.fsencode)]  # noqa: PTH207
            )
            if not matches:
                raise DataError(f"{_text(path)}: nothing has such a name")
            found += [match for match in matches if not hidden_part(match.name)]
        elif there:
            found.append(path)
        else:
            missing.append(_text(path))
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise DataError(
            f"{_text(source)}: {', '.join(missing[:_SHOWN])}{more} of {len(missing) + len(found)} "
            f"{'is' if len(missing) == 1 else 'are'} not there"
        )
    return list(dict.fromkeys(found))


def _are_there(paths: Sequence[Path]) -> list[bool]:
    if not any(map(remote.is_remote, paths)):
        return [path.is_file() for path in paths]
    with ThreadPoolExecutor(_THREADS, "mirip-look") as pool:
        return list(pool.map(lambda path: remote_info(path) is not None, paths))


def _text(path: Path) -> str:
    return remote.address(path) if remote.is_remote(path) else shown(path)


def _without_braces(text: str) -> list[str]:
    """``a{1..3}.tar`` and ``a{x,y}.tar`` written out; any number of braces, none inside another."""
    match = _BRACES.search(text)
    if match is None:
        return [text]
    span = _RANGE.fullmatch(match[1])
    if span is not None:
        first, last = int(span[1]), int(span[2])
        padded = any(len(text) > 1 and text.startswith("0") for text in span.groups())
        width = max(map(len, span.groups())) if padded else 0
        step = 1 if last >= first else -1
        count = abs(last - first) + 1
        _check_count(text, count)
        values = [f"{value:0{width}d}" for value in range(first, last + step, step)]
    elif "," in match[1]:
        values = match[1].split(",")
    else:
        raise DataError(
            f"{text}: {{{match[1]}}} is neither a range such as {{000..127}} nor a list {{a,b}}"
        )
    rests = _without_braces(text[match.end() :])
    _check_count(text, len(values) * len(rests))
    return [text[: match.start()] + value + rest for value in values for rest in rests]


def _check_count(text: str, count: int) -> None:
    if count > _MOST:
        raise DataError(f"{text}: the braces stand for {count:,} names; {_MOST:,} is the most")


def _folded(names: Sequence[str]) -> str:
    """Names as one with braces: a range where they are one, else a list."""
    first = re.fullmatch(r"(.*?)(\d+)(\D*)", names[0])
    if first is not None:
        width, start = len(first[2]), int(first[2])
        if names == [f"{first[1]}{start + i:0{width}d}{first[3]}" for i in range(len(names))]:
            return f"{first[1]}{{{first[2]}..{start + len(names) - 1:0{width}d}}}{first[3]}"
    return "{" + ",".join(names) + "}"
