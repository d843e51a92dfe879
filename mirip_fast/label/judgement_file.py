"""The file of judged pairs while somebody judges: one row per judgement, on the disk before the next pair.

A row is written with one call at the end of the file and made to survive a power loss (fsync). What a power
loss leaves of half a row is put aside, not lost. The file is the one that ``train --pairs`` reads.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path

from mirip_fast.closing import Closing
from mirip_fast.data.csv_reader import SEPARATORS, shown
from mirip_fast.data.pair_files import FIRST, LABEL, SECOND
from mirip_fast.errors import DataError
from mirip_fast.files import disk_full, fsync_folder, is_disk_full

#: Columns of a new file. ``kind`` says why the pair was shown, ``predicted`` what the head expected.
COLUMNS = (FIRST, SECOND, LABEL, "time", "judge", "seconds", "kind", "predicted")
_BINARY = getattr(os, "O_BINARY", 0)  # Windows would change ends of lines
_BOM = b"\xef\xbb\xbf"


class JudgementFile(Closing):
    """A file of judged pairs, held by this process alone until :meth:`close`.

    An existing file is gone on from in its own columns and separator. A new one gets its header together with
    the first judgement.

    Attributes:
        path: the file.
        aside: where rows that were taken back, and broken ends, are kept.
        columns: names in the header.
        mended: what was put right on opening, for the user; None where nothing was.

    Raises:
        DataError: it can not be written, somebody else has it, or it is no file of judged pairs.
    """

    def __init__(self, path: Path):
        self.path = path
        self.aside = path.with_name(f"{path.stem}.taken-back.csv")
        self.columns: tuple[str, ...] = COLUMNS
        self.mended: str | None = None
        self._separator = ","
        self._starts: list[int] = []  # where each row written now begins
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

    @property
    def has_rows(self) -> bool:
        """Whether there is a judgement in it."""
        return self._has_rows or bool(self._starts)

    @property
    def can_take_back(self) -> bool:
        """Whether a judgement written by this process is left."""
        return bool(self._starts)

    def append(self, row: Mapping[str, str]) -> None:
        """Write one judgement; it is on the disk when this returns.

        Args:
            row: column → text; columns that the file has not are left out.

        Raises:
            DiskFullError: no room; the file is as it was.
            DataError: the file was taken away or changed by something else.
        """
        self._require_ours()
        text = self._row([row.get(name, "") for name in self.columns])
        start = self._size
        if start == 0:
            header = _BOM + self._row(self.columns)
            text = header + text
            start = len(header)
        before = self._size
        try:
            _write_all(self._handle, text)
            os.fsync(self._handle)
        except OSError as error:
            os.ftruncate(self._handle, before)
            if is_disk_full(error):
                raise disk_full(self.path) from error
            raise
        if before == 0:
            fsync_folder(self.path.parent)
        self._size += len(text)
        self._starts.append(start)

    def take_back(self) -> None:
        """Remove the last row that this process wrote; it is kept in the file ``aside``.

        The row is safe there before it is cut off here, in one step: a kill loses no judgement.

        Raises:
            DataError: there is none, or the file was changed by something else.
        """
        self._require_ours()
        if not self._starts:
            raise DataError("There is no judgement of this session left to take back")
        start = self._starts[-1]
        self._put_aside(_read_from(self._handle, start))
        self._cut(start)
        self._starts.pop()

    def _row(self, cells: tuple[str, ...] | list[str]) -> bytes:
        text = io.StringIO()
        # csv quotes no lone \r, which ends a row for readers.
        csv.writer(
            text, delimiter=self._separator, lineterminator="\n",
            quoting=csv.QUOTE_ALL if any("\r" in cell for cell in cells) else csv.QUOTE_MINIMAL,
        ).writerow(cells)  # fmt: skip
        return text.getvalue().encode()

    def _read_header(self) -> None:
        data = _read_from(self._handle, 0)
        end = _end_of_last_row(data)
        if end < len(data):
            data = self._mend(data, end)
        rows, self._separator = _parse(data)
        self._has_rows = len(rows) > 1
        if not rows:
            if data:
                self._cut(0)
            return
        self.columns = tuple(name.strip() for name in rows[0])
        missing = [name for name in (FIRST, SECOND, LABEL) if name not in self.columns]
        if missing:
            raise DataError(
                f"{shown(self.path)} is no file of judged pairs: it has no column "
                f"{' and no column '.join(map(repr, missing))}. Give another file with --out."
            )

    def _mend(self, data: bytes, end: int) -> bytes:
        """Complete a last row without an end of line, or put it aside where it is cut short."""
        torn = data[end:]
        if end == 0 or _is_whole(data, torn):
            if end == 0 and _known_columns(torn.decode("utf-8", "replace"), ",") == 0:
                return data  # no header of ours: told by whoever reads it
            _write_all(self._handle, b"\n")
            os.fsync(self._handle)
            return data + b"\n"
        self._put_aside(torn + b"\n")
        self._cut(end)
        self.mended = (
            f"{shown(self.path)}: the last line was cut short ({len(torn)} bytes); it was moved to "
            f"{shown(self.aside)}"
        )
        return data[:end]

    def _put_aside(self, row: bytes) -> None:
        handle = os.open(self.aside, os.O_WRONLY | os.O_CREAT | os.O_APPEND | _BINARY, 0o666)
        try:
            if os.fstat(handle).st_size == 0:
                row = _BOM + self._row(self.columns) + row
            _write_all(handle, row)
            os.fsync(handle)
        except OSError as error:
            if is_disk_full(error):
                raise disk_full(self.aside) from error
            raise
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
        raise DataError(f"{shown(path)} can not be written ({error.strerror})") from error


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


def _read_from(handle: int, start: int) -> bytes:
    os.lseek(handle, start, os.SEEK_SET)  # writing goes to the end wherever this leaves the place
    data = b""
    while piece := os.read(handle, 1 << 20):
        data += piece
    return data


def _write_all(handle: int, data: bytes) -> None:
    while data:
        data = data[os.write(handle, data) :]


def _end_of_last_row(data: bytes) -> int:
    """Where the last row that has an end of line ends; ends of line inside quotation marks are none."""
    end, inside = 0, False
    for place, byte in enumerate(data):
        if byte == ord('"'):
            inside = not inside
        elif byte == ord("\n") and not inside:
            end = place + 1
    return end


def _known_columns(header: str, separator: str) -> int:
    return len({name.strip().strip('"') for name in header.split(separator)} & set(COLUMNS))


def _parse(data: bytes) -> tuple[list[list[str]], str]:
    """The rows that are not empty, the header first, and the separator of the file."""
    text = data.removeprefix(_BOM).decode("utf-8", "replace")
    header = next((line for line in text.splitlines() if line.strip()), "")
    separator = max(SEPARATORS, key=lambda s: _known_columns(header, s))
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    return [cells for cells in rows if any(cell.strip() for cell in cells)], separator


def _is_whole(data: bytes, torn: bytes) -> bool:
    """Whether a last line without its end says all that a row must: every cell, and a verdict."""
    if torn.count(b'"') % 2:
        return False
    (columns, *_, last), _ = _parse(data)
    names = [name.strip() for name in columns]
    whole = len(last) == len(names) and LABEL in names
    return whole and last[names.index(LABEL)].strip() in ("1", "0", "-1")
