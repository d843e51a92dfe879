"""The group of processes that train one model together, or the one that trains alone.

Each process scores its share of a step's images. Scores, a few numbers, are exchanged; every process
then knows the loss of the whole batch and its derivative by each score, and takes the part of the
gradient that its own images make. The sum over the processes is the gradient of the whole batch, pairs
between images of different processes included, whatever their shares.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed, nn

from mirip_fast.errors import TrainingError
from mirip_fast.runtime import rank

T = TypeVar("T")

#: How long processes wait for one that is at work alone (filling a cache, writing a checkpoint). One that
#: is gone is noticed at once.
_PATIENCE = timedelta(hours=6)


class ProcessGroup:
    """This process among those that train one model together.

    Attributes:
        rank: its number, 0 is the one that writes.
        world: how many there are.
    """

    def __init__(self, rank: int = 0, world: int = 1):
        self.rank, self.world = rank, world

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def share(self, n: int) -> slice:
        """Which of n items are this process's: stretches whose lengths differ by at most one."""
        sizes = self._sizes(n)
        start = sum(sizes[: self.rank])
        return slice(start, start + sizes[self.rank])

    def _sizes(self, n: int) -> list[int]:
        return [n // self.world + (rank < n % self.world) for rank in range(self.world)]

    def gather(self, mine: torch.Tensor, n: int) -> torch.Tensor:
        """Everyone's [b] values (b as of :meth:`share`) → [n] in the order of the whole."""
        if self.world == 1:
            return mine
        sizes = self._sizes(n)
        padded = mine.new_zeros(max(sizes))
        padded[: len(mine)] = mine
        parts = [torch.empty_like(padded) for _ in sizes]
        with _others_needed():
            distributed.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is set in any process."""
        if self.world == 1:
            return flag
        value = torch.tensor([float(flag)], device=device)
        with _others_needed():
            distributed.all_reduce(value, distributed.ReduceOp.MAX)
        return bool(value.item())

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum everyone's gradients; a process without images of its own adds zeros."""
        if self.world == 1:
            return
        with _others_needed():
            sums = []
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                sums.append(distributed.all_reduce(parameter.grad, async_op=True))
            for each in sums:
                each.wait()

    def first_does(self, work: Callable[[], T]) -> T:
        """The result of ``work``, done by the first process and handed to the others.

        Raises:
            Exception: what ``work`` raised, in every process.
        """
        if self.world == 1:
            return work()
        box: list[Any] = [None, None]  # the result, what was raised
        if self.is_first:
            try:
                box[0] = work()
            except Exception as error:
                box[1] = error
        with _others_needed():
            distributed.broadcast_object_list(box, src=0)
        if box[1] is not None:
            raise box[1]
        result: T = box[0]
        return result

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            with _others_needed():
                distributed.barrier()


ALONE = ProcessGroup()


class ProcessLostError(TrainingError):
    """Another process of a distributed run is gone.

    Attributes:
        first: whether this process is the first one on its machine to notice: that one tells.
    """

    def __init__(self, message: str, *, first: bool = True):
        super().__init__(message)
        self.first = first


def told_elsewhere(error: Exception) -> bool:
    """Whether another process of this run tells this error to the user."""
    return not error.first if isinstance(error, ProcessLostError) else rank() != 0


@contextlib.contextmanager
def _others_needed() -> Iterator[None]:
    """Turn what a backend says when a process is gone into plain words."""
    try:
        yield
    except RuntimeError as error:  # DistBackendError is one
        seen = (str(error).strip().splitlines() or [""])[0]
        raise ProcessLostError(
            "Another process of this distributed run is gone, so all stop. The last checkpoint is "
            "good: start the same torchrun command with --resume latest added. "
            f"(Seen here: {seen[:200]})",
            first=_first_to_tell(),
        ) from error


def _told_file() -> Path:
    """A file that the processes of one launch on one machine have in common."""
    launch = f"{os.environ.get('MASTER_PORT')}-{os.getppid()}"
    return Path(tempfile.gettempdir()) / f"mirip-fast-{launch}.told"


def _first_to_tell() -> bool:
    """Whether no other process of this launch on this machine has asked before."""
    try:
        _told_file().touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        pass  # rather twice than never
    return True


@contextlib.contextmanager
def join_processes(device_name: str) -> Iterator[tuple[ProcessGroup, str]]:
    """Join the processes that torchrun (or srun with its variables) started; alone without it.

    Inside, only the first process tells what is going on; errors are everyone's.

    Args:
        device_name: ``--device``; with ``auto`` or ``cuda`` each process takes the GPU of its local rank.

    Yields:
        The group, and the device's name for this process.

    Raises:
        TrainingError: the processes do not find each other.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield ALONE, device_name
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = device_name in ("auto", "cuda") and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(local % torch.cuda.device_count())
        device_name = f"cuda:{torch.cuda.current_device()}"
    if local == 0:
        _told_file().unlink(missing_ok=True)  # of an earlier launch with the same numbers
    try:
        distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise TrainingError(
            f"The {world} processes did not find each other ({error}). Start them with torchrun, see "
            "docs/finetune.md"
        ) from error
    group, package = ProcessGroup(distributed.get_rank(), world), logging.getLogger("mirip_fast")
    level = package.level
    if not group.is_first:
        package.setLevel(logging.ERROR)
    try:
        yield group, device_name
    finally:
        package.setLevel(level)
        distributed.destroy_process_group()
