"""The whole model of the documented interface: backbone, projector and score head, images in, scores out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mirip_fast.config import EmbedConfig, HeadConfig, TrainConfig
from mirip_fast.data.hashes import HashMemory
from mirip_fast.errors import BackboneError, CheckpointError
from mirip_fast.features.backbone import features_of, load_model
from mirip_fast.features.backbone_files import find_backbone
from mirip_fast.features.recipe import effective_size, head_kinds, make_recipe
from mirip_fast.files import temporary_folder
from mirip_fast.models.checkpoint import ABOUT, load_checkpoint, usual_names
from mirip_fast.models.finetuned import FINETUNED, deploy, is_finetuned, write_backbone
from mirip_fast.models.head import RankingHead
from mirip_fast.models.losses import pair_loss
from mirip_fast.models.model_info import ModelInfo, beside

_BACKBONE = "backbone."


class PairwiseRankingModel(nn.Module):
    """Scores images; a pair's margin is the difference of two scores.

    Args:
        backbone_name: Hugging Face name, local directory, or ``tiny-random``. None: that of the weights to be
            loaded, which name it; until then facebook/dinov2-large, if it is on this machine or can be had.
        projector_output_dim: width of the projector's output.
        freeze_backbone: keep the backbone as it is; its weights are then neither trained nor saved.
        projector_hidden_dim: width of the projector's hidden layer.
        projector_dropout: dropout in projector and score head.
        features: what the head sees: ``cls``, ``mean`` or ``cls+mean``.
        loss: ``margin`` or ``logistic``.
        margin: how far apart the margin loss pushes two scores.

    Raises:
        BackboneError: the backbone cannot be found or loaded.
    """

    def __init__(
        self,
        backbone_name: str | None = None,
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
        self.freeze_backbone = freeze_backbone
        self.loss, self.margin = loss, margin
        self._named = backbone_name is not None
        self._missing: BackboneError | None = None
        self.head_config = HeadConfig(
            features=features,
            projector_hidden_dim=projector_hidden_dim,
            projector_output_dim=projector_output_dim,
            projector_dropout=projector_dropout,
        )
        try:
            self._take_backbone(backbone_name or EmbedConfig.backbone)
        except BackboneError as error:
            if self._named:
                raise
            self._missing = error  # weights that are loaded may bring another one
        else:
            self._make_head(self.spec.hidden_size * len(head_kinds(features)), self.head_config)

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, backbone_name: str | None = None, *, freeze_backbone: bool = True
    ) -> PairwiseRankingModel:
        """The model of a checkpoint: of a run of ``mirip-fast train``, of :class:`Trainer`, or of the
        documented interface's own project.

        Args:
            path: the .pt file, or a folder with a best_model.pt.
            backbone_name: another place of its backbone; None: the one that the checkpoint names.
            freeze_backbone: whether it stays as it is.

        Raises:
            CheckpointError: it cannot be read, or holds no model of this kind.
            BackboneError: its backbone cannot be found.
        """
        path = Path(path)
        path = path / "best_model.pt" if path.is_dir() else path
        content = load_checkpoint(path, ("model_state_dict",))
        features = "cls"
        if "model" in content:
            tuned = is_finetuned(content)
            info = deploy(path, content) if tuned else ModelInfo.from_dict(content["model"])
            features = info.features
            backbone_name = backbone_name or beside(path, info).embed.backbone
        model = cls(backbone_name, freeze_backbone=freeze_backbone, features=features)
        model.load_state_dict(content["model_state_dict"])
        return model

    def _take_backbone(self, name: str) -> None:
        with HashMemory(None) as hashes:
            self.spec = find_backbone(name, hashes.sha256)
        before = self._modules.get("projector")  # a model that was moved stays where it is
        device = torch.device("cpu") if before is None else self.device
        self.backbone = load_model(self.spec).requires_grad_(not self.freeze_backbone).to(device)
        self._missing = None

    def _make_head(self, input_dim: int, config: HeadConfig) -> None:
        head = RankingHead(input_dim, config)
        self.head_config = config
        self.projector, self.score_head = head.projector, head.score_head
        self.train(self.training)

    def __getattr__(self, name: str) -> Any:
        missing = self.__dict__.get("_missing")
        if missing is not None and name in ("spec", "backbone", "projector", "score_head"):
            raise missing
        return super().__getattr__(name)

    @property
    def features(self) -> str:
        """What the head sees: ``cls``, ``mean`` or ``cls+mean``."""
        return self.head_config.features

    def describe(self, image_size: int, tiers: Sequence[str]) -> ModelInfo:
        """What the model expects of its input, as a checkpoint says it.

        Args:
            image_size: side of the images it was trained on, in pixels; they are taken to be squashed to a
                square and normalised as the backbone asks for.
            tiers: names of the tiers, best first.
        """
        embed = EmbedConfig(backbone=self.spec.name, image_size=image_size)
        recipe = make_recipe(embed, self.spec, "fp32")
        head: Any = self.projector.layers[0]
        return ModelInfo(
            recipe.fingerprint, embed, recipe.views, self.features, tuple(tiers), head.in_features
        )

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.projector.parameters()).device

    def train(self, mode: bool = True) -> PairwiseRankingModel:
        """Training mode for the trainable parts; a frozen backbone stays in eval mode."""
        super().train(mode)
        if self.freeze_backbone or self._missing:
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
        """Load weights, and take their head's widths and their backbone; a frozen one's are not demanded.

        A backbone that was named keeps its place: weights that were trained on another one are refused.

        Raises:
            CheckpointError: the weights are of another architecture or another backbone.
            RuntimeError: weights of the head or of a backbone to be trained are missing.
        """
        about = getattr(state_dict, "_metadata", {}).get(ABOUT)
        state = usual_names(state_dict)
        if about is not None:
            self._adopt_backbone(ModelInfo.from_dict(about), about, state)
        if self._missing is not None:
            raise self._missing
        self._adopt_head(state)
        if self.freeze_backbone:
            own = self.backbone.state_dict()
            state = {**{_BACKBONE + name: value for name, value in own.items()}, **state}
        return super().load_state_dict(state, strict=strict, assign=assign)

    def _adopt_backbone(
        self, info: ModelInfo, about: Mapping[str, Any], state: Mapping[str, torch.Tensor]
    ) -> None:
        """Take the backbone that weights were trained with, unless it is there."""
        if info.more:
            names = ", ".join(each.embed.backbone for each in info.backbones)
            raise CheckpointError(
                f"these weights look through several backbones ({names}), and this model has one: score with "
                "`mirip-fast rank --checkpoint` instead"
            )
        own = any(name.startswith(_BACKBONE) for name in state)
        there = None if self._missing else self.spec
        if FINETUNED in about and own:
            if not self._named:
                with temporary_folder() as folder:
                    write_backbone(folder / "backbone", about[FINETUNED], state)
                    self._take_backbone(str(folder / "backbone"))
                self.spec = replace(self.spec, name=str(about[FINETUNED]["name"]))
        elif there is None or there.weights_id != info.fingerprint["backbone"]:
            if self._named:
                raise CheckpointError(
                    f"these weights were trained with the backbone {info.embed.backbone}, and this model has "
                    f"another one, {self.spec.name}: leave its name out, or give the same backbone"
                )
            self._take_backbone(info.embed.backbone)
            if self.spec.weights_id != info.fingerprint["backbone"]:
                raise CheckpointError(
                    f"{info.embed.backbone} is no more the backbone that these weights were trained with"
                )
        self.head_config = replace(self.head_config, features=info.features)

    def _adopt_head(self, state: Mapping[str, torch.Tensor]) -> None:
        """Give the head the widths of weights that are going to be loaded."""
        try:
            hidden, width = state["projector.layers.0.weight"].shape
            output = len(state["projector.layers.4.weight"])
            score_hidden = len(state["score_head.layers.0.weight"])
        except (KeyError, ValueError, TypeError):
            return  # incomplete: told by name when they are loaded
        features, size = self.head_config.features, self.spec.hidden_size
        if width != size * len(head_kinds(features)):
            known = {size: "cls", 2 * size: "cls+mean"}
            if width not in known:
                raise CheckpointError(
                    f"these weights are of a head that sees {width} numbers per image; the backbone "
                    f"{self.spec.name} gives {size} (cls) or {2 * size} (cls+mean): name the backbone "
                    "that they were trained with"
                )
            features = known[width]
        config = replace(
            self.head_config,
            features=features,
            projector_hidden_dim=hidden,
            projector_output_dim=output,
            score_hidden_dim=score_hidden,
        )
        head = self._modules.get("projector")
        if (
            config != self.head_config
            or head is None
            or self.projector.layers[0].in_features != width
        ):
            device = next(self.backbone.parameters()).device
            self._make_head(width, config)
            self.projector.to(device)
            self.score_head.to(device)

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that training changes."""
        return (p for p in self.parameters() if p.requires_grad)
