"""Backbones and heads that are small enough to test with."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from mirip_fast.features.backbone import Backbone, load_backbone
from mirip_fast.features.backbone_files import find_backbone
from mirip_fast.models.head import RankingHead
from mirip_fast.models.numpy_head import NumpyHead
from mirip_fast.ranking.score_model import TrainedHead

#: Kind of a small model → number of its register tokens.
MODEL_KINDS = {"dinov2": 0, "registers": 4, "dinov3": 3, "vit": 0}


def backbone_of(folder: Path) -> Backbone:
    spec = find_backbone(str(folder), lambda path: hashlib.sha256(path.read_bytes()).digest())
    return load_backbone(spec, torch.device("cpu"), "fp32")


def member(width: int, seed: int, mean: float = 0.0, spread: float = 1.0) -> TrainedHead:
    torch.manual_seed(seed)
    state = RankingHead(width).state_dict()
    return TrainedHead(
        NumpyHead({name: value.numpy() for name, value in state.items()}), mean, spread
    )
