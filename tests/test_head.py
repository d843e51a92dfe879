"""Projector and score head, with torch and without."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from mirip_fast.config import HeadConfig
from mirip_fast.errors import CheckpointError
from mirip_fast.models.head import Projector, RankingHead, ScoreHead, attend
from mirip_fast.models.numpy_head import NumpyHead

NARROW = HeadConfig(projector_hidden_dim=40, projector_output_dim=16, score_hidden_dim=8)


def numpy_of(head: RankingHead) -> NumpyHead:
    return NumpyHead({name: value.numpy() for name, value in head.state_dict().items()})


def test_the_documents_layers() -> None:
    head = RankingHead(1024)
    layers = [*head.projector.layers, *head.score_head.layers]
    kinds = [nn.Linear, nn.LayerNorm, nn.GELU, nn.Dropout, nn.Linear, nn.LayerNorm]
    kinds += [nn.Linear, nn.ReLU, nn.Dropout, nn.Linear]
    assert [type(layer) for layer in layers] == kinds
    widths = [(m.in_features, m.out_features) for m in layers if isinstance(m, nn.Linear)]
    assert widths == [(1024, 512), (512, 256), (256, 64), (64, 1)]
    assert [m.p for m in layers if isinstance(m, nn.Dropout)] == [0.1, 0.1]
    assert head(torch.randn(5, 1024)).shape == (5,)


def test_the_head_against_its_formula_in_double_precision() -> None:
    projector, score_head = Projector(12, 10, 8).eval().double(), ScoreHead(8, 6).eval().double()
    p = {name: value.detach().numpy() for name, value in projector.named_parameters()}
    s = {name: value.detach().numpy() for name, value in score_head.named_parameters()}
    x = np.random.default_rng(0).standard_normal((4, 12))

    def norm(values: np.ndarray, i: int) -> np.ndarray:
        mean, variance = values.mean(1, keepdims=True), values.var(1, keepdims=True)
        scaled = (values - mean) / np.sqrt(variance + 1e-5)
        return scaled * p[f"layers.{i}.weight"] + p[f"layers.{i}.bias"]

    from scipy.stats import norm as gauss

    h = norm(x @ p["layers.0.weight"].T + p["layers.0.bias"], 1)
    h = h * gauss.cdf(h)  # GELU
    h = norm(h @ p["layers.4.weight"].T + p["layers.4.bias"], 5)
    h /= np.sqrt((h**2).sum(1, keepdims=True))
    embeddings = projector(torch.from_numpy(x))
    np.testing.assert_allclose(embeddings.detach().numpy(), h, atol=1e-12)
    h = np.maximum(h @ s["layers.0.weight"].T + s["layers.0.bias"], 0)
    expected = (h @ s["layers.3.weight"].T + s["layers.3.bias"])[:, 0]
    np.testing.assert_allclose(score_head(embeddings).detach().numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("n", [0, 1, 9000])
@pytest.mark.parametrize("scale", [0.0, 1e-4, 5.0, 300.0])
def test_numpy_head_equals_torch(n: int, scale: float) -> None:
    head = RankingHead(24, NARROW).eval()
    with torch.no_grad():
        for parameter in head.parameters():  # norms and biases that are not 1 and 0
            parameter.add_(torch.randn_like(parameter))
        features = (torch.randn(n, 24) * scale + 1).half().float()
        expected = head(features).numpy()
    scores = numpy_of(head)(features.numpy().astype(np.float16))
    assert scores.shape == (n,) and scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4 if scale > 1 else 1e-5)


def test_a_head_attends_by_its_formula() -> None:
    """Two tokens that stay and five that eight queries look at, with torch and without."""
    head = RankingHead(0, NARROW, (16, 2)).eval()
    rows = torch.randn(6, 7 * 16)
    tokens = rows.reshape(6, 7, 16)
    with torch.no_grad():
        untrained = torch.cat([rows[:, :32], tokens[:, 2:].mean(1)], dim=1)
        torch.testing.assert_close(attend(rows, head.queries, 2), untrained)
        head.queries.normal_(std=3)
        parts = [rows[:, :32]]
        for q, query in enumerate(head.queries):
            looks = torch.softmax(tokens[:, 2:] @ query / 4, dim=1)
            parts.append((looks[..., None] * tokens[:, 2:, 2 * q : 2 * q + 2]).sum(1))
        expected = head.score_head(head.projector(torch.cat(parts, dim=1)))
        torch.testing.assert_close(head(rows), expected)
    small = numpy_of(head)
    np.testing.assert_allclose(small(rows.numpy()), expected.numpy(), rtol=1e-4, atol=1e-5)
    assert small.attention == (16, 2)
    with pytest.raises(CheckpointError, match="rows of 48 numbers, and as many more patch tokens"):
        small(np.zeros((3, 50), np.float32))


def test_rows_of_another_width_are_refused() -> None:
    head = numpy_of(RankingHead(24, NARROW))
    assert head.input_dim == 24
    for shape in ((3, 5), (24,), (2, 2, 24)):
        with pytest.raises(CheckpointError, match="24"):
            head(np.zeros(shape, np.float32))
