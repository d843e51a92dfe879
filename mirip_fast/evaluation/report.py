"""Everything that is judged about one model on one split, from one pass of scores.

:func:`judge` sees scores and grades only, so head-only and end-to-end models are judged by the same
code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from mirip_fast.errors import DataError
from mirip_fast.evaluation import metrics, report_text
from mirip_fast.evaluation.intervals import Interval, bootstrap_over_groups
from mirip_fast.evaluation.mistakes import worst_pairs
from mirip_fast.evaluation.pair_counts import (
    FloatArray,
    IntArray,
    PairCounter,
    check_codes,
    check_scores,
)


@dataclass(frozen=True, slots=True)
class TierPairRow:
    """Pairwise accuracy of one tier against a worse one.

    Attributes:
        better, worse: tier names.
        pairs: image pairs of the two tiers, at least 1.
        accuracy: share of them in the right order (0–1, score ties ½).
        interval: None means unknown.
    """

    better: str
    worse: str
    pairs: int
    accuracy: float
    interval: Interval | None


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
class Judged:
    """What was judged, each [n]: names, scores, tiers (0 = best) and within codes, where given."""

    image_ids: tuple[str, ...]
    scores: FloatArray
    tiers: IntArray
    within: IntArray | None


@dataclass(frozen=True, slots=True)
class Report:
    """How well scores order graded images, and how sure that is. An interval of None means unknown.

    Attributes:
        tier_names: best first; K tiers.
        tier_counts: images of each tier.
        n_images, n_groups, n_pairs: images, groups (an image without one counts as one), cross-tier
            pairs.
        pairwise_accuracy: share of cross-tier pairs in the right order (0–1, score ties ½).
        macro_accuracy: mean over the tier pairs that occur.
        within_accuracy: over the ``within_pairs`` pairs with equal within value; None without the
            column or without such a pair.
        tier_pairs: one row per tier pair that occurs, best tiers first (all pairs, whatever their
            within value).
        kendall_tau_b: −1 … 1, positive = good; None where all scores are equal.
        spearman: with the ``spearman_images`` finer grades that are there; None where not defined.
        ndcg: k → NDCG@k; None where not defined.
        tier_accuracy, macro_f1, confusion: with predicted tiers by quota
            (:func:`metrics.tiers_by_quota`); ``confusion`` is [true tier][predicted tier].
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
    macro_accuracy: float
    macro_accuracy_interval: Interval | None
    within_pairs: int
    within_accuracy: float | None
    within_accuracy_interval: Interval | None
    tier_pairs: tuple[TierPairRow, ...]
    kendall_tau_b: float | None
    kendall_tau_b_interval: Interval | None
    spearman: float | None
    spearman_images: int
    ndcg: dict[int, float | None]
    tier_accuracy: float
    macro_f1: float
    confusion: tuple[tuple[int, ...], ...]
    rounds: int
    confidence: float
    seed: int
    judged: Judged = field(repr=False, compare=False)

    def worst_mistakes(self, k: int = 10, *, max_per_image: int = 2) -> list[Mistake]:
        """At most ``k`` wrongly ordered pairs, largest gap first, an image at most twice by default.

        With a within column only pairs inside the same value are listed; equal scores are no
        mistake here.

        Raises:
            ConfigError: ``k`` is negative or ``max_per_image`` below 1.
        """
        ids, scores, tiers = self.judged.image_ids, self.judged.scores, self.judged.tiers
        pairs = worst_pairs(
            scores, tiers, k, within=self.judged.within, max_per_image=max_per_image
        )
        return [
            Mistake(
                better_id=ids[pair.better],
                better_tier=self.tier_names[tiers[pair.better]],
                better_score=float(scores[pair.better]),
                worse_id=ids[pair.worse],
                worse_tier=self.tier_names[tiers[pair.worse]],
                worse_score=float(scores[pair.worse]),
                gap=pair.gap,
            )
            for pair in pairs
        ]

    def to_dict(self, mistakes: int = 10) -> dict[str, Any]:
        """Plain JSON types, every number finite or None, with the ``mistakes`` worst mistakes."""
        left_out = {"judged", "tier_pairs", "ndcg", "confusion"}
        plain: dict[str, Any] = {}
        for name in (f.name for f in fields(self) if f.name not in left_out):
            value = getattr(self, name)
            plain[name] = asdict(value) if isinstance(value, Interval) else value
        plain["tier_names"], plain["tier_counts"] = list(self.tier_names), list(self.tier_counts)
        plain["tier_pairs"] = [asdict(row) for row in self.tier_pairs]
        plain["ndcg"] = {str(k): value for k, value in self.ndcg.items()}
        plain["confusion"] = [list(row) for row in self.confusion]
        plain["worst_mistakes"] = [asdict(mistake) for mistake in self.worst_mistakes(mistakes)]
        return plain

    def to_table(self, mistakes: int = 5) -> str:
        """Text for a terminal: figures, tier pairs, confusion matrix, the worst mistakes, remarks."""
        return report_text.report_text(self, mistakes)


def judge(
    scores: ArrayLike,
    tiers: ArrayLike,
    *,
    tier_names: Sequence[str],
    image_ids: Sequence[str],
    groups: Sequence[str | None] | None = None,
    tier_scores: Sequence[float | None] | None = None,
    within: Sequence[str | None] | None = None,
    ks: Sequence[int] = (10,),
    rounds: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Report:
    """Judges one pass of scores over graded images.

    Args:
        scores: [n] finite floats, higher is better.
        tiers: [n] integers, 0 = best, each below ``len(tier_names)``.
        tier_names: K names, best first.
        image_ids: [n] names for the messages and the worst mistakes.
        groups: [n] group names; None or "" for an image that is its own group. Resampled as wholes.
        tier_scores: [n] finer grades, higher is better; missing ones (None, NaN) are left out.
        within: [n] values of the column inside which a comparison is fair; None or "" is compared
            with none.
        ks: the k of each NDCG@k.
        rounds: bootstrap resamples; 0 for no intervals.
        confidence: share of resamples inside an interval, between 0 and 1.
        seed: of the bootstrap.

    Raises:
        ConfigError: ``ks``, ``rounds`` or ``confidence`` is out of range.
        DataError: a score is not finite, a tier is unknown, lengths differ, or no two tiers occur.
    """
    ids, names = tuple(image_ids), tuple(tier_names)
    n, k_tiers = len(ids), len(names)
    if len(np.asarray(scores)) != n:
        raise DataError(f"{len(np.asarray(scores))} scores for {n} image ids")
    values = check_scores(scores, ids)
    tier = check_codes(tiers, n, "tiers")
    counts = np.bincount(tier, minlength=k_tiers)
    if len(counts) > k_tiers:
        raise DataError(
            f"tiers: {len(counts) - 1} is not below the {k_tiers} tiers {', '.join(names)}"
        )
    if np.count_nonzero(counts) < 2:
        raise DataError(_one_tier_message(names, counts))
    within_codes = None if within is None else metrics.codes_of(within)

    accuracy, pairs = metrics.tier_pair_accuracy(values, tier, k_tiers)
    resample = partial(
        bootstrap_over_groups,
        values,
        tier,
        groups,
        rounds=rounds,
        confidence=confidence,
        seed=seed,
    )
    spread = resample()
    within_pairs, within_accuracy, within_interval = 0, None, None
    if within_codes is not None:
        within_pairs = int(PairCounter(values, tier, within=within_codes).count()[1].sum())
    if within_pairs:
        within_accuracy = metrics.pairwise_accuracy(values, tier, within_codes)
        within_interval = resample(within=within_codes).pairwise_accuracy
    spearman, spearman_images = _spearman_where_graded(values, tier_scores)
    confusion = metrics.confusion_matrix(tier, metrics.tiers_by_quota(values, tier), k_tiers)
    return Report(
        tier_names=names,
        tier_counts=tuple(int(count) for count in counts),
        n_images=n,
        n_groups=spread.n_groups,
        n_pairs=int(pairs.sum()),
        pairwise_accuracy=metrics.pairwise_accuracy(values, tier),
        pairwise_accuracy_interval=spread.pairwise_accuracy,
        macro_accuracy=metrics.macro_pairwise_accuracy(values, tier),
        macro_accuracy_interval=spread.macro_accuracy,
        within_pairs=within_pairs,
        within_accuracy=within_accuracy,
        within_accuracy_interval=within_interval,
        tier_pairs=tuple(
            TierPairRow(names[a], names[b], int(pairs[a, b]), float(accuracy[a, b]), interval)
            for (a, b), interval in spread.tier_pairs.items()
        ),
        kendall_tau_b=metrics.kendall_tau_b(values, tier),
        kendall_tau_b_interval=spread.kendall_tau_b,
        spearman=spearman,
        spearman_images=spearman_images,
        ndcg={int(k): metrics.ndcg_at_k(values, tier, int(k), k_tiers) for k in ks},
        tier_accuracy=metrics.tier_accuracy(confusion),
        macro_f1=metrics.macro_f1(confusion),
        confusion=tuple(tuple(int(count) for count in row) for row in confusion),
        rounds=rounds,
        confidence=confidence,
        seed=seed,
        judged=Judged(ids, values, tier, within_codes),
    )


def _spearman_where_graded(
    scores: FloatArray, tier_scores: Sequence[float | None] | None
) -> tuple[float | None, int]:
    """Spearman over the images that have a finer grade, and how many those are."""
    if tier_scores is None:
        return None, 0
    if len(tier_scores) != len(scores):
        raise DataError(
            f"tier_scores: {len(tier_scores)} values, but there are {len(scores)} scores"
        )
    grades = np.array([math.nan if grade is None else grade for grade in tier_scores], np.float64)
    graded = ~np.isnan(grades)
    return metrics.spearman(scores[graded], grades[graded]), int(graded.sum())


def _one_tier_message(names: Sequence[str], counts: IntArray) -> str:
    held = [name for name, count in zip(names, counts, strict=True) if count]
    what = (
        f"all {int(counts.sum())} images are of tier {held[0]!r}" if held else "there is no image"
    )
    return f"no pair of different tiers: {what}; give images of at least two of {', '.join(names)}"
