"""`train --readout gp`: a Gaussian process over the cached rows of train and val.

Nothing is held back for choosing: length, noise and layers come from the marginal likelihood, and what every
work would score had its group been left out comes in closed form. These scores are the run's held-out
scores, from which percentiles, probabilities and anchors are learned as from any others.

Judged pairs are learned from by a process of preferences. Its held-out scores come from ten folds of groups:
each work's from the pairs that no work of its fold is in.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Sequence

import numpy as np

from mirip_fast.config import Config, HeadConfig, TrainConfig
from mirip_fast.errors import ConfigError, DataError
from mirip_fast.evaluation.report import Report, evaluate
from mirip_fast.features.pooling import head_kinds
from mirip_fast.features.store import FeatureStore
from mirip_fast.models.gp import GaussianProcess, normal_scores
from mirip_fast.models.model_info import ModelInfo, looked_at
from mirip_fast.models.preference import fit_pairs
from mirip_fast.ranking.anchors import keep_anchors
from mirip_fast.ranking.evaluate_pairs import PairReport, agreement
from mirip_fast.ranking.finished import draw_run
from mirip_fast.ranking.graded import GradedImages
from mirip_fast.ranking.head_files import save_process
from mirip_fast.ranking.held_out import HeldOut, save_held_out
from mirip_fast.ranking.judged_pairs import JudgedPairs
from mirip_fast.ranking.references import write_calibration
from mirip_fast.ranking.rows import ListedPairs, open_store, read_features
from mirip_fast.ranking.scorer import load_score_model
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
_ROUNDS = 200  # bootstrap resamples behind the interval that training prints


def choose_readout(config: Config, *, listed: bool = False) -> str:
    """``gp`` or ``head``: as asked; else gp, unless a setting is asked for that only a head heeds.

    Args:
        config: the settings.
        listed: whether pairs come from a file.

    Raises:
        ConfigError: gp is asked for, and such a setting, too.
    """
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
    if config.head.readout == "head" or not asked:
        return config.head.readout or "gp"
    flags = ", ".join("--" + name.replace("_", "-") for name in asked)
    if config.head.readout == "gp":
        raise ConfigError(f"{flags}: of no use with --readout gp, only with --readout head")
    log.info("Readout head, as %s is of no use with a Gaussian process", flags)
    return "head"


def learns_pairs(judged: JudgedPairs, readout: str | None) -> bool:
    """Whether a Gaussian process learns from judged pairs, and no head; says why not.

    Args:
        judged: the pairs.
        readout: what was asked for.

    Raises:
        ConfigError: gp is asked for, and pairs are too many.
    """
    in_train = sum(split == "train" for split in judged.splits)
    if readout == "gp" and len(judged.splits) > MOST_PAIRS:
        raise ConfigError(
            f"--readout gp: {len(judged.splits):,} judged pairs, and a Gaussian process learns from at most "
            f"{MOST_PAIRS:,}; leave it out, for a head"
        )
    if readout is None and in_train >= FEW_PAIRS:
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


def fit_process(
    run: Run,
    config: Config,
    images: GradedImages,
    store: FeatureStore,
    info: ModelInfo,
    judged: JudgedPairs | None = None,
) -> Report | PairReport:
    """Fit into the run's folder, and leave it finished.

    Args:
        run: a new run with its split.
        config: label and seed are used.
        images: graded images; those of train and val are learned from.
        store: their features.
        info: the features to choose from.
        judged: pairs to learn from in place of the grades.

    Returns:
        How the left-out scores order the works, or the judged pairs.

    Raises:
        DataError: fewer than two tiers, or a finer grade is missing.
        StoreError: features are missing.
    """
    with run.log_to_file():
        try:
            if judged is not None:
                return _fit_judged(run, config, judged, images, store, info)
            return _fit(run, config, images.part("train", "val"), images, store, info)
        except BaseException as error:
            status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            with contextlib.suppress(OSError):  # a full disk: the first error is the one to tell
                run.update(status=status, reason=str(error))
            raise


def _fit(
    run: Run,
    config: Config,
    learned: GradedImages,
    images: GradedImages,
    store: FeatureStore,
    info: ModelInfo,
) -> Report:
    started = time.monotonic()
    labels = learned.labels(None, label=config.train.label)
    y = normal_scores(labels.tiers) if labels.tier_scores is None else labels.tier_scores
    # One row per work: the mean over its views. Each view is scored alone later.
    rows = read_features(store, learned.hashes, info.features, info.views).mean(axis=1)
    kinds = head_kinds(info.features)
    process = GaussianProcess.fit(
        rows,
        y,
        left_out_together(labels.groups, config.train.seed),
        blocks=info.blocks,
        seed=config.train.seed,
    )
    used = [kind for kind, amplitude in zip(kinds, process.amplitudes, strict=True) if amplitude]
    process = process.of_used()
    info = info.looking_at(used)
    store = open_store(store.path.parent, info)
    path = save_process(run.path, process, info)
    held_out = HeldOut.of(learned, process.left_out, "left-out groups")
    save_held_out(run.path, held_out, info.tiers)
    model = load_score_model(path)
    calibration = write_calibration(model, held_out, images, None)
    keep_anchors(model, images, store)
    report = evaluate(
        held_out.scores, held_out.tiers if held_out.has_tiers else None, tier_names=info.tiers,
        image_ids=held_out.ids, groups=held_out.groups, tier_scores=held_out.tier_scores,
        calibration=calibration, rounds=_ROUNDS,
    )  # fmt: skip
    run.update(
        status="finished",
        readout="gp",
        features=info.features,
        backbones=[each.embed.backbone for each in info.backbones],
        left_out_pairwise_accuracy=report.pairwise_accuracy,
        seconds=round(time.monotonic() - started, 2),
    )
    log.info("It looks at %s", looked_at(info))
    draw_run(run, images, None)
    return report


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
    path = save_process(run.path, posterior.process(), info)
    names = left_out_together([r.group for r in learned.manifest.records], seed)
    groups = np.unique([n or f"\n{i}" for i, n in enumerate(names)], return_inverse=True)[1]
    folds = np.random.default_rng(seed).permutation(int(groups.max()) + 1)[groups] % _FOLDS
    scores = np.zeros(len(learned))
    for fold in range(_FOLDS):
        rest = (folds[pairs] != fold).all(axis=1)
        if label[rest].any():
            without = posterior.given(pairs[rest], label[rest], weight[rest])
            scores[folds == fold] = without.mean[folds == fold]
    held_out = HeldOut.of(learned, scores, "left-out groups")
    save_held_out(run.path, held_out, info.tiers)
    model = load_score_model(path)
    listed = ListedPairs(pairs, label, weight)
    write_calibration(model, held_out, images, None, listed)
    keep_anchors(model, images, store)
    accuracy, interval = agreement(scores, listed, groups, _ROUNDS, seed)
    ties = int((label == 0).sum())
    report = PairReport(listed.decided, ties, accuracy, interval, "left-out", images.has_tiers)
    run.update(
        status="finished",
        readout="gp",
        features=info.features,
        judged_pairs=len(listed),
        left_out_pair_accuracy=accuracy,
        seconds=round(time.monotonic() - started, 2),
    )
    draw_run(run, images, None)
    return report
