"""`train --full --folds K`: what is done in each fold, by all processes that train together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from mirip_fast.data.images import UTMOST_PIXELS
from mirip_fast.errors import DataError
from mirip_fast.features.command import default_workers
from mirip_fast.features.embed import Settings
from mirip_fast.finetune.peers import Peers
from mirip_fast.finetune.setup import Setup, require_pairs
from mirip_fast.models.checkpoint import load_checkpoint
from mirip_fast.ranking.fold_plan import FoldsPlan
from mirip_fast.ranking.fold_runs import FoldRun
from mirip_fast.ranking.graded import GradedImages
from mirip_fast.ranking.scorer import ScoreModel, score_files
from mirip_fast.training.remote import RemoteSync
from mirip_fast.training.run_folder import Run

T = TypeVar("T")


class FullFolds:
    """Backbone and head per fold (a :class:`mirip_fast.ranking.fold_runs.FoldWork`).

    Args:
        peers: the processes that train together.
        device: of this process.
        heads: per fold the checkpoint of a head that had not seen the fold either; none: random heads.
        cache_dir: folder of the feature stores.
        workers: processes that decode; None: as many as there are cores to use.
    """

    def __init__(
        self,
        peers: Peers,
        device: torch.device,
        heads: tuple[Path, ...],
        cache_dir: Path,
        workers: int | None = None,
    ):
        self._peers, self._device, self._heads = peers, device, heads
        self._cache_dir, self._workers = cache_dir, workers

    @property
    def is_first(self) -> bool:
        """Whether this process writes files."""
        return self._peers.is_first

    def first_does(self, work: Callable[[], T]) -> T:
        """The result of ``work`` in every process, done by the first."""
        return self._peers.first_does(work)

    def fit(self, fold: FoldRun) -> None:
        """Fine-tune a fold's model.

        Raises:
            DataError: train or val has no pair.
            TrainingError: see :class:`mirip_fast.finetune.fit.FullFit`.
        """
        require_pairs(fold.images)
        setup = Setup(fold.config, fold.images, self._peers, self._device)
        resumed = None if fold.checkpoint is None else load_checkpoint(fold.checkpoint)
        head = None
        if resumed is None and self._heads:
            head = load_checkpoint(self._heads[fold.number])
        setup.train(fold.run, head=head, resumed=resumed)

    def score(self, model: ScoreModel, images: GradedImages) -> NDArray[np.floating]:
        """[n] scores of images, through the backbone of the fold's model.

        Raises:
            DataError: an image can not be read any more.
        """
        paths = [record.path for record in images.manifest.records]
        workers = min(len(paths), default_workers(self._workers))
        settings = Settings(workers=workers, max_pixels=UTMOST_PIXELS)  # they were admitted before
        scored = score_files(
            model, paths, cache_dir=self._cache_dir, device=self._device.type, settings=settings
        )
        for path, outcome in zip(paths, scored.outcomes, strict=True):
            if outcome.status == "failed":
                raise DataError(f"{path}: {outcome.reason}")
        return scored.scores

    def complete(self, run: Run, plan: FoldsPlan) -> None:
        """Copy the ensemble and what was learned for it to where the checkpoints were copied."""
        url = plan.config.finetune.remote_sync
        if url:
            RemoteSync(url, run.place, along=run.small_files).finish()
