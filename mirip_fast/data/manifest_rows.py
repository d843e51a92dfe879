"""From the rows of a graded CSV file to the table of images, with every fault of the file told at once."""

from __future__ import annotations

import logging
import math
import os
import re
import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

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
from mirip_fast.data.formats import split_page
from mirip_fast.data.graders import PREFIX, consensus, grader_of
from mirip_fast.data.image_files import IMAGE_EXTENSIONS, ending_of, hidden_part
from mirip_fast.data.locate import FileFinder
from mirip_fast.data.sources import entries_in, is_place, safe_name
from mirip_fast.data.table import DataOptions, Manifest, image_table, own_column, tier_reader
from mirip_fast.text import folded, nfc

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

IMAGE_COLUMNS = ("filename", "image_path")
IMAGE_FOLDER = "images"
_TIERS_SHOWN = 20
_MISSING_SHOWN = 3


def records_from_csv(path: Path, options: DataOptions) -> Manifest:
    """Read a CSV file with one image per row; see :func:`mirip_fast.data.manifest.read_manifest`.

    Raises:
        DataError: the file is unreadable, or rows or columns are faulty (all faults in one message).
    """
    table = read_table(
        path,
        expected=_expected_columns(options),
        separator=options.separator,
        encoding=options.encoding,
        encoding_errors=options.encoding_errors,
        sheet=options.sheet,
    )
    table = with_known_names(table, _looked_for(table, options))
    columns = _find_columns(table, options)
    places = [path.parent, *_picture_folder(path.parent)]
    if options.image_root is not None:
        places.insert(0, options.image_root)
    return Manifest(
        source=path,
        root=options.image_root or path.parent,
        tiers=options.tiers,
        table=Rows(table, columns, options, FileFinder(places)).read(),
        options=replace(
            options,
            image_column=columns.image,
            sheet=table.sheet,
            tier_column=options.tier_column
            if columns.tier or not _listed_graders(table, options)
            else DataOptions.tier_column,
        ),
        places=tuple(dict.fromkeys(places)),
    )


def _picture_folder(folder: Path) -> list[Path]:
    """Where a table's pictures lie below its folder: ``images``, else the only folder there is."""
    if (folder / IMAGE_FOLDER).is_dir() or not folder.is_dir():
        return [folder / IMAGE_FOLDER]
    below = [one for one in folder.iterdir() if one.is_dir() and not hidden_part(one.name)]
    return below if len(below) == 1 else [folder / IMAGE_FOLDER]


def _listed_graders(table: Table, options: DataOptions) -> list[str]:
    """The columns that ``--tier-column 김,Lee`` names, one per grader; none where it names one column."""
    names = [name.strip() for name in options.tier_column.split(",")]
    several = options.tier_column not in table.columns and len(names) > 1
    return names if several and set(names) & {*table.columns} else []


def _picture_columns(table: Table, id_column: str) -> list[str]:
    """The columns, other than of ids, whose cells are names of pictures, as far as there are any."""
    return [
        name
        for place, name in enumerate(table.columns)
        if name != id_column
        and (cells := {row[place].strip() for _, row in table.rows} - {""})
        and all(ending_of(split_page(cell)[0]) in IMAGE_EXTENSIONS for cell in cells)
    ]


def _typed(name: str) -> str:
    """A name as a shell takes it; letters of any language need no quotes."""
    return name if re.fullmatch(r"[\w.,=-]+", name) else shlex.quote(name)


def _tier_columns(table: Table, names: Sequence[str], tiers: Sequence[str]) -> list[str]:
    """Those of the columns whose cells are tiers, as far as there are any."""
    known = {folded(tier) for tier in tiers} | {""}
    cells = {
        name: {folded(row[table.columns.index(name)]) for _, row in table.rows} for name in names
    }
    return [name for name, own in cells.items() if own - {""} and own <= known]


def _expected_columns(options: DataOptions) -> list[str]:
    images = IMAGE_COLUMNS if options.image_column is None else (options.image_column,)
    others = (options.tier_column, options.score_column, options.group_column)
    grades = others if options.with_grades else ()
    return [options.id_column, *images, options.grader_column, *grades]


def _looked_for(table: Table, options: DataOptions) -> list[str]:
    """The expected columns, but for the image columns that are of no use beside another."""
    expected = _expected_columns(options)
    there = [name for name in IMAGE_COLUMNS if name in table.columns and name in expected]
    return [name for name in expected if not there or name not in IMAGE_COLUMNS or name in there]


@dataclass(frozen=True)
class Columns:
    """The columns of a table that have a meaning; ``None`` where the table lacks one.

    ``graders`` are columns with the tiers of one grader each, by their names alone: column → grader.
    """

    image: str
    id: str | None
    tier: str | None
    score: str | None
    group: str | None
    grader: str | None = None
    graders: Mapping[str, str] = field(default_factory=dict)


def _find_columns(table: Table, options: DataOptions) -> Columns:
    """Match the options' column names with the header.

    Raises:
        DataError: the image column, or a column that was named by an option, is not there.
    """
    problems = Problems(table.path, sheet=table.sheet)
    defaults = DataOptions()
    exists = listed(table.columns)
    free = [name for name in table.columns if name and name not in _expected_columns(options)]
    if options.image_column is not None:
        wanted: tuple[str, ...] = (options.image_column,)
    else:
        wanted = IMAGE_COLUMNS
    image = next((name for name in wanted if name in table.columns), None)
    pictures = (
        []
        if image or options.image_column is not None
        else _picture_columns(table, options.id_column)
    )
    if len(pictures) == 1:
        image = pictures[0]
        log.info("%s: the column '%s' names the pictures", shown(table.path), spelled(image))
    if image is None:
        close = next(filter(None, (closest(name, table.columns) for name in wanted)), None)
        problems.add(
            f"no column {' or '.join(map(repr, wanted))} with the image files. It has: {exists}."
            + (
                f" Did you mean --image-column {spelled(close)}?"
                if close
                else " Name it: --image-column COLUMN"
            )
        )

    def optional(name: str, default: str, flag: str) -> str | None:
        if name in table.columns:
            return name
        if name != default:  # asked for by name
            close = closest(name, table.columns)
            hint = f" Did you mean {flag} {spelled(close)}?" if close else ""
            problems.add(f"no column {name!r} ({flag}). It has: {exists}.{hint}")
        elif name != options.tier_column:  # whose absence is told in any case
            near = misspelled(name, free)
            if near is not None:
                log.warning(
                    "%s: column '%s' is not read; did you mean %s %s?",
                    *(shown(table.path), spelled(near), flag, spelled(near)),
                )
        return None

    own_id = optional(options.id_column, defaults.id_column, "--id-column")
    grader = optional(options.grader_column, defaults.grader_column, "--grader-column")
    if not options.with_grades:
        problems.raise_if_any()
        return Columns(image or "", own_id, tier=None, score=None, group=None, grader=grader)
    names = ((name, grader_of(name, options.tier_column, options.score_column)) for name in free)
    graders = {name: one for name, one in names if one is not None}
    for name in _listed_graders(table, options):
        graders[name] = name
        if name not in table.columns:
            problems.add(f"no column {name!r} (--tier-column). It has: {exists}.")
    columns = Columns(
        image=image or "",
        id=own_id,
        tier=None
        if graders and options.tier_column not in table.columns
        else optional(options.tier_column, defaults.tier_column, "--tier-column"),
        score=optional(options.score_column, defaults.score_column, "--score-column"),
        group=optional(options.group_column, defaults.group_column, "--group-column"),
        grader=grader,
        graders=graders,
    )
    for name, one in columns.graders.items():
        alike = [other for other, two in columns.graders.items() if folded(two) == folded(one)]
        if alike[0] != name:
            problems.add(f"one grader's, as the column {alike[0]!r} is", column=name)
    problems.raise_if_any()
    if columns.tier is None and not columns.graders and options.applicants is None:
        hold = _tier_columns(table, free, options.tiers)
        close = (
            ",".join(hold)
            or misspelled(options.tier_column, free)
            or closest(options.tier_column, free)
        )
        log.warning(
            "%s: no column %r, so its images have no %s; it has: %s%s",
            *(
                shown(table.path),
                options.tier_column,
                "tiers" if columns.score else "grades",
                exists,
            ),
            f" (did you mean --tier-column {_typed(spelled(close))}?)" if close else "",
        )
    return columns


class Rows:
    """Turns the rows of one CSV file into a table of images and collects their faults."""

    def __init__(
        self,
        table: Table,
        columns: Columns,
        options: DataOptions,
        finder: FileFinder,
        problems: Problems | None = None,
    ) -> None:
        self.table = table
        self.columns = columns
        self.code = tier_reader(options.tiers)
        self.names, self.options = options.tiers, options
        self.finder = finder
        self.problems = Problems(table.path, sheet=table.sheet) if problems is None else problems
        self.inside = [os.path.join(place, "") for place in finder.places]  # noqa: PTH118 (with its /)
        self.nowhere: set[int] = set()  # rows whose file is not there
        self.outside: list[str] = []  # folders of files that lie elsewhere
        self.spellings: Counter[tuple[str, str]] = Counter()  # of tiers: as written, as read
        self.unknown_tiers: dict[tuple[str, str], list[int]] = {}  # column, name → its rows
        self.confined = is_place(table.path)
        # Where a file that is nowhere is said to be: below the last place that is a folder.
        there = (place for place in reversed(finder.places) if place.is_dir() or entries_in(place))
        self.expected = next(there, finder.places[0])
        used = {columns.image, columns.id, columns.tier, columns.score, columns.group}
        self.own = [name for name in table.columns if name and name not in used]
        names = ("image_id", "file", "named", "row", "tier", "tier_score", "group")
        #: Column → what the rows say, as far as they are read.
        self.made: dict[str, list[Any]] = {
            name: [] for name in (*names, *map(own_column, self.own))
        }

    def read(self) -> pd.DataFrame:
        """All images, one per image_id.

        Raises:
            DataError: any row is faulty.
        """
        for row, cells in self.table.rows:
            self._add(row, cells)
        graders = {} if self.columns.grader is None else self._graders_of_rows()
        grades = self._grades_in_columns()
        if graders and grades:
            self.problems.add(
                f"grades stand in the columns {', '.join(self.columns.graders)}, too: keep one of both",
                column=self.columns.grader,
            )
        self._tell_tiers()
        if self.outside:
            self.problems.hint(
                "Files elsewhere are read only where their folder is named: --image-root "
                + os.path.commonpath(self.outside)
            )
        unique = self._without_duplicates(graders)
        works = self._works(unique, graders) if graders else {}
        self.problems.raise_if_any()
        if graders:
            grades = self._join(works, graders)
        elif len(unique) < len(self.table.rows):
            self.made = {name: [made[i] for i in unique] for name, made in self.made.items()}
            grades = {name: [codes[i] for i in unique] for name, codes in grades.items()}
        if self.options.with_grades and grades:
            self._agree(grades)
        self._tell_ungraded(self.options.with_grades and bool(grades))
        if self.nowhere:
            self._find_moved()
        return image_table(self.made, self.names)

    def _grades_in_columns(self) -> dict[str, list[int | None]]:
        """Grader → tier [n] of each row, of the columns that hold one grader's tiers each.

        Which do is told by what is in them: ``tier_note`` may hold anything.
        """
        texts = {name: self.made[own_column(name)] for name in self.columns.graders}
        said = {name: set(cells) - {""} for name, cells in texts.items()}
        are = [name for name, words in said.items() if any(self.code(w) is not None for w in words)]
        few = len(set().union(*said.values())) <= _TIERS_SHOWN
        if not are and self.columns.tier is None and few and len(said) > 1:
            are = [name for name, words in said.items() if words]  # unknown tiers, to be told
        for name, cells in texts.items():
            if name not in are and any(cells):
                log.warning(
                    "%s: column '%s' holds no grader's tiers (first: %r); it is kept as it is",
                    *(shown(self.table.path), spelled(name), next(filter(None, cells))),
                )
        rows = self.made["row"]
        grades = {}
        for name in are:
            del self.made[own_column(name)]
            grades[self.columns.graders[name]] = [
                self._tier(row, text, name) for row, text in zip(rows, texts[name], strict=True)
            ]
        return grades

    def _graders_of_rows(self) -> dict[str, str]:
        """A grader as written → the name; of a file with a row per work and grader. None of one grader's."""
        cells, rows = self.made[own_column(self.columns.grader or "")], self.made["row"]
        names: dict[str, str] = {}  # folded → as first written
        graders = {cell: names.setdefault(folded(cell), cell) for cell in cells if cell}
        if len(names) < 2 or not any(tier not in (None, "") for tier in self._given_tiers()):
            return {}
        if len(graders) > len(names):
            said = (f"{old!r} as {new!r}" for old, new in graders.items() if old != new)
            log.warning("%s: graders are read %s", shown(self.table.path), ", ".join(said))
        for row, cell, tier in zip(rows, cells, self.made["tier"], strict=True):
            if not cell and tier is not None:
                self.problems.add("empty; who gave the tier?", row=row, column=self.columns.grader)
        if "score" in names:
            self.problems.add("no grader can be called 'score'", column=self.columns.grader)
        return graders

    def _given_tiers(self) -> list[Any]:
        """[n] tier of each row; its text where grades are not read."""
        own = own_column(self.options.tier_column)
        return self.made["tier"] if own not in self.made else self.made[own]

    def _works(self, unique: list[int], graders: Mapping[str, str]) -> dict[str, list[int]]:
        """Image id → its rows among ``unique``; where they contradict each other is noted."""
        works: dict[str, list[int]] = defaultdict(list)
        files: dict[str, str] = {}
        for i in unique:
            image_id, row, named = (self.made[name][i] for name in ("image_id", "row", "named"))
            works[image_id].append(i)
            first = files.setdefault(named.strip(), image_id)
            if first != image_id and named.strip():
                self.problems.add(
                    f"{named!r} is {image_id!r} here and {first!r} above; a work has one name, which "
                    "the rows of all its graders give",
                    row=row,
                    column=self.columns.id,
                )
        for image_id, rows in works.items():
            first_said: dict[str, tuple[str, int]] = {}
            for i in rows:
                for column, text in self._texts(i, graded=False):
                    old, row = first_said.setdefault(column, (text, i)) if text else (text, i)
                    if old != text:
                        self.problems.add(
                            f"{image_id!r} has {text!r} here and {old!r} in row {self.made['row'][row]}",
                            row=self.made["row"][i],
                            column=column,
                        )
                        self.problems.hint(
                            "What a grader says of a work, such as a comment, cannot differ among its rows: "
                            f"beside {self.options.tier_column} and {self.options.score_column} columns tell "
                            "of the work. Take such a column out."
                        )
        return works

    def _join(
        self, works: Mapping[str, list[int]], graders: Mapping[str, str]
    ) -> dict[str, list[Any]]:
        """Make one row of each work's rows; returns the tiers [n] by grader.

        A finer grade is the mean over the rows; any other cell is the first that is not empty.
        """
        written, tiers = self.made[own_column(self.columns.grader or "")], self._given_tiers()
        grades: dict[str, list[Any]] = {name: [None] * len(works) for name in graders.values()}
        for work, rows in enumerate(works.values()):
            for i in rows:
                if written[i]:
                    grades[graders[written[i]]][work] = tiers[i]

        def one(name: str, values: list[Any]) -> Any:
            there = [value for value in values if value not in (None, "")]
            if name == "tier_score" and there:
                return math.fsum(there) / len(there)
            return there[0] if there else values[0]

        gone = {own_column(self.columns.grader or ""), own_column(self.options.tier_column)}
        self.made = {
            name: [one(name, [made[i] for i in rows]) for rows in works.values()]
            for name, made in self.made.items()
            if name not in gone
        }
        self.made["tier"] = [None] * len(works)
        if not self.options.with_grades:
            self.made |= {PREFIX + name: [t or "" for t in own] for name, own in grades.items()}
        return grades

    def _agree(self, grades: dict[str, list[int | None]]) -> None:
        """Keep the graders' tiers as columns; what no one decided is their consensus."""
        of_all = np.array(list(grades.values()), dtype=np.float64).T
        common = consensus(of_all)
        tiers, scores = self.made["tier"], self.made["tier_score"]
        given = sum(tier is not None for tier in tiers)
        self.made["tier"] = [
            common_tier if tier is None and common_tier >= 0 else tier
            for tier, common_tier in zip(tiers, common.tolist(), strict=True)
        ]
        if all(score is None for score in scores):
            counts = np.isfinite(of_all).sum(axis=1)
            sums = np.nansum(len(self.names) - 1 - of_all, axis=1)
            self.made["tier_score"] = [
                total / count if count else None
                for total, count in zip(sums.tolist(), counts.tolist(), strict=True)
            ]
        texts: dict[int | None, str] = {None: "", **dict(enumerate(self.names))}
        self.made |= {PREFIX + name: [texts[t] for t in own] for name, own in grades.items()}
        several = int((np.isfinite(of_all).sum(axis=1) > 1).sum())
        who = (f"{name} ({sum(t is not None for t in own):,})" for name, own in grades.items())
        filled = int((common >= 0).sum()) if not given else 0
        log.info(
            "%s: %s (works graded): %s; %s of %s have two grades and more. %s",
            *(
                shown(self.table.path),
                counted(len(grades), "grader"),
                ", ".join(who),
                f"{several:,}",
            ),
            counted(len(common), "work"),
            "A work's tier is the median, halfway between two the worse one"
            if filled
            else f"A work's tier is that of the column {self.columns.tier!r}, where it is empty the median",
        )

    def _tell_ungraded(self, several: bool) -> None:
        """Say how many works have no grade, where there is a column of grades."""
        tiers = self.made["tier"]
        if (self.columns.tier is None and not several) or None not in tiers:
            return
        first, graded = tiers.index(None), len(tiers) - tiers.count(None)
        named = f"row {self.made['row'][first]}, {self.made['image_id'][first]!r}"
        log.warning(
            "%s: %s of %s a grade; %s",
            *(shown(self.table.path), f"{graded:,}" if graded else "none"),
            f"{counted(len(tiers), 'work')} {'have' if graded > 1 else 'has'}",
            f"the others (first: {named}) are left out where grades are needed"
            if graded
            else "the columns of grades are empty"
            if self.columns.tier is None
            else f"the column {self.columns.tier!r} is empty",
        )

    def _add(self, row: int, cells: list[str]) -> None:
        columns = self.columns
        values = {
            name: cell if name == columns.image else nfc(cell.strip())
            for name, cell in zip(self.table.columns, cells, strict=True)
        }
        filename = values[columns.image]  # as written: it is looked for on the disk
        if not filename.strip():
            self.problems.add("empty; an image file is expected", row=row, column=columns.image)
        image_id = nfc(filename) if columns.id is None else values[columns.id]
        if not image_id.strip() and columns.id is not None:
            self.problems.add("empty; every image needs its own name", row=row, column=columns.id)
        known = (
            filename if image_id == filename else image_id,  # one object: there may be millions
            str(self._path(row, filename)),
            filename,
            row,
            self._tier(row, values[columns.tier], columns.tier) if columns.tier else None,
            self._score(row, values[columns.score]) if columns.score else None,
            (values[columns.group] or None) if columns.group else None,
            *(sys.intern(values[name]) for name in self.own),
        )
        for made, value in zip(self.made.values(), known, strict=True):
            made.append(value)

    def _path(self, row: int, filename: str) -> Path:
        """Where the file is, or where it was expected."""
        name, reason = filename, None
        if self.confined:  # a table in a tar must not name files outside of it
            name, reason = safe_name(filename.strip().replace("\\", "/"))
        found = self.finder.find(filename) if reason is None else None
        if found is None:
            if filename.strip():
                self.nowhere.add(row)
            return self.expected / (filename if reason is None else name)
        path = os.path.normpath(found)
        if not self.confined and not path.startswith(tuple(self.inside)):
            real = tuple(os.path.join(os.path.realpath(place), "") for place in self.inside)  # noqa: PTH118
            if not os.path.realpath(path).startswith(real):
                self.outside.append(os.path.dirname(path))  # noqa: PTH120
                self.problems.add(
                    f"{filename.strip()!r} lies outside {shown(self.table.path.parent)}",
                    row=row,
                    column=self.columns.image,
                )
        return found

    def _find_moved(self) -> None:
        """Find the files that old absolute paths mean; what is missing is told.

        A path is taken by its end only where no other name in the table means the same file.
        """
        rows, named, files = (self.made[name] for name in ("row", "named", "file"))
        missing = [i for i, row in enumerate(rows) if row in self.nowhere]
        moved = {i: self.finder.find_moved(named[i]) for i in missing}
        names: dict[str, set[str]] = defaultdict(set)
        for i, file in enumerate(files):
            names[str(moved.get(i) or file)].add(nfc(named[i].strip()))
        sure = {i: path for i, path in moved.items() if path and len(names[str(path)]) == 1}
        where = shown(self.table.path)
        left = [i for i in missing if i not in sure]
        for taken in list(sure)[:1]:
            log.warning(
                "%s: %s read by the end of the path, which leads nowhere as a whole "
                "(first: row %s, '%s' is %s)",
                *(where, counted(len(sure), "file name"), rows[taken], named[taken]),
                shown(sure[taken]),
            )
        if left:
            some = (
                f"row {rows[i]}: '{named[i]}'{self.finder.suggest(named[i]).replace(' ', '. ', 1)}"
                for i in left[:_MISSING_SHOWN]
            )
            log.warning(
                "%s: %d of %s %s not there (%s%s)",
                *(where, len(left), counted(len(rows), "image file")),
                *("is" if len(left) == 1 else "are", " ".join(some)),
                " …" if len(left) > _MISSING_SHOWN else "",
            )
        for i, path in sure.items():
            files[i] = str(path)

    def _tier(self, row: int, name: str, column: str) -> int | None:
        tier = self.code(name) if name else None
        if name and tier is None:
            self.unknown_tiers.setdefault((column, name), []).append(row)
        elif tier is not None and nfc(self.names[tier]) != name:
            self.spellings[name, self.names[tier]] += 1
        return tier

    def _tell_tiers(self) -> None:
        """Note the tiers that are unknown; warn of those that are known and were spelled otherwise."""
        if self.spellings:
            said = [f"{old!r} as {new!r} ({n:,})" for (old, new), n in self.spellings.items()]
            log.warning("%s: tiers are read %s", shown(self.table.path), ", ".join(sorted(said)))
        if not self.unknown_tiers:
            return
        for (column, name), rows in self.unknown_tiers.items():
            close = closest(name, self.names)
            self.problems.add(
                f"unknown tier {name!r}{f' ({len(rows):,} rows)' if len(rows) > 1 else ''}."
                + (f" Did you mean {close!r}?" if close else ""),
                row=rows[0],
                column=column,
            )
        counts = Counter(self.names[tier] for tier in self.made["tier"] if tier is not None)
        for (_, name), rows in self.unknown_tiers.items():
            counts[name] += len(rows)
        numbers = all(name.isascii() and name.replace(".", "", 1).isdigit() for name in counts)
        names = sorted(counts, key=float if numbers else str.casefold)
        some = ", ".join(f"{name} {counts[name]:,}" for name in names[:_TIERS_SHOWN])
        how = "in numerical order" if numbers else "in alphabetical order"
        hint = (
            f"The tiers known are {', '.join(self.names)}. This file has, {how}: {some}"
            f"{', …' if len(counts) > _TIERS_SHOWN else ''}. If these are its tiers, name them all in your "
            'order, the best first: --tiers "BEST,…,WORST"'
        )
        if numbers and 1 < len(names) <= _TIERS_SHOWN:
            # Which end is the best is the user's to say: both are offered alike.
            hint += (
                f". Is {names[0]} the best, or {names[-1]}? "
                f'--tiers "{",".join(names)}", or --tiers "{",".join(names[::-1])}"'
            )
        if numbers and len(names) > _TIERS_SHOWN:
            hint += f". If they are points, the more the better: --score-column {self.columns.tier}"
        self.problems.hint(hint)

    def _score(self, row: int, text: str) -> float | None:
        if not text:
            return None
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if math.isfinite(value):
            return value
        hint = "; decimals are written with a point" if "," in text else ""
        self.problems.add(f"{text!r} is no number{hint}", row=row, column=self.columns.score)
        return None

    def _without_duplicates(self, graders: Mapping[str, str]) -> list[int]:
        """One place per image_id, and per grader of it; rows that repeat another exactly are dropped with a
        remark."""
        first: dict[tuple[str, str | None], int] = {}
        written = self.made[own_column(self.columns.grader or "")] if graders else None
        repeated = 0
        for i, image_id in enumerate(self.made["image_id"]):
            grader = None if written is None else graders.get(written[i])
            known = first.setdefault((image_id, grader), i)
            if known == i or not image_id:
                continue
            pairs = zip(self._texts(known), self._texts(i), strict=True)
            different = [(column, old, new) for (column, old), (_, new) in pairs if old != new]
            repeated += not different
            whose = repr(image_id) + ("" if grader is None else f" by {grader!r}")
            for column, old, new in different:
                self.problems.add(
                    f"{whose} has {new!r} here and {old!r} in row {self.made['row'][known]}",
                    row=self.made["row"][i],
                    column=column,
                )
        if repeated:
            log.warning(
                "%s: %s repeated exactly; each is used once",
                *(shown(self.table.path), counted(repeated, "row")),
            )
        return list(first.values())

    def _texts(self, i: int, *, graded: bool = True) -> list[tuple[str, str]]:
        """What a row says: (column, text); without ``graded`` what it says of the work, not of a grading."""
        columns, made = self.columns, self.made
        tier_names = {None: ""} | dict(enumerate(self.names))
        texts: list[tuple[str | None, str, Callable[[Any], Any]]] = [
            (columns.image, "named", str.strip),
            (columns.tier, "tier", tier_names.get),
            (columns.score, "tier_score", lambda score: "" if score is None else str(score)),
            (columns.group, "group", lambda group: group or ""),
            *((name, own_column(name), str) for name in self.own if own_column(name) in made),
        ]
        grading = (columns.grader, self.options.tier_column, self.options.score_column)
        return [
            (name or "", text(made[key][i]))
            for name, key, text in texts
            if graded or name not in grading
        ]
