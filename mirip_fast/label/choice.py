"""Which pair to show next: one that teaches, one that measures, or one that was shown before.

Both works of a pair lie in one split, as ``train --pairs`` uses no other pairs. Pairs that teach are of the
train split, those that measure of val and test, drawn at random: from pairs that were chosen, and works that
the head learns from in other pairs, nothing fair can be said about how good it is.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mirip_fast.label.committee import Committee, information
from mirip_fast.label.judgements import MEASURE, REPEAT, TEACH, Judgement, Pair, as_arrays

Index = NDArray[np.int64]

#: Pairs that are drawn to choose one at random among, where there are more.
CANDIDATES = 20_000
#: Works among which the partner is chosen that makes the pair tell most. Few on purpose: the most informative
#: of all pairs are outliers, and heads that learned from them were worse than those that learned from
#: random pairs; see docs/label.md.
PARTNERS = 5
#: Judgements that must lie between a pair and its repetition.
REPEAT_AFTER = 10
#: A work comes back after so many other pairs, where there are enough works.
REST = 8
#: Of the pairs that measure, so many in turn are of val and of test: training chooses its best epoch by val.
MEASURE_IN = ("val", "val", "test")


@dataclass(frozen=True)
class Shares:
    """How often pairs measure and are repeated (0–1), and whether teaching pairs are chosen."""

    measure: float = 0.25
    repeat: float = 0.05
    informative: bool = True


class Chooser:
    """Draws the next pair.

    Args:
        splits: train, val and test → works that may be shown.
        committee: judges what a pair would teach.
        shares: of the kinds of pairs.
        seed: of everything drawn.
    """

    def __init__(
        self, splits: Mapping[str, Index], committee: Committee, shares: Shares, seed: int = 0
    ):
        self._splits, self._committee, self._shares = splits, committee, shares
        self._rng = np.random.default_rng(seed)

    def next(
        self,
        judged: Sequence[Judgement],
        *,
        waiting: Sequence[Pair] = (),
        skipped: Collection[tuple[int, int]] = (),
    ) -> Pair:
        """The pair to show after ``judged`` and those that are still waiting for a verdict.

        Args:
            judged: all judgements so far, in order.
            waiting: pairs that were chosen and are not judged yet.
            skipped: keys of pairs that the judge did not want to compare.
        """
        before = [*(j.pair for j in judged), *waiting]
        taken = {pair.key for pair in before} | set(skipped)
        pair: Pair | None = None
        kind = self._due(before)
        if kind == REPEAT:
            pair = self._repeat(judged, waiting, skipped)
        if kind == MEASURE:
            pair = self._measure(before, taken)
        if pair is None:
            pair = self._teach(judged, before, taken)
        if pair is None:  # every pair was judged: measure, or ask again
            pair = self._measure(before, taken) or self._repeat(judged, waiting, skipped, after=0)
        if pair is None:
            pair = self._any(before)
        return pair if pair.kind == REPEAT else self._sides(pair)

    def _due(self, before: Sequence[Pair]) -> str:
        """The kind that is furthest behind its share."""
        counts = Counter(pair.kind for pair in before)
        behind = {
            kind: share * (len(before) + 1) - counts[kind]
            for kind, share in ((REPEAT, self._shares.repeat), (MEASURE, self._shares.measure))
        }
        kind = max(behind, key=lambda kind: behind[kind])
        return kind if behind[kind] >= 1 else TEACH

    def _repeat(
        self,
        judged: Sequence[Judgement],
        waiting: Sequence[Pair],
        skipped: Collection[tuple[int, int]],
        after: int = REPEAT_AFTER,
    ) -> Pair | None:
        """A pair that was judged once, sides swapped."""
        times = Counter([*(j.pair.key for j in judged), *(pair.key for pair in waiting)])
        old = [j.pair for j in judged[: max(0, len(judged) - after)]]
        once = [pair for pair in old if times[pair.key] == 1 and pair.key not in skipped]
        if not once:
            return None
        pair = once[int(self._rng.integers(len(once)))]
        return Pair(pair.other, pair.one, REPEAT)

    def _measure(self, before: Sequence[Pair], taken: Collection[tuple[int, int]]) -> Pair | None:
        """Two random works of val or test."""
        count = sum(pair.kind == MEASURE for pair in before)
        first = MEASURE_IN[count % len(MEASURE_IN)]
        for split in (first, *sorted(set(MEASURE_IN) - {first})):
            candidates = self._fresh(self._splits[split], taken, CANDIDATES)
            if len(candidates):
                one, other = candidates[int(self._rng.integers(len(candidates)))].tolist()
                return Pair(one, other, MEASURE)
        return None

    def _teach(
        self,
        judged: Sequence[Judgement],
        before: Sequence[Pair],
        taken: Collection[tuple[int, int]],
    ) -> Pair | None:
        """A pair of the train split: a work that was shown least, with the partner that tells most.

        The partner is one of the few that were shown least, too: so the works take turns, and what is
        learned is spread over all of them (which helped most in simulations, see docs/label.md).
        """
        works = self._splits["train"]
        if not self._shares.informative:
            candidates = self._fresh(works, taken, CANDIDATES)
            if not len(candidates):
                return None
            one, other = candidates[int(self._rng.integers(len(candidates)))].tolist()
            return Pair(one, other)
        rest = min(REST, len(works) // 4)
        tired = {work for pair in before[-rest:] for work in pair.key} if rest else set()
        times = Counter(work for pair in before for work in pair.key)
        turns = self._rng.random(len(works)) + [times[work] for work in works.tolist()]
        order: list[int] = works[np.argsort(turns)].tolist()
        candidates = _partners([work for work in order if work not in tired], taken)
        if not len(candidates):
            candidates = _partners(order, taken)
        if not len(candidates):
            return None
        self._committee.fit(*as_arrays(judged))
        scores = self._committee.scores()
        gained = information(scores[:, candidates[:, 0]] - scores[:, candidates[:, 1]])
        one, other = candidates[int(np.argmax(gained))].tolist()
        return Pair(one, other)

    def _fresh(self, works: Index, taken: Collection[tuple[int, int]], most: int) -> Index:
        """[m, 2] pairs of works that were not shown, the smaller number first; of many, about ``most``."""
        n = len(works)
        if n * (n - 1) // 2 <= most:
            one, other = np.triu_indices(n, 1)
            pairs = np.stack([works[one], works[other]], axis=1)
        else:
            drawn = works[self._rng.integers(n, size=(most, 2))]
            pairs = drawn[drawn[:, 0] != drawn[:, 1]]
        pairs = np.sort(pairs, axis=1)
        keys = pairs[:, 0] * (int(works.max(initial=0)) + 1) + pairs[:, 1]
        old = [a * (int(works.max(initial=0)) + 1) + b for a, b in taken]
        return pairs[~np.isin(keys, np.array(old, dtype=np.int64))]

    def _any(self, before: Sequence[Pair]) -> Pair:
        """Any two works of the train split, when there is nothing else left."""
        one, other = self._rng.choice(self._splits["train"], 2, replace=False).tolist()
        return Pair(one, other, REPEAT if before else TEACH)

    def _sides(self, pair: Pair) -> Pair:
        """Left and right by the toss of a coin."""
        return Pair(pair.other, pair.one, pair.kind) if self._rng.random() < 0.5 else pair


def _partners(order: Sequence[int], taken: Collection[tuple[int, int]]) -> Index:
    """[m, 2] the first work in order that has partners left, with the first few of them; m may be 0."""
    for first in order:
        fresh = (w for w in order if w != first and (min(first, w), max(first, w)) not in taken)
        found = [(first, work) for work in itertools.islice(fresh, PARTNERS)]
        if found:
            return np.array(found, dtype=np.int64)
    return np.empty((0, 2), dtype=np.int64)
