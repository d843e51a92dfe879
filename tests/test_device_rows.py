"""Rows go through the head in pieces; nothing but time and memory may depend on how large they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mirip_fast.config import HeadConfig
from mirip_fast.models.head import RankingHead
from mirip_fast.models.losses import PairLoss
from mirip_fast.ranking import objective
from mirip_fast.ranking.objective import DeviceRows, score_one_view, score_rows
from mirip_fast.ranking.rows import Rows

CPU = torch.device("cpu")


def made(views: int, dropout: float = 0.0, n: int = 50) -> tuple[RankingHead, DeviceRows]:
    rng = np.random.default_rng(views)
    features = rng.normal(size=(n, views, 6)).astype(np.float32)
    rows = Rows([str(i) for i in range(n)], features, rng.integers(0, 4, n), [None] * n)
    torch.manual_seed(0)
    head = RankingHead(6, HeadConfig("cls", 16, 8, 8, dropout))
    return head, DeviceRows.of(rows, CPU)


def gradients(
    head: RankingHead, rows: DeviceRows, index: torch.Tensor
) -> tuple[float, list[torch.Tensor]]:
    """The loss of all pairs of the rows in ``index``, and its gradients."""
    head.train()
    head.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    scores = score_one_view(head, rows, index, np.random.default_rng(2))
    loss = PairLoss()(scores, rows.tiers[index])
    loss.backward()
    return float(loss.detach()), [p.grad.clone() for p in head.parameters() if p.grad is not None]


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("size", [1, 7, 50])
def test_pieces_have_the_gradient_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, views: int, size: int
) -> None:
    head, rows = made(views)
    index = torch.from_numpy(np.random.default_rng(3).permutation(50))
    loss, whole = gradients(head, rows, index)
    scores = score_rows(head, rows.features)
    monkeypatch.setattr(objective, "_CPU_ROWS", size)
    piecewise_loss, piecewise = gradients(head, rows, index)
    assert piecewise_loss == pytest.approx(loss, rel=1e-6)
    for one, other in zip(piecewise, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(score_rows(head, rows.features), scores)


def test_with_dropout_a_piece_learns_from_the_scores_that_it_gave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The gradient is that of the noise that the loss saw: by differences, the same noise twice."""
    head, rows = made(1, dropout=0.3)
    head.double()
    doubled = DeviceRows(rows.features.double(), rows.tiers, None, None, None)
    monkeypatch.setattr(objective, "_CPU_ROWS", 16)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    index = torch.arange(50)
    _, found = gradients(head, doubled, index)
    weight = next(head.parameters())
    step = torch.zeros_like(weight.data)
    step[2, 3] = 1e-6
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step
        losses.append(gradients(head, doubled, index)[0])
        with torch.no_grad():
            weight -= sign * step
    assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(float(found[0][2, 3]), rel=1e-3)
