"""What to do when memory runs out, on a device or in the machine."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import torch

from mirip_fast.runtime import is_out_of_memory

#: Memory that other things need besides kept images.
_SPARE = 1 << 30


class Passes:
    """Runs a model over images without learning, in passes that get smaller when memory runs out.

    Args:
        images: per pass, to begin with.
        shrunk: called with the new number whenever it was halved.

    Attributes:
        images: per pass, as memory allowed so far.
    """

    def __init__(self, images: int, shrunk: Callable[[int], None]):
        self.images, self._shrunk = images, shrunk

    def run(
        self, work: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor
    ) -> torch.Tensor:
        """``work`` on all of the inputs, [n, …] → [n, …].

        Raises:
            torch.OutOfMemoryError: one image alone does not fit.
        """
        done: list[torch.Tensor] = []
        start = 0
        while start < len(inputs):
            part = _or_none(work, inputs[start : start + self.images])
            if part is not None:
                done.append(part)
                start += len(part)
                continue
            if self.images == 1:
                raise torch.OutOfMemoryError("one image does not fit into memory")
            self.images = -(-min(self.images, len(inputs) - start) // 2)
            free_memory()
            self._shrunk(self.images)
        return torch.cat(done)


def _or_none(
    work: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor
) -> torch.Tensor | None:
    """None when memory ran out; out of the handler, whose traceback would hold on to activations."""
    try:
        return work(inputs)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    return None


def free_memory() -> None:
    """Give back what is not used any more, and what the allocator of a GPU keeps for later."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def room_in_memory() -> int | None:
    """Bytes that may be kept in this machine's memory; None if nothing is known."""
    room = _available()
    return None if room is None else max(0, room - _SPARE)


def _available() -> int | None:
    """Memory that is free or can be made free, the limit of a container counted in (Linux)."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")]
    except (OSError, ValueError):
        pass
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = (
            (group / name).read_text().strip() for name in ("memory.max", "memory.current")
        )
        if limit != "max":
            found.append(int(limit) - int(used))
    except (OSError, ValueError):
        pass
    return min(found, default=None)
