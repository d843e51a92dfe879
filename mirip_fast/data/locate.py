"""Finding the image files that a table names, with one directory listing per folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from mirip_fast.data.places import entries_in
from mirip_fast.text import nfc


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

    def exists(self, path: Path) -> bool:
        """Whether there is a regular file (or a link to one) at ``path``."""
        text = str(path)
        return self._is_listed(text) or os.path.isfile(text)  # noqa: PTH113 (thousands of calls)

    def find(self, name: str) -> Path | None:
        """The file called ``name``, or ``None``.

        Tried in this order, in all places each: as written; with ``\\`` read as ``/``; with accents
        and Korean syllables composed differently (macOS decomposes them); as the file system sees
        it (which may ignore case).
        """
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
