"""Works as the browser gets them: decoded here, made small, written anew. No byte of a file reaches it."""

from __future__ import annotations

import hashlib
import io
import threading
from collections import OrderedDict

from PIL import Image

from mirip_fast.data.images import load_rgb, one_reason, read_image_bytes
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
        data = read_image_bytes(self._works.path(number))
        if hashlib.sha256(data).digest() != self._works.images.hashes[number]:
            raise ImageError("its file was changed after label was started; start it again")
        picture = _jpeg(data)
        with self._lock:
            self._kept[number] = picture
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return picture


def _jpeg(data: bytes) -> bytes:
    image = load_rgb(data, draft_size=SIDE)
    with one_reason():
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0)
        out = io.BytesIO()
        image.save(out, "JPEG", quality=_QUALITY)
    return out.getvalue()
