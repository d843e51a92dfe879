"""Progress of long work: a bar in terminals and notebooks, a line a minute in the log elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

from mirip_fast.runtime import Closing

log = logging.getLogger(__name__)

#: Seconds between two lines where no bar can be shown.
LINE_EVERY = 60.0
_DELAY = 0.7  # seconds of work before a bar is worth its place

T = TypeVar("T")


class Bar(Closing):
    """A bar that appears with the first update and goes when the block ends; call it with each update.

    Args:
        unit: what is counted; ``B`` is shown as KiB, MiB and so on.
        total: how many there will be, if that is known before.
        delay: seconds of work before it is shown.
    """

    def __init__(self, unit: str, total: int | None = None, delay: float = 0) -> None:
        self._unit, self._total, self._delay = unit, total, delay
        self._bar: Any = None
        self._next_line = time.monotonic() + LINE_EVERY

    def __call__(self, done: int, total: int, **shown: object) -> None:
        """So many of a total; ``shown`` stands beside it."""
        self._total = total
        self.add(0)
        self._bar.total = total
        if shown:
            self._bar.set_postfix(shown)
        self.add(done - self._bar.n)

    def add(self, count: int = 1) -> None:
        """So many more."""
        if self._bar is None:
            from tqdm.auto import tqdm

            self._bar = tqdm(
                total=self._total,
                unit=self._unit,
                unit_scale=self._unit == "B",
                unit_divisor=1024,
                leave=False,
                delay=self._delay,
                disable=not _is_seen(),
            )
        self._bar.update(count)
        if self._bar.disable:
            self._bar.n += count  # which tqdm does not count where it shows nothing
            self._line()

    def embedding(self, done: int, total: int, failed: int) -> None:
        """How far embedding is."""
        self(done, total, **({"failed": failed} if failed else {}))

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()

    def _line(self) -> None:
        now = time.monotonic()
        if now >= self._next_line:
            self._next_line = now + LINE_EVERY
            of = "" if self._total is None else f" of {self._total:,}"
            log.info("%s%s %s", f"{self._bar.n:,}", of, self._unit.strip())


def steps(items: Iterable[T], unit: str) -> Iterator[T]:
    """The items of a long loop, with a bar of how many are done."""
    with Bar(f" {unit}", len(items) if isinstance(items, Sized) else None, _DELAY) as bar:
        bar.add(0)  # time counts from here
        for item in items:
            yield item
            bar.add()


def _is_seen() -> bool:
    if logging.getLogger("mirip_fast").level > logging.INFO:
        return False
    return sys.stderr.isatty() or "ipykernel" in sys.modules
