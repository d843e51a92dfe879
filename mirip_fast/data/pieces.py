"""Images that are a part of a file: what a decoding process needs to know of a tar's member."""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass

from mirip_fast.data.image_files import Stamp, one_line
from mirip_fast.errors import ImageError

HEADER_BYTES = 512  # a tar has a block of this size before each member
_CHANGED = "the tar changed since it was looked through; run the same command again"


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes inside a file of this machine that are an image.

    Attributes:
        file: the file.
        start: where they begin.
        size: how many they are.
        check: CRC-32 of the 512 bytes before them; None where there is nothing to check.
        stamp: what to remember their hash by; None: it is not remembered.
    """

    file: str
    start: int
    size: int
    check: int | None
    stamp: Stamp | None

    def read(self) -> bytes:
        """The bytes.

        Raises:
            ImageError: the file can not be read, or something else lies there now.
        """
        lead = 0 if self.check is None else HEADER_BYTES
        try:
            with open(self.file, "rb") as stream:  # noqa: PTH123 - a text, as workers get it
                before = os.fstat(stream.fileno())
                stream.seek(self.start - lead)
                data = stream.read(lead + self.size)
                after = os.fstat(stream.fileno())
        except (OSError, MemoryError) as error:
            reason = error.strerror if isinstance(error, OSError) else None
            raise ImageError(one_line(reason or "too big for the memory there is")) from error
        if before.st_mtime_ns != after.st_mtime_ns or before.st_size != after.st_size:
            raise ImageError("the tar changed while it was being read")
        return checked(data, self.check, self.size)


def checked(data: bytes, check: int | None, size: int) -> bytes:
    """``data`` without the header block before it, if it is what was looked for."""
    if check is not None:
        head, data = data[:HEADER_BYTES], data[HEADER_BYTES:]
        if zlib.crc32(head) != check:
            raise ImageError(_CHANGED)
    if len(data) != size:
        raise ImageError(
            _CHANGED if check is not None else "the file changed while it was being read"
        )
    return data
