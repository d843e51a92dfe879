"""The machine a command runs on: device, number format, seed, rank among processes."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mirip_fast.errors import ConfigError

if TYPE_CHECKING:
    import torch


def resolve_device(name: str = "auto") -> torch.device:
    """The device called ``name``; ``auto`` takes the first of CUDA, Apple's MPS, CPU that works here.

    Raises:
        ConfigError: the device does not exist on this machine; says which ones do.
    """
    import torch

    here = ["cpu"]
    if torch.backends.mps.is_available():
        here.insert(0, "mps")
    if torch.cuda.is_available():
        here[:0] = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name == "auto":
        return torch.device(here[0])
    if name not in here:
        raise ConfigError(f"--device {name}: this machine has {', '.join(here)} (or use auto)")
    return torch.device(name)


def supported_precisions(device: torch.device) -> tuple[str, ...]:
    """The compute precisions that ``device`` runs at full speed or exactly, best first.

    A CPU computes bf16 too, but slower than fp32 and with another rounding than a GPU: it is left out.
    """
    import torch

    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        return ("bf16", "fp16", "fp32") if major >= 8 else ("fp16", "fp32")
    return ("fp16", "fp32") if device.type == "mps" else ("fp32",)


def resolve_precision(name: str, device: torch.device) -> str:
    """``auto`` → bf16 on a GPU that has it, fp16 on one that has not, fp32 on a CPU.

    Raises:
        ConfigError: the device can not compute in that precision.
    """
    supported = supported_precisions(device)
    if name == "auto":
        return supported[0]
    if name not in supported:
        raise ConfigError(f"--precision {name}: {device} has {', '.join(supported)} (or use auto)")
    return name


def torch_dtype(precision: str) -> torch.dtype:
    """``fp32``/``bf16``/``fp16`` as a torch dtype."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def set_seed(seed: int) -> None:
    """Seed Python's, NumPy's and torch's random numbers (all devices), for reproducible runs."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)  # user code may draw from the global generator
    torch.manual_seed(seed)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that a device or the host ran out of memory."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # The CPU allocator and some CUDA libraries raise a plain RuntimeError.
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "out of memory" in text or "can't allocate memory" in text
    )


@contextlib.contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Let torch use ``count`` CPU threads inside the block; None leaves them as they are."""
    import torch

    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


def rank() -> int:
    """This process's number among those started by torchrun (0 when started alone)."""
    return int(os.environ.get("RANK", "0"))


def usable_cores() -> int:
    """CPU cores that this process may use (containers and ``taskset`` counted in)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
