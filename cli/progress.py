"""Progress bars for terminals; silent elsewhere."""

from __future__ import annotations

import logging
import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

    from mirip_fast.features.embed import Progress
    from mirip_fast.ranking.sweep import Progress as SweepProgress


class _Bar:
    """A bar that appears with the first update."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def _show(self, done: int, total: int, unit: str, **beside: int) -> None:
        if self._bar is None:
            from tqdm import tqdm

            off = not sys.stderr.isatty() or logging.getLogger("mirip_fast").level > logging.INFO
            self._bar = tqdm(total=total, unit=unit, disable=off, leave=False)
        if beside:
            self._bar.set_postfix(**beside)
        self._bar.update(done - self._bar.n)


class EmbedBar(_Bar):
    """Shows the progress of embedding, with images/s and time left; call it with every update."""

    def __call__(self, progress: Progress) -> None:
        """Show how far it is."""
        beside = {"failed": progress.failed} if progress.failed else {}
        self._show(progress.done, progress.total, " images", **beside)


class SweepBar(_Bar):
    """Shows the progress of a sweep; call it with every update."""

    def __call__(self, progress: SweepProgress) -> None:
        """Show how far it is."""
        self._show(
            progress.done, progress.cells, " cells", heads=progress.heads, epoch=progress.epoch
        )
