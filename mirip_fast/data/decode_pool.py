"""Decoding images in several processes, so that no file can harm the run.

A decoder that crashes, hangs or eats its memory costs one image: its process is replaced. Results come
in the order of the jobs, and only a window of images is in flight, so memory stays flat for any number.

Each process has a thread here that talks to it ("lane"). A lane keeps one job waiting in its process
beside the one being decoded, so that the process never waits for this one. Pixels come over the socket
as they are: 756 x 756 of them take a third of a millisecond, where pickling takes six, and unlike shared
memory there is nothing that a killed process could leave behind.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from mirip_fast.closing import Closing
from mirip_fast.data.decode_process import DecodeProcess, WorkerLostError
from mirip_fast.data.decode_worker import Choose, Decoded, DecodeJob, failure, find_loader
from mirip_fast.data.image_files import read_image
from mirip_fast.data.images import FIT, UTMOST_PIXELS
from mirip_fast.data.pieces import Piece
from mirip_fast.data.places import local_piece
from mirip_fast.data.remote import is_remote
from mirip_fast.errors import ConfigError, ImageError, MiripError
from mirip_fast.files import temporary_folder
from mirip_fast.threads import WorkThread

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["WHOLE", "DecodeJob", "DecodePool", "Decoded", "load_pictures", "picture_job"]

#: The address space one process may take: room for the largest file that is read and its pixels.
MEMORY_LIMIT_BYTES = 3 << 30

_LOADER = "mirip_fast.data.decode_worker:decode_job"
_JOBS_PER_LANE = 2
_FETCHING = 16  # threads
_FETCHED_AHEAD = 48  # images fetched or being fetched before they are asked for
_CLOSED = "the decoding pool is closed"

#: As the longest side of a picture: its own size.
WHOLE = 1 << 20

_Task = tuple[DecodeJob, "Future[Decoded]", Choose]


class DecodePool(Closing):
    """Worker processes that decode images; a context manager.

    Args:
        workers: how many processes; 0 decodes in this process, without protection against crashes and
            hangs, with the same results.
        timeout_s: seconds after which a decoder is taken to hang, is killed, and its image fails.
        memory_limit_bytes: address space that each process may take; an image that needs more fails.
        window: how many images may be in flight or waiting for the consumer at once; None takes
            64, or 8 per process if that is more.
        loader: the function that decodes, as ``module:function``; it takes a :class:`DecodeJob` and
            a function to ask, and returns a :class:`Decoded`.

    Raises:
        ConfigError: ``workers`` or ``window`` make no sense.
    """

    def __init__(
        self,
        workers: int,
        *,
        timeout_s: float = 60.0,
        memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
        window: int | None = None,
        loader: str = _LOADER,
    ) -> None:
        if workers < 0:
            raise ConfigError(f"--workers must be 0 or more, not {workers}")
        if window is not None and window < 1:
            raise ConfigError(f"The window must be at least 1 image, not {window}")
        self._window = window or max(64, 8 * workers)
        self._loader = loader
        self._closed = threading.Event()
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._lanes = [
            _Lane(self._tasks, self._closed, timeout_s, memory_limit_bytes, loader)
            for _ in range(workers)
        ]

    def decode(self, jobs: Iterable[DecodeJob], choose: Choose | None = None) -> Iterator[Decoded]:
        """Decode images.

        Args:
            jobs: taken lazily, one window ahead of the results.
            choose: for jobs that ask: content hash → the sizes that are wanted, perhaps none. Called
                from several threads at once; has to be quick. None where no job asks.

        Yields:
            One result per job, in order; a failed image is a result with a reason.

        Raises:
            MiripError: no decoding process can be started, or the pool is closed.
        """
        choose = choose or _nothing
        if not self._lanes:
            loader = find_loader(self._loader)
            yield from (loader(job, choose) for job in jobs)
            return
        waiting: deque[Future[Decoded]] = deque()
        with _PlacedJobs() as places:
            try:
                for job, reason in places.of(jobs):
                    if self._closed.is_set():
                        raise MiripError(_CLOSED)
                    future: Future[Decoded] = Future()
                    waiting.append(future)
                    if reason is not None:  # refused or not to be had: nothing to decode
                        future.set_result(failure(job, reason, 0.0))
                    else:
                        future.add_done_callback(partial(_release, places, job))
                        self._tasks.put((job, future, choose))
                    if len(waiting) >= self._window:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def close(self) -> None:
        """End all processes at once; jobs under way are given up."""
        self._closed.set()
        for lane in self._lanes:
            lane.kill()
        for _ in self._lanes:
            self._tasks.put(None)
        for lane in self._lanes:
            lane.wait(5.0)
        while True:
            try:
                task = self._tasks.get_nowait()
            except Empty:
                return
            if task is not None and task[1].set_running_or_notify_cancel():
                task[1].set_exception(MiripError(_CLOSED))


def picture_job(index: int, path: Path, side: int = WHOLE, *, ask: bool = False) -> DecodeJob:
    """A job for a picture to look at: upright RGB, its longer side at most ``side`` pixels.

    It is not refused for its size: pictures are looked at that have been admitted before. What the
    process may take of memory and time holds all the same.
    """
    return DecodeJob(index, path, (side,), FIT, True, ask, max_pixels=UTMOST_PIXELS)


def load_pictures(
    paths: Iterable[Path], side: int = WHOLE, *, workers: int = 1
) -> Iterator[Image | ImageError]:
    """Decode pictures to look at, in processes that no file can harm.

    Args:
        paths: image files.
        side: the longer side of larger ones is made this long, in pixels.
        workers: processes; 0 decodes in this one, without protection.

    Yields:
        For each path, in order, the picture as upright RGB, or why it can not be read.
    """
    from PIL import Image

    with DecodePool(workers, window=2 * workers or None) as pool:
        for done in pool.decode(picture_job(i, path, side) for i, path in enumerate(paths)):
            if done.reason is None:
                yield Image.fromarray(done.images[0])
            else:
                yield ImageError(done.reason)


def _release(places: _PlacedJobs, job: DecodeJob, _: Future[Decoded]) -> None:
    places.release(job)


def _nothing(_: bytes) -> tuple[int, ...]:
    return ()


class _Lane(WorkThread):
    """The thread that owns one process: hands it jobs, takes results, replaces it when it is lost.

    The process is started in this thread, as Linux ends a process when the thread that started it ends.
    """

    def __init__(
        self,
        tasks: SimpleQueue[_Task | None],
        closed: threading.Event,
        timeout_s: float,
        memory_limit_bytes: int,
        loader: str,
    ) -> None:
        super().__init__("mirip-decode", self._serve)
        self._tasks = tasks
        self._closed = closed
        self._timeout_s = timeout_s
        self._memory_limit_bytes = memory_limit_bytes
        self._loader = loader
        self._process: DecodeProcess | None = None
        self._lock = threading.Lock()  # between kill() and a new process
        self._taken: deque[_Task] = deque()
        self._sent = 0  # how many of the taken the present process has
        self.start()

    def kill(self) -> None:
        """End the process now; called from other threads, once the pool is closed."""
        with self._lock:
            if self._process is not None:
                self._process.kill()

    def _serve(self) -> None:
        """Until the pool is closed."""
        with suppress(Exception):  # should this fail, the first job tries again and tells why
            self._start_process()
        while not self._closed.is_set() and self._take():
            self._finish_one()
        self._drop_process()
        for _, future, _ in self._taken:
            future.set_exception(MiripError(_CLOSED))

    def _finish_one(self) -> None:
        job, future, choose = self._taken[0]
        try:
            result = self._next_result(job, choose)
        except Exception as error:  # for the consumer to see, or it would wait for ever
            self._drop_process()
            future.set_exception(error)
        else:
            if self._closed.is_set():
                return  # it may have been lost only because the pool was closed
            future.set_result(result)
        self._taken.popleft()

    def _take(self) -> bool:
        """Take as many tasks as there is room for, at least one; False if there will be none."""
        while len(self._taken) < _JOBS_PER_LANE:
            try:
                task = self._tasks.get(block=not self._taken)
            except Empty:
                break
            if task is None:
                return False
            if task[1].set_running_or_notify_cancel():
                self._taken.append(task)
        return True

    def _next_result(self, job: DecodeJob, choose: Choose) -> Decoded:
        process = self._send_taken()
        try:
            result = process.receive(job, self._timeout_s, choose)
        except WorkerLostError as lost:
            self._drop_process()
            return failure(job, str(lost), process.seconds(), lost.sha256)
        self._sent -= 1
        return result

    def _send_taken(self) -> DecodeProcess:
        """Hand the process all that was taken; replaces one that died while it had nothing to do."""
        process = self._process or self._start_process()
        while self._sent < len(self._taken):
            if self._sent == 0:
                process.start_clock()
            if process.send(self._taken[self._sent][0]):
                self._sent += 1
            elif self._sent == 0:
                self._drop_process()
                process = self._start_process()
            else:
                break  # it died at the job before, which receive() will tell
        return process

    def _start_process(self) -> DecodeProcess:
        process = DecodeProcess(self._memory_limit_bytes, self._loader)
        with self._lock:
            self._process = process
            if self._closed.is_set():
                process.kill()
        try:
            process.wait_until_ready()
        except MiripError:
            self._drop_process()
            raise
        return process

    def _drop_process(self) -> None:
        with self._lock:
            process, self._process = self._process, None
        self._sent = 0
        if process is not None:
            process.kill()
            process.close()


class _PlacedJobs(Closing):
    """Finds the place of each job's bytes; a context manager that outlives the decoding.

    A member of a tar on this machine is read by the process itself, by its offset. What lies behind an
    address is fetched here, many at a time as each answer takes long, into a temporary file that lives
    until the image is decoded: so the processes need no network, no credentials and no packages for them.
    """

    def __init__(self) -> None:
        self._threads: ThreadPoolExecutor | None = None
        self._folder: Path | None = None
        self._ending = ExitStack()

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
            while waiting and (waiting[0][1] is None or len(waiting) > _FETCHED_AHEAD):
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
            self._threads = ThreadPoolExecutor(_FETCHING, "mirip-fetch")
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
