"""What lies where in a tar: one pass over its headers, so that members can be read by their offset.

Nothing is ever unpacked to the disk, so a member's name can lead nowhere; still, members that no honest
tar of pictures has are refused, each with its reason: links, devices, sparse files, names that are
absolute or have ``..`` in them, sizes that the file does not have.
"""

from __future__ import annotations

import json
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Any

from mirip_fast.data.image_files import (
    IMAGE_EXTENSIONS,
    MAX_FILE_BYTES,
    ending_of,
    hidden_part,
    kind_of,
    named_picture,
    one_line,
)
from mirip_fast.data.signatures import HEAD_BYTES, is_picture
from mirip_fast.errors import DataError
from mirip_fast.text import folded, nfc

METADATA_NAME = "metadata.csv"
#: Key of a sample's labels under which stands why they could not be read.
UNREADABLE = "\0"
#: The name under which the rest of a damaged tar is told.
DAMAGED = "(damaged)"

_HEADER_BYTES = 16 << 20  # for one member's names; more is no name
_LABEL_BYTES = 64 << 10
_VALUE_LENGTH = 200
_BLOCK = 512
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
    """The images of a tar, its ``metadata.csv`` files, and the labels of its WebDataset samples.

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
        return [n for n in self.members if ending_of(n) != ".csv" and not hidden_part(n)]

    def tables(self) -> list[str]:
        """Names of the ``metadata.csv`` files at the top, or in a folder there."""
        found = [n for n in self.members if is_table(n) and not hidden_part(n)]
        return [n for n in found if n.count("/") <= 1]

    def to_json(self) -> dict[str, Any]:
        """As JSON; :meth:`from_json` reads it."""
        members = [[n, m.start, m.size, m.check, m.reason] for n, m in self.members.items()]
        about = {"labels": self.labels, "remark": self.remark, "files": self.files}
        return {"members": members, **about, "passed": self.passed}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> TarIndex:
        """Read what :meth:`to_json` wrote."""
        members = {name: Member(*rest) for name, *rest in content["members"]}
        about = content["labels"], content["remark"], content["files"], Counter(content["passed"])
        return cls(members, *about)


def is_table(name: str) -> bool:
    """Whether a member is called ``metadata.csv``, in whatever folder, capital letters or not."""
    return folded(name.rpartition("/")[2]) == METADATA_NAME


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
                f"{name}: compressed ({kind}), so its members can not be read one by one. Unpack it to a "
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
        start = info.offset_data
        member = Member(start, info.size, check, reason or _refusal(info, size))
        if is_table(named):
            _put(index, named, member)
            continue
        if ending in (".json", ".cls") and member.reason is None:
            labels.append((named, member))
            continue
        if _is_image(stream, named, member, index.passed):
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


def labels_of(index: TarIndex, image: str) -> dict[str, str]:
    """What the tar says of an image: by its whole name, else by what stands before its first dot."""
    return next((index.labels[stem] for stem in _stems(image) if stem in index.labels), {})


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
        stream.seek(info.offset_data - _BLOCK)
        yield info, zlib.crc32(stream.read(_BLOCK))
    end = b""
    with suppress(OverflowError, ValueError, OSError):  # a lying size: it leads to no place
        stream.seek(tar.offset)
        end = stream.read(_BLOCK)
    if wrong is None and end.strip(b"\0"):
        wrong = "no header where one should be"
    if wrong is not None and not (size is not None and tar.offset > size):
        _put(
            index,
            DAMAGED,
            Member(tar.offset, 0, 0, f"the tar is damaged from byte {tar.offset} on ({wrong})"),
        )
    if wrong is not None or not end:
        index.remark = (
            f"{name}: "
            + ("damaged" if wrong else "without its end mark")
            + "; if it was cut off or "
            "copied in part, images are missing"
        )


class _Capped:
    """Refuses reads that no header needs: a hostile size would allocate gigabytes."""

    def __init__(self, stream: IO[bytes]):
        self._stream = stream
        self.seek, self.tell = stream.seek, stream.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._stream.read(size)


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
        index.members[f"{stem}#{number}{ending}"] = Member(
            before.start, before.size, before.check, reason
        )
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
        values = json.loads(text)
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
