"""Finding the image files that a table names, and those beside it that none of its rows names."""

from __future__ import annotations

import difflib
import functools
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from mirip_fast.data.formats import can_read, split_page
from mirip_fast.data.image_files import ending_of, folders_below, is_picture_file, named_picture
from mirip_fast.data.sources import METADATA_NAME, METADATA_NAMES, entries_in
from mirip_fast.text import counted, folded, nfc, shown

log = logging.getLogger(__name__)

_ABSOLUTE = re.compile(r"/|~|[A-Za-z]:|file:/")  # here, in a home folder, on Windows, as an address
_MOST_NAMES = 100_000  # files that a missing one is compared with
_SUGGESTED = 3
_SHOWN = 5
#: What `split` writes: each names a part of the pictures by nature.
_SPLIT_FILES = {f"{name}_{METADATA_NAME}" for name in ("train", "val", "test")}
_NO_IMAGES = (".csv", ".tsv", ".txt", ".json", ".xlsx", ".xmp")


def ends_of(name: str) -> Iterator[str]:
    """The ends of an absolute path, longest first: ``x/a.jpg`` and ``a.jpg`` of ``C:\\x\\a.jpg``.

    A relative path has none, nor has one with ``..`` in it.
    """
    plain = name.strip().replace("\\", "/")
    parts = [part for part in plain.split("/") if part]
    if _ABSOLUTE.match(plain) and ".." not in parts:
        for start in range(1, len(parts)):
            yield "/".join(parts[start:])


def alike_key(name: str) -> str:
    """What stays when a file's name loses its folder, case, ending and the zeros of its numbers."""
    stem = os.path.splitext(nfc(name.strip()).replace("\\", "/").rpartition("/")[2])[0]  # noqa: PTH122
    return re.sub(r"0+(?=\d)", "", stem.casefold())


class FileFinder:
    """Looks names up below a few folders, listing each folder once instead of asking file by file.

    On a network drive ten thousand questions take minutes; a listing takes one round trip.

    Args:
        places: folders that relative names may start from; the first place that has the file wins.
    """

    def __init__(self, places: Sequence[Path] = ()) -> None:
        self.places = tuple(places)
        self._roots = [str(place) for place in places]
        self._listings: dict[str, tuple[frozenset[str], dict[str, str]]] = {}
        self._below: dict[str, list[str]] | None = None

    def exists(self, path: Path) -> bool:
        """Whether there is a regular file (or a link to one, or a PDF with pages) at ``path``."""
        text, page = split_page(str(path))
        if page and self.exists(Path(text)):
            return True
        text += page
        return self._is_listed(text) or os.path.isfile(text)  # noqa: PTH113 (thousands of calls)

    def find(self, name: str) -> Path | None:
        """The file called ``name``, or ``None``.

        Tried in this order, in all places each: as written; with ``\\`` read as ``/``; with accents
        and Korean syllables composed differently (macOS decomposes them); as the file system sees
        it (which may ignore case).
        """
        whole, page = split_page(name.strip())
        if page and (pdf := self.find(whole)) is not None:
            return Path(f"{pdf}{page}")
        candidates = list(self._candidates(name))
        for candidate in candidates:
            if self._is_listed(candidate):
                return Path(candidate)
        for candidate in candidates:
            other = self._recompose(candidate)
            if other is not None:
                return Path(other)
        for candidate in candidates:
            if os.path.isfile(candidate):  # noqa: PTH113
                return Path(candidate)
        return None

    def find_moved(self, name: str) -> Path | None:
        """The one file that an old absolute path can mean: that which its longest end names in the places.

        A relative path that starts with the names of a place's own folders, ``data/images/a.jpg`` below
        ``data/``, is such a path, too.
        """
        plain = name.strip().replace("\\", "/")
        for end in ends_of(name):
            top = nfc(
                end.partition("/")[0]
            )  # where that is not there, no deeper folder is asked for
            roots = (root for root in self._roots if top in self._list(root)[1])
            found = {path for root in roots if (path := self._spelled(root + os.sep + end))}
            if found:
                return Path(found.pop()) if len(found) == 1 else None
        for root in self._roots:
            own = Path(root).parts[1:]
            for count in range(1, len(own) + 1):
                end = plain.removeprefix("/".join(own[-count:]) + "/")
                if end != plain and (path := self._spelled(root + os.sep + end)):
                    return Path(path)
        return None

    def suggest(self, name: str) -> str:
        """`` Did you mean …?`` with the files that a missing one's name is like, or nothing."""
        if self._below is None:
            self._below = self._names_below()
        close = self._below.get(alike_key(name), [])
        if not close:
            keys = difflib.get_close_matches(alike_key(name), self._below, n=1, cutoff=0.8)
            close = [other for key in keys for other in self._below[key]]
        names = " or ".join(map(repr, close[:_SUGGESTED]))
        return f" Did you mean {names}?" if close else ""

    def _names_below(self) -> dict[str, list[str]]:
        """The names of the files in the places and their folders, by what is alike in them."""
        found: dict[str, list[str]] = defaultdict(list)
        for name in islice(self._walk(), _MOST_NAMES):
            if not name.lower().endswith(_NO_IMAGES):
                found[alike_key(name)].append(name)
        return dict(found)

    def _walk(self) -> Iterator[str]:
        seen: set[str] = set()
        for root in sorted(
            self._roots, key=len, reverse=True
        ):  # images/ before the folder it is in
            inside = entries_in(Path(root))
            if inside is not None:
                yield from inside[0]
                continue
            for folder, folders, names in os.walk(root):
                below = "" if folder == root else folder[len(root) + 1 :] + os.sep
                seen.add(folder)
                folders[:] = sorted(
                    name for name in folders
                    if name[0] not in ".@" and folder + os.sep + name not in seen
                )  # fmt: skip
                yield from (below + name for name in sorted(names))

    def _spelled(self, path: str) -> str | None:
        """``path`` as the disk spells it, if there is such a file."""
        return path if self._is_listed(path) else self._recompose(path)

    def _candidates(self, name: str) -> Iterator[str]:
        spellings = [name, name.strip(), name.strip().replace("\\", "/")]
        for spelling in dict.fromkeys(spellings):
            for root in self._roots:
                yield os.path.join(root, spelling)  # noqa: PTH118 (thousands of calls)

    def _is_listed(self, path: str) -> bool:
        folder, name = os.path.split(path)
        return name in self._list(folder)[0]

    def _recompose(self, path: str) -> str | None:
        """``path`` with each part as the disk spells it, where only Unicode composition differs."""
        if path.isascii():
            return None
        found = next((root for root in self._roots if path.startswith(root + os.sep)), "")
        for part in path[len(found) + 1 :].replace(os.sep, "/").split("/"):
            spelled = self._list(found or os.sep)[1].get(nfc(part))
            if spelled is None:
                return None
            found = found + os.sep + spelled
        return found if self._is_listed(found) else None

    def _list(self, folder: str) -> tuple[frozenset[str], dict[str, str]]:
        """The folder's file names, and all its names by their composed form (the listing is kept)."""
        if folder not in self._listings:
            files, names = [], {}
            inside = entries_in(Path(folder))  # a tar, or an address
            if inside is not None:
                known = {nfc(name): name for name in (*inside[0], *inside[1])}
                self._listings[folder] = frozenset(inside[0]), known
                return self._listings[folder]
            try:
                with os.scandir(folder or ".") as entries:
                    for entry in entries:
                        names[nfc(entry.name)] = entry.name
                        if _is_file(entry):
                            files.append(entry.name)
            except OSError:
                pass  # no such folder, or not ours to read: nothing is found in it
            self._listings[folder] = frozenset(files), names
        return self._listings[folder]


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link that leads in a circle, or to where we may not look
        return False


def tell_unlisted(table: Path, files: Iterable[str]) -> None:
    """Tell which pictures are named by no row of a CSV file, whose rows name ``files``.

    Looked through are the folders in which listed images lie and, with all below it, the folder of a
    metadata.csv (of a table by another name: the ``images/`` beside it). Tars and addresses are seen to
    where they are read. Takes some eight bytes of memory per image.
    """
    if table.suffix.lower() == ".tar" or folded(table.name) in _SPLIT_FILES or not table.is_file():
        return
    real = functools.cache(os.path.realpath)  # linked folders have several names
    fold = table.with_name(table.name.swapcase()).exists()  # a disk that takes A.jpg for a.jpg

    def code(folder: str, name: str) -> int:
        return hash((real(folder), name.casefold() if fold else name))

    folders: set[str] = set()

    def listed() -> Iterator[int]:
        for file in files:
            folder, name = os.path.split(split_page(file)[0])
            folders.add(folder)
            yield code(folder, name)

    known = np.unique(np.fromiter(listed(), np.int64))
    found: list[str] = []
    for folder, names in _looked_through(table, folders):
        codes = np.fromiter((code(folder, name) for name in names), np.int64)
        for i in np.flatnonzero(np.isin(codes, known, invert=True)):
            path = os.path.join(folder, names[i])  # noqa: PTH118 (thousands of calls)
            taken = named_picture(names[i], Counter())
            if taken and not can_read(ending_of(names[i]), Counter()):
                continue
            if taken or (taken is None and is_picture_file(path)):
                found.append(path)
    tell_unnamed(table, found)


def tell_unnamed(table: Path, pictures: Iterable[str]) -> None:
    """Tell the number and the first of the pictures that no row of a table names, if there are any."""
    paths = sorted(pictures, key=os.fsencode)
    if not paths:
        return
    where = os.path.commonpath([os.path.dirname(path) for path in paths])  # noqa: PTH120
    some = ", ".join(os.path.relpath(path, where) for path in paths[:_SHOWN])
    log.warning(
        "%s in %s %s named by no row of %s: %s%s",
        *(counted(len(paths), "picture"), shown(Path(where)), "is" if len(paths) == 1 else "are"),
        *(shown(table), some, ", …" if len(paths) > _SHOWN else ""),
    )


def _looked_through(table: Path, listed: set[str]) -> Iterator[tuple[str, list[str]]]:
    """Each folder, once, with the names of its files; what cannot be listed has none."""
    seen: set[str] = set()
    runs: tuple[str, ...] = ()
    top = str(table.parent)
    if folded(table.name) not in METADATA_NAMES:
        top = os.path.join(top, "images")  # noqa: PTH118
    if os.path.isdir(top):  # noqa: PTH112
        for folder, names in folders_below(top, Counter(), refuse=None):
            seen.add(os.path.realpath(folder))
            if "run.json" in names:
                runs += (os.path.join(folder, ""),)  # noqa: PTH118
            if not os.path.join(folder, "").startswith(runs):  # noqa: PTH118 (a run's pictures are ours)
                yield folder, names
    for folder in listed:
        if os.path.realpath(folder) not in seen:
            seen.add(os.path.realpath(folder))
            try:
                with os.scandir(folder) as entries:
                    yield folder, [entry.name for entry in entries if not entry.is_dir()]
            except OSError:
                continue  # its images are missing, which is told
