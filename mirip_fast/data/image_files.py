"""Finding image files, and reading them without ever waiting on a pipe, a device or a link loop."""

from __future__ import annotations

import errno
import logging
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO

from mirip_fast.data.formats import EXTRAS, KINDS, can_read
from mirip_fast.errors import DataError, ImageError
from mirip_fast.files import NEVER_WAIT
from mirip_fast.text import counted

log = logging.getLogger(__name__)

#: File name endings (lower case) of pictures. Those of a kind that needs a package which is not installed
#: are passed over and counted, others never. Of other files, the first bytes decide.
IMAGE_EXTENSIONS: frozenset[str] = frozenset(
    {
        ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".jfi", ".pjpeg", ".pjp", ".mpo", ".png", ".apng",
        ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", *KINDS,
    }
)  # fmt: skip
#: Endings of files that are not opened to see whether they are pictures.
UNOPENED: frozenset[str] = frozenset(
    {
        # What lies beside each picture: on a network drive, opening them all would take minutes.
        ".txt", ".caption", ".json", ".csv", ".tsv", ".xml", ".xmp", ".aae", ".cls", ".npy", ".npz", ".pt",
        # Raw files of many kinds and stills of films begin like pictures, but hold small previews.
        ".raw", ".thm",
        # Copies of a picture that programs keep, or have not finished.
        ".bak", ".old", ".orig", ".tmp", ".part", ".partial",
        ".crdownload", ".download",
    }
)  # fmt: skip
_BESIDE_RAW = (".jpg", ".jpeg", ".heic", ".hif")  # what a camera keeps of the same shot
#: Largest file that is read, in bytes.
MAX_FILE_BYTES = 2 << 30
#: A file changed more recently than this is not remembered: it might change again without a new time
#: stamp, as clocks of file systems are coarse (up to 2 s on FAT).
SETTLED_NS = 2_000_000_000

#: Names that systems give to their own files and folders (lower case); a leading dot is seen to elsewhere.
_SYSTEM: frozenset[str] = frozenset(
    {
        "@eadir", "@recycle", "@recycler", "@sharebin", "@tmp", "#recycle", "#snapshot", "~snapshot",
        "__macosx", "temporary items", "network trash folder", "thevolumesettingsfolder", "icon\r",
        "$recycle.bin", "recycler", "recycled", "system volume information", "lost+found", "found.000",
        "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "_vti_cnf", "_vti_pvt",
        "__pycache__", "node_modules", "trashbox", "lost.dir", "@recently-snapshot", "dfsrprivate",
    }
)  # fmt: skip
_ENDING = re.compile(r"\.[\w~+-]{1,12}")
_KINDS = 8  # named in a line

#: How many bytes of a file :func:`is_picture` needs.
HEAD_BYTES = 32
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_BMP_HEADERS = tuple(size.to_bytes(4, "little") for size in (12, 16, 40, 52, 56, 64, 108, 124))
#: (size in bytes, modification time in ns): while both stay, the content is taken to be the same.
Stamp = tuple[int, int]


def scan_images(root: Path) -> list[Path]:
    """Every image file under ``root``; see :func:`scan_folder`. What is passed over is told.

    Returns:
        Paths that start with ``root``, in the same order.
    """
    pictures, _, passed = scan_folder(root)
    tell_passed_over(str(root), passed)
    start = os.path.join(root, "")  # noqa: PTH118
    return [Path(start + name) for name in pictures]


def scan_folder(root: Path) -> tuple[list[str], list[str], Counter[str]]:
    """Every image file under ``root``, at any depth: by its ending, else by its first bytes.

    Links to files and to folders count, but no folder is read twice, nor one that ``root`` lies in. Hidden
    and system files and folders are left out (:func:`hidden_part`); ``root`` itself may lie in one.

    Raises:
        DataError: ``root`` is no folder, or a folder below it cannot be read.

    Returns:
        Names below ``root`` of image files and of tars, sorted by their raw bytes, the same in every language
        setting; and how many files of each kind were left out, see :func:`passed_over`.
    """
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist"
        raise DataError(f"{root} {what}; name a folder of images")
    pictures, tars, passed = list[str](), list[str](), Counter[str]()
    start = len(os.path.join(root, ""))  # noqa: PTH118
    for folder, names in folders_below(str(root), passed):
        stems = {name[: -len(e)] for name in names if (e := ending_of(name)) in _BESIDE_RAW}
        for name in names:
            path = os.path.join(folder, name)  # noqa: PTH118 - a Path for each of many is slow
            taken = named_picture(name, passed)
            if taken is None and ending_of(name) == ".tar":
                tars.append(path[start:])
            elif taken is None and not (taken := is_picture_file(path)):
                passed[kind_of(name) if os.path.exists(path) else "broken link(s)"] += 1  # noqa: PTH110
            if KINDS.get(ending_of(name)) == "RAW" and name[: name.rfind(".")] in stems:
                passed["RAW beside a JPEG or HEIC"] += bool(taken)
            elif taken and can_read(ending_of(name), passed):
                pictures.append(path[start:])
    return sorted(pictures, key=os.fsencode), sorted(tars, key=os.fsencode), passed


def hidden_part(name: str) -> str:
    """The first part of a name below a source that is hidden or a system's own; "" if there is none.

    Such are names with a leading dot, what disks, file servers and archivers make beside pictures, and the
    marks of files open in Office (``~$list.xlsx``).
    """
    for part in name.split("/"):
        if part[:1] == "." or part[:2] == "~$" or part.lower() in _SYSTEM:
            return part
    return ""


def named_picture(name: str, passed: Counter[str]) -> bool | None:
    """Whether a file is a picture by its name below a source; None where its first bytes decide.

    Args:
        passed: what the name alone leaves out is counted here.
    """
    hidden = hidden_part(name)
    if hidden:
        if f".{name.rpartition('.')[2].lower()}" in IMAGE_EXTENSIONS:  # of ".png", too
            own = name.endswith(hidden)  # and not that of a folder above it
            passed[f"{hidden}/" if not own else "._*" if hidden.startswith("._") else ".*"] += 1
        return False
    ending = ending_of(name)
    if ending in UNOPENED or ending.endswith(("~", "_original")):
        passed[kind_of(name)] += 1
        return False
    return True if ending in IMAGE_EXTENSIONS else None


def ending_of(name: str) -> str:
    """The ending of a file's name, lower case, with its dot; "" where there is none."""
    # Not Path.suffix: what counts as an ending of "...png" differs between Pythons.
    return os.path.splitext(name)[1].lower()  # noqa: PTH122


def kind_of(name: str) -> str:
    """What files like this one are counted as: their ending, as far as it looks like one."""
    ending = ending_of(name)
    return ending if _ENDING.fullmatch(ending) else "without an ending"


def passed_over(passed: Mapping[str, int]) -> str:
    """What to tell of files that were left out: ``3 files passed over: 2 .psd, 1 .ai``; "" of none.

    Args:
        passed: kind → how many; hidden pictures stand under their folder with a ``/`` or as ``.*``.
    """
    told = [
        f"{counted(n, f'{kind} file')} passed over: pip install {EXTRAS[kind].package}"
        for kind, n in passed.items()
        if kind in EXTRAS and n
    ]
    passed = {kind: n for kind, n in passed.items() if kind not in EXTRAS}
    hidden = {kind: n for kind, n in passed.items() if kind.endswith(("/", "*")) and n}
    others = {kind: n for kind, n in passed.items() if not kind.endswith(("/", "*")) and n}
    if others:
        told.append(f"{counted(sum(others.values()), 'file')} passed over: {by_number(others)}")
    if hidden:
        count = counted(sum(hidden.values()), "picture")
        told.append(f"{count} left out as hidden or a system's own: {by_number(hidden)}")
    return "; ".join(told)


def by_number(kinds: Mapping[str, int]) -> str:
    """Kinds with their numbers, the most frequent first, few enough for a line."""
    ordered = sorted(kinds, key=lambda kind: (-kinds[kind], kind))
    more = len(ordered) - _KINDS
    return ", ".join(f"{kinds[kind]:,} {one_line(kind, 40)}" for kind in ordered[:_KINDS]) + (
        f" and {more:,} more kind{'s' if more > 1 else ''}" if more > 0 else ""
    )


def tell_passed_over(source: str, passed: Mapping[str, int]) -> None:
    """Tell on the screen what was left out of ``source``, if anything was."""
    text = passed_over(passed)
    if text:
        level = logging.WARNING if any(kind in EXTRAS for kind in passed) else logging.INFO
        log.log(level, "%s: %s", source, text)


def _refuse_folder(error: OSError) -> None:
    raise DataError(
        f"The folder {error.filename} cannot be read ({error.strerror}); "
        "give access to it or move it out of the image folder"
    ) from error


def folders_below(
    root: str, passed: Counter[str], refuse: Callable[[OSError], object] | None = _refuse_folder
) -> Iterator[tuple[str, list[str]]]:
    """Each folder to be read, once, with the names of its files; counts what is left out.

    Args:
        refuse: called with why a folder cannot be read.
    """
    seen: set[str] = set()  # real paths
    above = {os.path.realpath(root), os.path.abspath(root)}  # noqa: PTH100
    links: list[str] = [root]
    while links:
        links.sort(key=os.fsencode, reverse=True)
        top = links.pop()
        real = os.path.realpath(top)
        if top != root and (real in seen or any(_lies_in(path, real) for path in above)):
            passed["linked folder(s) already read"] += 1
            continue
        for folder, folders, names in os.walk(top, onerror=refuse):
            where = real + folder[len(top) :]
            if where in seen:
                folders.clear()
                continue
            seen.add(where)
            yield folder, names
            inside, folders[:] = folders[:], []
            for name in inside:
                path = os.path.join(folder, name)  # noqa: PTH118
                if hidden_part(name):
                    passed[name + "/"] += _count_pictures(path)
                elif os.path.islink(path):  # noqa: PTH114
                    links.append(path)  # after what lies here itself
                else:
                    folders.append(name)


def _lies_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(os.path.join(folder, ""))  # noqa: PTH118


def _count_pictures(folder: str) -> int:
    """Files below a folder that are named like pictures; what may not be looked at has none."""
    return sum(
        ending_of(name) in IMAGE_EXTENSIONS for _, _, names in os.walk(folder) for name in names
    )


def is_picture(head: bytes) -> bool:
    """Whether a file that begins with ``head`` is a picture of a kind that is decoded, or told when it fails.

    Args:
        head: its first :data:`HEAD_BYTES` bytes.
    """
    if head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a")):
        return True
    if head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return head[8:10] != b"CR"  # Canon's raw format, whose first page is a preview
    if head.startswith(b"BM"):  # texts begin so too: the size of the second header decides
        return head[14:18] in _BMP_HEADERS
    if head[:4] == b"RIFF":
        return head[8:12] == b"WEBP"
    return head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis", *HEIC_BRANDS)


def is_picture_file(path: str) -> bool:
    """Whether a regular file is a picture by its first bytes."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116 (thousands of calls)
            return False
        handle = os.open(path, os.O_RDONLY | NEVER_WAIT)
        try:
            return is_picture(os.read(handle, HEAD_BYTES))
        finally:
            os.close(handle)
    except (OSError, ValueError):
        return False


def open_image_file(path: Path, *, max_bytes: int | None = MAX_FILE_BYTES) -> IO[bytes]:
    """Open a regular file for reading; never waits on a pipe, never touches a device.

    Args:
        path: the file, or a link to it.
        max_bytes: the largest size that is let through; None for any.

    Raises:
        ImageError: it is missing, empty, too big, no regular file, or may not be read.
    """
    try:
        _check_status(path.stat(), max_bytes)
        handle = os.open(path, os.O_RDONLY | NEVER_WAIT)
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
