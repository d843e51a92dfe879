"""Writing small files so that a crash, a kill or a full disk never leaves half of one."""

from __future__ import annotations

import codecs
import contextlib
import csv
import errno
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from mirip_fast.errors import DiskFullError


def fsync_folder(folder: Path) -> None:
    """Make a rename or a new file in ``folder`` survive a power loss (a no-op where unsupported)."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return  # Windows can not open folders
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def partial_path(path: Path) -> Path:
    """Where a file is made before it gets its name: ``.<name>.<process>-<random>.partial`` beside it.

    No two calls give the same. A process id alone would not do: processes of one distributed run that
    are on several machines, or in several containers, may have the same one.
    """
    return path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.partial")


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then put it in place in one step.

    Readers see the old file or the new one, never a part. An existing file stays whole whatever fails.
    Several processes and threads may write one path at once: one of their files is there in the end.

    Raises:
        DiskFullError: the disk is full; the message says how much is free.
        OSError: it can not be written; ``filename`` is ``path``, or the folder that can not be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    try:
        with partial.open("wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except BaseException as error:
        # A read-only disk refuses this, too; the first error tells what is wrong.
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if is_disk_full(error):
            raise disk_full(path) from error
        if isinstance(error, OSError) and error.filename == str(partial):
            error.filename = str(path)  # the name that means something to the user
        raise
    fsync_folder(path.parent)


@contextlib.contextmanager
def scratch_folder(out: Path, name: str) -> Iterator[Path]:
    """A new folder inside ``out``, to make files in before they are put there; gone afterwards in any case.

    Args:
        out: the folder of the final files; made if missing.
        name: what is going on, as part of the new folder's name.

    Raises:
        DiskFullError: the disk is full; the message says how much is free.
    """
    out.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{name}-", suffix=".partial", dir=out))
    try:
        yield folder
    except OSError as error:
        if is_disk_full(error):
            raise disk_full(out) from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


_TEMPORARY, _OWNER = "mirip-fast-", ".owner"


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A new folder in the system's place for temporary files; gone afterwards in any case.

    What a killed process could not remove, the next one to make such a folder does: a lock on a file in it,
    which ends with its holder, says whether somebody uses it.
    """
    remove_abandoned_folders()
    folder = Path(tempfile.mkdtemp(prefix=_TEMPORARY))
    owner = None
    try:
        owner = os.open(folder / f"{_OWNER}.new", os.O_RDWR | os.O_CREAT)
        try_lock(owner)
        (folder / f"{_OWNER}.new").rename(folder / _OWNER)  # from now on others look at it
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if owner is not None:
            os.close(owner)


def remove_abandoned_folders() -> None:
    """Remove this user's temporary folders whose owner is dead."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_TEMPORARY}*"):
        with contextlib.suppress(OSError):
            if os.name == "nt" or folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            handle = os.open(folder / _OWNER, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                if try_lock(handle):
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(handle)


def try_lock(handle: int) -> bool:
    """Lock an open file until it is closed; False where another process has, or where there are no locks."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


def move_files(folder: Path, out: Path) -> list[Path]:
    """Put all files of ``folder`` in place in ``out``, each in one step; gives their new paths, sorted."""
    return [path.replace(out / path.name) for path in sorted(folder.iterdir())]


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically; names that are not UTF-8 survive (surrogateescape)."""
    write_atomically(path, lambda stream: stream.write(text.encode("utf-8", "surrogateescape")))


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object written by :func:`write_json`.

    Raises:
        OSError: the file can not be read.
        ValueError: it is no JSON object.
    """
    value = json.loads(path.read_bytes().decode("utf-8", "surrogateescape"))
    if not isinstance(value, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return value


def write_csv(
    path: Path,
    columns: Iterable[str],
    rows: Iterable[Mapping[str, object]],
    *,
    separator: str = ",",
    encoding: str = "utf-8",
) -> None:
    """Write ``rows`` as a CSV file with the given columns, atomically; None becomes empty.

    UTF-8 starts with a byte order mark: spreadsheet programs read Korean names wrongly without one.

    Raises:
        DiskFullError: there is no room.
        UnicodeEncodeError: a value can not be written in another encoding than UTF-8.
    """
    utf8 = codecs.lookup(encoding).name in ("utf-8", "utf-8-sig")

    def write(stream: IO[bytes]) -> None:
        text = io.TextIOWrapper(
            stream,
            "utf-8-sig" if utf8 else encoding,
            "surrogateescape" if utf8 else "strict",
            newline="",
        )
        writer = csv.DictWriter(
            text, list(columns), restval="", extrasaction="ignore", delimiter=separator
        )
        writer.writeheader()
        writer.writerows(rows)
        text.flush()
        text.detach()

    write_atomically(path, write)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a file that :func:`write_csv` wrote with its defaults, also without a byte order mark.

    Raises:
        OSError: the file can not be read.
        ValueError: it is empty, cut short, or no CSV.
    """
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            if reader.fieldnames is None:
                raise ValueError("the file is empty")
            rows: list[dict[str, str]] = []
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(f"line {reader.line_num} has not one value per column")
                rows.append(row)
            return rows
    except csv.Error as error:
        raise ValueError(f"no CSV: {error}") from error


_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def spreadsheet_safe(cell: str) -> str:
    """Text that no spreadsheet takes for a formula: a leading = + - @ gets an apostrophe before it."""
    return f"'{cell}" if cell.startswith(_FORMULA) else cell


def is_disk_full(error: BaseException) -> bool:
    """Whether ``error`` says that there is no room (disk full, quota, file size limit)."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return isinstance(error, OSError) and error.errno in full


def disk_full(path: Path, needed: int | None = None) -> DiskFullError:
    """The error to raise when ``path`` could not be written for lack of room.

    Args:
        path: the file or folder that was being written.
        needed: the bytes wanted, where known.
    """
    folder = next(p for p in (path, *path.parents) if p.exists())
    free = shutil.disk_usage(folder).free
    wanted = f"{format_bytes(needed)} are needed and " if needed else ""
    return DiskFullError(
        f"No room to write {path}: {wanted}{format_bytes(free)} are free (a quota or file size limit "
        "counts too). Nothing that was already saved is lost; free some space and run the same "
        "command again to go on (a training: with --resume latest)."
    )


def format_bytes(count: float) -> str:
    """Bytes for people: ``format_bytes(3_400_000) == '3.2 MiB'``."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
