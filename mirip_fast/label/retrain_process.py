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

from mirip_fast.config import Config
from mirip_fast.errors import MiripError
from mirip_fast.features.store import FeatureStore
from mirip_fast.files import temporary_folder
from mirip_fast.ranking.scorer import load_score_model
from mirip_fast.ranking.train import Request, train_head
from mirip_fast.settings import config_from_dict


def training_config(config: Config, pairs: Path) -> Config:
    """The session's settings as ``train --head-only --pairs FILE`` takes them."""
    train = dataclasses.replace(config.train, pairs=str(pairs), folds=0, bootstrap=0)
    tracking = dataclasses.replace(config.tracking, report_to="none")
    return dataclasses.replace(config, train=train, tracking=tracking)


def train_once(config: Config, source: Path, hashes: list[bytes]) -> dict[str, Any]:
    """Train a head as ``train --pairs`` does and score works with it; nothing of the run is kept.

    Args:
        config: settings, see :func:`training_config`.
        source: the embedded data set.
        hashes: contents of the n works to score.

    Returns:
        ``scores``: n floats; ``epoch``: the best one.

    Raises:
        MiripError: it can not be trained on; says why.
    """
    with temporary_folder() as folder:
        train = dataclasses.replace(config.train, output_dir=str(folder), save_every_n_epochs=0)
        config = dataclasses.replace(config, train=train)
        run, result = train_head(config, Request(data=source))
        model = load_score_model(run.model)
        store = FeatureStore.open(Path(config.embed.cache_dir) / model.info.fingerprint_id)
        scores: np.ndarray = model.score(store, hashes)
        epoch = getattr(result, "best_epoch", 0)
        return {"scores": scores.astype(float).tolist(), "epoch": epoch}


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
