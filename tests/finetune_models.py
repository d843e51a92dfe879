"""Small models and data for the tests of end-to-end training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from mirip_fast.config import Config, HeadConfig
from mirip_fast.data.hashes import HashMemory
from mirip_fast.features.backbone import load_model
from mirip_fast.features.backbone_files import find_backbone
from mirip_fast.finetune.data import Sample
from mirip_fast.finetune.model import ScoringModel
from mirip_fast.finetune.strategy import Strategy, parse_strategy, prepare_model
from mirip_fast.models.head import RankingHead
from mirip_fast.ranking.rows import Rows

SIZE = 32


def small_model(folder: Path, features: str = "cls+mean", dropout: float = 0.0) -> ScoringModel:
    """A two-block model with a small head."""
    with HashMemory(None) as hashes:
        spec = find_backbone(str(folder), hashes.sha256)
    torch.manual_seed(1)
    width = spec.hidden_size * (features.count("+") + 1)
    config = HeadConfig(
        features=features, projector_hidden_dim=16, projector_output_dim=8, score_hidden_dim=8,
        projector_dropout=dropout,
    )  # fmt: skip
    return ScoringModel(spec, load_model(spec), RankingHead(width, config), features)


def prepared(folder: Path, config: Config, **model: object) -> tuple[ScoringModel, Strategy]:
    """The same, made ready for the strategy of the settings."""
    scoring = small_model(folder, **model)  # type: ignore[arg-type]
    strategy = parse_strategy(config.finetune, scoring.spec.num_layers)
    prepare_model(scoring, strategy, config.finetune)
    return scoring, strategy


def pictures(n: int) -> tuple[torch.Tensor, np.ndarray]:
    """[n, 32, 32, 3] uint8 and their tiers: the better, the brighter."""
    rng = np.random.default_rng(5)
    tiers = np.arange(n) % 4
    pixels = rng.normal(220 - 50 * tiers[:, None, None, None], 30, (n, SIZE, SIZE, 3))
    return torch.from_numpy(pixels.clip(0, 255).astype(np.uint8)), tiers.astype(np.int64)


class Kept:
    """Images in memory."""

    waited = 0.0

    def __init__(self, images: torch.Tensor):
        self.images = images

    def load(self, batches: Sequence[Sequence[Sample]]) -> Iterator[torch.Tensor]:
        for samples in batches:
            yield self.images[[sample.image for sample in samples]]


def rows_of_tiers(tiers: np.ndarray) -> Rows:
    n = len(tiers)
    return Rows([""] * n, np.empty((n, 0, 0), np.float32), tiers, [None] * n)
