"""What became of each image that was to be embedded, and the accounting of a run."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mirip_fast.errors import ImageError

#: What became of an input; every input has exactly one.
STATUSES = ("embedded", "present", "duplicate", "failed")


@dataclass(frozen=True, slots=True)
class Outcome:
    """One line of the ledger."""

    status: str  # one of STATUSES
    sha256: bytes | None = None  # of the file's bytes; None if it could not be read
    reason: str | None = None  # why it failed


def ledger(
    known: Sequence[bytes | ImageError], present: set[bytes], failures: Mapping[bytes, str]
) -> list[Outcome]:
    """What became of each input.

    Args:
        known: content hash of each input, or why it could not be read.
        present: hashes whose features were there before.
        failures: hash → reason, for files that could be read but not embedded.
    """
    outcomes = []
    first = set(_first_of_each(known))
    for i, sha in enumerate(known):
        if isinstance(sha, ImageError):
            outcomes.append(Outcome("failed", None, str(sha)))
        elif sha in failures:
            outcomes.append(Outcome("failed", sha, failures[sha]))
        elif i not in first:
            outcomes.append(Outcome("duplicate", sha))
        else:
            outcomes.append(Outcome("present" if sha in present else "embedded", sha))
    return outcomes


def _first_of_each(known: Sequence[bytes | ImageError]) -> dict[int, bytes]:
    """index → hash of the first file with each content, readable ones only."""
    seen: dict[bytes, int] = {}
    for i, sha in enumerate(known):
        if isinstance(sha, bytes):
            seen.setdefault(sha, i)
    return {i: sha for sha, i in seen.items()}


@dataclass(frozen=True)
class Summary:
    """The accounting of a run: inputs = embedded + present + duplicate + failed."""

    inputs: int
    embedded: int
    present: int
    duplicate: int
    failed: int
    seconds: float


def summarise(outcomes: Sequence[Outcome], started: float) -> Summary:
    """Count the outcomes and assert that none was lost.

    Args:
        outcomes: one per input.
        started: ``time.monotonic()`` when the run began.
    """
    counts = Counter(outcome.status for outcome in outcomes)
    assert sum(counts[status] for status in STATUSES) == len(outcomes), counts
    return Summary(
        inputs=len(outcomes),
        **{status: counts[status] for status in STATUSES},
        seconds=time.monotonic() - started,
    )
