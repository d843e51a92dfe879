"""Small copies of pictures, decoded and encoded in parallel by the decoding processes.

They are WebP files: at the same quality half as large as JPEG, and every browser of the last five years
shows them. Each picture is encoded at a few sizes, and the largest that fits its share of bytes is kept,
so that a page of n pictures stays below a limit whatever they show.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mirip_fast.data.decode_pool import Decoded, DecodeJob, DecodePool
from mirip_fast.data.decode_worker import Choose
from mirip_fast.data.images import UTMOST_PIXELS, load_rgb, resize_to_fit
from mirip_fast.errors import ImageError

_LOADER = "mirip_fast.portfolio.thumbnails:encode_job"
_QUALITY = 74
_EFFORT = 2  # of 6: two thirds of the slowest one's gain in size for a third of its time
_STEPS = (1.0, 0.7, 0.5)  # sides to try, as shares of the largest


@dataclass(frozen=True)
class Thumbnail:
    """A small copy of one picture, or why there is none.

    Attributes:
        webp: the content of a WebP file; empty if the picture could not be read.
        width, height: in pixels; 0 if it could not be read.
        reason: why it could not be read, one line.
    """

    webp: bytes
    width: int
    height: int
    reason: str | None = None


def make_thumbnails(
    paths: Iterable[Path], side: int, max_bytes: int, *, workers: int
) -> Iterator[Thumbnail]:
    """Make a small copy of each picture, upright, in the order of ``paths``.

    Args:
        paths: image files.
        side: longest side in pixels; smaller pictures keep their size.
        max_bytes: a copy that would be larger is made smaller, down to half of ``side``.
        workers: processes; 0 decodes in this one.
    """
    sides = tuple(max(16, round(side * step)) for step in _STEPS)
    jobs = (DecodeJob(i, path, sides, "squash", True) for i, path in enumerate(paths))
    with DecodePool(workers, loader=_LOADER) as pool:
        for done in pool.decode(jobs):
            if done.reason is not None:
                yield Thumbnail(b"", 0, 0, done.reason)
                continue
            copies = [bytes(buffer) for buffer in done.buffers]
            kept = next((i for i, copy in enumerate(copies) if len(copy) <= max_bytes), -1)
            scale = min(1.0, sides[kept] / max(done.width, done.height))
            width, height = (max(1, round(side * scale)) for side in (done.width, done.height))
            yield Thumbnail(copies[kept], width, height)


def encode_job(job: DecodeJob, _: Choose) -> Decoded:
    """Decode one picture safely and encode it at each of the job's sizes: runs in a decoding process.

    Returns:
        ``buffers`` are the WebP files; ``width`` and ``height`` those of the largest.
    """
    started = time.perf_counter()
    try:
        largest = max(job.sizes)
        picture = load_rgb(job.read()[0], draft_size=largest, max_pixels=UTMOST_PIXELS)
        copies = []
        for side in job.sizes:
            # The next size is made from this one: it is smaller, and twice resized is not seen.
            picture = resize_to_fit(picture, side)
            copies.append(_encode(picture))
            if side == largest:
                width, height = picture.size
    except (ImageError, OSError, MemoryError) as error:
        reason = str(error) or type(error).__name__
        return Decoded(job.index, b"", 0, 0, (), reason, time.perf_counter() - started)
    buffers = tuple(memoryview(copy) for copy in copies)
    seconds = time.perf_counter() - started
    return Decoded(job.index, b"", width, height, buffers, None, seconds, sizes=job.sizes)


def encode_picture(picture: Image.Image, side: int) -> bytes:
    """An RGB picture as a WebP file, its longer side at most ``side`` pixels."""
    return _encode(resize_to_fit(picture, side))


def _encode(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "WEBP", quality=_QUALITY, method=_EFFORT)
    return stream.getvalue()
