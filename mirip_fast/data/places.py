"""Images that are no files of their own: members of tars, and what lies behind an address.

They have paths like files, ``/data/000.tar/a.jpg`` and ``/s3:/bucket/a.jpg`` (see
:mod:`mirip_fast.data.remote`), so that whoever handles paths need not know of them; where the disk has no
such file, :func:`read_place` and its siblings do. A tar is looked through once; what was found is kept in
this process, and in the folder named with :func:`keep_indexes_in` for the next.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mirip_fast.data import remote
from mirip_fast.data.image_files import MAX_FILE_BYTES, SETTLED_NS, Stamp, may_be_place, one_line
from mirip_fast.data.pieces import HEADER_BYTES, Piece, checked
from mirip_fast.data.tar_index import Member, TarIndex, index_tar
from mirip_fast.errors import DataError, ImageError
from mirip_fast.files import open_file, read_file, write_text

log = logging.getLogger(__name__)

INDEX_FOLDER = "tars"
_VERSION = 3
_IN_TAR = re.compile(r"\.tar(?=/)", re.IGNORECASE)


@dataclass(frozen=True)
class _Tar:
    """An indexed tar, and by what the index is valid."""

    index: TarIndex
    stamp: Stamp | None
    settled: bool
    folders: dict[str, tuple[list[str], list[str]]]


class _Known:
    """What this process has learned; one per process, as a cache."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.folder: Path | None = None
        self.tars: dict[str, _Tar] = {}
        self.files: dict[str, remote.RemoteFile] = {}


_known = _Known()


def keep_indexes_in(cache_dir: Path) -> None:
    """Keep what is learned of tars below this cache folder, and take it from there."""
    _known.folder = cache_dir / INDEX_FOLDER


def is_tar(path: Path) -> bool:
    """Whether a path is named like a tar that members are read from."""
    return path.suffix.lower() == ".tar"


def tar_index(tar: Path) -> TarIndex:
    """What lies in a tar.

    Raises:
        DataError: it is not there, no tar, compressed, or can not be read.
    """
    return _tar(tar).index


def note_remote(path: Path, info: remote.RemoteFile) -> None:
    """Keep what a listing said of a remote file, so that it is not asked for again."""
    if info.stamp is not None:  # some listings tell names only
        _known.files[str(path)] = info


def remote_info(path: Path) -> remote.RemoteFile | None:
    """What is known of a remote file, asked for once; None if there is none.

    Raises:
        DataError: the service can not be reached or refuses.
    """
    info = _known.files.get(str(path)) or remote.file_info(path)
    if info is not None:
        note_remote(path, info)
    return info


def is_place(path: Path) -> bool:
    """Whether a path leads into a tar or to an address."""
    text = str(path)
    return may_be_place(text) and (remote.is_remote(path) or _split(text) is not None)


def is_gone(path: Path) -> bool:
    """Whether there is neither a file nor a tar that the path leads into; an address is not asked."""
    return not path.exists() and not is_place(path)


def read_place(path: Path) -> tuple[bytes, Stamp | None] | None:
    """The whole content, and what to remember it by; None if the path leads to neither tar nor address.

    Raises:
        ImageError: it can not be read, or is refused; the message is the reason, on one line.
    """
    found = _piece(path)
    if found is None:
        return None
    file, piece = found
    if not remote.is_remote(file):
        return piece.read(), piece.stamp
    lead = 0 if piece.check is None else HEADER_BYTES
    try:
        data = remote.read_bytes(file, piece.start - lead, lead + piece.size)
    except DataError as error:
        raise ImageError(one_line(str(error))) from error
    return checked(data, piece.check, piece.size), piece.stamp


def local_piece(path: Path) -> Piece | None:
    """Where the content of a tar's member lies; None for whatever is no member of a tar on this machine.

    Raises:
        ImageError: the member is refused, or the tar can not be read.
    """
    if not may_be_place(path) or remote.is_remote(path):
        return None
    found = _piece(path)
    return None if found is None else found[1]


def stamp_of_place(path: Path) -> Stamp | None:
    """What the content is remembered by as it is now; None for a plain file, or where it is unknown."""
    try:
        found = _piece(path)
    except ImageError:
        return None
    return None if found is None else found[1].stamp


def entries_in(folder: Path) -> tuple[list[str], list[str]] | None:
    """Files and folders right in a folder of a tar, or at an address; None where it is neither.

    Raises:
        DataError: the tar or the service can not be read.
    """
    text = str(folder)
    if not may_be_place(text):
        return None
    found = _split(text + "/")
    if found is not None:
        tar, name = found
        return _tar(tar).folders.get(name.rstrip("/"), ([], []))
    if not remote.is_remote(folder):
        return None
    files: list[str] = []
    folders: list[str] = []
    for name, info in remote.list_files(folder, deep=False):
        if "/" in name or name in ("", ".", ".."):
            continue
        if info is not None:
            note_remote(folder / name, info)
        (folders if info is None else files).append(name)
    return files, folders


def _split(text: str) -> tuple[Path, str] | None:
    """The tar that a path leads into, and the name in it."""
    for match in _IN_TAR.finditer(text):
        tar = text[: match.end()]
        if tar in _known.tars or remote.is_remote(Path(tar)) or os.path.isfile(tar):  # noqa: PTH113
            return Path(tar), text[match.end() + 1 :]
    return None


def _piece(path: Path) -> tuple[Path, Piece] | None:
    """The file that holds the content, perhaps remote, and where in it."""
    text = str(path)
    if not may_be_place(text):
        return None
    found = _split(text)
    if found is not None:
        return found[0], _member_piece(*found)
    if not remote.is_remote(path):
        return None
    try:
        info = remote_info(path)
    except DataError as error:
        raise ImageError(one_line(str(error))) from error
    if info is None:
        raise ImageError("the file does not exist")
    if info.size == 0:
        raise ImageError("the file is empty")
    if info.size is None or info.size > MAX_FILE_BYTES:
        size = "a file of unknown size" if info.size is None else f"{info.size} bytes"
        raise ImageError(f"{size} is over the limit of {MAX_FILE_BYTES} bytes")
    return path, Piece(text, 0, info.size, None, info.stamp)


def _member_piece(tar: Path, name: str) -> Piece:
    try:
        known = _tar(tar)
    except DataError as error:
        raise ImageError(one_line(str(error))) from error
    member: Member | None = known.index.members.get(name)
    if member is None:
        raise ImageError("the tar has no such member")
    if member.reason is not None:
        raise ImageError(member.reason)
    stamp = None
    if known.settled and known.stamp is not None:
        stamp = member.size, remote.mark_of(known.stamp, member.start)
    return Piece(str(tar), member.start, member.size, member.check, stamp)


def _tar(path: Path) -> _Tar:
    """A tar's index; made anew when the tar has changed (a remote one: once per process)."""
    text = str(path)
    known = _known.tars.get(text)
    if remote.is_remote(path):
        if known is not None:
            return known
        info = remote_info(path)
        if info is None:
            raise DataError(f"{remote.address(path)}: there is no such file")
        stamp, settled, size = info.stamp, info.stamp is not None, info.size
    else:
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(f"{path}: can not be read ({error.strerror})") from error
        stamp, size = (status.st_size, status.st_mtime_ns), status.st_size
        settled = time.time_ns() - status.st_mtime_ns > SETTLED_NS
        if known is not None and known.stamp == stamp and known.settled >= settled:
            return known
    index = _kept(path, stamp) if settled else None
    if index is None:
        index = _look_through(path, size)
        if settled:
            _keep(path, stamp, index)
    found = _Tar(index, stamp, settled, _by_folder(index.members))
    with _known.lock:
        _known.tars[text] = found
    if index.remark is not None:
        log.warning(index.remark)
    return found


def _look_through(path: Path, size: int | None) -> TarIndex:
    name = remote.address(path)
    log.debug("Looking through %s", name)
    if remote.is_remote(path):
        with remote.open_file(path) as stream:
            return index_tar(stream, size, name)
    try:
        with open_file(path) as stream:
            return index_tar(stream, size, name)
    except OSError as error:
        raise DataError(f"{name}: can not be read ({error.strerror or error})") from error
    except ValueError as error:
        raise DataError(f"{name}: can not be read ({error})") from error


def _by_folder(names: Iterable[str]) -> dict[str, tuple[list[str], list[str]]]:
    """Folder → the files and the folders right in it."""
    found: dict[str, tuple[list[str], list[str]]] = {"": ([], [])}

    def entry(folder: str) -> tuple[list[str], list[str]]:
        if folder not in found:
            parent, _, last = folder.rpartition("/")
            entry(parent)[1].append(last)
            found[folder] = [], []
        return found[folder]

    for name in names:
        folder, _, base = name.rpartition("/")
        entry(folder)[0].append(base)
    return found


def _index_file(path: Path) -> Path | None:
    if _known.folder is None:
        return None
    return _known.folder / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json"


def _kept(path: Path, stamp: Stamp | None) -> TarIndex | None:
    """The index that an earlier run left, if it is of the tar as it is now."""
    file = _index_file(path)
    if file is None or stamp is None:
        return None
    try:
        content = json.loads(read_file(file))
        if content["version"] != _VERSION or content["stamp"] != list(stamp):
            return None
        return TarIndex.from_json(content)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # it is a shortcut only


def _keep(path: Path, stamp: Stamp | None, index: TarIndex) -> None:
    file = _index_file(path)
    if file is None:
        return
    content = {"version": _VERSION, "tar": remote.address(path), "stamp": stamp, **index.to_json()}
    with suppress(OSError):  # a cache that can not be written to: it is made anew next time
        write_text(file, json.dumps(content) + "\n")  # ASCII: names need not be UTF-8
