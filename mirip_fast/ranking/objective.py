"""What a head learns: which images make a pair, what a pair costs, and which share is in order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mirip_fast.config import TrainConfig
from mirip_fast.data.csv_reader import counted
from mirip_fast.errors import ConfigError, DataError
from mirip_fast.evaluation.metrics import listed_accuracy
from mirip_fast.models.allpairs import label_accuracy
from mirip_fast.models.head import RankingHead
from mirip_fast.models.losses import PairLoss, count_pairs, pair_loss
from mirip_fast.ranking.batches import PartnerDraw, image_batches
from mirip_fast.ranking.device_rows import DeviceRows, score_one_view, score_rows
from mirip_fast.ranking.rows import Rows

#: Values of ``--pairs`` that name no file.
ALL, SAMPLED = "all", "sampled"


@dataclass(frozen=True)
class Judged:
    """How a head does on the rows of one split.

    Attributes:
        loss: mean over the pairs.
        accuracy: share (0–1) of the pairs in the right order: of judged pairs by their weight, ties left
            aside; else of all pairs or, with a within column, of those inside it. NaN without a pair.
        tier_accuracy: the same of pairs of different tiers, where ``accuracy`` is of other pairs and the
            images have tiers.
    """

    loss: float
    accuracy: float
    tier_accuracy: float | None


class Objective:
    """The pairs that a head learns from, and how well it orders them.

    Args:
        config: the settings.
        tiers: names of the tiers, best first.
        train: the training rows; where they have judged pairs, these are learned.

    Raises:
        ConfigError: settings that do not go together.
    """

    def __init__(self, config: TrainConfig, tiers: Sequence[str], train: Rows):
        self.loss = make_loss(config, tiers, within=train.within is not None)
        self._pairs = train.pairs
        self._partners: PartnerDraw | None = None
        if config.pairs == SAMPLED:
            labels = higher_is_better(train, self.loss)
            self._partners = PartnerDraw(labels, self.loss.min_gap, train.within)
        self._images = len(train)

    @property
    def units(self) -> int:
        """What an epoch has of what a batch is counted in: images, or pairs."""
        if self._pairs is not None:
            return len(self._pairs)
        return self._images if self._partners is None else len(self._partners)

    def batches(self, batch_size: int, rng: np.random.Generator) -> list[NDArray[np.int64]]:
        """An epoch's batches: images [B], drawn pairs [B, 2], or numbers of judged pairs [B]."""
        if self._partners is None:
            return list(image_batches(self.units, batch_size, rng))
        drawn = self._partners.draw(rng)
        return np.array_split(drawn, max(1, -(-len(drawn) // batch_size)))

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
            return self.loss(scores, self._labels(rows)[chosen], within)
        if rows.pairs is None:
            images, label, weight = (
                chosen,
                torch.ones_like(chosen[:, 0]),
                self._weights(rows, chosen),
            )
        else:
            images, label, weight = (tensor[chosen] for tensor in rows.pairs)
        scores = score_one_view(head, rows, images.reshape(-1), rng).view(-1, 2)
        return self._listed(scores, label, weight)

    def judge(self, head: RankingHead, rows: DeviceRows) -> Judged:
        """How a head does on rows, nothing learned."""
        scores = score_rows(head, rows.features)
        if rows.pairs is not None:
            images, label, weight = rows.pairs
            accuracy = _listed_accuracy(scores[images], label, weight)
            if accuracy is not None:
                loss = self._listed(scores[images], label, weight)
                return Judged(float(loss), accuracy, _tier_accuracy(scores, rows, None))
        # Judged pairs are few, and may all lie elsewhere: then the tiers are what is left to judge by.
        loss = self.loss(scores, self._labels(rows), rows.within)
        inside = rows.within if self.loss.within_share else None
        tier_accuracy = _tier_accuracy(scores, rows, inside)
        if self.loss.label == "tier":
            return Judged(float(loss), math.nan if tier_accuracy is None else tier_accuracy, None)
        found = _accuracy(scores, self._labels(rows), self.loss.min_gap, inside)
        return Judged(float(loss), math.nan if found is None else found, tier_accuracy)

    def _listed(
        self, scores: torch.Tensor, label: torch.Tensor, weight: torch.Tensor | None
    ) -> torch.Tensor:
        loss = self.loss
        return pair_loss(
            scores[:, 0],
            scores[:, 1],
            label,
            kind=loss.kind,
            margin=loss.margin,
            label_smoothing=loss.label_smoothing,
            weight=weight,
        )

    def _labels(self, rows: DeviceRows) -> torch.Tensor:
        """What the loss takes as labels."""
        if self.loss.label == "tier":
            return rows.tiers
        assert rows.tier_scores is not None
        return rows.tier_scores

    def _weights(self, rows: DeviceRows, pairs: torch.Tensor) -> torch.Tensor | None:
        """[p] weights of drawn pairs, the better image first."""
        if self.loss.tier_weights is None:
            return None
        table = torch.tensor(self.loss.tier_weights, device=pairs.device)
        return table[rows.tiers[pairs[:, 0]], rows.tiers[pairs[:, 1]]]


def make_loss(config: TrainConfig, tiers: Sequence[str], *, within: bool) -> PairLoss:
    """The loss that the settings ask for.

    Args:
        config: the settings.
        tiers: names of the tiers, best first.
        within: whether there is a column inside which pairs count.

    Raises:
        ConfigError: settings that do not go together, in the words of the command line.
    """
    _check(config, within)
    share = 1.0 if config.within_share is None else config.within_share
    return PairLoss(
        kind=config.loss,
        margin=config.margin,
        label_smoothing=config.label_smoothing,
        tier_weights=parse_tier_weights(config.tier_weights, tiers),
        within_share=share if within else None,
        min_gap=config.min_gap,
        label=config.label,
    )


def describe_pairs(config: TrainConfig, train: Rows) -> str:
    """Which pairs teach and decide which epoch is best, for a log line."""
    if train.pairs is not None:
        ties = int((train.pairs.label == 0).sum())
        return f"{len(train.pairs):,} judged pairs" + (f" ({ties:,} ties)" if ties else "")
    text = "all pairs" if config.pairs == ALL else "sampled pairs"
    if config.label == "tier_score":
        text += (
            f" with a tier_score at least {config.min_gap:g} apart"
            if config.min_gap
            else (" of different tier_score")
        )
    if train.within is not None:
        share = 1.0 if config.within_share is None else config.within_share
        text += " inside one value of the --within column"
        text += "" if share == 1 else f" (share {share:g}) and across them"
    return text


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


def parse_tier_weights(text: str, tiers: Sequence[str]) -> tuple[tuple[float, ...], ...] | None:
    """``S-A=2,A-B=1.5`` → [tiers][tiers] weights by (better, worse) tier, 1 where not named.

    Returns:
        The table, 0 on and below the diagonal; None for an empty text.

    Raises:
        ConfigError: an unknown pair of tiers, one twice or the wrong way round, or no weight.
    """
    if not text.strip():
        return None
    count = len(tiers)
    table = [[1.0 if b < w else 0.0 for w in range(count)] for b in range(count)]
    places = {f"{b}-{w}": (i, j) for i, b in enumerate(tiers) for j, w in enumerate(tiers)}
    seen = set()
    for entry in text.split(","):
        name, _, number = (part.strip() for part in entry.partition("="))
        better, worse = places.get(name, (0, 0))
        if better >= worse:
            turned = f"{tiers[worse]}-{tiers[better]}"
            hint = f"the better tier comes first: {turned}" if better > worse else "an example"
            example = ",".join(f"{tiers[i]}-{tiers[i + 1]}=2" for i in range(count - 1))
            raise ConfigError(
                f"--tier-weights: {entry.strip()!r} names no pair of the tiers {', '.join(tiers)} "
                f"({hint if better > worse else f'{hint}: {example}'})"
            )
        if name in seen:
            raise ConfigError(f"--tier-weights: {name} is there twice")
        seen.add(name)
        try:
            weight = float(number)
        except ValueError:
            weight = -1.0
        if not 0 <= weight < float("inf"):
            raise ConfigError(
                f"--tier-weights: {entry.strip()!r}; a weight of at least 0 is expected, as in {name}=2"
            )
        table[better][worse] = weight
    return tuple(map(tuple, table))


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
    labels = torch.from_numpy(higher_is_better(rows, loss))
    pairs = count_pairs(labels, label="tier_score", min_gap=loss.min_gap)
    where = ""
    if rows.within is not None:
        inside = count_pairs(
            labels, torch.from_numpy(rows.within), label="tier_score", min_gap=loss.min_gap
        )
        if loss.within_share == 0:
            pairs, where = pairs - inside, " across the values of the --within column"
        elif loss.within_share == 1 or split != "train":
            pairs, where = inside, " inside one value of the --within column"
    if not pairs:
        what = (
            "of different tiers" if loss.label == "tier" else f"with grades {loss.min_gap:g} apart"
        )
        raise DataError(
            f"The {split} split has {counted(len(rows), 'image')} and no pair {what}{where}: there is "
            "nothing to compare. More graded images are needed, or another --val-ratio."
        )


def higher_is_better(rows: Rows, loss: PairLoss) -> NDArray[np.generic]:
    """[n] labels of rows, as numbers that are higher for the better image."""
    if loss.label == "tier":
        return -rows.tiers
    assert rows.tier_scores is not None
    return rows.tier_scores


def _tier_accuracy(
    scores: torch.Tensor, rows: DeviceRows, groups: torch.Tensor | None
) -> float | None:
    if bool((rows.tiers < 0).any()):
        return None
    return _accuracy(scores, -rows.tiers, 0.0, groups)


def _accuracy(
    scores: torch.Tensor, labels: torch.Tensor, min_gap: float, groups: torch.Tensor | None
) -> float | None:
    """Of n numbers, soon moved to the CPU, which has float64 everywhere."""
    return label_accuracy(
        scores.cpu(), labels.cpu(), min_gap, None if groups is None else groups.cpu()
    )


def _listed_accuracy(
    scores: torch.Tensor, label: torch.Tensor, weight: torch.Tensor
) -> float | None:
    """Share (0–1), by weight, of pairs [p, 2] in the right order; ties are left aside, equal scores ½."""
    verdict = label.cpu().double()
    margins = (scores[:, 0] - scores[:, 1]).detach().cpu().double() * verdict
    found = listed_accuracy(margins.numpy(), (weight.cpu().double() * verdict.abs()).numpy())
    return None if math.isnan(found) else found


def _check(config: TrainConfig, within: bool) -> None:
    """Say in the words of the command line which settings do not go together."""
    listed = config.pairs not in (ALL, SAMPLED)
    wrong = [
        (config.label_smoothing > 0 and config.loss != "logistic",
         "--label-smoothing goes with --loss logistic; the margin loss has no probabilities to smooth"),
        (config.min_gap > 0 and config.label != "tier_score",
         "--min-gap goes with --label tier_score"),
        (bool(config.tier_weights.strip()) and config.label != "tier",
         "--tier-weights goes with --label tier"),
        (config.within_share is not None and not within,
         "--within-share goes with --within COLUMN"),
        (config.within_share not in (None, 1) and config.pairs == SAMPLED,
         "--within-share below 1 goes with --pairs all; --pairs sampled draws inside the column only"),
        (listed and config.label != "tier", "--label goes with --pairs all or sampled, not with a file"),
        (listed and bool(config.tier_weights.strip()),
         "--tier-weights goes with --pairs all or sampled; a pairs file has a column weight"),
        (not listed and config.pairs_zero is not None,
         "--pairs-zero goes with --pairs FILE.csv, whose labels it explains"),
        (listed and config.within_share is not None,
         "--within-share goes with --pairs all, not with a file of pairs"),
    ]  # fmt: skip
    for is_wrong, text in wrong:
        if is_wrong:
            raise ConfigError(text)
