"""How well the works of each group (one applicant, one school) are ordered against everybody else's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mirip_fast.evaluation.intervals import (
    Interval,
    group_codes,
    percentiles,
    ratio,
    resamples,
)
from mirip_fast.evaluation.pair_counts import FloatArray, IntArray
from mirip_fast.evaluation.report_parts import GroupRow

_MIN_WORKS = 2  # one work alone says nothing about its group
_MAX_ROUNDS = 400  # enough for a bar that is looked at; counting by work costs more than by tier


def accuracy_by_group(
    scores: FloatArray,
    tiers: IntArray,
    groups: Sequence[str | None] | None,
    *,
    rounds: int,
    confidence: float,
    seed: int,
) -> tuple[GroupRow, ...]:
    """Judge each group by the pairs of one of its works with a work outside it.

    Pairs inside a group are left aside: they are few, and what they have in common is the group. The
    interval draws both sides anew, the group's own works and the other groups as wholes, so that a group
    of few works gets a wide one.

    Args:
        scores: [n] finite, higher is better.
        tiers: [n], 0 = best.
        groups: [n] names; works without one count as others' only.
        rounds, confidence, seed: of the bootstrap; 0 rounds for no intervals.

    Returns:
        One row per named group of at least two works that has a pair, worst accuracy first; nothing
        where there is no other group.
    """
    codes = group_codes(groups, len(scores))
    members = [
        rows
        for rows in _rows_of(codes)
        if groups is not None and groups[rows[0]] and len(rows) >= _MIN_WORKS
    ]
    if groups is None or not members or len(np.unique(codes)) < 2:
        return ()
    inside = np.zeros((2, len(scores), 1), dtype=np.int64)
    for rows in members:
        ones = np.ones((len(rows), 1), dtype=np.int64)
        inside[:, rows] = counts_by_image(scores[rows], tiers[rows], ones)
    listed = np.concatenate(members)
    sizes = np.array([len(rows) for rows in members])
    starts = np.cumsum(sizes) - sizes

    def by_group(weights: IntArray, own: IntArray) -> IntArray:
        """Weights [n, R] and how often each listed work stands for its group [m, R] → [2, groups, R]."""
        counts = np.stack(counts_by_image(scores, tiers, weights)) - weights * inside
        summed: IntArray = np.add.reduceat(counts[:, listed] * own, starts, axis=1)
        return summed

    right, pairs = by_group(
        np.ones((len(scores), 1), dtype=np.int64), np.ones((len(listed), 1), dtype=np.int64)
    )[..., 0]
    intervals: list[Interval | None] = [None] * len(members)
    if rounds and len(np.unique(codes)) > 2:  # one other group alone can not be varied
        rng = np.random.default_rng(seed)
        drawn = [
            by_group(weights, _redrawn(sizes, starts, weights.shape[1], rng))
            for weights in resamples(codes, min(rounds, _MAX_ROUNDS), seed)
        ]
        rights, totals = np.concatenate(drawn, axis=2)
        intervals = [percentiles(row, confidence) for row in ratio(rights, 2 * totals)]
    found = [
        GroupRow(
            group=str(groups[rows[0]]),
            images=len(rows),
            pairs=int(pairs[i]),
            accuracy=float(right[i] / (2 * pairs[i])),
            interval=intervals[i],
        )
        for i, rows in enumerate(members)
        if pairs[i]
    ]
    return tuple(sorted(found, key=lambda row: (row.accuracy, row.group)))


def counts_by_image(
    scores: FloatArray, tiers: IntArray, weights: IntArray
) -> tuple[IntArray, IntArray]:
    """For each image, its pairs with images of other tiers, in R weightings of those.

    Args:
        scores, tiers: [n].
        weights: [n, R], not negative.

    Returns:
        Twice the weight of pairs in the right order (equal scores ½), and the weight of all: [n, R] each.
    """
    right = np.zeros((len(scores), weights.shape[1]), dtype=np.int64)
    pairs = np.zeros_like(right)
    present = np.unique(tiers).tolist()
    sorted_rows = {t: _by_score(scores, np.flatnonzero(tiers == t)) for t in present}
    for other in present:
        rows = sorted_rows[other]
        running = np.zeros((len(rows) + 1, weights.shape[1]), dtype=np.int64)
        np.cumsum(weights[rows], axis=0, out=running[1:])
        for tier in present:
            if tier == other:
                continue
            own = sorted_rows[tier]
            lower = running[np.searchsorted(scores[rows], scores[own], side="left")]
            lower += running[np.searchsorted(scores[rows], scores[own], side="right")]
            right[own] += lower if tier < other else 2 * running[-1] - lower
            pairs[own] += running[-1]
    return right, pairs


def _by_score(scores: FloatArray, rows: IntArray) -> IntArray:
    return rows[np.argsort(scores[rows], kind="stable")]


def _rows_of(codes: IntArray) -> list[IntArray]:
    """Rows of each group, in order of first appearance."""
    order = np.argsort(codes, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(codes[order])) + 1)


def _redrawn(sizes: IntArray, starts: IntArray, columns: int, rng: np.random.Generator) -> IntArray:
    """[m, R] how often each listed work is drawn among those of its group, as many as the group has."""
    size, start = (np.repeat(values, sizes)[:, None] for values in (sizes, starts))
    picked = start + (rng.random((len(size), columns)) * size).astype(np.int64)
    flat = np.bincount((picked * columns + np.arange(columns)).ravel(), minlength=picked.size)
    return flat.reshape(picked.shape)
