"""Rows as tensors where the head is trained, and their scores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from mirip_fast.models.head import RankingHead
from mirip_fast.ranking.rows import Rows

# Rows that go through the head at a time. What 1,024 rows leave in a layer is small enough for the allocator
# to keep; larger pieces go back to the system after each pass, and every page of theirs is fetched anew
# (100,000 rows in one piece: 800,000 page faults, a quarter of the time). A GPU likes them large.
_CPU_ROWS, _GPU_ROWS = 1_024, 65_536
_NUMBERS = 1 << 28  # numbers at a time, at most: rows of patch tokens are wide


@dataclass(frozen=True)
class DeviceRows:
    """n images on the training device; features in half precision on a GPU, fp32 on a CPU.

    Attributes:
        features: [n, V, D].
        tiers: [n] int64, all −1 where the images have none.
        within: [n] int64, or None.
        tier_scores: [n] float64 (float32 on MPS, which has no other), or None.
        pairs: [p, 2] rows, [p] labels and [p] weights of judged pairs, or None.
    """

    features: torch.Tensor
    tiers: torch.Tensor
    within: torch.Tensor | None
    tier_scores: torch.Tensor | None
    pairs: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None

    def __len__(self) -> int:
        return len(self.tiers)

    @classmethod
    def of(cls, rows: Rows, device: torch.device) -> DeviceRows:
        """Bring rows to a device; on a CPU the features are shared, not copied."""
        half = torch.float16 if device.type == "cuda" else torch.float32
        real = torch.float32 if device.type == "mps" else torch.float64
        pairs = rows.pairs
        return cls(
            features=torch.from_numpy(rows.features).to(device=device, dtype=half),
            tiers=torch.from_numpy(rows.tiers).to(device),
            within=None if rows.within is None else torch.from_numpy(rows.within).to(device),
            tier_scores=None
            if rows.tier_scores is None
            else torch.from_numpy(rows.tier_scores).to(device=device, dtype=real),
            pairs=None
            if pairs is None
            else (
                torch.from_numpy(pairs.images).to(device),
                torch.from_numpy(pairs.label).to(device),
                torch.from_numpy(pairs.weight).to(device=device, dtype=real),
            ),
        )

    def sample(self, n: int, seed: int) -> DeviceRows:
        """``n`` of the rows, always the same for a seed; all where there are no more, or pairs are judged."""
        if len(self) <= n or self.pairs is not None:
            return self
        chosen = np.sort(np.random.default_rng(seed).choice(len(self), n, replace=False))
        index = torch.from_numpy(chosen).to(self.tiers.device)
        return DeviceRows(
            self.features[index],
            self.tiers[index],
            None if self.within is None else self.within[index],
            None if self.tier_scores is None else self.tier_scores[index],
            None,
        )


@torch.inference_mode()
def score_rows(head: RankingHead, features: torch.Tensor) -> torch.Tensor:
    """Scores of [n, V, D] features: the mean over the views, in chunks; [n] float32."""
    head.eval()
    scores = [
        head(chunk.flatten(0, 1).float()).view(chunk.shape[:2]).mean(dim=1)
        for chunk in torch.split(features, _at_a_time(features))
    ]
    return torch.cat(scores) if scores else torch.empty(0)


def score_one_view(
    head: RankingHead, rows: DeviceRows, index: torch.Tensor, rng: np.random.Generator
) -> torch.Tensor:
    """Scores [B] of the rows in ``index`` [B], with their graph, in chunks; of several views, each row shows
    a drawn one."""
    n_views = rows.features.shape[1]
    size = _at_a_time(rows.features)
    if n_views == 1:
        parts = [rows.features[part, 0] for part in torch.split(index, size)]
    else:
        view = torch.from_numpy(rng.integers(n_views, size=len(index))).to(index.device)
        chunks = zip(torch.split(index, size), torch.split(view, size), strict=True)
        parts = [rows.features[part, shown] for part, shown in chunks]
    scores: list[torch.Tensor] = [head(part.float()) for part in parts]
    return scores[0] if len(scores) == 1 else torch.cat(scores)


def _at_a_time(features: torch.Tensor) -> int:
    most = _CPU_ROWS if features.device.type == "cpu" else _GPU_ROWS
    return max(16, min(most, _NUMBERS // features.shape[-1]))
