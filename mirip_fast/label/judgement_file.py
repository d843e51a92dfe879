"""The file of judged pairs, or of grades, while somebody judges: a row per judgement, on the disk at once.

Rows are written with one call at the end of the file and made to survive a power loss (fsync). What a power
loss leaves of half a row is put aside, not lost. ``train --pairs`` or ``embed`` reads the file.
"""

from __future__ import annotations

import csv
import io
import os
import threading
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from mirip_fast.data.pair_files import FIRST, LABEL, SECOND
from mirip_fast.data.spreadsheets import SEPARATORS
from mirip_fast.errors import DataError
from mirip_fast.files import append_durably, fsync_folder, write_bytes
from mirip_fast.runtime import Closing
from mirip_fast.text import shown

#: Columns of a new file. ``kind`` says why the pair was shown, ``predicted`` what the head expected.
COLUMNS = (FIRST, SECOND, LABEL, "time", "judge", "seconds", "kind", "predicted")
_BINARY = getattr(os, "O_BINARY", 0)  # Windows would change ends of lines
_BOM = b"\xef\xbb\xbf"


class JudgementFile(Closing):
    """A file of judged pairs, or of grades, held by this process alone until :meth:`close`.

    An existing file is gone on from in its own columns and separator. A new one gets its header together with
    the first judgement.

    Args:
        path: the file.
        columns: of a new file.
        required: of an existing one; the last of them holds the verdict.
        verdicts: that there are.
        what: the file is, for whoever gives another.

    Attributes:
        path: the file.
        rows: a number that never changes → the row's cells, in the order of the file.
        lock: whoever reads or changes the rows from several threads holds it.
        aside: where rows that were taken back, and broken ends, are kept.
        columns: names in the header.
        mended: what was put right on opening, for the user; None where nothing was.

    Raises:
        DataError: it cannot be written, somebody else has it, or it is another kind of file.
    """

    def __init__(
        self,
        path: Path,
        columns: tuple[str, ...] = COLUMNS,
        *,
        required: Sequence[str] = (FIRST, SECOND, LABEL),
        verdicts: Collection[str] = ("1", "0", "-1"),
        what: str = "judged pairs",
    ):
        self.path, self.lock = path, threading.RLock()
        self.aside = path.with_name(f"{path.stem}.taken-back.csv")
        self.columns, self.rows = columns, dict[int, dict[str, str]]()
        self.mended: str | None = None
        self._required, self._verdicts, self._what = required, verdicts, what
        self._separator, self._head = ",", b""  # the header as written, with what stands before it
        self._bytes: dict[int, bytes] = {}  # each row as written
        self._number = 0
        self._handle = _open(path)
        try:
            _lock(self._handle, path)
            self._read_header()
            self._size = os.fstat(self._handle).st_size
        except BaseException:
            os.close(self._handle)
            raise

    def close(self) -> None:
        """Let others write. An untouched new file goes again."""
        if self._handle < 0:
            return
        if self._size == 0 and _is_same(self._handle, self.path):
            self.path.unlink()
        os.close(self._handle)
        self._handle = -1

    def append(self, *rows: Mapping[str, str], instead_of: Collection[int] = ()) -> list[int]:
        """Write judgements, all or none; they are on the disk when this returns.

        Args:
            rows: column → text; columns that the file has not are left out.
            instead_of: numbers of rows that go in the same step; they are kept in the file ``aside``.

        Returns:
            The number of each row.

        Raises:
            DiskFullError: no room; the file is as it was.
            DataError: the file was taken away or changed by something else.
        """
        with self.lock:
            self._require_ours()
            known = [{name: row.get(name, "") for name in self.columns} for row in rows]
            texts = [self._row([*row.values()]) for row in known]
            head = self._head or _BOM + self._row(self.columns)
            if instead_of:
                self._replace(instead_of, head, texts)
            else:
                self._write(b"".join(texts) if self._size else head + b"".join(texts))
            self._head = head
            return [self._keep(row, text) for row, text in zip(known, texts, strict=True)]

    def take_back(self, *numbers: int) -> None:
        """Remove rows; they are kept in ``aside``.

        They are safe there before they go here, in one step: a kill loses no judgement.

        Raises:
            DataError: there is no such row, or the file was changed by something else.
        """
        with self.lock:
            self._require_ours()
            if not set(numbers) <= set(self.rows):
                raise DataError("That judgement was taken back already")
            self._replace(numbers, self._head, [])

    def _keep(self, row: dict[str, str], text: bytes) -> int:
        self._number += 1
        self.rows[self._number], self._bytes[self._number] = row, text
        return self._number

    def _write(self, text: bytes) -> None:
        append_durably(self._handle, text, self.path)
        if self._size == 0:
            fsync_folder(self.path.parent)
        self._size += len(text)

    def _replace(self, old: Collection[int], head: bytes, texts: Sequence[bytes]) -> None:
        gone = b"".join(self._bytes[number] for number in old)
        self._put_aside(gone)
        if not texts and set(old) == set([*self.rows][-len(old) :]):
            self._cut(self._size - len(gone))
        else:
            left = [text for number, text in self._bytes.items() if number not in old]
            self._rewrite(b"".join([head, *left, *texts]))
        for number in old:
            del self.rows[number], self._bytes[number]

    def _rewrite(self, data: bytes) -> None:
        """Put a new file in the place of this one in one step."""
        opened = self._handle
        if os.name == "nt":  # Windows replaces no open file
            os.close(opened)
        try:
            write_bytes(self.path.resolve(), data)
        finally:
            self._handle = _open(self.path)
            if os.name != "nt":
                os.close(opened)
        _lock(self._handle, self.path)
        self._size = len(data)

    def _row(self, cells: tuple[str, ...] | list[str]) -> bytes:
        text = io.StringIO()
        # csv quotes no lone \r, which ends a row for readers.
        csv.writer(
            text, delimiter=self._separator, lineterminator="\n",
            quoting=csv.QUOTE_ALL if any("\r" in cell for cell in cells) else csv.QUOTE_MINIMAL,
        ).writerow(cells)  # fmt: skip
        return text.getvalue().encode()

    def _read_header(self) -> None:
        data = self.path.read_bytes()
        end = _end_of_last_row(data)
        if end < len(data):
            data = self._mend(data, end)
        records, self._separator = _parse(data, self.columns)
        if not records:
            if data:
                self._cut(0)
            return
        (self._head, names), *rows = records
        self.columns = tuple(name.strip() for name in names)
        missing = [name for name in self._required if name not in self.columns]
        if missing:
            raise DataError(
                f"{shown(self.path)} is no file of {self._what}: it has no column "
                f"{' and no column '.join(map(repr, missing))}. Give another file with --out."
            )
        for text, cells in rows:
            self._keep(dict(zip(self.columns, cells, strict=False)), text)

    def _mend(self, data: bytes, end: int) -> bytes:
        """Complete a last row without an end of line, or put it aside where it is cut short."""
        torn = data[end:]
        if end == 0 or self._is_whole(data, torn):
            head = torn.decode("utf-8", "replace")
            if end == 0 and _known_columns(head, ",", self.columns) == 0:
                return data  # no header of ours: told by whoever reads it
            append_durably(self._handle, b"\n", self.path)
            return data + b"\n"
        self._put_aside(torn + b"\n")
        self._cut(end)
        self.mended = (
            f"{shown(self.path)}: the last line was cut short ({len(torn)} bytes); it was moved to "
            f"{shown(self.aside)}"
        )
        return data[:end]

    def _is_whole(self, data: bytes, torn: bytes) -> bool:
        """Whether a last line without its end says all that a row must: every cell, and a verdict."""
        if torn.count(b'"') % 2:
            return False
        ((_, columns), *_, (_, last)), _ = _parse(data, self.columns)
        names, verdict = [name.strip() for name in columns], self._required[-1]
        whole = len(last) == len(names) and verdict in names
        return whole and last[names.index(verdict)].strip() in self._verdicts

    def _put_aside(self, row: bytes) -> None:
        handle = os.open(self.aside, os.O_WRONLY | os.O_CREAT | os.O_APPEND | _BINARY, 0o666)
        try:
            if os.fstat(handle).st_size == 0:
                row = _BOM + self._row(self.columns) + row
            append_durably(handle, row, self.aside)
        finally:
            os.close(handle)
        fsync_folder(self.aside.parent)

    def _cut(self, size: int) -> None:
        os.ftruncate(self._handle, size)
        os.fsync(self._handle)
        self._size = size

    def _require_ours(self) -> None:
        """Whether the file is still there, and as this process left it."""
        if not _is_same(self._handle, self.path):
            raise DataError(
                f"{shown(self.path)} was moved, removed or replaced while judging. Stop, put it back, "
                "and start again."
            )
        if os.fstat(self._handle).st_size != self._size:
            raise DataError(
                f"{shown(self.path)} was changed by another program while judging. Stop and start again: "
                "it is gone on from as it is."
            )


def _open(path: Path) -> int:
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise DataError(f"{shown(path)} is no file: name one with --out")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | _BINARY, 0o666)
    except OSError as error:
        raise DataError(f"{shown(path)} cannot be written ({error.strerror})") from error


def _lock(handle: int, path: Path) -> None:
    """Hold the file alone; the system lets go of it when this process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows has no such lock on a file that others are to read
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DataError(
            f"{shown(path)} is in use: another `mirip-fast label` writes to it. Close that one, or give "
            "another file with --out: `train --pairs ONE --pairs OTHER` reads both."
        ) from error
    except OSError:
        return  # a network file system without locks


def _is_same(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False


def _end_of_last_row(data: bytes) -> int:
    """Where the last row that has an end of line ends; ends of line inside quotation marks are none."""
    end, inside = 0, False
    for place, byte in enumerate(data):
        if byte == ord('"'):
            inside = not inside
        elif byte == ord("\n") and not inside:
            end = place + 1
    return end


def _known_columns(header: str, separator: str, columns: Collection[str]) -> int:
    return len({name.strip().strip('"') for name in header.split(separator)} & set(columns))


def _parse(data: bytes, columns: Collection[str]) -> tuple[list[tuple[bytes, list[str]]], str]:
    """The rows that are not empty, as written and their cells, the header first; and the separator."""
    text = data.removeprefix(_BOM).decode("utf-8", "surrogateescape")
    header = next((line for line in text.splitlines() if line.strip()), "")
    separator = max(SEPARATORS, key=lambda s: _known_columns(header, s, columns))
    lines = list(io.StringIO(text, newline=""))
    reader = csv.reader(lines, delimiter=separator)
    rows: list[tuple[bytes, list[str]]] = []
    written, start = data[: len(_BOM)] if data.startswith(_BOM) else b"", 0
    for cells in reader:
        written += "".join(lines[start : reader.line_num]).encode("utf-8", "surrogateescape")
        start = reader.line_num
        if any(cell.strip() for cell in cells):
            sane = [c.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for c in cells]
            rows.append((written, sane))
            written = b""
    if rows:  # empty lines at the end
        rows[-1] = (rows[-1][0] + written, rows[-1][1])
    return rows, separator
