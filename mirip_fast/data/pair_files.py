"""Reading a CSV file of judged pairs: which of two images a person found better."""

from __future__ import annotations

import logging
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mirip_fast.data.locate import alike_key, ends_of
from mirip_fast.data.spreadsheets import (
    Problems,
    Table,
    misspelled,
    number,
    read_table,
    spelled,
    with_known_names,
)
from mirip_fast.data.table import joined
from mirip_fast.errors import DataError
from mirip_fast.text import closest, counted, nfc, shown

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

FIRST, SECOND, LABEL, WEIGHT = "image_path_1", "image_path_2", "label", "weight"
#: Columns of a file that says the content of its works, too: SHA-256 in hexadecimal digits.
CONTENT = ("sha256_1", "sha256_2")
#: The columns that :func:`read_pairs` makes; all others are the user's own.
PAIR_COLUMNS = ("one", "other", LABEL, WEIGHT, "file", "row")
_LABELS = {1.0: 1, -1.0: -1, 0.0: 0}
_SHOWN = 3  # contradictions that are named
_HINTS = 20  # unknown images that get one


def read_pairs(
    paths: Sequence[Path],
    images: pd.DataFrame,
    places: Sequence[Path],
    *,
    zero: str | None = None,
    separator: str | None = None,
    encoding: str = "utf-8",
) -> pd.DataFrame:
    """Read files of judged pairs of the images in a table.

    An image is named as the data set names it (its file), by its path (absolute, or relative to one of
    the places or to the folder of the pairs file), or by its image_id. Pairs that are judged both ways are
    kept, as people do differ, and told.

    Args:
        paths: CSV files with the columns image_path_1, image_path_2, label and, if there are weights,
            weight; any other columns are kept.
        images: the table of images.
        places: folders that the data set's file names start from.
        zero: what the label 0 means in a file without −1: ``tie``, or that the ``second`` image is better;
            ``None`` takes ties and warns where there is a 1.
        separator: between cells; ``None`` finds it out.
        encoding: of the file.

    Returns:
        A row per pair, in order: ``one`` and ``other`` (int64, places of its images in the table), ``label``
        (int64; 1 the first is better, −1 the second, 0 a tie), ``weight`` (float64, at least 0; 1 where the
        file says nothing), ``file`` and ``row`` (1-based), and the user's own columns as written.

    Raises:
        DataError: a file cannot be read, a column is missing, or rows are faulty (unknown images,
            the same image twice, labels other than 1, 0, −1, weights below 0); all faults in one message.
    """
    read = (_read_file(path, images, places, zero, separator, encoding) for path in paths)
    judged = joined(list(read))
    _tell_contradictions(judged)
    return judged


def _read_file(
    path: Path,
    images: pd.DataFrame,
    places: Sequence[Path],
    zero: str | None,
    separator: str | None,
    encoding: str,
) -> pd.DataFrame:
    table, labels, problems = read_verdicts(path, zero, separator, encoding)
    cells, finder = table.cells, _Finder(images, [*places, path.parent, path.parent / "images"])
    found = list[list[int]]()
    for row, *names in cells[[FIRST, SECOND]].itertuples():
        found.append([finder.find(name) if name.strip() else -1 for name in names])
        for name, place, column in zip(names, found[-1], (FIRST, SECOND), strict=True):
            if place < 0 and name.strip():
                problems.add(
                    f"{name.strip()!r} is no image of the data set.{finder.hint(name)}",
                    row=row,
                    column=column,
                )
        if found[-1][0] == found[-1][1] >= 0:
            problems.add(
                f"both images are {names[0].strip()!r}; a pair has two", row=row, column=SECOND
            )
    weights = [1.0] * len(cells)
    for i, (row, text) in enumerate(table.texts(WEIGHT) if WEIGHT in cells else ()):
        weights[i] = number(text) if text.strip() else 1.0
        if not weights[i] >= 0:
            problems.add(
                f"{text.strip()!r} is no number of at least 0 (decimals are written with a point)",
                row=row,
                column=WEIGHT,
            )
    if finder.missed:
        problems.hint(
            f"{counted(len(finder.names), 'image')} are known, such as {finder.names[0]!r}. Names are those "
            "of the data set's file column, paths, or its image_id."
        )
    problems.raise_if_any()
    if finder.moved:
        place, old = next(iter(finder.moved.items()))
        log.warning(
            "%s: %s known by the end of the path (first: '%s' is %s)",
            *(shown(path), counted(len(finder.moved), "file name")),
            *(old, finder.names[place]),
        )
    one, other = np.array(found, dtype=np.int64).reshape(-1, 2).T
    own = cells.drop(columns=[FIRST, SECOND, *PAIR_COLUMNS], errors="ignore")
    return own.assign(
        one=one,
        other=other,
        label=labels,
        weight=weights,
        file=str(path),
        row=cells.index,
    )


def read_verdicts(
    path: Path, zero: str | None = None, separator: str | None = None, encoding: str = "utf-8"
) -> tuple[Table, list[int], Problems]:
    """The cells of a file of judged pairs, the [p] labels that they give, and what is wrong so far.

    What is told is whether images are named at all, and what is no label. ``zero``: see :func:`read_pairs`.

    Raises:
        DataError: the file cannot be read, or a column is missing.
    """
    table = pairs_table(path, separator, encoding)
    problems, labels = table.problems(), list[int]()
    for column in (FIRST, SECOND):
        for row, name in table.texts(column):
            if not name.strip():
                problems.add("empty; an image is expected", row=row, column=column)
    for row, text in table.texts(LABEL):
        label = _LABELS.get(number(text.replace("−", "-")))
        labels.append(label or 0)
        if label is None:
            problems.add(
                f"{text.strip()!r}; 1 (the first image is better), -1 (the second) or 0 (a tie) is expected",
                row=row,
                column=LABEL,
            )
    return table, labels if problems else _with_zeros(path, labels, zero), problems


def pairs_table(path: Path, separator: str | None = None, encoding: str = "utf-8") -> Table:
    """The cells of a file of judged pairs, with the columns that each must have.

    Raises:
        DataError: the file cannot be read, or a column is missing.
    """
    known = (FIRST, SECOND, LABEL, WEIGHT)
    table = read_table(path, expected=known, separator=separator, encoding=encoding)
    table = with_known_names(table, known, required=known[:3])
    near = None if WEIGHT in table.columns else misspelled(WEIGHT, table.columns)
    if near is not None:
        log.warning(
            "%s: column '%s' is not read; if it holds the weights, call it %s",
            *(shown(path), spelled(near), WEIGHT),
        )
    return table


def says_content(path: Path) -> bool:
    """Whether a file of judged pairs says the content of its works, as `serve` writes it.

    Its encoding is not known yet: names of works may be read wrongly, names of columns are not. A file that
    cannot be read says nothing here; reading it in its encoding says why.
    """
    with suppress(DataError):
        table = read_table(path, expected=CONTENT, encoding_errors="surrogateescape")
        return {*CONTENT} <= {*table.columns}
    return False


def works_in(path: Path, *, encoding: str = "utf-8") -> pd.DataFrame | None:
    """The works in a file of judged pairs that says their content, as `serve` writes it; None in others.

    Returns:
        ``image_id``, ``file`` and ``named``, as the file names the work, and ``sha256``.

    Raises:
        DataError: the file cannot be read, or a cell holds no SHA-256 or another one than before.
    """
    import pandas as pd

    if not says_content(path):
        return None
    table = pairs_table(path, encoding=encoding)
    problems, known = table.problems(), dict[str, str]()
    for name, column in zip((FIRST, SECOND), CONTENT, strict=True):
        for (row, cell), work in zip(table.texts(column), table.cells[name], strict=True):
            text = cell.strip().lower()
            if not re.fullmatch("[0-9a-f]{64}", text):
                problems.add(f"{text!r} is no SHA-256 of a file", row=row, column=column)
            elif known.setdefault(work.strip(), text) != text:
                problems.add("another content than in a row above", row=row, column=column)
    problems.raise_if_any()
    hashes = [bytes.fromhex(text) for text in known.values()]
    return pd.DataFrame(
        {"image_id": [*known], "file": [*known], "named": [*known], "sha256": hashes}
    )


def _with_zeros(path: Path, labels: list[int], zero: str | None) -> list[int]:
    """The labels of a file with what 0 means put in; see :func:`read_pairs`."""
    zeros = counted(labels.count(0), "label") + " of 0"
    if -1 in labels or 0 not in labels:
        if zero == "second" and 0 in labels:
            log.warning("%s: has -1 as well, so %s are ties", shown(path), zeros)
        return labels
    if zero == "second":
        log.info("%s: %s: the second image is better", shown(path), zeros)
        return [label or -1 for label in labels]
    if zero is None and 1 in labels:
        log.warning(
            "%s: the labels are 1 and 0, never -1, and %s count as ties, which teach no order. If 0 means "
            "that the second image is better, give --pairs-zero second; if not, --pairs-zero tie",
            *(shown(path), zeros),
        )
    return labels


class _Finder:
    """Finds an image by the name that a pairs file gives it, without asking the disk."""

    def __init__(self, images: pd.DataFrame, places: Sequence[Path]):
        self._places = [str(place) for place in dict.fromkeys(places)]
        ids, named = images["image_id"].tolist(), images["named"].tolist()
        self._by_path = {_spelled(file): i for i, file in enumerate(images["file"])}
        self._by_file = {nfc(name): i for i, name in enumerate(named) if name}
        self._by_id = {nfc(image_id): i for i, image_id in enumerate(ids)}
        self.names = [name or image_id for name, image_id in zip(named, ids, strict=True)]
        self._alike: dict[str, list[str]] = defaultdict(list)
        for name in self.names:
            self._alike[alike_key(name)].append(name)
        self.moved: dict[int, str] = {}  # image → the old absolute path that was taken for it
        self.missed = 0

    def find(self, name: str) -> int:
        """Index of the image called ``name``, −1 of none; file names come before ids."""
        composed = nfc(name.strip())
        for spelling in (composed, composed.replace("\\", "/")):
            found = self._by_name(spelling)
            if found is not None:
                return found
        if composed in self._by_id:
            return self._by_id[composed]
        for end in ends_of(composed):
            found = self._by_name(end)
            if found is not None:  # two such paths with one end are in doubt
                return found if self.moved.setdefault(found, composed) == composed else -1
        return -1

    def _by_name(self, name: str) -> int | None:
        if name in self._by_file:
            return self._by_file[name]
        paths = (_spelled(os.path.join(place, name)) for place in self._places)  # noqa: PTH118
        return next((self._by_path[path] for path in paths if path in self._by_path), None)

    def hint(self, name: str) -> str:
        self.missed += 1
        if (
            self.missed > _HINTS or not self.names
        ):  # no more are shown, and each costs a look at all
            return ""
        alike = self._alike.get(alike_key(name))
        close = alike[0] if alike else closest(name.strip(), self.names)
        return f" Did you mean {close!r}?" if close else ""


def unknown_works(
    path: Path, cells: pd.DataFrame, images: pd.DataFrame, places: Sequence[Path]
) -> list[str]:
    """A sentence if a file's cells name works that are none of the images; see :func:`read_pairs`."""
    finder = _Finder(images, [*places, path.parent, path.parent / "images"])
    unknown = [
        (row, name)
        for row, *names in cells[[FIRST, SECOND]].itertuples()
        for name in names
        if name.strip() and finder.find(name) < 0
    ]
    if not unknown:
        return []
    row, name = unknown[0]
    count = counted(len({row for row, _ in unknown}), "judgement")
    return [
        f"{shown(path)}: {count} of works that are not in this data (first: row {row}, {name!r})"
    ]


def _tell_contradictions(judged: pd.DataFrame) -> None:
    """Warn of pairs that are judged both ways, with their rows."""
    first: dict[tuple[int, int], dict[int, int]] = {}  # pair → verdict → its first place
    for place, (one, other, label) in enumerate(
        judged[["one", "other", LABEL]].to_numpy().tolist()
    ):
        pair, verdict = ((one, other), label) if one < other else ((other, one), -label)
        first.setdefault(pair, {}).setdefault(verdict, place)
    both = [sorted((found[1], found[-1])) for found in first.values() if 1 in found and -1 in found]
    if both:
        files = judged["file"].unique().tolist()

        def where(place: int) -> str:
            row = str(judged["row"][place])
            return row if len(files) == 1 else f"{shown(Path(judged['file'][place]))}:{row}"

        some = "; ".join(f"rows {where(one)} and {where(two)}" for one, two in both[:_SHOWN])
        log.warning(
            "%s: %s judged both ways (%s%s); all judgements count",
            ", ".join(shown(Path(file)) for file in files),
            counted(len(both), "pair"),
            some,
            "; …" if len(both) > _SHOWN else "",
        )


def _spelled(path: str) -> str:
    return nfc(os.path.normpath(path))
