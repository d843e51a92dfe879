"""One grader's session: which work is up, and the file of tiers, a row per work and grader."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mirip_fast.data.graders import PREFIX
from mirip_fast.data.manifest import name_from
from mirip_fast.data.table import given_name, own_columns, tier_column
from mirip_fast.errors import DataError
from mirip_fast.evaluation.agreement import Agreement, agreement
from mirip_fast.label.judgement_file import JudgementFile
from mirip_fast.label.works import LabelWorks
from mirip_fast.ranking.held_out import load_calibration
from mirip_fast.ranking.score_model import ScoreModel
from mirip_fast.serving import STALE, BadRequestError
from mirip_fast.text import folded, nfc, shown

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)


class GradeFile(JudgementFile):
    """The file of tiers of the works of a data set, in the columns by which that is read.

    Args:
        path: the file; an existing one is gone on from.
        works: what is graded.

    Attributes:
        tiers: their names, best first.
        unknown: rows of other works; they are left as they are.

    Raises:
        DataError: see :class:`JudgementFile`; or a row has another tier.
    """

    def __init__(self, path: Path, works: LabelWorks):
        manifest = works.images
        options = manifest.options
        self.tiers, self.works = manifest.tiers, works
        self.image, self.tier = manifest.image_column, options.tier_column
        self.grader = options.grader_column
        table = manifest.table
        named = zip(table["named"], table["file"], strict=True)
        names = [name_from(path.parent, name, Path(file)) for name, file in named]
        # A row per grader repeats what is known of the work; other graders' tiers are no part of that.
        own = {
            given_name(c): table[c].tolist() for c in own_columns(table) if not c.startswith(PREFIX)
        }
        cells = {**own, options.id_column: manifest.ids, self.image: names}
        self._of_work = [
            dict(zip(cells, row, strict=True)) for row in zip(*cells.values(), strict=True)
        ]
        self._said: dict[int, tuple[int, str, str]] = {}  # row → work, tier and grader
        self._work = {nfc(name): i for i, name in enumerate(names)}
        first = (options.id_column, self.image, self.tier, self.grader)
        super().__init__(
            path,
            (*first, *(name for name in own if name not in first)),
            required=(self.image, self.grader, self.tier),
            verdicts=self.tiers,
            what="tiers by work and grader",
        )
        given = [nfc(cells.get(self.tier, "").strip()) for cells in self.rows.values()]
        foreign = next((tier for tier in given if tier and tier not in self.tiers), None)
        if foreign is not None:
            self.close()
            raise DataError(
                f"{shown(path)}: the tier {foreign!r} is none of {', '.join(self.tiers)}. Give the tiers of "
                "this file with --tiers, or another file with --out."
            )
        self.unknown = len(self.rows) - given.count("") - len(self.grades())

    def grades(self) -> list[tuple[int, int, str, str]]:
        """Row, work, tier and grader of each row."""
        with self.lock:
            return [(row, *self._said[row]) for row in self.rows if row in self._said]

    def _keep(self, row: dict[str, str], text: bytes) -> int:
        number = super()._keep(row, text)
        named = (self.image, self.tier, self.grader)
        image, tier, grader = (nfc(row.get(name, "").strip()) for name in named)
        if image in self._work and tier in self.tiers:
            self._said[number] = self._work[image], tier, grader
        return number

    def grade(self, work: int, tier: str, grader: str, old: Sequence[int] = ()) -> int:
        """Write one verdict in the place of ``old`` rows; see :meth:`JudgementFile.append`."""
        texts = {
            name: "" if cell is None else str(cell) for name, cell in self._of_work[work].items()
        }
        return self.append({**texts, self.tier: tier, self.grader: grader}, instead_of=old)[0]

    def agreement(self) -> Agreement | None:
        """How far the graders agree; None with fewer than two."""
        return agreement(self._table())

    def _table(self) -> pd.DataFrame:
        table = self.works.images.table[["image_id", "group"]]
        table = table.assign(tier=tier_column([None] * len(table), self.tiers))
        texts: dict[str, list[str]] = defaultdict(lambda: [""] * len(table))
        names: dict[str, str] = {}
        for _, work, tier, grader in self.grades():
            texts[PREFIX + names.setdefault(folded(grader), grader)][work] = tier
        for column, tiers in texts.items():
            table[column] = tiers
        return table


class Grading:
    """Shows one work at a time and takes its tier; every method may be called from any thread.

    Args:
        file: where the tiers are kept.
        order: works to be graded, the first one first.
        grader: who grades.
        again: ask for works that this grader has graded, too.
    """

    def __init__(self, file: GradeFile, order: Sequence[int], grader: str, *, again: bool = False):
        self._file, self._order, self.judge_name = file, list(order), grader
        self._again, self._number = again, 0
        self._history: list[tuple[int, int]] = []  # row and work, of this session

    def close(self) -> None:
        """Nothing goes on in the background."""

    @property
    def made_now(self) -> int:
        """Works graded in this session."""
        return len(self._history)

    def mine(self) -> dict[int, list[int]]:
        """Work → its rows by this grader."""
        rows: dict[int, list[int]] = {}
        for row, work, _, grader in self._file.grades():
            if folded(grader) == folded(self.judge_name):
                rows.setdefault(work, []).append(row)
        return rows

    def grade(self, number: int, tier: int) -> None:
        """Take the tier of the work that is up (0 is the best); it is on the disk when this returns.

        Raises:
            BadRequestError: another work is up by now.
            DataError, DiskFullError: it could not be written; the work stays up.
        """
        with self._file.lock:
            work = self._require(number)
            if not 0 <= tier < len(self._file.tiers):
                raise BadRequestError("There is no such tier", STALE)
            old = self.mine().get(work, [])
            row = self._file.grade(work, self._file.tiers[tier], self.judge_name, old)
            self._history.append((row, work))
            self._number += 1

    def skip(self, number: int) -> None:
        """Put the work off until all others are graded.

        Raises:
            BadRequestError: another work is up by now.
        """
        with self._file.lock:
            work = self._require(number)
            self._order.remove(work)
            self._order.append(work)
            self._number += 1

    def take_back(self, row: int | None = None) -> None:
        """Undo the last verdict of this session, or one row of the file, and show its work again.

        Raises:
            DataError: there is none, or it is another grader's.
        """
        with self._file.lock:
            if row is None and not self._history:
                raise DataError("There is no judgement of this session left to take back")
            row = self._history[-1][0] if row is None else row
            work = next((work for work, rows in self.mine().items() if row in rows), None)
            if work is None:
                raise DataError("That judgement was taken back already, or is another judge's")
            self._file.take_back(row)
            self._history = [made for made in self._history if made[0] != row]
            self._order = [work, *(other for other in self._order if other != work)]
            self._number += 1

    def listing(self) -> list[dict[str, Any]]:
        """What this grader graded, the newest first, with what others said of the same works."""
        with self._file.lock:
            mine = self.mine()
            return [
                {"row": row, "works": [work], "label": tier, "judge": who, "mine": row in mine[work]}
                for row, work, tier, who in reversed(self._file.grades()) if work in mine
            ]  # fmt: skip

    def state(self) -> dict[str, Any]:
        """What the page shows: plain types, and no word from a file's name."""
        with self._file.lock:
            mine, left = self.mine(), self._left()
            graders = {folded(who) for *_, who in self._file.grades()}
            agreed = self._file.agreement() if len(graders) > 1 else None
            return {
                "number": self._number,
                "works": left[:1],
                "ahead": left[1:2],
                "tiers": self._file.tiers,
                "judge": self.judge_name,
                "judged": len(mine),
                "now": self.made_now,
                "left": len(left),
                "undo": bool(self._history),
                "grades": None if agreed is None else agreed.to_dict(),
            }

    def _left(self) -> list[int]:
        done = {work for _, work in self._history} if self._again else self.mine()
        return [work for work in self._order if work not in done]

    def _require(self, number: int) -> int:
        left = self._left()
        if number != self._number or not left:
            raise BadRequestError("That work was graded already", STALE)
        return left[0]


def grading_order(
    works: LabelWorks, model: ScoreModel | None, *, again: bool, seed: int
) -> list[int]:
    """Works in the order of grading: those with no tier in the data, or all with ``again``.

    With a model that knows tiers, every second one is the one that it is least sure of (the entropy of its
    tiers' probabilities); the others are drawn at random, the same for every grader.
    """
    graded = works.images.tier_codes >= 0
    todo = np.flatnonzero(works.shown & (again | ~graded))
    drawn: list[int] = np.random.default_rng(seed).permutation(todo).tolist()
    chances = None
    if model is not None and len(todo):
        scores = model.score(works.store, [works.images.hashes[i] for i in todo])
        chances = load_calibration(model).tier_probabilities(scores)
        if chances is None:
            log.info("The model knows no tiers' probabilities: works are drawn at random")
    if chances is None:
        return drawn
    entropy = -(chances * np.log(np.maximum(chances, 1e-12))).sum(axis=1)
    unsure = todo[np.argsort(-entropy, kind="stable")].tolist()
    both = chain.from_iterable(zip_longest(unsure, drawn))
    return list(dict.fromkeys(work for work in both if work is not None))
