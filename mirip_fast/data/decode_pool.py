"""Decoding images in several processes, so that no file can harm the run.

A decoder that crashes, hangs or eats its memory costs one image: its process is replaced. Results come
in the order of the jobs, and only a window of images is in flight, so memory stays flat for any number.

Each process has a thread here that talks to it. Pixels come over the socket as they are: 756 x 756 of them
take a third of a millisecond, where pickling takes six, and unlike shared memory there is nothing that a
killed process could leave behind.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from mirip_fast.data.decode_worker import (
    Choose,
    Decoded,
    DecodeJob,
    decoded_from,
    encode_job,
    encode_sizes,
    failure,
    find_loader,
)
from mirip_fast.data.image_files import one_line
from mirip_fast.data.images import FIT, UTMOST_PIXELS
from mirip_fast.data.remote import is_remote
from mirip_fast.data.sources import Piece, piece_of, read_image
from mirip_fast.errors import ConfigError, ImageError, MiripError
from mirip_fast.files import temporary_folder
from mirip_fast.runtime import Closing, WorkThread

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["WHOLE", "DecodeJob", "DecodePool", "Decoded", "load_pictures", "picture_job"]

#: The address space one process may take: room for the largest file that is read and its pixels.
MEMORY_LIMIT_BYTES = 3 << 30
#: As the longest side of a picture: its own size.
WHOLE = 1 << 20

_LOADER = "mirip_fast.data.decode_worker:decode_job"
_FETCHING = 16  # threads
_CLOSED = "the decoding pool is closed"

# Not `python -m`: that would depend on the working folder and the environment. The worker gets exactly
# this process's import path, needs no site initialisation, and never imports this process's main module.
_START = (
    "import json, sys; sys.path[:], arguments = json.loads(sys.argv[1]); "
    "from mirip_fast.data.decode_worker import serve; serve(*arguments)"
)
_START_SECONDS = 60.0
_PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])
# Several processes with several threads each would fight over the cores.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
# glibc would give the pixels of each picture back to the system and ask for them anew: a fifth as many page
# faults, and 4 % of decoding's processor time, measured with photographs of a megapixel.
_KEEP_PIXELS = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
}

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
        self._loader, self._timeout_s, self._memory_limit = loader, timeout_s, memory_limit_bytes
        self._closed = threading.Event()
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._lock = (
            threading.Lock()
        )  # around the beginning of fetching, and between a new process and close()
        self._processes: dict[int, _Process] = {}  # by the number of the thread that owns it
        self._threads = [
            WorkThread("mirip-decode", partial(self._serve, i)) for i in range(workers)
        ]
        for thread in self._threads:
            thread.start()
        self._fetchers: ThreadPoolExecutor | None = None
        self._files: Iterator[Path] = iter(())  # where what is fetched goes
        self._ending = ExitStack()

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
        choose = choose or (lambda _: ())
        if not self._threads:
            loader = find_loader(self._loader)
            yield from (loader(job, choose) for job in jobs)
            return
        waiting: deque[Future[Decoded]] = deque()
        try:
            for job in jobs:
                if self._closed.is_set():
                    raise MiripError(_CLOSED)
                waiting.append(self._start(job, choose))
                if len(waiting) >= self._window:
                    yield _result(waiting.popleft())
            while waiting:
                yield _result(waiting.popleft())
        finally:
            for future in waiting:
                future.cancel()

    def close(self) -> None:
        """End all processes at once; jobs under way are given up."""
        self._closed.set()
        with self._lock:
            for process in self._processes.values():
                process.kill()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.wait(5.0)
        with suppress(Empty):
            while True:
                if (task := self._tasks.get_nowait()) is not None:
                    task[1].cancel()
        if self._fetchers is not None:
            self._fetchers.shutdown(wait=False, cancel_futures=True)
        self._ending.close()

    def _start(self, job: DecodeJob, choose: Choose) -> Future[Decoded]:
        """Have a job done.

        A member of a tar on this machine is read by the process itself, by its offset. What lies behind an
        address is fetched here, many at a time as each answer takes long, into a temporary file that lives
        until the image is decoded: so the processes need no network, no credentials and no packages for it.
        """
        future: Future[Decoded] = Future()
        if is_remote(job.path):
            with self._lock:
                if self._fetchers is None:
                    folder = self._ending.enter_context(temporary_folder())
                    self._files = (folder / str(number) for number in itertools.count())
                    self._fetchers = ThreadPoolExecutor(_FETCHING, "mirip-fetch")
                file = next(self._files)
            fetching = self._fetchers.submit(self._fetch, (job, future, choose), file)
            fetching.add_done_callback(lambda done: done.cancelled() and future.cancel())
            return future
        try:
            self._put((replace(job, piece=piece_of(job.path)), future, choose))
        except ImageError as error:
            future.set_result(failure(job, str(error), 0.0))
        return future

    def _put(self, task: _Task) -> None:
        self._tasks.put(task)
        if self._closed.is_set():  # perhaps too late to be seen there
            task[1].cancel()

    def _fetch(self, task: _Task, file: Path) -> None:
        """Put what lies behind an address into a file, and have that decoded."""
        job, future, choose = task
        try:
            data, stamp = read_image(job.path)
            future.add_done_callback(lambda _: file.unlink(missing_ok=True))
            file.write_bytes(data)
        except ImageError as error:
            future.set_result(failure(job, str(error), 0.0))
        except OSError as error:
            why = f"what was fetched cannot be put there ({error.strerror})"
            told = MiripError(f"{file.parent}: {why}; TMPDIR=… names another folder")
            future.set_exception(MiripError(_CLOSED) if self._closed.is_set() else told)
        except Exception as error:  # for the consumer to see, or it would wait for ever
            future.set_exception(error)
        else:
            piece = Piece(str(file), 0, len(data), stamp=stamp)
            self._put((replace(job, piece=piece), future, choose))

    def _serve(self, number: int) -> None:
        """What a thread does until the pool is closed: it owns a process, and replaces it when it is lost.

        The process is started in this thread, as Linux ends a process when the thread that started it ends.
        """
        with suppress(Exception):  # should this fail, the first job tries again and tells why
            self._start_process(number)
        while not self._closed.is_set() and (task := self._tasks.get()) is not None:
            self._do(number, *task)
            del task  # or its pixels stay until the next one
        self._drop_process(number)

    def _do(self, number: int, job: DecodeJob, future: Future[Decoded], choose: Choose) -> None:
        if not future.set_running_or_notify_cancel():
            return
        result: Decoded | Exception
        try:
            result = self._decode(number, job, choose)
        except Exception as error:  # for the consumer to see, or it would wait for ever
            self._drop_process(number)
            result = error
        if self._closed.is_set():  # it may have been lost only because of that
            result = MiripError(_CLOSED)
        if isinstance(result, Decoded):
            future.set_result(result)
        else:
            future.set_exception(result)

    def _decode(self, number: int, job: DecodeJob, choose: Choose) -> Decoded:
        process = self._processes.get(number)
        if process is None or not process.send(job):  # it died while it had nothing to do
            self._drop_process(number)
            process = self._start_process(number)
            process.send(job)
        try:
            return process.receive(job, self._timeout_s, choose)
        except _LostError as lost:
            self._drop_process(number)
            return failure(job, str(lost), process.seconds(), process.asked)

    def _start_process(self, number: int) -> _Process:
        process = _Process(self._memory_limit, self._loader)
        with self._lock:
            self._processes[number] = process
            if self._closed.is_set():
                process.kill()
        try:
            process.wait_until_ready()
        except MiripError:
            self._drop_process(number)
            raise
        return process

    def _drop_process(self, number: int) -> None:
        with self._lock:
            process = self._processes.pop(number, None)
        if process is not None:
            process.kill()
            process.close()


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
        For each path, in order, the picture as upright RGB, or why it cannot be read.
    """
    from PIL import Image

    with DecodePool(workers, window=2 * workers or None) as pool:
        for done in pool.decode(picture_job(i, path, side) for i, path in enumerate(paths)):
            if done.reason is None:
                yield Image.fromarray(done.images[0])
            else:
                yield ImageError(done.reason)


def _result(future: Future[Decoded]) -> Decoded:
    try:
        return future.result()
    except CancelledError:
        raise MiripError(_CLOSED) from None


class _LostError(Exception):
    """The process crashed or hung at its job; the message is the reason for users."""


class _Process:
    """A decoding process; it starts in the background.

    Attributes:
        asked: SHA-256 of the content it is working on; empty until it has told.

    Raises:
        MiripError: it could not be started; says why.
    """

    def __init__(self, memory_limit_bytes: int, loader: str) -> None:
        self.asked = b""
        self._busy_since = time.monotonic()
        self._channel, theirs = socket.socketpair()
        # What it has to say if it does not start.
        self._remarks = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        arguments = [theirs.fileno(), os.getpid(), memory_limit_bytes, loader]
        config = json.dumps([[_PACKAGE_PARENT, *sys.path], arguments])
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", _START, config],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=self._remarks,
                    pass_fds=[theirs.fileno()],
                    # Out of reach of Ctrl-C from the first moment on.
                    start_new_session=True,
                    env={**_KEEP_PIXELS, **os.environ, **_ONE_THREAD},
                )
            except OSError as error:
                self._channel.close()
                self._remarks.close()
                raise MiripError(_cannot_start(str(error))) from error

    def wait_until_ready(self) -> None:
        """Wait until it takes jobs.

        Raises:
            MiripError: it ended or hung before that; the message has its last words.
        """
        try:
            self._read_header(_START_SECONDS)
        except _LostError as error:
            self._remarks.seek(0)
            said = self._remarks.read().decode("utf-8", "replace").strip().split("\n")
            raise MiripError(_cannot_start(said[-1] or str(error))) from error

    def send(self, job: DecodeJob) -> bool:
        """Hand it a job; False if it is dead."""
        self._busy_since, self.asked = time.monotonic(), b""
        try:
            self._channel.sendall(encode_job(job))
        except OSError:
            return False
        return True

    def receive(self, job: DecodeJob, timeout_s: float, choose: Choose) -> Decoded:
        """Wait for the result of the job sent; ``choose`` answers the process if it asks.

        Raises:
            _LostError: it crashed, or took longer than ``timeout_s`` seconds.
        """
        header = self._read_header(self._busy_since + timeout_s - time.monotonic())
        if "ask" in header:
            self.asked = bytes.fromhex(header["ask"])
            waited = time.monotonic()
            sizes = choose(self.asked)  # may have to wait until a large cache was looked through
            self._busy_since += time.monotonic() - waited
            with suppress(OSError):  # it is dead, which is told when it is read from
                self._channel.sendall(encode_sizes(sizes))
            header = self._read_header(self._busy_since + timeout_s - time.monotonic())
        if header["index"] != job.index:
            raise _LostError(f"the decoder answered for image {header['index']}")
        buffers = []
        for shape in header["shapes"]:
            buffer = memoryview(bytearray(math.prod(shape)))
            self._fill(buffer)
            buffers.append(buffer.cast("B", shape))
        return decoded_from(header, tuple(buffers))

    def seconds(self) -> float:
        """How long it has been at its present job."""
        return time.monotonic() - self._busy_since

    def kill(self) -> None:
        """End it at once; may be called from any thread, and again."""
        self._process.kill()

    def close(self) -> None:
        """Let go of a killed process."""
        # A process stuck in a dead network drive outlives even this signal for a while: leave it.
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1.0)
        self._channel.close()
        self._remarks.close()

    def _read_header(self, timeout_s: float) -> dict[str, Any]:
        # Time that this process itself slept (a closed laptop) does not count against an answer that is
        # already here: even past the deadline there is one look.
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        if not poll.poll(max(0, round(timeout_s * 1000))):
            raise _LostError(f"the decoder hung: no result after {self.seconds():.0f} seconds")
        size = bytearray(4)
        self._fill(memoryview(size))
        text = bytearray(int.from_bytes(size, "big"))
        self._fill(memoryview(text))
        header: dict[str, Any] = json.loads(text)
        return header

    def _fill(self, buffer: memoryview) -> None:
        while buffer:
            try:
                # One system call for all: each return from one may have to wait for other threads.
                count = self._channel.recv_into(buffer, flags=socket.MSG_WAITALL)
            except OSError:
                count = 0
            if count == 0:
                raise _LostError(self._how_it_ended())
            buffer = buffer[count:]

    def _how_it_ended(self) -> str:
        try:
            status = self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "the decoder stopped answering"
        if status >= 0:
            return f"the decoder crashed (exit status {status})"
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = f"signal {-status}"
        return f"the decoder crashed ({name})"


def _cannot_start(reason: str) -> str:
    return (
        f"A decoding process cannot be started: {one_line(reason)}. "
        "Without such processes it works too, if slower: --workers 0"
    )
