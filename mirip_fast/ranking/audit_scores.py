"""Images whose held-out score contradicts their tier: a doubtful grade, or a work the head misjudges."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mirip_fast.evaluation.metrics import PairCounter, ratio, tiers_by_quota
from mirip_fast.ranking.audit_images import AuditImage, finding_about
from mirip_fast.ranking.findings import Finding
from mirip_fast.ranking.held_out import HeldOut


def contradictions(scores: NDArray[np.float64], tiers: NDArray[np.int64]) -> NDArray[np.float64]:
    """[n]: the share, 0 to 1, of comparisons with images of other tiers that each image's score gets wrong.

    Wrong is a score above that of an image of a better tier, or below that of a worse one; equal scores
    are half wrong. NaN where all images have one tier.

    Args:
        scores: [n], higher is better.
        tiers: [n], 0 is the best.
    """
    right, compared = PairCounter(scores, tiers).by_image()
    return 1 - ratio(right, compared)


def disagreements(
    held_out: HeldOut, tier_names: Sequence[str], images: Sequence[AuditImage], share: float
) -> list[Finding]:
    """Findings about images that are wrong in at least ``share`` of their comparisons.

    Args:
        held_out: scores of images by heads that had not seen them.
        tier_names: best first.
        images: what is known of the images; those with a held-out score are found by name.
        share: 0 to 1.
    """
    known = {image.record.image_id: image for image in images}
    wrong = contradictions(held_out.scores, held_out.order)
    guessed = tiers_by_quota(held_out.scores, held_out.order)
    findings = []
    for i, image_id in enumerate(held_out.ids):
        image = known.get(image_id)
        if image is None or not wrong[i] >= share:
            continue  # taken out of the data
        own, would = f"score ({held_out.scores[i]:.4g})", ""
        if held_out.has_tiers:
            same = image.tier == tier_names[int(held_out.tiers[i])]
            would = f"; by its {held_out.source} {own} it would be {tier_names[int(guessed[i])]}"
        else:
            same = image.record.tier_score == held_out.tier_scores[i]
            would = f" (tier_score {held_out.tier_scores[i]:g}, {held_out.source} {own})"
        if not same:
            continue  # graded anew since
        what = "tiers" if held_out.has_tiers else "grades"
        value = f"contradicts {wrong[i]:.0%} of the comparisons with other {what}{would}"
        advice = "look at it: is the grade right, and is it the right file?"
        findings.append(finding_about("disagreement", [image], advice, value, float(wrong[i])))
    return findings
