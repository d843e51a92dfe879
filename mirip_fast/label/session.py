"""One judge's session: which pair is up, what was said, and what the head makes of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from itertools import accumulate, combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mirip_fast.data.pair_files import FIRST, LABEL, SECOND
from mirip_fast.errors import DataError
from mirip_fast.label.choice import MEASURE, REPEAT, Chooser, Pair
from mirip_fast.label.judgement_file import JudgementFile
from mirip_fast.label.works import Retrainer
from mirip_fast.serving import STALE, BadRequestError
from mirip_fast.text import folded

log = logging.getLogger(__name__)

#: Judgements before a head is trained for the first time.
FIRST_HEAD = 20
#: Predictions that one point of the curve rests on.
WINDOW = 50
#: Longest time that a verdict is said to have taken, in seconds: beyond it, nobody was looking.
_LONGEST = 3600.0


#: What is up: a pair, the scores [n] of all works by the head of that moment (None without one), and two
#: further works where four are put in order.
Up = tuple[Pair, NDArray[np.floating] | None, tuple[int, ...]]


class Session:
    """Shows pairs and takes verdicts; every method may be called from any thread.

    Args:
        file: where judgements are kept.
        name: what the file calls a work, by its number.
        chooser: draws pairs.
        judged: what the file holds, by all judges; their sessions share it.
        judge: who judges.
        retrain_every: new judgements after which a head is trained.
        start: [n] scores by a model that is there already, which predicts until the first head is trained.
    """

    def __init__(
        self,
        file: JudgementFile,
        name: Callable[[int], str],
        chooser: Chooser,
        judged: list[Pair],
        *,
        judge: str,
        retrain_every: int,
        start: NDArray[np.floating] | None = None,
    ):
        self._file, self._name, self._chooser = file, name, chooser
        self._all, self.judge_name = judged, judge
        self._every, self._scores = retrain_every, start
        self._retrainer: Retrainer | None = None
        self._asked_at: int | None = None  # judgements when the last training began
        self._trained: list[int] = []  # judgements that each head had learned from
        self._last_seconds: float | None = None
        self._remark: str | None = None  # why there is no head yet
        self._skipped: list[tuple[int, int]] = []
        self._taken_back: list[Up] = []  # to be shown again, as they were
        self._history: list[tuple[Up, list[int]]] = []  # judged in this session, and its rows
        self._number, self._four = 0, False
        self._lock = file.lock
        self._before = len(self.judgements)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="choose")
        self._show(self._fresh(self._chosen([]).result()))
        self._next = self._choose_ahead()

    def train_with(self, retrainer: Retrainer) -> None:
        """Have heads trained from now on, the first at once where there is enough to learn from."""
        self._retrainer = retrainer
        self._train_if_due()

    def close(self) -> None:
        """Stop what goes on in the background."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    @property
    def judgements(self) -> list[Pair]:
        """All judgements of this judge, and those that no judge is named of; earlier sessions' first."""
        with self._lock:
            return [j for j in self._all if self._is_mine(j)]

    @property
    def by_all(self) -> list[Pair]:
        """The judgements of all judges."""
        with self._lock:
            return list(self._all)

    def _is_mine(self, judgement: Pair) -> bool:
        return folded(judgement.judge) in ("", folded(self.judge_name))

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
            BadRequestError: another pair is up by now.
            DataError, DiskFullError: it could not be written; the pair stays up.
        """
        with self._lock:
            pair = self._require(number)
            self._take([(pair.one, pair.other, label)], seconds)

    def order(self, number: int, order: Sequence[int], seconds: float) -> None:
        """Take the order of four works: a judgement of each of the six pairs, all or none.

        Args:
            number: of the works that were put in order.
            order: the works, the best first.
            seconds: that the judge took; each pair gets a sixth.

        Raises:
            BadRequestError: other works are up by now.
            DataError, DiskFullError: it could not be written; the works stay up.
        """
        with self._lock:
            self._require(number)
            works = self._works()
            if len(works) < 3 or sorted(order) != sorted(works):
                raise BadRequestError("Those are not the works that are up", STALE)
            place = {work: place for place, work in enumerate(order)}
            pairs = list(combinations(works, 2))
            verdicts = [(a, b, 1 if place[a] < place[b] else -1) for a, b in pairs]
            self._take(verdicts, seconds / len(pairs))

    def _take(self, verdicts: Sequence[tuple[int, int, int]], seconds: float) -> None:
        (shown, scores, _), old = self._up, {j.key for j in self.judgements}
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        made, rows = [], []
        for one, other, label in verdicts:
            kind, pair = shown.kind, Pair(one, other)
            if len(verdicts) > 1:
                kind = REPEAT if pair.key in old else self._chooser.kind(pair)
            gap = np.nan if scores is None else scores[one] - scores[other]
            expected = int(np.sign(gap)) or None if np.isfinite(gap) else None  # by the head
            made.append(Pair(one, other, kind, label, expected, self.judge_name))
            rows.append({
                FIRST: self._name(one), SECOND: self._name(other), LABEL: str(label),
                "time": now, "judge": self.judge_name,
                "seconds": f"{min(max(seconds, 0.0), _LONGEST):.1f}",
                "kind": kind, "predicted": "" if expected is None else str(expected),
            })  # fmt: skip
        numbers = self._file.append(*rows)
        self._all += [replace(j, row=row) for j, row in zip(made, numbers, strict=True)]
        self._history.append((self._up, numbers))
        self._advance()
        self._train_if_due()

    def skip(self, number: int) -> None:
        """Put the pair aside for this session; nothing is written.

        Raises:
            BadRequestError: another pair is up by now.
        """
        with self._lock:
            self._skipped.append(self._require(number).key)
            self._advance()

    def take_back(self, row: int | None = None) -> None:
        """Undo the last verdict of this session and show its works again, or undo one row of the file.

        Raises:
            DataError: there is none, or it is another judge's.
        """
        with self._lock:
            if row is None and not self._history:
                raise DataError("There is no judgement of this session left to take back")
            if row is not None and all(j.row != row for j in self.judgements):
                raise DataError("That judgement was taken back already, or is another judge's")
            rows = self._history[-1][1] if row is None else [row]
            self._file.take_back(*rows)
            self._all[:] = [j for j in self._all if j.row not in rows]
            self._before -= row is not None and all(row not in made for _, made in self._history)
            if row is None:
                self._taken_back += [self._up, self._history.pop()[0]]
                self._advance()
            left = [(s, [n for n in made if n not in rows]) for s, made in self._history]
            self._history = [(shown, made) for shown, made in left if made]

    def show_four(self, on: bool) -> None:
        """Show four works at once from now on, or two."""
        with self._lock:
            self._four = on
            self._taken_back.clear()
            self._show(self._fresh(self._up[0]))

    def listing(self) -> list[dict[str, Any]]:
        """What this judge judged, the newest first, with what others said of the same pairs."""
        with self._lock:
            mine = {j.key for j in self.judgements}
            return [
                {
                    "row": j.row, "works": [j.one, j.other], "label": j.label,
                    "judge": j.judge, "mine": self._is_mine(j),
                }
                for j in reversed(self._all) if j.key in mine
            ]  # fmt: skip

    def state(self) -> dict[str, Any]:
        """What the page shows: plain types, and no word from a file's name."""
        with self._lock:
            judged = self.judgements
            ahead: list[int] = []
            if self._taken_back:
                ahead = list(self._taken_back[-1][0].key)
            elif self._next.done() and not self._next.exception():
                ahead = list(self._next.result().key)
            return {
                "number": self._number,
                "works": self._works(),
                "judge": self.judge_name,
                "four": self._four,
                "agreement": pair_agreement(self._all),
                "ahead": ahead,
                "judged": len(judged),
                "now": len(judged) - self._before,
                "ties": sum(j.label == 0 for j in judged),
                "undo": bool(self._history),
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

    def _works(self) -> tuple[int, ...]:
        """The works that are up, as they stand on the page."""
        pair, _, more = self._up
        return (pair.one, pair.other, *more)

    def _require(self, number: int) -> Pair:
        if number != self._number:
            raise BadRequestError("That pair was judged already", STALE)
        return self._up[0]

    def _advance(self) -> None:
        """Bring up the next pair: one that was set back by an undo, else the one chosen ahead."""
        if self._taken_back:  # its prediction stays the one from before the verdict was known
            return self._show(self._taken_back.pop())
        pair = self._next.result()
        if pair.key in self._skipped:
            pair = self._chosen([]).result()
        self._show(self._fresh(pair))
        self._next = self._choose_ahead()

    def _choose_ahead(self) -> Future[Pair]:
        """Choose while the judge looks at the pair that is up."""
        return self._chosen([self._up[0]])

    def _chosen(self, waiting: list[Pair]) -> Future[Pair]:
        others = [j for j in self.by_all if not self._is_mine(j)]
        return self._pool.submit(
            self._chooser.next, self.judgements,
            waiting=waiting, skipped=set(self._skipped), others=others,
        )  # fmt: skip

    def _fresh(self, pair: Pair) -> Up:
        more = self._chooser.further(pair) if self._four else ()
        return pair, self._scores, more

    def _show(self, up: Up) -> None:
        """Put up what a verdict may be given of, under the next number."""
        self._number += 1
        self._up = up

    def _train_if_due(self) -> None:
        count = len(self._all)
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


def predicted(judged: Sequence[Pair], *, measure: bool) -> list[tuple[int, bool]]:
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
        and judgement.kind != REPEAT  # the head has learned from that pair
        and (judgement.kind == MEASURE) == measure
    ]


def curve(hits: Sequence[tuple[int, bool]], window: int = WINDOW) -> list[dict[str, Any]]:
    """The share of right predictions over the last ``window`` of them, at each: at, value, low, high."""
    sums = [0, *accumulate(hit for _, hit in hits)]
    points = []
    for end in range(1, len(hits) + 1):
        start = max(0, end - window)
        points.append({"at": hits[end - 1][0], **share(sums[end] - sums[start], end - start)})
    return points


def consistency(judged: Sequence[Pair]) -> dict[str, Any]:
    """How often a pair that was judged before got the same verdict (better, worse or tie) again."""
    first: dict[tuple[int, int], int] = {}
    again = []
    for j in judged:
        if j.key in first:
            again.append(first[j.key] == j.verdict)
        first.setdefault(j.key, j.verdict)
    return share(sum(again), len(again))


def pair_agreement(judged: Sequence[Pair]) -> list[dict[str, Any]]:
    """How often two judges said the same (better, worse or tie) of a pair: first, second, and the share.

    Of a pair that a judge was shown more than once, the first verdict counts.
    """
    said: dict[str, dict[tuple[int, int], int]] = {}
    names: dict[str, str] = {}
    for j in judged:
        if j.judge:
            name = names.setdefault(folded(j.judge), j.judge)
            said.setdefault(name, {}).setdefault(j.key, j.verdict)
    told = []
    for first, second in combinations(said, 2):
        both = said[first].keys() & said[second].keys()
        same = sum(said[first][key] == said[second][key] for key in both)
        told.append({"first": first, "second": second, **share(same, len(both))})
    return told
