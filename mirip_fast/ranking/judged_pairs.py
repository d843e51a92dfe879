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
from mirip_fast.data.pair_files import (
    CONTENT,
    LABEL,
    PAIR_COLUMNS,
    WEIGHT,
    read_pairs,
    works_in,
)
from mirip_fast.data.splits import SPLITS
from mirip_fast.errors import DataError, MiripError, StoreError
from mirip_fast.evaluation.bootstrap import bootstrap
from mirip_fast.evaluation.metrics import listed_accuracy
from mirip_fast.features.datasets import Dataset, find_datasets
from mirip_fast.features.recipe import View
from mirip_fast.features.store import FeatureStore
from mirip_fast.files import has_file, read_csv, write_csv
from mirip_fast.ranking.graded import GradedImages, load_split
from mirip_fast.ranking.rows import ListedPairs, Rows, missing_rows, open_store, with_features
from mirip_fast.ranking.score_model import ScoreModel
from mirip_fast.text import counted, path_of, shown
from mirip_fast.training.run_folder import SPLIT_FILE, Run

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

#: File in a run's folder: every pair of the file that was given, with its split or why it has none.
PAIRS_FILE = "pairs.csv"

_COLUMNS = ("image_id_1", "image_id_2", LABEL, WEIGHT, "split", "dropped", "file", "row")
_FEW = 30  # validation pairs; fewer say little about which epoch is best


_DIFFERENT = "images in different splits"


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

    @classmethod
    def of(cls, table: Sequence[Mapping[str, Any]], images: GradedImages) -> JudgedPairs:
        """The pairs among the rows of pairs.csv whose works are among the run's images."""
        ids, hashes = images.ids, images.hashes
        if table and CONTENT[0] in table[0]:
            number = {sha.hex(): i for i, sha in enumerate(hashes)}
            rows = [r for r in table if r["split"] and all(r[c] in number for c in CONTENT)]
            places = [[number[row[c]] for c in CONTENT] for row in rows]
        else:  # of earlier versions
            number = {image_id: i for i, image_id in enumerate(ids)}
            rows = [row for row in table if row["split"]]
            places = [[number[row[c]] for c in _COLUMNS[:2]] for row in rows]
        splits = [row["split"] for row in rows]
        return cls(splits, *_arrays(places, rows), table)

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
        place = {image_id: i for i, image_id in enumerate(part.ids)}
        ids = images.ids
        here = np.flatnonzero(np.array(self.splits) == split)
        rows = [[place[ids[i]] for i in pair] for pair in self.images[here]]
        return ListedPairs(
            np.array(rows, dtype=np.int64).reshape(-1, 2), self.label[here], self.weight[here]
        )


@dataclass(frozen=True)
class JoinedPairs:
    """Judged pairs that are learned beside grades, of works that are graded or not, here or elsewhere.

    Attributes:
        hashes: content of the m works.
        pairs: rows among them.
        table: every row of the files that were given, with its split or why it was dropped.
    """

    hashes: Sequence[bytes]
    pairs: ListedPairs
    table: Sequence[Mapping[str, object]]

    @classmethod
    def of(
        cls, table: Sequence[Mapping[str, Any]], learned: Sequence[str] = ("train",)
    ) -> JoinedPairs:
        """The pairs of these splits among the rows of pairs.csv."""
        rows = [row for row in table if row["split"] in learned]
        known: dict[str, int] = {}
        places = [[known.setdefault(row[c], len(known)) for c in CONTENT] for row in rows]
        hashes = [bytes.fromhex(sha) for sha in known]
        return cls(hashes, ListedPairs(*_arrays(places, rows)), table)

    def rows(self, store: FeatureStore, features: str, views: Sequence[View]) -> Rows:
        """Their features, and the pairs.

        Raises:
            StoreError: features are missing; says what to type.
        """
        lack = missing_rows(store, self.hashes, features, views)
        if lack:
            files = ", ".join(dict.fromkeys(str(row["file"]) for row in self.table))
            raise StoreError(
                f"{files}: {lack} of {counted(len(self.hashes), 'work')} in judged pairs have no features "
                f"({features}) in {store.path}. Embed the folder of these works as the graded ones were "
                "(same backbone and image size) and train with --data GRADED; or `--pairs all` trains "
                "without them"
            )
        n = len(self.hashes)
        labels = Rows([sha.hex() for sha in self.hashes], np.empty((n, 0, 0), np.float32),
                      np.full(n, -1), [None] * n, pairs=self.pairs)  # fmt: skip
        return with_features(labels, store, self.hashes, features, views)


def _arrays(
    places: Sequence[Sequence[int]], rows: Sequence[Mapping[str, Any]]
) -> tuple[Any, Any, Any]:
    """[p, 2] works, [p] labels and weights."""
    return (
        np.array(places, dtype=np.int64).reshape(-1, 2),
        np.array([int(row[LABEL]) for row in rows], dtype=np.int64),
        np.array([float(row[WEIGHT]) for row in rows], dtype=np.float64),
    )


def read_judged_pairs(
    paths: Sequence[Path],
    images: GradedImages,
    dataset: Dataset,
    zero: str | None = None,
    *,
    elsewhere: bool = False,
) -> list[dict[str, Any]]:
    """The rows of pairs.csv: every pair of the files of a run, with its split or why it is dropped.

    Pairs whose images lie in different splits are dropped, as are those with an image that could not be
    embedded and those of one picture under two names. A work is known by its content where the file says it,
    else by its name in the data set.

    Args:
        paths: the files, at least one; all their pairs count.
        images: the run's images.
        dataset: the data set that they are of.
        zero: what the label 0 means, see :func:`mirip_fast.data.pair_files.read_pairs`.
        elsewhere: works without a split count as train, and a file may name those of another data set that
            is embedded in the same cache.

    Raises:
        DataError: faulty rows, or works that are not known.
    """
    split_of = dict(zip(images.hashes, images.splits, strict=True))
    table = []
    for path in paths:
        works, judged = _works_and_pairs(path, images, dataset, zero, elsewhere)
        ids, hashes = works["image_id"].tolist(), works["sha256"].tolist()
        own = judged.drop(columns=[*PAIR_COLUMNS]).to_dict("records")
        for said, given in zip(judged.to_dict("records"), own, strict=True):
            pair = said["one"], said["other"]
            contents = [hashes[work] for work in pair]
            splits = {split_of.get(sha, "train" if elsewhere else "no split") for sha in contents}
            fate = _DIFFERENT if len(splits) > 1 else splits.pop()
            if None in contents:
                fate = "an image could not be embedded"
            elif contents[0] == contents[1]:
                fate = "the same picture under two names"
            row: dict[str, Any] = {
                **{str(name): text for name, text in given.items()},
                **{c: ids[work] for c, work in zip(_COLUMNS[:2], pair, strict=True)},
                LABEL: said[LABEL],
                WEIGHT: repr(said[WEIGHT]),
                "split": fate if fate in SPLITS else None,
                "dropped": None if fate in SPLITS else fate,
                "file": shown(path),
                "row": said["row"],
                **{c: sha and sha.hex() for c, sha in zip(CONTENT, contents, strict=True)},
            }
            table.append(row)
    return table


def with_train_and_val(
    table: Sequence[dict[str, Any]], images: GradedImages, *, elsewhere: bool
) -> list[dict[str, Any]]:
    """The rows, with pairs of a train and a val image as pairs of train: for what learns from both.

    Args:
        table, images, elsewhere: of :func:`read_judged_pairs`.
    """
    known = zip(images.hashes, images.splits, strict=True)
    split_of = {sha.hex(): split for sha, split in known}
    usual = "train" if elsewhere else None
    return [
        {**row, "split": "train", "dropped": None}
        if row["dropped"] == _DIFFERENT
        and {split_of.get(row[c], usual) for c in CONTENT} == {"train", "val"}
        else row
        for row in table
    ]


def _works_and_pairs(
    path: Path, images: GradedImages, dataset: Dataset, zero: str | None, elsewhere: bool
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The works that a file is about, and its pairs of them."""
    fault, encoding = None, images.options.encoding
    works = works_in(path, encoding=encoding)
    if works is not None:
        return works, read_pairs([path], works, [], zero=zero, encoding=encoding)
    name_of = dict(zip(images.table["file"], images.table["named"], strict=True))
    others = find_datasets(dataset.store_path.parent) if elsewhere else []
    for known in (dataset, *others):
        try:
            works, info = known.images(), known.info
            works["sha256"] = works["sha256"].where(works["status"] != "failed", None)
            works["named"] = [name_of.get(file, "") for file in works["file"]]
            places = [*images.places, path_of(info["root"])]
            judged = read_pairs([path], works, places, zero=zero, encoding=encoding)
        except MiripError as error:
            fault = fault or error
            continue
        if known.folder != dataset.folder:
            log.info("%s: the works are those of %s", shown(path), shown(known.source))
        return works, judged
    assert fault is not None
    raise fault


def save_judged_pairs(run: Run, pairs: JudgedPairs | JoinedPairs | None) -> None:
    """Write pairs.csv into a run's folder, if there are pairs."""
    if pairs is None:
        return
    if isinstance(pairs, JoinedPairs):
        run.update(joined_pairs=len(pairs.pairs))
    columns = dict.fromkeys([*_COLUMNS, *(name for row in pairs.table for name in row)])
    write_csv(run.path / PAIRS_FILE, columns, pairs.table)


def load_judged_pairs(folder: Path, images: GradedImages) -> JudgedPairs | None:
    """Read the pairs of a run; None where it has none.

    Raises:
        DataError: the file is damaged.
    """
    path = folder / PAIRS_FILE
    try:
        return JudgedPairs.of(read_csv(path, _COLUMNS), images) if has_file(path) else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def load_joined_pairs(run: Run) -> JoinedPairs | None:
    """The pairs that a run learned beside grades; None where it did not.

    Raises:
        DataError: the file is damaged.
    """
    if "joined_pairs" not in run.info:
        return None
    path = run.path / PAIRS_FILE
    try:
        return JoinedPairs.of(read_csv(path, (*_COLUMNS, *CONTENT)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def tell_pairs(
    paths: Sequence[Path], table: Sequence[Mapping[str, Any]], joined: int = 0, graded: int = 0
) -> None:
    """Tell how many pairs of these files are used in which split, and how many are dropped, and why.

    Args:
        paths: the files.
        table: all of their pairs.
        joined, graded: pairs and graded works that are learned together, if they are.
    """
    fates = Counter(str(row["split"] or row["dropped"]) for row in table)
    used = ", ".join(f"{split} {fates[split]:,}" for split in SPLITS)
    total, names = counted(len(table), "judged pair"), ", ".join(map(shown, paths))
    if graded:
        works = f"{graded:,} graded works"
        log.info("%s of %s of %s join %s", f"{joined:,}", total, names, works)
    if joined < len(table):
        log.info("%s: %s; used: %s", names, total, used)
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
    graded = images.has_grades
    ties = int((pairs.label == 0).sum())
    if not pairs.decided:
        return PairReport(0, ties, None, None, split, graded)
    store = open_store(Path(config.embed.cache_dir), model.info)
    scores = model.score(store, part.hashes)
    known = zip(part.groups, part.ids, strict=True)
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
