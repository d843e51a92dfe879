"""Finding image files, and reading them without ever waiting on a pipe, a device or a link loop."""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from pathlib import Path
from typing import IO

from mirip_fast.errors import DataError, ImageError

#: File name endings (lower case) that make a file a candidate. HEIC is among them so that such files
#: are told as failures instead of being passed over in silence.
IMAGE_EXTENSIONS: frozenset[str] = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif"}
)
#: Largest file that is read, in bytes.
MAX_FILE_BYTES = 2 << 30
#: A file changed more recently than this is not remembered: it might change again without a new time
#: stamp, as clocks of file systems are coarse (up to 2 s on FAT).
SETTLED_NS = 2_000_000_000

_MAY_BE_PLACE = re.compile(r"\.tar(/|$)|^/[a-z][a-z0-9+.-]+:/", re.IGNORECASE)
#: (size in bytes, modification time in ns): while both stay, the content is taken to be the same.
Stamp = tuple[int, int]


def scan_images(root: Path) -> list[Path]:
    """Every image file under ``root``; see :func:`scan_names`.

    Returns:
        Paths that start with ``root``, in the same order.
    """
    start = os.path.join(root, "")  # noqa: PTH118
    return [Path(start + name) for name in scan_names(root)]


def scan_names(root: Path) -> list[str]:
    """Every image file under ``root``, by name ending, at any depth.

    Links to files count; links to folders are not entered (they may lead in circles). Hidden files
    count.

    Returns:
        Names below ``root``, sorted by their raw bytes, so that the order is the same in every language
        setting.

    Raises:
        DataError: ``root`` is no folder, or a folder below it can not be read.
    """
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist"
        raise DataError(f"{root} {what}; name a folder of images")
    found: list[str] = []
    start = len(os.path.join(root, ""))  # noqa: PTH118
    for folder, _, names in os.walk(root, onerror=_refuse_folder, followlinks=False):
        # splitext and not Path.suffix: what counts as an ending of "...png" differs between Pythons.
        found.extend(
            os.path.join(folder, name)[start:]  # noqa: PTH118 - a Path for each of many is slow
            for name in names
            if os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS  # noqa: PTH122
        )
    found.sort(key=os.fsencode)
    return found


def _refuse_folder(error: OSError) -> None:
    raise DataError(
        f"The folder {error.filename} can not be read ({error.strerror}); "
        "give access to it or move it out of the image folder"
    ) from error


def open_image_file(path: Path, *, max_bytes: int | None = MAX_FILE_BYTES) -> IO[bytes]:
    """Open a regular file for reading; never waits on a pipe, never touches a device.

    Args:
        path: the file, or a link to it.
        max_bytes: the largest size that is let through; None for any.

    Raises:
        ImageError: it is missing, empty, too big, no regular file, or may not be read.
    """
    # A pipe that takes a regular file's place between the two checks must not block the open either.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        _check_status(path.stat(), max_bytes)
        handle = os.open(path, flags | getattr(os, "O_NOCTTY", 0))
    except (OSError, ValueError) as error:
        raise ImageError(_why_not_opened(path, error)) from error
    stream = os.fdopen(handle, "rb")
    try:
        _check_status(os.fstat(handle), max_bytes)
    except ImageError:
        stream.close()
        raise
    return stream


def read_image_file(path: Path) -> tuple[bytes, os.stat_result]:
    """The whole content of an image file, and the file's status at that moment.

    Raises:
        ImageError: see :func:`open_image_file`; or the file changed while it was read.
    """
    with open_image_file(path) as stream:
        before = os.fstat(stream.fileno())
        try:
            data = stream.read(before.st_size + 1)
        except (OSError, MemoryError) as error:
            raise ImageError(_why_not_opened(path, error)) from error
        after = os.fstat(stream.fileno())
    if len(data) != after.st_size or after.st_mtime_ns != before.st_mtime_ns:
        raise ImageError("the file changed while it was being read")
    return data, after


def stamp_of(status: os.stat_result) -> Stamp:
    """What a file's content is remembered by."""
    return status.st_size, status.st_mtime_ns


def settled_stamp(status: os.stat_result, read_ns: int) -> Stamp | None:
    """The stamp to remember a file by; None where it is too young for that.

    Args:
        status: of the file, when it had been read.
        read_ns: the clock (``time.time_ns()``) before it was read.
    """
    return stamp_of(status) if read_ns - status.st_mtime_ns > SETTLED_NS else None


def read_image_bytes(path: Path) -> bytes:
    """The whole content of an image: of a file, of a tar's member, or behind an address.

    Raises:
        ImageError: see :func:`read_image_file`.
    """
    return read_image(path)[0]


def may_be_place(path: Path | str) -> bool:
    """Whether a path may lead into a tar or to an address; of nearly every file one look tells that not."""
    return _MAY_BE_PLACE.search(str(path)) is not None


def read_image(path: Path) -> tuple[bytes, Stamp | None]:
    """The whole content of an image, and what to remember its hash by; see :func:`read_image_bytes`.

    Raises:
        ImageError: see :func:`read_image_file`.
    """
    if may_be_place(path):
        from mirip_fast.data.places import read_place  # which is built on this module

        found = read_place(path)
        if found is not None:
            return found
    read_ns = time.time_ns()
    data, status = read_image_file(path)
    return data, settled_stamp(status, read_ns)


def _check_status(status: os.stat_result, max_bytes: int | None) -> None:
    if not stat.S_ISREG(status.st_mode):
        kinds = {
            stat.S_IFDIR: "a folder",
            stat.S_IFIFO: "a named pipe",
            stat.S_IFSOCK: "a socket",
            stat.S_IFCHR: "a device",
            stat.S_IFBLK: "a device",
        }
        kind = kinds.get(stat.S_IFMT(status.st_mode), "something else")
        raise ImageError(f"not a regular file but {kind}")
    if status.st_size == 0:
        raise ImageError("the file is empty")
    if max_bytes is not None and status.st_size > max_bytes:
        raise ImageError(f"{status.st_size} bytes is over the limit of {max_bytes} bytes")


def _why_not_opened(path: Path, error: BaseException) -> str:
    code = error.errno if isinstance(error, OSError) else None
    if isinstance(error, MemoryError):
        return "the file is too big for the memory one image may take"
    if code == errno.ELOOP:
        return "a link that leads back to itself"
    if code == errno.ENOENT:
        try:
            return one_line(f"a link to {path.readlink()}, which does not exist")
        except OSError:
            return "the file does not exist"
    if code in (errno.EACCES, errno.EPERM):
        return "no permission to read the file"
    return one_line((error.strerror or "") if isinstance(error, OSError) else str(error))


def one_line(text: str, limit: int = 300) -> str:
    """``text`` as one line without control characters, at most ``limit`` characters long."""
    joined = " ".join(text.split())
    safe = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in joined)
    return safe if len(safe) <= limit else safe[: limit - 1] + "…"
