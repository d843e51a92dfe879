"""Reading a CSV file of judged pairs: which of two images a person found better."""

from __future__ import annotations

import logging
import math
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mirip_fast.data.csv_reader import (
    Problems,
    Table,
    closest,
    counted,
    listed,
    misspelled,
    read_table,
    shown,
    spelled,
    with_known_names,
)
from mirip_fast.data.locate import alike_key, ends_of
from mirip_fast.text import nfc

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

FIRST, SECOND, LABEL, WEIGHT = "image_path_1", "image_path_2", "label", "weight"
#: Columns of a file that says the content of its works, too: SHA-256 in hexadecimal digits.
CONTENT = ("sha256_1", "sha256_2")
_LABELS = {1.0: 1, -1.0: -1, 0.0: 0}
_SHOWN = 3  # contradictions that are named
_HINTS = 20  # unknown images that get one


@dataclass(frozen=True)
class Judgements:
    """p judged pairs, in the order of their file.

    Attributes:
        files: [p] the file of each.
        images: [p, 2] int64, indexes of the two images in the table.
        label: [p] int64; 1 the first image is better, −1 the second, 0 a tie.
        weight: [p] float64, at least 0; 1 where the file says nothing.
        rows: [p] line in the file, 1-based.
        extra: [p] the other columns, as written.
    """

    files: Sequence[Path]
    images: NDArray[np.int64]
    label: NDArray[np.int64]
    weight: NDArray[np.float64]
    rows: Sequence[int]
    extra: Sequence[dict[str, str]]

    def __len__(self) -> int:
        return len(self.label)


def read_pairs(
    paths: Sequence[Path],
    images: pd.DataFrame,
    places: Sequence[Path],
    *,
    zero: str | None = None,
    separator: str | None = None,
    encoding: str = "utf-8",
) -> Judgements:
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

    Raises:
        DataError: a file cannot be read, a column is missing, or rows are faulty (unknown images,
            the same image twice, labels other than 1, 0, −1, weights below 0); all faults in one message.
    """
    parts = [_read_file(path, images, places, zero, separator, encoding) for path in paths]
    judged = Judgements(
        files=[path for part in parts for path in part.files],
        images=np.concatenate([part.images for part in parts]),
        label=np.concatenate([part.label for part in parts]),
        weight=np.concatenate([part.weight for part in parts]),
        rows=[row for part in parts for row in part.rows],
        extra=[extra for part in parts for extra in part.extra],
    )
    _tell_contradictions(judged)
    return judged


def _read_file(
    path: Path,
    images: pd.DataFrame,
    places: Sequence[Path],
    zero: str | None,
    separator: str | None,
    encoding: str,
) -> Judgements:
    table = pairs_table(path, separator=separator, encoding=encoding)
    problems = Problems(path, sheet=table.sheet)
    finder = _Finder(images, [*places, path.parent, path.parent / "images"])
    used = {FIRST, SECOND, LABEL, WEIGHT}
    pairs, labels, weights, extra = [], [], [], []
    for row, cells in table.rows:
        values = dict(zip(table.columns, cells, strict=True))
        pair = [_image(values[name], finder, problems, row, name) for name in (FIRST, SECOND)]
        if pair[0] == pair[1] and pair[0] >= 0:
            problems.add(
                f"both images are {values[FIRST].strip()!r}; a pair has two", row=row, column=SECOND
            )
        pairs.append(pair)
        labels.append(verdict(values[LABEL], problems, row))
        weights.append(_weight(values.get(WEIGHT, ""), problems, row))
        extra.append({name: text for name, text in values.items() if name and name not in used})
    if finder.missed:
        problems.hint(
            f"{counted(len(finder.names), 'image')} are known, such as {finder.example!r}. Names are those "
            "of the data set's file column, paths, or its image_id."
        )
    problems.raise_if_any()
    if finder.moved:
        number, old = next(iter(finder.moved.items()))
        log.warning(
            "%s: %s known by the end of the path (first: '%s' is %s)",
            *(shown(path), counted(len(finder.moved), "file name")),
            *(old, finder.names[number]),
        )
    return Judgements(
        files=[path] * len(labels),
        images=np.array(pairs, dtype=np.int64).reshape(-1, 2),
        label=np.array(with_zeros(path, labels, zero), dtype=np.int64),
        weight=np.array(weights, dtype=np.float64),
        rows=[row for row, _ in table.rows],
        extra=extra,
    )


def pairs_table(path: Path, *, separator: str | None = None, encoding: str = "utf-8") -> Table:
    """The cells of a file of judged pairs, with the columns that each must have.

    Raises:
        DataError: the file cannot be read, or a column is missing.
    """
    known = (FIRST, SECOND, LABEL, WEIGHT)
    table = read_table(path, expected=known, separator=separator, encoding=encoding)
    table = with_known_names(table, known)
    problems = Problems(path, sheet=table.sheet)
    free = [name for name in table.columns if name and name not in known]
    for name in (FIRST, SECOND, LABEL):
        if name not in table.columns:
            close = closest(name, free)
            hint = f" Is it '{spelled(close)}'? Then call it {name}." if close else ""
            problems.add(f"no column {name!r}. It has: {listed(table.columns)}.{hint}")
    problems.raise_if_any()
    near = None if WEIGHT in table.columns else misspelled(WEIGHT, free)
    if near is not None:
        log.warning(
            "%s: column '%s' is not read; if it holds the weights, call it %s",
            *(shown(path), spelled(near), WEIGHT),
        )
    return table


def works_in(path: Path, *, encoding: str = "utf-8") -> pd.DataFrame | None:
    """The works in a file of judged pairs that says their content, as `serve` writes it; None in others.

    Returns:
        ``image_id``, ``file`` and ``named``, as the file names the work, and ``sha256``.

    Raises:
        DataError: the file cannot be read, or a cell holds no SHA-256 or another one than before.
    """
    import pandas as pd

    table = pairs_table(path, encoding=encoding)
    if not {*CONTENT} <= {*table.columns}:
        return None
    problems, known = Problems(path, sheet=table.sheet), dict[str, str]()
    for row, cells in table.rows:
        of = dict(zip(table.columns, cells, strict=True))
        for name, column in zip((FIRST, SECOND), CONTENT, strict=True):
            text = of[column].strip().lower()
            if not re.fullmatch("[0-9a-f]{64}", text):
                problems.add(f"{text!r} is no SHA-256 of a file", row=row, column=column)
            elif known.setdefault(of[name].strip(), text) != text:
                problems.add("another content than in a row above", row=row, column=column)
    problems.raise_if_any()
    hashes = [bytes.fromhex(text) for text in known.values()]
    return pd.DataFrame(
        {"image_id": [*known], "file": [*known], "named": [*known], "sha256": hashes}
    )


def named(name: str, problems: Problems, row: int, column: str) -> bool:
    """Whether a cell names an image; where it is empty, that is noted."""
    if not name.strip():
        problems.add("empty; an image is expected", row=row, column=column)
    return bool(name.strip())


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

    @property
    def example(self) -> str:
        return next(iter(self.names), "")

    def find(self, name: str) -> int | None:
        """Index of the image called ``name``; file names come before ids."""
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
                return found if self.moved.setdefault(found, composed) == composed else None
        return None

    def _by_name(self, name: str) -> int | None:
        if name in self._by_file:
            return self._by_file[name]
        for place in self._places:
            path = _spelled(os.path.join(place, name))  # noqa: PTH118 (thousands of calls)
            if path in self._by_path:
                return self._by_path[path]
        return None

    def hint(self, name: str) -> str:
        self.missed += 1
        if self.missed > _HINTS:  # no more are shown, and each costs a look at all names
            return ""
        alike = self._alike.get(alike_key(name))
        close = alike[0] if alike else closest(name.strip(), self.names)
        return f" Did you mean {close!r}?" if close else ""


def _image(name: str, finder: _Finder, problems: Problems, row: int, column: str) -> int:
    """Index of an image; below 0, and noted, where there is none."""
    if not named(name, problems, row, column):
        return -1
    found = finder.find(name)
    if found is None:
        problems.add(
            f"{name.strip()!r} is no image of the data set.{finder.hint(name)}",
            row=row,
            column=column,
        )
        return -1
    return found


def verdict(text: str, problems: Problems, row: int) -> int:
    """1 where the first image is better, −1 where the second is, 0 for a tie; and 0, noted, for a fault."""
    try:
        return _LABELS[float(text.strip().replace("−", "-"))]
    except (ValueError, KeyError):
        problems.add(
            f"{text.strip()!r}; 1 (the first image is better), -1 (the second) or 0 (a tie) is expected",
            row=row,
            column=LABEL,
        )
        return 0


def with_zeros(path: Path, labels: list[int], zero: str | None) -> list[int]:
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


def _weight(text: str, problems: Problems, row: int) -> float:
    if not text.strip():
        return 1.0
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 <= weight < math.inf:
        problems.add(
            f"{text.strip()!r} is no number of at least 0 (decimals are written with a point)",
            row=row,
            column=WEIGHT,
        )
        return 0.0
    return weight


def _tell_contradictions(judged: Judgements) -> None:
    """Warn of pairs that are judged both ways, with their rows."""
    first: dict[tuple[int, int], dict[int, int]] = defaultdict(
        dict
    )  # pair → verdict → its first place
    for place, ((one, other), label) in enumerate(
        zip(judged.images.tolist(), judged.label.tolist(), strict=True)
    ):
        pair, verdict = ((one, other), label) if one < other else ((other, one), -label)
        first[pair].setdefault(verdict, place)
    both = [sorted((found[1], found[-1])) for found in first.values() if 1 in found and -1 in found]
    if both:
        files = list(dict.fromkeys(judged.files))

        def where(place: int) -> str:
            row = str(judged.rows[place])
            return row if len(files) == 1 else f"{shown(judged.files[place])}:{row}"

        some = "; ".join(f"rows {where(one)} and {where(two)}" for one, two in both[:_SHOWN])
        log.warning(
            "%s: %s judged both ways (%s%s); all judgements count",
            ", ".join(map(shown, files)),
            counted(len(both), "pair"),
            some,
            "; …" if len(both) > _SHOWN else "",
        )


def _spelled(path: str) -> str:
    return nfc(os.path.normpath(path))
