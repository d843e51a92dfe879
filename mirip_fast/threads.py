"""Threads that say themselves when their work is over."""

from __future__ import annotations

import threading
from collections.abc import Callable


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
