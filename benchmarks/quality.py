"""How well and how truly works are scored that were not learned from, by every method on the same splits.

    python benchmarks/quality.py [--seeds 1] [--folds 5] [--only METHOD|METHOD] [--subset N] [DATA ...]

DATA are data sets that `mirip-fast embed` (best with --layers auto) has put into the cache folder here. Their
grades count, or with ``DATA::TASTE`` those computed from their pictures, with noise: colour (saturation),
texture, layout (left against right), mood (dark and yellow), contrast, centre (light in the middle),
symmetry, stripes (lying against standing), detail, light. Without any DATA, rows are made up.

Folds stratified by tier, repeated, near duplicates and groups whole (but for groups of more than a fifth of
all works); an eighth of what is not held out stops the heads. Differences are paired, with the interval of
Nadeau and Bengio (2003), which allows for training sets that overlap from fold to fold.

Of methods that say how sure they are, the second table tells: the expected calibration error of pair
probabilities, all held-out pairs together (ECE), and what it would be were the model perfectly calibrated
(mean over simulated grades of the same works); Brier score and log loss of tier probabilities, with those of
the tiers' shares; how often the 95 % interval of a held-out work's score holds its finer grade (as a normal
score), and that of its rank the rank by the finer grade and the rank by the same method on half of the other
works; the intervals' mean width; Kendall's τ between the ranks by either half, and between those by two
seeds, each learning from nine tenths of the other works, with the mean difference of 0-100 in points.
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
from PIL import Image
from rankers import Fitted, Graded, Ranker
from scipy.stats import kendalltau

from mirip_fast.data.splits import join_units, stratify
from mirip_fast.evaluation.calibration import Calibration, fit_calibration, fit_temperature
from mirip_fast.evaluation.metrics import pairwise_accuracy
from mirip_fast.evaluation.reliability import BINS, reliability
from mirip_fast.evaluation.text_table import format_table
from mirip_fast.features.datasets import newest_graded
from mirip_fast.features.neighbours import joined_groups, unit
from mirip_fast.features.recipe import layer_of
from mirip_fast.features.store import FeatureStore
from mirip_fast.models.gp import normal_scores
from mirip_fast.portfolio.ranking import rank_intervals, ranks_of
from mirip_fast.ranking.readouts import left_out_together
from mirip_fast.ranking.rows import read_features
from mirip_fast.runtime import cpu_threads

Array = NDArray[Any]

INNER_SHARE = 0.125
NEAR = 0.98  # cosine of CLS features above which two images are taken for copies of one
DRAWS = 500
DEFAULT = "Gaussian process, all layers (the default)"


def cached(asked: str, cache: Path, subset: int | None) -> tuple[list[Array], Graded]:
    """Blocks of features, the last layer's last, and the grades of a data set."""
    source, _, taste = asked.partition("::")
    dataset = newest_graded(cache, Path(source))
    store = FeatureStore.open(dataset.store_path)
    images = dataset.embedded()
    if not taste:
        images = images.dropna(subset="tier")
    if subset:
        some = np.random.default_rng(0).permutation(len(images))[:subset]
        images = images.iloc[sorted(some)]
    images = images.reset_index(drop=True)
    hashes = images["sha256"].tolist()
    views = dataset.views()[:1]
    stored = {name.partition(".")[0] for name in store.series()}
    kinds = sorted(
        (k for k in stored if k.partition("_")[0] in ("cls", "mean")),
        key=lambda k: (layer_of(k) or 999, k),
    )
    blocks = [read_features(store, hashes, kind, views)[:, 0] for kind in kinds]
    if taste:
        grade = np.array([of_picture(Path(file), taste) for file in images["file"]])
        grade = (grade - grade.mean()) / grade.std()
        grade += 0.5 * np.random.default_rng(1).normal(size=len(grade))
        return blocks, Graded(blocks[-1], as_tiers(grade), np.arange(len(grade)), grade)
    grades = images["tier_score"].to_numpy(np.float64)
    groups = [name or f"alone {i}" for i, name in enumerate(images["group"].tolist())]
    return blocks, Graded(
        blocks[-1],
        images["tier"].cat.codes.to_numpy(np.int64),
        np.unique(groups, return_inverse=True)[1],
        None if np.isnan(grades).any() else grades,
    )


def of_picture(path: Path, taste: str) -> float:
    """What a taste likes, of one picture."""
    with Image.open(path) as image:
        rgb = np.asarray(image.convert("RGB").resize((64, 64)), float) / 255
    red, green, blue = np.moveaxis(rgb, 2, 0)
    grey = rgb.mean(axis=2)
    down, across = np.gradient(grey)
    blocks = grey.reshape(8, 8, 8, 8).mean(axis=(1, 3)).repeat(8, 0).repeat(8, 1)
    liked = {
        "colour": np.ptp(rgb, axis=2),
        "texture": np.hypot(down, across),
        "layout": grey[:, :32] - grey[:, 32:],
        "mood": (red + green) / 2 - blue - grey,
        "contrast": abs(grey - grey.mean()),
        "centre": grey[16:48, 16:48] - grey.mean(),
        "symmetry": -abs(grey - grey[:, ::-1]),
        "stripes": abs(down) - abs(across),
        "detail": abs(grey - blocks),
        "light": grey,
    }
    return float(liked[taste].mean())


def made_up(n: int, width: int, seed: int) -> tuple[list[Array], Graded]:
    """Rows whose grade is a linear and a bent part of them, and as much noise."""
    rows, grade = bent_grades(n, 2 * width, seed)
    return np.split(rows, 2, axis=1), Graded(rows, as_tiers(grade), np.arange(n), grade)


def methods(blocks: list[Array], finer: bool) -> dict[str, tuple[Array, Ranker]]:
    """Every method with the rows it sees; layers only where there are several."""
    last, every, n = np.hstack(blocks[-2:]), np.hstack(blocks), len(blocks)
    found: dict[str, tuple[Array, Ranker]] = {
        DEFAULT: (every, rankers.gp(n)),
        "Gaussian process, last layer": (last, rankers.gp(2)),
        "head, last layer": (last, rankers.head()),
        "ridge on tier": (every, rankers.ridge("tier")),
        "ridge on tier, last layer": (last, rankers.ridge("tier")),
        "ridge on tier_score": (every, rankers.ridge("grade")),
        "Laplace kernel ridge": (every, rankers.laplacian()),
        "ordinal logistic": (every, rankers.ordinal),
        "pairwise logistic": (every, rankers.pairwise_logistic),
        "LightGBM lambdarank": (every, rankers.lambdarank),
        "nearest neighbours": (every, rankers.nearest()),
    }
    return found if finer else {k: v for k, v in found.items() if "tier_score" not in k}


def together(cls: Array, groups: Array) -> list[int]:
    """One number per image, the same inside a group and for features that point almost the same way."""
    rows = unit(cls)
    near = np.argwhere(np.triu(rows @ rows.T > NEAR, 1))
    order = np.argsort(groups, kind="stable")
    same = np.flatnonzero(np.diff(groups[order]) == 0)
    links = np.vstack([near, np.stack([order[same], order[same + 1]], 1)])
    return joined_groups(np.arange(len(cls)), links[:, 0], links[:, 1]).tolist()


def divide(tiers: Array, groups: list[int], shares: list[float], seed: int) -> Array:
    """The part of each image: stratified by tier, groups whole."""
    units = join_units(len(tiers), [groups])
    names = [str(i) for i in range(len(tiers))]
    return stratify([str(t) for t in tiers], units, names, shares, seed)


def gaps(scores: Array, tiers: Array, temperature: float) -> Array:
    """[bins, 2] of the pairs in each bin: predicted less observed wins, and their number."""
    measured = reliability(scores, tiers, temperature, rounds=0)
    if measured is None:
        return np.zeros((BINS, 2))
    return np.array(
        [
            (b["pairs"] * ((b["predicted"] or 0) - (b["observed"] or 0)), b["pairs"])
            for b in measured["bins"]
        ]
    )


def if_calibrated(said: Array, calibration: Calibration) -> Array:
    """[rounds, bins, 2] as :func:`gaps`, of grades drawn from the tier probabilities themselves."""
    rng, chances = np.random.default_rng(0), calibration.tier_probabilities(said)
    assert chances is not None

    def drawn(p: Array) -> Array:
        return np.asarray((rng.random((len(p), 1)) > p.cumsum(1)[:, :-1]).sum(1))

    many = np.resize(np.arange(len(said)), 1_500)
    right = fit_temperature(said[many], drawn(chances[many]))["value"]
    return np.stack([gaps(said, drawn(chances), right) for _ in range(20)])


def pooled(found: list[Array]) -> float:
    """The calibration error of [fold][…, bins, 2] gaps taken together, in the mean over what leads."""
    total = np.sum(found, axis=0)
    return float((np.abs(total[..., 0]).sum(-1) / total[..., 1].sum(-1)).mean())


def trust(fitted: Fitted, others: list[Fitted], test: Graded) -> dict[str, Any]:
    """What :func:`main` shows of how truly held-out works are scored; empty where it is unknown.

    ``others`` are the same method on either half, and on nine tenths by two seeds.
    """
    if fitted.held_out is None:
        return {}
    tiers = fitted.held_out[1]
    names = [str(k) for k in range(int(max(tiers.max(), test.tiers.max())) + 1)]

    def calibrated(one: Fitted) -> Calibration:
        assert one.held_out is not None
        return fit_calibration(*one.held_out, names, source="validation")

    calibration, found = calibrated(fitted), dict[str, Any]()
    said = fitted.score(test.features)
    chances = calibration.tier_probabilities(said)
    if chances is not None and calibration.temperature is not None:
        found["ECE"] = gaps(said, test.tiers, calibration.temperature["value"])
        found["ECE if calibrated"] = if_calibrated(said, calibration)
        prior = np.bincount(tiers, minlength=len(names)) / len(tiers)
        for name, p in (("", chances), (" of the shares", np.tile(prior, (len(said), 1)))):
            found["Brier" + name] = ((p - np.eye(len(names))[test.tiers]) ** 2).sum(1).mean()
            own = p[np.arange(len(said)), test.tiers]
            found["log loss" + name] = -np.log(np.maximum(own, 1e-6)).mean()
    if fitted.draw is not None:
        drawn = fitted.draw(test.features, DRAWS)
        order = np.argsort(-said)
        first, last, _ = rank_intervals(drawn[:, order], np.arange(1, len(order) + 1))
        found["width of ranks"] = ((last - first) / len(order)).mean()
        scores = [other.score(test.features) for other in others]
        if test.grades is not None:
            low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
            finer = test.normal * shrinkage(tiers)
            found["score held"] = ((low <= finer) & (finer <= high)).mean()
        for name, truth in (("finer grade", test.grades), ("other half", scores[0])):
            if truth is not None:
                true = ranks_of(truth)[order]
                found["rank held, " + name] = ((first <= true) & (true <= last)).mean()
        found["τ of halves"] = kendalltau(*scores[:2]).statistic
        found["τ of seeds"] = kendalltau(*scores[2:]).statistic
        of_100 = [calibrated(o).score_100(s) for o, s in zip(others[2:], scores[2:], strict=True)]
        if of_100[0] is not None and of_100[1] is not None:
            found["0-100"] = np.abs(of_100[0] - of_100[1]).mean()
    return found


def shrinkage(tiers: Array) -> float:
    """How much nearer to 0 the normal scores of tiers are than those of the finer grades behind them."""
    finer = normal_scores(np.arange(len(tiers)))
    return float(np.cov(normal_scores(np.sort(tiers)), finer)[0, 1] / finer.var())


def cross_validate(
    graded: Graded, cls: Array, asked: dict[str, tuple[Array, Ranker]], seeds: int, folds: int
) -> dict[str, dict[str, list[Any]]]:
    """By method and figure, one value per seed and fold: accuracy, seconds, and those of :func:`trust`."""
    names = [str(group) for group in together(cls, graded.groups)]
    found: dict[str, dict[str, list[Any]]] = {name: defaultdict(list) for name in asked}
    normal = (
        None
        if graded.grades is None
        else normal_scores(np.unique(-graded.grades, return_inverse=True)[1])
    )
    for seed in range(seeds):
        groups = left_out_together(names, seed)
        fold = divide(graded.tiers, groups, [1 / folds] * folds, seed)
        for k in range(folds):
            rest, test = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
            shares = [1 - INNER_SHARE, INNER_SHARE]
            part = divide(graded.tiers[rest], [groups[i] for i in rest], shares, seed)
            for name, (x, ranker) in asked.items():

                def rows(index: Array, x: Array = x, seed: int = seed) -> Graded:
                    own = np.array(left_out_together([names[i] for i in index], seed))
                    finer = None if graded.grades is None else graded.grades[index]
                    scored = None if normal is None else normal[index]
                    return Graded(x[index], graded.tiers[index], own, finer, scored)

                started = time.perf_counter()
                fitted = ranker(rows(rest[part == 0]), rows(rest[part == 1]), seed)
                values = {"seconds": time.perf_counter() - started}
                values["accuracy"] = pairwise_accuracy(fitted.score(x[test]), graded.tiers[test])
                others = []
                if fitted.draw is not None:
                    own = [groups[i] for i in rest]
                    half = divide(graded.tiers[rest], own, [0.5, 0.5], seed)
                    kept = [half == 0, half == 1]
                    kept += [np.random.default_rng(s).random(len(rest)) < 0.9 for s in (0, 1)]
                    for some in (rest[mask] for mask in kept):
                        inner = np.arange(len(some)) % 8 == 0
                        others.append(ranker(rows(some[~inner]), rows(some[inner]), seed))
                for figure, value in (values | trust(fitted, others, rows(test))).items():
                    found[name][figure].append(value)
        print(f"  repetition {seed + 1} of {seeds} done", flush=True)
    return found


def interval(differences: Array, folds: int) -> str:
    """Mean difference in points with its corrected 95 % interval."""
    from scipy.stats import t

    n, mean, spread = len(differences), differences.mean(), differences.std(ddof=1)
    half = spread * t.ppf(0.975, n - 1) * (1 / n + 1 / (folds - 1)) ** 0.5
    return f"{100 * mean:+.1f} ± {100 * half:.1f}"


def main() -> None:
    """Print two tables per data set."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", nargs="*", help="embedded data sets, DATA or DATA::TASTE")
    parser.add_argument("--cache-dir", type=Path, default=Path("cache"))
    parser.add_argument("--seeds", type=int, default=1, help="repetitions of the folds")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--subset", type=int, help="so many works of each set, drawn at random")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", help="names of methods, separated by |")
    options = parser.parse_args()
    logging.getLogger("mirip_fast").setLevel(logging.ERROR)
    for title in options.data or ["made-up rows"]:
        blocks, graded = (
            cached(title, options.cache_dir, options.subset)
            if options.data
            else made_up(options.subset or 1000, 192, 0)
        )
        asked = methods(blocks, graded.grades is not None)
        if options.only:
            asked = {n: m for n, m in asked.items() if n in {DEFAULT, *options.only.split("|")}}
        print(f"{title}: {len(graded.tiers)} images, {options.seeds} × {options.folds} fits")
        with cpu_threads(options.threads):
            found = cross_validate(graded, blocks[-2], asked, options.seeds, options.folds)
        ours = np.array(found[DEFAULT]["accuracy"])
        lines = [
            (
                name,
                f"{np.mean(of['accuracy']):.4f}",
                "" if name == DEFAULT else interval(np.array(of["accuracy"]) - ours, options.folds),
                f"{np.mean(of['seconds']):.2f}",
            )
            for name, of in found.items()
        ]
        heads = ("method", "accuracy", "minus the default, points", "s per fit")
        print(format_table(heads, lines, align="lrrr"))
        for of in found.values():
            of.update({f: [pooled(of[f])] for f in ("ECE", "ECE if calibrated") if of.get(f)})
        shown = dict.fromkeys(figure for of in found.values() for figure in of)
        sure = [figure for figure in shown if figure not in ("accuracy", "seconds")]
        rows = [
            (name, *(f"{np.nanmean(of[f]):.3f}" if of.get(f) else "" for f in sure))
            for name, of in found.items()
            if any(of.get(f) for f in sure)
        ]
        lines = [(figure, *(row[i] for row in rows)) for i, figure in enumerate(sure, 1)]
        heads = ("", *(str(row[0]) for row in rows))
        print(format_table(heads, lines, align="l" + "r" * len(rows)), flush=True)


if __name__ == "__main__":
    main()
