"""From the rows of a graded CSV file to the table of images, with every fault of the file told at once."""

from __future__ import annotations

import logging
import math
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mirip_fast.config import DataConfig
from mirip_fast.data.formats import split_page
from mirip_fast.data.graders import PREFIX, consensus, grader_of
from mirip_fast.data.image_files import IMAGE_EXTENSIONS, ending_of, hidden_part, one_line
from mirip_fast.data.locate import FileFinder
from mirip_fast.data.sources import entries_in, is_place, safe_name
from mirip_fast.data.spreadsheets import (
    Problems,
    Table,
    header_text,
    misspelled,
    number,
    read_table,
    spelled,
    with_known_names,
)
from mirip_fast.data.table import Manifest, image_table, own_column, tier_reader
from mirip_fast.text import closest, counted, folded, nfc, shown

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

IMAGE_COLUMNS = ("filename", "image_path")
IMAGE_FOLDER = "images"
_TIERS_SHOWN = 20
_MISSING_SHOWN = 3
#: Columns whose texts hardly two images share, and of numbers; memory for others is shared.
_ONE_EACH = {"image_id", "file", "named", "row", "tier", "tier_score"}


def records_from_csv(path: Path, options: DataConfig) -> Manifest:
    """Read a CSV file with one image per row; see :func:`mirip_fast.data.manifest.read_manifest`.

    Raises:
        DataError: the file is unreadable, or rows or columns are faulty (all faults in one message).
    """
    expected = _expected_columns(options)
    table = read_table(
        path,
        expected=expected,
        separator=options.separator,
        encoding=options.encoding,
        sheet=options.sheet,
    )
    there = {name for name in IMAGE_COLUMNS if name in table.columns and name in expected}
    table = with_known_names(  # an image column is of no use beside another
        table, [n for n in expected if not there or n not in IMAGE_COLUMNS or n in there]
    )
    columns = _find_columns(table, options)
    places = [path.parent, _picture_folder(path.parent)]
    if options.image_root is not None:
        places.insert(0, Path(options.image_root))
    reader = RowReader(table, options, FileFinder(places), table.problems(), **columns)
    by_columns = reader.tier is None and _listed_graders(table, options)
    return Manifest(
        source=path,
        root=Path(options.image_root or path.parent),
        tiers=options.tier_names(),
        table=reader.images(),
        options=replace(
            options,
            image_column=reader.image,
            sheet=table.sheet,
            tier_column=DataConfig.tier_column if by_columns else options.tier_column,
        ),
        places=tuple(dict.fromkeys(places)),
    )


def _picture_folder(folder: Path) -> Path:
    """Where a table's pictures lie below its folder: ``images``, else the only folder there is."""
    usual = folder / IMAGE_FOLDER
    if usual.is_dir() or not folder.is_dir():
        return usual
    below = [one for one in folder.iterdir() if one.is_dir() and not hidden_part(one.name)]
    return below[0] if len(below) == 1 else usual


def _expected_columns(options: DataConfig) -> list[str]:
    images = IMAGE_COLUMNS if options.image_column is None else (options.image_column,)
    others = (options.tier_column, options.score_column, options.group_column)
    grades = others if options.with_grades else ()
    return [options.id_column, *images, options.grader_column, *grades]


def _listed_graders(table: Table, options: DataConfig) -> list[str]:
    """The columns that ``--tier-column 김,Lee`` names, one per grader; none where it names one column."""
    names = [name.strip() for name in options.tier_column.split(",")]
    several = options.tier_column not in table.columns and len(names) > 1
    return names if several and set(names) & {*table.columns} else []


def _find_columns(table: Table, options: DataConfig) -> dict[str, Any]:
    """Match the options' column names with the header: the columns of a :class:`RowReader`.

    Raises:
        DataError: the image column, or a column that was named by an option, is not there.
    """
    problems, where, exists = table.problems(), shown(table.path), header_text(table.columns)
    expected = _expected_columns(options)
    free = [name for name in table.columns if name not in expected]
    image = _image_column(table, options, problems)

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
                    *(where, spelled(near), flag, spelled(near)),
                )
        return None

    usual, graders = DataConfig, dict[str, str]()
    own_id = optional(options.id_column, usual.id_column, "--id-column")
    grader = optional(options.grader_column, usual.grader_column, "--grader-column")
    if not options.with_grades:
        problems.raise_if_any()
        return {"image": image, "id": own_id, "grader": grader}
    for name in free:
        one = grader_of(name, options.tier_column, options.score_column)
        if one is not None:
            graders[name] = one
    for name in _listed_graders(table, options):
        graders[name] = name
        if name not in table.columns:
            problems.add(f"no column {name!r} (--tier-column). It has: {exists}.")
    tier = None
    if not graders or options.tier_column in table.columns:
        tier = optional(options.tier_column, usual.tier_column, "--tier-column")
    score = optional(options.score_column, usual.score_column, "--score-column")
    group = optional(options.group_column, usual.group_column, "--group-column")
    first: dict[str, str] = {}
    for name, one in graders.items():
        if first.setdefault(folded(one), name) != name:
            problems.add(f"one grader's, as the column {first[folded(one)]!r} is", column=name)
    problems.raise_if_any()
    if tier is None and not graders and options.applicants is None:
        close = (
            ",".join(_tier_columns(table, free, options.tier_names()))
            or misspelled(options.tier_column, free)
            or closest(options.tier_column, free)
        )
        log.warning(
            "%s: no column %r, so its images have no %s; it has: %s%s",
            *(where, options.tier_column, "tiers" if score else "grades", exists),
            f" (did you mean --tier-column {_typed(spelled(close))}?)" if close else "",
        )
    grades = {"tier": tier, "score": score, "group": group, "graders": graders}
    return {"image": image, "id": own_id, "grader": grader, **grades}


def _image_column(table: Table, options: DataConfig, problems: Problems) -> str:
    """The column of the image files: by its name, else the only one whose cells are names of pictures."""
    wanted = IMAGE_COLUMNS if options.image_column is None else (options.image_column,)
    found = [name for name in wanted if name in table.columns][:1]
    if not found and options.image_column is None:
        found = [
            name
            for name in table.columns
            if name != options.id_column
            and (cells := {cell.strip() for cell in table.cells[name]} - {""})
            and all(ending_of(split_page(cell)[0]) in IMAGE_EXTENSIONS for cell in cells)
        ]
        if len(found) == 1:
            log.info("%s: the column '%s' names the pictures", shown(table.path), spelled(found[0]))
    if len(found) == 1:
        return found[0]
    close = next(filter(None, (closest(name, table.columns) for name in wanted)), None)
    problems.add(
        f"no column {' or '.join(map(repr, wanted))} with the image files. "
        f"It has: {header_text(table.columns)}."
        + (
            f" Did you mean --image-column {spelled(close)}?"
            if close
            else " Name it: --image-column COLUMN"
        )
    )
    return ""


def _tier_columns(table: Table, names: Sequence[str], tiers: Sequence[str]) -> list[str]:
    """Those of the columns whose cells are tiers, as far as there are any."""
    known = {folded(tier) for tier in tiers}
    said = {name: {folded(cell) for cell in set(table.cells[name])} - {""} for name in names}
    return [name for name, words in said.items() if words and words <= known]


def _typed(name: str) -> str:
    """A name as a shell takes it; letters of any language need no quotes."""
    return name if re.fullmatch(r"[\w.,=-]+", name) else shlex.quote(name)


@dataclass(frozen=True)
class RowReader:
    """RowReader of a table on their way to images; faults are noted until all are known."""

    table: Table
    options: DataConfig
    finder: FileFinder
    problems: Problems
    image: str
    id: str | None = None
    tier: str | None = None
    score: str | None = None
    group: str | None = None
    grader: str | None = None
    graders: Mapping[str, str] = field(default_factory=dict)

    def images(self) -> pd.DataFrame:
        """The images that the rows are of, one per image_id.

        Raises:
            DataError: any row is faulty.
        """
        import pandas as pd

        cells, options = self.table.cells, self.options
        text = {n: [nfc(cell.strip()) for cell in cells[n]] for n in self.table.columns}
        named = cells[self.image].tolist()  # as written: it is looked for on the disk
        ids = [nfc(name) for name in named] if self.id is None else text[self.id]
        self._require(named, self.image, "empty; an image file is expected")
        if self.id is not None:
            self._require(ids, self.id, "empty; every image needs its own name")
        files, missing = self._files(named)
        by_column = self._graders_by_column(text)
        tiers = self._tiers({c: text[c] for c in (self.tier, *by_column) if c is not None})
        by_row = self._graders_by_row(text)
        as_read = [*options.tier_names(), ""]  # -1 is none
        text |= {name: [as_read[code] for code in codes] for name, codes in tiers.items()}
        known = {self.image, self.id, self.tier, self.score, self.group, *by_column}
        texts = {
            "image_id": ids,
            "file": files,
            "named": named,
            "group": text.get(self.group or "", [""] * len(ids)),
            **{own_column(name): text[name] for name in text if name not in known},
            **{PREFIX + grader: text[name] for name, grader in by_column.items()},
        }
        made = pd.DataFrame(texts, cells.index, dtype=object)
        made["row"], made["tier_score"] = cells.index, self._scores(text)
        made["tier"] = tiers.get(self.tier or "", -1)
        if by_row and by_column:
            self.problems.add(
                f"grades stand in the columns {', '.join(by_column)}, too: keep one of both",
                column=self.grader,
            )
        made = self._works(made, text, by_row)
        self.problems.raise_if_any()
        graders = [*dict.fromkeys(by_row.values())] or [*by_column.values()]
        if options.with_grades and graders:
            self._agree(made, graders)
        if options.with_grades and (self.tier is not None or graders):
            self._tell_ungraded(made)
        if missing:
            self._find_moved(made, missing)
        values = {str(name): made[name].tolist() for name in made}
        for name in values.keys() - _ONE_EACH:
            values[name] = [sys.intern(text) for text in values[name]]
        values["group"] = [group or None for group in values["group"]]
        return image_table(values, options.tier_names())

    @property
    def _tier_column(self) -> str:
        return self.tier or self.options.tier_column

    def _require(self, texts: Sequence[str], column: str, what: str) -> None:
        for row, cell in zip(self.table.cells.index, texts, strict=True):
            if not cell.strip():
                self.problems.add(what, row=row, column=column)

    def _files(self, named: Sequence[str]) -> tuple[list[str], set[int]]:
        """[n] where each file is, or was expected; and the rows whose file is not there."""
        places = self.finder.places
        inside = tuple(os.path.join(place, "") for place in places)  # noqa: PTH118 (with its /)
        really = tuple(os.path.join(os.path.realpath(place), "") for place in places)  # noqa: PTH118
        there = (place for place in reversed(places) if place.is_dir() or entries_in(place))
        expected = next(there, places[0])
        confined = is_place(self.table.path)  # a table in a tar must not name files outside of it
        files, missing, outside = list[str](), set[int](), list[str]()
        for row, name in zip(self.table.cells.index, named, strict=True):
            as_safe, reason = name, None
            if confined:
                as_safe, reason = safe_name(name.strip().replace("\\", "/"))
            found = None if reason is not None else self.finder.find(name)
            if found is None and name.strip():
                missing.add(row)
            files.append(str(found or expected / (name if reason is None else as_safe)))
            path = files[-1] if found is None else os.path.normpath(found)
            if confined or found is None or path.startswith(inside):
                continue
            if not os.path.realpath(path).startswith(really):
                outside.append(os.path.dirname(path))  # noqa: PTH120
                self.problems.add(
                    f"{name.strip()!r} lies outside {shown(self.table.path.parent)}",
                    row=row,
                    column=self.image,
                )
        if outside:
            self.problems.hint(
                "Files elsewhere are read only where their folder is named: --image-root "
                + os.path.commonpath(outside)
            )
        return files, missing

    def _graders_by_column(self, text: Mapping[str, Sequence[str]]) -> dict[str, str]:
        """Those of ``self.graders`` whose cells are tiers: ``tier_note`` may hold anything."""
        code = tier_reader(self.options.tier_names())
        said = {name: set(text[name]) - {""} for name in self.graders}
        are = {name for name, words in said.items() if any(code(w) is not None for w in words)}
        few = len(set().union(*said.values())) <= _TIERS_SHOWN
        if not are and self.tier is None and few and len(said) > 1:
            are = {name for name, words in said.items() if words}  # unknown tiers, to be told
        for name in self.graders:
            if name not in are and said[name]:
                log.warning(
                    "%s: column '%s' holds no grader's tiers (first: %r); it is kept as it is",
                    *(shown(self.table.path), spelled(name), next(filter(None, text[name]))),
                )
        return {name: grader for name, grader in self.graders.items() if name in are}

    def _graders_by_row(self, text: Mapping[str, Sequence[str]]) -> dict[str, str]:
        """A grader as written → the name; of a file with a row per work and grader. None of one grader's."""
        column = self.grader
        if column is None or not any(text.get(self._tier_column, ())):
            return {}
        names: dict[str, str] = {}  # folded → as first written
        graders = {c: names.setdefault(folded(c), c) for c in dict.fromkeys(text[column]) if c}
        if len(names) < 2:
            return {}
        if len(graders) > len(names):
            said = (f"{old!r} as {new!r}" for old, new in graders.items() if old != new)
            log.warning("%s: graders are read %s", shown(self.table.path), ", ".join(said))
        if self.options.with_grades:
            graded = zip(self.table.cells.index, text[column], text[self._tier_column], strict=True)
            for row, cell, tier in graded:
                if not cell and tier:
                    self.problems.add("empty; who gave the tier?", row=row, column=column)
        if "score" in names:
            self.problems.add("no grader can be called 'score'", column=column)
        return graders

    def _tiers(self, texts: Mapping[str, Sequence[str]]) -> dict[str, list[int]]:
        """Column → [n] number of each cell's tier, -1 for none; unknown ones are noted, spellings told."""
        names = self.options.tier_names()
        code = tier_reader(names)
        counts = Counter(cell for column in texts.values() for cell in column if cell)
        code_of = {cell: code(cell) for cell in counts}
        unknown = {cell for cell in counts if code_of[cell] is None}
        others = {c: names[i] for c, i in code_of.items() if i is not None and nfc(names[i]) != c}
        if others:
            said = sorted(f"{c!r} as {name!r} ({counts[c]:,})" for c, name in others.items())
            log.warning("%s: tiers are read %s", shown(self.table.path), ", ".join(said))
        for column, cells in texts.items() if unknown else ():
            first: dict[str, int] = {}
            for row, cell in zip(self.table.cells.index, cells, strict=True):
                if cell in unknown:
                    first.setdefault(cell, row)
            here = Counter(cells)
            for cell, row in first.items():
                close = closest(cell, names) if len(first) <= _TIERS_SHOWN else None
                self.problems.add(
                    f"unknown tier {cell!r}{f' ({here[cell]:,} rows)' if here[cell] > 1 else ''}."
                    + (f" Did you mean {close!r}?" if close else ""),
                    row=row,
                    column=column,
                )
        if unknown:
            self._hint_at_tiers(counts)
        known = {cell: -1 if i is None else i for cell, i in code_of.items()} | {"": -1}
        return {column: [known[cell] for cell in cells] for column, cells in texts.items()}

    def _hint_at_tiers(self, counts: Mapping[str, int]) -> None:
        numbers = all(name.isascii() and name.replace(".", "", 1).isdigit() for name in counts)
        names = sorted(counts, key=float if numbers else str.casefold)
        some = ", ".join(f"{name} {counts[name]:,}" for name in names[:_TIERS_SHOWN])
        how = "in numerical order" if numbers else "in alphabetical order"
        hint = (
            f"The tiers known are {', '.join(self.options.tier_names())}. This file has, {how}: {some}"
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
            hint += f". If they are points, the more the better: --score-column {self.tier}"
        self.problems.hint(hint)

    def _scores(self, text: Mapping[str, Sequence[str]]) -> list[float]:
        """[n] the finer grades; NaN for none."""
        column, made = self.score, list[float]()
        if column is None:
            return [math.nan] * len(self.table.cells)
        for row, cell in zip(self.table.cells.index, text[column], strict=True):
            made.append(number(cell))
            if cell and math.isnan(made[-1]):
                hint = "; decimals are written with a point" if "," in cell else ""
                self.problems.add(f"{cell!r} is no number{hint}", row=row, column=column)
        return made

    def _works(
        self, made: pd.DataFrame, text: Mapping[str, Sequence[str]], by_row: Mapping[str, str]
    ) -> pd.DataFrame:
        """One row per work: those that repeat another are left out, and those of several graders joined."""
        import pandas as pd

        who = [by_row.get(cell, "") for cell in text[self.grader or ""]] if by_row else ""
        work = made[["image_id"]].set_axis(["id"], axis=1).assign(who=who)
        if not by_row and not work.duplicated().any():
            return made
        said = pd.DataFrame(text, made.index, dtype=object)
        spelling: dict[str, str] = {}  # one for each file
        of_files = zip(made["file"], made["named"], strict=True)
        said[self.image] = [spelling.setdefault(f, name.strip()) for f, name in of_files]
        if self.score is not None:  # 0.134 is 0.1340
            first: dict[float | str, str] = {}
            numbers = zip(made["tier_score"].tolist(), text[self.score], strict=True)
            said[self.score] = [first.setdefault(c if math.isnan(n) else n, c) for n, c in numbers]
        left = [self.id, self.grader if by_row else None]
        said = said.drop(columns=[name for name in left if name is not None])
        once = self._once(work, said)
        if not by_row:
            return made[once]
        self._require_agreement(made[once], said[once])
        self.problems.raise_if_any()
        grades = work[once].assign(tier=said[self._tier_column])
        return self._joined(made[once], grades, [*dict.fromkeys(by_row.values())])

    def _once(self, work: pd.DataFrame, said: pd.DataFrame) -> pd.Series[bool]:
        """[n] whether a row is the first of its work, and of its grader; a later one must say the same."""
        later = work.duplicated()
        rows = work.duplicated(keep=False) & (work["id"] != "")
        by = work[rows]
        whose = by["id"].map(repr) + by["who"].map(lambda who: who and f" by {who!r}")
        differ = self._tell_different(said[rows], [by["id"], by["who"]], whose)
        repeated = int((later[rows] & ~differ).sum())
        if repeated:
            log.warning(
                "%s: %s repeated exactly; each is used once",
                *(shown(self.table.path), counted(repeated, "row")),
            )
        return ~later

    def _require_agreement(self, made: pd.DataFrame, said: pd.DataFrame) -> None:
        """Note where the rows of a work's graders call it otherwise, or tell different things of it."""
        ids, files = made["image_id"], made["named"].str.strip()
        first = ids.groupby(files).transform("first")
        for row in made.index[(first != ids) & (files != "")]:
            self.problems.add(
                f"{made['named'][row]!r} is {ids[row]!r} here and {first[row]!r} above; a work has one "
                "name, which the rows of all its graders give",
                row=row,
                column=self.id,
            )
        said = said.drop(columns=[self._tier_column, self.options.score_column], errors="ignore")
        if self._tell_different(said.where(said != ""), [ids], ids.map(repr)).any():
            self.problems.hint(
                "What a grader says of a work, such as a comment, cannot differ among its rows: "
                f"beside {self.options.tier_column} and {self.options.score_column} columns tell "
                "of the work. Take such a column out."
            )

    def _tell_different(
        self, said: pd.DataFrame, by: list[pd.Series[str]], whose: pd.Series[str]
    ) -> pd.Series[bool]:
        """[n] whether a cell of a row differs from the first that is not None of its group; each is noted."""
        rows, found = said.index.to_series(), said.index.to_series() < 0
        for column in said.columns.tolist():
            there = said[column].notna()
            old = said[column].groupby(by).transform("first")
            first = rows.where(there).groupby(by).transform("first")
            differ = there & (said[column] != old)
            found |= differ
            told = (part[differ] for part in (rows, whose, said[column], old, first))
            for row, who, new, before, where in zip(*told, strict=True):
                as_text = ascii if nfc(new) == nfc(before) else repr  # the same to the eye
                self.problems.add(
                    f"{who} has {as_text(new)} here and {as_text(before)} in row {int(where)}",
                    row=row,
                    column=column,
                )
        return found

    def _joined(
        self, made: pd.DataFrame, grades: pd.DataFrame, graders: Sequence[str]
    ) -> pd.DataFrame:
        """One row of each work's rows, with a column of tiers per grader.

        A finer grade is the mean over the rows; any other cell is the first that is not empty.
        """
        of_grading = [own_column(self.grader or ""), own_column(self.options.tier_column)]
        made = made.drop(columns=of_grading, errors="ignore")
        how = {name: "mean" if name == "tier_score" else "first" for name in made}
        works = made.where(made != "").groupby(made["image_id"], sort=False).agg(how)
        for name in graders:
            own = grades[grades["who"] == name].set_index("id")["tier"]
            works[PREFIX + name] = works["image_id"].map(own)
        texts = [name for name in works if name not in ("row", "tier", "tier_score")]
        return works.assign(tier=-1, **works[texts].astype(object).fillna(""))

    def _agree(self, made: pd.DataFrame, graders: Sequence[str]) -> None:
        """Put the graders' consensus where no one decided on the tier."""
        code = {name: i for i, name in enumerate(self.options.tier_names())}
        of_all = np.array([made[PREFIX + name].map(code) for name in graders], dtype=np.float64).T
        common, count = consensus(of_all), np.isfinite(of_all).sum(axis=1)
        decided = bool((made["tier"] >= 0).any())
        made["tier"] = made["tier"].where(made["tier"] >= 0, common)
        if made["tier_score"].isna().all():
            points = np.nansum(len(code) - 1 - of_all, axis=1)
            made["tier_score"] = np.divide(
                points, count, np.full(len(made), np.nan), where=count > 0
            )
        who = zip(graders, np.isfinite(of_all).sum(axis=0).tolist(), strict=True)
        log.info(
            "%s: %s (works graded): %s; %s of %s have two grades and more. %s",
            *(shown(self.table.path), counted(len(graders), "grader")),
            ", ".join(f"{name} ({n:,})" for name, n in who),
            *(f"{(count > 1).sum():,}", counted(len(made), "work")),
            f"A work's tier is that of the column {self.tier!r}, where it is empty the median"
            if decided or not count.any()
            else "A work's tier is the median, halfway between two the worse one",
        )

    def _tell_ungraded(self, made: pd.DataFrame) -> None:
        """Say how many works have no grade."""
        without, of_all = made[made["tier"] < 0], counted(len(made), "work")
        if without.empty:
            return
        first, graded = without.iloc[0], len(made) - len(without)
        named = f"row {first['row']}, {first['image_id']!r}"
        log.warning(
            "%s: %s of %s a grade; %s",
            *(shown(self.table.path), f"{graded:,}" if graded else "none"),
            f"{of_all} {'have' if graded > 1 else 'has'}",
            f"the others (first: {named}) are left out where grades are needed"
            if graded
            else "the columns of grades are empty"
            if self.tier is None
            else f"the column {self.tier!r} is empty",
        )

    def _find_moved(self, made: pd.DataFrame, missing: set[int]) -> None:
        """Find the files that old absolute paths mean; what is missing is told.

        A path is taken by its end only where no other name in the table means the same file.
        """
        lost = made[made["row"].isin(missing)]
        moved = lost["named"].map(self.finder.find_moved).dropna().map(str)
        names = made["named"].map(str.strip).map(nfc)
        meant = names.groupby(made["file"].where(~made.index.isin(moved.index), moved)).nunique()
        sure = moved[moved.map(meant) == 1]
        left = lost.drop(index=sure.index)
        where = shown(self.table.path)
        if len(sure):
            row, named = made.loc[sure.index[0], ["row", "named"]]
            log.warning(
                "%s: %s read by the end of the path, which leads nowhere as a whole "
                "(first: row %s, '%s' is %s)",
                *(where, counted(len(sure), "file name"), row, one_line(named)),
                shown(Path(sure.iloc[0])),
            )
        if len(left):
            some = (
                f"row {row}: '{one_line(named, 100)}'"
                + self.finder.suggest(named).replace(" ", ". ", 1)
                for row, named in zip(left["row"][:_MISSING_SHOWN], left["named"], strict=False)
            )
            log.warning(
                "%s: %d of %s %s not there (%s%s)",
                *(where, len(left), counted(len(made), "image file")),
                *("is" if len(left) == 1 else "are", " ".join(some)),
                " …" if len(left) > _MISSING_SHOWN else "",
            )
        made.loc[sure.index, "file"] = sure
