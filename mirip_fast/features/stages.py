"""A stage of a pipeline: threads that do one job, fed through a short queue."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from mirip_fast.threads import WorkThread

T = TypeVar("T")


class StoppedError(Exception):
    """Work was given up because the run stops; never shown to users."""


class Stage(Generic[T]):
    """Does ``work`` on what is put in, in threads of its own.

    The queue is short, so that a stage that is quicker than the next one waits for it instead of piling up
    its results. What ``work`` raises ends the stage, and is raised again to whoever puts in more or finishes
    it: an error travels up the pipeline to the thread that the user sees.

    Args:
        name: of the threads.
        work: called with a list of 1 to ``at_once`` items, in order, from ``threads`` threads.
        threads: how many.
        room: how many items may wait.
        at_once: how many waiting items one call may take.
        idle: told the seconds that a thread waited for an item.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[list[T]], None],
        *,
        threads: int = 1,
        room: int = 2,
        at_once: int = 1,
        idle: Callable[[float], None] = lambda _: None,
    ):
        self._work, self._room, self._at_once, self._idle = work, room, at_once, idle
        self._items: deque[T] = deque()
        self._change = threading.Condition()
        self._closing = False
        self._error: BaseException | None = None
        self._threads = [WorkThread(name, self._run) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def put(self, item: T) -> None:
        """Hand over one item; waits for room.

        Raises:
            Exception: whatever ended the stage.
        """
        with self._change:
            while len(self._items) >= self._room and not self._over():
                self._change.wait()
            self._raise()
            if self._closing:
                raise StoppedError
            self._items.append(item)
            self._change.notify_all()

    def finish(self, tick: Callable[[], None] = lambda: None) -> None:
        """Wait until all that was put in is done.

        Args:
            tick: called a few times per second meanwhile.

        Raises:
            Exception: whatever ended the stage.
        """
        with self._change:
            self._closing = True
            self._change.notify_all()
        for thread in self._threads:
            while not thread.wait(0.1):
                tick()
        self._raise()

    def stop(self, *, drop: bool, timeout_s: float) -> bool:
        """End early; errors are kept quiet. Says whether the threads have ended.

        Args:
            drop: forget what waits; otherwise it is done first.
            timeout_s: seconds to wait for what is being done.
        """
        with self._change:
            self._closing = True
            if drop:
                self._items.clear()
            self._change.notify_all()
        deadline = time.monotonic() + timeout_s
        ended = [thread.wait(deadline - time.monotonic()) for thread in self._threads]
        return all(ended)

    def _over(self) -> bool:
        return self._closing or self._error is not None

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while items := self._take():
            try:
                self._work(items)
            except BaseException as error:
                with self._change:
                    self._error = self._error or error
                    self._items.clear()
                    self._change.notify_all()
                return

    def _take(self) -> list[T]:
        """The next items; empty when there will be none."""
        started = time.perf_counter()
        with self._change:
            while not self._items and not self._over():
                self._change.wait()
            if self._error is not None:
                return []
            count = min(self._at_once, len(self._items))
            taken = [self._items.popleft() for _ in range(count)]
            self._change.notify_all()
        self._idle(time.perf_counter() - started)
        return taken
