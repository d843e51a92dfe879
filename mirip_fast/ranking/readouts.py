"""`train --readout`: what learns from the cached rows of train and val, and what a run of it leaves.

A Gaussian process holds nothing back for choosing: length, noise and layers come from the marginal
likelihood, and what every work would score had its group been left out comes in closed form. Heads are
trained in folds, each of which says so of what it left out. These scores are the run's held-out scores, from
which percentiles, probabilities and anchors are learned as from any others.

``auto`` keeps what orders left-out works best, everything measured on the same folds; ``ensemble`` averages.

Judged pairs are learned from by a process of preferences. Its held-out scores come from ten folds of groups:
each work's from the pairs that no work of its fold is in.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mirip_fast.config import Config, HeadConfig, TrainConfig
from mirip_fast.errors import ConfigError, DataError, TrainingError
from mirip_fast.evaluation.bootstrap import paired_bootstrap
from mirip_fast.evaluation.metrics import pairwise_accuracy
from mirip_fast.evaluation.report import Report
from mirip_fast.features.recipe import head_kinds, is_patches, layer_of, series_name
from mirip_fast.features.store import FeatureStore
from mirip_fast.models.gp import GaussianProcess, grader_scores, normal_scores
from mirip_fast.models.model_info import ModelInfo, looked_at
from mirip_fast.models.numpy_head import NumpyHead
from mirip_fast.models.preference import fit_pairs, join_pairs
from mirip_fast.progress import steps
from mirip_fast.ranking.anchors import keep_anchors
from mirip_fast.ranking.applicants import evaluate_applicants
from mirip_fast.ranking.finished import finish_run, report_run
from mirip_fast.ranking.fit import fit_quietly
from mirip_fast.ranking.folds import LEFT_OUT, assign_folds, leave_out
from mirip_fast.ranking.graded import GradedImages
from mirip_fast.ranking.held_out import keep_references
from mirip_fast.ranking.judged_pairs import (
    JoinedPairs,
    JudgedPairs,
    PairReport,
    share_in_order,
)
from mirip_fast.ranking.rows import ListedPairs, Rows, open_store, read_features
from mirip_fast.ranking.score_model import TrainedHead, save_members
from mirip_fast.ranking.scorer import load_score_model
from mirip_fast.runtime import resolve_device
from mirip_fast.training.run_folder import Run

log = logging.getLogger(__name__)

#: Settings of ``train`` that a Gaussian process heeds, or that say nothing of learning.
_HEEDED = {"name", "output_dir", "label", "preset", "seed"}
#: Judged pairs of the train split below which a Gaussian process learns from them, and no head; at most so
#: many in all where it is asked for: time grows with their cube.
FEW_PAIRS, MOST_PAIRS = 1_000, 5_000
#: Works that say what is usual, judged or not, at most: beyond, the judged ones alone.
MOST_WORKS = 4_000
_FOLDS = 10  # of judged pairs
#: A group that holds more than this part of all works is left out in parts.
_PARTS = 5
_ROUNDS = 200  # bootstrap resamples behind the interval of judged pairs


def choose_readout(config: Config, *, listed: bool = False) -> str:
    """``gp``, ``head``, ``attention``, ``auto`` or ``ensemble``: as asked; ``usual`` is gp, unless a setting
    is asked for that only a head heeds.

    Args:
        config: the settings.
        listed: whether pairs come from a file.

    Raises:
        ConfigError: such a setting is asked for beside a readout that does not heed it.
    """
    readout = config.head.readout
    asked = [
        name
        for section, kind, heeded in (
            (config.train, TrainConfig(), _HEEDED),
            (config.head, HeadConfig(), {"features", "readout"}),
        )
        for name in vars(kind)
        if name not in heeded and getattr(section, name) != getattr(kind, name)
    ]
    if listed:
        asked = [name for name in asked if name not in ("pairs", "pairs_zero")]
    if config.evaluate.within is not None:
        asked.append("within")
    if readout in ("head", "attention"):
        return readout
    if readout in ("auto", "ensemble"):  # their heads heed the others
        asked = [name for name in asked if name == "within"]
        if listed:
            raise ConfigError(
                f"--readout {readout}: judged pairs are learned from by one readout: with --pairs FILE.csv "
                "use gp, head or attention, or leave it out"
            )
    if not asked:
        return "gp" if readout == "usual" else readout
    flags = ", ".join("--" + name.replace("_", "-") for name in asked)
    if readout != "usual":
        raise ConfigError(f"{flags}: of no use with --readout {readout}, only with --readout head")
    log.info("Readout head, as %s is of no use with a Gaussian process", flags)
    return "head"


def learns_pairs(splits: Sequence[str], readout: str) -> bool:
    """Whether a Gaussian process learns from judged pairs, and no head; says why not.

    Args:
        splits: of each pair that is used.
        readout: what was asked for.

    Raises:
        ConfigError: gp is asked for, and pairs are too many.
    """
    in_train = sum(split == "train" for split in splits)
    if readout == "gp" and len(splits) > MOST_PAIRS:
        raise ConfigError(
            f"--readout gp: {len(splits):,} judged pairs, and a Gaussian process learns from at most "
            f"{MOST_PAIRS:,}; leave it out, for a head"
        )
    if readout == "usual" and in_train >= FEW_PAIRS:
        log.info("Readout head, as %d judged pairs are enough for one", in_train)
        return False
    return True


def left_out_together(groups: Sequence[str | None], seed: int) -> list[str | None]:
    """[n] groups → [n] names of what is left out together: the groups, but for those that hold most works.

    Without a group of three quarters of the works hardly anything is left to learn from, and what is then
    said of them tells nothing about the model. Such a group is left out in parts of a fifth of all works,
    drawn at random.
    """
    names, n = list(groups), len(groups)
    for group, count in Counter(name for name in groups if name is not None).items():
        parts = -(-count // max(1, n // _PARTS))
        if parts > 1 and count > n // _PARTS:
            log.warning(
                "Group %r holds %d of %d works: it is left out in %d parts, which makes the left-out "
                "accuracy too good if its works resemble each other",
                group, count, n, parts,
            )  # fmt: skip
            rows = [i for i, name in enumerate(groups) if name == group]
            for place, i in enumerate(np.random.default_rng(seed).permutation(rows)):
                names[i] = f"{group}\n{place % parts}"  # a name that no CSV cell has
    return names


#: One readout: the kinds that it looks at; its heads, the mean of whose scores is the score; scores [n] of
#: the works learned from by what had not seen them: the other groups (a Gaussian process) or the other folds
#: (heads), and the folds that all readouts share.
Fitted = tuple[str, list[TrainedHead], NDArray[np.float64], NDArray[np.float64]]


def fit_readout(
    run: Run,
    config: Config,
    readout: str,
    images: GradedImages,
    store: FeatureStore,
    info: ModelInfo,
    patches: str | None,
    judged: JudgedPairs | JoinedPairs | None = None,
) -> Report | PairReport:
    """Fit into the run's folder, and leave it finished.

    Args:
        run: a new run with its split.
        config: label, seed and split are used, and by heads all that is said of them.
        readout: gp, auto or ensemble.
        images: graded images; those of train and val are learned from.
        store: their features.
        info: the features for a Gaussian process to choose from.
        patches: a kind of patch tokens for a head to attend to; None: there is none.
        judged: with gp, pairs to learn from in place of the grades, or to join them.

    Returns:
        How the held-out scores order the works, or the judged pairs.

    Raises:
        DataError: fewer than two tiers, or a finer grade is missing.
        StoreError: features are missing.
        TrainingError: a head's loss is not finite.
    """
    with run.log_to_file(), run.in_progress():
        if isinstance(judged, JudgedPairs):
            return _fit_judged(run, config, judged, images, store, info)
        return _fit(run, config, readout, images, store, info, patches, judged)


def _fit(
    run: Run,
    config: Config,
    readout: str,
    images: GradedImages,
    store: FeatureStore,
    info: ModelInfo,
    patches: str | None,
    joined: JoinedPairs | None,
) -> Report:
    started = time.monotonic()
    learned = images.part("train", "val")
    labels = learned.labels(None, label=config.train.label)
    together = left_out_together(labels.groups, config.train.seed)
    fold_of, folds = None, list[GradedImages]()
    if readout != "gp":
        try:
            fold_of, folds = _folds(learned, together, config)
        except DataError as error:
            if readout == "ensemble":
                raise
            log.warning("Nothing but a Gaussian process can be tried: %s", error)
    found = {"gp": _fit_process(labels, together, fold_of, learned, config, store, info, joined)}
    about: dict[str, Any] = {}
    if fold_of is not None:
        last = "+".join(kind for kind in head_kinds(info.features) if layer_of(kind) is None)
        for name, features in (("head", last), ("attention", patches and f"{last}+{patches}")):
            if features:
                found[name] = _fit_heads(name, features, learned, folds, config, store, info)
        order: Any = {"finer": not learned.has_tiers, "grades": learned.grades}
        about["compared"] = {
            name: pairwise_accuracy(compared, learned.order, **order)
            for name, (*_, compared) in found.items()
        }
        if readout == "auto":
            best = _best_of(found, about["compared"], learned)
            found = {best: found[best]}
    series = store.series()
    seen = {kind for features, *_ in found.values() for kind in head_kinds(features)}
    widths = {
        kind: math.prod(series[series_name(info.views[0], kind)].shape)
        for kind in (*info.kinds, *filter(is_patches, seen))
        if kind in seen
    }
    if len(found) > 1:
        found = {"ensemble": _mean_of(list(found.values()), widths)}
    ((name, (_, members, scores, _)),) = found.items()
    info = info.looking_at([kind for kind in widths if not is_patches(kind)])
    for kind in filter(is_patches, widths):  # of the one backbone
        info = dataclasses.replace(
            info, features=f"{info.features}+{kind}", input_dim=info.input_dim + widths[kind]
        )
    store = open_store(store.path.parent, info)
    path = save_members(run.path, members, info)
    source = "left-out groups" if name == "gp" else "out-of-fold"
    held_out = learned.with_scores(scores, source)
    model = load_score_model(path)
    report = keep_references(model, held_out, None)
    assert report is not None
    keep_anchors(model, images, store)
    people = evaluate_applicants(model, held_out.scores, learned, config)
    report = dataclasses.replace(report, applicants=people)
    log.info("It looks at %s", looked_at(info))
    finish_run(
        run, held_out, report,
        readout=name,
        features=info.features,
        backbones=[each.embed.backbone for each in info.backbones],
        left_out_pairwise_accuracy=report.pairwise_accuracy,
        seconds=time.monotonic() - started,
        **about,
    )  # fmt: skip
    report_run(run, config, held_out, report)
    return report


def _with_pairs(process: GaussianProcess, judged: Rows) -> GaussianProcess:
    """The process given judged pairs, too; says how many it has in the right order, before and after."""
    rows, listed = judged.features.mean(axis=1), judged.pairs
    assert listed is not None
    made = join_pairs(process, rows, listed.images, listed.label, listed.weight)
    if listed.decided:
        alone = np.arange(len(rows))
        before, after = (
            share_in_order(p.score(rows), listed, alone, 0)[0] for p in (process, made)
        )
        log.info(
            "Of the judged pairs the grades alone order %.4f rightly, grades and pairs together %.4f",
            *(before, after),
        )
    return made


def _folds(
    learned: GradedImages, together: Sequence[str | None], config: Config
) -> tuple[NDArray[np.int64], list[GradedImages]]:
    """[n] the fold of each work, and the folds; what is left out together is in one, and each has works of
    all tiers, or of all quantiles of the finer grades where there are no tiers."""
    import pandas as pd

    table = learned.table.assign(group=pd.Series(together, dtype=object))
    if not learned.has_tiers:
        names = pd.Index(learned.tiers)
        place = np.argsort(np.argsort(-learned.needed_scores, kind="stable"))
        table["tier"] = pd.Categorical.from_codes(place * len(names) // len(place), names)
    grouped = dataclasses.replace(learned, table=table)
    fold_of = assign_folds(grouped, config.train.folds or _PARTS, config.split.split_seed)
    numbers = range(int(fold_of.max()) + 1)
    return fold_of, [leave_out(grouped, fold_of, number, config.split) for number in numbers]


def _fit_process(
    labels: Rows,
    together: Sequence[str | None],
    fold_of: NDArray[np.int64] | None,
    learned: GradedImages,
    config: Config,
    store: FeatureStore,
    info: ModelInfo,
    joined: JoinedPairs | None,
) -> Fitted:
    graders, tiers = None, None
    if labels.grades is not None:
        y, graders = grader_scores(labels.grades)
    elif labels.tier_scores is not None:
        y = labels.tier_scores
    else:
        y, tiers = normal_scores(labels.tiers), labels.tiers
    # One row per work: the mean over its views. Each view is scored alone later.
    rows = read_features(store, learned.hashes, info.features, info.views).mean(axis=1)
    kinds = head_kinds(info.features)
    fit = functools.partial(
        GaussianProcess.fit, rows, y,
        blocks=info.blocks, seed=config.train.seed, graders=graders, sets=labels.sets, tiers=tiers,
    )  # fmt: skip
    process = fit(together)
    used = [kind for kind, looked in zip(kinds, process.used, strict=True) if looked]
    by_fold = process.left_out if fold_of is None else fit(fold_of.tolist()).left_out
    made = process.of_used()
    if joined is not None:
        made = _with_pairs(made, joined.rows(store, "+".join(used), info.views))
    return "+".join(used), [TrainedHead(made)], process.left_out, by_fold


def _fit_heads(
    name: str,
    features: str,
    learned: GradedImages,
    folds: Sequence[GradedImages],
    config: Config,
    store: FeatureStore,
    info: ModelInfo,
) -> Fitted:
    started = time.monotonic()
    rows = learned.rows(store, features, info.views, None, label=config.train.label)
    config = dataclasses.replace(
        config, head=dataclasses.replace(config.head, features=features, readout=name)
    )
    device = resolve_device(config.runtime.device)
    members, held_out = [], np.empty(len(rows))
    for number, fold in enumerate(steps(folds, "heads")):
        train = dataclasses.replace(config.train, seed=config.train.seed + number)
        own = dataclasses.replace(config, train=train)
        arrays, _ = fit_quietly(rows, fold, own, device)
        if arrays is None:
            raise TrainingError(
                f"The loss of a {name} is not finite. Likely causes: a learning rate that is too high "
                "(--learning-rate), or features that are not finite (`mirip-fast cache verify`). "
                "--readout gp needs no such settings."
            )
        head = NumpyHead(arrays)
        flat = rows.features.reshape(-1, rows.input_dim)
        scores = head(flat).reshape(rows.features.shape[:2]).mean(axis=1).astype(np.float64)
        # Of all works: what a fold holds may be better or worse than the rest.
        mean, spread = float(scores.mean()), float(scores.std()) or 1.0
        members.append(TrainedHead(head, mean, spread))
        left_out = fold.indexes(LEFT_OUT)
        held_out[left_out] = (scores[left_out] - mean) / spread
    log.info(
        "Readout %s: %d heads on %s in %.1f s",
        *(name, len(members), features, time.monotonic() - started),
    )
    return features, members, held_out, held_out


def _best_of(
    found: Mapping[str, Fitted], accuracies: Mapping[str, float], learned: GradedImages
) -> str:
    """The readout of the highest accuracy, having said by how much and how surely."""
    best, *others = sorted(found, key=lambda name: -accuracies[name])
    parts = [f"{best} {accuracies[best]:.3f}"]
    for other in others:
        done = paired_bootstrap(
            found[best][3], found[other][3], learned.order, learned.groups,
            finer=not learned.has_tiers, grades=learned.grades,
        )  # fmt: skip
        span = "interval unknown"
        if (ends := done["interval"]) is not None:
            span = f"{100 * ends.low:+.1f} to {100 * ends.high:+.1f}"
        parts.append(
            f"{other} {accuracies[other]:.3f} (difference "
            f"{100 * done['difference']:+.1f} points, {span})"
        )
    log.info("Pairwise accuracy by cross-validation: %s: %s is used", ", ".join(parts), best)
    return best


def _mean_of(found: Sequence[Fitted], widths: Mapping[str, int]) -> Fitted:
    """The mean of the readouts, each standardised by its held-out scores.

    Args:
        found: the readouts.
        widths: numbers of a row by kind, in the order of a row.
    """
    count = sum(len(heads) for _, heads, *_ in found)
    ends = dict(zip(widths, np.cumsum(list(widths.values())).tolist(), strict=True))
    members: list[TrainedHead] = []
    scores = []
    for features, heads, _, compared in found:
        columns = tuple((ends[k] - widths[k], ends[k]) for k in head_kinds(features))
        mean, spread = float(compared.mean()), float(compared.std()) or 1.0
        scores.append((compared - mean) / spread)
        # A score is the mean over all members, and each readout is to weigh the same.
        weight = len(found) * len(heads) / count
        members += [
            dataclasses.replace(
                m, mean=m.mean + m.spread * mean, spread=m.spread * spread * weight, columns=columns
            )
            for m in heads
        ]
    mean_scores: NDArray[np.float64] = np.mean(scores, axis=0)
    return "+".join(widths), members, mean_scores, mean_scores


def _fit_judged(
    run: Run,
    config: Config,
    judged: JudgedPairs,
    images: GradedImages,
    store: FeatureStore,
    info: ModelInfo,
) -> PairReport:
    started = time.monotonic()
    seed = config.train.seed
    here = np.isin(judged.splits, ["train", "val"])
    label, weight = judged.label[here], judged.weight[here]
    if not judged.decided("train") + judged.decided("val"):
        raise DataError(
            "No judged pair to learn from (ties, weights of 0 and pairs with a test image left aside): judge "
            "more pairs"
        )
    used = np.flatnonzero(np.isin(images.splits, ["train", "val"]))
    if len(used) > MOST_WORKS:
        used = np.unique(judged.images[here])
    learned, pairs = images.subset(used), np.searchsorted(used, judged.images[here])
    if images.has_tiers:
        log.info("The judged pairs are learned from; the tiers say what scores mean, and no more")
    rows = read_features(store, learned.hashes, info.features, info.views).mean(axis=1)
    posterior = fit_pairs(rows, pairs, label, weight, blocks=info.blocks, seed=seed)
    path = save_members(run.path, [TrainedHead(posterior.process())], info)
    names = left_out_together(learned.groups, seed)
    groups = np.unique([n or f"\n{i}" for i, n in enumerate(names)], return_inverse=True)[1]
    folds = np.random.default_rng(seed).permutation(int(groups.max()) + 1)[groups] % _FOLDS
    scores = np.zeros(len(learned))
    for fold in range(_FOLDS):
        rest = (folds[pairs] != fold).all(axis=1)
        if label[rest].any():
            without = posterior.given(pairs[rest], label[rest], weight[rest])
            scores[folds == fold] = without.mean[folds == fold]
    held_out = learned.with_scores(scores, "left-out groups")
    model = load_score_model(path)
    listed = ListedPairs(pairs, label, weight)
    accuracy, interval = share_in_order(scores, listed, groups, _ROUNDS, seed)
    known = None if interval is None else (accuracy, *interval)
    by_grades = keep_references(model, held_out, None, judged=listed, accuracy=known)
    keep_anchors(model, images, store)
    ties = int((label == 0).sum())
    report = PairReport(listed.decided, ties, accuracy, interval, "left-out", images.has_tiers)
    finish_run(
        run, held_out, by_grades,
        readout="gp",
        features=info.features,
        judged_pairs=len(listed),
        left_out_pair_accuracy=accuracy,
        seconds=time.monotonic() - started,
    )  # fmt: skip
    report_run(run, config, held_out, by_grades)
    return report
