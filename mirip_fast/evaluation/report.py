"""Everything that is judged about one model on one split, from one pass of scores.

:func:`evaluate` sees scores and grades only, so head-only and end-to-end models are judged by the same
code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from mirip_fast.errors import DataError
from mirip_fast.evaluation import metrics, report_text
from mirip_fast.evaluation.calibration import Calibration
from mirip_fast.evaluation.group_accuracy import accuracy_by_group
from mirip_fast.evaluation.intervals import Interval, bootstrap_over_groups
from mirip_fast.evaluation.judged_tiers import judged_probabilities, tier_figures
from mirip_fast.evaluation.mistakes import worst_pairs
from mirip_fast.evaluation.more_intervals import figure_intervals
from mirip_fast.evaluation.pair_counts import (
    FloatArray,
    IntArray,
    PairCounter,
    check_codes,
    check_scores,
)
from mirip_fast.evaluation.report_parts import (
    GroupRow,
    Judged,
    Mistake,
    Probabilities,
    TierFigures,
    TierPairRow,
    WithinRow,
)
from mirip_fast.evaluation.within_values import WithinFigures, accuracy_within

#: Of finer grades, where they have to be told apart.
STEPS = 64


@dataclass(frozen=True, slots=True)
class Report:
    """How well scores order graded images, and how sure that is. An interval of None means unknown.

    Where images have no tiers but finer grades, pairs are those of different grades, and all that is said of
    tiers is empty or None; groups, mistakes and probabilities look at the grades in 64 steps at most.

    Attributes:
        tier_names: best first; K tiers; none where finer grades are judged by.
        tier_counts: images of each tier.
        n_images, n_groups, n_pairs: images, groups (an image without one counts as one), cross-tier
            pairs.
        pairwise_accuracy: share of cross-tier pairs in the right order (0–1, score ties ½).
        macro_accuracy: mean over the tier pairs that occur; None without tiers.
        within_accuracy: over the ``within_pairs`` pairs with equal within value; None without the
            column or without such a pair.
        within_macro_accuracy: mean over the within values that have a pair, each counted alike.
        within_values: one row per such value.
        tier_pairs: one row per tier pair that occurs, best tiers first (all pairs, whatever their
            within value).
        groups: one row per named group of two works or more, worst first (all pairs, too).
        kendall_tau_b: −1 … 1, positive = good; None where all scores are equal.
        spearman: with the ``spearman_images`` finer grades that are there; None where not defined.
        ndcg: k → NDCG@k; None where not defined.
        by_quota: with predicted tiers by quota (:func:`metrics.tiers_by_quota`); None without tiers.
        probabilities: of pairs and tiers, judged here; None if unknown.
        probabilities_unknown: why; None where they are known or nobody asked.
        seen: images that the model or its calibration was made with.
        rounds, confidence, seed: of the bootstrap.
        judged: the scores themselves.
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
    within_values: tuple[WithinRow, ...]
    tier_pairs: tuple[TierPairRow, ...]
    groups: tuple[GroupRow, ...]
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
    judged: Judged = field(repr=False, compare=False)

    @property
    def tier_accuracy(self) -> float | None:
        """Share of images whose tier by quota is the true one (0–1); None without tiers."""
        return None if self.by_quota is None else self.by_quota.accuracy

    @property
    def macro_f1(self) -> float | None:
        """Mean F1 of the tiers by quota (0–1); None without tiers."""
        return None if self.by_quota is None else self.by_quota.macro_f1

    @property
    def confusion(self) -> tuple[tuple[int, ...], ...]:
        """Images by [true tier][tier by quota]; empty without tiers."""
        return () if self.by_quota is None else self.by_quota.confusion

    def worst_mistakes(self, k: int = 10, *, max_per_image: int = 2) -> list[Mistake]:
        """At most ``k`` wrongly ordered pairs, largest gap first, an image at most twice by default.

        With a within column only pairs inside the same value are listed; equal scores are no
        mistake here.

        Raises:
            ConfigError: ``k`` is negative or ``max_per_image`` below 1.
        """
        ids, scores, tiers = self.judged.image_ids, self.judged.scores, self.judged.tiers
        steps, grades = (tiers if self.tier_names else _steps(tiers)), self.judged.grades
        pairs = worst_pairs(
            scores, steps, k, within=self.judged.within, max_per_image=max_per_image
        )

        def grade(row: int) -> str:
            return self.tier_names[tiers[row]] if self.tier_names else f"{grades[row]:g}"

        return [
            Mistake(
                better_id=ids[pair.better],
                better_tier=grade(pair.better),
                better_score=float(scores[pair.better]),
                worse_id=ids[pair.worse],
                worse_tier=grade(pair.worse),
                worse_score=float(scores[pair.worse]),
                gap=pair.gap,
            )
            for pair in pairs
        ]

    def to_dict(self, mistakes: int = 10) -> dict[str, Any]:
        """Plain JSON types, every number finite or None, with the ``mistakes`` worst mistakes."""
        made_below = {
            "judged", "tier_pairs", "within_values", "groups", "by_quota", "probabilities",
        }  # fmt: skip
        plain: dict[str, Any] = {}
        for name in (f.name for f in fields(self) if f.name not in made_below):
            plain[name] = _plain(getattr(self, name))
        plain["tier_pairs"] = [asdict(row) for row in self.tier_pairs]
        plain["within_values"] = [asdict(row) for row in self.within_values]
        plain["groups"] = [asdict(row) for row in self.groups]
        quota = {} if self.by_quota is None else self.by_quota.to_dict()
        for name, value in quota.items():  # tier_accuracy and so on
            plain[name if name.startswith(("macro", "confusion")) else f"tier_{name}"] = value
        plain["probabilities"] = self.probabilities and self.probabilities.to_dict()
        plain["worst_mistakes"] = [asdict(mistake) for mistake in self.worst_mistakes(mistakes)]
        return plain

    def to_table(self, mistakes: int = 5) -> str:
        """Text for a terminal: figures, tier pairs, confusion matrix, the worst mistakes, remarks."""
        return report_text.report_text(self, mistakes)


def evaluate(
    scores: ArrayLike,
    tiers: ArrayLike | None,
    *,
    tier_names: Sequence[str],
    image_ids: Sequence[str],
    groups: Sequence[str | None] | None = None,
    tier_scores: Sequence[float | None] | None = None,
    within: Sequence[str | None] | None = None,
    calibration: Calibration | None = None,
    seen: int = 0,
    ks: Sequence[int] = (10,),
    rounds: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Report:
    """Judges one pass of scores over graded images.

    Args:
        scores: [n] finite floats, higher is better.
        tiers: [n] integers, 0 = best, each below ``len(tier_names)``; None to judge by ``tier_scores``.
        tier_names: K names, best first; not looked at without tiers.
        image_ids: [n] names for the messages and the worst mistakes.
        groups: [n] group names; None or "" for an image that is its own group. Resampled as wholes.
        tier_scores: [n] finer grades, higher is better; missing ones (None, NaN) are left out.
        within: [n] values of the column inside which a comparison is fair; None or "" is compared
            with none.
        calibration: what the scores are said to mean, to be judged too.
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
    values, tier, grades = _checked(scores, tiers, tier_scores, ids, names)
    counts = np.bincount(tier, minlength=len(names))
    steps = _steps(tier) if finer else tier
    graded = ~np.isnan(grades)
    drawing: dict[str, Any] = {"rounds": rounds, "confidence": confidence, "seed": seed}

    accuracy, pairs = np.empty((0, 0)), PairCounter(values, tier, finer=True).count()[1]
    if not finer:
        accuracy, pairs = metrics.tier_pair_accuracy(values, tier, len(names))
    spread = bootstrap_over_groups(values, tier, groups, finer=finer, **drawing)
    inside = (
        WithinFigures()
        if within is None
        else accuracy_within(values, tier, within, groups, finer=finer, **drawing)
    )
    guesses = [] if finer else [metrics.tiers_by_quota(values, tier)]
    ordinal = None if calibration is None or finer else calibration.ordinal
    if ordinal is not None:
        guesses.append(ordinal.most_probable(values))
    ks = () if finer else ks
    varied = spread.pairwise_accuracy is not None  # else resampling can not show how much they vary
    figures = figure_intervals(
        values, tier, len(names), groups, grades=grades, predicted=guesses, ks=ks,
        **{**drawing, "rounds": rounds if varied else 0},
    )  # fmt: skip
    judged_tiers = [
        tier_figures(tier, guess, len(names), figures.tiers[i]) for i, guess in enumerate(guesses)
    ]
    within_codes = None if within is None else metrics.codes_of(within)
    probabilities = None
    if calibration is not None and calibration.unknown is None:
        probabilities = judged_probabilities(
            calibration, None if ordinal is None else judged_tiers[-1],
            values, steps, groups, within_codes, **drawing,
        )  # fmt: skip
    return Report(
        tier_names=names,
        tier_counts=() if finer else tuple(int(count) for count in counts),
        n_images=len(ids),
        n_groups=spread.n_groups,
        n_pairs=int(pairs.sum()),
        pairwise_accuracy=metrics.pairwise_accuracy(values, tier, finer=finer),
        pairwise_accuracy_interval=spread.pairwise_accuracy,
        macro_accuracy=None if finer else metrics.macro_pairwise_accuracy(values, tier),
        macro_accuracy_interval=None if finer else spread.macro_accuracy,
        within_pairs=inside.pairs,
        within_accuracy=inside.accuracy,
        within_accuracy_interval=inside.interval,
        within_macro_accuracy=inside.macro,
        within_macro_accuracy_interval=inside.macro_interval,
        within_values=inside.values,
        tier_pairs=tuple(
            TierPairRow(names[a], names[b], int(pairs[a, b]), float(accuracy[a, b]), interval)
            for (a, b), interval in ({} if finer else spread.tier_pairs).items()
        ),
        groups=accuracy_by_group(values, steps, groups, **drawing),
        kendall_tau_b=metrics.kendall_tau_b(values, tier),
        kendall_tau_b_interval=spread.kendall_tau_b,
        spearman=metrics.spearman(values[graded], grades[graded]),
        spearman_interval=figures.spearman,
        spearman_images=int(graded.sum()),
        ndcg={int(k): metrics.ndcg_at_k(values, tier, int(k), len(names)) for k in ks},
        ndcg_intervals=figures.ndcg,
        by_quota=None if finer else judged_tiers[0],
        probabilities=probabilities,
        probabilities_unknown=None if calibration is None else calibration.unknown,
        seen=seen,
        **drawing,
        judged=Judged(ids, values, tier, within_codes, grades),
    )


def ranks(grades: ArrayLike) -> IntArray:
    """[n] finer grades, higher is better → [n] codes, 0 for the best, equal ones for equal grades.

    Raises:
        DataError: a grade is missing or not finite.
    """
    values = check_scores(grades, what="tier_scores")
    return np.unique(-values, return_inverse=True)[1].astype(np.int64)


def _steps(tier: IntArray) -> IntArray:
    """[n] ranks of finer grades → [n] in at most :data:`STEPS` steps of four images and more."""
    middle = (
        np.searchsorted(np.sort(tier), tier) + np.searchsorted(np.sort(tier), tier, "right")
    ) // 2
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
        tier = ranks(grades)
        if not tier.any():
            raise DataError(f"no pair of different tier_score among {len(ids)} images")
        return values, tier, grades
    tier = check_codes(tiers, len(ids), "tiers")
    counts = np.bincount(tier, minlength=len(names))
    if len(counts) > len(names):
        raise DataError(
            f"tiers: {len(counts) - 1} is not below the {len(names)} tiers {', '.join(names)}"
        )
    if np.count_nonzero(counts) < 2:
        raise DataError(_one_tier_message(names, counts))
    return values, tier, grades


def _grades(tier_scores: Sequence[float | None] | None, n: int) -> FloatArray:
    """[n] finer grades, NaN where there is none."""
    if tier_scores is None:
        return np.full(n, math.nan)
    if len(tier_scores) != n:
        raise DataError(f"tier_scores: {len(tier_scores)} values, but there are {n} scores")
    return np.array([math.nan if grade is None else grade for grade in tier_scores], np.float64)


def _plain(value: Any) -> Any:
    """A field as JSON types."""
    if isinstance(value, Interval):
        return asdict(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _one_tier_message(names: Sequence[str], counts: IntArray) -> str:
    held = [name for name, count in zip(names, counts, strict=True) if count]
    what = (
        f"all {int(counts.sum())} images are of tier {held[0]!r}" if held else "there is no image"
    )
    return f"no pair of different tiers: {what}; give images of at least two of {', '.join(names)}"
