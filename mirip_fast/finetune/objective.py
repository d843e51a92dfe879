"""The loss of a step from all its scores, and how many pairs it has right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mirip_fast.config import TrainConfig
from mirip_fast.errors import ConfigError
from mirip_fast.models.losses import PairLoss, pair_loss
from mirip_fast.ranking.objective import ALL, make_loss


@dataclass(frozen=True)
class Objective:
    """The pairwise loss over all pairs of a batch.

    Of mixed images the grade is the mixture of their two grades, by the same shares as the pixels. A pair
    of a mixed batch then weighs as much as its grades differ (in tiers): two mixtures of nearly the same
    grade say nearly nothing, where a plain pair would call one of them the better.

    Attributes:
        plain: for batches of unmixed images.
    """

    plain: PairLoss

    @classmethod
    def of(
        cls, config: TrainConfig, tiers: Sequence[str], *, within: bool, mixing: bool = False
    ) -> Objective:
        """The loss that the settings ask for.

        Args:
            config: the settings.
            tiers: names of the tiers, best first.
            within: whether there is a column inside which pairs count.
            mixing: whether images are mixed.

        Raises:
            ConfigError: settings that do not go together.
        """
        if config.pairs != ALL:
            raise ConfigError(
                f"--pairs {config.pairs}: --full takes all pairs among the images of each batch; leave it "
                "out"
            )
        plain = make_loss(config, tiers, within=within)
        own = plain.tier_weights is not None or plain.min_gap or plain.within_share not in (None, 1)
        if mixing and own:
            raise ConfigError(
                "--mixup and --cutmix weigh pairs by their grades alone: leave out --tier-weights, "
                "--min-gap and --within-share, or the mixing"
            )
        return cls(plain)

    def loss(self, scores: Tensor, grades: Tensor, within: Tensor | None, *, mixed: bool) -> Tensor:
        """The mean loss.

        Args:
            scores: [n] floats.
            grades: [n] float64, higher is better; minus the tier, the tier_score, or a mixture of two such.
            within: [n] integers, or None.
            mixed: whether images of this batch are mixtures.
        """
        if not mixed:
            labels = (-grades).round().long() if self.plain.label == "tier" else grades
            return self.plain(scores, labels, within)
        first, second = _pairs(grades, within)
        difference = grades[first] - grades[second]
        return pair_loss(
            scores[first],
            scores[second],
            difference.sign(),
            kind=self.plain.kind,
            margin=self.plain.margin,
            label_smoothing=self.plain.label_smoothing,
            weight=difference.abs(),
        )


def count_right(
    scores: Tensor, grades: Tensor, within: Tensor | None, *, mixed: bool
) -> tuple[float, float]:
    """How many pairs of different grades are in the right order (ties count half), and of how many.

    Both are weighted by the difference of grades in a batch of mixtures: see :class:`Objective`.
    """
    first, second = _pairs(grades, within)
    difference = grades[first] - grades[second]
    weight = difference.abs() if mixed else (difference != 0).double()
    order = (scores[first] - scores[second]).sign() * difference.sign()
    return float((weight * (order + 1) / 2).sum()), float(weight.sum())


def _pairs(grades: Tensor, within: Tensor | None) -> tuple[Tensor, Tensor]:
    """[p], [p]: all pairs of a batch (some tens of images), with equal ``within`` where given."""
    first, second = torch.triu_indices(len(grades), len(grades), 1, device=grades.device)
    if within is not None:
        inside = within[first] == within[second]
        first, second = first[inside], second[inside]
    return first, second
