"""H heads of one shape side by side: their layers as batched matrix products.

A head trained in a stack is the head trained alone: no number of one reaches another, and each draws its
dropout from a generator of its own. Parity with :class:`mirip_fast.models.head.RankingHead` is tested.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from mirip_fast.models.head import attend

_FIRST, _FIRST_NORM = "projector.layers.0", "projector.layers.1"
_SECOND, _SECOND_NORM = "projector.layers.4", "projector.layers.5"
_HIDDEN, _SCORE = "score_head.layers.0", "score_head.layers.3"


class StackedHeads:
    """The parameters of H heads, stacked.

    Args:
        states: H state dicts of ``RankingHead``, of the same shapes.
        dropout: [H] shares of hidden units that :meth:`__call__` drops when it is given noise.

    Attributes:
        weights: name → [H, ...] leaf tensor, named as in ``RankingHead.state_dict()``.
    """

    def __init__(self, states: Sequence[Mapping[str, Tensor]], dropout: Sequence[float]):
        self.weights = {
            name: torch.stack([state[name].detach() for state in states]).requires_grad_()
            for name in states[0]
        }
        self.dropout = list(dropout)

    def __len__(self) -> int:
        return len(self.dropout)

    def __call__(
        self, features: Tensor, noise: Sequence[torch.Generator] = (), rows: Sequence[int] = ()
    ) -> Tensor:
        """Scores, higher is better.

        Args:
            features: [H, B, D], each head's own batch.
            noise: H generators that dropout is drawn from, on the features' device; none for no dropout.
            rows: with noise, [H] real rows of each batch; what is beyond is padding and draws nothing.

        Returns:
            [H, B].
        """
        if "queries" in self.weights:
            queries = self.weights["queries"]
            kept = self.weights[f"{_FIRST}.weight"].shape[-1] // queries.shape[-1] - 1
            features = attend(features, queries, kept)
        hidden = functional.gelu(self._norm(self._linear(features, _FIRST), _FIRST_NORM))
        hidden = self._drop(hidden, noise, rows)
        unit = functional.normalize(self._norm(self._linear(hidden, _SECOND), _SECOND_NORM), dim=-1)
        hidden = self._drop(functional.relu(self._linear(unit, _HIDDEN)), noise, rows)
        return self._linear(hidden, _SCORE).squeeze(-1)

    def select(self, places: Sequence[int]) -> StackedHeads:
        """Some of the heads as a stack of their own; copies."""
        states = self.states()
        return StackedHeads([states[i] for i in places], [self.dropout[i] for i in places])

    def states(self) -> list[dict[str, Tensor]]:
        """The H state dicts; copies."""
        return [
            {name: stack.detach()[i].clone() for name, stack in self.weights.items()}
            for i in range(len(self))
        ]

    def _linear(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return torch.addcmul(bias[:, None], functional.layer_norm(x, x.shape[-1:]), weight[:, None])

    def _drop(self, x: Tensor, noise: Sequence[torch.Generator], rows: Sequence[int]) -> Tensor:
        if not noise or not any(self.dropout):
            return x
        kept = torch.ones_like(x)
        for i, (generator, count) in enumerate(zip(noise, rows, strict=True)):
            keep = 1 - self.dropout[i]
            if keep < 1:
                kept[i, :count].bernoulli_(keep, generator=generator).div_(keep)
        return x * kept
