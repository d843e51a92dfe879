"""What became of each image that was to be embedded, and the accounting of a run."""

from __future__ import annotations

import logging
import re
import time
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from mirip_fast.data.table import STATUSES
from mirip_fast.errors import ImageError
from mirip_fast.text import shown

log = logging.getLogger(__name__)

_UNSEEN = "it was not looked at; run the same command again"
_NAMED = 20  # pictures of a single colour
LEFT = "left"  # the status of what a run that was stopped did not come to


class Outcome(NamedTuple):
    """One line of the ledger."""

    status: str  # one of STATUSES, or LEFT
    sha256: bytes | None = None  # of the file's bytes; None if it could not be read
    reason: str | None = None  # why it failed


def ledger(
    known: Sequence[bytes | ImageError | None],
    embedded: Container[bytes] = (),
    failures: Mapping[bytes, str] = MappingProxyType({}),
    left: Container[bytes] | None = None,
) -> list[Outcome]:
    """What became of each input.

    Args:
        known: content hash of each of n inputs, or why it could not be read; None: not looked at.
        embedded: contents that were embedded just now.
        failures: hash → reason, for files that could be read but not embedded.
        left: contents that lack features, in a run that was stopped; their status, and that of inputs that
            were not looked at, is :data:`LEFT`.
    """
    outcomes, seen = [], set[bytes]()
    for sha in known:
        if sha is None and left is not None:
            outcomes.append(Outcome(LEFT))
        elif not isinstance(sha, bytes):
            outcomes.append(Outcome("failed", None, str(sha or _UNSEEN)))
        elif sha in failures:
            outcomes.append(Outcome("failed", sha, failures[sha]))
        elif left is not None and sha in left:
            outcomes.append(Outcome(LEFT, sha))
        else:
            status = "embedded" if sha in embedded else "present"
            outcomes.append(Outcome("duplicate" if sha in seen else status, sha))
            seen.add(sha)
    return outcomes


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


@dataclass(frozen=True)
class Summary:
    """The accounting of a run: inputs = embedded + present + duplicate + failed + left.

    Only a run that was stopped leaves any: those that it has not finished, or not looked at.
    """

    inputs: int
    embedded: int
    present: int
    duplicate: int
    failed: int
    seconds: float
    left: int = 0


class EmbedInterrupt(KeyboardInterrupt):
    """Embedding was stopped by Ctrl-C or SIGTERM; what was committed stays.

    Attributes:
        summary: what became of the images until then.
    """

    def __init__(self, summary: Summary):
        super().__init__()
        self.summary = summary


def summarise(outcomes: Sequence[Outcome], started: float) -> Summary:
    """Count the outcomes and assert that none was lost.

    Args:
        outcomes: one per input.
        started: ``time.monotonic()`` when the run began.
    """
    counts = Counter(outcome.status for outcome in outcomes)
    assert counts.keys() <= {*STATUSES, LEFT}, counts
    return Summary(
        inputs=len(outcomes),
        **{status: counts[status] for status in (*STATUSES, LEFT)},
        seconds=time.monotonic() - started,
    )


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
