"""Everything that is told about one model on one split, from one pass of scores.

:func:`evaluate` sees scores and grades only, so head-only and end-to-end models are evaluated by the same
code.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mirip_fast.errors import ConfigError, DataError
from mirip_fast.evaluation import metrics
from mirip_fast.evaluation.agreement import Agreement
from mirip_fast.evaluation.bootstrap import (
    FEW_GROUPS,
    Interval,
    bootstrap,
    group_codes,
    span,
    varying_pairs,
)
from mirip_fast.evaluation.calibration import Calibration
from mirip_fast.evaluation.metrics import (
    FloatArray,
    IntArray,
    PairCounter,
    check_codes,
    check_scores,
    ratio,
)
from mirip_fast.evaluation.reliability import reliability
from mirip_fast.evaluation.text_table import format_table
from mirip_fast.language import tr

if TYPE_CHECKING:
    import pandas as pd

#: Of finer grades, where they have to be told apart.
STEPS = 64

_SHOWN_VALUES = 12  # more within values than this are in the JSON file only
_MIN_WORKS = 2  # one work alone says nothing about its group
#: Figures of a report that have an interval of their own.
_FIGURES = (
    "pairwise_accuracy", "macro_accuracy", "within_accuracy", "within_macro_accuracy", "kendall_tau_b",
    "spearman",
)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Report:
    """How well scores order graded images, and how sure that is. An interval of None means unknown.

    Where images have no tiers but finer grades, pairs are those of different grades, and all that is told of
    tiers is empty or None; groups, mistakes and probabilities look at the grades in 64 steps at most.

    Attributes:
        tier_names: best first; K tiers; none where finer grades are evaluated by.
        tier_counts: images of each tier.
        n_images, n_groups, n_pairs: images, groups (an image without one counts as one), cross-tier
            pairs.
        pairwise_accuracy: share of cross-tier pairs in the right order (0–1, score ties ½).
        macro_accuracy: mean over the tier pairs that occur; None without tiers.
        within_accuracy: over the ``within_pairs`` pairs with equal within value; None without the
            column or without such a pair.
        within_macro_accuracy: mean over the within values that have a pair, each counted alike.
        within_values: a row per such value, in order of appearance: value, pairs (1 or more), accuracy (share
            of them in the right order), interval.
        tier_pairs: a row per tier pair that occurs, best tiers first (all pairs, whatever their within
            value): better, worse, pairs, accuracy, interval.
        groups: a row per named group of two works or more, by the pairs of one of its works with a work
            outside it, worst first: group, pairs, accuracy, images.
        kendall_tau_b: −1 … 1, positive = good; None where all scores are equal.
        spearman: with the ``spearman_images`` finer grades that are there; None where not defined.
        ndcg: k → NDCG@k; None where not defined.
        by_quota: how well tiers predicted by quota (:func:`metrics.tiers_by_quota`) meet the true ones; None
            without tiers. ``accuracy`` is the share of images whose tier is met, ``macro_f1`` the mean F1
            over the tiers that occur as truth or prediction (0–1), each with its interval; ``confusion``
            counts images by [true tier][predicted tier].
        probabilities: of pairs and tiers, held against these images; None if unknown. ``source`` and
            ``images``: the held-out scores that they were learned from; ``temperature``: T of P(a beats b) =
            σ((s_a − s_b) / T), None where it is infinite; ``pairs``: see
            :func:`mirip_fast.evaluation.reliability.reliability`; ``tiers``: as ``by_quota``, of the most
            probable tier, None where it is unknown; ``warnings``: what a reader has to know.
        probabilities_unknown: why; None where they are known or nobody asked.
        seen: images that the model or its calibration was made with.
        rounds, confidence, seed: of the bootstrap.
        image_ids, scores, tiers, within, grades: what was evaluated, [n] each: tiers are codes, 0 = best (the
            ranks of the finer grades without tiers), within codes are None without the column, finer
            grades NaN where there are none.
        by_grader: whether pairwise and macro accuracy and the tier pairs are those inside one grader's tiers;
            two works that the same graders ordered count as one pair.
        applicants: how the applicants are ordered whose works these are; None where nobody asked; see
            :func:`mirip_fast.ranking.applicants.applicant_accuracy`.
        agreement: how far several graders agree on the same images; None where nobody asked.
        better_than: a sentence: whether the model is better than chance, ridge regression or the last run.
    """

    tier_names: tuple[str, ...]
    tier_counts: tuple[int, ...]
    n_images: int
    n_groups: int
    n_pairs: int
    pairwise_accuracy: float
    pairwise_accuracy_interval: Interval | None
    macro_accuracy: float | None
    macro_accuracy_interval: Interval | None
    within_pairs: int
    within_accuracy: float | None
    within_accuracy_interval: Interval | None
    within_macro_accuracy: float | None
    within_macro_accuracy_interval: Interval | None
    within_values: pd.DataFrame = field(repr=False)
    tier_pairs: pd.DataFrame = field(repr=False)
    groups: pd.DataFrame = field(repr=False)
    kendall_tau_b: float | None
    kendall_tau_b_interval: Interval | None
    spearman: float | None
    spearman_interval: Interval | None
    spearman_images: int
    ndcg: dict[int, float | None]
    ndcg_intervals: dict[int, Interval | None]
    by_quota: dict[str, Any] | None
    probabilities: dict[str, Any] | None
    probabilities_unknown: str | None
    seen: int
    rounds: int
    confidence: float
    seed: int
    image_ids: tuple[str, ...] = field(repr=False)
    scores: FloatArray = field(repr=False)
    tiers: IntArray = field(repr=False)
    within: IntArray | None = field(repr=False)
    grades: FloatArray = field(repr=False)
    by_grader: bool = False
    applicants: dict[str, Any] | None = None
    agreement: Agreement | None = None
    better_than: str = ""

    def worst_mistakes(self, k: int = 10, *, max_per_image: int = 2) -> pd.DataFrame:
        """At most ``k`` wrongly ordered pairs, largest gap first, an image at most twice by default.

        A row has ``better_id``, ``better_tier`` and ``better_score`` of the image with the better tier, the
        same of the one with the higher score as ``worse_…``, and ``gap``, the difference of the scores.

        With a within column only pairs inside the same value are listed; equal scores are no
        mistake here. One badly scored image is wrong against hundreds of others, and a list of it alone
        would say little: the pairs are taken greedily by gap, passing over those with an image that was
        shown ``max_per_image`` times.

        Raises:
            ConfigError: ``k`` is negative or ``max_per_image`` below 1.
        """
        import pandas as pd

        if k < 0 or max_per_image < 1:
            raise ConfigError(
                f"worst mistakes: k={k} (at least 0), max_per_image={max_per_image} (at least 1)"
            )
        tiers = self.tiers if self.tier_names else _steps(self.tiers)
        better, worse = _wrong_pairs(self.scores, tiers, self.within, k)
        gap = self.scores[worse] - self.scores[better]
        shown = np.zeros(self.n_images, dtype=np.int64)
        taken: list[tuple[int, int]] = []
        for row in np.lexsort((worse, better, -gap)):
            if len(taken) == k:
                break
            pair = [int(better[row]), int(worse[row])]
            if (shown[pair] < max_per_image).all():
                shown[pair] += 1
                taken.append((pair[0], pair[1]))
        table = {}
        for side, rows in enumerate(np.array(taken, np.int64).reshape(-1, 2).T):
            name = ("better", "worse")[side]
            table[f"{name}_id"] = [self.image_ids[i] for i in rows]
            table[f"{name}_tier"] = [
                self.tier_names[self.tiers[i]] if self.tier_names else f"{self.grades[i]:g}"
                for i in rows
            ]
            table[f"{name}_score"] = self.scores[rows].tolist()
        found = pd.DataFrame(table)
        return found.assign(gap=found["worse_score"] - found["better_score"])

    def to_dict(self, mistakes: int = 10) -> dict[str, Any]:
        """Plain JSON types, every number finite or None, with the ``mistakes`` worst mistakes."""
        arrays = {"image_ids", "scores", "tiers", "within", "grades"}
        beside = {"by_quota", "applicants", "agreement", "better_than"}
        told = {
            f.name: plain(getattr(self, f.name))
            for f in fields(self)
            if f.name not in arrays | beside
        }
        for name, value in (plain(self.by_quota) or {}).items():  # tier_accuracy and so on
            told[name if name.startswith(("macro", "confusion")) else f"tier_{name}"] = value
        if self.applicants is not None:
            told["applicants"] = self.applicants
        told["worst_mistakes"] = plain(self.worst_mistakes(mistakes))
        return told

    def to_table(self, mistakes: int = 5) -> str:
        """Text for a terminal: figures, tier pairs, confusion matrix, the worst mistakes, warnings."""
        said = [] if self.applicants is None else [textwrap.fill(tr(self.applicants["said"]), 100)]
        said += [] if self.agreement is None else [self.agreement.to_table()]
        said += [textwrap.fill(self.better_than, 100)] if self.better_than else []
        return "\n\n".join([_report_text(self, mistakes), *said])

    def draw(self, folder: Path, stem: str, about: str) -> list[Path]:
        """Draw what there is, from ``<stem>_scores_by_tier.png`` to ``<stem>_within.png``.

        Args:
            folder: where the files go.
            stem: their names' beginning.
            about: which images were evaluated, for the titles.

        Returns:
            The files written.
        """
        from mirip_fast.evaluation import plots

        names, known = self.tier_names, self.probabilities
        groups, values = self.groups, self.within_values.sort_values("accuracy", kind="stable")
        pairs_of = [f"{row.better} over {row.worse}" for row in self.tier_pairs.itertuples()]
        works_of = [f"{row.group} ({row.images} works)" for row in groups.itertuples()]
        level = (self.pairwise_accuracy, self.confidence)

        def path(what: str) -> Path:
            return folder / f"{stem}_{what}.png"

        files = []
        with plots.drawing([about, *names, *groups["group"], *values["value"]]):
            if names:
                judged, by = self._predicted()
                by = by.replace("by quota", "by quota (as many of each as there are)")
                files += [
                    plots.plot_scores_by_tier(
                        path("scores_by_tier"), self.scores, self.tiers, names, about
                    ),
                    plots.plot_confusion(path("confusion"), judged, names, by, about),
                ]
                pairs_path, title = path("tier_pairs"), "Pairs of two tiers in the right order"
                if len(names) <= plots.MANY_TIERS:
                    drawn = plots.plot_shares(
                        pairs_path, pairs_of, self.tier_pairs, title, about, *level
                    )
                else:
                    drawn = plots.plot_tier_pairs(pairs_path, self.tier_pairs, names, title, about)
                files.append(drawn)
            if known is not None and known["pairs"] is not None:
                title = f"{about}\nprobabilities learned from {known['images']} works ({known['source']})"
                plots.plot_reliability(path("reliability"), known["pairs"], title)
                files.append(path("reliability"))
            if len(groups) > 1:
                title = "Works of a group against all others, right order"
                files.append(
                    plots.plot_shares(path("groups"), works_of, groups, title, about, *level)
                )
            if len(values) > 1:
                title = "Pairs inside the same within value in the right order"
                listed = values["value"].tolist()
                files.append(
                    plots.plot_shares(path("within"), listed, values, title, about, *level)
                )
        return files

    def _predicted(self) -> tuple[dict[str, Any], str]:
        """How well predicted tiers meet the true ones, and how they are predicted; of a report with tiers."""
        if self.probabilities is not None and self.probabilities["tiers"] is not None:
            return self.probabilities["tiers"], "most probable"
        assert self.by_quota is not None
        return self.by_quota, "by quota"

    def __str__(self) -> str:
        return self.to_table()

    def _repr_html_(self) -> str:
        """In a notebook: the table, and the pictures that `evaluate` draws."""
        import base64
        import html
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            about = f"{self.n_images} images"
            drawn = [path.read_bytes() for path in self.draw(Path(folder), "report", about)]
        pictures = "".join(
            f'<img alt="" width="480" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
            for png in drawn
        )
        return f"<pre>{html.escape(str(self))}</pre>{pictures}"


def evaluate(
    scores: ArrayLike,
    tiers: ArrayLike | None,
    *,
    tier_names: Sequence[str],
    image_ids: Sequence[str],
    groups: Sequence[str | None] | None = None,
    tier_scores: Sequence[float | None] | None = None,
    within: Sequence[str | None] | None = None,
    grades: FloatArray | None = None,
    calibration: Calibration | None = None,
    seen: int = 0,
    ks: Sequence[int] = (10,),
    rounds: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Report:
    """Evaluate one pass of scores over graded images.

    An interval is None («unknown») where resampling cannot show how much a figure varies: no rounds, or no
    tier pair with at least 2 groups on each side (for a tier pair or within value: in that one).

    Args:
        scores: [n] finite floats, higher is better.
        tiers: [n] integers, 0 = best, each below ``len(tier_names)``; None to evaluate by ``tier_scores``.
        tier_names: K names, best first; not looked at without tiers.
        image_ids: [n] names for the messages and the worst mistakes.
        groups: [n] group names; None or "" for an image that is its own group. Resampled as wholes.
        tier_scores: [n] finer grades, higher is better; missing ones (None, NaN) are left out.
        within: [n] values of the column inside which a comparison is fair; None or "" is compared
            with none.
        grades: [n, G] tiers by several graders, NaN for none: pairwise accuracy is that of pairs inside one
            grader's tiers (:class:`metrics.PairCounter`), unless there is a within column.
        calibration: what the scores mean, to be held against these images too.
        seen: how many of the images the model or its calibration was made with.
        ks: the k of each NDCG@k.
        rounds: bootstrap resamples; 0 for no intervals.
        confidence: share of resamples inside an interval, between 0 and 1.
        seed: of the bootstrap.

    Raises:
        ConfigError: ``ks``, ``rounds`` or ``confidence`` is out of range.
        DataError: a score is not finite, a tier is unknown, lengths differ, or no two tiers occur;
            without tiers: a finer grade is missing, or all are equal.
    """
    ids, finer = tuple(image_ids), tiers is None
    names = () if finer else tuple(tier_names)
    values, tier, finer_grades = _checked(scores, tiers, tier_scores, ids, names)
    codes = group_codes(groups, len(ids))
    n_tiers, ks = (1, ()) if finer else (len(names), ks)
    drawing: dict[str, Any] = {"rounds": rounds, "confidence": confidence, "seed": seed}

    # What is counted: all pairs (or those inside one grader's tiers), and those inside a within value.
    pooled = PairCounter(values, tier, finer=finer, n_tiers=None if finer else n_tiers)
    by_grader = grades is not None and within is None
    everywhere = PairCounter(values, tier, n_tiers, grades=grades) if by_grader else pooled
    pairs = everywhere.table()[1]
    tier_pairs = np.argwhere(pairs > 0).tolist()
    within_codes, inside, cells = None, None, np.empty((2, 0))
    if within is not None:
        within_codes = check_codes(metrics.codes_of(within), len(ids), "within", lowest=None)
        inside = PairCounter(values, tier, None if finer else n_tiers, within_codes, finer=finer)
        cells = np.stack(inside.by_cell())
    paired = np.flatnonzero(cells[1]).tolist()  # within values that have a pair
    predicted = [] if finer else [metrics.tiers_by_quota(values, tier)]
    if not finer and calibration is not None and calibration.ordinal is not None:
        predicted.append(calibration.ordinal.most_probable(values))
    # Finer grades, where there are some: their ranks are correlated with those of the scores.
    graded = np.isfinite(finer_grades)
    ranked = [np.unique(a[graded], return_inverse=True)[1] for a in (values, finer_grades)]
    figures = partial(
        _figures_of,
        values=values, tier=tier, graded=graded, ranked=ranked, n_tiers=n_tiers, ks=ks,
        pooled=pooled, everywhere=everywhere, inside=inside, tier_pairs=tier_pairs, paired=paired,
        predicted=predicted,
    )  # fmt: skip
    point = {name: _defined(value) for name, value in figures().items()}
    cell_of = np.zeros(len(ids)) if within_codes is None else within_codes
    spans = _intervals(figures, pooled.tiers, codes, cell_of, paired, n_tiers, drawing)
    if finer:
        point["macro_accuracy"] = spans["macro_accuracy"] = None

    # What is told.
    told: dict[str, Any] = {}
    for name in _FIGURES:
        told[name], told[f"{name}_interval"] = point.get(name), spans.get(name)
    met: list[dict[str, Any]] = [
        {
            **{name: point[name, i] for name in ("accuracy", "macro_f1")},
            **{f"{name}_interval": spans.get((name, i)) for name in ("accuracy", "macro_f1")},
            "confusion": metrics.confusion_matrix(tier, guess, n_tiers).astype(int).tolist(),
        }
        for i, guess in enumerate(predicted)
    ]
    steps = _steps(tier) if finer else tier
    probabilities = None
    if calibration is not None and calibration.temperature is not None:
        learned = calibration.temperature["value"]
        probabilities = {
            "source": calibration.source,
            "images": calibration.images,
            "temperature": _defined(learned),
            "pairs": reliability(values, steps, learned, groups, within=within_codes, **drawing),
            "tiers": met[1] if len(met) > 1 else None,
            "warnings": calibration.warnings(),
        }
    by_value = list(dict.fromkeys(value for value in within or () if value))
    values_told = {
        "value": [by_value[cell] for cell in paired],
        "pairs": cells[1, paired].astype(int),
        "accuracy": cells[0, paired] / cells[1, paired],
    }
    listed = [] if finer else tier_pairs
    pairs_told = {
        "better": [names[a] for a, _ in listed],
        "worse": [names[b] for _, b in listed],
        "pairs": [round(float(pairs[a, b])) for a, b in listed],
        "accuracy": [point["pair", a, b] for a, b in listed],
    }
    return Report(
        **told,
        tier_names=names,
        tier_counts=() if finer else tuple(np.bincount(tier, minlength=n_tiers).tolist()),
        n_images=len(ids),
        n_groups=int(codes.max()) + 1,
        n_pairs=round(float(pairs.sum())),
        by_grader=by_grader,
        within_pairs=int(cells[1].sum()),
        within_values=_table(values_told, [spans.get(("value", cell)) for cell in paired]),
        tier_pairs=_table(pairs_told, [spans.get(("pair", a, b)) for a, b in listed]),
        groups=_group_rows(values, steps, codes, groups),
        spearman_images=int(graded.sum()),
        ndcg={int(k): point["ndcg", k] for k in ks},
        ndcg_intervals={int(k): spans.get(("ndcg", k)) for k in ks},
        by_quota=met[0] if met else None,
        probabilities=probabilities,
        probabilities_unknown=None if calibration is None else calibration.unknown,
        seen=seen,
        **drawing,
        image_ids=ids,
        scores=values,
        tiers=tier,
        within=within_codes,
        grades=finer_grades,
    )


def _figures_of(
    weights: IntArray | None = None,
    *,
    values: FloatArray,
    tier: IntArray,
    graded: NDArray[np.bool_],
    ranked: Sequence[IntArray],
    n_tiers: int,
    ks: Sequence[int],
    pooled: PairCounter,
    everywhere: PairCounter,
    inside: PairCounter | None,
    tier_pairs: Sequence[list[int]],
    paired: Sequence[int],
    predicted: Sequence[IntArray],
) -> dict[Any, float]:
    """Every figure of images that count ``weights`` times, by its name in the report or what it is of."""
    right, total = everywhere.table(weights)
    shares = ratio(right, total)
    chosen = np.ones(len(ranked[0])) if weights is None else weights[graded]
    found: dict[Any, float] = {
        "pairwise_accuracy": float(ratio(right.sum(), total.sum())),
        "macro_accuracy": metrics.mean(shares),
        "kendall_tau_b": pooled.tau_b(weights),
        "spearman": metrics.rank_correlation(ranked[0], ranked[1], chosen),
        **{("pair", a, b): shares[a, b] for a, b in tier_pairs},
        **{("ndcg", k): metrics.ndcg_at_k(values, tier, k, n_tiers, weights) for k in ks},
    }
    for i, guess in enumerate(predicted):
        counts = metrics.confusion_matrix(tier, guess, n_tiers, weights)
        found["accuracy", i] = metrics.tier_accuracy(counts)
        found["macro_f1", i] = metrics.macro_f1(counts)
    if inside is not None:
        right, total = inside.by_cell(weights)
        shares = ratio(right, total)
        found["within_accuracy"] = float(ratio(right.sum(), total.sum()))
        found["within_macro_accuracy"] = metrics.mean(shares)
        found |= {("value", cell): shares[cell] for cell in paired}
    return found


def _intervals(
    figures: Callable[[IntArray], dict[Any, float]],
    tiers: IntArray,
    codes: IntArray,
    cell_of: NDArray[Any],
    paired: Sequence[int],
    n_tiers: int,
    drawing: Mapping[str, Any],
) -> dict[Any, Interval | None]:
    """The intervals of all figures; None where resampling cannot show how much a figure varies.

    It can where both tiers of a pair have works of two groups: anywhere, of a tier pair there, of a within
    value inside it.
    """
    varying = varying_pairs(tiers, codes, n_tiers)
    rounds = drawing["rounds"] if varying.any() else min(drawing["rounds"], 0)
    spans = dict(bootstrap(figures, codes, **{**drawing, "rounds": rounds}))
    inside = {
        cell: varying_pairs(tiers[cell_of == cell], codes[cell_of == cell], n_tiers).any()
        for cell in paired
    }
    for name in spans:
        kind, *of = name if isinstance(name, tuple) else (name,)
        known = varying[tuple(of)] if kind == "pair" else kind != "value" or inside[of[0]]
        if not known or (kind.startswith("within") and not any(inside.values())):
            spans[name] = None
    return spans


def _table(columns: Mapping[str, Any], intervals: Sequence[Interval | None]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(columns).assign(interval=pd.Series(intervals, dtype=object))


def _group_rows(
    scores: FloatArray, tiers: IntArray, codes: IntArray, groups: Sequence[str | None] | None
) -> pd.DataFrame:
    """One row per named group of at least two works that has a pair with another group's work."""
    import pandas as pd

    accuracy, pairs = metrics.accuracy_by_group(scores, tiers, codes)
    first = np.unique(codes, return_index=True)[1]
    table = pd.DataFrame(
        {
            "group": [None if groups is None else groups[row] for row in first],
            "pairs": pairs,
            "accuracy": accuracy,
            "images": np.bincount(codes),
        }
    )
    told = table["group"].notna() & (table["group"] != "")
    kept = table[told & (table["images"] >= _MIN_WORKS) & (table["pairs"] > 0)]
    return kept.sort_values(["accuracy", "group"], ignore_index=True)


def _wrong_pairs(
    scores: FloatArray, tiers: IntArray, within: IntArray | None, k: int
) -> tuple[IntArray, IntArray]:
    """Rows (better, worse) of the wrong pairs among the k lowest and k highest of each tier and within code.

    When a pair is taken, each lower-scored image of its better tier must have been passed over
    because of an earlier pair that holds it, and a pair holds one image of a tier. So among the k
    lowest of each tier (and, alike, the k highest) nothing is missed, and memory is O(n + K² k²),
    not O(n²).
    """
    cells = np.zeros_like(tiers) if within is None else within
    found = [np.empty((2, 0), dtype=np.int64)]
    for cell in np.unique(cells[cells >= 0]):
        rows = np.flatnonzero(cells == cell)
        ends = []
        for tier in np.unique(tiers[rows]):
            own = rows[tiers[rows] == tier]
            ends.append([own[np.argsort(s[own], kind="stable")[:k]] for s in (scores, -scores)])
        for (lowest, _), (_, highest) in combinations(ends, 2):
            i, j = np.nonzero(scores[highest][None, :] > scores[lowest][:, None])
            found.append(np.stack([lowest[i], highest[j]]))
    better, worse = np.concatenate(found, axis=1)
    return better, worse


def _steps(tier: IntArray) -> IntArray:
    """[n] ranks of finer grades → [n] in at most :data:`STEPS` steps of four images and more."""
    rising = np.sort(tier)
    middle = (np.searchsorted(rising, tier) + np.searchsorted(rising, tier, "right")) // 2
    steps: IntArray = middle * max(2, min(STEPS, len(tier) // 4)) // max(1, len(tier))
    return steps


def _checked(
    scores: ArrayLike,
    tiers: ArrayLike | None,
    tier_scores: Sequence[float | None] | None,
    ids: tuple[str, ...],
    names: tuple[str, ...],
) -> tuple[FloatArray, IntArray, FloatArray]:
    """Scores, tiers (or ranks of grades) and grades as arrays, after all that is wrong with them is told."""
    if len(np.asarray(scores)) != len(ids):
        raise DataError(f"{len(np.asarray(scores))} scores for {len(ids)} image ids")
    values, grades = check_scores(scores, ids), _grades(tier_scores, len(ids))
    if tiers is None:
        tier = metrics.ranks(grades)
        if not tier.any():
            raise DataError(f"no pair of different tier_score among {len(ids)} images")
        return values, tier, grades
    tier = check_codes(tiers, len(ids), "tiers")
    counts = np.bincount(tier, minlength=len(names))
    if len(counts) > len(names):
        raise DataError(
            f"tiers: {len(counts) - 1} is not below the {len(names)} tiers {', '.join(names)}"
        )
    held = [name for name, count in zip(names, counts, strict=True) if count]
    if len(held) < 2:
        what = f"all {len(ids)} images are of tier {held[0]!r}" if held else "there is no image"
        raise DataError(
            f"no pair of different tiers: {what}; give images of at least two of {', '.join(names)}"
        )
    return values, tier, grades


def _grades(tier_scores: Sequence[float | None] | None, n: int) -> FloatArray:
    """[n] finer grades, NaN where there is none."""
    if tier_scores is None:
        return np.full(n, math.nan)
    if len(tier_scores) != n:
        raise DataError(f"tier_scores: {len(tier_scores)} values, but there are {n} scores")
    return np.array([math.nan if grade is None else grade for grade in tier_scores], np.float64)


def _defined(value: float) -> float | None:
    """None for a figure that is not defined."""
    return float(value) if math.isfinite(value) else None


def plain(value: Any) -> Any:
    """A value as JSON types: tables as rows, dataclasses and dicts with text keys, tuples as lists."""
    if hasattr(value, "iterrows"):
        return [plain(row) for row in value.to_dict("records")]
    if hasattr(value, "__dataclass_fields__"):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple | list) else value


def mistake_table(mistakes: pd.DataFrame, grade: str = "tier") -> str:
    """One line per wrongly ordered pair: the image of the better tier, that of the worse, the gap."""
    headers = ["should be higher", grade, "score", "scores higher", grade, "score", "gap"]
    told = mistakes.apply(
        lambda column: column.map("{:.4g}".format) if column.dtype == float else column
    )
    return format_table(headers, told.to_numpy().tolist(), "llrllrr")


def _report_text(report: Report, mistakes: int) -> str:
    """Figures, tier pairs, confusion matrix, the ``mistakes`` worst mistakes and warnings."""
    known = report.probabilities
    level = f"{100 * report.confidence:g} % interval"
    counts = zip(report.tier_names, report.tier_counts, strict=True)
    listed = ", ".join(f"{name} {count}" for name, count in counts) or "no tiers"
    differing = "tiers" if report.tier_names else "tier_score"
    if report.by_grader:
        differing = "tiers by one grader" if report.tier_names else "tier_score by one grader"
    head = (
        f"{report.n_images} images ({listed}) in {report.n_groups} groups, {report.n_pairs} pairs of "
        f"different {differing}"
    )
    figures = [[tr(name), _shown(value), span(ends)] for name, value, ends in _figures(report)]
    parts = [head, format_table(["measure", "value", level], figures, "lrl")]
    if report.tier_names:
        headers = ["better", "worse", "pairs", "accuracy", level]
        parts.append(format_table(headers, _cells(report.tier_pairs), "llrrl"))
    if 1 < len(report.within_values) <= _SHOWN_VALUES:
        headers = ["within", "pairs", "accuracy", level]
        parts.append(format_table(headers, _cells(report.within_values), "lrrl"))
    if report.tier_names:
        tiers, corner = report._predicted()
        confusion = zip(report.tier_names, tiers["confusion"], strict=True)
        cells = [[name, *row] for name, row in confusion]
        headers = [f"true \\ {corner}", *report.tier_names]
        parts.append(format_table(headers, cells, "l" + "r" * len(report.tier_names)))
    if known is not None:
        lines = []
        if known["pairs"] is not None:
            cells = [
                [
                    f"{part['low']:.1f} – {part['high']:.1f}", part["pairs"],
                    *("" if part[x] is None else f"{part[x]:.3f}" for x in ("predicted", "observed")),
                    span(part["interval"]) if part["pairs"] else "",
                ]
                for part in known["pairs"]["bins"]
            ]  # fmt: skip
            headers = ["P(higher score wins)", "pairs", "predicted", "observed", level]
            lines.append(format_table(headers, cells, "lrrrl"))
        source = f"{known['images']} held-out works ({known['source']})"
        parts.append(
            "\n".join([*lines, f"Probabilities were learned from {source}.", *known["warnings"]])
        )
    worst = report.worst_mistakes(mistakes)
    if len(worst):
        grade = "tier" if report.tier_names else "tier_score"
        parts.append("Worst mistakes\n" + mistake_table(worst, grade))
    return "\n\n".join([*parts, *_warnings(report)])


def _cells(table: pd.DataFrame) -> list[list[object]]:
    """Rows of a table of pairs, with accuracy and interval as text."""
    told = table.assign(
        accuracy=table["accuracy"].map(_shown), interval=table["interval"].map(span)
    )
    return told.astype(object).to_numpy().tolist()


def _figures(report: Report) -> list[tuple[str, float | None, Interval | None]]:
    rows: list[tuple[str, float | None, Interval | None]] = [
        ("pairwise accuracy", report.pairwise_accuracy, report.pairwise_accuracy_interval),
    ]
    if report.tier_names:
        rows.append(
            ("  mean over tier pairs", report.macro_accuracy, report.macro_accuracy_interval)
        )
    if report.within is not None:
        name = f"  inside the same within value ({report.within_pairs} pairs)"
        rows.append((name, report.within_accuracy, report.within_accuracy_interval))
        name = f"  mean over within values ({len(report.within_values)} values)"
        rows.append((name, report.within_macro_accuracy, report.within_macro_accuracy_interval))
    rows.append(("Kendall tau-b", report.kendall_tau_b, report.kendall_tau_b_interval))
    if report.spearman_images:
        name = f"Spearman with tier_score ({report.spearman_images} images)"
        rows.append((name, report.spearman, report.spearman_interval))
    rows += [(f"NDCG@{k}", value, report.ndcg_intervals[k]) for k, value in report.ndcg.items()]
    tiers = [("tiers by quota", report.by_quota)]
    known = report.probabilities
    if known is not None:
        tiers.insert(0, ("most probable tier", known["tiers"]))
        if known["pairs"] is not None:
            name = "calibration error of pair probabilities"
            rows.append((name, known["pairs"]["ece"], known["pairs"]["interval"]))
    for name, found in tiers:
        if found is None:
            continue
        rows.append((f"tier accuracy ({name})", found["accuracy"], found["accuracy_interval"]))
        rows.append((f"macro F1 ({name})", found["macro_f1"], found["macro_f1_interval"]))
    return rows


def _warnings(report: Report) -> list[str]:
    interval = report.pairwise_accuracy_interval
    warnings = []
    if report.seen:
        warnings.append(
            f"{report.seen} of the {report.n_images} images are among those that the model was made with: "
            "the figures are too good."
        )
    if report.probabilities_unknown is not None:
        warnings.append(f"Probabilities {report.probabilities_unknown}.")
    if interval is None:
        why = "too few groups in each tier" if report.rounds else "no bootstrap rounds"
        return [*warnings, f"Intervals unknown: {why}."]
    if report.n_groups < FEW_GROUPS:
        warnings.append(f"Only {report.n_groups} groups: take the intervals as rough.")
    if interval.low == interval.high:
        warnings.append(
            "The interval has no width because every resample gave the same value: "
            "that is no sign of certainty."
        )
    if interval.dropped:
        warnings.append(f"{interval.dropped} resamples held no pair of different tiers.")
    return warnings


def _shown(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"
