"""The judged pairs of a run: which split each belongs to, kept in its folder, and how a model orders them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mirip_fast.config import Config
from mirip_fast.data.csv_reader import counted, shown
from mirip_fast.data.pair_files import LABEL, WEIGHT, read_pairs
from mirip_fast.data.splits import SPLITS
from mirip_fast.data.table import joined
from mirip_fast.errors import DataError
from mirip_fast.evaluation.bootstrap import bootstrap
from mirip_fast.evaluation.metrics import listed_accuracy
from mirip_fast.files import has_file, read_csv, write_csv
from mirip_fast.ranking.graded import GradedImages, load_split
from mirip_fast.ranking.rows import ListedPairs, open_store
from mirip_fast.ranking.scorer import ScoreModel
from mirip_fast.training.run_folder import SPLIT_FILE, Run

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

#: File in a run's folder: every pair of the file that was given, with its split or why it has none.
PAIRS_FILE = "pairs.csv"

_COLUMNS = ("image_id_1", "image_id_2", LABEL, WEIGHT, "split", "dropped", "file", "row")
_FEW = 30  # validation pairs; fewer say little about which epoch is best


@dataclass(frozen=True)
class JudgedPairs:
    """Judged pairs that lie inside one split each.

    Attributes:
        splits: [p] train, val or test.
        images: [p, 2] int64, indexes among the run's images.
        label: [p] int64, see :class:`ListedPairs`.
        weight: [p] float64.
        table: every row of the file that was given, with its split or why it was dropped.
    """

    splits: Sequence[str]
    images: NDArray[np.int64]
    label: NDArray[np.int64]
    weight: NDArray[np.float64]
    table: Sequence[Mapping[str, object]]

    def decided(self, split: str) -> int:
        """Pairs of a split that are no tie and weigh something."""
        here = (self.label != 0) & (self.weight > 0) & (np.array(self.splits) == split)
        return int(here.sum())

    @property
    def can_choose(self) -> bool:
        """Whether the validation pairs are enough to choose the best epoch by."""
        return self.decided("val") >= _FEW

    def part(self, split: str, images: GradedImages, *, only_judged: bool = False) -> GradedImages:
        """The images of one split; with ``only_judged`` those of them that are in a pair."""
        keep = np.array(images.splits) == split
        if only_judged:
            keep = np.zeros(len(images), dtype=bool)
            keep[self.images[np.array(self.splits) == split]] = True
        return images.subset(np.flatnonzero(keep))

    def listed(self, split: str, images: GradedImages, part: GradedImages) -> ListedPairs:
        """The pairs of one split, as rows of its :meth:`part`."""
        place = {image_id: i for i, image_id in enumerate(part.manifest.ids)}
        ids = images.manifest.ids
        here = np.flatnonzero(np.array(self.splits) == split)
        rows = [[place[ids[i]] for i in pair] for pair in self.images[here]]
        return ListedPairs(
            np.array(rows, dtype=np.int64).reshape(-1, 2), self.label[here], self.weight[here]
        )


def read_judged_pairs(
    paths: Sequence[Path],
    images: GradedImages,
    left_out: pd.DataFrame,
    zero: str | None = None,
    *,
    across: bool = False,
) -> JudgedPairs:
    """Read the pairs files of a run.

    Pairs whose images lie in different splits are dropped, as are those with an image that could not be
    embedded and those of one picture under two names; they are counted.

    Args:
        paths: the files, at least one; all their pairs count.
        images: the run's images.
        left_out: images of the data set that could not be embedded.
        zero: what the label 0 means, see :func:`mirip_fast.data.pair_files.read_pairs`.
        across: keep pairs of a train and a val image, as pairs of train: for a readout that learns from both.

    Raises:
        DataError: faulty rows.
    """
    manifest = images.manifest
    whole = joined([manifest.table, left_out])
    ids = whole["image_id"].tolist()
    places = [*manifest.places, manifest.root]
    judged = read_pairs(paths, whole, places, zero=zero, encoding=manifest.options.encoding)
    fates = [_fate(images, int(one), int(other), across) for one, other in judged.images]
    table = [
        {
            **judged.extra[i],
            "image_id_1": ids[judged.images[i, 0]],
            "image_id_2": ids[judged.images[i, 1]],
            LABEL: int(judged.label[i]),
            WEIGHT: repr(float(judged.weight[i])),
            "split": fate if fate in SPLITS else None,
            "dropped": None if fate in SPLITS else fate,
            "file": shown(judged.files[i]),
            "row": judged.rows[i],
        }
        for i, fate in enumerate(fates)
    ]
    used = np.array([i for i, fate in enumerate(fates) if fate in SPLITS], dtype=np.int64)
    pairs = JudgedPairs(
        [fates[i] for i in used],
        judged.images[used],
        judged.label[used],
        judged.weight[used],
        table,
    )
    return pairs


def save_judged_pairs(folder: Path, pairs: JudgedPairs) -> None:
    """Write pairs.csv into a run's folder."""
    columns = dict.fromkeys([*_COLUMNS, *(name for row in pairs.table for name in row)])
    write_csv(folder / PAIRS_FILE, columns, pairs.table)


def load_judged_pairs(folder: Path, images: GradedImages) -> JudgedPairs | None:
    """Read the pairs of a run; None where it has none.

    Raises:
        DataError: the file is damaged.
    """
    path = folder / PAIRS_FILE
    number = {image_id: i for i, image_id in enumerate(images.manifest.ids)}
    try:
        if not has_file(path):
            return None
        table = read_csv(path, _COLUMNS)
        rows = [row for row in table if row["split"]]
        places = [[number[row["image_id_1"]], number[row["image_id_2"]]] for row in rows]
        return JudgedPairs(
            splits=[row["split"] for row in rows],
            images=np.array(places, dtype=np.int64).reshape(-1, 2),
            label=np.array([int(row[LABEL]) for row in rows], dtype=np.int64),
            weight=np.array([float(row[WEIGHT]) for row in rows], dtype=np.float64),
            table=table,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _fate(images: GradedImages, one: int, other: int, across: bool) -> str:
    """The split of a pair, or why it is dropped."""
    n = len(images)
    if one >= n or other >= n:
        return "an image could not be embedded"
    if images.hashes[one] == images.hashes[other]:
        return "the same picture under two names"
    splits = {images.splits[one], images.splits[other]}
    if across and splits == {"train", "val"}:
        return "train"
    return "images in different splits" if len(splits) > 1 else splits.pop()


def tell_pairs(paths: Sequence[Path], pairs: JudgedPairs) -> None:
    """Tell how many pairs of these files are used in which split, and how many are dropped, and why."""
    fates = Counter(str(row["split"] or row["dropped"]) for row in pairs.table)
    used = ", ".join(f"{split} {fates[split]:,}" for split in SPLITS)
    total = counted(sum(fates.values()), "judged pair")
    log.info("%s: %s; used: %s", ", ".join(map(shown, paths)), total, used)
    dropped = {why: count for why, count in fates.items() if why not in SPLITS}
    if dropped:
        reasons = "; ".join(f"{why} {count:,}" for why, count in sorted(dropped.items()))
        log.warning("%s dropped: %s", counted(sum(dropped.values()), "pair"), reasons)


def warn_of_few(pairs: JudgedPairs, *, graded: bool) -> None:
    """Tell where the val split has hardly a pair to choose the best epoch by."""
    if not pairs.can_choose:
        log.warning(
            "Only %s in the val split, where both images of a pair have to be%s. A larger one "
            "(--train-ratio 0.6 --val-ratio 0.2 --test-ratio 0.2), groups in the data or split files "
            "(--metadata, --val-metadata) give more.",
            counted(pairs.decided("val"), "judged pair"),
            ": the tiers choose the best epoch" if graded else " to choose the best epoch by",
        )


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
    images = load_split(folder / SPLIT_FILE, model.info.tiers)
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
    known = zip(part.manifest.groups, part.manifest.ids, strict=True)
    groups = [group or name for group, name in known]
    codes = np.unique(np.array(groups), return_inverse=True)[1]
    accuracy, interval = share_in_order(scores, pairs, codes, config.evaluate.bootstrap_rounds)
    return PairReport(pairs.decided, ties, accuracy, interval, split, graded)


def share_in_order(
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
