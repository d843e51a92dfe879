"""Projector and score head: the small network that turns a feature row into one score."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

from mirip_fast.config import HeadConfig

#: Learned queries of a head that attends to patch tokens, at most; they divide the width of a token.
QUERIES = 8


def attention_maps(tokens: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """Where each query looks: [..., T, D] tokens, [..., Q, D] queries → [..., Q, T], which add up to 1."""
    return torch.softmax(queries @ tokens.transpose(-1, -2) / tokens.shape[-1] ** 0.5, dim=-1)


def attend(rows: torch.Tensor, queries: torch.Tensor, single: int) -> torch.Tensor:
    """Replace the patch tokens of each row by one: efficient probing (arXiv 2506.10178).

    Learned queries look straight at the tokens, without projections of keys and values; each query takes
    its own D / Q numbers of what it looks at. Queries of zeros give the mean of the tokens.

    Args:
        rows: [..., B, (single + T) · D]: tokens that stay as they are, then T patch tokens.
        queries: [..., Q, D], Q divides D.
        single: how many tokens stay.

    Returns:
        [..., B, (single + 1) · D].
    """
    q, d = queries.shape[-2:]
    kept, patches = rows[..., : single * d], rows[..., single * d :]
    tokens = patches.reshape(*patches.shape[:-1], -1, d)
    maps = attention_maps(tokens, queries.unsqueeze(-3))
    parts = tokens.reshape(*tokens.shape[:-1], q, d // q)
    taken = torch.einsum("...qt,...tqc->...qc", maps, parts)
    return torch.cat([kept, taken.flatten(-2)], dim=-1)


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
    """Projector and score head together, over learned queries where it attends to patch tokens.

    Args:
        input_dim: numbers per feature row (twice the backbone's width for ``cls+mean``).
        config: widths and dropout.
        attention: (D, single) for a head that attends, see :func:`attend`; None: the row is taken as it is.
    """

    def __init__(
        self,
        input_dim: int,
        config: HeadConfig | None = None,
        attention: tuple[int, int] | None = None,
    ):
        super().__init__()
        config = config or HeadConfig()
        if attention is not None:
            width, self.single = attention
            input_dim = (self.single + 1) * width
        self.projector = Projector(
            input_dim,
            config.projector_hidden_dim,
            config.projector_output_dim,
            config.projector_dropout,
        )
        self.score_head = ScoreHead(
            config.projector_output_dim, config.score_hidden_dim, config.projector_dropout
        )
        if attention is not None:
            self.queries = nn.Parameter(torch.zeros(math.gcd(QUERIES, width), width))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[B, D] features → [B] scores, higher is better."""
        if hasattr(self, "queries"):
            features = attend(features, self.queries, self.single)
        scores: torch.Tensor = self.score_head(self.projector(features))
        return scores
