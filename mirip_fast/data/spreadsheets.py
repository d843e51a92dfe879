"""Reading small tables made by people, CSV files and Excel workbooks: all their faults at once."""

from __future__ import annotations

import codecs
import csv
import datetime as dt
import io
import logging
import math
import os
import re
import unicodedata
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mirip_fast.data.sources import piece_of
from mirip_fast.errors import DataError, ImageError
from mirip_fast.files import read_file
from mirip_fast.text import closest, counted, folded, nfc, shown

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

SEPARATORS = (",", ";", "\t", "|")
_SAVE_AS_UTF8 = "save it in the spreadsheet program as «CSV UTF-8»"
_LISTED = 100  # columns
#: How files begin that are no CSV, whatever their names end with.
_OTHER_KINDS = {
    b"PAR1": "a Parquet file", b"{": "JSON", b"[": "JSON", b"<": "HTML or XML",
}  # fmt: skip
_GUESSES = {"utf-8": "UTF-8", "cp949": "Korean Windows text (CP949)"}
#: The first line with which a file tells Excel its separator.
_SEPARATOR_LINE = re.compile(r'"?sep=(.)"?[^\S\r\n]*(?:\r\n|\r|\n)', re.IGNORECASE)
#: Cells per line or row number.
_Lines = list[tuple[int, list[str]]]
_OLD = b"\xd0\xcf\x11\xe0"
_ZIP = b"PK\x03\x04"
_MOST_XML_BYTES = 256 << 20  # of a workbook, unpacked: a million rows are some 400 MB
_MERGED = re.compile(rb'<(?:\w+:)?mergeCell\s[^>]*?ref="([A-Z]+\d+:[A-Z]+\d+)"')
_DIGITS = re.compile(r"0+(?:\.(0+))?")  # formats such as 00000 and 0.0
_SAVE = "save it in Excel as «Excel Workbook (.xlsx)» or «CSV UTF-8»"


@dataclass(frozen=True)
class Table:
    """The cells of a CSV file, or of a sheet of an Excel workbook.

    Attributes:
        path: the file.
        cells: texts as written, of dtype object. Its index is the 1-based line that a row begins in, its
            columns are the names in the header, composed (NFC), without surrounding blanks.
        sheet: the sheet's name; None of a CSV file.
    """

    path: Path
    cells: pd.DataFrame
    sheet: str | None = None

    @property
    def columns(self) -> list[str]:
        """The names in the header."""
        return self.cells.columns.tolist()

    def texts(self, column: str) -> Iterator[tuple[int, str]]:
        """The line and the text of each cell of a column."""
        return zip(self.cells.index.tolist(), self.cells[column].tolist(), strict=True)

    def problems(self) -> Problems:
        """What collects the faults of this table."""
        return Problems(self.path, sheet=self.sheet)


class Problems:
    """Collects what is wrong with a file, so that one error can tell it all.

    Each problem becomes a line «file:row, column: text», of a workbook «file, sheet 'name', row 2, column:
    text»; past ``limit`` they are only counted. They are told by row, those of no row first.

    Args:
        path: the file.
        limit: how many are told.
        sheet: of a workbook.
        named: what rows are called instead, where they have no number that people know.
    """

    def __init__(
        self,
        path: Path,
        limit: int = 20,
        sheet: str | None = None,
        named: Sequence[str] | None = None,
    ) -> None:
        self._path = shown(path) + ("" if sheet is None else f", sheet {sheet!r}")
        self._row = ":" if sheet is None else ", row "
        self._limit, self._named = limit, named
        self._lines: list[tuple[int, str]] = []
        self._hints: list[str] = []

    def __bool__(self) -> bool:
        return bool(self._lines)

    def add(self, text: str, *, row: int | None = None, column: str | None = None) -> None:
        """Note a problem, with the 1-based line and the column where there is one."""
        where = self._path
        if row is not None and self._named is not None:
            text = f"{self._named[row]}: {text}"
        elif row is not None:
            where += f"{self._row}{row}"
        line = f"{where}{'' if column is None else f', {column}'}: {text}"
        self._lines.append((-1 if row is None else row, line))

    def hint(self, text: str) -> None:
        """Add advice that is printed once, below the problems."""
        if text not in self._hints:
            self._hints.append(text)

    def raise_if_any(self) -> None:
        """Raise one error for everything noted so far.

        Raises:
            DataError: something was noted.
        """
        if not self._lines:
            return
        lines = [line for _, line in sorted(self._lines, key=lambda noted: noted[0])]
        if len(lines) > self._limit:
            lines[self._limit :] = [f"… and {len(lines) - self._limit:,} more"]
        raise DataError("\n".join(lines + self._hints))


def read_table(
    path: Path,
    *,
    expected: Sequence[str],
    separator: str | None = None,
    encoding: str = "utf-8",
    encoding_errors: str = "strict",
    sheet: str | None = None,
) -> Table:
    """Read a CSV file with a header, or a sheet of an Excel workbook.

    Args:
        path: the file.
        expected: column names that may occur; they tell which separator is the right one.
        separator: one character; ``None`` finds it out among , ; tab and |.
        encoding: any name Python knows; ``utf-8`` is read with or without a byte order mark, and
            UTF-16 as well where such a mark says so.
        encoding_errors: ``strict``, or ``surrogateescape`` for lists of file names that are no UTF-8.
        sheet: of a workbook; ``None`` takes the first that is not hidden.

    Returns:
        The table. Blank lines and a first line such as ``sep=;`` are left out, short rows are filled with
        empty cells.

    Raises:
        DataError: the file cannot be read, is not text in that encoding, is no CSV, or has no rows.
    """
    data = _read_bytes(path)
    if _is_workbook(path, data):
        if path.suffix.lower() in (".csv", ".tsv", ".txt"):
            log.warning("%s: an Excel workbook by its content; it is read as one", shown(path))
        name, rows = _read_sheet(path, data, sheet)
        return _check_shape(path, rows, expected, name)
    if sheet is not None:
        log.warning("%s: no Excel workbook, so there is no sheet %r", shown(path), sheet)
    text = _decode(path, data, encoding, encoding_errors)
    start = first = 1
    told = _SEPARATOR_LINE.match(text)
    if told is not None:
        text, start = text[told.end() :], 2
        separator, first = separator or told[1], 2
    if separator is None:
        separator = _find_separator(text, expected)
    elif len(separator) != 1:
        raise DataError(f"--separator {separator!r}: one character is expected, such as , or ;")
    # Not pandas.read_csv: it counts no lines, fills short rows and takes an open quotation mark as it comes.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows = []
    try:
        for cells in reader:
            if any(map(str.strip, cells)):
                rows.append((start, cells))
            start = reader.line_num + first
    except csv.Error as error:
        raise DataError(
            f"{shown(path)}:{start}: not readable as CSV ({error}). Is a quotation mark open?"
        ) from error
    return _check_shape(path, rows, expected)


def _check_shape(
    path: Path,
    rows: _Lines,
    expected: Sequence[str],
    sheet: str | None = None,
) -> Table:
    """Split off the header and give every row as many cells as it has columns with a name."""
    import pandas as pd

    if not rows and sheet is None:
        raise DataError(
            f"{shown(path)}: empty. The first line names the columns: {','.join(expected)}"
        )
    if not rows:
        raise DataError(
            f"{shown(path)}, sheet {sheet!r}: empty. Its first row names the columns: {','.join(expected)}"
        )
    problems = Problems(path, sheet=sheet)
    known = set(map(_key, expected))
    fits = [len({_key(cell) for cell in cells} & known) for _, cells in rows[:30]]
    if not fits[0] and max(fits) > 0:
        row, names = rows[fits.index(max(fits))]
        problems.add(
            f"the names of the columns stand here ({header_text(names)}), below other text. Take out "
            "the rows above: the first row has to name the columns",
            row=row,
        )
        problems.raise_if_any()
    (header_row, header), *body = rows
    columns = [nfc(name.strip()) for name in header]
    width, places = len(columns), [i for i, name in enumerate(columns) if name]
    for name, count in Counter(filter(None, columns)).items():
        if count > 1:
            written = sorted({ascii(raw.strip()) for raw in header if nfc(raw.strip()) == name})
            problems.add(
                f"the column name occurs {count} times"
                + (f", spelled {' and '.join(written)}" if len(written) > 1 else ""),
                row=header_row,
                column=name,
            )
    short, nameless = [], 0
    for row, cells in body:
        if len(cells) > width and any(map(str.strip, cells[width:])):
            problems.add(
                f"{len(cells)} values for {counted(width, 'column')}; a value with the "
                'separator in it needs quotation marks: "…"',
                row=row,
            )
        if len(cells) < width:
            short.append(row)
            cells.extend([""] * (width - len(cells)))
        if len(places) < width:
            nameless += any(c.strip() for c, name in zip(cells, columns, strict=False) if not name)
            cells[:] = [cells[i] for i in places]
        del cells[len(places) :]
    if not body:
        problems.add(
            f"a header and no rows. Add one row per image below {header_text(columns, ',')}"
        )
    problems.raise_if_any()
    if short and sheet is None:
        log.warning(
            "%s: %s fewer values than columns (first: row %d); the rest is taken as empty",
            *(shown(path), f"{counted(len(short), 'row')} {'has' if len(short) == 1 else 'have'}"),
            short[0],
        )
    if nameless:
        log.warning(
            "%s: values in a column without a name are not read (%s)",
            *(shown(path), counted(nameless, "row")),
        )
    lines, texts = zip(*body, strict=True)
    named = [columns[i] for i in places]
    return Table(path, pd.DataFrame(list(texts), list(lines), named, dtype=object), sheet)


def with_known_names(table: Table, names: Sequence[str], required: Sequence[str] = ()) -> Table:
    """The table with columns called by known names where no doubt is left, such as ``Group`` for group.

    A column is taken for a known one that is not there if the names differ only in case, blanks, ``_``,
    ``-``, full-width letters and invisible signs; each is told.

    Raises:
        DataError: several columns could be meant, or one of ``required`` is not there.
    """
    columns = table.columns
    for name in names:
        alike = alike_columns(name, set(columns) - set(names))
        if name in columns or not alike:
            continue
        if len(alike) > 1:
            which = " and ".join(f"'{spelled(other)}'" for other in alike)
            raise DataError(
                f"{shown(table.path)}: columns {which} are both like {name!r}; call the one to be read "
                f"{name}, or take one out"
            )
        log.warning("%s: column '%s' is read as %s", shown(table.path), spelled(alike[0]), name)
        columns[columns.index(alike[0])] = name
    problems = table.problems()
    for name in (name for name in required if name not in columns):
        close = closest(name, set(columns) - set(names))
        hint = f" Is it '{spelled(close)}'? Then call it {name}." if close else ""
        problems.add(f"no column {name!r}. It has: {header_text(columns)}.{hint}")
    problems.raise_if_any()
    return replace(table, cells=table.cells.set_axis(columns, axis=1))


def alike_columns(name: str, columns: Iterable[str]) -> list[str]:
    """The columns whose names differ from ``name`` in no letter, sorted."""
    return sorted(other for other in columns if _key(other) == _key(name))


def misspelled(name: str, columns: Iterable[str]) -> str | None:
    """The first column whose name is one letter off, but not in the first: a plural or a typing error."""
    wanted = _key(name)
    return next((other for other in columns if _one_letter_off(_key(other), wanted)), None)


def _key(name: str) -> str:
    return folded(name).translate(dict.fromkeys(map(ord, "_-."))) if name else ""


def _one_letter_off(one: str, other: str) -> bool:
    """Whether one letter is missing, too many, another, or has changed places with the next."""
    short, long = sorted((one, other), key=len)
    differ = [a != b for a, b in zip(short, long, strict=False)]
    same = differ.index(True) if True in differ else len(short)
    if not same or len(long) - len(short) > 1:  # height is no weight
        return False
    rest, longer = short[same:], long[same:]
    if len(short) < len(long):
        return rest == longer[1:]
    return rest[1:] == longer[1:] or (rest[:2] == longer[1::-1] and rest[2:] == longer[2:])


def spelled(name: str) -> str:
    """A column's name for a message; signs that are invisible or look like Latin letters by their numbers."""
    if not name.isprintable():
        return ascii(name)[1:-1]
    foreign = any(unicodedata.name(c, "").startswith(("CYRILLIC", "GREEK")) for c in name)
    return f"{name} ({ascii(name)[1:-1]})" if foreign else name


def number(text: str) -> float:
    """The finite number that a cell holds; NaN of any other, also of what only Python reads (1_0)."""
    try:
        value = math.nan if "_" in text else float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def header_text(columns: Iterable[str], separator: str = ", ") -> str:
    """The names of a header, for a message; of many the first hundred."""
    names = [spelled(name) for name in columns if name]
    return separator.join([*names[:_LISTED], *["…"] * (len(names) > _LISTED)])


def _read_bytes(path: Path) -> bytes:
    try:
        piece = piece_of(path)
        return piece.read()[0] if piece else read_file(path)
    except (ImageError, ValueError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{shown(path)}: cannot be read ({reason})") from error


def _decode(path: Path, data: bytes, encoding: str, errors: str) -> str:
    try:
        name = codecs.lookup(encoding).name
    except LookupError as error:
        raise DataError(
            f"--encoding {encoding}: no such encoding; utf-8 and cp949 are common"
        ) from error
    if name == "utf-8" and data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        name = "utf-16"  # Excel's «Unicode Text»
    head = data[:1000].lstrip(b"\xef\xbb\xbf \t\r\n")
    for start, kind in _OTHER_KINDS.items():
        if head.startswith(start):
            raise DataError(f"{shown(path)}: {kind}, not CSV; {_SAVE_AS_UTF8}")
    try:
        text = data.decode("utf-8-sig" if name == "utf-8" else name, errors)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        fault = f"{shown(path)}:{line}: not {encoding} text (at byte {error.start} of the file). "
    else:
        if "\0" not in text:
            return text
        fault = f"{shown(path)}: holds NUL bytes, so it is no {encoding} text. "
    for guess, what in _GUESSES.items():
        with suppress(UnicodeDecodeError):
            if guess != name and "\0" not in data.decode(guess):
                fault += f"It reads as {what}: {_SAVE_AS_UTF8}, or give --encoding {guess}"
                raise DataError(fault)
    fault += f"Is it a CSV file? If so, {_SAVE_AS_UTF8}, or name its encoding with --encoding"
    raise DataError(fault)


def _find_separator(text: str, expected: Sequence[str]) -> str:
    """The separator under which the header holds most of the expected names, else most columns."""

    def fit(separator: str) -> tuple[int, int]:
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        try:
            header = next((cells for cells in lines if any(cells)), [])
        except csv.Error:
            return (0, 0)
        return len({_key(name) for name in header} & set(map(_key, expected))), len(header)

    return max(SEPARATORS, key=fit)


def absolute(path: str | os.PathLike[str]) -> Path:
    """``path`` with ``~`` and the working folder put in; symbolic links stay as they are."""
    return Path(os.path.abspath(Path(path).expanduser()))  # noqa: PTH100 (Path.resolve follows links)


# Excel workbooks.


def _is_workbook(path: Path, data: bytes) -> bool:
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


def _read_sheet(path: Path, data: bytes, sheet: str | None) -> tuple[str, _Lines]:
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
            return _read_book(path, data, sheet)
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


def _read_book(path: Path, data: bytes, wanted: str | None) -> tuple[str, _Lines]:
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
