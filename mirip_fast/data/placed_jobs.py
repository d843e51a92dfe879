"""Giving decoding processes the bytes of images that are no files: members of tars, and what is remote.

A member of a tar on this machine is read by the process itself, by its offset. What lies behind an address
is fetched here, many at a time as each answer takes long, into a temporary file that lives until the image
is decoded: so the processes need no network, no credentials and no packages for them.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from mirip_fast.closing import Closing
from mirip_fast.data.decode_worker import DecodeJob
from mirip_fast.data.image_files import read_image
from mirip_fast.data.pieces import Piece
from mirip_fast.data.places import local_piece
from mirip_fast.data.remote import is_remote
from mirip_fast.errors import ImageError, MiripError
from mirip_fast.files import temporary_folder

_THREADS = 16
_AHEAD = 48  # images fetched or being fetched before they are asked for


class PlacedJobs(Closing):
    """Finds the place of each job's bytes; a context manager that outlives the decoding."""

    def __init__(self) -> None:
        self._threads: ThreadPoolExecutor | None = None
        self._folder: Path | None = None
        self._ending = contextlib.ExitStack()

    def close(self) -> None:
        """Give up what is being fetched, and remove what was."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
        self._ending.close()

    def of(self, jobs: Iterable[DecodeJob]) -> Iterator[tuple[DecodeJob, str | None]]:
        """Each job with the place of its bytes, in order; or why there is nothing to decode.

        Args:
            jobs: taken lazily; remote ones some ahead.
        """
        waiting: deque[tuple[DecodeJob, Future[Piece] | None]] = deque()
        for job in jobs:
            waiting.append((job, self._start(job)))
            while waiting and (waiting[0][1] is None or len(waiting) > _AHEAD):
                yield self._finish(*waiting.popleft())
        while waiting:
            yield self._finish(*waiting.popleft())

    def release(self, job: DecodeJob) -> None:
        """Remove what was fetched for a job."""
        if job.piece is not None and self._folder in Path(job.piece.file).parents:
            Path(job.piece.file).unlink(missing_ok=True)

    def _start(self, job: DecodeJob) -> Future[Piece] | None:
        if not is_remote(job.path):
            return None
        if self._threads is None or self._folder is None:
            self._folder = self._ending.enter_context(temporary_folder())
            self._threads = ThreadPoolExecutor(_THREADS, "mirip-fetch")
        return self._threads.submit(_fetch, job.path, self._folder / str(job.index))

    def _finish(
        self, job: DecodeJob, fetching: Future[Piece] | None
    ) -> tuple[DecodeJob, str | None]:
        try:
            piece = local_piece(job.path) if fetching is None else fetching.result()
        except ImageError as error:
            return job, str(error)
        return (job if piece is None else replace(job, piece=piece)), None


def _fetch(path: Path, file: Path) -> Piece:
    """Put what lies behind an address into a file."""
    data, stamp = read_image(path)
    try:
        file.write_bytes(data)
    except OSError as error:
        raise MiripError(
            f"{file.parent}: what was fetched can not be put there ({error.strerror}); TMPDIR=… names "
            "another folder"
        ) from error
    return Piece(str(file), 0, len(data), None, stamp)
