"""How a model agrees with the people who judged pairs of a run's images."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mirip_fast.config import Config
from mirip_fast.evaluation.bootstrap import bootstrap
from mirip_fast.evaluation.metrics import listed_accuracy
from mirip_fast.ranking.graded import load_split
from mirip_fast.ranking.judged_pairs import load_judged_pairs
from mirip_fast.ranking.rows import ListedPairs, open_store
from mirip_fast.ranking.scorer import ScoreModel
from mirip_fast.settings import config_from_dict
from mirip_fast.training.run_folder import SPLIT_FILE, Run


@dataclass(frozen=True)
class PairReport:
    """Agreement with judged pairs of one split.

    Attributes:
        pairs: how many, without ties.
        ties: how many ties, which are left aside.
        accuracy: share (0–1), by weight, in which the better image has the higher score; equal scores
            count ½. None without a pair.
        interval: 95 % of a bootstrap over groups of images (a pair counts with the product of its images'
            counts); None without rounds or with fewer than two groups.
        split: the split.
        graded: whether the images have tiers too.
    """

    pairs: int
    ties: int
    accuracy: float | None
    interval: tuple[float, float] | None
    split: str
    graded: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self)

    def to_text(self) -> str:
        """One line."""
        if self.accuracy is None:
            return f"Judged pairs of the {self.split} split: none to judge by"
        span = (
            "interval unknown"
            if self.interval is None
            else "95 % interval {:.4f} – {:.4f}".format(*self.interval)
        )
        return (
            f"Judged pairs of the {self.split} split: accuracy {self.accuracy:.4f} ({span}) over "
            f"{self.pairs:,} pairs; {self.ties:,} ties left aside"
        )


def evaluate_pairs(model: ScoreModel, split: str, config: Config) -> PairReport | None:
    """Judge a model by the pairs that people judged in one split of its run; None if the run has none.

    Raises:
        DataError: the run's files are damaged.
        StoreError: the features are not in the cache any more.
    """
    folder = Path(model.checkpoint).parent
    if not Run(folder).has(SPLIT_FILE):
        return None
    data = config_from_dict({"data": Run(folder).info.get("data", {})}).data
    images = load_split(folder / SPLIT_FILE, model.info.tiers, data)
    judged = load_judged_pairs(folder, images)
    if judged is None:
        return None
    part = judged.part(split, images, only_judged=True)
    pairs = judged.listed(split, images, part)
    graded = images.manifest.has_grades
    ties = int((pairs.label == 0).sum())
    if not pairs.decided:
        return PairReport(0, ties, None, None, split, graded)
    store = open_store(Path(config.embed.cache_dir), model.info)
    scores = model.score(store, part.hashes)
    groups = [record.group or record.image_id for record in part.manifest.records]
    codes = np.unique(np.array(groups), return_inverse=True)[1]
    accuracy, interval = agreement(scores, pairs, codes, config.evaluate.bootstrap_rounds)
    return PairReport(pairs.decided, ties, accuracy, interval, split, graded)


def agreement(
    scores: NDArray[np.floating],
    pairs: ListedPairs,
    groups: NDArray[np.int64],
    rounds: int,
    seed: int = 0,
) -> tuple[float, tuple[float, float] | None]:
    """Weighted share of judged pairs in the right order, and its 95 % bootstrap interval over groups.

    Args:
        scores: [n], higher is better.
        pairs: at least one that is decided.
        groups: [n] codes from 0; resampled as a whole.
        rounds: of the bootstrap; rounds that hold no pair are left out.
        seed: of the resampling.
    """
    one, other = pairs.images.T
    weight = pairs.weight * np.abs(pairs.label)
    margins = (scores[one] - scores[other]) * pairs.label
    if int(groups.max()) < 1:
        rounds = 0

    def statistic(times: NDArray[np.int64]) -> dict[str, float]:
        return {"accuracy": listed_accuracy(margins, weight * times[one] * times[other])}

    interval = bootstrap(statistic, groups, rounds=rounds, seed=seed).get("accuracy")
    span = None if interval is None else (interval.low, interval.high)
    return listed_accuracy(margins, weight), span
