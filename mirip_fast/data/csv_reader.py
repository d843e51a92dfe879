"""Reading small CSV files made by people: separators, encodings, and all their faults at once."""

from __future__ import annotations

import codecs
import csv
import difflib
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mirip_fast.data.places import read_place
from mirip_fast.data.remote import address
from mirip_fast.errors import DataError, ImageError

SEPARATORS = (",", ";", "\t", "|")
_SAVE_AS_UTF8 = "save it in the spreadsheet program as «CSV UTF-8»"


@dataclass(frozen=True)
class Table:
    """The cells of a CSV file.

    Attributes:
        path: the file.
        columns: names in the header, without surrounding blanks; a column without a name is "".
        rows: per data row its 1-based line (where it starts) and one cell per column, as written.
    """

    path: Path
    columns: tuple[str, ...]
    rows: list[tuple[int, list[str]]]


class Problems:
    """Collects what is wrong with a file, so that one error can tell it all.

    Each problem becomes a line «file:row, column: text»; past ``limit`` they are only counted.
    """

    def __init__(self, path: Path, limit: int = 20) -> None:
        self._path = shown(path)
        self._limit = limit
        self._lines: list[str] = []
        self._hints: list[str] = []

    def __bool__(self) -> bool:
        return bool(self._lines)

    def add(self, text: str, *, row: int | None = None, column: str | None = None) -> None:
        """Note a problem, with the 1-based line and the column where there is one."""
        where = self._path + ("" if row is None else f":{row}")
        self._lines.append(f"{where}{'' if column is None else f', {column}'}: {text}")

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
        lines = self._lines[: self._limit]
        if len(self._lines) > len(lines):
            lines.append(f"… and {len(self._lines) - len(lines):,} more")
        raise DataError("\n".join(lines + self._hints))


def shown(path: Path) -> str:
    """``path`` as a message should spell it: relative below the working folder, or an address."""
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, OSError):
        return address(path)


def counted(number: int, thing: str) -> str:
    """A number with its noun: ``counted(1, "image") == "1 image"``, else with an s."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def closest(name: str, known: Iterable[str]) -> str | None:
    """The one of ``known`` that ``name`` is probably a misspelling of; upper and lower case are one."""
    folded = {candidate.casefold(): candidate for candidate in known}
    found = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.6)
    return folded[found[0]] if found else None


def read_table(
    path: Path,
    *,
    expected: Sequence[str],
    separator: str | None = None,
    encoding: str = "utf-8",
    encoding_errors: str = "strict",
) -> Table:
    """Read a CSV file with a header.

    Args:
        path: the file.
        expected: column names that may occur; they tell which separator is the right one.
        separator: one character; ``None`` finds it out among , ; tab and |.
        encoding: any name Python knows; ``utf-8`` is read with or without a byte order mark.
        encoding_errors: ``strict``, or ``surrogateescape`` for lists of file names that are no UTF-8.

    Returns:
        The table. Blank lines are left out, short rows are filled with empty cells.

    Raises:
        DataError: the file can not be read, is not text in that encoding, is no CSV, or has no rows.
    """
    text = _decode(path, _read_bytes(path), encoding, encoding_errors)
    if separator is None:
        separator = _find_separator(text, expected)
    elif len(separator) != 1:
        raise DataError(f"--separator {separator!r}: one character is expected, such as , or ;")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows: list[tuple[int, list[str]]] = []
    start = 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                rows.append((start, cells))
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{shown(path)}:{start}: not readable as CSV ({error}). Is a quotation mark open?"
        ) from error
    if not rows:
        raise DataError(
            f"{shown(path)}: empty. The first line names the columns: {_example(expected)}"
        )
    return _check_shape(path, rows, expected)


def _check_shape(path: Path, rows: list[tuple[int, list[str]]], expected: Sequence[str]) -> Table:
    """Split off the header and give every row as many cells as it has columns."""
    (header_row, header), *body = rows
    columns = tuple(name.strip() for name in header)
    problems = Problems(path)
    for name in sorted({name for name in columns if name and columns.count(name) > 1}):
        problems.add(
            f"the column name occurs {columns.count(name)} times", row=header_row, column=name
        )
    for row, cells in body:
        if any(cell.strip() for cell in cells[len(columns) :]):
            problems.add(
                f"{len(cells)} values for {counted(len(columns), 'column')}; a value with the "
                'separator in it needs quotation marks: "…"',
                row=row,
            )
        del cells[len(columns) :]
        cells.extend([""] * (len(columns) - len(cells)))
    if not body:
        problems.add(f"a header and no rows. Add one row per image below {_example(columns)}")
    problems.raise_if_any()
    return Table(path, columns, body)


def _example(columns: Sequence[str]) -> str:
    return ",".join(name for name in columns if name)


def _read_bytes(path: Path) -> bytes:
    try:
        found = read_place(path)
        data = path.read_bytes() if found is None else found[0]
    except ImageError as error:
        raise DataError(f"{shown(path)}: can not be read ({error})") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"{shown(path)}: can not be read ({reason})") from error
    if data.startswith(b"PK\x03\x04"):
        raise DataError(f"{shown(path)}: an Excel workbook or zip file, not CSV; {_SAVE_AS_UTF8}")
    return data


def _decode(path: Path, data: bytes, encoding: str, errors: str) -> str:
    try:
        name = codecs.lookup(encoding).name
    except LookupError as error:
        raise DataError(
            f"--encoding {encoding}: no such encoding; utf-8 and cp949 are common"
        ) from error
    try:
        text = data.decode("utf-8-sig" if name == "utf-8" else name, errors)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{shown(path)}:{line}: not {encoding} text (at byte {error.start} of the file). "
            + _encoding_advice(data, name)
        ) from error
    if "\0" in text:
        raise DataError(
            f"{shown(path)}: holds NUL bytes, so it is no {encoding} text. "
            + _encoding_advice(data, name)
        )
    return text


def _encoding_advice(data: bytes, tried: str) -> str:
    """What to do about a file that is not text in the encoding ``tried``."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return f"It is UTF-16: {_SAVE_AS_UTF8}, or give --encoding utf-16"
    for guess, what in (("utf-8", "UTF-8"), ("cp949", "Korean Windows text (CP949)")):
        if guess == tried or b"\0" in data:
            continue
        try:
            data.decode(guess)
        except UnicodeDecodeError:
            continue
        return f"It reads as {what}: {_SAVE_AS_UTF8}, or give --encoding {guess}"
    return f"Is it a CSV file? If so, {_SAVE_AS_UTF8}, or name its encoding with --encoding"


def _find_separator(text: str, expected: Sequence[str]) -> str:
    """The separator under which the header holds most of the expected names, else most columns."""

    def fit(separator: str) -> tuple[int, int]:
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        try:
            header = next((cells for cells in lines if any(cells)), [])
        except csv.Error:
            return (0, 0)
        return len({name.strip() for name in header} & set(expected)), len(header)

    return max(SEPARATORS, key=fit)


def absolute(path: str | os.PathLike[str]) -> Path:
    """``path`` with ``~`` and the working folder put in; symbolic links stay as they are."""
    return Path(os.path.abspath(Path(path).expanduser()))  # noqa: PTH100 (Path.resolve follows links)
