"""A progress bar with images/s and time left, for terminals; silent elsewhere."""

from __future__ import annotations

import logging
import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mirip_fast.features.embed import Progress


class EmbedBar:
    """Shows the progress of embedding; call it with every update."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __enter__(self) -> EmbedBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, progress: Progress) -> None:
        """Show how far it is."""
        if self._bar is None:
            from tqdm import tqdm

            off = not sys.stderr.isatty() or logging.getLogger("mirip_fast").level > logging.INFO
            self._bar = tqdm(total=progress.total, unit=" images", disable=off, leave=False)
        if progress.failed:
            self._bar.set_postfix(failed=progress.failed)
        self._bar.update(progress.done - self._bar.n)
