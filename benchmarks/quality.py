"""How well and how truly works are scored that were not learned from, by every method on the same splits.

    python benchmarks/quality.py [--seeds 5] [--only METHOD,METHOD] [DATA ...]

DATA are graded data sets that `mirip-fast embed` has put into the cache folder here, or .npz files of rows:
``<layer>.cls`` and ``<layer>.mean`` [n, D] for layers by number, ``tier`` [n] (0 is the best), and optionally
``tier_score`` and ``group`` [n]. Without any, rows are made up whose grades are a noisy function of them.

Five folds, stratified by tier, groups and near duplicates whole, repeated; an eighth of what is not held out
stops the heads. Differences are paired, with the interval of Nadeau and Bengio (2003), which allows for
training sets that overlap from fold to fold.

Of methods that say how sure they are, the second table tells: the expected calibration error of pair
probabilities (ECE); Brier score and log loss of tier probabilities, with those of the tiers' shares; how
often the 95 % interval of a held-out work's rank holds its rank by the finer grade, and its mean width.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import rankers
from made_cache import as_tiers, bent_grades
from numpy.typing import NDArray
from rankers import Fitted, Graded, Ranker

from mirip_fast.data.stratify import join_units, stratify
from mirip_fast.evaluation.calibration import fit_calibration
from mirip_fast.evaluation.metrics import pairwise_accuracy
from mirip_fast.evaluation.reliability import reliability
from mirip_fast.evaluation.text_table import format_table
from mirip_fast.features.datasets import newest_graded
from mirip_fast.features.neighbours import groups_of, unit
from mirip_fast.features.store import FeatureStore
from mirip_fast.ranking.rows import read_features
from mirip_fast.runtime import cpu_threads

Array = NDArray[Any]

FOLDS, INNER_SHARE = 5, 0.125
NEAR = 0.98  # cosine of CLS features above which two images are taken for copies of one
DRAWS = 500
DEFAULT = "head (the default)"


def cached(source: Path, cache: Path) -> tuple[list[Array], Graded]:
    """Blocks of features, the last layer's last, and the grades of a data set."""
    if source.suffix == ".npz":
        with np.load(source) as file:
            found = dict(file)
        layers = sorted({int(name.split(".")[0]) for name in found if "." in name})
        blocks = [found[f"{layer}.{kind}"] for layer in layers for kind in ("cls", "mean")]
        n = len(found["tier"])
        groups = found.get("group", np.arange(n))
        return blocks, Graded(blocks[-1], found["tier"], groups, found.get("tier_score"))
    dataset = newest_graded(cache, source)
    store = FeatureStore.open(dataset.store_path)
    entries = [e for e in dataset.entries() if e.outcome.sha256 and e.record.tier is not None]
    hashes = [entry.outcome.sha256 or b"" for entry in entries]
    views = dataset.views()[:1]
    blocks = [read_features(store, hashes, kind, views)[:, 0] for kind in ("cls", "mean")]
    grades = [entry.record.tier_score for entry in entries]
    groups = [e.record.group or f"alone {i}" for i, e in enumerate(entries)]
    return blocks, Graded(
        blocks[-1],
        np.array([entry.record.tier for entry in entries]),
        np.unique(groups, return_inverse=True)[1],
        None if None in grades else np.array(grades, dtype=np.float64),
    )


def made_up(n: int, width: int, seed: int) -> tuple[list[Array], Graded]:
    """Rows whose grade is a linear and a bent part of them, and as much noise."""
    rows, grade = bent_grades(n, 2 * width, seed)
    return np.split(rows, 2, axis=1), Graded(rows, as_tiers(grade), np.arange(n), grade)


def methods(blocks: list[Array], finer: bool) -> dict[str, tuple[Array, Ranker]]:
    """Every method with the rows it sees; layers only where there are several."""
    last, n, width = np.hstack(blocks[-2:]), len(blocks), 2 * blocks[0].shape[1]
    found: dict[str, tuple[Array, Ranker]] = {
        DEFAULT: (last, rankers.head()),
        "classic head: sampled pairs, CLS": (blocks[-2], rankers.head(train__pairs="sampled")),
        "ridge on tier": (last, rankers.ridge("tier")),
        "ridge on tier_score": (last, rankers.ridge("grade")),
        "ordinal logistic": (last, rankers.ordinal),
        "pairwise logistic": (last, rankers.pairwise_logistic),
        "LightGBM lambdarank": (last, rankers.lambdarank),
        "nearest neighbours": (last, rankers.nearest()),
        "Laplace kernel ridge": (last, rankers.laplacian()),
        "gp": (last, rankers.gp(2)),
        "mean of gp, ridge": (last, rankers.mean_of(rankers.gp(2), rankers.ridge("tier"))),
        "mean of gp, ridge, head": (
            last,
            rankers.mean_of(rankers.gp(2), rankers.ridge("tier"), rankers.head()),
        ),
    }
    if n > 2:
        every = np.hstack(blocks)
        found |= {
            "head, all layers": (every, rankers.head()),
            "ridge on tier, all layers": (every, rankers.ridge("tier")),
            "Laplace kernel ridge, all layers": (every, rankers.laplacian()),
            "gp, all layers": (every, rankers.gp(n)),
            "mean of gp, all layers, and head": (
                every,
                rankers.mean_of(rankers.gp(n), rankers.on_last(rankers.head(), width)),
            ),
        }
    return found if finer else {k: v for k, v in found.items() if "tier_score" not in k}


def together(cls: Array, groups: Array) -> list[int]:
    """One number per image, the same inside a group and for features that point almost the same way."""
    rows = unit(cls)
    near = np.argwhere(np.triu(rows @ rows.T > NEAR, 1))
    order = np.argsort(groups, kind="stable")
    same = np.flatnonzero(np.diff(groups[order]) == 0)
    links = np.vstack([near, np.stack([order[same], order[same + 1]], 1)])
    return groups_of(len(cls), iter([(links[:, 0], links[:, 1])])).tolist()


def divide(tiers: Array, groups: list[int], shares: list[float], seed: int) -> Array:
    """The part of each image: stratified by tier, groups whole."""
    units = join_units(len(tiers), [groups])
    names = [str(i) for i in range(len(tiers))]
    return stratify([str(t) for t in tiers], units, names, shares, seed)


def trust(fitted: Fitted, test: Graded) -> dict[str, float]:
    """What :func:`main` shows of how truly held-out works are scored; empty where it is unknown."""
    if fitted.held_out is None:
        return {}
    scores, tiers = fitted.held_out
    names = [str(k) for k in range(int(max(tiers.max(), test.tiers.max())) + 1)]
    calibration = fit_calibration(scores, tiers, names, source="validation")
    said, found = fitted.score(test.features), {}
    if calibration.temperature is not None:
        measured = reliability(said, test.tiers, calibration.temperature.value, rounds=0)
        found["ECE"] = np.nan if measured is None else measured.ece
    chances = calibration.tier_probabilities(said)
    if chances is not None:
        prior = np.bincount(tiers, minlength=len(names)) / len(tiers)
        for name, p in (("", chances), (" of the shares", np.tile(prior, (len(said), 1)))):
            found["Brier" + name] = ((p - np.eye(len(names))[test.tiers]) ** 2).sum(1).mean()
            own = p[np.arange(len(said)), test.tiers]
            found["log loss" + name] = -np.log(np.maximum(own, 1e-6)).mean()
    if fitted.draw is not None and test.grades is not None:
        ranks = fitted.draw(test.features, DRAWS).argsort(1).argsort(1)
        low, high = np.quantile(ranks, [0.025, 0.975], axis=0)
        true = test.grades.argsort().argsort()
        found["rank held"] = ((low <= true) & (true <= high)).mean()
        found["width of ranks"] = ((high - low) / len(true)).mean()
    return found


def cross_validate(
    graded: Graded, cls: Array, asked: dict[str, tuple[Array, Ranker]], seeds: int
) -> dict[str, dict[str, list[float]]]:
    """By method and figure, one value per seed and fold: accuracy, seconds, and those of :func:`trust`."""
    groups = together(cls, graded.groups)
    found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in asked}
    for seed in range(seeds):
        fold = divide(graded.tiers, groups, [1 / FOLDS] * FOLDS, seed)
        for k in range(FOLDS):
            rest, test = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
            shares = [1 - INNER_SHARE, INNER_SHARE]
            part = divide(graded.tiers[rest], [groups[i] for i in rest], shares, seed)
            for name, (x, ranker) in asked.items():

                def rows(index: Array, x: Array = x) -> Graded:
                    finer = None if graded.grades is None else graded.grades[index]
                    return Graded(x[index], graded.tiers[index], np.array(groups)[index], finer)

                started = time.perf_counter()
                fitted = ranker(rows(rest[part == 0]), rows(rest[part == 1]), seed)
                values = {"seconds": time.perf_counter() - started}
                values["accuracy"] = pairwise_accuracy(fitted.score(x[test]), graded.tiers[test])
                for figure, value in (values | trust(fitted, rows(test))).items():
                    found[name][figure].append(float(value))
        print(f"  repetition {seed + 1} of {seeds} done", flush=True)
    return found


def interval(differences: Array) -> str:
    """Mean difference in points with its corrected 95 % interval."""
    from scipy.stats import t

    n, mean, spread = len(differences), differences.mean(), differences.std(ddof=1)
    half = spread * t.ppf(0.975, n - 1) * (1 / n + 1 / (FOLDS - 1)) ** 0.5
    return f"{100 * mean:+.1f} ± {100 * half:.1f}"


def main() -> None:
    """Print two tables per data set."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", nargs="*", type=Path, help="embedded, graded data sets, or .npz")
    parser.add_argument("--cache-dir", type=Path, default=Path("cache"))
    parser.add_argument("--seeds", type=int, default=5, help="repetitions of the five folds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", help="names of methods, separated by |")
    options = parser.parse_args()
    logging.getLogger("mirip_fast").setLevel(logging.WARNING)
    sets = {str(path): cached(path, options.cache_dir) for path in options.data}
    for title, (blocks, graded) in (sets or {"made-up rows": made_up(1000, 192, 0)}).items():
        asked = methods(blocks, graded.grades is not None)
        if options.only:
            asked = {n: m for n, m in asked.items() if n in {DEFAULT, *options.only.split("|")}}
        print(f"{title}: {len(graded.tiers)} images, {options.seeds} × {FOLDS} fits")
        with cpu_threads(options.threads):
            found = cross_validate(graded, blocks[-2], asked, options.seeds)
        ours = np.array(found[DEFAULT]["accuracy"])
        lines = [
            (
                name,
                f"{np.mean(of['accuracy']):.4f}",
                "" if name == DEFAULT else interval(np.array(of["accuracy"]) - ours),
                f"{np.mean(of['seconds']):.2f}",
            )
            for name, of in found.items()
        ]
        heads = ("method", "accuracy", "minus the default, points", "s per fit")
        print(format_table(heads, lines, align="lrrr"))
        sure = ("ECE", "Brier", "Brier of the shares", "log loss", "log loss of the shares")
        sure += ("rank held", "width of ranks")
        rows = [
            (name, *(f"{np.nanmean(of[f]):.3f}" if of.get(f) else "" for f in sure))
            for name, of in found.items()
            if any(of.get(f) for f in sure)
        ]
        print(format_table(("method", *sure), rows, align="l" + "r" * len(sure)), flush=True)


if __name__ == "__main__":
    main()
