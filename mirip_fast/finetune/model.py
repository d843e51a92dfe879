"""Backbone and head as one module, which scores images: what end-to-end training trains."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from mirip_fast.errors import BackboneError
from mirip_fast.features.backbone_files import BackboneSpec
from mirip_fast.features.pooling import head_kinds, pool_tokens
from mirip_fast.finetune.anatomy import Anatomy, find_anatomy, layer_of, run_from, tokens_before
from mirip_fast.models.head import RankingHead


class ScoringModel(nn.Module):
    """Images in, scores out.

    Args:
        spec: what the backbone is.
        backbone: the bare ``transformers`` model.
        head: projector and score head.
        features: what the head sees: ``cls``, ``mean`` or ``cls+mean``.

    Raises:
        BackboneError: the backbone is no plain stack of blocks.
    """

    def __init__(self, spec: BackboneSpec, backbone: nn.Module, head: RankingHead, features: str):
        super().__init__()
        self.spec, self.kinds = spec, head_kinds(features)
        self.skipped = 1 + spec.num_register_tokens
        self.backbone, self.head = backbone, head
        self.anatomy: Anatomy = find_anatomy(backbone, spec.num_layers)
        #: Usable backbone parameters, and the layer of each, before anything is added to the backbone.
        self.layers = layer_of(backbone, self.anatomy)
        self._arguments = {}
        if "interpolate_pos_encoding" in inspect.signature(backbone.forward).parameters:
            self._arguments["interpolate_pos_encoding"] = True
        self._rest: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        for name, values in (("mean", spec.mean), ("std", spec.std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.head.parameters()).device

    def train(self, mode: bool = True) -> ScoringModel:
        """Training mode for the parts that learn; frozen parts of the backbone stay in eval mode."""
        super().train(mode)
        if mode:
            self.backbone.eval()
            for part in (self.anatomy.embeddings, *self.anatomy.blocks, self.anatomy.norm):
                part.train(any(p.requires_grad for p in part.parameters()))
        return self

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that learn now."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, S, S, 3] uint8 pixels, S a multiple of the patch size → [B] scores, higher is better."""
        tokens = self.backbone(self.normalise(images), **self._arguments).last_hidden_state
        side = images.shape[1] // self.spec.patch_size
        if not self.training and tokens.shape[1] != self.skipped + side * side:
            raise BackboneError(
                f"{self.spec.name}: {tokens.shape[1]} tokens for {side} × {side} patches; "
                "this model type is not supported"
            )
        return self.score_tokens(tokens)

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """[B, S, S, 3] uint8 → [B, 3, S, S] (channels last in memory) as the backbone expects it."""
        dtype = next(self.backbone.parameters()).dtype
        pixels = images.to(self.device, non_blocking=True).permute(0, 3, 1, 2).to(dtype) / 255
        mean, std = self.get_buffer("mean").to(dtype), self.get_buffer("std").to(dtype)
        return (pixels - mean) / std

    def score_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, T, D] tokens after the final norm → [B] scores."""
        cls, patches = tokens[:, 0], tokens[:, self.skipped :].unsqueeze(2)
        # Out of autocast: bf16 scores would tie where the margin of a pair is small.
        with torch.autocast(tokens.device.type, enabled=False):
            parts = [pool_tokens(kind, cls, patches) for kind in self.kinds]
            scores: torch.Tensor = self.head(torch.cat(parts, dim=-1))
        return scores

    @torch.no_grad()
    def prefix(self, images: torch.Tensor, cut: int) -> torch.Tensor:
        """[B, S, S, 3] uint8 → the tokens [B, T, D] that block ``cut`` is given."""
        pixels = self.normalise(images)
        tokens, args, kwargs = tokens_before(
            self.anatomy, cut, lambda: self.backbone(pixels, **self._arguments)
        )
        self._rest = args, kwargs  # the same for all images of one size
        return tokens

    def suffix(self, tokens: torch.Tensor, cut: int) -> torch.Tensor:
        """Scores [B] from what :meth:`prefix` gave; that has to have run once before."""
        if self._rest is None:
            raise RuntimeError("prefix() has to run once before suffix()")
        return self.score_tokens(run_from(self.anatomy, cut, tokens, *self._rest))
