"""Reading a sheet of an Excel workbook as the rows that a CSV file would have."""

from __future__ import annotations

import datetime as dt
import io
import logging
import re
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mirip_fast.data.csv_reader import Problems
from mirip_fast.errors import DataError
from mirip_fast.text import closest, counted, folded, shown

log = logging.getLogger(__name__)

#: Cells per row number; a cell is the text that a CSV file would have.
Rows = list[tuple[int, list[str]]]

_OLD = b"\xd0\xcf\x11\xe0"
_ZIP = b"PK\x03\x04"
_MOST_XML_BYTES = 256 << 20  # of a workbook, unpacked: a million rows are some 400 MB
_MERGED = re.compile(rb'<(?:\w+:)?mergeCell\s[^>]*?ref="([A-Z]+\d+:[A-Z]+\d+)"')
_DIGITS = re.compile(r"0+(?:\.(0+))?")  # formats such as 00000 and 0.0
_SAVE = "save it in Excel as «Excel Workbook (.xlsx)» or «CSV UTF-8»"


def is_workbook(path: Path, data: bytes) -> bool:
    """Whether a file is an Excel workbook by its content.

    Raises:
        DataError: it is a table of another program, an older Excel's, or protected by a password.
    """
    name = shown(path)
    if path.name.startswith("~$"):
        raise DataError(
            f"{name}: the mark that Excel leaves while {path.name[2:]} is open; give that file's name"
        )
    if data.startswith(_OLD):
        if "EncryptedPackage".encode("utf-16-le") in data:
            raise DataError(
                f"{name}: protected by a password; take it off in Excel and save the file"
            )
        raise DataError(f"{name}: a workbook of an older Excel (.xls); {_SAVE}")
    if not data.startswith(_ZIP):
        return False
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as parts:
            sizes = {part.filename: part.file_size for part in parts.infolist()}
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise DataError(f"{name}: a damaged Excel workbook or zip file ({error})") from error
    if "xl/workbook.xml" not in sizes:
        kind = "a binary workbook (.xlsb)" if "xl/workbook.bin" in sizes else "a zip file"
        kind = "an OpenDocument file (.ods)" if "content.xml" in sizes else kind
        raise DataError(f"{name}: {kind}, neither CSV nor an Excel workbook; {_SAVE}")
    total = sum(size for part, size in sizes.items() if part.endswith((".xml", ".rels", ".vml")))
    if total > _MOST_XML_BYTES:
        raise DataError(
            f"{name}: its tables take {total / 2**20:,.0f} MiB unpacked, and {_MOST_XML_BYTES >> 20} are the "
            "most; take out what is not needed, or save the sheet as «CSV UTF-8»"
        )
    return True


def read_sheet(path: Path, data: bytes, sheet: str | None) -> tuple[str, Rows]:
    """Read a sheet of an Excel workbook.

    Cells become what Excel would write into a CSV file, but for dates, which are 2026-11-28, and numbers,
    which keep all their digits (those of formats like ``00000`` and ``0.0`` have the zeros that are seen). A
    merged cell's value stands in all its cells below the header.

    Args:
        path: the file, for messages.
        data: its content.
        sheet: name of a sheet; None takes the first that is not hidden.

    Returns:
        The sheet's name, and its rows that have any text, with their numbers in it.

    Raises:
        DataError: it cannot be read, has no such sheet, or has formulas without a value.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of styles and extensions that are of no concern
            return _read(path, data, sheet)
    except DataError:
        raise
    except Exception as error:  # openpyxl raises whatever a damaged part makes it stumble over
        first: BaseException = error
        while first.__context__ is not None:
            first = first.__context__
        why = " ".join(f"{type(first).__name__}: {first}".split())[:200]
        raise DataError(
            f"{shown(path)}: a damaged Excel workbook ({why}); open it in Excel, let it be repaired, save it"
        ) from error


def _read(path: Path, data: bytes, wanted: str | None) -> tuple[str, Rows]:
    import openpyxl

    book = openpyxl.load_workbook(io.BytesIO(data), read_only=True, keep_links=False)
    sheet = book[
        _pick(path, {s.title: s.sheet_state != "visible" for s in book.worksheets}, wanted)
    ]
    rows, formulas, _ = _cells(sheet)
    if formulas:
        values = openpyxl.load_workbook(
            io.BytesIO(data), read_only=True, keep_links=False, data_only=True
        )
        rows, _, without = _cells(values[sheet.title])
        # A formula that no program has computed has no value at all, one that gives "" is a text.
        problems = Problems(path, sheet=sheet.title)
        header = rows[min(rows)] if rows else []
        for row, column in sorted(formulas & without):
            name = header[column] if column < len(header) else ""
            problems.add(
                "a formula whose value is not in the file; open the workbook in Excel and save it",
                row=row,
                column=name or openpyxl.utils.get_column_letter(column + 1),
            )
        problems.raise_if_any()
    with zipfile.ZipFile(io.BytesIO(data)) as parts, parts.open(sheet._worksheet_path) as part:
        tail = part.read()
    _fill(path, sheet.title, rows, (ref.decode() for ref in _MERGED.findall(tail)))
    return sheet.title, [
        (row, cells) for row, cells in rows.items() if any(c.strip() for c in cells)
    ]


def _pick(path: Path, hidden: dict[str, bool], wanted: str | None) -> str:
    """The sheet to read; the visible ones that are not read are told."""
    if wanted is not None:
        found = [name for name in hidden if name == wanted] or [
            name for name in hidden if folded(name) == folded(wanted)
        ]
        if found:
            return found[0]
        close = closest(wanted, hidden)
        raise DataError(
            f"{shown(path)}: no sheet {wanted!r} (--sheet). It has: {', '.join(map(repr, hidden))}."
            + (f" Did you mean {close!r}?" if close else "")
        )
    visible = [name for name, is_hidden in hidden.items() if not is_hidden]
    if not visible:
        raise DataError(
            f"{shown(path)}: no sheet that is not hidden. Hidden are: {', '.join(map(repr, hidden))}. "
            "Name one with --sheet"
        )
    if len(hidden) > 1:
        others = [
            repr(name) + (" (hidden)" if is_hidden else "")
            for name, is_hidden in hidden.items()
            if name != visible[0]
        ]
        log.warning(
            "%s: the sheet %r is read; not read: %s (--sheet reads another)",
            *(shown(path), visible[0], ", ".join(others)),
        )
    return visible[0]


def _cells(sheet: Any) -> tuple[dict[int, list[str]], set[tuple[int, int]], set[tuple[int, int]]]:
    """The texts of a sheet by row; where (row, column from 0) it has formulas, and cells without value."""
    sheet.reset_dimensions()  # what a file says of its size is not to be trusted
    rows: dict[int, list[str]] = {}
    formulas, without = set[tuple[int, int]](), set[tuple[int, int]]()
    for number, row in enumerate(sheet.iter_rows(), 1):
        for column, cell in enumerate(row):
            if cell.data_type == "f":
                formulas.add((number, column))
            elif cell.value is None and cell.data_type == "n":
                without.add((number, column))
        texts = ["" if cell.value is None else _text(cell) for cell in row]
        if any(texts):
            rows[number] = texts
    return rows, formulas, without


def _text(cell: Any) -> str:
    value = cell.value
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, int | float):
        shape = _DIGITS.fullmatch(cell.number_format)
        if shape:
            decimals = len(shape[1] or "")
            digits = f"{value:0{len(shape[0])}.{decimals}f}"
            if float(digits) == value:
                return digits
        return str(value) if isinstance(value, int) else format(value, ".15g")
    if isinstance(value, dt.datetime):
        return str(value.date() if value.time() == dt.time() else value)
    if isinstance(value, str) and "_x" in value:
        from openpyxl.utils.escape import unescape

        return str(unescape(value))
    return str(value)


def _fill(path: Path, sheet: str, rows: dict[int, list[str]], merged: Iterable[str]) -> None:
    """Put the values of merged cells below the header into all cells that were merged."""
    from openpyxl.utils import range_boundaries

    header = min(rows, default=0)
    width = max(map(len, rows.values()), default=0)
    last, filled, areas = max(rows, default=0), 0, 0
    for ref in merged:
        left, top, right, bottom = (n or 0 for n in range_boundaries(ref))
        if top <= header or top not in rows or left > len(rows[top]):
            continue
        value = rows[top][left - 1]
        areas += bool(value)
        for number in range(top, min(bottom, last) + 1):
            cells = rows.setdefault(number, [])
            cells.extend([""] * (min(right, width) - len(cells)))
            cells[left - 1 : right] = [value] * (min(right, width) - left + 1)
            filled += min(right, width) - left + 1
        if filled > width * (last - header):  # merged cells do not overlap
            raise DataError(f"{shown(path)}: a damaged Excel workbook: merged cells overlap")
    if areas:
        log.warning(
            "%s, sheet %r: the value of %s is read for every row that they span",
            *(shown(path), sheet, counted(areas, "merged cell")),
        )
