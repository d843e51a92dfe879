"""The machine a command runs on: device, number format, seed, threads, rank among processes."""

from __future__ import annotations

import contextlib
import errno
import gc
import hashlib
import os
import random
import signal
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mirip_fast.errors import ConfigError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
_Closing = TypeVar("_Closing", bound="Closing")

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_PR_SET_PDEATHSIG = 1  # of prctl(2)


def resolve_device(name: str = "auto") -> torch.device:
    """The device called ``name``; ``auto`` takes the first of CUDA, Apple's MPS, CPU that works here.

    Among several processes on one machine, ``auto`` and ``cuda`` give each its own GPU.

    Raises:
        ConfigError: the device does not exist on this machine; says which ones do.
    """
    import torch

    here = ["cpu"]
    if torch.backends.mps.is_available():
        here.insert(0, "mps")
    if torch.cuda.is_available():
        here[:0] = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name in ("auto", "cuda") and here[0] == "cuda":
        run = distributed()
        return torch.device("cuda", run.local % torch.cuda.device_count() if run else 0)
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
        ConfigError: the device cannot compute in that precision.
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


def free_memory() -> None:
    """Give back what is not used any more, and what the allocator of a GPU keeps for later."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def in_passes(
    work: Callable[[Any], T],
    items: Any,
    at_once: int,
    told: Callable[[int], None] = lambda _: None,
) -> tuple[list[T], int]:
    """``work`` on slices of ``items``, which get smaller when memory runs out.

    Args:
        work: takes a slice.
        items: a sequence, array or tensor.
        at_once: longest slice to begin with.
        told: called with the new number whenever it was halved.

    Returns:
        The results in order, and how many items went at once.

    Raises:
        torch.OutOfMemoryError, MemoryError, RuntimeError: one item alone does not fit.
    """
    results: list[T] = []
    start = 0
    while start < len(items):
        part = items[start : start + at_once]
        try:
            results.append(work(part))
        except Exception as error:
            if not is_out_of_memory(error) or len(part) == 1:
                raise
        else:
            start += len(part)
            continue
        # Out of the handler, whose traceback holds on to activations.
        at_once = -(-len(part) // 2)
        free_memory()
        told(at_once)
    return results, at_once


#: What Python, the C library and torch say where a limit on memory or on processes and threads is reached.
_NO_MEMORY = (
    "out of memory",
    "allocate memory",
    "bad_alloc",
    "failed to map segment",
    "mmap failed",
)
_NO_PROCESSES = ("start new thread", "resource temporarily unavailable", "thread creation failed")


def reached_limit(error: BaseException | None) -> str | None:
    """Which limit of this machine, user or container an error comes from, and what to do; None for others."""
    seen = error
    while seen is not None and "cuda" not in (
        text := str(seen).lower()
    ):  # of a GPU torch tells itself
        number = seen.errno if isinstance(seen, OSError) else None
        if isinstance(seen, MemoryError) or number == errno.ENOMEM or _any_in(_NO_MEMORY, text):
            limit = _limit("RLIMIT_AS")
            given = (
                f"this process may have {limit >> 20:,} MiB (ulimit -v)"
                if limit
                else ("what the machine or container has is used up")
            )
            return (
                f"There is not enough memory: {given}. torch alone takes some 6 GiB of address space; "
                "fewer --workers or --loader-workers and a smaller --batch-size need less memory."
            )
        if number == errno.EAGAIN or _any_in(_NO_PROCESSES, text):
            limit = _limit("RLIMIT_NPROC")
            given = f"this user may have {limit:,} (ulimit -u)" if limit else "ulimit -u"
            return (
                f"No more processes or threads can be started: {given}, and a container may have a limit of "
                "its own (docker run --pids-limit). --workers 0 and OMP_NUM_THREADS=1 need fewest."
            )
        seen = seen.__cause__ or seen.__context__
    return None


def _any_in(words: tuple[str, ...], text: str) -> bool:
    return any(word in text for word in words)


def _limit(name: str) -> int | None:
    """A limit of this process (see getrlimit(2)); None where there is none."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft, _ = resource.getrlimit(getattr(resource, name))
    return None if soft == resource.RLIM_INFINITY else soft


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


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Let matrix products and factorisations use one CPU thread inside the block, or the decorated function.

    NumPy's and SciPy's libraries have a pool of threads each, which spin while the other works: on two busy
    cores, matrices of 1,000 rows took five times as long with them.
    """
    import scipy.linalg  # noqa: F401  (a library that is not loaded yet would not be told)
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, "blas"):
        yield


def keep_freed_memory() -> None:
    """Have the C library keep freed tensors' memory for the next ones: for passes on a CPU.

    glibc gives large blocks back to the system and asks for them anew, page by page. That took 4 % of
    `embed`'s processor time and a tenth of fine-tuning's (ViT-Tiny, two cores). At most 128 MiB at the end
    of each heap are kept. Settings of the user's own (MALLOC_…, GLIBC_TUNABLES) stay; other C libraries
    are left alone.
    """
    own = any(name.startswith("MALLOC_") for name in os.environ)
    if sys.platform != "linux" or own or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    import ctypes

    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        for option, value in ((_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, 128 << 20)):
            set_option(option, value)


class Closing(ABC):
    """Base of classes with a ``close()`` that the end of a ``with`` block calls, whatever happened."""

    @abstractmethod
    def close(self) -> None:
        """Let go of what is held."""

    def __enter__(self: _Closing) -> _Closing:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class WorkThread(threading.Thread):
    """A daemon thread whose end can be waited for although Ctrl-C may break the waiting off.

    ``join`` and ``is_alive`` cannot: once an exception has left them, CPython up to 3.12 may take a running
    thread for ended (its mend of bpo-45274 looks only at whether the thread's lock is held, and the thread
    itself holds it). Whoever waits again then waits for nothing.

    Args:
        name: of the thread.
        work: what it does; it is started with :meth:`start`.
    """

    def __init__(self, name: str, work: Callable[[], None]):
        super().__init__(target=work, name=name, daemon=True)
        self._work_is_over = False
        # Held until then. An Event has a lock of its own, which Ctrl-C may leave held for ever.
        self._working = threading.Lock()
        self._working.acquire()

    def run(self) -> None:
        """Do the work, and say that it is over whatever came of it."""
        try:
            super().run()
        finally:
            self._work_is_over = True
            self._working.release()

    def wait(self, timeout_s: float) -> bool:
        """Whether the work is over, after waiting at most so many seconds for it."""
        if not self._work_is_over and self._working.acquire(timeout=max(0.0, timeout_s)):
            self._working.release()
        if self._work_is_over:
            self.join()  # it does nothing any more, and whether this is broken off is all the same
        return self._work_is_over


def any_works() -> bool:
    """Whether a :class:`WorkThread` of this process is at work still."""
    return any(
        isinstance(thread, WorkThread) and not thread.wait(0.0) for thread in threading.enumerate()
    )


def end_with_parent(parent: int) -> None:
    """Have this process end with the one that started it, however that one ends.

    Linux kills it at once, even in the midst of a decoder that hangs. For Linux the parent is the *thread*
    that started it: start processes in one that lives as long as they shall. Elsewhere a thread looks after
    the parent once a second.

    Args:
        parent: process id of the one that started this.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_end_without, args=(parent,), daemon=True).start()
    if os.getppid() != parent:
        os._exit(0)  # it died before that


def _end_without(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(0)


def rank() -> int:
    """This process's number among those started by torchrun (0 when started alone)."""
    return int(os.environ.get("RANK", "0"))


@dataclass(frozen=True)
class Ranks:
    """This process among the processes of a distributed run, as torchrun or SLURM started them."""

    rank: int  # its number, from 0
    size: int  # how many there are, all machines together
    local: int  # its number on this machine
    local_size: int  # how many there are on this machine, as far as is known
    run_id: str  # what all of them call the run
    bound: bool  # whether each was given cores of its own

    def takes(self, path: Path) -> bool:
        """Whether an image file is this process's share.

        The share depends on the path and on the run's name alone: processes agree on it without talking,
        whenever they start, and what one that was killed leaves is spread over all of the next run.
        """
        text = f"{self.run_id}\0{path}".encode("utf-8", "surrogateescape")
        number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
        return number % self.size == self.rank

    def cores(self) -> int:
        """Processor cores for this process: those of the machine are divided."""
        return max(1, usable_cores() // (1 if self.bound else self.local_size))


def distributed(environment: Mapping[str, str] | None = None) -> Ranks | None:
    """The run that this process is a part of, or None if it runs alone.

    torchrun sets RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; SLURM's srun SLURM_PROCID, SLURM_NTASKS
    and SLURM_LOCALID.

    Raises:
        ConfigError: these make no sense.
    """
    names = os.environ if environment is None else environment
    torchrun = "RANK" in names and "WORLD_SIZE" in names

    def number(default: int, *keys: str) -> int:
        key = next((key for key in keys if names.get(key)), keys[0])
        try:
            return int(names.get(key) or default)
        except ValueError:
            raise ConfigError(f"The variable {key}={names[key]} should hold a number") from None

    words: tuple[str, ...]
    if torchrun:
        rank_, size = number(0, "RANK"), number(1, "WORLD_SIZE")
        local, local_size = number(rank_, "LOCAL_RANK"), number(size, "LOCAL_WORLD_SIZE")
        words = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
        bound = False
    else:
        rank_, size = number(0, "SLURM_PROCID"), number(1, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
        per_node = size if number(1, "SLURM_NNODES") == 1 else 1
        local, local_size = number(0, "SLURM_LOCALID"), per_node
        words = ("SLURM_JOB_ID", "SLURM_STEP_ID")
        bound = usable_cores() < (os.cpu_count() or 1)  # srun binds tasks to cores
    if size == 1:
        return None
    if not 0 <= rank_ < size:
        raise ConfigError(f"This process is called number {rank_} of {size} (numbers begin at 0)")
    run_id = " ".join([f"{size} ranks", *(names[word] for word in words if names.get(word))])
    return Ranks(rank_, size, local, max(1, min(local_size, size)), run_id, bound)


def our_cores() -> int:
    """Processor cores for this process, those of the machine divided among the ranks on it."""
    run = distributed()
    return run.cores() if run else usable_cores()


def usable_cores() -> int:
    """CPU cores that this process may use (containers and ``taskset`` counted in)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
