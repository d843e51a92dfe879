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
    BOOTSTRAP_FILE,
    Member,
    load_bootstrap,
    load_head,
    load_members,
    save_bootstrap,
    save_ensemble,
    save_head,
)
from mirip_fast.ranking.scorer import ScoreModel, load_score_model
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
    expected = np.array(
        [
            [
                ((float(head(0)(row[None])[0]) - 3) / 0.5 + (float(head(1)(row[None])[0]) + 100) / 20) / 2
                for row in views
            ]
            for views in features
        ]
    )  # fmt: skip
    store = object()
    views = model.score_views(store, [b""] * 9)  # type: ignore[arg-type]
    assert views.shape == (9, 2)
    np.testing.assert_allclose(views, expected, rtol=1e-5)
    scores = model.score(store, [b""] * 9)  # type: ignore[arg-type]
    np.testing.assert_allclose(scores, expected.mean(1), rtol=1e-5)
    assert model.score_bootstrap(store, [b""] * 9) is None  # type: ignore[arg-type]


def test_bootstrap_heads_belong_to_one_model(checkpoint: Path, features: np.ndarray) -> None:
    heads = [Member(head(i), 0.1 * i, 1 + i) for i in range(3)]
    save_bootstrap(checkpoint, heads, INFO)
    model = ScoreModel(checkpoint, INFO, (Member(head(0)),))
    scores = model.score_bootstrap(object(), [b""] * 9)  # type: ignore[arg-type]
    assert scores is not None and scores.shape == (3, 9, 2)
    for member, mine in zip(heads, scores, strict=True):
        expected = member(features.reshape(-1, 5)).reshape(9, 2)
        np.testing.assert_allclose(mine, expected, atol=2e-3)  # kept in half precision
    checkpoint.write_bytes(b"other weights")
    assert load_bootstrap(checkpoint) is None


@pytest.mark.parametrize("name", [HEAD_FILE, ENSEMBLE, BOOTSTRAP_FILE])
def test_damaged_files_are_named(checkpoint: Path, name: str) -> None:
    (checkpoint.parent / name).write_bytes(b"broken")
    load = {HEAD_FILE: load_head, BOOTSTRAP_FILE: load_bootstrap}.get(name)
    with pytest.raises(CheckpointError, match=name):
        load(checkpoint) if load else load_members(checkpoint.with_name(name))


def test_a_head_is_no_ensemble(checkpoint: Path) -> None:
    save_head(checkpoint.parent, checkpoint, head(0).arrays, INFO)
    with pytest.raises(CheckpointError, match="no ensemble"):
        load_score_model(checkpoint.with_name(HEAD_FILE))
