"""Processes forked from the tests: the heavy imports are done already."""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirip_fast.training.run_folder import Run


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

    def said(self, lines: int) -> list[str]:
        """The first lines of standard output, once they are there."""
        wait_for(self.folder, lambda: len(self._out()) >= lines)
        return self._out()[:lines]

    def _out(self) -> list[str]:
        path = self.folder / f"{self.rank}.out"
        return path.read_text().splitlines() if path.exists() else []


def wait_for(folder: Path, pattern: str | Callable[[], bool]) -> None:
    """Until there is such a file, or it is so."""
    deadline = time.monotonic() + 120
    there = pattern if callable(pattern) else lambda: bool(list(folder.glob(pattern)))
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def signalled(
    work: Callable[[], int], folder: Path, number: int, at_epoch: int = 1, part: str = ""
) -> tuple[int, str, str]:
    """Do the work in a process that gets a signal when an epoch's figures are written: see ``Process.wait``.

    Args:
        work: trains.
        folder: for what it says.
        number: of the signal.
        at_epoch: which epoch.
        part: end of the name of the run that it has to be of.
    """

    def signalling() -> int:
        append = Run.append_history

        def telling(run: Run, row: Any) -> None:
            append(run, row)
            if row["epoch"] == at_epoch and run.path.name.endswith(part):
                os.kill(os.getpid(), number)

        Run.append_history = telling  # type: ignore[method-assign]
        return work()

    (process,) = start(signalling, 1, folder)
    return process.wait()


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
