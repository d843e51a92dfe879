"""Decoders that misbehave, for the tests of the decoding pool; they run in its processes."""

from __future__ import annotations

import mmap
import os
import signal
import sys
import time
from dataclasses import replace

from mirip_fast.data.decode_worker import Choose, Decoded, DecodeJob, decode_job, failure


def by_name(job: DecodeJob, choose: Choose) -> Decoded:
    """Misbehave as the file's name says; other files are decoded."""
    word = job.path.name.partition("-")[0]
    if word == "exit":
        os._exit(3)
    if word == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if word == "bus":  # as where a file is cut short while it is mapped
        with job.path.open("r+b") as stream:
            mapped = mmap.mmap(stream.fileno(), 0)
            stream.truncate(0)
            mapped[0]
    if word == "hang":
        _block_everything()
    if word == "slow":
        time.sleep(0.2)
    if word == "nap":
        time.sleep(0.6)
    if word == "pid":
        return failure(job, str(os.getpid()), 0.0)
    return decode_job(job, choose)


def _block_everything() -> None:
    # A decoder that hangs holds the interpreter: no signal handler and no other thread of Python runs.
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    while True:
        time.sleep(100)


def surroundings(job: DecodeJob, choose: Choose) -> Decoded:
    """Tell what the process has loaded."""
    heavy = [
        name
        for name in (
            "torch",
            "numpy",
            "pandas",
            "h5py",
            "tarfile",
            "fsspec",
            "pytest",
            "mirip_fast_cli",
        )
        if name in sys.modules
    ]
    main = getattr(sys.modules["__main__"], "__file__", None)
    return failure(job, f"{heavy} {main}", 0.0)


def answers_wrongly(job: DecodeJob, choose: Choose) -> Decoded:
    """Mix up the images."""
    return replace(decode_job(job, choose), index=job.index + 1)
