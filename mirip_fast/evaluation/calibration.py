"""What a raw score means, learned from held-out scores: pair probability, tier probabilities, 0–100.

Only scores of works that the model had not trained on go in: on its own training works a head scores
far better than on new ones, and everything derived from those would be too sure of itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from mirip_fast.errors import DataError
from mirip_fast.evaluation.ordinal import OrdinalModel, fit_ordinal
from mirip_fast.evaluation.pair_counts import FloatArray, IntArray, check_codes, check_scores
from mirip_fast.evaluation.percentile import score_100
from mirip_fast.evaluation.temperature import Temperature, fit_temperature, pair_probability

#: Fewer held-out works than this give no numbers: the standard error of a percentile is then up to
#: nine points, that of a share of right pairs about as much.
MIN_IMAGES = 30
#: At least two tiers need so many held-out works each.
MIN_PER_TIER = 5
#: A tier of at least this share of the held-out works should be the most probable one of some of them.
MANY = 0.04

VERSION = 1


@dataclass(frozen=True)
class Calibration:
    """What held-out scores say about the meaning of a score.

    Attributes:
        source: where the held-out scores come from, one of ``ranking.held_out.SOURCES``, or ``none``.
        tier_names: K names, best first; none where the works have no tiers.
        tier_counts: held-out works of each tier.
        within: the column inside whose values pairs were compared, or None.
        unknown: why there is no calibration, or None where there is one.
        temperature: of the pair probability; None if unknown.
        ordinal: of the tier probabilities; None if unknown, or without tiers.
        reference: held-out scores, rising; empty if unknown.
    """

    source: str
    tier_names: tuple[str, ...]
    tier_counts: tuple[int, ...]
    within: str | None
    unknown: str | None
    temperature: Temperature | None
    ordinal: OrdinalModel | None
    reference: tuple[float, ...]

    @property
    def images(self) -> int:
        """Held-out works that it rests on."""
        return sum(self.tier_counts) or len(self.reference)

    def pair_probability(self, difference: ArrayLike) -> FloatArray | None:
        """P(first beats second) for score differences of any shape; None if unknown."""
        if self.temperature is None:
            return None
        return pair_probability(difference, self.temperature.value)

    def tier_probabilities(self, scores: ArrayLike) -> FloatArray | None:
        """[n] scores → [n, K] probabilities of the tiers, rows sum to 1; None if unknown."""
        return None if self.ordinal is None else self.ordinal.probabilities(scores)

    def score_100(self, scores: ArrayLike) -> FloatArray | None:
        """[n] scores → [n] percentiles (0–100) among the held-out scores; None if unknown."""
        return score_100(scores, self.reference) if self.reference else None

    def remarks(self) -> list[str]:
        """What a reader of the numbers has to know, in sentences."""
        if self.unknown is not None:
            return [self.unknown]
        named = list(zip(self.tier_names, self.tier_counts, strict=True))
        said = []
        if not named:
            said.append(
                "No tiers, their probabilities or win rates: the works that were learned from have none."
            )
        absent = [name for name, count in named if not count]
        if absent:
            said.append(
                f"No held-out work is of tier {', '.join(absent)}: its probability is given as 0, "
                "which is not known."
            )
        rare = [f"{name} ({count})" for name, count in named if 0 < count < MIN_PER_TIER]
        if rare:
            said.append(
                f"Few held-out works are of tier {', '.join(rare)}: its probability is rough."
            )
        never = self._never_most_probable()
        if never:
            shares = " and ".join(f"{100 * self.tier_counts[k] / self.images:.0f} %" for k in never)
            said.append(
                f"No held-out work has {' or '.join(self.tier_names[k] for k in never)} as its most "
                f"probable tier, though {shares} have it."
            )
        if self.temperature is not None and math.isinf(self.temperature.value):
            said.append(
                "On held-out works better tiers do not score higher: every pair is given as even."
            )
        if self.temperature is not None and self.temperature.separated:
            said.append(
                "Every held-out pair is in the right order: how often the model errs can not be told "
                "from them, and the probabilities rest on an assumption (docs/uncertainty.md)."
            )
        return said

    def _never_most_probable(self) -> list[int]:
        """Tiers that many held-out works have, and that are the most probable one of none."""
        chances = self.tier_probabilities(self.reference)
        if chances is None:
            return []
        named = np.bincount(chances.argmax(axis=1), minlength=len(self.tier_names))
        many = np.array(self.tier_counts) >= MANY * self.images
        return [int(k) for k in np.flatnonzero((named == 0) & many)]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        heat, model = self.temperature, self.ordinal
        return {
            "version": VERSION,
            "source": self.source,
            "images": self.images,
            "tiers": dict(zip(self.tier_names, self.tier_counts, strict=True)),
            "within": self.within,
            "unknown": self.unknown,
            "temperature": heat
            and {**vars(heat), "value": None if math.isinf(heat.value) else heat.value},
            "ordinal": model
            and {
                **vars(model),
                "present": list(model.present),
                "thresholds": list(model.thresholds),
            },
            "remarks": self.remarks(),
            "reference": list(self.reference),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Calibration:
        """The inverse of :meth:`to_dict`.

        Raises:
            DataError: another version, or an entry is missing or wrong.
        """
        if values.get("version") != VERSION:
            raise DataError(f"version {values.get('version')!r}, where {VERSION} is understood")
        try:
            heat, model = values["temperature"], values["ordinal"]
            if heat is not None:
                value = math.inf if heat["value"] is None else float(heat["value"])
                heat = Temperature(**{**heat, "value": value})
            if model is not None:
                tuples = {name: tuple(model[name]) for name in ("present", "thresholds")}
                model = OrdinalModel(**{**model, **tuples})
            return cls(
                source=str(values["source"]),
                tier_names=tuple(values["tiers"]),
                tier_counts=tuple(int(count) for count in values["tiers"].values()),
                within=values["within"],
                unknown=values["unknown"],
                temperature=heat,
                ordinal=model,
                reference=tuple(float(score) for score in values["reference"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"an entry is missing or wrong ({error!r})") from error


def fit_calibration(
    scores: ArrayLike,
    tiers: ArrayLike,
    tier_names: Sequence[str],
    *,
    source: str,
    judged: IntArray | None = None,
    within: ArrayLike | None = None,
    within_name: str | None = None,
) -> Calibration:
    """Learn the meaning of scores from graded works that the model had not trained on.

    With fewer than :data:`MIN_IMAGES` works, or without two tiers of :data:`MIN_PER_TIER` works each,
    everything is unknown, and says why.

    Args:
        scores: [n] finite held-out scores, higher is better.
        tiers: [n] integers, 0 = best, below K; without tiers the ranks of finer grades.
        tier_names: K names, best first; none where the works have no tiers.
        source: where the scores come from, see :attr:`Calibration.source`.
        judged: [p, 2] rows of judged pairs, the better work first, that the temperature is fitted on; without
            names tiers are then not looked at.
        within: [n] integer codes; the temperature looks at pairs with equal codes only (negative: in no
            pair). Percentile and tier probabilities are over all works.
        within_name: the column's name.

    Raises:
        DataError: a score is not finite, a tier is unknown, or lengths differ.
    """
    values = check_scores(scores)
    none = np.empty(0, dtype=np.int64)
    tier = (
        none if judged is not None and not tier_names else check_codes(tiers, len(values), "tiers")
    )
    counts = np.bincount(tier, minlength=len(tier_names)) if tier_names else none
    unknown = _too_few(values, counts, source)
    if unknown is None and judged is not None and len(judged) < MIN_IMAGES:
        unknown = f"unknown: {len(judged)} judged pairs, at least {MIN_IMAGES} are needed"
    if unknown is None and within is not None:
        codes = np.asarray(within)
        pairable = [
            len(np.unique(tier[codes == code])) > 1 for code in np.unique(codes[codes >= 0])
        ]
        if not any(pairable):
            unknown = f"unknown: no held-out pair of different tiers has the same {within_name}"
    known = unknown is None
    return Calibration(
        source=source,
        tier_names=tuple(tier_names),
        tier_counts=tuple(int(count) for count in counts),
        within=within_name,
        unknown=unknown,
        temperature=_temperature(values, tier, within, judged) if known else None,
        ordinal=fit_ordinal(values, tier, len(tier_names)) if known and tier_names else None,
        reference=tuple(np.sort(values).tolist()) if known else (),
    )


def _temperature(
    scores: FloatArray, tiers: IntArray, within: ArrayLike | None, judged: IntArray | None
) -> Temperature:
    if judged is None:
        return fit_temperature(scores, tiers, within)
    # Each pair is a cell of its own, with a better and a worse work in it.
    better, cells = np.tile([0, 1], len(judged)), np.repeat(np.arange(len(judged)), 2)
    return fit_temperature(scores[judged].ravel(), better, cells)


def _too_few(scores: FloatArray, counts: np.ndarray, source: str) -> str | None:
    n = len(scores)
    more = (
        "; more graded works are needed, or `mirip-fast train --head-only --folds 5`, which holds "
        "out every work once"
        if source == "validation"
        else "; more graded works are needed"
    )
    if n < MIN_IMAGES:
        return f"unknown: {n} held-out works ({source}), at least {MIN_IMAGES} are needed{more}"
    if len(counts) and int((counts >= MIN_PER_TIER).sum()) < 2:
        return f"unknown: fewer than two tiers have {MIN_PER_TIER} held-out works ({source}){more}"
    return None
