"""Heads trained on resampled groups: how much a score depends on which works were there to learn from.

Groups are drawn with replacement, as many as there are (cluster bootstrap; Efron & Tibshirani 1993); a
group that is drawn twice counts twice. Each head has a resample and a seed of its own, so the spread of
their scores holds the choice of training works and the randomness of training, and not the disagreement
of graders. All heads are trained together, as one stacked computation.

The heads are narrower than the run's own head and are trained with a preset of their own. Measured on
drawings (features of a ViT-Tiny), they are more accurate than bootstrap heads of the full width with the
usual one (0.673 against 0.662), their ranks spread more like those of heads trained on works of their
own, and they take a sixth of the time. Each trails the run's own head, since a resample holds 63 % of
the works; see docs/many_heads.md.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mirip_fast.config import Config
from mirip_fast.errors import DataError, TrainingError
from mirip_fast.evaluation.metrics import PairCounter
from mirip_fast.features.store import FeatureStore
from mirip_fast.models.model_info import ModelInfo
from mirip_fast.models.numpy_head import NumpyHead
from mirip_fast.ranking.folds import units_of
from mirip_fast.ranking.graded import GradedImages
from mirip_fast.ranking.head_files import Member, save_bootstrap
from mirip_fast.ranking.head_tasks import HeadTask
from mirip_fast.ranking.held_out import HeldOut, load_held_out
from mirip_fast.ranking.many_heads import train_heads
from mirip_fast.ranking.rows import Rows
from mirip_fast.runtime import resolve_device
from mirip_fast.training.presets import Preset
from mirip_fast.training.run_folder import Run

log = logging.getLogger(__name__)

Index = NDArray[np.int64]

#: Widths of the projector's hidden layer, its output and the score head's hidden layer, at most.
WIDTHS = (128, 64, 64)
#: Images per step and peak learning rate.
BATCH, LEARNING_RATE = 64, 3e-3
#: Steps that a head takes, in whole passes over its resample: of so many at most.
STEPS, EPOCHS = 120, 20


@dataclass(frozen=True)
class BootstrapDone:
    """What came of it.

    Attributes:
        heads: how many.
        accuracy: their mean pairwise accuracy on works they had not trained on.
        own_accuracy: that of the run's own held-out scores of the same works.
        seconds: how long it took.
    """

    heads: int
    accuracy: float
    own_accuracy: float
    seconds: float


def draw_resample(units: Index, tiers: Index, rng: np.random.Generator) -> Index:
    """Indices of the images of as many units as there are, drawn with replacement.

    Args:
        units: [n] unit of each image, 0 … U − 1, each of which has an image.
        tiers: [n]; a resample of fewer than two tiers holds no pair and is drawn again.
        rng: source of the draw.
    """
    n_units = int(units.max()) + 1
    order = np.argsort(units, kind="stable")
    starts = np.searchsorted(units[order], np.arange(n_units + 1))
    while True:
        drawn = rng.integers(n_units, size=n_units)
        index = np.concatenate([order[starts[unit] : starts[unit + 1]] for unit in drawn])
        if len(np.unique(tiers[index])) > 1:
            return index


def bootstrap_preset(n_train: int) -> Preset:
    """The preset for resamples of about ``n_train`` images."""
    steps_per_epoch = max(1, -(-n_train // BATCH))
    return Preset(BATCH, LEARNING_RATE, min(EPOCHS, -(-STEPS // steps_per_epoch)))


def write_bootstrap(
    run: Run,
    images: GradedImages,
    learned: Sequence[str],
    config: Config,
    info: ModelInfo,
    store: FeatureStore,
) -> BootstrapDone:
    """Train ``config.train.bootstrap`` heads and keep them beside the run's model.

    Args:
        run: a run whose model and held-out scores are there.
        images: its graded images.
        learned: the splits that the model was trained on, from which resamples are drawn.
        config: its settings.
        info: what the model looks at.
        store: the features of the images.

    Raises:
        DataError: the run has no held-out scores.
        TrainingError: a loss is not finite.
    """
    started = time.monotonic()
    held_out = load_held_out(run.path, info.tiers)
    if held_out is None:
        raise DataError(f"{run.path} has no held-out scores to line bootstrap heads up with")
    images = images.part("train", "val")
    within, label = config.evaluate.within, config.train.label
    rows = images.rows(store, info.features, info.views, within, label=label)
    index = np.flatnonzero([split in learned for split in images.splits])
    tasks = _tasks(images, rows, index, config)
    trained = train_heads(rows, tasks, resolve_device(config.runtime.device))
    if not all(head.finite for head in trained):
        raise TrainingError(
            "The loss of a bootstrap head is not finite. Likely cause: features that are not finite "
            "(`mirip-fast cache verify`). The head itself is trained; train without --bootstrap to keep it."
        )
    members, accuracies = [], []
    reference = _Reference.of(rows, held_out)
    for head, task in zip(trained, tasks, strict=True):
        member, accuracy = reference.line_up(NumpyHead(head.arrays), task.train)
        members.append(member)
        accuracies.append(accuracy)
    save_bootstrap(run.model, members, info)
    theirs, own = (float(value) for value in np.nanmean(np.array(accuracies), axis=0))
    done = BootstrapDone(len(members), theirs, own, time.monotonic() - started)
    log.info(
        "%d bootstrap heads in %.1f s; on works they had not seen their pairwise accuracy is %.4f on "
        "average, the model's own %.4f",
        done.heads,
        done.seconds,
        done.accuracy,
        done.own_accuracy,
    )
    return done


def _tasks(images: GradedImages, rows: Rows, learned: Index, config: Config) -> list[HeadTask]:
    units = np.unique(units_of(images)[learned], return_inverse=True)[1].astype(np.int64)
    narrow, preset = bootstrap_config(config), bootstrap_preset(len(learned))
    tasks = []
    for number in range(config.train.bootstrap):
        rng = np.random.default_rng([config.train.seed, number])
        resample = learned[draw_resample(units, rows.tiers[learned], rng)]
        train = dataclasses.replace(narrow.train, seed=config.train.seed + 1 + number)
        own = dataclasses.replace(narrow, train=train)
        tasks.append(HeadTask(resample, np.empty(0, np.int64), own, preset))
    return tasks


@dataclass(frozen=True)
class _Reference:
    """The works with held-out scores, on which bootstrap heads are brought to the model's unit.

    Attributes:
        rows: all works.
        index: [m] those with a held-out score.
        scores: [m], the model's own.
    """

    rows: Rows
    index: Index
    scores: NDArray[np.float64]

    @classmethod
    def of(cls, rows: Rows, held_out: HeldOut) -> _Reference:
        """Find the works by their ids."""
        place = {image_id: i for i, image_id in enumerate(rows.ids)}
        index = np.array([place[image_id] for image_id in held_out.ids], dtype=np.int64)
        return cls(rows, index, held_out.scores)

    def line_up(self, head: NumpyHead, resample: Index) -> tuple[Member, tuple[float, float]]:
        """The head with its line, and the accuracies of head and model on works it had not seen."""
        unseen = ~np.isin(self.index, resample)
        if (
            unseen.sum() < 2
        ):  # too few to know a mean and a spread by: those of the seen ones will do
            unseen[:] = True
        index, own = self.index[unseen], self.scores[unseen]
        features = self.rows.features[index]
        n, views, width = features.shape
        scores = head(features.reshape(-1, width)).reshape(n, views).mean(1).astype(np.float64)
        spread = (scores.std() / own.std()) if scores.std() > 0 and own.std() > 0 else 1.0
        member = Member(head, float(scores.mean() - own.mean() * spread), float(spread))
        return member, (self._accuracy(scores, index), self._accuracy(own, index))

    def _accuracy(self, scores: NDArray[np.float64], index: Index) -> float:
        return PairCounter(scores, self.rows.tiers[index]).accuracy()


def bootstrap_config(config: Config) -> Config:
    """A run's settings with the widths of bootstrap heads."""
    head = config.head
    hidden, output, score = WIDTHS
    own = dataclasses.replace(
        head,
        projector_hidden_dim=min(hidden, head.projector_hidden_dim),
        projector_output_dim=min(output, head.projector_output_dim),
        score_hidden_dim=min(score, head.score_hidden_dim),
    )
    return dataclasses.replace(config, head=own)
