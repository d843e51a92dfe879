"""Tier verdicts of ranked works: win rates against a model's anchors, the tier, and how sure it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mirip_fast.evaluation.calibration import Calibration
from mirip_fast.evaluation.verdict import verdict_tiers
from mirip_fast.ranking.anchors import Anchors


@dataclass(frozen=True)
class Verdict:
    """The tier that comparisons put a work in.

    Attributes:
        verdict: the best tier of whose anchors the work beats at least half, else the worst.
        confidence: the calibrated probability (0–1) that it is of that tier; None if unknown.
        win_rates: tier → share (0–1) of its anchors that the work beats, the best tier first; None where
            the tier has no anchor to compare with.
    """

    verdict: str
    confidence: float | None
    win_rates: Mapping[str, float | None]


def give_verdicts(
    scores: NDArray[np.floating],
    hashes: Sequence[bytes],
    anchors: Anchors,
    calibration: Calibration,
) -> list[Verdict]:
    """The verdicts on works.

    Args:
        scores: [n] finite scores of the works by the anchors' model.
        hashes: [n] SHA-256 of their files: a work that is an anchor is not compared with itself.
        anchors: of the model.
        calibration: of the same model.
    """
    names = anchors.tier_names
    rates = anchors.win_rates(scores, hashes)
    tiers = verdict_tiers(rates)
    chances = calibration.tier_probabilities(scores)
    return [
        Verdict(
            names[tier],
            None if chances is None else float(chances[i, tier]),
            {
                name: None if np.isnan(rate) else float(rate)
                for name, rate in zip(names, rates[i], strict=True)
            },
        )
        for i, tier in enumerate(tiers.tolist())
    ]
