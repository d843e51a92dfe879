"""Everything that is told about one model on one split, from one pass of scores.

:func:`evaluate` sees scores and grades only, so head-only and end-to-end models are evaluated by the same
code.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

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
from mirip_fast.evaluation.reliability import Reliability, reliability
from mirip_fast.evaluation.text_table import format_table
from mirip_fast.language import tr

#: Of finer grades, where they have to be told apart.
STEPS = 64

_SHOWN_VALUES = 12  # more within values than this are in the JSON file only
_MIN_WORKS = 2  # one work alone says nothing about its group


@dataclass(frozen=True, slots=True)
class Row:
    """Pairwise accuracy over a part of the pairs.

    Attributes:
        name: of the part: a within value, a group, or the better of two tiers.
        pairs: pairs of different tiers, at least 1.
        accuracy: share of them in the right order (0–1, score ties ½).
        interval: None means unknown.
        worse: the worse tier, where two are compared.
        images: works of the group, where it is one.
    """

    name: str
    pairs: int
    accuracy: float
    interval: Interval | None = None
    worse: str | None = None
    images: int | None = None


@dataclass(frozen=True, slots=True)
class Mistake:
    """A wrongly ordered pair: ``better_*`` has the better tier, ``worse_*`` the higher score.

    ``gap`` is the worse image's score minus the better one's, above 0.
    """

    better_id: str
    better_tier: str
    better_score: float
    worse_id: str
    worse_tier: str
    worse_score: float
    gap: float


@dataclass(frozen=True, slots=True)
class TierFigures:
    """How well predicted tiers meet the true ones.

    Attributes:
        accuracy: share of images whose tier is met (0–1).
        macro_f1: mean F1 over the tiers that occur as truth or prediction (0–1).
        confusion: images by [true tier][predicted tier].
        accuracy_interval, macro_f1_interval: None means unknown.
    """

    accuracy: float
    accuracy_interval: Interval | None
    macro_f1: float
    macro_f1_interval: Interval | None
    confusion: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Probabilities:
    """Pair and tier probabilities, and whether they come true on the evaluated images.

    Attributes:
        source, images: where the held-out scores that they were learned from come from, and how many.
        temperature: T of P(a beats b) = σ((s_a − s_b) / T); None where it is infinite.
        pairs: predicted pair probabilities against observed frequencies; None where no pair counts.
        tiers: with the most probable tier as the predicted one; None where none is known.
        warnings: what a reader has to know.
    """

    source: str
    images: int
    temperature: float | None
    pairs: Reliability | None
    tiers: TierFigures | None
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
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
        within_values: one row per such value, in order of appearance.
        tier_pairs: one row per tier pair that occurs, best tiers first (all pairs, whatever their
            within value).
        groups: one row per named group of two works or more, by the pairs of one of its works with a work
            outside it, worst first and without intervals.
        kendall_tau_b: −1 … 1, positive = good; None where all scores are equal.
        spearman: with the ``spearman_images`` finer grades that are there; None where not defined.
        ndcg: k → NDCG@k; None where not defined.
        by_quota: with predicted tiers by quota (:func:`metrics.tiers_by_quota`); None without tiers.
        probabilities: of pairs and tiers, held against these images; None if unknown.
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
    within_values: tuple[Row, ...]
    tier_pairs: tuple[Row, ...]
    groups: tuple[Row, ...]
    kendall_tau_b: float | None
    kendall_tau_b_interval: Interval | None
    spearman: float | None
    spearman_interval: Interval | None
    spearman_images: int
    ndcg: dict[int, float | None]
    ndcg_intervals: dict[int, Interval | None]
    by_quota: TierFigures | None
    probabilities: Probabilities | None
    probabilities_unknown: str | None
    seen: int
    rounds: int
    confidence: float
    seed: int
    image_ids: tuple[str, ...] = field(repr=False)
    scores: FloatArray = field(repr=False, compare=False)
    tiers: IntArray = field(repr=False, compare=False)
    within: IntArray | None = field(repr=False, compare=False)
    grades: FloatArray = field(repr=False, compare=False)
    by_grader: bool = False
    applicants: dict[str, Any] | None = None
    agreement: Agreement | None = None
    better_than: str = ""

    def worst_mistakes(self, k: int = 10, *, max_per_image: int = 2) -> list[Mistake]:
        """At most ``k`` wrongly ordered pairs, largest gap first, an image at most twice by default.

        With a within column only pairs inside the same value are listed; equal scores are no
        mistake here. One badly scored image is wrong against hundreds of others, and a list of it alone
        would say little: the pairs are taken greedily by gap, passing over those with an image that was
        shown ``max_per_image`` times.

        Raises:
            ConfigError: ``k`` is negative or ``max_per_image`` below 1.
        """
        if k < 0 or max_per_image < 1:
            raise ConfigError(
                f"worst mistakes: k={k} (at least 0), max_per_image={max_per_image} (at least 1)"
            )
        tiers = self.tiers if self.tier_names else _steps(self.tiers)
        better, worse = _wrong_pairs(self.scores, tiers, self.within, k)
        gap = self.scores[worse] - self.scores[better]
        shown = np.zeros(self.n_images, dtype=np.int64)
        taken: list[Mistake] = []
        for row in np.lexsort((worse, better, -gap)):
            if len(taken) == k:
                break
            pair = [int(better[row]), int(worse[row])]
            if (shown[pair] < max_per_image).all():
                shown[pair] += 1
                about = [(self.image_ids[i], self._grade(i), float(self.scores[i])) for i in pair]
                taken.append(Mistake(*about[0], *about[1], gap=float(gap[row])))
        return taken

    def _grade(self, row: int) -> str:
        return self.tier_names[self.tiers[row]] if self.tier_names else f"{self.grades[row]:g}"

    def to_dict(self, mistakes: int = 10) -> dict[str, Any]:
        """Plain JSON types, every number finite or None, with the ``mistakes`` worst mistakes."""
        made_below = {
            "image_ids", "scores", "tiers", "within", "grades",
            "tier_pairs", "within_values", "groups", "by_quota", "applicants", "agreement", "better_than",
        }  # fmt: skip
        plain = {
            f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name not in made_below
        }
        parts = {"tier_pairs": "better", "within_values": "value", "groups": "group"}
        for part, name in parts.items():
            left_out = {"name", "worse"} if part != "tier_pairs" else {"name"}
            left_out.add("interval" if part == "groups" else "images")
            plain[part] = [
                {name: row.name, **{k: v for k, v in _plain(row).items() if k not in left_out}}
                for row in getattr(self, part)
            ]
        for name, value in (_plain(self.by_quota) or {}).items():  # tier_accuracy and so on
            plain[name if name.startswith(("macro", "confusion")) else f"tier_{name}"] = value
        if self.applicants is not None:
            plain["applicants"] = self.applicants
        plain["worst_mistakes"] = [asdict(mistake) for mistake in self.worst_mistakes(mistakes)]
        return plain

    def to_table(self, mistakes: int = 5) -> str:
        """Text for a terminal: figures, tier pairs, confusion matrix, the worst mistakes, warnings."""
        said = [] if self.applicants is None else [textwrap.fill(tr(self.applicants["said"]), 100)]
        said += [] if self.agreement is None else [self.agreement.to_table()]
        said += [textwrap.fill(self.better_than, 100)] if self.better_than else []
        return "\n\n".join([_report_text(self, mistakes), *said])

    def __str__(self) -> str:
        return self.to_table()

    def _repr_html_(self) -> str:
        """In a notebook: the table, and the pictures that `evaluate` draws."""
        import base64
        import html
        import tempfile

        from mirip_fast.evaluation.plots import draw_report

        with tempfile.TemporaryDirectory() as folder:
            about = f"{self.n_images} images"
            drawn = [path.read_bytes() for path in draw_report(self, Path(folder), "report", about)]
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
    graded = ~np.isnan(finer_grades)
    codes = group_codes(groups, len(ids))
    n_tiers, ks = (1, ()) if finer else (len(names), ks)
    drawing: dict[str, Any] = {"rounds": rounds, "confidence": confidence, "seed": seed}

    pooled = PairCounter(values, tier, finer=finer, n_tiers=None if finer else n_tiers)
    by_grader = grades is not None and within is None
    everywhere = PairCounter(values, tier, n_tiers, grades=grades) if by_grader else pooled
    within_codes, inside = None, None
    if within is not None:
        within_codes = check_codes(metrics.codes_of(within), len(ids), "within", lowest=None)
        inside = PairCounter(values, tier, None if finer else n_tiers, within_codes, finer=finer)
    predicted = [] if finer else [metrics.tiers_by_quota(values, tier)]
    if not finer and calibration is not None and calibration.ordinal is not None:
        predicted.append(calibration.ordinal.most_probable(values))
    confusion = [metrics.confusion_matrix(tier, guess, n_tiers) for guess in predicted]
    pairs = everywhere.table()[1]
    tier_pairs = [(int(a), int(b)) for a, b in np.argwhere(pairs > 0)]
    cells = np.empty((2, 0)) if inside is None else np.stack(inside.by_cell())
    paired = np.flatnonzero(cells[1]).tolist()  # within values that have a pair

    rank, grade = (np.unique(a[graded], return_inverse=True)[1] for a in (values, finer_grades))

    def figures(weights: IntArray | None) -> dict[Any, float]:
        right, total = everywhere.table(weights)
        shares = ratio(right, total)
        found: dict[Any, float] = {
            "accuracy": float(ratio(right.sum(), total.sum())),
            "macro": metrics.mean(shares),
            "tau": pooled.tau_b(weights),
            **{pair: shares[pair] for pair in tier_pairs},
            **{("ndcg", k): metrics.ndcg_at_k(values, tier, k, n_tiers, weights) for k in ks},
        }
        chosen = np.ones(len(rank)) if weights is None else weights[graded]
        found["spearman"] = metrics.rank_correlation(rank, grade, chosen)
        for i, guess in enumerate(predicted):
            counts = metrics.confusion_matrix(tier, guess, n_tiers, weights)
            found["tiers", i] = metrics.tier_accuracy(counts)
            found["f1", i] = metrics.macro_f1(counts)
        if inside is not None:
            right, total = inside.by_cell(weights)
            shares = ratio(right, total)
            found["within"] = float(ratio(right.sum(), total.sum()))
            found["within macro"] = metrics.mean(shares)
            found |= {("value", cell): shares[cell] for cell in paired}
        return found

    varying = varying_pairs(pooled.tiers, codes, n_tiers)
    point: Mapping[Any, float | None] = {k: _defined(v) for k, v in figures(None).items()}
    spans = bootstrap(
        figures, codes, **{**drawing, "rounds": rounds if varying.any() else min(rounds, 0)}
    )
    known_cells = {  # within values whose pairs vary
        cell
        for cell in paired
        if varying_pairs(pooled.tiers[own := within_codes == cell], codes[own], n_tiers).any()
    }
    by_value = list(dict.fromkeys(value for value in within or () if value))
    tier_figures = [
        TierFigures(
            accuracy=_number(point["tiers", i]),
            accuracy_interval=spans.get(("tiers", i)),
            macro_f1=_number(point["f1", i]),
            macro_f1_interval=spans.get(("f1", i)),
            confusion=tuple(tuple(int(count) for count in row) for row in matrix),
        )
        for i, matrix in enumerate(confusion)
    ]
    steps = _steps(tier) if finer else tier
    probabilities = None
    if calibration is not None and calibration.temperature is not None:
        learned = calibration.temperature.value
        probabilities = Probabilities(
            source=calibration.source,
            images=calibration.images,
            temperature=_defined(learned),
            pairs=reliability(values, steps, learned, groups, within=within_codes, **drawing),
            tiers=tier_figures[1] if len(tier_figures) > 1 else None,
            warnings=tuple(calibration.warnings()),
        )
    return Report(
        tier_names=names,
        tier_counts=() if finer else tuple(np.bincount(tier, minlength=n_tiers).tolist()),
        n_images=len(ids),
        n_groups=int(codes.max()) + 1,
        n_pairs=round(float(pairs.sum())),
        by_grader=by_grader,
        pairwise_accuracy=_number(point["accuracy"]),
        pairwise_accuracy_interval=spans.get("accuracy"),
        macro_accuracy=None if finer else point["macro"],
        macro_accuracy_interval=None if finer else spans.get("macro"),
        within_pairs=int(cells[1].sum()),
        within_accuracy=point.get("within"),
        within_accuracy_interval=spans.get("within") if known_cells else None,
        within_macro_accuracy=point.get("within macro"),
        within_macro_accuracy_interval=spans.get("within macro") if known_cells else None,
        within_values=tuple(
            Row(
                name=by_value[cell],
                pairs=int(cells[1, cell]),
                accuracy=float(cells[0, cell] / cells[1, cell]),
                interval=spans.get(("value", cell)) if cell in known_cells else None,
            )
            for cell in paired
        ),
        tier_pairs=tuple(
            Row(
                name=names[a],
                worse=names[b],
                pairs=round(float(pairs[a, b])),
                accuracy=_number(point[a, b]),
                interval=spans.get((a, b)) if varying[a, b] else None,
            )
            for a, b in ([] if finer else tier_pairs)
        ),
        groups=_group_rows(values, steps, codes, groups),
        kendall_tau_b=point["tau"],
        kendall_tau_b_interval=spans.get("tau"),
        spearman=point["spearman"],
        spearman_interval=spans.get("spearman"),
        spearman_images=int(graded.sum()),
        ndcg={int(k): point["ndcg", k] for k in ks},
        ndcg_intervals={int(k): spans.get(("ndcg", k)) for k in ks},
        by_quota=None if finer else tier_figures[0],
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


def _group_rows(
    scores: FloatArray, tiers: IntArray, codes: IntArray, groups: Sequence[str | None] | None
) -> tuple[Row, ...]:
    """One row per named group of at least two works that has a pair with another group's work."""
    if groups is None:
        return ()
    accuracy, pairs = metrics.accuracy_by_group(scores, tiers, codes)
    sizes = np.bincount(codes)
    first = np.unique(codes, return_index=True)[1]
    rows = [
        Row(str(groups[first[g]]), int(pairs[g]), float(accuracy[g]), images=int(sizes[g]))
        for g in np.flatnonzero((sizes >= _MIN_WORKS) & (pairs > 0))
        if groups[first[g]]
    ]
    return tuple(sorted(rows, key=lambda row: (row.accuracy, row.name)))


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


def _number(value: float | None) -> float:
    """A figure that every report has, as two tiers occur."""
    assert value is not None
    return value


def _plain(value: Any) -> Any:
    """A value as JSON types: dataclasses and dicts with text keys, tuples as lists."""
    if hasattr(value, "__dataclass_fields__"):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def mistake_table(mistakes: Sequence[Mistake], grade: str = "tier") -> str:
    """One line per wrongly ordered pair: the image of the better tier, that of the worse, the gap."""
    headers = ["should be higher", grade, "score", "scores higher", grade, "score", "gap"]
    rows = [
        [
            *(m.better_id, m.better_tier, f"{m.better_score:.4g}"),
            *(m.worse_id, m.worse_tier, f"{m.worse_score:.4g}", f"{m.gap:.4g}"),
        ]
        for m in mistakes
    ]
    return format_table(headers, rows, "llrllrr")


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
        cells = [
            [row.name, row.worse, row.pairs, _shown(row.accuracy), span(row.interval)]
            for row in report.tier_pairs
        ]
        parts.append(format_table(["better", "worse", "pairs", "accuracy", level], cells, "llrrl"))
    if 1 < len(report.within_values) <= _SHOWN_VALUES:
        cells = [
            [row.name, row.pairs, _shown(row.accuracy), span(row.interval)]
            for row in report.within_values
        ]
        parts.append(format_table(["within", "pairs", "accuracy", level], cells, "lrrl"))
    tiers, corner = report.by_quota, "by quota"
    if known is not None and known.tiers is not None:
        tiers, corner = known.tiers, "most probable"
    if tiers is not None:
        cells = [[name, *row] for name, row in zip(report.tier_names, tiers.confusion, strict=True)]
        headers = [f"true \\ {corner}", *report.tier_names]
        parts.append(format_table(headers, cells, "l" + "r" * len(report.tier_names)))
    if known is not None:
        lines = []
        if known.pairs is not None:
            cells = [
                [
                    f"{part.low:.1f} – {part.high:.1f}", part.pairs,
                    *("" if x is None else f"{x:.3f}" for x in (part.predicted, part.observed)),
                    span(part.interval) if part.pairs else "",
                ]
                for part in known.pairs.bins
            ]  # fmt: skip
            headers = ["P(higher score wins)", "pairs", "predicted", "observed", level]
            lines.append(format_table(headers, cells, "lrrrl"))
        source = f"{known.images} held-out works ({known.source})"
        parts.append(
            "\n".join([*lines, f"Probabilities were learned from {source}.", *known.warnings])
        )
    worst = report.worst_mistakes(mistakes)
    if worst:
        grade = "tier" if report.tier_names else "tier_score"
        parts.append("Worst mistakes\n" + mistake_table(worst, grade))
    return "\n\n".join([*parts, *_warnings(report)])


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
        tiers.insert(0, ("most probable tier", known.tiers))
        if known.pairs is not None:
            name = "calibration error of pair probabilities"
            rows.append((name, known.pairs.ece, known.pairs.interval))
    for name, found in tiers:
        if found is None:
            continue
        rows.append((f"tier accuracy ({name})", found.accuracy, found.accuracy_interval))
        rows.append((f"macro F1 ({name})", found.macro_f1, found.macro_f1_interval))
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
