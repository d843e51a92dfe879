"""Training and validation images as batches of pixels, decoded and augmented in other processes."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from mirip_fast.closing import Closing
from mirip_fast.data.decode_pool import DecodeJob, DecodePool
from mirip_fast.data.image_files import read_image_bytes
from mirip_fast.data.images import UTMOST_PIXELS, decode_squares, to_array
from mirip_fast.errors import DataError, ImageError, TrainingError
from mirip_fast.finetune.augment import decode_size, make_augmentation
from mirip_fast.finetune.plan import Sample
from mirip_fast.runtime import end_with_parent

# A forked process has the decoded pictures and the imported packages of this one at once, and for nothing.
_PROCESSES: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
_LENGTH_BYTES = 8


class Pictures(Dataset[Any]):
    """Samples → pixels.

    Args:
        paths: image files.
        size: side in pixels of what the model sees.
        resize: how a picture becomes square.
        draft: whether JPEGs are decoded at reduced scale.
        preset: of the augmentation.
        kept: decoded squares [n, side, side, 3] uint8, see :func:`decode_all`.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        size: int,
        *,
        resize: str = "squash",
        draft: bool = True,
        preset: str = "none",
        kept: torch.Tensor | None = None,
    ):
        self.paths = [str(path) for path in paths]
        self.size, self.resize, self.draft, self.kept = size, resize, draft, kept
        self.side = decode_size(preset, size)
        self.augment = make_augmentation(preset, size)

    def __getitem__(self, sample: Sample) -> torch.Tensor | str:
        """[size, size, 3] uint8, or why it can not be read (an exception would lose its wording)."""
        try:
            picture = self._augmented(sample.image, sample.seed)
            if sample.partner < 0:
                return picture
            other = self._augmented(sample.partner, sample.seed + 1)
        except ImageError as error:
            return f"{self.paths[sample.image]}: {error}"
        if sample.box is None:
            mixture = sample.share * picture.float() + (1 - sample.share) * other.float()
            return mixture.round().to(torch.uint8)
        left, top, right, bottom = sample.box
        picture[top:bottom, left:right] = other[top:bottom, left:right]
        return picture

    def _augmented(self, index: int, seed: int) -> torch.Tensor:
        square = self.kept[index] if self.kept is not None else self._decode(index)
        if self.augment is None:
            return square.clone()
        with torch.random.fork_rng(devices=[]):  # in the main process others draw from it too
            torch.manual_seed(seed)
            augmented: torch.Tensor = self.augment(square.permute(2, 0, 1))
        return augmented.permute(1, 2, 0).contiguous()

    def _decode(self, index: int) -> torch.Tensor:
        data = read_image_bytes(Path(self.paths[index]))
        squares = decode_squares(
            data, [self.side], self.resize, draft=self.draft, max_pixels=UTMOST_PIXELS
        )
        return torch.from_numpy(to_array(squares.images[0]))


def decode_all(pictures: Pictures, workers: int) -> torch.Tensor:
    """All pictures' squares [n, side, side, 3] uint8, in memory that the workers of :class:`Batches` see.

    Args:
        pictures: what to decode.
        workers: processes that decode.

    Raises:
        DataError: one can not be read; names it.
    """
    n, side = len(pictures.paths), pictures.side
    kept = torch.empty((n, side, side, 3), dtype=torch.uint8)
    if _PROCESSES.get_start_method() != "fork":
        kept.share_memory_()  # type: ignore[no-untyped-call]
    jobs = (
        DecodeJob(i, Path(path), (side,), pictures.resize, pictures.draft, max_pixels=UTMOST_PIXELS)
        for i, path in enumerate(pictures.paths)
    )
    with DecodePool(workers) as pool:
        for decoded in pool.decode(jobs):
            if decoded.reason is not None:
                raise DataError(f"{pictures.paths[decoded.index]}: {decoded.reason}")
            kept[decoded.index] = torch.from_numpy(decoded.images[0])
    return kept


class Batches(Closing):
    """Hands out batches, prepared ahead by worker processes that stay until it is closed.

    Pixels come over a socket of each worker's own. So nothing lies in /dev/shm, which is small in containers,
    and no lock is shared that a killed worker could hold for ever, as with torch's ``DataLoader``.

    Args:
        pictures: what to load.
        workers: processes; 0 loads in this one.
        prefetch: batches that each prepares ahead.
        pinned: whether batches lie in pinned memory, for quick copies to a GPU.

    Attributes:
        waited: seconds that :meth:`load` has waited for data since it was last set to 0.
    """

    def __init__(self, pictures: Pictures, *, workers: int, prefetch: int, pinned: bool):
        self.waited = 0.0
        self._pictures, self._pinned = pictures, pinned
        self._count, self._ahead = workers, workers * prefetch
        self._workers: list[_Worker] = []

    def load(self, batches: Sequence[Sequence[Sample]]) -> Iterator[torch.Tensor]:
        """Pixels [b, size, size, 3] uint8 of each batch; an empty one gives an empty tensor.

        Raises:
            DataError: an image can not be read; names it.
            TrainingError: a worker process can not be started, or was killed.
        """
        self._start()
        filled = [batch for batch in batches if batch]
        asked: deque[Future[torch.Tensor | str]] = deque()
        sent = 0
        try:
            for batch in batches:
                if not batch:
                    yield torch.empty((0, 1, 1, 3), dtype=torch.uint8)
                    continue
                started = time.perf_counter()
                while self._workers and sent < len(filled) and len(asked) <= self._ahead:
                    asked.append(self._workers[sent % self._count].ask(filled[sent]))
                    sent += 1
                pixels = asked.popleft().result() if asked else _stacked(self._pictures, batch)
                self.waited += time.perf_counter() - started
                if isinstance(pixels, str):
                    raise DataError(
                        f"{pixels}. It could be read before: bring it back, or take it out of the data."
                    )
                yield pixels
        finally:
            for future in asked:
                future.cancel()

    def close(self) -> None:
        """End the workers."""
        atexit.unregister(self.close)
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.close()
        self._workers.clear()

    def _start(self) -> None:
        if self._workers:
            return
        atexit.register(self.close)  # before multiprocessing, which would wait for its children
        try:
            while len(self._workers) < self._count:
                self._workers.append(_Worker(self._pictures, self._pinned))
        except (OSError, RuntimeError) as error:  # no more processes or threads, no memory
            begun = len(self._workers)
            self.close()
            raise TrainingError(
                f"Of {self._count} processes that decode training images only {begun} could be started "
                f"({error}). Fewer --loader-workers do too; 0 decodes in the main process."
            ) from error


class _Worker:
    """A process that makes batches, and the thread of this one that talks to it."""

    def __init__(self, pictures: Pictures, pinned: bool):
        self._pinned = pinned
        # The process is started in this thread, as Linux ends it when the thread that started it ends.
        self._thread = ThreadPoolExecutor(1, "mirip-load")
        self._channel, theirs = socket.socketpair()
        with theirs:
            self._process = _PROCESSES.Process(
                target=_serve, args=(pictures, theirs, os.getpid()), daemon=True
            )
            try:
                self._thread.submit(self._process.start).result()
            except BaseException:
                self._channel.close()
                self._thread.shutdown(wait=False)
                raise

    @property
    def pid(self) -> int:
        """Of the process."""
        return int(self._process.pid)

    def ask(self, samples: Sequence[Sample]) -> Future[torch.Tensor | str]:
        """Have a batch made, after those that were asked for before."""
        return self._thread.submit(self._fetch, list(samples))

    def kill(self) -> None:
        """End it now, whatever it does."""
        self._process.kill()

    def close(self) -> None:
        """Let go of a killed process."""
        self._thread.shutdown(cancel_futures=True)
        # One that is stuck in a dead network drive outlives even that signal for a while: leave it.
        self._process.join(1.0)
        self._channel.close()

    def _fetch(self, samples: list[Sample]) -> torch.Tensor | str:
        try:
            _send(self._channel, pickle.dumps(samples))
            answer = pickle.loads(_receive(self._channel))
            if isinstance(answer, Exception):
                raise answer
            if isinstance(answer, str):
                return answer
            pixels = torch.empty(answer, dtype=torch.uint8, pin_memory=self._pinned)
            _fill(self._channel, pixels.numpy().data.cast("B"))
            return pixels
        except (EOFError, ConnectionError) as error:
            self._process.join(1.0)
            raise TrainingError(
                f"A process that decodes training images is gone ({_how_ended(self._process.exitcode)}). "
                "If memory ran out: fewer --loader-workers, or a smaller --prefetch. The checkpoints saved "
                "before are good."
            ) from error


def _serve(pictures: Pictures, channel: socket.socket, parent: int) -> None:
    """Answer with batches until the parent ends: the main function of a worker process."""
    end_with_parent(parent)
    # Schedulers signal every process of a job, and the parent decides when to stop.
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.set_wakeup_fd(-1)  # the parent's
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            samples = pickle.loads(_receive(channel))
            try:
                batch: torch.Tensor | str | Exception = _stacked(pictures, samples)
            except Exception as error:
                batch = RuntimeError(f"{type(error).__name__}: {error}")
            if isinstance(batch, torch.Tensor):
                _send(channel, pickle.dumps(tuple(batch.shape)))
                channel.sendall(batch.numpy().data.cast("B"))
            else:
                _send(channel, pickle.dumps(batch))


def _stacked(pictures: Pictures, samples: Sequence[Sample]) -> torch.Tensor | str:
    """[b, size, size, 3] uint8, or why an image can not be read."""
    items = []
    for sample in samples:
        item = pictures[sample]
        if isinstance(item, str):
            return item
        items.append(item)
    return torch.stack(items)


def _send(channel: socket.socket, data: bytes) -> None:
    channel.sendall(len(data).to_bytes(_LENGTH_BYTES, "big") + data)


def _receive(channel: socket.socket) -> bytearray:
    length = bytearray(_LENGTH_BYTES)
    _fill(channel, memoryview(length))
    data = bytearray(int.from_bytes(length, "big"))
    _fill(channel, memoryview(data))
    return data


def _fill(channel: socket.socket, buffer: memoryview) -> None:
    while buffer:
        count = channel.recv_into(buffer, flags=socket.MSG_WAITALL)
        if count == 0:
            raise EOFError
        buffer = buffer[count:]


def _how_ended(status: int | None) -> str:
    if status is None:
        return "it does not answer"
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"
