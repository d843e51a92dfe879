"""Progress bars with speed and time left, for terminals; silent elsewhere."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

import click

from mirip_fast.closing import Closing

if TYPE_CHECKING:
    from mirip_fast.features.embed import Progress


class Bar(Closing):
    """A bar that appears with the first update and goes when the block ends; call it with each update.

    Args:
        unit: what is counted; ``B`` is shown as KiB, MiB and so on.
        total: how many there will be, if that is known before.
    """

    def __init__(self, unit: str, total: int | None = None) -> None:
        self._unit, self._total = unit, total
        self._bar: Any = None

    def __call__(self, done: int, total: int, **shown: object) -> None:
        """So many of a total; ``shown`` stands beside it."""
        self._total = total
        self.add(0)
        self._bar.total = total
        if shown:
            self._bar.set_postfix(shown)
        self._bar.update(done - self._bar.n)

    def add(self, count: int = 1) -> None:
        """So many more."""
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(
                total=self._total,
                unit=self._unit,
                unit_scale=self._unit == "B",
                unit_divisor=1024,
                leave=False,
                disable=not sys.stderr.isatty()
                or logging.getLogger("mirip_fast").level > logging.INFO,
            )
        self._bar.update(count)

    def write(self, text: str) -> None:
        """Print a result, above the bar."""
        if self._bar is not None:
            self._bar.clear()
        click.echo(text)
        if self._bar is not None:
            self._bar.refresh()

    def embedding(self, progress: Progress) -> None:
        """How far embedding is."""
        failed = {"failed": progress.failed} if progress.failed else {}
        self(progress.done, progress.total, **failed)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
