"""Scoring without torch: the trained head as a few matrix products on arrays from a safetensors file.

``rank`` on cached features then starts in the time of a small script. Parity with
:class:`mirip_fast.models.head.RankingHead` in eval mode is tested.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from mirip_fast.errors import CheckpointError

#: File beside a checkpoint that holds the same head.
HEAD_FILE = "head.safetensors"

_LAYER_NORM_EPS = 1e-5  # torch.nn.LayerNorm's default
_L2_EPS = 1e-12  # torch.nn.functional.normalize's default
_CHUNK = 1 << 25  # numbers of rows that go through at a time


class NumpyHead:
    """The arrays of a trained projector and score head.

    Args:
        arrays: parameter name → float32 array, named as in ``RankingHead.state_dict()``.

    Raises:
        CheckpointError: a parameter is missing.
    """

    def __init__(self, arrays: Mapping[str, NDArray[np.float32]]):
        names = [f"projector.layers.{i}.{p}" for i in (0, 1, 4, 5) for p in ("weight", "bias")]
        names += [f"score_head.layers.{i}.{p}" for i in (0, 3) for p in ("weight", "bias")]
        absent = [name for name in names if name not in arrays]
        if absent:
            raise CheckpointError(f"no head in these arrays: {', '.join(absent)} missing")
        names += [name for name in ("queries",) if name in arrays]
        self.arrays = {name: np.asarray(arrays[name], dtype=np.float32) for name in names}

    @property
    def input_dim(self) -> int:
        """Numbers that the projector expects."""
        return int(self.arrays["projector.layers.0.weight"].shape[1])

    @property
    def attention(self) -> tuple[int, int] | None:
        """(D numbers per token, tokens that stay) of a head that attends to patch tokens; else None."""
        if "queries" not in self.arrays:
            return None
        width = self.arrays["queries"].shape[1]
        return width, self.input_dim // width - 1

    def __call__(self, features: NDArray[np.floating]) -> NDArray[np.float32]:
        """[n, D] features → [n] scores, higher is better; rows go through in chunks.

        Raises:
            CheckpointError: the features have another width than the head.
        """
        width = features.shape[1] if features.ndim == 2 else 0
        token = self.attention[0] if self.attention else self.input_dim
        fits = width >= self.input_dim and width % token == 0
        if not (fits if self.attention else width == self.input_dim):
            more = f", and as many more patch tokens of {token}" if self.attention else ""
            raise CheckpointError(
                f"the head expects rows of {self.input_dim} numbers{more}, not {features.shape[1:]}"
            )
        step = min(8192, max(1, _CHUNK // width))
        chunks = range(0, len(features), step)
        scores = [self._score(np.asarray(features[i : i + step], np.float32)) for i in chunks]
        return np.concatenate(scores) if scores else np.empty(0, np.float32)

    def attention_maps(self, features: NDArray[np.floating]) -> NDArray[np.float32]:
        """[n, D] features → [n, Q, T] where each query looks, as the head's own pass has it; sums to 1."""
        queries, (d, single) = self.arrays["queries"], self.attention or (0, 0)
        tokens = np.asarray(features[:, single * d :], np.float32).reshape(len(features), -1, d)
        maps: NDArray[np.float32] = queries @ tokens.transpose(0, 2, 1) / np.float32(d**0.5)
        maps = np.exp(maps - maps.max(axis=-1, keepdims=True))
        maps /= maps.sum(axis=-1, keepdims=True)
        return maps

    def _attend(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """:func:`mirip_fast.models.head.attend`."""
        maps, (d, single) = self.attention_maps(x), self.attention or (0, 0)
        parts = x[:, single * d :].reshape(len(x), maps.shape[2], maps.shape[1], -1)
        taken = np.einsum("nqt,ntqc->nqc", maps, parts).reshape(len(x), d)
        return np.concatenate([x[:, : single * d], taken], axis=1)

    def _score(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        x = self._attend(x) if self.attention else x
        x = self._norm(self._linear(x, "projector.layers.0"), "projector.layers.1")
        x = self._norm(self._linear(_gelu(x), "projector.layers.4"), "projector.layers.5")
        x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), _L2_EPS)
        x = np.maximum(self._linear(x, "score_head.layers.0"), 0)
        return self._linear(x, "score_head.layers.3")[:, 0]

    def _linear(self, x: NDArray[np.float32], name: str) -> NDArray[np.float32]:
        result: NDArray[np.float32] = (
            x @ self.arrays[f"{name}.weight"].T + self.arrays[f"{name}.bias"]
        )
        return result

    def _norm(self, x: NDArray[np.float32], name: str) -> NDArray[np.float32]:
        centred = x - x.mean(axis=1, keepdims=True)
        variance = np.mean(centred * centred, axis=1, keepdims=True)
        scaled = centred / np.sqrt(variance + _LAYER_NORM_EPS)
        result: NDArray[np.float32] = (
            scaled * self.arrays[f"{name}.weight"] + self.arrays[f"{name}.bias"]
        )
        return result


def _gelu(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Exact GELU (Hendrycks & Gimpel 2016): x · Φ(x)."""
    from scipy.special import erf

    result: NDArray[np.float32] = (0.5 * x * (1 + erf(x / np.float32(2**0.5)))).astype(np.float32)
    return result
