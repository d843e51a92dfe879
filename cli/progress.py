"""Progress bars with speed and time left, for terminals; silent elsewhere."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mirip_fast.closing import Closing

if TYPE_CHECKING:
    from mirip_fast.features.embed import Progress
    from mirip_fast.ranking.sweep import Progress as SweepProgress


class _Bar(Closing):
    """A bar that appears with the first update and goes when the block ends."""

    def __init__(self) -> None:
        self._bar: Any = None

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()

    def _shown(self, **options: Any) -> Any:
        if self._bar is None:
            from tqdm import tqdm

            off = not sys.stderr.isatty() or logging.getLogger("mirip_fast").level > logging.INFO
            self._bar = tqdm(disable=off, leave=False, **options)
        return self._bar


class ShardBar(_Bar):
    """Counts the shards that were checked; call it with each."""

    def __call__(self, shard: Path) -> None:
        """One more is done."""
        self._shown(unit=" shards").update(1)


class ByteBar(_Bar):
    """Shows how many bytes were written."""

    def __call__(self, done: int, total: int) -> None:
        """So many of a known total."""
        bar = self._shown(total=total, unit="B", unit_scale=True, unit_divisor=1024)
        bar.update(done - bar.n)

    def add(self, size: int) -> None:
        """So many more."""
        self._shown(unit="B", unit_scale=True, unit_divisor=1024).update(size)


class EmbedBar(_Bar):
    """Shows the progress of embedding; call it with every update."""

    def __call__(self, progress: Progress) -> None:
        """Show how far it is."""
        bar = self._shown(total=progress.total, unit=" images")
        self._bar.total = progress.total
        if progress.failed:
            bar.set_postfix(failed=progress.failed)
        bar.update(progress.done - bar.n)


class PictureBar(_Bar):
    """Counts the pictures of a page, or what they take."""

    def __init__(self, unit: str = " pictures") -> None:
        super().__init__()
        self._unit = unit

    def __call__(self, done: int, total: int) -> None:
        """So many of a known total."""
        bar = self._shown(total=total, unit=self._unit)
        bar.update(done - bar.n)


class SweepBar(_Bar):
    """Shows the progress of a sweep; call it with every update."""

    def __call__(self, progress: SweepProgress) -> None:
        """Show how far it is."""
        bar = self._shown(total=progress.cells, unit=" cells")
        bar.set_postfix(heads=progress.heads, epoch=progress.epoch)
        bar.update(progress.done - bar.n)


class PassBar(_Bar):
    """Shows how many of a known number of passes are done; call it with each new number of passes."""

    def __init__(self, total: int) -> None:
        super().__init__()
        self._total = total

    def __call__(self, count: int) -> None:
        """So many more are done."""
        self._shown(unit=" passes", total=self._total).update(count)

    def write(self, text: str) -> None:
        """Print a result, above the bar."""
        if self._bar is not None:
            self._bar.clear()
        click.echo(text)
        if self._bar is not None:
            self._bar.refresh()
