"""One session of judging: which pair is up, what was said, and what the head makes of it."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mirip_fast.data.pair_files import FIRST, LABEL, SECOND
from mirip_fast.errors import MiripError
from mirip_fast.label.choice import MEASURE, REPEAT, Chooser, Judgement, Pair
from mirip_fast.label.judgement_file import JudgementFile
from mirip_fast.label.works import Retrainer

log = logging.getLogger(__name__)

#: Judgements before a head is trained for the first time.
FIRST_HEAD = 20
#: Predictions that one point of the curve rests on.
WINDOW = 50
#: Longest time that a verdict is said to have taken, in seconds: beyond it, nobody was looking.
_LONGEST = 3600.0


class StalePairError(MiripError, ValueError):
    """A verdict on a pair that is not the one that is up (a second tab, a key pressed twice)."""


@dataclass(frozen=True)
class Shown:
    """A pair that is up or about to be.

    Attributes:
        number: counts the pairs of this session; a verdict names it.
        pair: the works.
        predicted: what the head of that moment expects, 1 or −1; None without one.
    """

    number: int
    pair: Pair
    predicted: int | None


class Session:
    """Shows pairs and takes verdicts; every method may be called from any thread.

    Args:
        file: where judgements are kept.
        name: what the file calls a work, by its number.
        chooser: draws pairs.
        judged: what the file holds already.
        judge: who judges.
        retrain_every: new judgements after which a head is trained.
        start: [n] scores by a model that is there already, which predicts until the first head is trained.
    """

    def __init__(
        self,
        file: JudgementFile,
        name: Callable[[int], str],
        chooser: Chooser,
        judged: list[Judgement],
        *,
        judge: str,
        retrain_every: int,
        start: NDArray[np.floating] | None = None,
    ):
        self._file, self._name, self._chooser, self._judge = file, name, chooser, judge
        self._judged, self._before = judged, len(judged)
        self._every, self._scores = retrain_every, start
        self._retrainer: Retrainer | None = None
        self._asked_at: int | None = None  # judgements when the last training began
        self._trained: list[int] = []  # judgements that each head had learned from
        self._last_seconds: float | None = None
        self._remark: str | None = None  # why there is no head yet
        self._skipped: list[tuple[int, int]] = []
        self._taken_back: list[Shown] = []  # to be shown again, as they were
        self._history: list[Shown] = []  # judged in this session
        self._number = 0
        self._lock = threading.RLock()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="choose")
        self._current = self._up(self._choose([], []))
        self._next = self._choose_ahead()

    def train_with(self, retrainer: Retrainer) -> None:
        """Have heads trained from now on, the first at once where there is enough to learn from."""
        self._retrainer = retrainer
        self._train_if_due()

    def close(self) -> None:
        """Stop what goes on in the background."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._retrainer is not None:
            self._retrainer.close()

    @property
    def judgements(self) -> list[Judgement]:
        """All judgements, those of earlier sessions first."""
        with self._lock:
            return list(self._judged)

    @property
    def made_now(self) -> int:
        """Judgements of this session."""
        return len(self.judgements) - self._before

    def judge(self, number: int, label: int, seconds: float) -> None:
        """Take a verdict; it is on the disk when this returns.

        Args:
            number: of the pair that was judged.
            label: 1 the left is better, −1 the right, 0 a tie.
            seconds: that the judge took.

        Raises:
            StalePairError: another pair is up by now.
            DataError, DiskFullError: it could not be written; the pair stays up.
        """
        with self._lock:
            shown = self._require(number)
            row = {
                FIRST: self._name(shown.pair.one),
                SECOND: self._name(shown.pair.other),
                LABEL: str(label),
                "time": datetime.now().astimezone().isoformat(timespec="seconds"),
                "judge": self._judge,
                "seconds": f"{min(max(seconds, 0.0), _LONGEST):.1f}",
                "kind": shown.pair.kind,
                "predicted": "" if shown.predicted is None else str(shown.predicted),
            }
            self._file.append(row)
            self._judged.append(Judgement(shown.pair, label, shown.predicted))
            self._history.append(shown)
            self._advance()
            self._train_if_due()

    def skip(self, number: int) -> None:
        """Put the pair aside for this session; nothing is written.

        Raises:
            StalePairError: another pair is up by now.
        """
        with self._lock:
            self._skipped.append(self._require(number).pair.key)
            self._advance()

    def take_back(self) -> None:
        """Undo the last verdict of this session and show its pair again.

        Raises:
            DataError: there is none left.
        """
        with self._lock:
            self._file.take_back()
            self._judged.pop()
            self._taken_back += [self._current, self._history.pop()]
            self._advance()

    def state(self) -> dict[str, Any]:
        """What the page shows: plain types, and no word from a file's name."""
        with self._lock:
            shown, judged = self._current, self._judged
            ahead: list[int] = []
            if self._taken_back:
                ahead = list(self._taken_back[-1].pair.key)
            elif self._next.done() and not self._next.exception():
                ahead = list(self._next.result().key)
            return {
                "number": shown.number,
                "left": shown.pair.one,
                "right": shown.pair.other,
                "ahead": ahead,
                "judged": len(judged),
                "now": len(judged) - self._before,
                "ties": sum(j.label == 0 for j in judged),
                "undo": self._file.can_take_back,
                "measure": curve(predicted(judged, measure=True)),
                "teach": curve(predicted(judged, measure=False)),
                "consistency": consistency(judged),
                "training": self._retrainer is not None and self._retrainer.busy,
                "chosen": self._chooser.informative,
                "heads": list(self._trained),
                "first_head": FIRST_HEAD,
                "train_seconds": self._last_seconds,
                "remark": self._remark,
            }

    def retrained(self, judgements: int, answer: dict[str, Any], seconds: float) -> None:
        """Take in a head's ``scores`` [n] of all works, or the ``error`` why there is none."""
        with self._lock:
            if "error" in answer:
                self._remark = str(answer["error"])
                log.info("No head yet: %s", self._remark)
            else:
                self._scores, self._remark = np.array(answer["scores"], dtype=np.float64), None
                self._trained.append(judgements)
                self._last_seconds = seconds

    def _require(self, number: int) -> Shown:
        if number != self._current.number:
            raise StalePairError("That pair was judged already")
        return self._current

    def _advance(self) -> None:
        """Bring up the next pair: one that was set back by an undo, else the one chosen ahead."""
        if self._taken_back:  # its prediction stays the one from before the verdict was known
            back = self._taken_back.pop()
            self._number += 1
            self._current = Shown(self._number, back.pair, back.predicted)
            return
        pair = self._next.result()
        if pair.key in self._skipped:
            pair = self._choose(list(self._judged), [])
        self._current = self._up(pair)
        self._next = self._choose_ahead()

    def _choose_ahead(self) -> Future[Pair]:
        """Choose while the judge looks at the pair that is up."""
        return self._pool.submit(self._choose, list(self._judged), [self._current.pair])

    def _choose(self, judged: list[Judgement], waiting: list[Pair]) -> Pair:
        return self._chooser.next(judged, waiting=waiting, skipped=set(self._skipped))

    def _up(self, pair: Pair) -> Shown:
        predicted = None
        if self._scores is not None:
            gap = self._scores[pair.one] - self._scores[pair.other]
            predicted = int(np.sign(gap)) or None if np.isfinite(gap) else None
        self._number += 1
        return Shown(self._number, pair, predicted)

    def _train_if_due(self) -> None:
        count = len(self._judged)
        if self._retrainer is None or self._retrainer.busy or count < FIRST_HEAD:
            return
        if self._asked_at is None or abs(count - self._asked_at) >= self._every:
            self._asked_at = count
            self._retrainer.start(count)


def share(hits: int, count: int) -> dict[str, Any]:
    """``hits`` of ``count`` as ``value`` (0–1) with a 95 % interval, ``low`` and ``high``; None without any.

    The interval is the score interval of Wilson 1927, which holds for few and for shares near 0 or 1.
    """
    value = low = high = None
    if count:
        z, value = 1.959964, hits / count
        scale = 1 + z * z / count
        middle = (value + z * z / (2 * count)) / scale
        half = z * math.sqrt(value * (1 - value) / count + z * z / (4 * count * count)) / scale
        low, high = max(0.0, middle - half), min(1.0, middle + half)
    return {"hits": hits, "count": count, "value": value, "low": low, "high": high}


def predicted(judged: Sequence[Judgement], *, measure: bool) -> list[tuple[int, bool]]:
    """Number of each judgement (from 1) that was predicted before it was learned from, and whether rightly.

    Args:
        judged: all judgements, in order.
        measure: those drawn at random among works kept from training; else those chosen to learn from.
    """
    return [
        (number, judgement.predicted == judgement.label)
        for number, judgement in enumerate(judged, start=1)
        if judgement.predicted is not None
        and judgement.label != 0  # a tie has no better work
        and judgement.pair.kind != REPEAT  # the head has learned from that pair
        and (judgement.pair.kind == MEASURE) == measure
    ]


def curve(hits: Sequence[tuple[int, bool]], window: int = WINDOW) -> list[dict[str, Any]]:
    """The share of right predictions over the last ``window`` of them, at each: at, value, low, high."""
    points = []
    for end in range(1, len(hits) + 1):
        last = [hit for _, hit in hits[max(0, end - window) : end]]
        points.append({"at": hits[end - 1][0], **share(sum(last), len(last))})
    return points


def consistency(judged: Sequence[Judgement]) -> dict[str, Any]:
    """How often a pair that was judged before got the same verdict (better, worse or tie) again."""
    first: dict[tuple[int, int], int] = {}
    again = []
    for judgement in judged:
        pair = judgement.pair
        verdict = judgement.label if pair.one == pair.key[0] else -judgement.label
        if pair.key in first:
            again.append(first[pair.key] == verdict)
        else:
            first[pair.key] = verdict
    return share(sum(again), len(again))
