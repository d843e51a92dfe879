"""Works as the browser gets them: decoded, made small, written anew. No byte of a file reaches it."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from pathlib import Path

from PIL import Image

from mirip_fast.data.decode_pool import DecodePool, picture_job
from mirip_fast.errors import ImageError
from mirip_fast.label.works import Works

#: Longest side of a picture on the page, in pixels.
SIDE = 1600
_QUALITY = 90
_KEPT = 16  # pictures kept in memory: those on the page, those ahead, and a few for undo


class Pictures:
    """JPEG pictures of works, by their number.

    Args:
        works: those that may be shown; no other number gives a picture.
    """

    def __init__(self, works: Works):
        self._works = works
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def jpeg(self, number: int) -> bytes:
        """The picture of a work.

        The file must still hold the bytes that were embedded: whatever has been put in its place since,
        be it a link to somewhere else, is not shown.

        Raises:
            ImageError: no such work, or its file can not be read or is another by now.
        """
        if not (0 <= number < len(self._works) and self._works.shown[number]):
            raise ImageError("there is no such work")
        with self._lock:
            if number in self._kept:
                self._kept.move_to_end(number)
                return self._kept[number]
        picture = _jpeg(self._works.path(number), self._works.images.hashes[number])
        with self._lock:
            self._kept[number] = picture
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return picture


def _jpeg(path: Path, sha256: bytes) -> bytes:
    def choose(found: bytes) -> tuple[int, ...]:
        return (SIDE,) if found == sha256 else ()  # anything else is not even decoded

    with DecodePool(1) as pool:
        (done,) = pool.decode([picture_job(0, path, SIDE, ask=True)], choose)
    if done.reason is not None:
        raise ImageError(done.reason)
    if done.sha256 != sha256:
        raise ImageError("its file was changed after label was started; start it again")
    out = io.BytesIO()
    Image.fromarray(done.images[0]).save(out, "JPEG", quality=_QUALITY)
    return out.getvalue()
