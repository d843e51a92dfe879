"""A committee of quick models that learn from the judgements so far: asking teaches most where they disagree.

Each member scores a work by a linear function of its features and takes σ(score of one − score of the other)
as the chance that the one is better (Bradley & Terry 1952). Members differ in three ways, so that their
spread stands for what is not known yet: each starts from a function of its own, drawn from the prior, and is
pulled back to that (randomized prior functions, Osband et al. 2018); each sees a resample of its own of the
judgements (bootstrap, with Poisson counts; Oza & Russell 2001); and where a run has bootstrap heads, each
starts from one of them.

Members are fitted by Newton's method with step halving, in a fraction of a second, with numpy alone. The
head that is kept in the end is not among them: it is trained as `train --pairs` does.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Index = NDArray[np.int64]

#: Principal components that a member sees, at most.
COMPONENTS = 64
#: Members, where no run gives their number.
MEMBERS = 16
#: Standard deviation of a typical work's score under the prior, in logits.
PRIOR = 1.0
#: Spread of a bootstrap head's scores over the works, in logits.
HEAD_SPREAD = 2.0
#: Newton steps per fit, at most, and the step that ends it. A fit starts where the last one ended.
STEPS, CLOSE = 12, 1e-4
_HALVINGS = 10


def principal_components(features: NDArray[np.floating], most: int = COMPONENTS) -> Array:
    """[n, d] principal components of standardized [n, D] features, scaled to a mean squared length of 1."""
    rows = features.astype(np.float64)
    rows -= rows.mean(0)
    rows /= np.maximum(rows.std(0), 1e-6)
    left, values, _ = np.linalg.svd(rows, full_matrices=False)
    parts: Array = left[:, :most] * values[:most]
    length = np.sqrt((parts**2).sum(1).mean())
    return parts / length if length > 0 else parts


class Committee:
    """H members, fitted to judgements by :meth:`fit`.

    Args:
        components: [n, d], see :func:`principal_components`.
        heads: [H, n] scores of the works by bootstrap heads of a run, in any unit; None without.
        seed: of the priors and the resamples.
    """

    def __init__(self, components: Array, heads: NDArray[np.floating] | None = None, seed: int = 0):
        n, width = components.shape
        self._rows, self._seed = components, seed
        self._start = np.zeros((MEMBERS, n)) if heads is None else _in_logits(heads)
        rng = np.random.default_rng([seed, 0])
        self._prior = rng.normal(0, PRIOR, (len(self._start), width))
        self._precision = 1 / PRIOR**2
        self._weights = self._prior.copy()

    def __len__(self) -> int:
        return len(self._start)

    def fit(self, pairs: Index, label: Index) -> None:
        """Learn from the judgements so far.

        Args:
            pairs: [p, 2] works.
            label: [p] 1 the first is better, −1 the second, 0 a tie (either could have won).
        """
        gap = self._rows[pairs[:, 0]] - self._rows[pairs[:, 1]]
        start = self._start[:, pairs[:, 0]] - self._start[:, pairs[:, 1]]
        won = (label + 1) / 2
        times = self._resamples(len(label))

        def loss(weights: Array) -> Array:
            margin = start + weights @ gap.T
            own: Array = (times * (np.logaddexp(0, margin) - won * margin)).sum(1)
            own += ((weights - self._prior) ** 2).sum(1) * self._precision / 2
            return own

        for _ in range(STEPS):
            chance = _sigmoid(start + self._weights @ gap.T)
            gradient = (times * (chance - won)) @ gap
            gradient += (self._weights - self._prior) * self._precision
            sure = times * chance * (1 - chance)
            curvature = np.stack([(gap * row[:, None]).T @ gap for row in sure])
            curvature += np.eye(gap.shape[1]) * self._precision
            step = np.linalg.solve(curvature, gradient[..., None])[..., 0]
            self._weights -= _shortened(step, self._weights, loss) * step
            if np.abs(step).max(initial=0) < CLOSE:
                break

    def scores(self) -> Array:
        """[H, n] score of each work by each member, in logits."""
        found: Array = self._start + self._weights @ self._rows.T
        return found

    def _resamples(self, count: int) -> Array:
        """[H, p] how often each member sees each judgement: the same for a judgement whenever it is asked."""
        rows = [
            np.random.default_rng([self._seed, 1 + i]).poisson(1.0, len(self)) for i in range(count)
        ]
        return np.array(rows, dtype=np.float64).reshape(count, len(self)).T


def information(margins: Array) -> Array:
    """What a verdict is expected to tell about which member is right, in nats: [m] from [H, m] margins.

    H(mean p) − mean H(p), with p the chance that the first work wins: the mutual information between verdict
    and member. It is high where members are sure and contradict each other (query by committee, Seung et al.
    1992), and low where all agree that the works are equally good (BALD, Houlsby et al. 2011).
    """
    chance = _sigmoid(margins)
    gained: Array = _entropy(chance.mean(0)) - _entropy(chance).mean(0)
    return gained


def _shortened(step: Array, weights: Array, loss: Callable[[Array], Array]) -> Array:
    """[H, 1] share of each member's step that makes it no worse: far from the end, whole steps do."""
    share = np.ones((len(step), 1))
    now = loss(weights)
    for _ in range(_HALVINGS):
        worse = loss(weights - share * step) > now + 1e-9
        if not worse.any():
            break
        share[worse] /= 2
    return share


def _in_logits(heads: NDArray[np.floating]) -> Array:
    scores = heads.astype(np.float64)
    scores -= scores.mean(1, keepdims=True)
    spread = np.maximum(scores.std(1, keepdims=True), 1e-9)
    result: Array = scores * (HEAD_SPREAD / spread.mean())
    return result


def _sigmoid(x: Array) -> Array:
    result: Array = 1 / (1 + np.exp(-np.clip(x, -40, 40)))
    return result


def _entropy(p: Array) -> Array:
    """Of a coin, in nats."""
    q = np.clip(p, 1e-12, 1 - 1e-12)
    result: Array = -(q * np.log(q) + (1 - q) * np.log1p(-q))
    return result
