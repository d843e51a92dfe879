"""A trained model as one torch module: what explaining differentiates and exporting writes down."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from mirip_fast.config import HeadConfig
from mirip_fast.features.backbone import features_of
from mirip_fast.features.backbone_files import BackboneSpec
from mirip_fast.features.recipe import View
from mirip_fast.models.gp import GaussianProcess
from mirip_fast.models.head import RankingHead
from mirip_fast.models.model_info import ModelInfo
from mirip_fast.models.numpy_head import NumpyHead
from mirip_fast.ranking.score_model import TrainedHead


class MeanHead(nn.Module):
    """The members of a model and the mean of their scores, as :class:`ScoreModel` has it.

    Args:
        members: one trained head, or those of an ensemble with the line each is put through.
    """

    means: torch.Tensor
    spreads: torch.Tensor

    def __init__(self, members: Sequence[TrainedHead]):
        super().__init__()
        self.heads = nn.ModuleList(_module(member.head) for member in members)
        self._columns = [member.columns for member in members]
        self.register_buffer("means", torch.tensor([member.mean for member in members]))
        self.register_buffer("spreads", torch.tensor([member.spread for member in members]))
        self.eval().requires_grad_(False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[B, D] features → [B] scores, higher is better."""
        seen = (
            torch.cat([features[:, first:end] for first, end in columns], dim=-1)
            if columns
            else features
            for columns in self._columns
        )
        scores = torch.stack([h(x) for h, x in zip(self.heads, seen, strict=True)], dim=-1)
        return ((scores - self.means) / self.spreads).mean(-1)


class ImageScorer(nn.Module):
    """Backbone and head together: normalised pixels in, scores out.

    Args:
        backbone: the bare transformers model.
        spec: what its files say about it.
        head: the model's heads.
        info: which tokens of which views the heads look at.
    """

    def __init__(self, backbone: nn.Module, spec: BackboneSpec, head: MeanHead, info: ModelInfo):
        super().__init__()
        self.backbone, self.spec, self.head, self.info = backbone, spec, head, info
        self.eval()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sides of the squares that :meth:`forward` takes, in pixels, in its order."""
        return view_sizes(self.info)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, 3, S, S] normalised pixels of one view → [B, D] float32, as the heads see them."""
        rows = features_of(self.spec, self.backbone, pixels, self.info.kinds)
        return torch.cat([rows[kind].flatten(1) for kind in self.info.kinds], dim=-1)

    def view_features(self, *pixels: torch.Tensor) -> torch.Tensor:
        """[B, 3, S, S] per size, in the order of :attr:`sizes` → [B, V, D] of the V views."""
        found: dict[View, torch.Tensor] = {}
        for size, images in zip(self.sizes, pixels, strict=True):
            views = [view for view in self.info.views if view.size == size]
            batch = torch.cat([images.flip(-1) if view.flip else images for view in views])
            # One pass per size: in an exported graph every weight is then used once.
            rows = self.features(batch)
            found.update(zip(views, rows.reshape(len(views), -1, rows.shape[1]), strict=True))
        return torch.stack([found[view] for view in self.info.views], dim=1)

    def view_scores(self, features: torch.Tensor) -> torch.Tensor:
        """[B, V, D] features of the views → [B] scores: the mean over views and members."""
        scores: torch.Tensor = self.head(features.flatten(0, 1))
        return scores.reshape(-1, features.shape[1]).mean(1)

    def forward(self, *pixels: torch.Tensor) -> torch.Tensor:
        """As :meth:`view_features` → [B] scores."""
        return self.view_scores(self.view_features(*pixels))


def view_sizes(info: ModelInfo) -> tuple[int, ...]:
    """The different sides of a model's views, in pixels; the base view's first."""
    return tuple(dict.fromkeys(view.size for view in info.views))


class KernelHead(nn.Module):
    """A Gaussian process as a module: the same score, in float64 inside.

    Args:
        process: a process that uses all of its blocks.
    """

    centre: torch.Tensor
    deviation: torch.Tensor
    basis: torch.Tensor
    weights: torch.Tensor

    def __init__(self, process: GaussianProcess):
        super().__init__()
        self._sizes = process.blocks.tolist()
        # Of each part that is used: which it is of the blocks scaled to length 1, and then of the others.
        self._parts = [
            (place, float(process.amplitudes[place]), float(process.lengths[place]))
            for place in process.amplitudes.nonzero()[0].tolist()
        ]
        self._mean, self._sd = process.mean, process.sd
        self.register_buffer("centre", torch.tensor(process.centre))
        self.register_buffer("deviation", torch.tensor(process.deviation, dtype=torch.float64))
        self.register_buffer("basis", torch.tensor(process.basis, dtype=torch.float64))
        self.register_buffer("weights", torch.tensor(process.weights))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[B, D] features → [B] scores, higher is better."""
        rows = features.double() - self.centre
        blocks = torch.split(rows, self._sizes, dim=-1)
        parts = [b / b.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-12) for b in blocks]
        if len(self.deviation):
            parts += torch.split(rows / self.deviation, self._sizes, dim=-1)
        used = [parts[place] for place, _, _ in self._parts]
        bases = torch.split(self.basis, [row.shape[-1] for row in used], dim=-1)
        scores = self.weights.sum()  # the constant part of the kernel
        for row, basis, (_, amplitude, length) in zip(used, bases, self._parts, strict=True):
            squares = row.square().sum(-1, keepdim=True) + basis.square().sum(-1)
            apart = (squares - 2 * row @ basis.T).clamp_min(0).sqrt()
            scores = scores + amplitude * torch.exp(-apart / length) @ self.weights
        return (self._mean + self._sd * scores).float()


def _module(head: NumpyHead | GaussianProcess) -> nn.Module:
    if isinstance(head, GaussianProcess):
        return KernelHead(head)
    arrays = head.arrays
    config = HeadConfig(
        projector_hidden_dim=len(arrays["projector.layers.0.bias"]),
        projector_output_dim=len(arrays["projector.layers.4.bias"]),
        score_hidden_dim=len(arrays["score_head.layers.0.bias"]),
    )
    module = RankingHead(head.input_dim, config, head.attention)
    module.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()})
    return module
