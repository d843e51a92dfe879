"""The whole model of the documented interface: backbone, projector and score head, images in, scores out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mirip_fast.config import EmbedConfig, HeadConfig, TrainConfig
from mirip_fast.data.hashes import HashMemory
from mirip_fast.features.backbone import features_of, load_model
from mirip_fast.features.backbone_files import find_backbone
from mirip_fast.features.pooling import head_kinds
from mirip_fast.features.views import effective_size
from mirip_fast.models.head import RankingHead
from mirip_fast.models.losses import pair_loss

_BACKBONE = "backbone."


class PairwiseRankingModel(nn.Module):
    """Scores images; a pair's margin is the difference of two scores.

    Args:
        backbone_name: Hugging Face name, local directory, or ``tiny-random``.
        projector_output_dim: width of the projector's output.
        freeze_backbone: keep the backbone as it is; its weights are then neither trained nor saved.
        projector_hidden_dim: width of the projector's hidden layer.
        projector_dropout: dropout in projector and score head.
        features: what the head sees: ``cls``, ``mean`` or ``cls+mean``.
        loss: ``margin`` or ``logistic``.
        margin: how far apart the margin loss pushes two scores.

    Raises:
        BackboneError: the backbone can not be found or loaded.
    """

    def __init__(
        self,
        backbone_name: str = EmbedConfig.backbone,
        projector_output_dim: int = HeadConfig.projector_output_dim,
        freeze_backbone: bool = True,
        *,
        projector_hidden_dim: int = HeadConfig.projector_hidden_dim,
        projector_dropout: float = HeadConfig.projector_dropout,
        features: str = "cls",
        loss: str = TrainConfig.loss,
        margin: float = TrainConfig.margin,
    ):
        super().__init__()
        with HashMemory(None) as hashes:
            self.spec = find_backbone(backbone_name, hashes.sha256)
        self.freeze_backbone = freeze_backbone
        self.features, self.loss, self.margin = features, loss, margin
        self.backbone = load_model(self.spec).requires_grad_(not freeze_backbone)
        head = RankingHead(
            self.spec.hidden_size * len(head_kinds(features)),
            HeadConfig(
                features=features,
                projector_hidden_dim=projector_hidden_dim,
                projector_output_dim=projector_output_dim,
                projector_dropout=projector_dropout,
            ),
        )
        self.projector, self.score_head = head.projector, head.score_head
        self.train(self.training)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.projector.parameters()).device

    def train(self, mode: bool = True) -> PairwiseRankingModel:
        """Training mode for the trainable parts; a frozen backbone stays in eval mode."""
        super().train(mode)
        if self.freeze_backbone:
            self.backbone.eval()
        return self

    def extract(self, images: torch.Tensor) -> torch.Tensor:
        """Features of normalised images.

        Args:
            images: [B, 3, H, W]. A side that is no multiple of the patch is resized down to one, as
                phase one does: 768 → 756 for patches of 14 pixels.

        Returns:
            [B, D] float32, as the head sees them.
        """
        images = images.to(self.device)
        size = [effective_size(side, self.spec.patch_size) for side in images.shape[-2:]]
        if list(images.shape[-2:]) != size:
            images = functional.interpolate(
                images, size=size, mode="bicubic", align_corners=False, antialias=True
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_backbone):
            kinds = head_kinds(self.features)
            rows = features_of(self.spec, self.backbone, images, kinds)
        return torch.cat([rows[kind] for kind in kinds], dim=-1)

    def score(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] normalised images → [B] scores, higher is better."""
        scores: torch.Tensor = self.score_head(self.projector(self.extract(images)))
        return scores

    def forward(
        self, image1: torch.Tensor, image2: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Two batches [B, 3, H, W] → their scores ([B], [B]); one pass of the backbone where sizes agree."""
        if image1.shape[1:] != image2.shape[1:]:
            return self.score(image1), self.score(image2)
        both = self.score(torch.cat([image1.to(self.device), image2.to(self.device)]))
        first, second = torch.split(both, [len(image1), len(image2)])
        return first, second

    def compute_loss(
        self, score1: torch.Tensor, score2: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """Mean pairwise loss; labels [B] are 1 (first is better), −1 (second is), 0 (a tie)."""
        labels = labels.to(score1.device)
        return pair_loss(score1, score2, labels, kind=self.loss, margin=self.margin)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Weights to save; without the backbone's where it is frozen."""
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "") + _BACKBONE
        if self.freeze_backbone:
            for name in [name for name in state if name.startswith(prefix)]:
                del state[name]
        return state

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load weights; a frozen backbone's are not demanded."""
        state = dict(state_dict)
        if self.freeze_backbone:
            own = self.backbone.state_dict()
            state = {**{_BACKBONE + name: value for name, value in own.items()}, **state}
        return super().load_state_dict(state, strict=strict, assign=assign)

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that training changes."""
        return (p for p in self.parameters() if p.requires_grad)
