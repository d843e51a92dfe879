"""A step of end-to-end training: gradients of micro-batches, noise, the objective."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from finetune_models import pictures, prepared, small_model

from mirip_fast.config import Config, TrainConfig
from mirip_fast.errors import ConfigError
from mirip_fast.finetune.model import (
    ScoringModel,
    add_patch_dropout,
    add_stochastic_depth,
    checkpoint_blocks,
)
from mirip_fast.finetune.step import Part, batch_loss, count_right, make_objective, take_gradients
from mirip_fast.finetune.strategy import unfreeze
from mirip_fast.models.losses import PairLoss

KINDS = ["dinov2", "registers", "dinov3", "vit"]
ModelDir = Callable[[str], Path]


def double_model(folder: Path, *, noise: bool) -> ScoringModel:
    config = Config()
    model, strategy = prepared(folder, config, dropout=0.3 if noise else 0.0)
    model = model.double()
    if noise:
        add_stochastic_depth(model, 0.5)
        if folder.name != "dinov3":
            add_patch_dropout(model, 0.5)
    unfreeze(model, strategy, -1)
    model.train()
    return model


def gradients(model: ScoringModel) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in model.trainable():
        found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = None
    return found


def assert_close(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    scale = max(float(value.abs().max()) for value in second.values())
    assert scale > 1e-3
    for name, value in first.items():
        assert float((value - second[name]).abs().max()) <= 1e-9 * scale, name


def part(model: ScoringModel, images: torch.Tensor, seed: int) -> Part:
    def score() -> torch.Tensor:
        torch.manual_seed(seed)
        return model(images)

    return score


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("noise", [False, True])
def test_micro_batches_give_the_gradient_of_the_whole_batch(
    model_dir: ModelDir, kind: str, noise: bool
) -> None:
    model = double_model(model_dir(kind), noise=noise)
    images, tiers = pictures(11)
    labels, loss_of = torch.from_numpy(tiers), PairLoss(kind="logistic" if noise else "margin")
    for sizes in ([11], [4, 4, 3], [1] * 11):
        parts = [part(model, chunk, 100 + i) for i, chunk in enumerate(images.split(sizes))]
        scores = torch.cat([each() for each in parts])
        assert noise != torch.allclose(scores, torch.cat([part(model, images, 7)()]), atol=1e-6)
        whole = loss_of(scores, labels)
        whole.backward()
        expected = gradients(model)
        if sizes == [4, 4, 3]:
            checkpoint_blocks(model)
        parameters = [p for _, p in model.trainable()]
        for scale in (1.0, 1024.0):
            found, _ = take_gradients(
                parts, 11, lambda s: loss_of(s, labels), parameters, scale=scale
            )
            assert found == pytest.approx(whole.item(), rel=1e-12)
            assert_close({n: g / scale for n, g in gradients(model).items()}, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_phase_one_and_the_head(model_dir: ModelDir, kind: str) -> None:
    from mirip_fast.features.backbone import load_backbone
    from mirip_fast.features.recipe import pool_tokens

    model = small_model(model_dir(kind)).eval()
    images, _ = pictures(3)
    backbone = load_backbone(model.spec, torch.device("cpu"), "fp32")
    cls, patches = backbone.tokens(backbone.normalise(images))
    features = torch.cat([pool_tokens(kind, cls, patches) for kind in ("cls", "mean")], -1)
    with torch.no_grad():
        assert torch.allclose(model(images), model.head(features), atol=1e-6)


def test_stochastic_depth_leaves_out_trained_blocks_only(model_dir: ModelDir) -> None:
    model = small_model(model_dir("dinov2"))
    add_stochastic_depth(model, 0.5)
    images, _ = pictures(64)
    _first, last = model.blocks
    seen: list[torch.Tensor] = []
    last.register_forward_hook(lambda _, args, out: seen.append((out - args[0]).detach()))

    def added() -> torch.Tensor:
        seen.clear()
        with torch.no_grad():
            model(images)
        return seen[0].abs().amax(dim=(1, 2))

    model.eval()
    plain = added()
    model.train()
    noisy = added()
    dropped = noisy == 0
    assert 16 < int(dropped.sum()) < 48  # 64 images, probability 1/2
    assert torch.allclose(noisy[~dropped], 2 * plain[~dropped], rtol=1e-3, atol=1e-5)
    model.backbone.requires_grad_(False)
    model.train()
    assert torch.equal(added(), plain)


def test_patch_dropout_shows_fewer_patches_in_training_only(model_dir: ModelDir) -> None:
    model = small_model(model_dir("registers"))
    add_patch_dropout(model, 0.75)
    images, _ = pictures(2)
    lengths: list[int] = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    for mode in (True, False):
        model.train(mode)
        model(images)
    assert lengths == [1 + 4 + 4, 1 + 4 + 16]


def test_patch_dropout_is_refused_with_rotary_positions(model_dir: ModelDir) -> None:
    model = small_model(model_dir("dinov3"))
    with pytest.raises(ConfigError, match="--patch-dropout.*rotary"):
        add_patch_dropout(model, 0.5)


@pytest.mark.parametrize("kind", ["margin", "logistic"])
@pytest.mark.parametrize("with_groups", [False, True])
def test_pairs_of_mixtures_weigh_as_much_as_their_grades_differ(
    kind: str, with_groups: bool
) -> None:
    rng = np.random.default_rng(3)
    scores, grades = rng.normal(size=9), rng.uniform(-3, 0, 9)
    grades[4] = grades[2]
    within = rng.integers(2, size=9) if with_groups else None
    total = weights = right = 0.0
    for i in range(9):
        for j in range(9):
            if grades[i] > grades[j] and (within is None or within[i] == within[j]):
                weight, gap = grades[i] - grades[j], scores[i] - scores[j]
                loss = max(0.0, 1 - gap) if kind == "margin" else np.log1p(np.exp(-gap))
                total, weights = total + weight * loss, weights + weight
                right += weight * (gap > 0)
    objective = make_objective(TrainConfig(loss=kind))
    codes = None if within is None else torch.from_numpy(within)
    tensors = torch.from_numpy(scores), torch.from_numpy(grades), codes
    assert float(batch_loss(objective, *tensors, mixed=True)) == pytest.approx(
        total / weights, rel=1e-9
    )
    assert count_right(*tensors, mixed=True) == pytest.approx((right, weights))
