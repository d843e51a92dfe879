"""One decoding process, seen from the process that uses it."""

from __future__ import annotations

import json
import math
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from mirip_fast.data.decode_worker import Choose, Decoded, DecodeJob, encode_choice, encode_job
from mirip_fast.data.image_files import one_line
from mirip_fast.errors import MiripError

# Not `python -m`: that would depend on the working folder and the environment. The worker gets exactly
# this process's import path, needs no site initialisation, and never imports this process's main module.
_START = (
    "import json, sys; sys.path[:], arguments = json.loads(sys.argv[1]); "
    "from mirip_fast.data.decode_worker import serve; serve(*arguments)"
)
_START_SECONDS = 60.0
# Several processes with several threads each would fight over the cores.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
# glibc would give the pixels of each picture back to the system and ask for them anew: a fifth as many page
# faults, and 4 % of decoding's processor time, measured with photographs of a megapixel.
_KEEP_PIXELS = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
}
_PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])


class WorkerLostError(Exception):
    """The process crashed or hung while it worked on a job; the message is the reason for users.

    Attributes:
        sha256: of the content it was working on; empty if it did not get so far as to tell.
    """

    sha256 = b""


class DecodeProcess:
    """A decoding process; it starts in the background.

    Args:
        memory_limit_bytes: the most address space it may take.
        loader: the function that it runs on each job, ``module:function``.

    Raises:
        MiripError: it could not be started; says why.
    """

    def __init__(self, memory_limit_bytes: int, loader: str) -> None:
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
        except WorkerLostError as error:
            raise MiripError(_cannot_start(_last_line(self._remarks) or str(error))) from error

    def send(self, job: DecodeJob) -> bool:
        """Hand it a job, to be done after those that it has; False if it is dead."""
        try:
            self._channel.sendall(encode_job(job))
        except OSError:
            return False
        return True

    def start_clock(self) -> None:
        """Note that it begins its next job now."""
        self._busy_since = time.monotonic()

    def receive(self, job: DecodeJob, timeout_s: float, choose: Choose) -> Decoded:
        """Wait for the result of the oldest job sent.

        Args:
            job: that job.
            timeout_s: seconds it may take.
            choose: answers the process if it asks.

        Raises:
            WorkerLostError: it crashed, or took longer than ``timeout_s`` seconds.
        """
        asked = b""
        try:
            header = self._read_header(self._busy_since + timeout_s - time.monotonic())
            while "ask" in header:
                asked = bytes.fromhex(header["ask"])
                waited = time.monotonic()
                sizes = choose(asked)  # may have to wait until a large cache was looked through
                self._busy_since += time.monotonic() - waited
                self._channel.sendall(encode_choice(sizes))
                header = self._read_header(self._busy_since + timeout_s - time.monotonic())
            return self._finish(job, header)
        except (WorkerLostError, BrokenPipeError, ConnectionResetError) as error:
            lost = error if isinstance(error, WorkerLostError) else None
            lost = lost or WorkerLostError(self._how_it_ended())
            lost.sha256 = asked
            raise lost from None

    def _finish(self, job: DecodeJob, header: dict[str, Any]) -> Decoded:
        if header["index"] != job.index:
            raise WorkerLostError(f"the decoder answered for image {header['index']}")
        buffers = []
        for shape in header["shapes"]:
            buffer = memoryview(bytearray(math.prod(shape)))
            self._fill(buffer)
            buffers.append(buffer.cast("B", shape))
        self.start_clock()
        return Decoded(
            header["index"],
            bytes.fromhex(header["sha256"]),
            header["width"],
            header["height"],
            tuple(buffers),
            header["reason"],
            header["seconds"],
            header["cpu_seconds"],
            tuple(header["sizes"]),
            tuple(header["stamp"]) if header["stamp"] else None,
            header["flat"],
        )

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
            raise WorkerLostError(f"the decoder hung: no result after {self.seconds():.0f} seconds")
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
                raise WorkerLostError(self._how_it_ended())
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
        f"A decoding process can not be started: {one_line(reason)}. "
        "Without such processes it works too, if slower: --workers 0"
    )


def _last_line(remarks: IO[bytes]) -> str:
    remarks.seek(0)
    lines = remarks.read().decode("utf-8", "replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "")
