"""What a model has to be better than: chance, a ridge regression on the same rows, and the last run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mirip_fast.config import Config
from mirip_fast.errors import MiripError
from mirip_fast.evaluation.bootstrap import Interval, paired_bootstrap
from mirip_fast.evaluation.report import Report
from mirip_fast.features.recipe import is_patches
from mirip_fast.models.gp import normal_scores
from mirip_fast.ranking.graded import GradedImages, load_split
from mirip_fast.ranking.rows import open_store, read_features
from mirip_fast.ranking.score_model import ScoreModel
from mirip_fast.ranking.scorer import load_score_model
from mirip_fast.training.run_folder import SPLIT_FILE, Run, find_runs

#: Works that the ridge regression learns from, at most: a fair figure in a second or two.
MOST = 2_000


#: What a model is compared with on the evaluated images: its ``name`` (``chance``, ``ridge`` or ``last run``)
#: and ``what`` it is in words; the ``difference`` of the model's pairwise accuracy to its (−1 … 1), inside
#: the within column's values if there is one, and its ``interval``, both on the same resampled groups, None
#: if unknown; why it cannot be said which is better (``unknown``), None where it can; and in a ``word``:
#: ``better``, ``worse``, ``even`` where the interval holds both, ``unknown``.
Baseline = dict[str, Any]


def baselines_text(baselines: Sequence[Baseline]) -> str:
    """One sentence on whether the model is better, and one for each reason why that is unknown."""
    words = {
        "better": "better than",
        "worse": "worse than",
        "even": "not clearly better or worse than",
    }
    said: dict[str, list[str]] = {}
    unknown: dict[str, list[str]] = {}
    for baseline in baselines:
        interval: Interval | None = baseline["interval"]
        if interval is None:
            unknown.setdefault(baseline["unknown"], []).append(baseline["what"])
            continue
        points = (baseline["difference"], interval.low, interval.high)
        shown = "{:+.1f} points, {:+.1f} to {:+.1f}".format(*(100 * point for point in points))
        said.setdefault(words[baseline["word"]], []).append(f"{baseline['what']} ({shown})")
    parts = [f"{word} {' and '.join(what)}" for word, what in said.items()]
    sentences = [f"The model is {'; '.join(parts)}."] if parts else []
    for why, what in unknown.items():
        sentences.append(f"Whether it is better than {' or '.join(what)} is unknown, {why}.")
    return " ".join(sentences)


def compare_with_baselines(
    model: ScoreModel, works: GradedImages, report: Report, config: Config, *, own_test: bool
) -> tuple[Baseline, ...]:
    """Compare a model with chance, with a ridge regression on the same rows, and with the last run.

    The ridge regression learns from the run's train and val works. The last run is the newest finished one
    that was begun before, beside this one, on the same data set and with the same test works.

    Args:
        model: a run's model.
        works: the evaluated images.
        report: on them.
        config: the cache folder, and the rounds of the bootstrap.
        own_test: whether they are the test split of the model's run.
    """
    inside = report.within is not None and report.within_accuracy is not None
    accuracy = report.within_accuracy if inside else report.pairwise_accuracy
    interval = report.within_accuracy_interval if inside else report.pairwise_accuracy_interval
    assert accuracy is not None
    if interval is not None:
        interval = dataclasses.replace(interval, low=interval.low - 0.5, high=interval.high - 0.5)
    cache_dir = Path(config.embed.cache_dir)
    rounds = config.evaluate.bootstrap_rounds

    def baseline(
        name: str,
        what: str,
        difference: float | None = None,
        found: Interval | None = None,
        unknown: str | None = None,
    ) -> Baseline:
        word = "unknown"
        if found is not None:
            word = "better" if found.low > 0 else "worse" if found.high < 0 else "even"
        elif unknown is None:
            why = "too few groups in each tier" if rounds else "no bootstrap rounds"
            unknown = f"with {why}"
        return {
            "name": name, "what": what, "difference": difference, "interval": found,
            "unknown": unknown, "word": word,
        }  # fmt: skip

    ridge = "ridge", "a ridge regression on the same features"
    last = "last run", "the last run before it"
    if report.seen:
        why = f"as the model had learned from {report.seen} of the evaluated works"
        return tuple(baseline(*each, unknown=why) for each in (("chance", "chance"), ridge, last))

    def against(name: str, what: str, score: Callable[[], NDArray[np.floating]]) -> Baseline:
        try:
            done = paired_bootstrap(
                report.scores, score(), report.tiers,
                works.groups,
                within=report.within, finer=not report.tier_names,
                grades=works.grades if report.by_grader else None,
                rounds=rounds,
            )  # fmt: skip
        except MiripError as error:
            return baseline(name, what, unknown=f"as {error}".rstrip("."))
        return baseline(name, what, done["difference"], done["interval"])

    found = [
        baseline("chance", "chance", accuracy - 0.5, interval),
        against(*ridge, lambda: _ridge_scores(model, works, cache_dir)),
    ]
    run = _run_before(Run(model.checkpoint.parent), model, works) if own_test else None
    if run is None:
        why = "as there is none on the same data with the same test works"
        why = why if own_test else "as it may have learned from these works"
        return (*found, baseline(*last, unknown=why))
    what = f"the last run before it, {run.path.name}"
    return (*found, against("last run", what, lambda: _cached_scores(run, works, cache_dir)))


def ridge_scores(
    rows: NDArray[np.floating], y: NDArray[np.floating], new: NDArray[np.floating]
) -> NDArray[np.float64]:
    """Scores of new rows by ridge regression on standardised columns.

    The penalty is the one with the least leave-one-out error, which comes in closed form (PRESS; Allen 1974,
    *The relationship between variable selection and data augmentation*).

    Args:
        rows: [n, D] to learn from.
        y: [n] numbers, higher is better.
        new: [m, D] to score.

    Returns:
        [m], higher is better.
    """
    centre, scale = rows.mean(axis=0, dtype=np.float64), rows.std(axis=0, dtype=np.float64)
    scale[scale == 0] = 1
    x, z = (rows - centre) / scale, y - y.mean()
    values, vectors = np.linalg.eigh(x @ x.T)
    values = np.maximum(values, 0)
    turned = vectors.T @ z
    best, weights = np.inf, np.zeros(len(z))
    for penalty in max(float(values.mean()), 1e-12) * 10 ** np.arange(-4, 4.5, 0.5):
        kept = values / (values + penalty)
        left_out = 1 - 1 / len(z) - vectors**2 @ kept
        error = float((((z - vectors @ (kept * turned)) / np.maximum(left_out, 1e-9)) ** 2).mean())
        if error < best:
            best, weights = error, vectors @ (turned / (values + penalty))
    result: NDArray[np.float64] = ((new - centre) / scale) @ (x.T @ weights)
    return result


def _ridge_scores(model: ScoreModel, works: GradedImages, cache_dir: Path) -> NDArray[np.float64]:
    model.require_one_store("A ridge regression")
    learned = _split(Run(model.checkpoint.parent), model.info.tiers).part("train", "val")
    if len(learned) > MOST:
        learned = learned.subset(np.sort(np.random.default_rng(0).permutation(len(learned))[:MOST]))
    store = open_store(cache_dir, model.info)
    features = "+".join(kind for kind in model.info.kinds if not is_patches(kind))
    rows, new = (
        read_features(store, part.hashes, features, model.info.views).mean(axis=1)
        for part in (learned, works)
    )
    y = normal_scores(learned.tier_codes) if learned.has_tiers else learned.needed_scores
    return ridge_scores(rows, y, new)


def _cached_scores(run: Run, works: GradedImages, cache_dir: Path) -> NDArray[np.floating]:
    parts = load_score_model(run.model).parts()
    stores = [open_store(cache_dir, part.info) for part in parts]
    scores = [part.score(store, works.hashes) for part, store in zip(parts, stores, strict=True)]
    mean: NDArray[np.floating] = np.mean(scores, axis=0)
    return mean


def _run_before(run: Run, model: ScoreModel, works: GradedImages) -> Run | None:
    """The newest finished run begun before ``run`` that was to be evaluated on the same test works."""
    ours = dict(zip(works.hashes, works.order.tolist(), strict=True))
    runs = find_runs(run.path.parent)
    names = [other.path.name for other in runs]
    for other in runs[names.index(run.path.name) + 1 :] if run.path.name in names else []:
        try:
            info = other.info
            if info.get("status") != "finished" or info.get("debug"):
                continue
            if info.get("dataset") != run.info.get("dataset") or not other.has(SPLIT_FILE):
                continue
            test = _split(other, model.info.tiers).part("test")
            if dict(zip(test.hashes, test.order.tolist(), strict=True)) == ours:
                return other
        except (MiripError, OSError):  # damaged, or of other tiers: `verify` tells
            continue
    return None


def _split(run: Run, tiers: Sequence[str]) -> GradedImages:
    return load_split(run.path / SPLIT_FILE, tiers)
