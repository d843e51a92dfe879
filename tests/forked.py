"""Processes forked from the tests: the heavy imports are done already."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Process:
    """One rank of several, or the only process."""

    rank: int
    pid: int
    folder: Path

    def wait(self) -> tuple[int, str, str]:
        """Exit status, standard output and standard error."""
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        out, err = ((self.folder / f"{self.rank}.{name}").read_text() for name in ("out", "err"))
        return status, out, err


def start(work: Callable[[], int], world: int, folder: Path) -> list[Process]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir(exist_ok=True)
    processes = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            _be_rank(work, rank, world, port, folder)
        processes.append(Process(rank, pid, folder))
    return processes


def _be_rank(work: Callable[[], int], rank: int, world: int, port: int, folder: Path) -> None:
    code = 99
    try:
        if world > 1:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
            )  # fmt: skip
        sys.stdout = (folder / f"{rank}.out").open("w", buffering=1)
        sys.stderr = (folder / f"{rank}.err").open("w", buffering=1)
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def finish(processes: list[Process]) -> list[tuple[int, str, str]]:
    return [process.wait() for process in processes]
