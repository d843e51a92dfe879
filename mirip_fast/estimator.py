"""The Gaussian process of phase two as a scikit-learn estimator, for feature rows of any origin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from mirip_fast.errors import DataError
from mirip_fast.evaluation.metrics import pairwise_accuracy
from mirip_fast.models.gp import GaussianProcess, normal_scores


class PairwiseRanker(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """Learns to order rows of features as graded ones are ordered.

    >>> ranker = mf.PairwiseRanker(tiers=("S", "A", "B", "C")).fit(X, tiers, groups=artists)
    >>> ranker.predict(X_new)                                       # [n] scores, higher is better
    >>> cross_val_score(mf.PairwiseRanker(), X, grades, cv=5)       # pairwise accuracy, 0–1

    Args:
        tiers: names of the tiers, best first; None: grades are numbers, higher is better.
        blocks: numbers per block of a row, which add up to its length: each is centred, scaled to length 1,
            and has an amplitude of its own; None: one block.
        seed: of the rows that amplitudes are learned from, where there are very many.

    Attributes (after :meth:`fit`):
        process_: the fitted :class:`mirip_fast.models.gp.GaussianProcess`.
        left_out_: [n] float64, each training row's score by the other groups alone.
        n_features_in_: D.
    """

    def __init__(
        self,
        tiers: Sequence[str] | None = None,
        blocks: Sequence[int] | None = None,
        seed: int = 0,
    ):
        self.tiers = tiers
        self.blocks = blocks
        self.seed = seed

    def fit(
        self, X: ArrayLike, y: ArrayLike, groups: Sequence[Any] | None = None
    ) -> PairwiseRanker:
        """Learn.

        Args:
            X: [n, D] finite features.
            y: [n] grades: names in ``tiers``, or numbers, higher is better.
            groups: [n] names of what is left out together for ``left_out_``; None: each row alone.

        Raises:
            ValueError: (:class:`mirip_fast.errors.DataError` is one) a grade that is not in ``tiers``, fewer
                than two different ones, numbers that are not finite.
        """
        if self.tiers is None:
            X, y = validate_data(self, X, y, y_numeric=True, ensure_min_samples=2, dtype=np.float64)
            target, tiers = np.asarray(y, dtype=np.float64), None
        else:
            X = validate_data(self, X, ensure_min_samples=2, dtype=np.float64)
            tiers = self._codes(y)
            target = normal_scores(tiers)
        self.process_ = GaussianProcess.fit(
            X, target, groups, blocks=self.blocks, seed=self.seed, tiers=tiers
        )
        self.left_out_ = self.process_.left_out
        return self

    def predict(self, X: ArrayLike) -> NDArray[np.float64]:
        """[k, D] → [k] scores, higher is better, in the unit of the grades (normal scores of tiers)."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float64)
        return self.process_.score(X)

    def score(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
        """Pairwise accuracy: share (0–1) of pairs of unequal grades in the right order, ties ½."""
        found = self.predict(X)
        if self.tiers is None:
            _, codes = np.unique(-np.asarray(y, dtype=np.float64), return_inverse=True)
        else:
            codes = self._codes(y)
        return pairwise_accuracy(found, codes, weights=sample_weight, finer=self.tiers is None)

    def _codes(self, y: ArrayLike) -> NDArray[np.int64]:
        place = {name: code for code, name in enumerate(self.tiers or ())}
        unknown = sorted({str(grade) for grade in np.asarray(y).tolist()} - {*map(str, place)})
        if unknown:
            raise DataError(f"grades {', '.join(unknown)} are none of tiers={tuple(place)}")
        return np.array([place[grade] for grade in np.asarray(y).tolist()], dtype=np.int64)
