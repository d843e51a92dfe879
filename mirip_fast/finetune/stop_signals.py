"""Signals that schedulers send before they end a job."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Iterator
from types import FrameType

from mirip_fast.finetune.fit_parts import StopRequest

log = logging.getLogger(__name__)


@contextlib.contextmanager
def stop_signals(stop: StopRequest) -> Iterator[None]:
    """Inside, SIGTERM and SIGUSR1 ask the run to save and end, as schedulers send them beforehand."""

    def ask(number: int, frame: FrameType | None) -> None:
        stop.signal = signal.Signals(number).name
        log.warning("%s: saving and stopping after this step", stop.signal)

    kept = {}
    for name in ("SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            with contextlib.suppress(ValueError):  # not in the main thread
                kept[name] = signal.signal(getattr(signal, name), ask)
    try:
        yield
    finally:
        for name, handler in kept.items():
            signal.signal(getattr(signal, name), handler)
