"""What a decoding process does: read, hash, decode and resize one image after the other.

A worker imports Pillow, but neither torch nor NumPy (which rare kinds of pictures need), so that it starts
in a tenth of a second and stays small. It takes jobs from a socket and answers each in turn:

- job: one line of JSON, see :func:`encode_job`;
- answer: the length of a JSON header (4 bytes, big-endian), the header, then the raw pixels;
- where a job says ``ask``, a header with the content's hash comes first, and the worker waits for a line
  with the sizes wanted: so a file is read once, and decoded only if it has to be.

Before the first job it sends one empty header, to say that it is ready.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import signal
import socket
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mirip_fast.data.formats import pdf_pages
from mirip_fast.data.image_files import Stamp
from mirip_fast.data.images import (
    FIT,
    MAX_PIXELS,
    RESIZE_MODES,
    decode_squares,
    one_reason,
    to_bytes,
)
from mirip_fast.data.sources import Piece, read_image
from mirip_fast.errors import ConfigError, ImageError
from mirip_fast.runtime import end_with_parent

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class DecodeJob:
    """One image to decode.

    Attributes:
        index: the caller's number for it, given back unchanged.
        path: the file.
        sizes: side lengths in pixels of the squares wanted; all come from one reading of the file.
        mode: how the picture becomes square, one of ``RESIZE_MODES``; or ``FIT``, for pictures to look at.
        draft: whether a JPEG is decoded at reduced scale where that leaves twice the size or more.
        ask: whether to ask, once the hash is known, which of ``sizes`` are wanted at all.
        piece: where the content lies, for a tar's member or what was fetched; None: at ``path``.
        max_pixels: the largest picture that is decoded; JPEGs may be larger.
        srgb: whether colour profiles are applied.
    """

    index: int
    path: Path
    sizes: tuple[int, ...]
    mode: str
    draft: bool
    ask: bool = False
    piece: Piece | None = None
    max_pixels: int = MAX_PIXELS
    srgb: bool = True

    def __post_init__(self) -> None:
        if self.mode not in (*RESIZE_MODES, FIT):
            raise ConfigError(
                f"Unknown resize mode {self.mode!r}; there are {', '.join(RESIZE_MODES)}"
            )
        if not self.sizes or min(self.sizes) < 1:
            raise ConfigError(f"Image sizes must be at least 1 pixel, not {self.sizes}")

    def read(self) -> tuple[bytes, Stamp | None]:
        """The image's bytes, and what to remember their hash by.

        Raises:
            ImageError: it cannot be read.
        """
        return self.piece.read() if self.piece else read_image(self.path)


@dataclass(frozen=True, slots=True, eq=False)
class Decoded:
    """What became of one job.

    Attributes:
        index: the job's number.
        sha256: SHA-256 of exactly the bytes that were decoded, 32 bytes; empty if they were not read
            or the decoder did not live to tell.
        width: of the whole upright picture, in pixels; 0 on failure.
        height: likewise.
        buffers: per wanted size the bytes 0-255 of ``[size, size, 3]`` pixels (height, width, colour; of
            mode ``FIT`` ``[h, w, 3]``), C order, writable; empty on failure, and where none was wanted
            after asking.
        reason: why it failed, one line; None if it did not.
        seconds: time spent on it by its worker, waiting for answers left out.
        cpu_seconds: processor time spent on it by its worker.
        sizes: side lengths of ``buffers``.
        stamp: what to remember the hash by; None if the file is too young for that.
        flat: whether the picture is of a single colour.
        bad_profile: whether it has a colour profile that could not be used.
    """

    index: int
    sha256: bytes
    width: int
    height: int
    buffers: tuple[memoryview, ...]
    reason: str | None
    seconds: float
    cpu_seconds: float = 0.0
    sizes: tuple[int, ...] = ()
    stamp: Stamp | None = None
    flat: bool = False
    bad_profile: bool = False

    @property
    def images(self) -> tuple[NDArray[np.uint8], ...]:
        """The buffers as uint8 arrays; nothing is copied."""
        import numpy as np

        return tuple(np.asarray(buffer) for buffer in self.buffers)


#: Says which of the job's sizes are wanted of the content with this hash; none: it is not decoded.
Choose = Callable[[bytes], Sequence[int]]
#: What turns a job into its result.
Loader = Callable[[DecodeJob, Choose], Decoded]


def decode_job(job: DecodeJob, choose: Choose) -> Decoded:
    """Read, hash, decode and resize; whatever goes wrong becomes the result's reason.

    Args:
        job: the image.
        choose: asked if the job says so.
    """
    started, cpu_started = time.perf_counter(), time.thread_time()
    sha256, waited = b"", 0.0
    stamp: Stamp | None = None
    width = height = 0
    flat = bad_profile = False
    buffers: tuple[memoryview, ...] = ()
    sizes, reason = job.sizes, None
    try:
        with one_reason():
            data, stamp = job.read()
            sha256 = hashlib.sha256(data).digest()
        if job.ask:
            asked = time.perf_counter()
            sizes = tuple(choose(sha256))
            waited = time.perf_counter() - asked
        if sizes:
            with one_reason():
                squares = decode_squares(
                    data, sizes, job.mode,
                    draft=job.draft, max_pixels=job.max_pixels, srgb=job.srgb,
                )  # fmt: skip
                (width, height), flat = squares.size, squares.flat
                bad_profile = squares.bad_profile
                buffers = tuple(to_bytes(square) for square in squares.images)
    except ImageError as error:
        width, height, buffers, sizes, reason = 0, 0, (), (), str(error)
    return Decoded(
        job.index, sha256, width, height, buffers, reason,
        seconds=time.perf_counter() - started - waited,
        cpu_seconds=time.thread_time() - cpu_started,
        sizes=sizes,
        stamp=stamp,
        flat=flat,
        bad_profile=bad_profile,
    )  # fmt: skip


def count_pages(job: DecodeJob, _: Choose) -> Decoded:
    """How many pages a PDF has, as the result's ``height``; see :func:`mirip_fast.data.formats.pdf_pages`."""
    pages, reason = 0, None
    try:
        with one_reason():
            pages = pdf_pages(job.read()[0])
    except ImageError as error:
        reason = str(error)
    return Decoded(job.index, b"", 0, pages, (), reason, 0.0)


def failure(job: DecodeJob, reason: str, seconds: float, sha256: bytes = b"") -> Decoded:
    """The result of a job that failed."""
    return Decoded(job.index, sha256, 0, 0, (), reason, seconds)


def find_loader(name: str) -> Loader:
    """The function called ``module:function``."""
    module, _, function = name.partition(":")
    loader: Loader = getattr(importlib.import_module(module), function)
    return loader


def encode_job(job: DecodeJob) -> bytes:
    """A job as one line of ASCII JSON; file names that are not UTF-8 survive."""
    return json.dumps({**asdict(job), "path": str(job.path)}).encode("ascii") + b"\n"


def encode_sizes(sizes: Sequence[int]) -> bytes:
    """The answer to a worker's question, as one line."""
    return json.dumps(list(sizes)).encode("ascii") + b"\n"


def decoded_from(header: dict[str, Any], buffers: tuple[memoryview, ...]) -> Decoded:
    """The result that a worker's header and the pixels behind it tell."""
    plain = {name: header[name] for name in _PLAIN}
    stamp = tuple(header["stamp"]) if header["stamp"] else None
    sha256, sizes = bytes.fromhex(header["sha256"]), tuple(header["sizes"])
    return Decoded(**plain, sha256=sha256, sizes=sizes, stamp=stamp, buffers=buffers)


_PLAIN = [f.name for f in fields(Decoded) if f.name not in ("sha256", "sizes", "stamp", "buffers")]


def _decode_line(line: bytes) -> DecodeJob:
    job = json.loads(line)
    piece = None if job["piece"] is None else Piece(**job["piece"])
    return DecodeJob(
        **{**job, "path": Path(job["path"]), "sizes": tuple(job["sizes"]), "piece": piece}
    )


def _answer(channel: socket.socket, header: dict[str, Any], *buffers: memoryview) -> None:
    text = json.dumps(header).encode("ascii")
    channel.sendall(len(text).to_bytes(4, "big") + text)
    for buffer in buffers:
        channel.sendall(buffer)


def serve(channel_fd: int, parent: int, memory_limit_bytes: int, loader_name: str) -> None:
    """Answer jobs until the other side closes the channel: the main function of a worker process.

    Args:
        channel_fd: an inherited stream socket.
        parent: process id of the pool's process; the worker ends with it.
        memory_limit_bytes: the most address space it may take.
        loader_name: the function to run on each job, ``module:function``.
    """
    # The pool's process decides when to stop; a signal to the whole group must not look like a crash.
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    end_with_parent(parent)
    loader = find_loader(loader_name)
    _quieten()
    _limit_memory(memory_limit_bytes)
    channel = socket.socket(fileno=channel_fd)
    with suppress(BrokenPipeError, ConnectionResetError):  # the parent is gone
        _answer(channel, {})
        _silence_stderr()
        with channel.makefile("rb") as lines:

            def choose(sha256: bytes) -> Sequence[int]:
                _answer(channel, {"ask": sha256.hex()})
                line = lines.readline()
                if not line:
                    raise BrokenPipeError  # the other side is gone
                sizes: list[int] = json.loads(line)
                return sizes

            while line := lines.readline():
                result = loader(_decode_line(line), choose)
                header = {name: getattr(result, name) for name in (*_PLAIN, "sizes", "stamp")}
                header |= {
                    "sha256": result.sha256.hex(),
                    "shapes": [buffer.shape for buffer in result.buffers],
                }
                _answer(channel, header, *result.buffers)


def _quieten() -> None:
    """Settings that suit many small processes side by side."""
    from PIL import AvifImagePlugin

    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    warnings.simplefilter("ignore")  # Pillow warns of broken metadata
    with suppress(OSError):  # if the machine runs out of memory, rather this process than the run
        Path("/proc/self/oom_score_adj").write_text("700")


def _limit_memory(limit: int) -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    for kind, wanted in ((resource.RLIMIT_AS, limit), (resource.RLIMIT_CORE, 0)):
        _, hard = resource.getrlimit(kind)
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with suppress(OSError, ValueError):  # macOS refuses a limit below what is mapped already
            resource.setrlimit(kind, (soft, hard))


def _silence_stderr() -> None:
    """C libraries print their remarks about broken files to standard error."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)
