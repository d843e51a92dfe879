"""Small copies of pictures, decoded and encoded in parallel by the decoding processes.

They are WebP files: at the same quality half as large as JPEG, and every browser of the last five years
shows them. Each picture is encoded at a few sizes, and the largest that fits its share of bytes is kept,
so that a page of n pictures stays below a limit whatever they show.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import Image

from mirip_fast.data.decode_pool import Decoded, DecodeJob, DecodePool
from mirip_fast.data.decode_worker import Choose
from mirip_fast.data.images import UTMOST_PIXELS, load_rgb, resize_to_fit
from mirip_fast.errors import ImageError

_LOADERS = {kind: f"{__name__}:{kind.lower()}_job" for kind in ("WEBP", "JPEG")}
_QUALITY = 74
_EFFORT = 2  # of 6: two thirds of the slowest one's gain in size for a third of its time
_STEPS = (1.0, 0.7, 0.5)  # sides to try, as shares of the largest


def make_thumbnails(
    paths: Iterable[Path],
    side: int,
    max_bytes: int | None = None,
    *,
    workers: int,
    kind: str = "WEBP",
) -> Iterator[bytes]:
    """Make a small copy of each picture, upright, in the order of ``paths``.

    Args:
        paths: image files.
        side: longest side in pixels; smaller pictures keep their size.
        max_bytes: a copy that would be larger is made smaller, down to half of ``side``; None for any.
        workers: processes; 0 decodes in this one.
        kind: of file: WEBP or JPEG.

    Yields:
        The content of a file; empty for a picture that cannot be read.
    """
    sides = tuple(
        max(16, round(side * step)) for step in _STEPS[: 1 if max_bytes is None else None]
    )
    jobs = (DecodeJob(i, path, sides, "squash", True) for i, path in enumerate(paths))
    with DecodePool(workers, loader=_LOADERS[kind]) as pool:
        for done in pool.decode(jobs):
            copies = [bytes(buffer) for buffer in done.buffers] or [b""]
            fitting = (copy for copy in copies if max_bytes is None or len(copy) <= max_bytes)
            yield next(fitting, copies[-1])


def jpeg_job(job: DecodeJob, choose: Choose) -> Decoded:
    """:func:`webp_job` for JPEG files."""
    return webp_job(job, choose, "JPEG")


def webp_job(job: DecodeJob, _: Choose, kind: str = "WEBP") -> Decoded:
    """Decode one picture safely and encode it at each of the job's sizes: runs in a decoding process.

    Returns:
        ``buffers`` are the files.
    """
    started = time.perf_counter()
    copies, reason = [], None
    width = height = 0
    try:
        picture = load_rgb(job.read()[0], draft_size=max(job.sizes), max_pixels=UTMOST_PIXELS)
        width, height = picture.size
        for side in job.sizes:
            # The next size is made from this one: it is smaller, and twice resized is not seen.
            picture = resize_to_fit(picture, side)
            copies.append(memoryview(encode_picture(picture, side, kind)))
    except (ImageError, OSError, MemoryError) as error:
        copies, reason = [], str(error) or type(error).__name__
    seconds = time.perf_counter() - started
    return Decoded(job.index, b"", width, height, tuple(copies), reason, seconds, sizes=job.sizes)


def encode_picture(picture: Image.Image, side: int, kind: str = "WEBP") -> bytes:
    """An RGB picture as a WebP or JPEG file, its longer side at most ``side`` pixels."""
    stream = io.BytesIO()
    resize_to_fit(picture, side).save(stream, kind, quality=_QUALITY, method=_EFFORT)
    return stream.getvalue()
