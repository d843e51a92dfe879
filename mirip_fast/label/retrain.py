"""Training heads in the background while somebody judges."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mirip_fast.config import Config

log = logging.getLogger(__name__)

# Not `python -m`: that would depend on the working folder and the environment.
_START = (
    "import json, sys; sys.path[:], parent = json.loads(sys.argv[1]); "
    "from mirip_fast.runtime import end_with_parent; end_with_parent(parent); "
    "from mirip_fast.label.retrain_process import serve; serve()"
)
_PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])


@dataclass(frozen=True)
class Retrained:
    """A head that was trained on the judgements so far.

    Attributes:
        judgements: how many there were when training began.
        scores: [n] of all works.
        seconds: how long it took.
    """

    judgements: int
    scores: NDArray[np.float64]
    seconds: float


class Retrainer:
    """Trains one head at a time in a process of its own.

    Args:
        config: settings of the training, with the file of pairs in ``train.pairs``.
        source: the embedded data set.
        hashes: contents of the works to score.
        done: called from another thread with every head, or with the reason why there is none.
    """

    def __init__(
        self,
        config: Config,
        source: Path,
        hashes: Sequence[bytes],
        done: Callable[[Retrained | str], None],
    ):
        self._job = {
            "config": config.to_dict(),
            "source": str(source),
            "hashes": [sha.hex() for sha in hashes],
        }
        self._done = done
        self._process: subprocess.Popen[str] | None = None
        # The process is started in this thread, as Linux ends it when the thread that started it ends.
        self._thread = ThreadPoolExecutor(1, "mirip-retrain")
        self._training: Future[None] | None = None
        self._closed = False

    @property
    def busy(self) -> bool:
        """Whether a head is being trained."""
        return self._training is not None and not self._training.done()

    def start(self, judgements: int) -> None:
        """Train on the file as it is now, unless a head is being trained already."""
        if not self.busy and not self._closed:
            self._training = self._thread.submit(self._train, judgements)

    def wait(self, seconds: float | None = None) -> None:
        """Until the training that was started is over."""
        if self._training is not None:
            futures.wait([self._training], seconds)

    def close(self) -> None:
        """End the process; a training that is under way is given up."""
        self._closed = True
        self._end_process()
        self._thread.shutdown(wait=False, cancel_futures=True)
        self.wait(5)
        process = self._process
        if process is not None and not self.busy:
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()

    def _end_process(self) -> None:
        process = self._process
        if process is not None:
            process.kill()
            process.wait()

    def _train(self, judgements: int) -> None:
        started = time.monotonic()
        try:
            answer = self._ask()
        except (OSError, ValueError) as error:
            answer = {"error": f"the process that trains ended ({error})"}
            self._process = None
        if self._closed:
            return
        if "error" in answer:
            self._done(str(answer["error"]))
            return
        scores = np.array(answer["scores"], dtype=np.float64)
        self._done(Retrained(judgements, scores, time.monotonic() - started))

    def _ask(self) -> dict[str, object]:
        if self._process is None:
            arguments = json.dumps([[_PACKAGE_PARENT, *sys.path], os.getpid()])
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
                # Ctrl-C is for the server, which then ends this one.
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
            if self._closed:  # while it was being started
                self._end_process()
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(self._job) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise ValueError("no answer")
        answer: dict[str, object] = json.loads(line)
        return answer
