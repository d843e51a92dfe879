"""Projector and score head: the small network that turns a feature row into one score."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from mirip_fast.config import HeadConfig


class Projector(nn.Module):
    """Linear → LayerNorm → GELU → Dropout → Linear → LayerNorm → L2 normalisation.

    Args:
        input_dim: D, numbers per feature row.
        hidden_dim: width of the hidden layer.
        output_dim: width of the embedding.
        dropout: share of hidden units dropped in training.
    """

    def __init__(
        self, input_dim: int, hidden_dim: int = 512, output_dim: int = 256, dropout: float = 0.1
    ):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(input_dim, hidden_dim),
            nn.LayerNorm(hidden_dim),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, output_dim),
            nn.LayerNorm(output_dim),
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[B, D] features → [B, output_dim] unit vectors."""
        return functional.normalize(self.layers(features), dim=-1)


class ScoreHead(nn.Module):
    """Linear → ReLU → Dropout → Linear(1): one score per embedding, higher is better."""

    def __init__(self, input_dim: int = 256, hidden_dim: int = 64, dropout: float = 0.1):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(input_dim, hidden_dim),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, 1),
        )

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """[B, input_dim] embeddings → [B] scores."""
        scores: torch.Tensor = self.layers(embeddings).squeeze(-1)
        return scores


class RankingHead(nn.Module):
    """Projector and score head together.

    Args:
        input_dim: D, numbers per feature row (twice the backbone's width for ``cls+mean``).
        config: widths and dropout.
    """

    def __init__(self, input_dim: int, config: HeadConfig | None = None):
        super().__init__()
        config = config or HeadConfig()
        self.projector = Projector(
            input_dim,
            config.projector_hidden_dim,
            config.projector_output_dim,
            config.projector_dropout,
        )
        self.score_head = ScoreHead(
            config.projector_output_dim, config.score_hidden_dim, config.projector_dropout
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[B, D] features → [B] scores, higher is better."""
        scores: torch.Tensor = self.score_head(self.projector(features))
        return scores
