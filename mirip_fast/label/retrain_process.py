"""A process that trains heads on the judgements so far, beside the one that serves the page.

It reads jobs from its standard input and answers on its standard output, one JSON object per line, and ends
when its input ends. So the page never waits for training.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mirip_fast.config import Config
from mirip_fast.errors import MiripError
from mirip_fast.features.datasets import newest_dataset
from mirip_fast.features.store import FeatureStore
from mirip_fast.files import temporary_folder
from mirip_fast.label.works import preference_rows
from mirip_fast.models.preference import fit_pairs
from mirip_fast.ranking.graded import graded_of_dataset, left_out
from mirip_fast.ranking.judged_pairs import read_judged_pairs
from mirip_fast.ranking.objective import pairs_files
from mirip_fast.ranking.readouts import FEW_PAIRS, MOST_WORKS
from mirip_fast.ranking.rows import open_store
from mirip_fast.ranking.scorer import load_score_model
from mirip_fast.ranking.train import Request, train_head
from mirip_fast.settings import config_from_dict


def training_config(config: Config, pairs: Path) -> Config:
    """The session's settings as ``train --head-only --pairs FILE`` takes them."""
    train = dataclasses.replace(config.train, pairs=str(pairs), folds=0, bootstrap=0)
    tracking = dataclasses.replace(config.tracking, report_to="none")
    return dataclasses.replace(config, train=train, tracking=tracking)


def train_once(config: Config, source: Path, hashes: list[bytes]) -> dict[str, Any]:
    """Learn from the judgements and score works; nothing is kept.

    A few judgements (:data:`mirip_fast.ranking.readouts.FEW_PAIRS`) are learned by a Gaussian process of
    preferences, more by a head, as ``train --pairs`` does; but here from the works of the train split alone,
    so that those of val and test measure.

    Args:
        config: settings, see :func:`training_config`.
        source: the embedded data set.
        hashes: contents of the n works to score.

    Returns:
        ``scores``: n floats.

    Raises:
        MiripError: it can not be trained on; says why.
    """
    soon = _by_preferences(config, source, hashes)
    if soon is not None:
        return {"scores": soon.tolist()}
    with temporary_folder() as folder:
        train = dataclasses.replace(config.train, output_dir=str(folder), save_every_n_epochs=0)
        config = dataclasses.replace(config, train=train)
        run, _ = train_head(config, Request(data=source))
        model = load_score_model(run.model)
        store = open_store(Path(config.embed.cache_dir), model.info)
        scores: np.ndarray = model.score(store, hashes)
        return {"scores": scores.astype(float).tolist()}


def _by_preferences(
    config: Config, source: Path, hashes: list[bytes]
) -> NDArray[np.float64] | None:
    """[n] scores by the Gaussian process; None where a head is asked for or judgements are enough for it."""
    dataset = newest_dataset(Path(config.embed.cache_dir), source)
    images = graded_of_dataset(dataset, config.split, need_tiers=False)
    files, zero = pairs_files(config.train), config.train.pairs_zero
    judged = read_judged_pairs(files, images, left_out(dataset), zero)
    here = np.array([split == "train" for split in judged.splits], dtype=bool)
    if here.sum() >= FEW_PAIRS or config.head.readout == "head":
        return None
    store = FeatureStore.open(dataset.store_path)
    pairs = judged.images[here]
    # The others only say what is usual, and would take the square of their number.
    used = np.flatnonzero(np.array(images.splits) == "train")
    used = used if len(used) <= MOST_WORKS else np.unique(pairs)
    rows, blocks = preference_rows(dataset, store, [images.hashes[i] for i in used], config)
    verdicts = judged.label[here], judged.weight[here]
    posterior = fit_pairs(rows, np.searchsorted(used, pairs), *verdicts, blocks=blocks)
    return posterior.score(preference_rows(dataset, store, hashes, config)[0])


def serve() -> None:
    """Answer jobs until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints must not stand among the answers
    logging.getLogger("mirip_fast").addHandler(logging.NullHandler())
    logging.getLogger("mirip_fast").propagate = False
    if hasattr(os, "nice"):
        os.nice(5)  # the page comes first
    for line in sys.stdin:
        answer = _answer(json.loads(line))
        print(json.dumps(answer), file=answers, flush=True)


def _answer(job: dict[str, Any]) -> dict[str, Any]:
    try:
        hashes = [bytes.fromhex(sha) for sha in job["hashes"]]
        return train_once(config_from_dict(job["config"]), Path(job["source"]), hashes)
    except (MiripError, OSError) as error:
        return {"error": str(error)}
    except Exception as error:  # a fault of the program: the session goes on without a head
        return {"error": f"{type(error).__name__}: {error}"}
