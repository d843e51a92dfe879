"""Small files that last: written so that a crash, a kill or a full disk never leaves half of one, and read
only if they are what was written.

A folder with ``files.json`` (a run, a data set) keeps the SHA-256 of its files there.
:func:`write_atomically` keeps that list in step, and :func:`open_file`, through which every such file is
read, compares with it.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import errno
import hashlib
import io
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from mirip_fast.errors import DataError, DiskFullError

#: The list of a folder's files: {"files": {name: [{"bytes", "sha256"}]}}. A name has two contents only while
#: its file is being replaced: a kill leaves one or the other.
LIST_FILE = "files.json"
#: What is listed: files that results depend on; no pictures, no logs, nothing that is appended to.
_LISTED = (".pt", ".safetensors", ".json", ".csv", ".yaml")
_APPENDED = "history.csv"
_MOST_BYTES = 1 << 30  # of a file that is read whole
_MOST_JSON_BYTES = 64 << 20
_LOCK_SECONDS = 5.0

#: How files are opened: a pipe that takes a regular file's place between a check and the open must not block.
NEVER_WAIT = sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOCTTY", "O_BINARY"))

#: Name → the contents that the file may have.
_Contents = dict[str, list[dict[str, Any]]]


def fsync_folder(folder: Path) -> None:
    """Make a rename or a new file in ``folder`` survive a power loss (a no-op where unsupported)."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return  # Windows cannot open folders
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
    Where the folder has a list of its files, it knows the new one, and at every moment the one that is there.

    Raises:
        DiskFullError: the disk is full; the message says how much is free.
        OSError: it cannot be written; ``filename`` is ``path``, or the folder that cannot be made.
        DataError: the folder's list is damaged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    try:
        with partial.open("wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        with _listed(path, partial):
            partial.replace(path)
            fsync_folder(path.parent)
    except BaseException as error:
        # A read-only disk refuses this, too; the first error tells what is wrong.
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if is_disk_full(error):
            raise disk_full(path) from error
        if isinstance(error, OSError) and error.filename == str(partial):
            error.filename = str(path)  # the name that means something to the user
        raise


@contextlib.contextmanager
def _listed(path: Path, partial: Path) -> Iterator[None]:
    """Keep the folder's list right while the block puts ``partial`` in the place of ``path``.

    A file that is replaced is listed with both contents before, and with the new one after. A new file is
    listed after: until then it is read unchecked.
    """
    if path.name == LIST_FILE or not _is_listed(path) or not path.with_name(LIST_FILE).exists():
        yield
        return
    with _locked(path.parent):
        try:
            files = listed_files(path.parent)
        except ValueError as error:
            raise DataError(f"{path} cannot be written: {error}") from error
        new = _content(partial)
        if path.name in files or path.is_file():
            old = files.get(path.name, [])
            if len(old) != 1 and path.is_file():  # only the disk knows which of them is there
                old = [_content(path)]
            _write_list(path.parent, {**files, path.name: [new, *old]})
        yield
        _write_list(path.parent, {**files, path.name: [new]})


def list_files(folder: Path) -> None:
    """Begin a folder's list of files, or begin it anew: of what is there, as it is.

    Raises:
        OSError: a file cannot be read, or the list not be written.
    """
    there = [path for path in sorted(folder.iterdir()) if path.is_file() and _is_listed(path)]
    _write_list(folder, {path.name: [_content(path)] for path in there})


def listed_files(folder: Path) -> _Contents:
    """A folder's list of files; empty where it has none.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged; names it.
    """
    path = folder / LIST_FILE
    try:
        with _open_regular(path, _MOST_JSON_BYTES) as stream:
            files: _Contents = _parse_json(stream.read())["files"]
        for name, contents in files.items():
            for content in contents:
                if type(content["bytes"]) is not int or len(content["sha256"]) != 64:
                    raise ValueError(f"{name}: {content}")
            if not contents:
                raise ValueError(f"{name}: no content")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}, the list of checksums beside it, is damaged ({error}). Put back a good copy, or "
            f"accept the files as they are with `mirip-fast verify --accept {folder}`"
        ) from error
    return files


def remove_files(folder: Path, names: Iterable[str]) -> None:
    """Delete files of a folder, from its list first."""
    gone = set(names)
    if gone and (folder / LIST_FILE).exists():
        with _locked(folder):
            files = listed_files(folder)
            _write_list(folder, {name: files[name] for name in files if name not in gone})
    for name in gone:
        (folder / name).unlink(missing_ok=True)


def _write_list(folder: Path, files: _Contents) -> None:
    write_json(folder / LIST_FILE, {"files": files})


def _is_listed(path: Path) -> bool:
    named = path.suffix in _LISTED and not path.name.startswith(".")
    return named and path.name not in (LIST_FILE, _APPENDED)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One at a time changes a folder's list; goes on without a lock where there are none."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield
        return
    try:
        until = time.monotonic() + _LOCK_SECONDS
        while time.monotonic() < until:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.005)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(handle)


def _content(file: Path | IO[bytes]) -> dict[str, Any]:
    """Size and SHA-256 of a file, as the list has them."""
    if isinstance(file, Path):
        with _open_regular(file, None) as stream:
            return _content(stream)
    sha, size = hashlib.sha256(), 0
    while block := file.read(1 << 20):
        sha.update(block)
        size += len(block)
    return {"bytes": size, "sha256": sha.hexdigest()}


def open_regular(path: Path, flags: int = os.O_RDONLY, most: int | None = None) -> int:
    """A handle of a regular file; never waits, as opening a pipe would.

    Args:
        path: the file.
        flags: as for :func:`os.open`.
        most: bytes that it may have.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is no regular file, or too large.
    """
    handle = os.open(path, flags | NEVER_WAIT, 0o666)
    info = os.fstat(handle)
    why = None
    if not stat.S_ISREG(info.st_mode):
        why = "it is no regular file"
    elif most is not None and info.st_size > most:
        why = f"{format_bytes(info.st_size)} are too many: at most {format_bytes(most)} are read"
    if why is not None:
        os.close(handle)
        raise ValueError(why)
    return handle


def _open_regular(path: Path, most: int | None) -> IO[bytes]:
    return os.fdopen(open_regular(path, most=most), "rb")


def open_file(path: Path, most: int | None = None) -> IO[bytes]:
    """Open a regular file for reading, if its content is the one in the list of its folder.

    Files that are not listed, and those of folders without a list, are opened as they are.

    Args:
        path: the file; never waited for, so that pipes and devices are refused.
        most: bytes that it may have.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is no regular file, too large, or not what was written; says what to do.
    """
    return _open_checked(path, most)[0]


def sha256_of(path: Path) -> str:
    """SHA-256 of a file as hexadecimal digits; raises what :func:`open_file` raises."""
    stream, content = _open_checked(path, None)
    with stream:
        return str((content or _content(stream))["sha256"])


def _open_checked(path: Path, most: int | None) -> tuple[IO[bytes], dict[str, Any] | None]:
    """The open file, and its content where that was compared with the list."""
    while True:
        files = listed_files(path.parent)
        stream = _open_regular(path, most)
        if path.name not in files or path.name == LIST_FILE:
            return stream, None
        right, size = files[path.name], os.fstat(stream.fileno()).st_size
        if any(size == content["bytes"] for content in right):
            found = _content(stream)
            if found in right:
                stream.seek(0)
                return stream, found
        stream.close()
        if listed_files(path.parent) == files:  # else it was replaced between the two looks
            how = "is not the one in" if size else "is empty, unlike the one in"
            raise ValueError(
                f"its content {how} {LIST_FILE} beside it (SHA-256): it was damaged or changed since it was "
                f"written. {_remedy(path)}"
            )


def has_file(path: Path) -> bool:
    """Whether there is something of this name.

    Raises:
        OSError: the folder's list cannot be read.
        ValueError: nothing is there, but it should be; or the list is damaged.
    """
    if os.path.lexists(path):
        return True
    if path.name in listed_files(path.parent):
        raise ValueError(f"it is listed in {LIST_FILE} beside it, but gone. {_remedy(path)}")
    return False


def damaged_files(folder: Path) -> tuple[int, list[str]]:
    """How many files a folder's list has (0: there is none), and what is wrong with them, a sentence each."""
    faults = []
    try:
        names = list(listed_files(folder))
    except (OSError, ValueError) as error:
        return 0, [str(error)]
    for name in names:
        try:
            if has_file(folder / name):
                open_file(folder / name).close()
        except (OSError, ValueError) as error:
            faults.append(f"{folder / name} cannot be read: {error}")
    return len(names), faults


def _remedy(path: Path) -> str:
    return (
        "Put back a good copy, or make it again; if it is meant to be so, "
        f"`mirip-fast verify --accept {path.parent}`"
    )


def read_file(path: Path, most: int = _MOST_BYTES) -> bytes:
    """The content of a file; raises what :func:`open_file` raises."""
    with open_file(path, most) as stream:
        return stream.read()


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


def append_durably(handle: int, data: bytes, path: Path) -> None:
    """Write at the end of an open file: on the disk when this returns, or the file is as it was.

    Args:
        handle: opened with ``O_APPEND``.
        data: what to write.
        path: the file, for the message.

    Raises:
        DiskFullError: there is no room.
    """
    before = os.fstat(handle).st_size
    try:
        while data:
            data = data[os.write(handle, data) :]
        os.fsync(handle)
    except OSError as error:
        os.ftruncate(handle, before)
        if is_disk_full(error):
            raise disk_full(path) from error
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data``, atomically."""
    write_atomically(path, lambda stream: stream.write(data))


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically; names that are not UTF-8 survive (surrogateescape)."""
    write_bytes(path, text.encode("utf-8", "surrogateescape"))


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, most: int = _MOST_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON object written by :func:`write_json`, of which nothing is trusted.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no JSON object, or not what was written; see :func:`open_file`.
    """
    return _parse_json(read_file(path, most))


def _parse_json(data: bytes) -> dict[str, Any]:
    if not data:
        raise ValueError("it is empty")
    try:
        value = json.loads(data.decode("utf-8", "surrogateescape"))
    except RecursionError:
        raise ValueError("it is too deeply nested") from None
    if not isinstance(value, dict):
        raise ValueError("it does not hold a JSON object")
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
        UnicodeEncodeError: a value cannot be written in another encoding than UTF-8.
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


def read_csv(path: Path, columns: Iterable[str] = ()) -> list[dict[str, str]]:
    """Read what :func:`write_csv` wrote with its defaults: a dictionary per row.

    Args:
        path: the file.
        columns: those that it must have at least.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is cut short, lacks a column, or is not what was written; see :func:`open_file`.
    """
    text = read_file(path).decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    if not text:
        raise ValueError("it is empty")
    if not text.endswith("\n"):
        raise ValueError("its last line is cut short")
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        rows = list(reader)
    except csv.Error as error:
        raise ValueError(f"no CSV: {error}") from error
    lacking = [name for name in columns if name not in (reader.fieldnames or ())]
    if lacking:
        raise ValueError(f"it has no column {', '.join(lacking)}")
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise ValueError(f"row {number} has not one value per column")
    return rows


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
