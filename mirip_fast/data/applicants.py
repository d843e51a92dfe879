"""Whose work an image is: an applicant's name from any column (``--by``) or folder, and applicants' grades.

An applicant's works are one group: they stay in one split and in one fold. Grades may be per applicant, in a
file of their own (``--applicants``) or as the same grade in every row of an applicant.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mirip_fast.data.splits import join_units
from mirip_fast.data.spreadsheets import alike_columns, number, read_table, with_known_names
from mirip_fast.data.table import (
    COLUMNS,
    Manifest,
    given_name,
    own_column,
    own_columns,
    tier_column,
    tier_reader,
)
from mirip_fast.errors import ConfigError, DataError
from mirip_fast.text import closest, counted, folded, nfc, shown

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

#: ``--by folder``: the first folder below the source; ``folder/folder`` the first two.
FOLDER = "folder"
#: The user's column that is taken for applicants' names without ``--by``, where there is no group column;
#: and the one with an applicant's grade, where each work has one of its own.
USUAL, GRADE, SCORE = "applicant", "applicant_tier", "applicant_tier_score"
_NAMED = 5
#: Share of the applicants with several works whose works' grades have to agree to count as the applicants'.
_NEARLY_EVERY = 0.9


def names_some(names: Sequence[str]) -> str:
    """The first five names, and how many more."""
    more = f", and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def with_applicants(manifest: Manifest) -> Manifest:
    """The images with what ``options.by`` and ``options.applicants`` say.

    The applicants' names stand in the column that :func:`applicants_of` reads; with grades they join the
    groups, and works without a grade of their own get their applicant's.

    Raises:
        ConfigError: ``--applicants`` without ``--by``.
        DataError: there is no such column, or the file of grades is faulty.
    """
    options, table = manifest.options, manifest.table
    if options.by is None:
        if options.applicants is not None:
            raise ConfigError(
                f"--applicants {options.applicants} has a row per applicant: name the column that says whose "
                "work each is with --by"
            )
        if (
            not options.with_grades
            or USUAL not in own_columns(table)
            or table["group"].notna().any()
        ):
            return manifest
        log.info("The works of one applicant stay in one split (column %r)", USUAL)
        return replace(manifest, table=_with(table, group=_or_no_name(table[USUAL].tolist())))
    manifest = with_column(manifest)
    names = applicants_of(manifest)
    if not any(names):
        by = manifest.options.by
        raise DataError(f"--by {by}: {shown(manifest.source)} names no applicant in it")
    spelled: dict[str, str] = {}
    for one in filter(None, dict.fromkeys(names)):
        other = spelled.setdefault(folded(one), one)
        if other != one:
            log.warning("Two applicants whose names are nearly the same: %r and %r", other, one)
    if not options.with_grades:
        return manifest
    if options.applicants is not None:
        manifest = _with_grades(manifest, names)
    groups = manifest.groups
    units = join_units(len(names), [groups, names]).tolist()
    first: dict[int, str] = {}
    for unit, name, group in zip(units, names, groups, strict=True):
        if name or group:
            first.setdefault(unit, str(name or group))
    return replace(manifest, table=_with(manifest.table, group=[first.get(unit) for unit in units]))


def with_column(manifest: Manifest) -> Manifest:
    """The images with the column that ``options.by`` names, of folders where there is none.

    Raises:
        DataError: there is no such column.
    """
    options, table, by = manifest.options, manifest.table, str(manifest.options.by)
    own = {given_name(c): c for c in table.columns if c not in COLUMNS}
    if by in own or (by == options.group_column and any(manifest.groups)):
        return manifest
    if set(by.split("/")) == {FOLDER}:
        return replace(manifest, table=_with(table, **{by: _folders(manifest)}))
    alike = alike_columns(by, own)
    if len(alike) != 1:
        close = closest(by, own)
        raise DataError(
            f"--by {by}: {shown(manifest.source)} has no such column; it has "
            f"{', '.join(own) or 'no further columns'}."
            + (f" Did you mean {close}?" if close else "")
            + (_tables_in(manifest.source) or " A folder per applicant: --by folder")
        )
    log.warning("--by %s: the column %r is read", by, alike[0])
    return replace(manifest, options=replace(options, by=alike[0]))


def _tables_in(folder: Path) -> str:
    """What to type where the one table in a folder of pictures was not read, as it has another name."""
    tables = [
        p
        for p in (folder.iterdir() if folder.is_dir() else ())
        if p.suffix.lower() in (".xlsx", ".csv") and not p.name.startswith(("~$", "."))
    ]
    return (
        f" The table in it is read where it is named: {shown(tables[0])}"
        if len(tables) == 1
        else ""
    )


def applicants_of(manifest: Manifest) -> list[str | None]:
    """[n] whose work each is by ``options.by``; None where that is not known."""
    by, table = manifest.options.by, manifest.table
    if by is None:
        return [None] * len(table)
    column = own_column(by)
    if column not in table and by == manifest.options.group_column:
        return manifest.groups
    return _or_no_name(table[column].tolist())


def sets_of(manifest: Manifest) -> NDArray[np.int64] | None:
    """[n] number of the set that is graded together; None where works are graded one by one.

    They are together where ``options.by`` names applicants, one of whom has several works, and all works of
    each have the same grade.
    """
    names = applicants_of(manifest)
    units = join_units(len(names), [names])
    grades = zip(manifest.tier_codes.tolist(), manifest.tier_scores, strict=True)
    several = len(units) and units.max() + 1 < len(units)
    if not several or len(set(zip(units.tolist(), grades, strict=True))) > units.max() + 1:
        return None
    return units


def applicant_grades(manifest: Manifest) -> dict[str, float]:
    """Applicant → tier, 0 = best, or minus the finer grade where there are no tiers.

    Of the column ``applicant_tier`` or ``applicant_tier_score``; else, where the works of nearly every
    applicant have one grade in common, that. Works that were graded one by one say no grade of an applicant,
    not even of those whose works happen to have got the same.
    """
    names, table = applicants_of(manifest), manifest.table
    grades: Sequence[float | None] = [None if c < 0 else c for c in manifest.tier_codes.tolist()]
    of_works = GRADE not in table and SCORE not in table
    if GRADE in table:
        code = tier_reader(manifest.tiers)
        grades = [code(cell or "") for cell in table[GRADE]]
    elif SCORE in table or all(grade is None for grade in grades):
        cells = table[SCORE if SCORE in table else "tier_score"]
        numbers = [_number(str(cell)) for cell in cells]
        grades = [None if found is None else -found for found in numbers]
    found: dict[str, list[float]] = {}
    for name, grade in zip(names, grades, strict=True):
        if name is not None and grade is not None:
            found.setdefault(name, []).append(grade)
    alike = {name: own[0] for name, own in found.items() if len(set(own)) == 1}
    several = [name for name, own in found.items() if len(own) > 1]
    if of_works and sum(name in alike for name in several) < _NEARLY_EVERY * len(several):
        return {}
    return alike


def _or_no_name(cells: Sequence[str | None]) -> list[str | None]:
    return [nfc(str(cell).strip()) or None if cell is not None else None for cell in cells]


def _with(table: pd.DataFrame, **columns: Sequence[str | None]) -> pd.DataFrame:
    import pandas as pd

    return table.assign(**{c: pd.Series(list(v), dtype=object) for c, v in columns.items()})


def _folders(manifest: Manifest) -> list[str | None]:
    """[n] the first folders below the source, of the depth that ``--by`` says; None for works above them."""
    depth = str(manifest.options.by).count("/") + 1
    parts = [
        Path(os.path.relpath(file, manifest.root)).parts[:-1] for file in manifest.table["file"]
    ]
    parts = [p[1:] if p[:1] == ("images",) else p for p in parts]
    deeper = [p for p in parts if len(p) > depth]
    if deeper:
        log.warning(
            "--by %s: %s in folders further down (first: %s, read as a work of %s). If those are the "
            "applicants: --by %s",
            *(
                manifest.options.by,
                f"{counted(len(deeper), 'work')} lie{'s' if len(deeper) == 1 else ''}",
            ),
            *("/".join(deeper[0]), "/".join(deeper[0][:depth])),
            "/".join([FOLDER] * (depth + 1)),
        )
    return [nfc("/".join(p[:depth])) if len(p) >= depth else None for p in parts]


def _with_grades(manifest: Manifest, names: Sequence[str | None]) -> Manifest:
    """The images with the grades of the file ``options.applicants``."""
    options, by = manifest.options, str(manifest.options.by)
    path = Path(str(options.applicants)).expanduser()
    wanted = (by, options.tier_column)
    table = read_table(
        path, expected=(*wanted, options.score_column),
        separator=options.separator, encoding=options.encoding,
    )  # fmt: skip
    table = with_known_names(table, (*wanted, options.score_column))
    there = table.columns
    numbers = options.tier_column not in there and options.score_column in there
    if numbers:
        wanted = (by, options.score_column)
    table = with_known_names(table, wanted, required=wanted)
    problems = table.problems()
    code = _number if numbers else tier_reader(manifest.tiers)
    grades: dict[str, float | None] = {}
    for row, *cells in table.cells[[*wanted]].itertuples():
        name, text = nfc(cells[0].strip()), cells[1].strip()
        tier = code(text) if text else None
        if text and tier is None:
            problems.add(
                f"{text!r} is no number (decimals are written with a point)"
                if numbers
                else f"unknown tier {text!r}; known are {', '.join(manifest.tiers)} (others: "
                "--tiers, the best first)",
                row=row, column=wanted[1],
            )  # fmt: skip
        elif not name:
            problems.add("empty; every row names an applicant", row=row, column=by)
        elif grades.setdefault(name, tier) != tier:
            problems.add(f"{name!r} has another grade in a row above", row=row, column=wanted[1])
    problems.raise_if_any()
    known = {name for name in names if name}
    lost, without = (
        [n for n in grades if n not in known],
        sorted(known - {n for n in grades if grades[n] is not None}),
    )
    if not known & {*grades}:
        raise DataError(
            f"{shown(path)}: none of {counted(len(grades), 'applicant')} (first: {next(iter(grades))}) has a "
            f"work in {shown(manifest.source)}, whose column {by!r} has {names_some(sorted(known))}"
        )
    for some, why in ((lost, "without a work"), (without, "without a grade")):
        if some:
            log.warning(
                "%s: %s %s: %s", shown(path), counted(len(some), "applicant"), why, names_some(some)
            )
    found = [None if name is None else grades.get(name) for name in names]
    codes = [None if grade is None or numbers else int(grade) for grade in found]
    if manifest.table[["tier", "tier_score"]].notna().any(axis=None):
        texts = [None if g is None else manifest.tiers[int(g)] for g in codes]
        column = (
            {SCORE: [None if g is None else str(g) for g in found]} if numbers else {GRADE: texts}
        )
        log.info(
            "Works have grades of their own: those of the applicants choose how works make a portfolio"
        )
        return replace(manifest, table=_with(manifest.table, **column))
    if numbers:
        score = np.array([np.nan if grade is None else grade for grade in found])
        return replace(manifest, table=manifest.table.assign(tier_score=score))
    return replace(manifest, table=manifest.table.assign(tier=tier_column(codes, manifest.tiers)))


def _number(text: str) -> float | None:
    found = number(text)
    return None if np.isnan(found) else found
