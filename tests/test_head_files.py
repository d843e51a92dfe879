"""Heads kept as safetensors: what is written scores the same when read, and only where it belongs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mirip_fast.config import EmbedConfig, HeadConfig
from mirip_fast.errors import CheckpointError
from mirip_fast.features.recipe import View
from mirip_fast.models.head import RankingHead
from mirip_fast.models.model_info import ModelInfo
from mirip_fast.models.numpy_head import HEAD_FILE, NumpyHead
from mirip_fast.ranking import scorer
from mirip_fast.ranking.head_files import (
    Member,
    load_head,
    load_members,
    save_ensemble,
    save_head,
)
from mirip_fast.ranking.scorer import load_score_model
from mirip_fast.training.run_folder import ENSEMBLE

INFO = ModelInfo(
    fingerprint={"backbone": "b"},
    embed=EmbedConfig(),
    views=(View(224, False), View(224, True)),
    features="cls",
    tiers=("S", "A"),
    input_dim=5,
)
NARROW = HeadConfig(projector_hidden_dim=7, projector_output_dim=6, score_hidden_dim=4)


def head(seed: int) -> NumpyHead:
    torch.manual_seed(seed)
    state = RankingHead(5, NARROW).state_dict()
    return NumpyHead({name: value.numpy() for name, value in state.items()})


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "best_model.pt"
    path.write_bytes(b"weights")
    return path


@pytest.fixture
def features(monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """[n, V, D] rows that every store has."""
    rows = np.random.default_rng(0).standard_normal((9, 2, 5)).astype(np.float32)
    monkeypatch.setattr(scorer, "read_features", lambda *_: rows)
    return rows


def test_the_head_of_other_weights_is_left_aside(checkpoint: Path) -> None:
    assert load_head(checkpoint) is None
    save_head(checkpoint.parent, checkpoint, head(0).arrays, INFO)
    found = load_head(checkpoint)
    assert found is not None and found[0] == INFO
    rows = np.ones((3, 5), np.float32)
    np.testing.assert_array_equal(found[1](rows), head(0)(rows))
    checkpoint.write_bytes(b"other weights")
    assert load_head(checkpoint) is None


def test_an_ensemble_is_the_mean_of_standardised_members(
    tmp_path: Path, features: np.ndarray
) -> None:
    members = [Member(head(0), 3.0, 0.5), Member(head(1), -100.0, 20.0)]
    model = load_score_model(save_ensemble(tmp_path, members, INFO))
    assert model.info == INFO
    rows = features.reshape(-1, 5)
    parts = (head(0)(rows) - 3) / 0.5, (head(1)(rows) + 100) / 20
    expected = np.mean(parts, axis=0).reshape(9, 2)
    store = object()
    views = model.score_views(store, [b""] * 9)  # type: ignore[arg-type]
    assert views.shape == (9, 2)
    np.testing.assert_allclose(views, expected, rtol=1e-5)
    scores = model.score(store, [b""] * 9)  # type: ignore[arg-type]
    np.testing.assert_allclose(scores, expected.mean(1), rtol=1e-5)


@pytest.mark.parametrize("name", [HEAD_FILE, ENSEMBLE])
def test_damaged_files_are_named(checkpoint: Path, name: str) -> None:
    (checkpoint.parent / name).write_bytes(b"broken")
    with pytest.raises(CheckpointError, match=name):
        load_head(checkpoint) if name == HEAD_FILE else load_members(checkpoint.with_name(name))


def test_a_head_is_no_ensemble(checkpoint: Path) -> None:
    save_head(checkpoint.parent, checkpoint, head(0).arrays, INFO)
    with pytest.raises(CheckpointError, match="no ensemble"):
        load_score_model(checkpoint.with_name(HEAD_FILE))
