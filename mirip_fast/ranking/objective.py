"""What a head learns: rows on the device, which images make a pair, what it costs, which are in order."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mirip_fast.config import TrainConfig
from mirip_fast.errors import ConfigError, DataError
from mirip_fast.evaluation.metrics import PairCounter, listed_accuracy, ranks
from mirip_fast.models.head import RankingHead
from mirip_fast.models.losses import PairLoss, count_pairs, pair_loss
from mirip_fast.ranking.rows import Rows
from mirip_fast.text import counted

#: Values of ``--pairs`` that name no file.
ALL, SAMPLED = "all", "sampled"

# Rows that go through the head at a time. What 1,024 rows leave in a layer is small enough for the allocator
# to keep; larger pieces go back to the system after each pass, and every page of theirs is fetched anew
# (100,000 rows in one piece: 800,000 page faults, a quarter of the time). A GPU likes them large.
_CPU_ROWS, _GPU_ROWS = 1_024, 65_536
_NUMBERS = 1 << 28  # numbers at a time, at most: rows of patch tokens are wide


@dataclass(frozen=True)
class DeviceRows:
    """n images on the training device; features in half precision on a GPU, fp32 on a CPU.

    Attributes:
        features: [n, V, D].
        tiers: [n] int64, all −1 where the images have none.
        within: [n] int64, or None.
        tier_scores: [n] float64 (float32 on MPS, which has no other), or None.
        pairs: [p, 2] rows, [p] labels and [p] weights of judged pairs, or None.
        grades: [n, G] int64 tiers by several graders, −1 for none; or None.
        sets: [n] int64, number of each image's set where sets are graded (applicants), or None.
    """

    features: torch.Tensor
    tiers: torch.Tensor
    within: torch.Tensor | None
    tier_scores: torch.Tensor | None
    pairs: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
    grades: torch.Tensor | None = None
    sets: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.tiers)

    def by_set(self, scores: torch.Tensor) -> tuple[torch.Tensor, DeviceRows]:
        """The mean score [s] of each set's rows, with the graph of ``scores`` [n], and the sets' labels."""
        if self.sets is None:
            return scores, self
        numbers, of, count = torch.unique(self.sets, return_inverse=True, return_counts=True)
        means = scores.new_zeros(len(numbers)).index_add(0, of, scores) / count
        places = torch.arange(len(of), device=of.device)
        first = torch.empty_like(numbers).scatter_(
            0, of, places
        )  # any one: their grades are the same
        return means, dataclasses.replace(self.at(first), sets=None)

    def at(self, index: torch.Tensor) -> DeviceRows:
        """The rows with these indexes, without judged pairs."""
        columns: dict[str, Any] = {
            name: None if v is None else v[index]
            for name, v in vars(self).items()
            if name != "pairs"
        }
        return DeviceRows(**columns, pairs=None)

    @classmethod
    def of(cls, rows: Rows, device: torch.device) -> DeviceRows:
        """Bring rows to a device; on a CPU the features are shared, not copied."""
        half = torch.float16 if device.type == "cuda" else torch.float32
        real = torch.float32 if device.type == "mps" else torch.float64

        def bring(array: NDArray[Any] | None, dtype: torch.dtype | None = None) -> Any:
            return None if array is None else torch.from_numpy(array).to(device, dtype)

        pairs = rows.pairs
        return cls(
            features=bring(rows.features, half),
            tiers=bring(rows.tiers),
            within=bring(rows.within),
            tier_scores=bring(rows.tier_scores, real),
            pairs=None
            if pairs is None
            else (bring(pairs.images), bring(pairs.label), bring(pairs.weight, real)),
            grades=bring(rows.grades),
            sets=bring(rows.sets),
        )

    def sample(self, n: int, seed: int) -> DeviceRows:
        """``n`` of the rows, always the same for a seed; all where there are no more, or pairs are judged."""
        if len(self) <= n or self.pairs is not None:
            return self
        chosen = np.sort(np.random.default_rng(seed).choice(len(self), n, replace=False))
        return self.at(torch.from_numpy(chosen).to(self.tiers.device))


@torch.inference_mode()
def score_rows(head: RankingHead, features: torch.Tensor) -> torch.Tensor:
    """Scores of [n, V, D] features: the mean over the views, in chunks; [n] float32."""
    head.eval()
    scores = [
        head(chunk.flatten(0, 1).float()).view(chunk.shape[:2]).mean(dim=1)
        for chunk in torch.split(features, _at_a_time(features))
    ]
    return torch.cat(scores) if scores else torch.empty(0)


def score_one_view(
    head: RankingHead, rows: DeviceRows, index: torch.Tensor, rng: np.random.Generator
) -> torch.Tensor:
    """Scores [B] of the rows in ``index`` [B], with their graph, in chunks; of several views, each row shows
    a drawn one."""
    n_views = rows.features.shape[1]
    size = _at_a_time(rows.features)
    if n_views == 1:
        parts = [rows.features[part, 0] for part in torch.split(index, size)]
    else:
        view = torch.from_numpy(rng.integers(n_views, size=len(index))).to(index.device)
        chunks = zip(torch.split(index, size), torch.split(view, size), strict=True)
        parts = [rows.features[part, shown] for part, shown in chunks]
    scores: list[torch.Tensor] = [head(part.float()) for part in parts]
    return scores[0] if len(scores) == 1 else torch.cat(scores)


def _at_a_time(features: torch.Tensor) -> int:
    most = _CPU_ROWS if features.device.type == "cpu" else _GPU_ROWS
    return max(16, min(most, _NUMBERS // features.shape[-1]))


class Objective:
    """The pairs that a head learns from, and how well it orders them.

    Args:
        config: the settings.
        train: the training rows; where they have judged pairs, these are learned.

    Raises:
        ConfigError: settings that do not go together.
    """

    def __init__(self, config: TrainConfig, train: Rows):
        self.loss = make_loss(config)
        # Where pairs are drawn: labels and the codes inside which pairs count, of images or of the gradings
        # of images by several graders, then with the image of each grading.
        self._drawn_of: tuple[NDArray[Any], NDArray[np.int64] | None] | None = None
        self._grading: NDArray[np.int64] | None = None
        if config.pairs == SAMPLED and train.grades is not None:
            place, tiers, inside, _ = (t.numpy() for t in by_grader(*_graded(train)))
            self._grading, self._drawn_of = place, (-tiers, inside)
        elif config.pairs == SAMPLED:
            labels = -train.tiers if config.label == "tier" else _labels(train, self.loss)
            self._drawn_of = labels, train.within
        self._sets: list[NDArray[np.int64]] | None = None
        if train.sets is not None:
            if self._drawn_of is not None:
                raise ConfigError(
                    "--pairs sampled draws pairs of works; applicants were graded: leave it out"
                )
            self._sets = [np.flatnonzero(train.sets == number) for number in np.unique(train.sets)]
        #: What an epoch has of what a batch is counted in: images, sets of them, or pairs.
        self.units = len(train if self._sets is None else self._sets)
        if train.pairs is not None:
            self.units = len(train.pairs)
        elif self._drawn_of is not None:
            self.units = len(draw_partners(*self._drawn_of, np.random.default_rng(0)))

    def batches(self, batch_size: int, rng: np.random.Generator) -> list[NDArray[np.int64]]:
        """An epoch's batches: images [B] (of whole sets where these are graded), drawn pairs [B, 2], or
        numbers of judged pairs [B]."""
        if self._sets is not None:
            of_sets = _split(rng.permutation(self.units), batch_size)
            return [np.concatenate([self._sets[i] for i in batch]) for batch in of_sets]
        if self._drawn_of is None:
            return _split(rng.permutation(self.units), batch_size)
        drawn = draw_partners(*self._drawn_of, rng)
        return _split(drawn if self._grading is None else self._grading[drawn], batch_size)

    def batch_loss(
        self,
        head: RankingHead,
        rows: DeviceRows,
        batch: NDArray[np.int64],
        rng: np.random.Generator,
    ) -> torch.Tensor:
        """The loss of one of the :meth:`batches` of the training rows."""
        chosen = torch.from_numpy(batch).to(rows.features.device)
        if rows.pairs is None and batch.ndim == 1:
            scores = score_one_view(head, rows, chosen, rng)
            within = None if rows.within is None else rows.within[chosen]
            if rows.grades is not None:
                place, tiers, inside, weights = by_grader(rows.grades[chosen], within)
                return self.loss(scores[place], tiers, inside, weights)
            if rows.sets is None:
                return self.loss(scores, _labels(rows, self.loss)[chosen], within)
            scores, graded = rows.at(chosen).by_set(scores)
            return self.loss(scores, _labels(graded, self.loss), graded.within)
        if rows.pairs is None:
            images, label, weight = chosen, torch.ones_like(chosen[:, 0]), None
        else:
            images, label, weight = (tensor[chosen] for tensor in rows.pairs)
        scores = score_one_view(head, rows, images.reshape(-1), rng).view(-1, 2)
        return self._listed(scores, label, weight)

    def judge(self, head: RankingHead, rows: DeviceRows) -> tuple[float, float, float | None]:
        """How a head does on the rows of one split, nothing learned.

        Returns:
            The loss, the mean over the pairs; the accuracy, the share (0–1) of the pairs in the right order:
            of judged pairs by their weight, ties left aside; else of all pairs or, with a within column, of
            those inside it; NaN without a pair; and the same of pairs of different tiers, where the accuracy
            is of other pairs and the images have tiers.
        """
        scores, of_tiers = score_rows(head, rows.features), self.loss.label == "tier"
        if rows.pairs is not None:
            images, label, weight = rows.pairs
            accuracy = _listed_accuracy(scores[images], label, weight)
            if not math.isnan(accuracy):
                loss = self._listed(scores[images], label, weight)
                return float(loss), accuracy, _accuracy(scores, rows.tiers, None)
        if rows.grades is not None:
            place, tiers, inside, weights = by_grader(rows.grades, rows.within)
            loss = self.loss(scores[place], tiers, inside, weights)
            found = _accuracy(scores[place], tiers, inside)
            return float(loss), math.nan if found is None else found, None
        scores, rows = rows.by_set(scores)
        # Judged pairs are few, and may all lie elsewhere: then the tiers are what is left to judge by.
        loss = self.loss(scores, _labels(rows, self.loss), rows.within)
        by_tier = found = _accuracy(scores, rows.tiers, rows.within)
        if rows.tier_scores is not None and not of_tiers:
            order = torch.from_numpy(ranks(rows.tier_scores.cpu().numpy()))
            found = _accuracy(scores, order, rows.within, finer=True)
        return float(loss), math.nan if found is None else found, None if of_tiers else by_tier

    def _listed(
        self, scores: torch.Tensor, label: torch.Tensor, weight: torch.Tensor | None
    ) -> torch.Tensor:
        how = {name: getattr(self.loss, name) for name in ("kind", "margin", "label_smoothing")}
        return pair_loss(scores[:, 0], scores[:, 1], label, weight=weight, **how)


def by_grader(
    grades: torch.Tensor, within: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradings of n works by G graders: of each the work, its tier, where its pairs are, its weight.

    A grading has pairs with those of the same grader alone, as one may be stricter than another. A grading of
    a work with m grades weighs 1 / √m, so that two works that the same m graders ordered count as one pair.

    Args:
        grades: [n, G] tiers, −1 for none.
        within: [n] codes, not negative, inside which pairs count; None: all.
    """
    there = grades >= 0
    place, grader = there.nonzero(as_tuple=True)
    inside = grader if within is None else grader + grades.shape[1] * within[place]
    weight: torch.Tensor = there.sum(dim=1).float().rsqrt()[place]
    return place, grades[there], inside, weight


def draw_partners(
    labels: NDArray[np.generic], within: NDArray[np.int64] | None, rng: np.random.Generator
) -> NDArray[np.int64]:
    """The classic recipe's epoch: for every image one partner, drawn uniformly from those it differs from.

    Args:
        labels: [n], higher is better; two images of different labels are a pair.
        within: [n] integers; only images of the same value are a pair. None: all.
        rng: draws.

    Returns:
        [p, 2] indices in random order, the better image first; images without a partner draw none.
    """
    label = np.unique(labels, return_inverse=True)[1]
    group = np.unique(np.zeros(len(label)) if within is None else within, return_inverse=True)[1]
    # Each group's images lie together, and in it those of one label, which are not its partners.
    order = np.lexsort((label, group))
    group, block = (codes[order] for codes in (group, group * (len(label) + 1) + label))
    start = np.searchsorted(group, group)
    worse = np.searchsorted(block, block) - start
    alike = np.searchsorted(block, block, side="right") - start - worse
    partners = np.searchsorted(group, group, side="right") - start - alike
    place = np.flatnonzero(partners)
    number = (rng.random(len(place)) * partners[place]).astype(np.int64)
    wins = number < worse[place]
    other = start[place] + number + np.where(wins, 0, alike[place])
    image, partner = order[place], order[other]
    pairs = np.stack([np.where(wins, image, partner), np.where(wins, partner, image)], axis=1)
    return pairs[rng.permutation(len(pairs))]


def _split(drawn: NDArray[np.int64], batch_size: int) -> list[NDArray[np.int64]]:
    """Batches of nearly equal size, none larger than ``batch_size``.

    Equal sizes, because a small last batch would have few pairs and the same say as the others.
    """
    return np.array_split(drawn, max(1, -(-len(drawn) // batch_size)))


def epoch_generator(seed: int, epoch: int) -> np.random.Generator:
    """Random numbers of one epoch, the same whether the run was interrupted before it or not."""
    return np.random.default_rng([seed, epoch])


def make_loss(config: TrainConfig) -> PairLoss:
    """The loss that the settings ask for.

    Raises:
        ConfigError: settings that do not go together, in the words of the command line.
    """
    listed = config.pairs not in (ALL, SAMPLED)
    if config.label_smoothing > 0 and config.loss != "logistic":
        raise ConfigError(
            "--label-smoothing goes with --loss logistic; the margin loss has no probabilities to smooth"
        )
    if config.label == "pairs" and not listed:
        raise ConfigError("--label pairs goes with --pairs FILE.csv, whose pairs alone are learned")
    if not listed and config.pairs_zero is not None:
        raise ConfigError("--pairs-zero goes with --pairs FILE.csv, whose labels it explains")
    label = "tier" if config.label == "pairs" else config.label
    return PairLoss(config.loss, config.margin, config.label_smoothing, label)


def describe_pairs(config: TrainConfig, train: Rows) -> str:
    """Which pairs teach and decide which epoch is best, for a log line."""
    if train.pairs is not None:
        ties = int((train.pairs.label == 0).sum())
        return f"{len(train.pairs):,} judged pairs" + (f" ({ties:,} ties)" if ties else "")
    text = "sampled pairs" if config.pairs == SAMPLED else "all pairs"
    text += " of different tier_score" if config.label == "tier_score" else ""
    text += "" if train.grades is None else f" by one of {train.grades.shape[1]} graders"
    text += "" if train.sets is None else " of applicants, each by the mean of their works' scores,"
    return text + ("" if train.within is None else " inside one value of the --within column")


def pairs_files(config: TrainConfig) -> list[Path]:
    """The files that ``--pairs`` names; none for all and sampled.

    Raises:
        ConfigError: there is no such file, or one is named twice.
    """
    if config.pairs in (ALL, SAMPLED):
        return []
    whole = Path(config.pairs).expanduser()  # its name may have a comma in it
    names = [config.pairs] if whole.is_file() else config.pairs.split(",")
    paths = [Path(name.strip()).expanduser() for name in names]
    for name, path in zip(names, paths, strict=True):
        if not path.is_file():
            raise ConfigError(
                f"--pairs {name}: use all, sampled, or a CSV file of judged pairs; there is no such file"
            )
    if len({path.resolve() for path in paths}) < len(paths):
        raise ConfigError(
            f"--pairs {config.pairs}: one file is named twice; each judgement counts once"
        )
    return paths


def require_pairs(rows: Rows, loss: PairLoss, split: str) -> None:
    """Refuse rows of a split in which the settings leave no pair to learn from or to judge by.

    Raises:
        DataError: says what the pairs were to be.
    """
    if rows.pairs is not None and rows.pairs.decided:
        return
    if rows.pairs is not None and (split == "train" or not rows.has_tiers):
        raise DataError(
            f"No judged pair lies inside the {split} split (ties and weights of 0 left aside). A pair counts "
            "where both its images are in one split: judge more pairs, make the split larger (--train-ratio "
            "0.6 --val-ratio 0.2 --test-ratio 0.2), or give split files (--metadata, --val-metadata) "
            "that keep judged images together."
        )
    within = None if rows.within is None else torch.from_numpy(rows.within)
    labels = torch.from_numpy(_labels(rows, loss))
    if rows.grades is not None:
        _, labels, within, _ = by_grader(*_graded(rows))
    if not count_pairs(labels, within):
        what = "tiers" if loss.label == "tier" else "grades"
        where = "" if rows.within is None else " inside one value of the --within column"
        where += "" if rows.grades is None else " by one grader"
        raise DataError(
            f"The {split} split has {counted(len(rows), 'image')} and no pair of different {what}{where}: "
            "there is nothing to compare. More graded images are needed, or another --val-ratio."
        )


def _graded(rows: Rows) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What :func:`by_grader` takes of rows with grades."""
    assert rows.grades is not None
    within = None if rows.within is None else torch.from_numpy(rows.within)
    return torch.from_numpy(rows.grades), within


def _labels(rows: Any, loss: PairLoss) -> Any:
    """What the loss takes as labels [n] of :class:`Rows` or :class:`DeviceRows`."""
    labels = rows.tiers if loss.label == "tier" else rows.tier_scores
    assert labels is not None
    return labels


def _accuracy(
    scores: torch.Tensor, tiers: torch.Tensor, within: torch.Tensor | None, *, finer: bool = False
) -> float | None:
    """Pairwise accuracy of scores [n] by tiers (0 is best); None without a pair, or tiers of all."""
    if bool((tiers < 0).any()) or not bool(torch.isfinite(scores).all()):
        return None
    groups = None if within is None else within.cpu().numpy()
    counter = PairCounter(scores.cpu().numpy(), tiers.cpu().numpy(), within=groups, finer=finer)
    right, pairs = (sums.sum() for sums in counter.by_cell())
    return float(right / pairs) if pairs else None


def _listed_accuracy(scores: torch.Tensor, label: torch.Tensor, weight: torch.Tensor) -> float:
    """Share (0–1), by weight, of pairs [p, 2] in the right order, ties left aside, equal scores ½; or NaN."""
    verdict = label.cpu().double()
    margins = (scores[:, 0] - scores[:, 1]).detach().cpu().double() * verdict
    return listed_accuracy(margins.numpy(), (weight.cpu().double() * verdict.abs()).numpy())
