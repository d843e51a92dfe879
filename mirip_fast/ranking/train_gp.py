"""`train --readout gp`: a Gaussian process over the cached rows of train and val.

Nothing is held back for choosing: length, noise and layers come from the marginal likelihood, and what every
work would score had its group been left out comes in closed form. These scores are the run's held-out
scores, from which percentiles, probabilities and anchors are learned as from any others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Sequence

import numpy as np

from mirip_fast.config import Config, HeadConfig, TrainConfig
from mirip_fast.errors import ConfigError
from mirip_fast.evaluation.report import Report, evaluate
from mirip_fast.features.pooling import head_kinds
from mirip_fast.features.store import FeatureStore
from mirip_fast.models.gp import GaussianProcess, normal_scores
from mirip_fast.models.model_info import ModelInfo
from mirip_fast.ranking.anchors import keep_anchors
from mirip_fast.ranking.finished import draw_run
from mirip_fast.ranking.graded import GradedImages
from mirip_fast.ranking.head_files import save_process
from mirip_fast.ranking.held_out import HeldOut, save_held_out
from mirip_fast.ranking.references import write_calibration
from mirip_fast.ranking.rows import read_features
from mirip_fast.ranking.scorer import load_score_model
from mirip_fast.training.run_folder import Run

log = logging.getLogger(__name__)

#: Settings of ``train`` that a Gaussian process heeds, or that say nothing of learning.
_HEEDED = {"name", "output_dir", "label", "preset", "seed"}
#: A group that holds more than this part of all works is left out in parts.
_PARTS = 5
_ROUNDS = 200  # bootstrap resamples behind the interval that training prints


def choose_readout(config: Config) -> str:
    """``gp`` or ``head``: as asked; else gp, unless a setting is asked for that only a head heeds.

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
    if config.evaluate.within is not None:
        asked.append("within")
    if config.head.readout == "head" or not asked:
        return config.head.readout or "gp"
    flags = ", ".join("--" + name.replace("_", "-") for name in asked)
    if config.head.readout == "gp":
        raise ConfigError(f"{flags}: of no use with --readout gp, only with --readout head")
    log.info("Readout head, as %s is of no use with a Gaussian process", flags)
    return "head"


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
    run: Run, config: Config, images: GradedImages, store: FeatureStore, info: ModelInfo
) -> Report:
    """Fit into the run's folder, and leave it finished.

    Args:
        run: a new run with its split.
        config: label and seed are used.
        images: graded images; those of train and val are learned from.
        store: their features.
        info: the features to choose from.

    Returns:
        How the left-out scores order the works.

    Raises:
        DataError: fewer than two tiers, or a finer grade is missing.
        StoreError: features are missing.
    """
    with run.log_to_file():
        try:
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
        blocks=[rows.shape[1] // len(kinds)] * len(kinds),
        seed=config.train.seed,
    )
    used = [kind for kind, amplitude in zip(kinds, process.amplitudes, strict=True) if amplitude]
    process = process.of_used()
    info = dataclasses.replace(info, features="+".join(used), input_dim=process.input_dim)
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
        left_out_pairwise_accuracy=report.pairwise_accuracy,
        seconds=round(time.monotonic() - started, 2),
    )
    log.info("It looks at %s", info.features)
    draw_run(run, images, None)
    return report
