"""How far several graders agree: Krippendorff's alpha, each one's strictness, and the human ceiling.

Shapes: n works, G graders. Grades [n, G] are tiers, 0 = best, NaN where a grader gave none.

The human ceiling of pairwise accuracy is how often one grader orders two works as the consensus of the others
does (:func:`mirip_fast.data.graders.consensus`), over all graders and the pairs that the others order; that
the grader gives both the same tier counts ½, as equal scores of a model do. A model that learned from all of
them may pass it, as one grader's slips are averaged out in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mirip_fast.data.graders import consensus, grader_names, grades_of
from mirip_fast.evaluation.bootstrap import Interval, bootstrap, group_codes, span
from mirip_fast.evaluation.metrics import IntArray, PairCounter, ratio
from mirip_fast.evaluation.text_table import format_table, printable
from mirip_fast.language import tr

if TYPE_CHECKING:
    import pandas as pd

_SHOWN = 12  # rows of a table of graders in a terminal; all are in the JSON file
#: Figures of :class:`Agreement` and what they are called in a table.
_FIGURES = {
    "alpha": "Krippendorff's alpha (ordinal)",
    "ceiling": "one grader by the others (human ceiling)",
    "model": "the model on the same pairs",
    "model_within": "the model by each grader's own tiers",
}


@dataclass(frozen=True, eq=False)
class Agreement:
    """How far graders agree on some works.

    Attributes:
        works, overlap: works with a grade, and with two and more.
        figures: alpha (1 agreement, 0 chance), ceiling, and with scores model and model_within (0–1) → value,
            NaN where unknown; ``ceiling`` and ``model`` are over the same pairs.
        intervals: 95 % of each figure; None means unknown.
        graders: a row per grader: grader, works, strictness (how many tiers worse than the others' mean on
            the same works; NaN unknown), ceiling (of this grader alone), model (by this one's tiers).
        pairs: a row per two graders with a work in common: first, second, works, same (share of works in the
            same tier), alpha.
    """

    works: int
    overlap: int
    figures: Mapping[str, float]
    intervals: Mapping[str, Interval | None]
    graders: pd.DataFrame
    pairs: pd.DataFrame

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; None for what is unknown."""

        def plain(value: Any) -> Any:
            return None if isinstance(value, float) and np.isnan(value) else value

        figures = {name: plain(value) for name, value in self.figures.items()}
        intervals = {
            f"{name}_interval": None if span is None else [span.low, span.high]
            for name, span in self.intervals.items()
        }
        tables = {
            name: [{k: plain(v) for k, v in row.items()} for row in table.to_dict("records")]
            for name, table in (("graders", self.graders), ("pairs", self.pairs))
        }
        return {"works": self.works, "overlap": self.overlap, **figures, **intervals, **tables}

    def to_line(self) -> str:
        """In a sentence or two."""
        if not self.overlap:
            return (
                f"{len(self.graders)} graders, and no work that two of them graded: how far they agree is "
                "unknown."
            )
        strict = ", ".join(
            f"{printable(name)} {value:+.2f}"
            for name, value in zip(self.graders["grader"], self.graders["strictness"], strict=True)
            if not np.isnan(value)
        )
        return (
            f"How far the graders agree, on {self.overlap:,} works with two grades and more: Krippendorff's "
            f"alpha {_shown(self.figures['alpha'])} (1 is agreement, 0 chance). Of pairs that the others "
            f"order, one grader orders {_shown(self.figures['ceiling'])} alike: the human ceiling of "
            f"pairwise accuracy. Strictness, in tiers: {strict}."
        )

    def to_table(self) -> str:
        """Text for a terminal."""
        head = (
            f"{len(self.graders)} graders; {self.overlap:,} of {self.works:,} works have two grades and "
            "more"
        )
        rows = [
            [tr(_FIGURES[name]), _shown(value), span(self.intervals.get(name))]
            for name, value in self.figures.items()
        ]
        parts = [
            head,
            format_table(["graders", "value", "95 % interval"], rows, "lrl"),
        ]
        cells = [
            [printable(name), works, "" if np.isnan(s) else f"{s:+.2f}", *map(_shown, rest)]
            for name, works, s, *rest in self.graders.head(_SHOWN).itertuples(index=False)
        ]
        names = ["grader", "works", "strictness", "by the others", "model by this one"]
        parts.append(
            format_table(names[: len(self.graders.columns)], cells, "lrrrr"[: len(cells[0])])
        )
        if len(self.pairs):
            cells = [
                [printable(a), printable(b), works, *map(_shown, rest)]
                for a, b, works, *rest in self.pairs.head(_SHOWN).itertuples(index=False)
            ]
            names = ["grader", "and", "works", "same tier", "alpha"]
            parts.append(format_table(names, cells, "llrrr"))
        left = max(len(self.graders), len(self.pairs)) - _SHOWN
        return "\n\n".join(parts + ([f"… {left} rows more in the JSON file"] if left > 0 else []))


def agreement(
    images: pd.DataFrame,
    scores: ArrayLike | None = None,
    *,
    rounds: int = 0,
) -> Agreement | None:
    """How far the graders of a table of images agree; None with fewer than two.

    Args:
        images: a table of images (:mod:`mirip_fast.data.table`), with ``group`` for the intervals.
        scores: [n] a model's scores of them, to be told beside.
        rounds: see :func:`mirip_fast.evaluation.bootstrap.bootstrap`.
    """
    import pandas as pd

    names, grades = grader_names(images), grades_of(images)
    if len(names) < 2:
        return None
    there = np.isfinite(grades)
    counts = there.sum(axis=1)
    n_tiers = len(images["tier"].cat.categories)
    others = [consensus(np.delete(grades, g, axis=1)) for g in range(len(names))]
    both = [np.flatnonzero(there[:, g] & (others[g] >= 0)) for g in range(len(names))]
    human = [PairCounter(-grades[rows, g], others[g][rows], n_tiers) for g, rows in enumerate(both)]
    model: list[PairCounter] = []
    own: list[PairCounter] = []
    own_rows = [np.flatnonzero(there[:, g]) for g in range(len(names))]
    if scores is not None:
        score = np.asarray(scores, dtype=np.float64)
        model = [PairCounter(score[rows], others[g][rows], n_tiers) for g, rows in enumerate(both)]
        own = [
            PairCounter(score[rows], grades[rows, g].astype(np.int64), n_tiers)
            for g, rows in enumerate(own_rows)
        ]

    def share(
        counters: Sequence[PairCounter], rows: Sequence[NDArray[np.int64]], weights: IntArray
    ) -> float:
        tables = [c.table(weights[r]) for c, r in zip(counters, rows, strict=True)]
        right, pairs = (sum(float(table[i].sum()) for table in tables) for i in (0, 1))
        return float(ratio(right, pairs))

    def figures(weights: IntArray) -> dict[str, float]:
        found = {"alpha": alpha(grades, n_tiers, weights), "ceiling": share(human, both, weights)}
        if scores is not None:
            found["model"] = share(model, both, weights)
            found["model_within"] = share(own, own_rows, weights)
        return found

    codes = group_codes(images["group"].tolist(), len(images))
    means = [np.nanmean(np.delete(grades[r], g, axis=1), axis=1) for g, r in enumerate(both)]
    by_grader = {
        "grader": names,
        "works": there.sum(axis=0).tolist(),
        "strictness": [
            float((grades[r, g] - means[g]).mean()) if len(r) else np.nan
            for g, r in enumerate(both)
        ],
        "ceiling": [counter.accuracy() for counter in human],
    }
    if scores is not None:
        by_grader["model"] = [counter.accuracy() for counter in own]
    by_pair = []
    for a in range(len(names)):
        for b in range(a + 1, len(names)):
            two = grades[there[:, a] & there[:, b]][:, [a, b]]
            if len(two):
                same = float((two[:, 0] == two[:, 1]).mean())
                by_pair.append((names[a], names[b], len(two), same, alpha(two, n_tiers)))
    return Agreement(
        works=int((counts > 0).sum()),
        overlap=int((counts > 1).sum()),
        figures=figures(np.ones(len(images), dtype=np.int64)),
        intervals=bootstrap(figures, codes, rounds=rounds),
        graders=pd.DataFrame(by_grader),
        pairs=pd.DataFrame(by_pair, columns=["first", "second", "works", "same", "alpha"]),
    )


def alpha(grades: NDArray[np.float64], n_tiers: int, weights: ArrayLike | None = None) -> float:
    """Krippendorff's alpha for ordinal grades; NaN where no work has two, or all are the same tier.

    (Krippendorff 2019, *Content Analysis*, chapter 12: 1 less the observed disagreement by the expected one,
    from the matrix of coincidences.)

    Args:
        grades: [n, G] tiers from 0 to ``n_tiers`` − 1, NaN for none.
        n_tiers: K.
        weights: [n] how often each work counts; 1 each when not given.
    """
    times = np.stack([(grades == tier).sum(axis=1) for tier in range(n_tiers)], axis=1)  # [n, K]
    count = times.sum(axis=1)
    weight = (np.ones(len(grades)) if weights is None else np.asarray(weights, np.float64)) * (
        count > 1
    )
    weight /= np.maximum(count - 1, 1)
    seen = times.T @ (weight[:, None] * times) - np.diag(weight @ times)
    of_tier = seen.sum(axis=0)
    upto = np.cumsum(of_tier) - of_tier / 2  # grades before the middle of a tier
    apart = (upto[:, None] - upto) ** 2
    return 1 - float(ratio((of_tier.sum() - 1) * (seen * apart).sum(), of_tier @ apart @ of_tier))


def _shown(value: float) -> str:
    return tr("unknown") if np.isnan(value) else f"{value:.4f}"
