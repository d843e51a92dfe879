"""Images that are no files of their own: members of tars, and what lies behind an address.

They have paths like files, ``/data/000.tar/a.jpg`` and ``/s3:/bucket/a.jpg`` (see
:mod:`mirip_fast.data.remote`), so that whoever handles paths need not know of them; where the disk has no
such file, :func:`read_place` and its siblings do. A tar is looked through once; what was found is kept in
this process, and in the folder named with :func:`keep_indexes_in` for the next.

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
import tarfile
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from mirip_fast.data import remote
from mirip_fast.data.formats import marked, split_page
from mirip_fast.data.image_files import (
    BLOCK_BYTES,
    HEAD_BYTES,
    IMAGE_EXTENSIONS,
    MAX_FILE_BYTES,
    SETTLED_NS,
    Piece,
    Stamp,
    checked,
    ending_of,
    hidden_part,
    is_picture,
    kind_of,
    may_be_place,
    named_picture,
    one_line,
    open_image_file,
    settled_stamp,
)
from mirip_fast.errors import DataError, ImageError
from mirip_fast.files import open_file, read_file, write_text
from mirip_fast.text import address, folded, nfc

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
_IN_TAR = re.compile(r"\.tar(?=/)", re.IGNORECASE)
_HEADER_BYTES = 16 << 20  # for one member's names; more is no name
_LABEL_BYTES = 64 << 10
_VALUE_LENGTH = 200
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_KINDS = {
    tarfile.CHRTYPE: "a device", tarfile.BLKTYPE: "a device", tarfile.FIFOTYPE: "a named pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar.

    Attributes:
        start: where its content begins, in bytes from the beginning of the tar.
        size: of its content, in bytes.
        check: CRC-32 of the header block right before the content: it tells whether what lies there is
            still this member.
        reason: why it is not read; None for an honest file.
    """

    start: int
    size: int
    check: int
    reason: str | None = None


@dataclass
class TarIndex:
    """The images of a tar, its ``metadata.csv`` or ``.xlsx`` files, and the labels of its WebDataset samples.

    Attributes:
        members: safe name → member, in the order of the tar; refused ones are among them.
        labels: name without its ending → what the ``.json`` and ``.cls`` beside an image say.
        remark: what is wrong with the tar as a whole; None if nothing is.
        files: how many regular files it has, of any kind.
        passed: how many files of each kind are no images, or left out.
    """

    members: dict[str, Member] = field(default_factory=dict)
    labels: dict[str, dict[str, str]] = field(default_factory=dict)
    remark: str | None = None
    files: int = 0
    passed: Counter[str] = field(default_factory=Counter)

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


@dataclass(frozen=True)
class _Tar:
    """An indexed tar, and by what the index is valid."""

    index: TarIndex
    stamp: Stamp | None
    settled: bool
    folders: dict[str, tuple[list[str], list[str]]]


@dataclass
class _Known:
    """What this process has learned of tars, and where it is kept for the next."""

    folder: Path | None = None
    tars: dict[str, _Tar] = field(default_factory=dict)


_known = _Known()


def keep_indexes_in(cache_dir: Path) -> None:
    """Keep what is learned of tars below this cache folder, and take it from there."""
    _known.folder = cache_dir / INDEX_FOLDER


def is_tar(path: Path) -> bool:
    """Whether a path is named like a tar that members are read from."""
    return path.suffix.lower() == ".tar"


def is_place(path: Path) -> bool:
    """Whether a path leads into a tar or PDF, or to an address."""
    text = str(path)
    if not may_be_place(text):
        return False
    if remote.is_remote(path) or _split(text) is not None:
        return True
    whole, page = split_page(text)
    return bool(page) and Path(whole).is_file()


def is_gone(path: Path) -> bool:
    """Whether there is neither a file nor a tar that the path leads into; an address is not asked."""
    return not path.exists() and not is_place(path)


def read_place(path: Path) -> tuple[bytes, Stamp | None] | None:
    """The whole content, and what to remember it by; None if the path leads to neither tar nor address.

    Raises:
        ImageError: it cannot be read, or is refused; the message is the reason, on one line.
    """
    piece = _piece(path)
    if piece is None or not remote.is_remote(Path(piece.file)):
        return None if piece is None else piece.read()
    lead = 0 if piece.check is None else BLOCK_BYTES
    try:
        data = remote.read_bytes(Path(piece.file), piece.start - lead, lead + piece.size)
    except DataError as error:
        raise ImageError(one_line(str(error))) from error
    return marked(checked(data, piece.check, piece.size), piece.page), piece.stamp


def local_piece(path: Path) -> Piece | None:
    """Where the content of a tar's member lies; None for whatever is no member of a tar on this machine.

    Raises:
        ImageError: the member is refused, or the tar cannot be read.
    """
    return None if remote.is_remote(path) else _piece(path)


def stamp_of_place(path: Path) -> Stamp | None:
    """What the content is remembered by as it is now; None for a plain file, or where it is unknown."""
    try:
        piece = _piece(path)
    except ImageError:
        return None
    return None if piece is None else piece.stamp


def entries_in(folder: Path) -> tuple[list[str], list[str]] | None:
    """Files and folders right in a folder of a tar, or at an address; None where it is neither.

    Raises:
        DataError: the tar or the service cannot be read.
    """
    text = str(folder)
    if not may_be_place(text):
        return None
    found = _split(text + "/")
    if found is not None:
        tar, name = found
        return _indexed(tar).folders.get(name.rstrip("/"), ([], []))
    if not remote.is_remote(folder):
        return None
    files: list[str] = []
    folders: list[str] = []
    for name, info in remote.list_files(folder, deep=False):
        if "/" not in name and name not in ("", ".", ".."):
            (folders if info is None else files).append(name)
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
        if tar in _known.tars or remote.is_remote(Path(tar)) or os.path.isfile(tar):  # noqa: PTH113
            return Path(tar), text[match.end() + 1 :]
    return None


def _piece(path: Path) -> Piece | None:
    """The file that holds the content, perhaps remote, and where in it."""
    text = str(path)
    if not may_be_place(text):
        return None
    whole, page = split_page(text)
    if page and not os.path.isfile(text):  # noqa: PTH113
        piece = _piece(Path(whole))
        if piece is None:
            with open_image_file(Path(whole)) as stream:
                status = os.fstat(stream.fileno())
            stamp = settled_stamp(status, time.time_ns())
            piece = Piece(whole, 0, status.st_size, None, stamp)
        return replace(piece, page=page)
    try:
        found = _split(text)
        if found is not None:
            return _member_piece(*found)
        if not remote.is_remote(path):
            return None
        info = remote.file_info(path)
    except DataError as error:
        raise ImageError(one_line(str(error))) from error
    if info is None:
        raise ImageError("the file does not exist")
    if info.size == 0:
        raise ImageError("the file is empty")
    if info.size is None or info.size > MAX_FILE_BYTES:
        size = "a file of unknown size" if info.size is None else f"{info.size} bytes"
        raise ImageError(f"{size} is over the limit of {MAX_FILE_BYTES} bytes")
    return Piece(text, 0, info.size, None, info.stamp)


def _member_piece(tar: Path, name: str) -> Piece:
    known = _indexed(tar)
    member = known.index.members.get(name)
    if member is None:
        raise ImageError("the tar has no such member")
    if member.reason is not None:
        raise ImageError(member.reason)
    stamp = None
    if known.settled and known.stamp is not None:
        stamp = member.size, remote.mark_of(known.stamp, member.start)
    return Piece(str(tar), member.start, member.size, member.check, stamp)


def tar_index(tar: Path) -> TarIndex:
    """What lies in a tar.

    Raises:
        DataError: it is not there, no tar, compressed, or cannot be read.
    """
    return _indexed(tar).index


def _indexed(path: Path) -> _Tar:
    """A tar's index; made anew when the tar has changed (a remote one: once per process)."""
    text = str(path)
    known = _known.tars.get(text)
    if remote.is_remote(path):
        if known is not None:
            return known
        info = remote.file_info(path)
        if info is None:
            raise DataError(f"{address(path)}: there is no such file")
        stamp, settled, size = info.stamp, info.stamp is not None, info.size
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
        index = _look_through(path, size)
        if settled:
            _keep(path, stamp, index)
    found = _known.tars[text] = _Tar(index, stamp, settled, _by_folder(index.members))
    if index.remark is not None:
        log.warning(index.remark)
    return found


def _look_through(path: Path, size: int | None) -> TarIndex:
    name = address(path)
    log.debug("Looking through %s", name)
    if remote.is_remote(path):
        with remote.open_file(path) as stream:
            return index_tar(stream, size, name)
    try:
        with open_file(path) as stream:
            return index_tar(stream, size, name)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})"
        ) from error


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
        kept = json.loads(read_file(file))
        if kept["version"] != _VERSION or kept["stamp"] != list(stamp):
            return None
        members = {name: Member(*rest) for name, *rest in kept["members"]}
        passed = Counter(kept["passed"])
        return TarIndex(members, kept["labels"], kept["remark"], kept["files"], passed)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # it is a shortcut only


def _keep(path: Path, stamp: Stamp | None, index: TarIndex) -> None:
    file = _index_file(path)
    if file is None:
        return
    members = [[n, m.start, m.size, m.check, m.reason] for n, m in index.members.items()]
    about = {"version": _VERSION, "tar": address(path), "stamp": stamp}
    with suppress(OSError):  # a cache that cannot be written to: it is made anew next time
        write_text(file, json.dumps({**about, **vars(index), "members": members}) + "\n")  # ASCII


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
    labels: list[tuple[str, Member]] = []
    for info, check in _headers(stream, size, name, index):
        if info.isdir():
            continue
        index.files += info.isreg()
        named, reason = safe_name(info.name)
        ending = ending_of(named)
        member = Member(info.offset_data, info.size, check, reason or _refusal(info, size))
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
) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Each member's header, and the CRC-32 of its last block; notes what is wrong with the tar."""
    capped = _Capped(stream)
    try:
        tar = tarfile.open(fileobj=capped, mode="r:", errors="surrogateescape")  # type: ignore[call-overload]  # noqa: SIM115 - it is not ours to close
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise DataError(f"{name}: no tar file ({one_line(str(error))})") from error
    last, wrong = -1, None
    while wrong is None:
        try:
            info = tar.next()
        except (tarfile.TarError, ValueError, OverflowError) as error:
            wrong = one_line(str(error))
            break
        tar.members.clear()  # it would keep them all
        if info is None:
            break
        if tar.offset <= last or info.size < 0:
            wrong = "a size below zero"
            break
        last = tar.offset
        stream.seek(info.offset_data - BLOCK_BYTES)
        yield info, zlib.crc32(stream.read(BLOCK_BYTES))
    end = b""
    with suppress(OverflowError, ValueError, OSError):  # a lying size: it leads to no place
        stream.seek(tar.offset)
        end = stream.read(BLOCK_BYTES)
    if wrong is None and end.strip(b"\0"):
        wrong = "no header where one should be"
    if wrong is not None and not (size is not None and tar.offset > size):
        reason = f"the tar is damaged from byte {tar.offset} on ({wrong})"
        _put(index, DAMAGED, Member(tar.offset, 0, 0, reason))
    if wrong is not None or not end:
        what = "damaged" if wrong else "without its end mark"
        index.remark = f"{name}: {what}; if it was cut off or copied in part, images are missing"


class _Capped:
    """Refuses reads that no header needs: a hostile size would allocate gigabytes."""

    def __init__(self, stream: IO[bytes]):
        self._stream = stream
        self.seek, self.tell = stream.seek, stream.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._stream.read(size)


def _is_table(name: str) -> bool:
    return folded(name.rpartition("/")[2]) in METADATA_NAMES


def _is_image(stream: IO[bytes], name: str, member: Member, passed: Counter[str]) -> bool:
    """Whether a member is an image by its name, else by its first bytes; another one is counted."""
    taken = named_picture(name, passed)
    if taken is None and member.reason is None:
        stream.seek(member.start)
        taken = is_picture(stream.read(min(member.size, HEAD_BYTES))) or None
    if taken is None:
        passed[kind_of(name)] += 1
    return taken or False


def _refusal(info: tarfile.TarInfo, size: int | None) -> str | None:
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


def _put(index: TarIndex, name: str, member: Member) -> None:
    """Note a member; of several with one name the last counts, as it does when a tar is unpacked."""
    before = index.members.pop(name, None)
    if before is not None:
        stem, ending = name[: len(name) - len(ending_of(name))], ending_of(name)
        number = 1
        while f"{stem}#{number}{ending}" in index.members:
            number += 1
        reason = before.reason or "a later member of the same tar has the same name and counts"
        other = Member(before.start, before.size, before.check, reason)
        index.members[f"{stem}#{number}{ending}"] = other
    index.members[name] = member


def _read_labels(stream: IO[bytes], name: str, member: Member) -> dict[str, str]:
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
