"""Judging what scores are said to mean: predicted tiers, and pair probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mirip_fast.evaluation import metrics
from mirip_fast.evaluation.calibration import Calibration
from mirip_fast.evaluation.intervals import Interval
from mirip_fast.evaluation.pair_counts import FloatArray, IntArray
from mirip_fast.evaluation.reliability import reliability
from mirip_fast.evaluation.report_parts import Probabilities, TierFigures


def tier_figures(
    tiers: IntArray,
    predicted: IntArray,
    n_tiers: int,
    intervals: tuple[Interval | None, Interval | None],
) -> TierFigures:
    """Accuracy, F1 and confusion of predicted tiers [n] against true ones [n].

    Args:
        tiers, predicted: in 0 … K−1, 0 = best.
        n_tiers: K.
        intervals: of accuracy and macro F1; None means unknown.
    """
    confusion = metrics.confusion_matrix(tiers, predicted, n_tiers)
    accuracy_interval, f1_interval = intervals
    return TierFigures(
        accuracy=metrics.tier_accuracy(confusion),
        accuracy_interval=accuracy_interval,
        macro_f1=metrics.macro_f1(confusion),
        macro_f1_interval=f1_interval,
        confusion=tuple(tuple(int(count) for count in row) for row in confusion),
    )


def judged_probabilities(
    calibration: Calibration,
    most_probable: TierFigures | None,
    scores: FloatArray,
    tiers: IntArray,
    groups: Sequence[str | None] | None,
    within: IntArray | None,
    *,
    rounds: int,
    confidence: float,
    seed: int,
) -> Probabilities:
    """Whether a calibration's probabilities come true on graded images.

    Args:
        calibration: a known one.
        most_probable: the figures of its most probable tiers; None where it knows no tiers.
        scores, tiers: [n].
        groups: [n] names; None for an image that is its own group.
        within: [n] codes; only pairs with equal codes count.
        rounds, confidence, seed: of the bootstrap over groups.
    """
    heat = math.inf if calibration.temperature is None else calibration.temperature.value
    pairs = reliability(
        scores, tiers, heat, groups, within=within,
        rounds=rounds, confidence=confidence, seed=seed,
    )  # fmt: skip
    return Probabilities(
        source=calibration.source,
        images=calibration.images,
        temperature=None if math.isinf(heat) else heat,
        pairs=pairs,
        tiers=most_probable,
        remarks=tuple(calibration.remarks()),
    )
