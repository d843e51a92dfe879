"""Which pair to show next: one that teaches, one that measures, or one that was shown before.

Both works of a pair lie in one split, as ``train --pairs`` uses no other pairs. Pairs that teach are of the
train split, those that measure of val and test, drawn at random: from pairs that were chosen, and works that
the head learns from in other pairs, nothing fair can be said about how good it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mirip_fast.config import LabelConfig
from mirip_fast.models.preference import Preferences, fit_pairs

Index = NDArray[np.int64]

#: Why a pair was shown: to learn from; to measure (works kept from training); a second time.
TEACH, MEASURE, REPEAT = "teach", "measure", "repeat"

#: Pairs that are drawn to choose one at random among, where there are more.
CANDIDATES = 20_000
#: Random pairs among which the one that tells most is shown.
TELLING = 1_000
#: Judgements of works of the train split before pairs are chosen; the first are random.
FIRST_CHOSEN = 10
#: The kernel is learned anew where there are so many times the judgements that it was learned from.
GROWN = 1.2
#: Works that pairs are chosen among, at most, and judgements that the choice learns from, the last ones.
WORKS, LEARNED = 4_000, 1_000
#: Judgements that must lie between a pair and its repetition.
REPEAT_AFTER = 10
#: A work comes back after so many other pairs, where there are enough works.
REST = 8
#: Of the pairs that measure, so many in turn are of val and of test: training chooses its best epoch by val.
MEASURE_IN = ("val", "val", "test")


@dataclass(frozen=True)
class Pair:
    """Two works to be compared, the left one first, and what was said of them.

    Attributes:
        one, other: the works.
        kind: why it was shown.
        label: 1 the left is better, −1 the right, 0 a tie; None before it is judged.
        predicted: what the head of that moment expected, 1 or −1; None where there was none.
        judge: who; empty where the file does not say.
        row: its number in the file.
    """

    one: int
    other: int
    kind: str = TEACH
    label: int | None = None
    predicted: int | None = None
    judge: str = ""
    row: int = 0

    @cached_property
    def key(self) -> tuple[int, int]:
        """The two works whatever their sides."""
        return min(self.one, self.other), max(self.one, self.other)

    @property
    def verdict(self) -> int:
        """The label, of a judged pair, as if the work with the smaller number stood left."""
        label = self.label or 0
        return label if self.one == self.key[0] else -label


class Chooser:
    """Draws the next pair.

    Args:
        splits: train, val and test → works that may be shown.
        features: [n, D] of all works, from which the choice learns what a pair would tell.
        blocks: numbers per block of D, see :func:`mirip_fast.models.preference.fit_pairs`.
        config: the shares of pairs that measure and are repeated, and whether teaching pairs are chosen.
        seed: of everything drawn.
    """

    def __init__(
        self,
        splits: Mapping[str, Index],
        features: NDArray[np.floating],
        blocks: Sequence[int],
        config: LabelConfig,
        seed: int = 0,
    ):
        self._splits, self._features, self._blocks = splits, features, blocks
        self._config, self._rng = config, np.random.default_rng(seed)
        self.informative = config.choose == "informative"
        some = self._rng.permutation(splits["train"])[:WORKS]
        self._works: Index = np.sort(some)  # that are chosen among
        self._fitted: Preferences | None = None
        self._fitted_from = 0  # judgements when the kernel was learned

    def next(
        self,
        judged: Sequence[Pair],
        *,
        waiting: Sequence[Pair] = (),
        skipped: Collection[tuple[int, int]] = (),
        others: Sequence[Pair] = (),
    ) -> Pair:
        """The pair to show after ``judged`` and those that are still waiting for a verdict.

        Args:
            judged: all judgements so far, in order.
            waiting: pairs that were chosen and are not judged yet.
            skipped: keys of pairs that the judge did not want to compare.
            others: pairs that other judges judged: to measure, those come first.
        """
        before = [*judged, *waiting]
        taken = {pair.key for pair in before} | set(skipped)

        def again(after: int = REPEAT_AFTER) -> Pair | None:
            """A pair that was judged once, sides swapped."""
            times = Counter(pair.key for pair in before)
            old = judged[: max(0, len(judged) - after)]
            return self._swapped([p for p in old if times[p.key] == 1 and p.key not in skipped])

        kind = self._due(before)
        pair = again() if kind == REPEAT else None
        if kind == MEASURE:
            pair = self._measure(before, taken, others)
        pair = pair or self._teach(judged, before, taken)
        # Where every pair was judged: measure, or ask again.
        pair = pair or self._measure(before, taken) or again(0)
        if pair is None:  # any two, when there is nothing else left
            one, other = self._rng.choice(self._splits["train"], 2, replace=False).tolist()
            pair = Pair(one, other, REPEAT if before else TEACH)
        if pair.kind != REPEAT and self._rng.random() < 0.5:  # left and right by the toss of a coin
            return Pair(pair.other, pair.one, pair.kind)
        return pair

    def further(self, pair: Pair) -> tuple[int, ...]:
        """Two more works of the split of ``pair``; none where it has no two more."""
        split = next((s for s in self._splits.values() if pair.one in s), np.empty(0, np.int64))
        left = split[~np.isin(split, pair.key)]
        return tuple(self._rng.choice(left, 2, replace=False).tolist()) if len(left) > 1 else ()

    def kind(self, pair: Pair) -> str:
        """Whether a pair that was not judged before teaches or measures."""
        return TEACH if pair.one in self._splits["train"] else MEASURE

    def _due(self, before: Sequence[Pair]) -> str:
        """The kind that is furthest behind its share."""
        counts = Counter(pair.kind for pair in before)
        shares = ((REPEAT, self._config.repeat_share), (MEASURE, self._config.measure_share))
        behind = {kind: share * (len(before) + 1) - counts[kind] for kind, share in shares}
        kind = max(behind, key=lambda kind: behind[kind])
        return kind if behind[kind] >= 1 else TEACH

    def _swapped(self, pairs: Sequence[Pair]) -> Pair | None:
        if not pairs:
            return None
        pair = pairs[int(self._rng.integers(len(pairs)))]
        return Pair(pair.other, pair.one, REPEAT)

    def _drawn(self, candidates: Index, kind: str) -> Pair | None:
        if not len(candidates):
            return None
        one, other = candidates[int(self._rng.integers(len(candidates)))].tolist()
        return Pair(one, other, kind)

    def _measure(
        self,
        before: Sequence[Pair],
        taken: Collection[tuple[int, int]],
        others: Sequence[Pair] = (),
    ) -> Pair | None:
        """Two random works of val or test, or two that others were shown."""
        theirs = [p.key for p in others if p.kind == MEASURE and p.key not in taken]
        if theirs:
            return self._drawn(np.array(theirs), MEASURE)
        count = sum(pair.kind == MEASURE for pair in before)
        first = MEASURE_IN[count % len(MEASURE_IN)]
        for split in (first, *sorted(set(MEASURE_IN) - {first})):
            pair = self._drawn(self._fresh(self._splits[split], taken, CANDIDATES), MEASURE)
            if pair is not None:
                return pair
        return None

    def _teach(
        self,
        judged: Sequence[Pair],
        before: Sequence[Pair],
        taken: Collection[tuple[int, int]],
    ) -> Pair | None:
        """A pair of the train split: the one of some random ones whose verdict tells most (BALD).

        No work comes back at once, so that nobody looks at the same one all the time.
        """
        posterior = self._posterior(judged) if self.informative else None
        if posterior is None:
            return self._drawn(self._fresh(self._splits["train"], taken, CANDIDATES), TEACH)
        works = self._works
        rest = min(REST, len(works) // 4)
        tired = [work for pair in before[-rest:] for work in pair.key] if rest else []
        candidates = self._fresh(works[~np.isin(works, tired)], taken, TELLING)
        if not len(candidates):
            candidates = self._fresh(works, taken, CANDIDATES)[:CANDIDATES]
        if not len(candidates):
            return None
        told = posterior.information(np.searchsorted(works, candidates))
        one, other = candidates[int(np.argmax(told))].tolist()
        return Pair(one, other)

    def _posterior(self, judged: Sequence[Pair]) -> Preferences | None:
        """What the judgements say of the works that are chosen among; None while they are too few."""
        works = [(j.one, j.other) for j in judged]
        pairs = np.array(works, dtype=np.int64).reshape(-1, 2)
        label = np.array([j.label for j in judged], dtype=np.int64)
        known = np.isin(pairs, self._works).all(axis=1)
        index, label = np.searchsorted(self._works, pairs[known]), label[known]
        index, label = index[-LEARNED:], label[-LEARNED:]
        if known.sum() < FIRST_CHOSEN or not label.any():
            return None
        if self._fitted is None or known.sum() >= GROWN * self._fitted_from:
            rows = self._features[self._works]
            self._fitted = fit_pairs(rows, index, label, blocks=self._blocks)
            self._fitted_from = int(known.sum())
        return self._fitted.given(index, label)

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
