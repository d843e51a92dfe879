"""What became of each image that was to be embedded, and the accounting of a run."""

from __future__ import annotations

import logging
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mirip_fast.data.csv_reader import shown
from mirip_fast.data.table import STATUSES
from mirip_fast.errors import ImageError

log = logging.getLogger(__name__)

_UNSEEN = "it was not looked at; run the same command again"
_NAMED = 20  # pictures of a single colour
_EMBEDDED, _PRESENT, _DUPLICATE, _FAILED = range(4)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One line of the ledger."""

    status: str  # one of STATUSES
    sha256: bytes | None = None  # of the file's bytes; None if it could not be read
    reason: str | None = None  # why it failed


class InputHashes:
    """The content hash of each of ``n`` inputs, or why it could not be read.

    Attributes:
        reasons: input → why it could not be read.
    """

    _AT_ONCE = 4096

    def __init__(self, n: int):
        self._hashes: list[bytes | None] = [None] * n
        self.reasons: dict[int, str] = {}

    @classmethod
    def of(cls, found: Sequence[bytes | ImageError]) -> InputHashes:
        """Those of a list."""
        inputs = cls(len(found))
        for i, sha in enumerate(found):
            if isinstance(sha, ImageError):
                inputs.fail(i, str(sha))
            else:
                inputs[i] = sha
        return inputs

    def __len__(self) -> int:
        return len(self._hashes)

    def __getitem__(self, i: int) -> bytes | None:
        return self._hashes[i]

    def __setitem__(self, i: int, sha256: bytes) -> None:
        if len(sha256) != 32:
            raise ValueError("a content hash has 32 bytes")
        self._hashes[i] = sha256
        self.reasons.pop(i, None)

    def fail(self, i: int, reason: str) -> None:
        """Note that an input could not be read."""
        self._hashes[i] = None
        self.reasons[i] = reason

    def unknown(self) -> list[int]:
        """The inputs without a hash."""
        return [i for i, sha in enumerate(self._hashes) if sha is None]

    def parts(self) -> Iterator[tuple[NDArray[np.int64], list[bytes]]]:
        """Some thousands at a time: the inputs [m] whose hash is known, and the hashes."""
        for start in range(0, len(self), self._AT_ONCE):
            part = self._hashes[start : start + self._AT_ONCE]
            known = [(i, sha) for i, sha in enumerate(part, start) if sha is not None]
            yield np.array([i for i, _ in known], np.int64), [sha for _, sha in known]

    def repeated(self) -> NDArray[np.bool_]:
        """[n]: whether an earlier input has the same content."""
        result, seen = np.zeros(len(self), bool), set[bytes]()
        for i, sha in enumerate(self._hashes):
            if sha is not None:
                result[i] = sha in seen
                seen.add(sha)
        return result


def ledger(
    inputs: InputHashes,
    embedded: NDArray[np.bool_] | None = None,
    failures: Mapping[bytes, str] | None = None,
) -> list[Outcome]:
    """What became of each input.

    Args:
        inputs: content hash of each of n inputs, or why it could not be read.
        embedded: [n] whether its content was embedded just now; None: nothing was.
        failures: hash → reason, for files that could be read but not embedded.
    """
    statuses = np.full(len(inputs), _PRESENT, np.uint8)
    if embedded is not None:
        statuses[embedded] = _EMBEDDED
    statuses[inputs.repeated()] = _DUPLICATE
    reasons = dict.fromkeys(inputs.unknown(), _UNSEEN) | inputs.reasons
    if failures:
        for positions, hashes in inputs.parts():
            for i, sha in zip(positions.tolist(), hashes, strict=True):
                if sha in failures:
                    reasons[i] = failures[sha]
    statuses[list(reasons)] = _FAILED
    named = (STATUSES[status] for status in statuses)
    return [Outcome(status, inputs[i], reasons.get(i)) for i, status in enumerate(named)]


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


def summarise_stopped(
    inputs: InputHashes,
    embedded: NDArray[np.bool_],
    there: NDArray[np.bool_],
    failures: Mapping[bytes, str],
    started: float,
) -> Summary:
    """Count what became of each input before the run was stopped.

    Args:
        inputs: content hash of each of n inputs, as far as they were looked at.
        embedded: [n] whether its content was embedded just now.
        there: [n] whether its content has everything that is wanted.
        failures: hash → reason, for files that could be read but not embedded.
        started: ``time.monotonic()`` when the run began.
    """
    left, statuses = len(STATUSES), np.full(len(inputs), len(STATUSES), np.uint8)
    statuses[there] = _PRESENT
    statuses[there & embedded] = _EMBEDDED
    statuses[there & inputs.repeated()] = _DUPLICATE
    for positions, hashes in inputs.parts():
        statuses[positions[[sha in failures for sha in hashes]]] = _FAILED
    statuses[list(inputs.reasons)] = _FAILED
    counts = np.bincount(statuses, minlength=left + 1).tolist()
    return Summary(
        inputs=len(inputs),
        **dict(zip(STATUSES, counts, strict=False)),
        seconds=time.monotonic() - started,
        left=counts[left],
    )


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
