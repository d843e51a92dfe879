"""What a raw score means, learned from held-out scores: pair probability, tier probabilities, 0–100.

Only scores of works that the model had not trained on go in: on its own training works a head scores
far better than on new ones, and everything derived from those would be too sure of itself.

Pairs: P(a beats b) = σ((s_a − s_b) / T). The temperature T is fitted by maximum likelihood on held-out pairs
of different tiers, each pair once: a logistic regression of «the first is the better one» on the difference
of the scores, without an intercept (the Bradley-Terry form; temperature scaling, Guo et al. 2017, *On
Calibration of Modern Neural Networks*). Pairs are never listed: blocks of differences are made from the n
scores.

Tiers: P(tier k or better | score s) = σ(θ_k + β s) with θ_1 < θ_2 < … and one slope β ≥ 0 for all tiers (the
proportional-odds model; McCullagh 1980, *Regression Models for Ordinal Data*), fitted by maximum likelihood.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from mirip_fast.errors import DataError
from mirip_fast.evaluation.metrics import FloatArray, IntArray, check_codes, check_scores

#: Fewer held-out works than this give no numbers: the standard error of a percentile is then up to
#: nine points, that of a share of right pairs about as much.
MIN_IMAGES = 30
#: At least two tiers need so many held-out works each.
MIN_PER_TIER = 5
#: A tier of at least this share of the held-out works should be the most probable one of some of them.
MANY = 0.04

VERSION = 1

#: Beyond so many images the temperature is fitted on a random sample of so many (37 million pairs).
MAX_IMAGES = 10_000

_BLOCK_PAIRS = 100_000  # a few float64 arrays of this size live at once, in the processor's cache
_START_IMAGES = 1_000  # images of the sample that gives the first guess


@dataclass(frozen=True)
class OrdinalModel:
    """A fitted proportional-odds model.

    Attributes:
        n_tiers: K, tiers there are.
        present: the tiers that it knows, those with held-out images, best first; P of the others is 0.
        slope: β per unit of score, 0 or more.
        thresholds: θ, one fewer than ``present``, rising; θ_k belongs to «``present[k]`` or better».
        separated: no image scored above one of a better tier, so that no finite likelihood maximum
            exists; each image's tier then counts (n + 1) / (n + 2), its neighbours the rest.
    """

    n_tiers: int
    present: tuple[int, ...]
    slope: float
    thresholds: tuple[float, ...]
    separated: bool

    def probabilities(self, scores: ArrayLike) -> FloatArray:
        """P(tier) of each score: [n] → [n, K] float64, rows sum to 1, column 0 is the best tier."""
        values = np.asarray(scores, dtype=np.float64)
        at_least = logistic(np.asarray(self.thresholds) + self.slope * values[:, None])
        edges = np.zeros((len(values), 1))
        result = np.zeros((len(values), self.n_tiers))
        steps = np.diff(np.hstack([edges, at_least, edges + 1]), axis=1)
        result[:, list(self.present)] = np.maximum(steps, 0)
        return result

    def most_probable(self, scores: ArrayLike) -> IntArray:
        """[n] int64: the tier with the highest probability, the better one where two are equal."""
        best: IntArray = self.probabilities(scores).argmax(axis=1)
        return best


@dataclass(frozen=True)
class Calibration:
    """What held-out scores say about the meaning of a score.

    Attributes:
        source: where the held-out scores come from, one of ``ranking.held_out.SOURCES``, or ``none``.
        tier_names: K names, best first; none where the works have no tiers.
        tier_counts: held-out works of each tier.
        within: the column inside whose values pairs were compared, or None.
        unknown: why there is no calibration, or None where there is one.
        temperature: of the pair probability, see :func:`fit_temperature`; None if unknown.
        ordinal: of the tier probabilities; None if unknown, or without tiers.
        reference: held-out scores, rising; empty if unknown.
        accuracy: held-out pairwise accuracy and the ends of its 95 % interval (0–1 each); None if unknown.
    """

    source: str
    tier_names: tuple[str, ...]
    tier_counts: tuple[int, ...]
    within: str | None
    unknown: str | None
    temperature: dict[str, Any] | None
    ordinal: OrdinalModel | None
    reference: tuple[float, ...]
    accuracy: tuple[float, float, float] | None = None

    @property
    def chance(self) -> str | None:
        """A sentence where the scores are not shown to be better than chance; else None, or if unknown."""
        if self.unknown is not None or self.accuracy is None or self.accuracy[1] > 0.5:
            return None
        percent = [f"{100 * value:.1f}" for value in self.accuracy]
        return (
            f"The model is no better than chance, as far as {self.images} held-out works tell: it orders "
            f"{percent[0]} % of their pairs as the grades do (95 % interval: {percent[1]} to "
            f"{percent[2]} %); guessing orders 50 %."
        )

    @property
    def images(self) -> int:
        """Held-out works that it rests on."""
        return sum(self.tier_counts) or len(self.reference)

    def pair_probability(self, difference: ArrayLike) -> FloatArray | None:
        """P(first beats second) for score differences of any shape; None if unknown."""
        if self.temperature is None:
            return None
        return pair_probability(difference, self.temperature["value"])

    def tier_probabilities(self, scores: ArrayLike) -> FloatArray | None:
        """[n] scores → [n, K] probabilities of the tiers, rows sum to 1; None if unknown."""
        return None if self.ordinal is None else self.ordinal.probabilities(scores)

    def score_100(self, scores: ArrayLike) -> FloatArray | None:
        """[n] scores → [n] percentiles (0–100) among the held-out scores; None if unknown, NaN for NaN.

        100 · (share of the held-out works that score lower + half of the share that score the same): 50 is a
        work in their middle, 0 one below and 100 one above all of them. One work has one vote, in the
        mix of tiers that the graded works have.
        """
        if not self.reference:
            return None
        values = np.asarray(scores, dtype=np.float64)
        lower, up_to = (np.searchsorted(self.reference, values, side) for side in ("left", "right"))
        result: FloatArray = np.where(
            np.isnan(values), np.nan, 50.0 * (lower + up_to) / len(self.reference)
        )
        return result

    def warnings(self) -> list[str]:
        """What a reader of the numbers has to know, in sentences."""
        if self.unknown is not None:
            return [self.unknown]
        named = list(zip(self.tier_names, self.tier_counts, strict=True))
        told = []
        if not named:
            told.append(
                "No tiers, their probabilities or win rates: the works that were learned from have none."
            )
        absent = [name for name, count in named if not count]
        if absent:
            told.append(
                f"No held-out work is of tier {', '.join(absent)}: its probability is given as 0, "
                "which is not known."
            )
        rare = [f"{name} ({count})" for name, count in named if 0 < count < MIN_PER_TIER]
        if rare:
            told.append(
                f"Few held-out works are of tier {', '.join(rare)}: its probability is rough."
            )
        never = self._never_most_probable()
        if never:
            shares = " and ".join(f"{100 * self.tier_counts[k] / self.images:.0f} %" for k in never)
            told.append(
                f"No held-out work has {' or '.join(self.tier_names[k] for k in never)} as its most "
                f"probable tier, though {shares} have it."
            )
        if self.temperature is not None and math.isinf(self.temperature["value"]):
            told.append(
                "On held-out works better tiers do not score higher: every pair is given as even."
            )
        if self.temperature is not None and self.temperature["separated"]:
            told.append(
                "Every held-out pair is in the right order: how often the model errs cannot be told "
                "from them, and the probabilities rest on an assumption (docs/uncertainty.md)."
            )
        return told

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
        known = self.temperature
        if known is not None and math.isinf(known["value"]):
            known = {**known, "value": None}
        return {
            "version": VERSION,
            "source": self.source,
            "images": self.images,
            "tiers": dict(zip(self.tier_names, self.tier_counts, strict=True)),
            "within": self.within,
            "unknown": self.unknown,
            "temperature": known,
            "ordinal": self.ordinal and asdict(self.ordinal),
            "warnings": self.warnings(),
            "reference": list(self.reference),
            "accuracy": self.accuracy and list(self.accuracy),
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
            temperature, model = values["temperature"], values["ordinal"]
            if temperature is not None:
                value = math.inf if temperature["value"] is None else float(temperature["value"])
                parts = {name: temperature[name] for name in ("images", "pairs", "separated")}
                temperature = {"value": value, **parts}
            if model is not None:
                tuples = {name: tuple(model[name]) for name in ("present", "thresholds")}
                model = OrdinalModel(**{**model, **tuples})
            return cls(
                source=str(values["source"]),
                tier_names=tuple(values["tiers"]),
                tier_counts=tuple(int(count) for count in values["tiers"].values()),
                within=values["within"],
                unknown=values["unknown"],
                temperature=temperature,
                ordinal=model,
                reference=tuple(float(score) for score in values["reference"]),
                accuracy=tuple(values["accuracy"]) if values.get("accuracy") else None,
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
    temperature = None
    if known and judged is None:
        temperature = fit_temperature(values, tier, within)
    elif (
        known and judged is not None
    ):  # each pair is a cell of its own, with a better and a worse work
        cells = np.repeat(np.arange(len(judged)), 2)
        temperature = fit_temperature(values[judged].ravel(), np.tile([0, 1], len(judged)), cells)
    return Calibration(
        source=source,
        tier_names=tuple(tier_names),
        tier_counts=tuple(int(count) for count in counts),
        within=within_name,
        unknown=unknown,
        temperature=temperature,
        ordinal=fit_ordinal(values, tier, len(tier_names)) if known and tier_names else None,
        reference=tuple(np.sort(values).tolist()) if known else (),
    )


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


def logistic(x: ArrayLike) -> FloatArray:
    """σ(x) = 1 / (1 + e^−x) as float64."""
    from scipy.special import expit

    result: FloatArray = expit(np.asarray(x, dtype=np.float64))
    return result


def pair_probability(difference: ArrayLike, temperature: float) -> FloatArray:
    """P(first beats second) in 0–1 for score differences first − second of any shape."""
    return logistic(np.asarray(difference, dtype=np.float64) / temperature)


def fit_temperature(
    scores: ArrayLike, tiers: ArrayLike, within: ArrayLike | None = None
) -> dict[str, Any]:
    """Fit T on all pairs of different tiers.

    Args:
        scores: [n] finite held-out scores, higher is better.
        tiers: [n] integers, 0 = best.
        within: [n] integer codes; only pairs with equal codes count (negative: in no pair).

    Returns:
        ``value``, T > 0 in the unit of the scores, infinite where better tiers do not score higher on
        average, so that every probability is ½; ``images`` that it was fitted on and their ``pairs`` of
        different tiers; ``separated``, whether no pair was in the wrong order, so that no finite likelihood
        maximum exists. Each pair then counts as right with (n + 1) / (n + 2) of its weight and as wrong with
        the rest, n the number of images (Platt 1999 with images in place of pairs).

    Raises:
        DataError: there is no such pair, a score is not finite, or lengths differ.
    """
    values = check_scores(scores)
    tier = check_codes(tiers, len(values), "tiers")
    cell = np.zeros_like(tier)
    if within is not None:
        cell = check_codes(within, len(values), "within", lowest=None)
    if len(values) > MAX_IMAGES:
        chosen = np.random.default_rng(0).choice(len(values), MAX_IMAGES, replace=False)
        values, tier, cell = values[chosen], tier[chosen], cell[chosen]

    pairs = wrong = right = 0
    total = 0.0
    for block in difference_blocks(values, tier, cell):
        pairs += block.size
        wrong += int((block < 0).sum())
        right += int((block > 0).sum())
        total += float(block.sum())
    if not pairs:
        raise DataError("no pair of different tiers to fit the temperature on")
    n = len(values)
    fitted = {"value": math.inf, "images": n, "pairs": pairs, "separated": False}
    if total <= 0 or not right:
        return fitted
    separated = wrong == 0
    target = (n + 1) / (n + 2) if separated else 1.0
    start = 0.0
    if n > 2 * _START_IMAGES and within is None and not separated:
        some = np.argsort(tier, kind="stable")[:: n // _START_IMAGES]
        start = _solve(values[some], tier[some], cell[some], target)
    value = 1 / _solve(values, tier, cell, target, start)
    return {**fitted, "value": value, "separated": separated}


def difference_blocks(scores: FloatArray, tiers: IntArray, cells: IntArray) -> Iterator[FloatArray]:
    """Score differences (better − worse) of all pairs of different tiers in equal cells ≥ 0.

    Args:
        scores, tiers, cells: [n] each.

    Yields:
        [b, m] float64 with about a hundred thousand entries, or one row.
    """
    order = np.lexsort((tiers, cells))
    order = order[cells[order] >= 0]
    ordered, tier, cell = scores[order], tiers[order], cells[order]
    ends = np.searchsorted(cell, cell, side="right")  # one past the last image of the same cell
    keys = cell * (int(tiers.max(initial=0)) + 1) + tier
    starts = np.searchsorted(keys, keys, side="right")  # first image of the same cell, worse tier
    edges = np.flatnonzero(np.diff(keys, prepend=-1, append=-1))
    for first, last in pairwise(edges):  # images of one cell and tier
        worse = ordered[starts[first] : ends[first]]
        step = max(1, _BLOCK_PAIRS // max(1, len(worse)))
        for low in range(first, last if len(worse) else first, step):
            yield ordered[low : min(low + step, last), None] - worse[None, :]


def _solve(
    scores: FloatArray, tiers: IntArray, cells: IntArray, target: float, start: float = 0.0
) -> float:
    """The β > 0 at which the likelihood of β = 1/T is highest.

    The slope of the negative log-likelihood, Σ d (σ(βd) − target), rises with β, and ever more slowly: from
    below the maximum, and 0 is below it, Newton's method cannot overshoot.
    """
    from scipy.optimize import root_scalar

    def slope(beta: float) -> tuple[float, float]:
        value = curvature = 0.0
        for block in difference_blocks(scores, tiers, cells):
            chance = logistic(beta * block)
            flat = block.ravel()
            value += float(flat @ (chance.ravel() - target))
            curvature += float(flat @ (chance * (1 - chance) * block).ravel())
        return value, curvature

    found = root_scalar(
        slope, x0=start, fprime=True, method="newton", xtol=1e-300, rtol=1e-10, maxiter=200
    )
    return float(found.root)


def fit_ordinal(scores: ArrayLike, tiers: ArrayLike, n_tiers: int) -> OrdinalModel:
    """Fit P(tier | score) on graded images.

    Args:
        scores: [n] finite held-out scores, higher is better.
        tiers: [n] integers, 0 = best, below ``n_tiers``.
        n_tiers: K.

    Raises:
        DataError: fewer than two tiers occur, a score is not finite, or lengths differ.
    """
    values = check_scores(scores)
    tier = check_codes(tiers, len(values), "tiers")
    present, codes = np.unique(tier, return_inverse=True)
    if len(present) < 2 or int(present[-1]) >= n_tiers:
        raise DataError(
            f"an ordinal model needs at least two of the {n_tiers} tiers, not {present.tolist()}"
        )
    centre, deviation = float(values.mean()), float(values.std()) or 1.0
    z = (values - centre) / deviation
    separated = _separated(z, codes)
    slope, thresholds = _maximise(z, _targets(codes, len(present), separated))
    return OrdinalModel(
        n_tiers=n_tiers,
        present=tuple(int(t) for t in present),
        slope=slope / deviation,
        thresholds=tuple(float(t) for t in thresholds - slope * centre / deviation),
        separated=separated,
    )


def _separated(z: FloatArray, codes: IntArray) -> bool:
    """Whether each tier's lowest score is at least the highest of the next worse one (not all equal)."""
    lowest = [z[codes == k].min() for k in range(int(codes.max()) + 1)]
    highest = [z[codes == k].max() for k in range(int(codes.max()) + 1)]
    apart = all(low >= high for low, high in zip(lowest, highest[1:], strict=False))
    return apart and bool(z.max() > z.min())


def _targets(codes: IntArray, k: int, separated: bool) -> FloatArray:
    """[n, k] weights of each image's tiers, rows sum to 1: its own tier's alone unless separated."""
    own = np.eye(k)
    if separated:
        n = len(codes)
        beside = np.eye(k, k=1) + np.eye(k, k=-1)
        own = (n + 1) / (n + 2) * own + beside / beside.sum(1, keepdims=True) / (n + 2)
    result: FloatArray = own[codes]
    return result


def _maximise(z: FloatArray, targets: FloatArray) -> tuple[float, FloatArray]:
    """Slope and thresholds [k − 1] of the highest likelihood, for standardised scores."""
    from scipy.optimize import minimize

    shares = np.cumsum(targets.mean(axis=0))[:-1]
    theta = np.log(shares / (1 - shares))
    start = np.r_[0.5, theta[0], np.log(np.diff(theta))]
    bounds = [(0, None)] + [(None, None)] * len(theta)
    done: Any = minimize(
        _loss, start, (z, targets), jac=True, method="L-BFGS-B", bounds=bounds,
        options={"ftol": 1e-15, "gtol": 1e-9, "maxiter": 1000},
    )  # fmt: skip
    return float(done.x[0]), _thresholds(done.x)


def _thresholds(parameters: FloatArray) -> FloatArray:
    """θ from (slope, θ_1, log of each further step): the steps cannot be negative."""
    theta: FloatArray = np.cumsum(np.r_[parameters[1], np.exp(parameters[2:])])
    return theta


def _loss(parameters: FloatArray, z: FloatArray, targets: FloatArray) -> tuple[float, FloatArray]:
    """Mean negative log-likelihood and its gradient in (slope, θ_1, log steps).

    With u_k = θ_k + βz: P(k) = σ(u_k) − σ(u_{k−1}) = σ(u_k) σ(−u_{k−1}) (1 − e^−(u_k − u_{k−1})),
    whose logarithm is exact however small the probability.
    """
    n, steps = len(z), np.exp(parameters[2:])
    u = _thresholds(parameters) + parameters[0] * z[:, None]  # [n, k − 1]
    log_p = np.zeros_like(targets)
    log_p[:, :-1] -= np.logaddexp(0, -u)
    log_p[:, 1:] -= np.logaddexp(0, u)
    log_p[:, 1:-1] += np.log(-np.expm1(-steps))
    # d log P(k) / du_k = σ(−u_k) + r and d log P(k) / du_{k−1} = −σ(u_{k−1}) − r, r = 1 / (e^step − 1).
    r = np.r_[0.0, np.exp(-steps) / -np.expm1(-steps), 0.0]  # as a quotient that cannot overflow
    by_u = targets[:, :-1] * (logistic(-u) + r[:-1]) - targets[:, 1:] * (logistic(u) + r[1:])
    by_theta = by_u.sum(axis=0)
    later = np.cumsum(by_theta[::-1])[::-1]  # θ_k moves with every step up to it
    gradient = np.r_[(by_u.sum(axis=1) * z).sum(), later[0], later[1:] * steps]
    return -float((targets * log_p).sum()) / n, -gradient / n
