"""How well scores order images whose tiers are known.

Every function is exact and takes whole arrays. Shapes: n images, K tiers. ``scores`` [n] are
floats, higher is better; ``tiers`` [n] are integers, 0 = best tier. A pair is two images of
different tiers; equal scores count ½.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mirip_fast.errors import ConfigError, DataError
from mirip_fast.evaluation.pair_counts import (
    FloatArray,
    IntArray,
    PairCounter,
    check_codes,
    check_scores,
)


def pairwise_accuracy(
    scores: ArrayLike, tiers: ArrayLike, within: ArrayLike | None = None, *, finer: bool = False
) -> float:
    """Share (0–1) of all cross-tier pairs in which the better tier has the higher score.

    With two tiers this is the area under the ROC curve.

    Args:
        scores: [n] finite floats.
        tiers: [n] integers, 0 = best.
        within: [n] integer codes; only pairs with equal codes count, an image with a negative code
            is in none.
        finer: ``tiers`` are ranks of finer grades, perhaps as many as images.

    Raises:
        DataError: there is no such pair, a score is not finite, or lengths differ.
    """
    twice_right, pairs = PairCounter(scores, tiers, within=within, finer=finer).count()
    _require_pairs(pairs, tiers, within)
    return float(twice_right.sum() / (2 * pairs.sum()))


def macro_pairwise_accuracy(
    scores: ArrayLike, tiers: ArrayLike, within: ArrayLike | None = None
) -> float:
    """Mean (0–1) of the pairwise accuracies of the tier pairs that occur, each counted alike.

    Arguments and errors as :func:`pairwise_accuracy`.
    """
    twice_right, pairs = PairCounter(scores, tiers, within=within).count()
    _require_pairs(pairs, tiers, within)
    occurs = pairs > 0
    return float((twice_right[occurs] / (2 * pairs[occurs])).mean())


def tier_pair_accuracy(
    scores: ArrayLike, tiers: ArrayLike, n_tiers: int, within: ArrayLike | None = None
) -> tuple[FloatArray, IntArray]:
    """Pairwise accuracy for each two tiers.

    Returns:
        ``accuracy`` float64 [K, K] and ``pairs`` int64 [K, K]; the row is the better tier, the
        column the worse. Where no pair occurs (always for row ≥ column) ``pairs`` is 0 and
        ``accuracy`` NaN.

    Raises:
        DataError: a score is not finite, a tier is not in 0 … K−1, or lengths differ.
    """
    twice_right, pairs = PairCounter(scores, tiers, n_tiers, within).count()
    accuracy = np.full(pairs.shape, np.nan)
    np.divide(twice_right, 2 * pairs, out=accuracy, where=pairs > 0)
    return accuracy[..., 0], pairs[..., 0]


def kendall_tau_b(scores: ArrayLike, tiers: ArrayLike) -> float | None:
    """Kendall's τ-b (−1 … 1) between scores and tiers; positive means that better tiers score higher.

    τ-b allows for ties on both sides (Kendall 1945; Agresti, *Analysis of Ordinal Categorical
    Data*). Images of one tier are ties, so with four equal tiers a perfect order of distinct scores
    gives about 0.87, not 1. None where it is not defined: all scores equal, or all tiers.

    Raises:
        DataError: a score is not finite, or lengths differ.
    """
    from scipy import stats  # half a second to import, so only where it is used

    values = check_scores(scores)
    tier = check_codes(tiers, len(values), "tiers")
    if not _varies(values) or not _varies(tier):
        return None
    return float(stats.kendalltau(values, -tier, variant="b").statistic)


def spearman(scores: ArrayLike, tier_scores: ArrayLike) -> float | None:
    """Spearman's rank correlation (−1 … 1) between scores and finer grades (both: higher is better).

    None where it is not defined: all scores equal, or all grades.

    Raises:
        DataError: a value is not finite, or lengths differ.
    """
    from scipy import stats

    values, grades = check_scores(scores), check_scores(tier_scores, what="tier_scores")
    if len(values) != len(grades):
        raise DataError(f"tier_scores: {len(grades)} values, but there are {len(values)} scores")
    if not _varies(values) or not _varies(grades):
        return None
    return float(stats.spearmanr(values, grades).statistic)


def ndcg_at_k(scores: ArrayLike, tiers: ArrayLike, k: int, n_tiers: int) -> float | None:
    """Normalised discounted cumulative gain of the k best-scored images (0–1).

    DCG@k = Σ_{r=1…k} gain_r / log2(1 + r), divided by that of a perfect order (Järvelin &
    Kekäläinen 2002). An image's gain is K − 1 − tier: 0 for the worst of the K tiers, one more for
    each better tier (linear, not 2^gain − 1). Equal scores have no order among them: each counts
    with the mean gain of its tied block, the expectation over random orders (McSherry & Najork
    2008). None where it is not defined: every image is in the worst tier. k beyond n counts as n.

    Raises:
        ConfigError: k is below 1.
        DataError: a score is not finite, a tier is not in 0 … K−1, lengths differ, or there is no
            image.
    """
    if k < 1:
        raise ConfigError(f"NDCG@{k}: k must be at least 1")
    values = check_scores(scores)
    tier = check_codes(tiers, len(values), "tiers")
    if not len(tier):
        raise DataError("NDCG: there is no image")
    if int(tier.max()) >= n_tiers:
        raise DataError(f"tiers: {int(tier.max())} is not below the number of tiers {n_tiers}")
    gains = (n_tiers - 1 - tier).astype(np.float64)
    discounts = 1 / np.log2(np.arange(len(gains)) + 2)
    discounts[k:] = 0
    best = float(np.sort(gains)[::-1] @ discounts)
    if best == 0:
        return None
    block = np.unique(-values, return_inverse=True)[1]  # 0 = the highest score
    mean_gain = np.bincount(block, weights=gains) / np.bincount(block)
    return float(mean_gain[np.sort(block)] @ discounts) / best


def tiers_by_quota(scores: ArrayLike, tiers: ArrayLike) -> IntArray:
    """Predicted tiers: the n_S best-scored images get S, the next n_A get A, and so on.

    This needs the split's own tier shares, which a new portfolio does not have: it judges the order
    of the scores, not a decision that could be made without the grades. Equal scores get equal
    tiers, that in which the middle of their block falls, so the order of the rows never helps; with
    ties the predicted shares may therefore differ from the true ones.

    Returns:
        [n] int64, 0 = best.

    Raises:
        DataError: a score is not finite, or lengths differ.
    """
    values = check_scores(scores)
    tier = check_codes(tiers, len(values), "tiers")
    if not len(tier):
        return tier
    _, block, sizes = np.unique(-values, return_inverse=True, return_counts=True)
    ends = np.cumsum(sizes)
    middle = (2 * ends - sizes - 1) // 2  # place of each block's middle, 0 = the highest score
    predicted: IntArray = np.sort(tier)[middle][block]
    return predicted


def confusion_matrix(tiers: ArrayLike, predicted: ArrayLike, n_tiers: int) -> IntArray:
    """Images by true tier (row) and predicted tier (column): int64 [K, K].

    Raises:
        DataError: lengths differ, or a tier is not in 0 … K−1.
    """
    tier = check_codes(tiers, len(np.asarray(tiers)), "tiers")
    guess = check_codes(predicted, len(tier), "predicted tiers")
    highest = max(int(tier.max(initial=-1)), int(guess.max(initial=-1)))
    if highest >= n_tiers:
        raise DataError(f"tiers: {highest} is not below the number of tiers {n_tiers}")
    return np.bincount(tier * n_tiers + guess, minlength=n_tiers**2).reshape(n_tiers, n_tiers)


def tier_accuracy(confusion: NDArray[np.integer]) -> float:
    """Share (0–1) of images on the diagonal of a confusion matrix [K, K].

    Raises:
        DataError: the matrix holds no image.
    """
    total = int(confusion.sum())
    if total == 0:
        raise DataError("tier accuracy: there is no image")
    return float(np.trace(confusion) / total)


def macro_f1(confusion: NDArray[np.integer]) -> float:
    """Mean F1 (0–1) over the tiers that occur as truth or as prediction, each counted alike.

    F1 of a tier = 2·hits / (images of the tier + images predicted as the tier).

    Raises:
        DataError: the matrix holds no image.
    """
    size = confusion.sum(axis=0) + confusion.sum(axis=1)
    occurs = size > 0
    if not occurs.any():
        raise DataError("macro F1: there is no image")
    return float((2 * np.diag(confusion)[occurs] / size[occurs]).mean())


def codes_of(labels: Sequence[str | None]) -> IntArray:
    """[n] integer codes, equal for equal labels; None or an empty label gets −1 (unknown)."""
    numbers: dict[str, int] = {}
    codes = [numbers.setdefault(label, len(numbers)) if label else -1 for label in labels]
    return np.array(codes, dtype=np.int64)


def _varies(values: NDArray[np.generic]) -> bool:
    return len(values) > 0 and bool((values != values[0]).any())


def _require_pairs(pairs: IntArray, tiers: ArrayLike, within: ArrayLike | None) -> None:
    if pairs.any():
        return
    array = np.asarray(tiers)
    where = "" if within is None else " inside the same value of the 'within' column"
    raise DataError(
        f"no pair of different tiers{where} among {len(array)} images of "
        f"{len(np.unique(array))} tier(s): give images of at least two tiers"
    )
