"""How well the default head ranks images it has not seen, against the classic recipe and other methods.

    python benchmarks/quality.py [--seeds 5] [DATA ...]

DATA are graded data sets that `mirip-fast embed` has put into the cache folder here. Without any, the
benchmark makes up rows whose grades are a noisy function of the features.

Every method sees the same five folds, stratified by tier, near duplicates kept together; a part of the
training folds (an eighth) chooses penalties, epochs and trees. The differences are paired over folds × seeds.
Two intervals are given: the plain t interval, and that of Nadeau and Bengio (2003), which allows for
training sets that overlap from fold to fold.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import rankers
from made_cache import as_tiers, bent_grades
from numpy.typing import NDArray
from rankers import Graded, Ranker

from mirip_fast.data.stratify import join_units, stratify
from mirip_fast.evaluation.metrics import pairwise_accuracy
from mirip_fast.evaluation.text_table import format_table
from mirip_fast.features.datasets import newest_graded
from mirip_fast.features.neighbours import groups_of, unit
from mirip_fast.features.store import FeatureStore
from mirip_fast.ranking.rows import read_features
from mirip_fast.runtime import cpu_threads

Array = NDArray[Any]

FOLDS, INNER_SHARE = 5, 0.125
NEAR = 0.98  # cosine of CLS features above which two images are taken for copies of one

METHODS: dict[str, tuple[str, Ranker]] = {
    "mirip-fast": ("cls+mean", rankers.head()),
    "mirip-fast on CLS alone": ("cls", rankers.head()),
    "classic: sampled pairs": ("cls", rankers.head(train__pairs="sampled")),
    "ridge on tier": ("cls", rankers.ridge("tier")),
    "ridge on tier_score": ("cls", rankers.ridge("grade")),
    "linear ranking SVM": ("cls", rankers.ranking_svm),
    "LightGBM lambdarank": ("cls", rankers.lambdarank),
    "ridge on tier; cls+mean": ("cls+mean", rankers.ridge("tier")),
    "linear ranking SVM; cls+mean": ("cls+mean", rankers.ranking_svm),
}


def cached(source: Path, cache: Path) -> tuple[dict[str, Array], Array, Array | None]:
    """Features by kind, tiers and finer grades of an embedded data set."""
    dataset = newest_graded(cache, source)
    store = FeatureStore.open(dataset.store_path)
    entries = [e for e in dataset.entries() if e.outcome.sha256 and e.record.tier is not None]
    hashes = [entry.outcome.sha256 or b"" for entry in entries]
    features: dict[str, Array] = {
        kind: read_features(store, hashes, kind, dataset.views()[:1])[:, 0]
        for kind in ("cls", "mean", "cls+mean")
    }
    grades = [entry.record.tier_score for entry in entries]
    finer = None if None in grades else np.array(grades, dtype=np.float64)
    return features, np.array([entry.record.tier for entry in entries]), finer


def made_up(n: int, width: int, seed: int) -> tuple[dict[str, Array], Array, Array]:
    """Rows whose grade is a linear and a bent part of them, and as much noise."""
    rows, grade = bent_grades(n, width, seed)
    return (
        {"cls": rows, "mean": rows, "cls+mean": np.concatenate([rows, rows], 1)},
        as_tiers(grade),
        grade,
    )


def near_groups(cls: Array) -> list[int]:
    """One number per image, the same for images whose features point almost the same way."""
    rows = unit(cls)
    links = np.argwhere(np.triu(rows @ rows.T > NEAR, 1))
    return groups_of(len(cls), iter([(links[:, 0], links[:, 1])])).tolist()


def divide(tiers: Array, groups: list[int], shares: list[float], seed: int) -> Array:
    """The part of each image: stratified by tier, groups whole."""
    units = join_units(len(tiers), [groups])
    names = [str(i) for i in range(len(tiers))]
    return stratify([str(t) for t in tiers], units, names, shares, seed)


def cross_validate(
    features: dict[str, Array], tiers: Array, grades: Array | None, methods: list[str], seeds: int
) -> tuple[dict[str, Array], dict[str, float]]:
    """Held-out pairwise accuracy of every method, [seeds × folds], and its mean seconds per fit."""
    groups = near_groups(features["cls"])
    accuracy: dict[str, list[float]] = {name: [] for name in methods}
    seconds = dict.fromkeys(methods, 0.0)
    for seed in range(seeds):
        fold = divide(tiers, groups, [1 / FOLDS] * FOLDS, seed)
        for k in range(FOLDS):
            rest = np.flatnonzero(fold != k)
            part = divide(
                tiers[rest], [groups[i] for i in rest], [1 - INNER_SHARE, INNER_SHARE], seed
            )
            train, inner, test = rest[part == 0], rest[part == 1], np.flatnonzero(fold == k)
            for name in methods:
                kind, ranker = METHODS[name]
                x = features[kind]

                def rows(index: Array, x: Array = x) -> Graded:
                    return Graded(x[index], tiers[index], None if grades is None else grades[index])

                started = time.perf_counter()
                scorer = ranker(rows(train), rows(inner), seed)
                seconds[name] += time.perf_counter() - started
                accuracy[name].append(pairwise_accuracy(scorer(x[test]), tiers[test]))
        print(f"  repetition {seed + 1} of {seeds} done", flush=True)
    fits = seeds * FOLDS
    return {n: np.array(a) for n, a in accuracy.items()}, {n: s / fits for n, s in seconds.items()}


def interval(differences: Array) -> str:
    """Mean difference in points with the plain and the corrected 95 % interval."""
    from scipy.stats import t

    n, mean, spread = len(differences), differences.mean(), differences.std(ddof=1)
    q = t.ppf(0.975, n - 1)
    plain, corrected = spread * q / n**0.5, spread * q * (1 / n + 1 / (FOLDS - 1)) ** 0.5
    return f"{100 * mean:+.2f} ± {100 * plain:.2f} (± {100 * corrected:.2f})"


def main() -> None:
    """Print one table per data set."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", nargs="*", type=Path, help="embedded, graded data sets")
    parser.add_argument("--cache-dir", type=Path, default=Path("cache"))
    parser.add_argument("--seeds", type=int, default=5, help="repetitions of the five folds")
    parser.add_argument("--only", help="names of methods, separated by commas")
    options = parser.parse_args()
    logging.getLogger("mirip_fast").setLevel(logging.WARNING)
    sets: dict[str, tuple[dict[str, Array], Array, Array | None]] = {
        str(path): cached(path, options.cache_dir) for path in options.data
    } or {"1,000 made-up rows of 384 numbers": made_up(1000, 384, 0)}
    for title, (features, tiers, grades) in sets.items():
        names = [n for n in METHODS if grades is not None or "tier_score" not in n]
        if options.only:
            names = ["mirip-fast", *(n for n in names if n in options.only.split(","))]
        print(f"{title}: {len(tiers)} images, {options.seeds} × {FOLDS} fits")
        with cpu_threads(1):
            accuracy, seconds = cross_validate(features, tiers, grades, names, options.seeds)
        ours = accuracy["mirip-fast"]
        rows = [
            (
                name,
                f"{accuracy[name].mean():.4f}",
                "" if name == "mirip-fast" else interval(ours - accuracy[name]),
                f"{seconds[name]:.2f}",
            )
            for name in names
        ]
        head = ("method", "accuracy", "mirip-fast minus it, points", "s per fit")
        print(format_table(head, rows, align="lrrr"))


if __name__ == "__main__":
    main()
