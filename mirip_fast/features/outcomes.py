"""What became of each image that was to be embedded, and the accounting of a run."""

from __future__ import annotations

import logging
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import pandas as pd

from mirip_fast.data.table import STATUSES
from mirip_fast.errors import ImageError
from mirip_fast.text import shown

log = logging.getLogger(__name__)

_UNSEEN = "it was not looked at; run the same command again"
_NAMED = 20  # pictures of a single colour
LEFT = "left"  # the status of what a run that was stopped did not come to


def ledger(
    known: Sequence[bytes | ImageError | None],
    embedded: Container[bytes] = (),
    failures: Mapping[bytes, str] = MappingProxyType({}),
    left: Container[bytes] | None = None,
) -> pd.DataFrame:
    """What became of each input, as columns of the table of images.

    Args:
        known: content hash of each of n inputs, or why it could not be read; None: not looked at.
        embedded: contents that were embedded just now.
        failures: hash → reason, for files that could be read but not embedded.
        left: contents that lack features, in a run that was stopped; their status, and that of inputs that
            were not looked at, is :data:`LEFT`.

    Returns:
        n rows: ``status`` (one of STATUSES, or LEFT), ``reason`` why it failed, and ``sha256`` of the file's
        bytes, None if it could not be read.
    """
    statuses, reasons, seen = list[str](), list[str | None](), set[bytes]()
    for sha in known:
        status, reason = "embedded" if sha in embedded else "present", None
        if not isinstance(sha, bytes):
            stopped = sha is None and left is not None
            status, reason = (LEFT, None) if stopped else ("failed", str(sha or _UNSEEN))
        elif sha in failures:
            status, reason = "failed", failures[sha]
        elif left is not None and sha in left:
            status = LEFT
        else:
            status = "duplicate" if sha in seen else status
            seen.add(sha)
        statuses.append(status)
        reasons.append(reason)
    hashes = [sha if isinstance(sha, bytes) else None for sha in known]
    return pd.DataFrame({"status": statuses, "reason": reasons, "sha256": hashes}, dtype=object)


def warn_of(paths: Sequence[Path], what: str) -> None:
    """Warn of pictures that are hardly what anybody meant to be looked at.

    Args:
        paths: all of these; none: nothing is told.
        what: how they are, such as ``of a single colour``.
    """
    if paths:
        names = ", ".join(shown(path) for path in paths[:_NAMED])
        more = f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
        many = "1 picture is" if len(paths) == 1 else f"{len(paths)} pictures are"
        log.warning("%s %s: %s%s", many, what, names, more)


class EmbedInterrupt(KeyboardInterrupt):
    """Embedding was stopped by Ctrl-C or SIGTERM; what was committed stays.

    Attributes:
        images: what became of them until then, see :func:`ledger`.
    """

    def __init__(self, images: pd.DataFrame):
        super().__init__()
        self.images = images


def summarise(images: pd.DataFrame) -> dict[str, int]:
    """Of a table of images how many there are (``inputs``), and how many of each status; none is lost:
    inputs = embedded + present + duplicate + failed + left.

    Only a run that was stopped leaves any: those that it has not finished, or not looked at.
    """
    counts = {status: int((images["status"] == status).sum()) for status in (*STATUSES, LEFT)}
    assert len(images) == sum(counts.values()), counts
    return {"inputs": len(images), **counts}


def failures_by_kind(failures: Iterable[tuple[str, str]], most: int = 10) -> list[str]:
    """Lines that tell why images could not be read: a reason each, the most frequent first.

    Args:
        failures: name and reason of each; reasons that differ in numbers alone are one kind.
        most: kinds that are told; the rest is counted.
    """
    kinds: dict[str, list[tuple[str, str]]] = {}
    for name, reason in failures:
        kinds.setdefault(re.sub(r"\d+", "0", reason), []).append((name, reason))
    lines = []
    for of_kind in sorted(kinds.values(), key=len, reverse=True):
        name, reason = of_kind[0]
        several = f"{len(of_kind)} images: {reason} (first: {name})"
        lines.append(several if len(of_kind) > 1 else f"{name}: {reason}")
    if len(lines) > most:
        lines[most:] = [f"… and {len(lines) - most} more kinds of failure"]
    return lines
