"""The places that an image's bytes come from: a file, a page of a PDF, a member of a tar, an address.

All have paths like files, ``/data/000.tar/a.jpg`` and ``/s3:/bucket/a.jpg`` (see
:mod:`mirip_fast.data.remote`), so that whoever handles paths need not know of them: :func:`read_image` reads
any, and :func:`piece_of` says where the bytes of one lie that is no file of its own. A tar is looked through
once; what was found is kept in this process, and in the folder named with :func:`keep_indexes_in` for the
next.

Nothing of a tar is ever unpacked to the disk, so a member's name can lead nowhere; still, members that no
honest tar of pictures has are refused, each with its reason: links, devices, sparse files, names that are
absolute or have ``..`` in them, sizes that the file does not have.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import IO, TYPE_CHECKING, Any

from mirip_fast.data import remote
from mirip_fast.data.formats import marked, split_page
from mirip_fast.data.image_files import (
    HEAD_BYTES,
    IMAGE_EXTENSIONS,
    MAX_FILE_BYTES,
    SETTLED_NS,
    Stamp,
    ending_of,
    hidden_part,
    is_picture,
    kind_of,
    named_picture,
    one_line,
    open_image_file,
    read_image_file,
    settled_stamp,
    stamp_of,
)
from mirip_fast.errors import DataError, ImageError
from mirip_fast.files import open_file, read_file, write_text
from mirip_fast.text import address, folded, nfc

if TYPE_CHECKING:
    from tarfile import TarInfo

log = logging.getLogger(__name__)

INDEX_FOLDER = "tars"
METADATA_NAME = "metadata.csv"
#: What a table that describes its folder is called; the first is taken before the second.
METADATA_NAMES = (METADATA_NAME, "metadata.xlsx")
#: Key of a sample's labels under which stands why they could not be read.
UNREADABLE = "\0"
#: The name under which the rest of a damaged tar is told.
DAMAGED = "(damaged)"

_VERSION = 4
_BLOCK_BYTES = 512  # a tar has a block of this size before each member
_MAY_BE_PLACE = re.compile(r"\.tar(/|$)|\.pdf#page=|^/[a-z][a-z0-9+.-]+:/", re.IGNORECASE)
_IN_TAR = re.compile(r"\.tar(?=/)", re.IGNORECASE)
_HEADER_BYTES = 16 << 20  # for one member's names; more is no name
_LABEL_BYTES = 64 << 10
_VALUE_LENGTH = 200
_CHANGED = "the tar changed since it was looked through; run the same command again"
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
#: Type of a tar's member (POSIX ustar, GNU's S) → what it is.
_KINDS = {b"3": "a device", b"4": "a device", b"6": "a named pipe", b"S": "a sparse file"}


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes in a file: a tar's member, a page, or what lies behind an address.

    Attributes:
        file: the file, perhaps a remote one.
        start: where they begin.
        size: how many they are.
        check: CRC-32 of the header block right before them, which tells whether what lies there is still this
            member of a tar; None where there is nothing to check.
        stamp: what to remember their hash by; None: it is not remembered.
        page: of a PDF, such as ``#page=3``.
        reason: why they are not read; None for an honest file.
    """

    file: str
    start: int
    size: int
    check: int | None = None
    stamp: Stamp | None = None
    page: str = ""
    reason: str | None = None

    def read(self) -> tuple[bytes, Stamp | None]:
        """The bytes, and what to remember their hash by.

        Raises:
            ImageError: the file cannot be read, or something else lies there now; the message is the reason,
                on one line.
        """
        lead = 0 if self.check is None else _BLOCK_BYTES
        if remote.is_remote(Path(self.file)):
            try:
                data = remote.read_bytes(Path(self.file), self.start - lead, lead + self.size)
            except DataError as error:
                raise ImageError(one_line(str(error))) from error
        else:
            data = self._read_local(self.start - lead, lead + self.size)
        if zlib.crc32(data[:lead]) != (self.check or 0):
            raise ImageError(_CHANGED)
        if len(data) != lead + self.size:
            raise ImageError(_CHANGED if lead else "the file changed while it was being read")
        return marked(data[lead:], self.page), self.stamp

    def _read_local(self, start: int, size: int) -> bytes:
        try:
            with open(self.file, "rb") as stream:  # noqa: PTH123 - a text, as workers get it
                before = os.fstat(stream.fileno())
                stream.seek(start)
                data = stream.read(size)
                after = os.fstat(stream.fileno())
        except (OSError, MemoryError) as error:
            reason = error.strerror if isinstance(error, OSError) else None
            raise ImageError(one_line(reason or "too big for the memory there is")) from error
        if stamp_of(before) != stamp_of(after):
            raise ImageError("the tar changed while it was being read")
        return data


@dataclass
class TarIndex:
    """The images of a tar, its ``metadata.csv`` or ``.xlsx`` files, and the labels of its WebDataset samples.

    Attributes:
        members: safe name → where it lies, in the order of the tar; refused ones are among them.
        labels: name without its ending → what the ``.json`` and ``.cls`` beside an image say.
        remark: what is wrong with the tar as a whole; None if nothing is.
        files: how many regular files it has, of any kind.
        passed: how many files of each kind are no images, or left out.
        stamp: of the tar that this holds of.
        settled: whether that is old enough to be known by its stamp.
    """

    members: dict[str, Piece] = field(default_factory=dict)
    labels: dict[str, dict[str, str]] = field(default_factory=dict)
    remark: str | None = None
    files: int = 0
    passed: Counter[str] = field(default_factory=Counter)
    stamp: Stamp | None = None
    settled: bool = False

    def images(self) -> list[str]:
        """Names of the images that are not hidden, in order, and of what is damaged."""
        return [
            n for n in self.members if ending_of(n) not in (".csv", ".xlsx") and not hidden_part(n)
        ]

    def tables(self) -> list[str]:
        """Names of the ``metadata.csv`` files at the top, or in a folder there."""
        found = [n for n in self.members if _is_table(n) and not hidden_part(n)]
        return [n for n in found if n.count("/") <= 1]

    def labels_of(self, image: str) -> dict[str, str]:
        """What is said of an image: by its whole name, else by what stands before its first dot."""
        return next((self.labels[stem] for stem in _stems(image) if stem in self.labels), {})

    @cached_property
    def folders(self) -> dict[str, tuple[list[str], list[str]]]:
        """Folder → the files and the folders right in it."""
        found: dict[str, tuple[list[str], list[str]]] = {"": ([], [])}

        def entry(folder: str) -> tuple[list[str], list[str]]:
            if folder not in found:
                parent, _, last = folder.rpartition("/")
                entry(parent)[1].append(last)
                found[folder] = [], []
            return found[folder]

        for name in self.members:
            folder, _, base = name.rpartition("/")
            entry(folder)[0].append(base)
        return found


_tars: dict[str, TarIndex] = {}  # what this process has learned
_index_folder: Path | None = None  # where it is kept for the next


def keep_indexes_in(cache_dir: Path) -> None:
    """Keep what is learned of tars below this cache folder, and take it from there."""
    global _index_folder  # noqa: PLW0603 (of a process)
    _index_folder = cache_dir / INDEX_FOLDER


def read_image(path: Path) -> tuple[bytes, Stamp | None]:
    """The whole content of an image, wherever it lies, and what to remember its hash by.

    Raises:
        ImageError: it cannot be read, or is refused; the message is the reason, on one line.
    """
    piece = piece_of(path)
    if piece is not None:
        return piece.read()
    read_ns = time.time_ns()
    data, status = read_image_file(path)
    return data, settled_stamp(status, read_ns)


def is_unchanged(path: Path, sha256: bytes) -> bool:
    """Whether an image has the content with this SHA-256, or cannot be read: whoever opens it tells that."""
    try:
        return hashlib.sha256(read_image(path)[0]).digest() == sha256
    except ImageError:
        return True


def is_tar(path: Path) -> bool:
    """Whether a path is named like a tar that members are read from."""
    return path.suffix.lower() == ".tar"


def is_place(path: Path) -> bool:
    """Whether a path leads into a tar or PDF, or to an address."""
    text = str(path)
    if not _MAY_BE_PLACE.search(text):  # of nearly every file one look tells
        return False
    if remote.is_remote(path) or _split(text) is not None:
        return True
    whole, page = split_page(text)
    return bool(page) and Path(whole).is_file()


def is_gone(path: Path) -> bool:
    """Whether there is neither a file nor a tar that the path leads into; an address is not asked."""
    return not path.exists() and not is_place(path)


def entries_in(folder: Path) -> tuple[list[str], list[str]] | None:
    """Files and folders right in a folder of a tar, or at an address; None where it is neither.

    Raises:
        DataError: the tar or the service cannot be read.
    """
    text = str(folder)
    if not _MAY_BE_PLACE.search(text):
        return None
    found = _split(text + "/")
    if found is not None:
        tar, name = found
        return tar_index(tar).folders.get(name.rstrip("/"), ([], []))
    if not remote.is_remote(folder):
        return None
    files: list[str] = []
    folders: list[str] = []
    for name, is_file in remote.listing(folder, deep=False):
        if "/" not in name and name not in ("", ".", ".."):
            (files if is_file else folders).append(name)
    return files, folders


def safe_name(raw: str) -> tuple[str, str | None]:
    """A name below a folder that can lead nowhere else, and why the name as it was is refused.

    ``./a//b.jpg`` is ``a/b.jpg``. Where ``raw`` is absolute or has ``..`` in it, these are spelled in a
    way that means nothing to a file system.
    """
    reason = None
    parts = [part for part in raw.split("/") if part not in ("", ".")]
    if raw.startswith("/"):
        reason, parts = "its name is absolute", ["%2F" + (parts[0] if parts else ""), *parts[1:]]
    if ".." in parts:
        reason = "its name has .. in it"
        parts = ["%2E%2E" if part == ".." else part for part in parts]
    if "\0" in raw:
        reason, parts = "its name has a NUL in it", [part.replace("\0", "%00") for part in parts]
    return "/".join(parts), reason


def _split(text: str) -> tuple[Path, str] | None:
    """The tar that a path leads into, and the name in it."""
    for match in _IN_TAR.finditer(text):
        tar = text[: match.end()]
        if tar in _tars or remote.is_remote(Path(tar)) or os.path.isfile(tar):  # noqa: PTH113
            return Path(tar), text[match.end() + 1 :]
    return None


def piece_of(path: Path) -> Piece | None:
    """The file that holds the content, perhaps remote, and where in it; None for a file of its own.

    Raises:
        ImageError: it is refused, or what it lies in cannot be read.
    """
    text = str(path)
    if not _MAY_BE_PLACE.search(text):
        return None
    whole, page = split_page(text)
    if page and not os.path.isfile(text):  # noqa: PTH113
        piece = piece_of(Path(whole))
        if piece is None:
            with open_image_file(Path(whole)) as stream:
                status = os.fstat(stream.fileno())
            stamp = settled_stamp(status, time.time_ns())
            piece = Piece(whole, 0, status.st_size, stamp=stamp)
        return replace(piece, page=page)
    try:
        found = _split(text)
        if found is not None:
            return _member_piece(*found)
        if not remote.is_remote(path):
            return None
        said = remote.file_info(path)
    except DataError as error:
        raise ImageError(one_line(str(error))) from error
    if said is None:
        raise ImageError("the file does not exist")
    size, stamp = said
    if size == 0:
        raise ImageError("the file is empty")
    if size is None or size > MAX_FILE_BYTES:
        what = "a file of unknown size" if size is None else f"{size} bytes"
        raise ImageError(f"{what} is over the limit of {MAX_FILE_BYTES} bytes")
    return Piece(text, 0, size, stamp=stamp)


def _member_piece(tar: Path, name: str) -> Piece:
    index = tar_index(tar)
    member = index.members.get(name)
    if member is None:
        raise ImageError("the tar has no such member")
    if member.reason is not None:
        raise ImageError(member.reason)
    stamp = None
    if index.settled and index.stamp is not None:
        stamp = member.size, remote.mark_of(index.stamp, member.start)
    return replace(member, file=str(tar), stamp=stamp)


def tar_index(path: Path) -> TarIndex:
    """What lies in a tar; looked through anew when it has changed (a remote one: once per process).

    Raises:
        DataError: it is not there, no tar, compressed, or cannot be read.
    """
    text = str(path)
    known = _tars.get(text)
    if remote.is_remote(path):
        if known is not None:
            return known
        said = remote.file_info(path)
        if said is None:
            raise DataError(f"{address(path)}: there is no such file")
        size, stamp = said
        settled = stamp is not None
    else:
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error
        stamp, size = (status.st_size, status.st_mtime_ns), status.st_size
        settled = time.time_ns() - status.st_mtime_ns > SETTLED_NS
        if known is not None and known.stamp == stamp and known.settled >= settled:
            return known
    index = _kept(path, stamp) if settled else None
    if index is None:
        index = replace(_look_through(path, size), stamp=stamp, settled=settled)
        if settled:
            _keep(path, index)
    _tars[text] = index
    if index.remark is not None:
        log.warning(index.remark)
    return index


def _look_through(path: Path, size: int | None) -> TarIndex:
    name = address(path)
    log.debug("Looking through %s", name)
    if remote.is_remote(path):
        with remote.open_remote(path) as stream:
            return index_tar(stream, size, name)
    try:
        with open_file(path) as stream:
            return index_tar(stream, size, name)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})"
        ) from error


def _index_file(path: Path) -> Path | None:
    if _index_folder is None:
        return None
    return _index_folder / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json"


def _kept(path: Path, stamp: Stamp | None) -> TarIndex | None:
    """The index that an earlier run left, if it is of the tar as it is now."""
    file = _index_file(path)
    if file is None or stamp is None:
        return None
    try:
        kept = json.loads(read_file(file))
        if kept["version"] != _VERSION or kept["stamp"] != list(stamp):
            return None
        members = {
            name: Piece(str(path), start, size, check, reason=reason)
            for name, start, size, check, reason in kept["members"]
        }
        about = (kept["labels"], kept["remark"], kept["files"], Counter(kept["passed"]))
        return TarIndex(members, *about, stamp, settled=True)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # it is a shortcut only


def _keep(path: Path, index: TarIndex) -> None:
    file = _index_file(path)
    if file is None:
        return
    members = [[n, m.start, m.size, m.check, m.reason] for n, m in index.members.items()]
    about = {"version": _VERSION, "tar": address(path), **vars(index), "members": members}
    with suppress(OSError):  # a cache that cannot be written to: it is made anew next time
        write_text(file, json.dumps(about) + "\n")  # ASCII


def index_tar(stream: IO[bytes], size: int | None, name: str) -> TarIndex:
    """Look through a tar; of contents only the small labels of samples are read.

    Args:
        stream: can seek.
        size: of the tar, in bytes; None if unknown.
        name: of the tar, for messages.

    Raises:
        DataError: it is no tar, is compressed, or is empty.
    """
    magic = stream.read(6)
    for beginning, kind in _COMPRESSED.items():
        if magic.startswith(beginning):
            raise DataError(
                f"{name}: compressed ({kind}), so its members cannot be read one by one. Unpack it to a "
                "plain .tar first; pictures are compressed already"
            )
    stream.seek(0)
    index = TarIndex()
    stems: set[str] = set()
    labels: list[tuple[str, Piece]] = []
    for info, check in _headers(stream, size, name, index):
        if info.isdir():
            continue
        index.files += info.isreg()
        named, reason = safe_name(info.name)
        ending = ending_of(named)
        reason = reason or _refusal(info, size)
        member = Piece(name, info.offset_data, info.size, check, reason=reason)
        if _is_table(named):
            _put(index, named, member)
        elif ending in (".json", ".cls") and member.reason is None:
            labels.append((named, member))
        elif _is_image(stream, named, member, index.passed):
            stems.update(_stems(named))
            _put(index, named, member)
        elif ending in IMAGE_EXTENSIONS:  # a hidden one, which a table may name
            _put(index, named, member)
    for named, member in labels:
        stem = nfc(named[: -len(ending_of(named))])
        if stem in stems:
            index.labels.setdefault(stem, {}).update(_read_labels(stream, named, member))
        else:
            index.passed[kind_of(named)] += not hidden_part(named)
    return index


def _headers(
    stream: IO[bytes], size: int | None, name: str, index: TarIndex
) -> Iterator[tuple[TarInfo, int]]:
    """Each member's header, and the CRC-32 of its last block; notes what is wrong with the tar."""
    import tarfile  # which decoding processes do without

    def read(count: int) -> bytes:
        """Refuses what no header needs: a hostile size would allocate gigabytes."""
        if not 0 <= count <= _HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {count} bytes")
        return stream.read(count)

    capped: Any = SimpleNamespace(read=read, seek=stream.seek, tell=stream.tell)
    try:
        tar = tarfile.open(fileobj=capped, mode="r:", errors="surrogateescape")  # noqa: SIM115 - it is not ours to close
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise DataError(f"{name}: no tar file ({one_line(str(error))})") from error
    last, wrong = -1, None
    while wrong is None:
        try:
            info = tar.next()
        except (tarfile.TarError, ValueError, OverflowError) as error:
            wrong = one_line(str(error))
            break
        tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
        if info is None:
            break
        if tar.offset <= last or info.size < 0:
            wrong = "a size below zero"
            break
        last = tar.offset
        stream.seek(info.offset_data - _BLOCK_BYTES)
        yield info, zlib.crc32(stream.read(_BLOCK_BYTES))
    end = b""
    with suppress(OverflowError, ValueError, OSError):  # a lying size: it leads to no place
        stream.seek(tar.offset)
        end = stream.read(_BLOCK_BYTES)
    if wrong is None and end.strip(b"\0"):
        wrong = "no header where one should be"
    if wrong is not None and not (size is not None and tar.offset > size):
        reason = f"the tar is damaged from byte {tar.offset} on ({wrong})"
        _put(index, DAMAGED, Piece(name, tar.offset, 0, 0, reason=reason))
    if wrong is not None or not end:
        what = "damaged" if wrong else "without its end mark"
        index.remark = f"{name}: {what}; if it was cut off or copied in part, images are missing"


def _is_table(name: str) -> bool:
    return folded(name.rpartition("/")[2]) in METADATA_NAMES


def _is_image(stream: IO[bytes], name: str, member: Piece, passed: Counter[str]) -> bool:
    """Whether a member is an image by its name, else by its first bytes; another one is counted."""
    taken = named_picture(name, passed)
    if taken is None and member.reason is None:
        stream.seek(member.start)
        taken = is_picture(stream.read(min(member.size, HEAD_BYTES))) or None
    if taken is None:
        passed[kind_of(name)] += 1
    return taken or False


def _refusal(info: TarInfo, size: int | None) -> str | None:
    """Why a member is no honest file."""
    if info.islnk() or info.issym():
        return one_line(f"a link to {info.linkname}; links in a tar are not followed")
    if info.issparse():
        return "a sparse file"
    if not info.isreg():
        return f"not a regular file but {_KINDS.get(info.type, 'something else')}"
    if info.size > MAX_FILE_BYTES:
        return f"{info.size} bytes is over the limit of {MAX_FILE_BYTES} bytes"
    if size is not None and info.offset_data + info.size > size:
        return "the tar is cut off inside it"
    return "the file is empty" if info.size == 0 else None


def _put(index: TarIndex, name: str, member: Piece) -> None:
    """Note a member; of several with one name the last counts, as it does when a tar is unpacked."""
    before = index.members.pop(name, None)
    if before is not None:
        stem, ending = name[: len(name) - len(ending_of(name))], ending_of(name)
        number = 1
        while f"{stem}#{number}{ending}" in index.members:
            number += 1
        reason = before.reason or "a later member of the same tar has the same name and counts"
        index.members[f"{stem}#{number}{ending}"] = replace(before, reason=reason)
    index.members[name] = member


def _read_labels(stream: IO[bytes], name: str, member: Piece) -> dict[str, str]:
    """The plain values of a ``.json`` file, or the text of a ``.cls`` file as ``cls``."""
    if member.size > _LABEL_BYTES:
        return {UNREADABLE: f"{name}: {member.size} bytes is too much for labels"}
    stream.seek(member.start)
    data = stream.read(member.size)
    try:
        text = data.decode("utf-8-sig")
        if ending_of(name) == ".cls":
            return {"cls": text.strip()[:_VALUE_LENGTH]}
        values: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        return {UNREADABLE: f"{name}: not readable as labels ({one_line(str(error))})"}
    if not isinstance(values, dict):
        return {UNREADABLE: f"{name}: an object {{…}} is expected"}
    return {
        key: "" if value is None else str(value)[:_VALUE_LENGTH]
        for key, value in values.items()
        if key not in ("", UNREADABLE) and (value is None or isinstance(value, str | int | float))
    }


def _stems(name: str) -> tuple[str, str]:
    """A name without its last ending, and (as WebDataset has it) without all of them."""
    name = nfc(name)
    folder, slash, base = name.rpartition("/")
    return name[: len(name) - len(ending_of(name))], folder + slash + base.partition(".")[0]
