"""What learns, how fast, and with which weight decay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from finetune_models import pictures, prepared, small_model

from mirip_fast.config import Config, FinetuneConfig
from mirip_fast.errors import ConfigError
from mirip_fast.finetune.model import merged_state
from mirip_fast.finetune.strategy import ALL, parameter_groups, parse_strategy, unfreeze

KINDS = ["dinov2", "registers", "dinov3", "vit"]
ModelDir = Callable[[str], Path]


def config_of(strategy: str, **settings: object) -> Config:
    return Config(finetune=FinetuneConfig(strategy=strategy, **settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_llrd_gives_every_layer_its_rate(model_dir: ModelDir, kind: str) -> None:
    config = config_of("llrd", layer_decay=0.5)
    config.train.learning_rate = 1e-3
    model, strategy = prepared(model_dir(kind), config)
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {
        names[id(p)]: group["lr"]
        for group in parameter_groups(model, strategy, config)
        for p in group["params"]
    }
    blocks = [{id(p) for p in block.parameters()} for block in model.blocks]
    for name, parameter in model.named_parameters():
        if "mask_token" in name or "pooler" in name:
            assert name not in rates
            continue
        expected = 1e-3
        if id(parameter) in blocks[1]:
            expected = 1e-3 * 0.5
        elif id(parameter) in blocks[0]:
            expected = 1e-3 * 0.25
        elif "embeddings" in name:
            expected = 1e-3 * 0.125
        assert rates[name] == pytest.approx(expected), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", ["llrd", "gradual", "lora"])
def test_only_matrices_decay_and_nothing_is_twice(
    model_dir: ModelDir, kind: str, strategy: str
) -> None:
    config = config_of(strategy)
    model, parsed = prepared(model_dir(kind), config)
    unfreeze(model, parsed, parsed.blocks or ALL)
    decays: dict[str, bool] = {}
    names = {id(p): name for name, p in model.named_parameters()}
    for group in parameter_groups(model, parsed, config):
        assert group["weight_decay"] in (0.0, 0.01)
        for parameter in group["params"]:
            assert names[id(parameter)] not in decays
            decays[names[id(parameter)]] = group["weight_decay"] > 0
    assert decays.keys() == {name for name, _ in model.trainable()}
    for name, value in decays.items():
        free = ("bias", "norm", "lambda", "cls_token", "register", "position", "projector.layers.1.", "projector.layers.5.")  # fmt: skip
        assert value == (not any(word in name for word in free)), name


def learning(kind: str, folder: Path, strategy: str, epoch: int, **settings: object) -> set[str]:
    model, parsed = prepared(folder, config_of(strategy, **settings))
    unfreeze(model, parsed, parsed.blocks_at(epoch, head_epochs=0))
    return {name for name, _ in model.trainable()}


def test_strategies_choose_what_learns(model_dir: ModelDir) -> None:
    folder = model_dir("dinov2")
    model = small_model(folder)
    head = {name for name, _ in model.named_parameters() if name.startswith("head.")}
    norm = {"backbone.layernorm.weight", "backbone.layernorm.bias"}
    last = {n for n, _ in model.named_parameters() if ".layer.1." in n}
    everything = {n for n, _ in model.named_parameters() if "mask_token" not in n}
    assert learning("dinov2", folder, "full", 1) == everything
    assert learning("dinov2", folder, "llrd", 1) == everything
    assert learning("dinov2", folder, "last:1", 1) == head | norm | last
    schedule = {"unfreeze": "1:0,3:1,4:all"}
    rising = {1: head, 2: head, 3: head | norm | last, 4: everything, 9: everything}
    for epoch, expected in rising.items():
        assert learning("dinov2", folder, "gradual", epoch, **schedule) == expected
    assert all(".lora_" in n for n in learning("dinov2", folder, "lora", 1) - head)


def test_frozen_parts_stay_in_eval_mode(model_dir: ModelDir) -> None:
    model, strategy = prepared(model_dir("dinov2"), config_of("last:1"))
    unfreeze(model, strategy, 1)
    model.train()
    first, second = model.blocks
    assert (first.training, second.training, model.parts[0].training) == (0, 1, 0)
    assert model.parts[-1].training and model.head.training
    model.eval()
    assert not second.training


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "all"}, "use full, last:N"),
        ({"strategy": "last"}, "use full, last:N"),
        ({"strategy": "full:2"}, "use full, last:N"),
        ({"strategy": "last:13"}, "has 12 blocks"),
        ({"strategy": "last:0"}, "head-only"),
        ({"strategy": "gradual", "unfreeze": "2"}, "EPOCH:BLOCKS"),
        ({"strategy": "gradual", "unfreeze": "0:1"}, "EPOCH:BLOCKS"),
        ({"strategy": "gradual", "unfreeze": "3:1,2:2"}, "must rise"),
        ({"strategy": "gradual", "unfreeze": "1:99"}, "has 12 blocks"),
    ],
)
def test_wrong_strategies_are_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_strategy(FinetuneConfig(**settings), 12)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_lora_starts_as_the_backbone_and_merges_like_peft(model_dir: ModelDir, kind: str) -> None:
    from peft.tuners.lora import LoraLayer

    images, _ = pictures(4)
    plain = small_model(model_dir(kind)).eval()
    model, _strategy = prepared(model_dir(kind), config_of("lora", lora_rank=4))
    model.eval()
    with torch.no_grad():
        assert torch.allclose(model(images), plain(images), atol=1e-6)
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.2)
        changed = model(images)
    assert not torch.allclose(changed, plain(images), atol=1e-3)
    adapted = [n for n, m in model.backbone.named_modules() if isinstance(m, LoraLayer)]
    assert len(adapted) == 8 and all("attention" in name for name in adapted)
    plain.backbone.load_state_dict(merged_state(model.backbone))
    with torch.no_grad():
        assert torch.allclose(plain(images), changed, atol=1e-5)
        for name, module in list(model.backbone.named_modules()):
            if isinstance(module, LoraLayer):
                module.merge()  # peft's own
                assert torch.allclose(
                    module.base_layer.weight, plain.backbone.get_submodule(name).weight, atol=1e-6
                )


def test_lora_targets_are_chosen_by_name(model_dir: ModelDir) -> None:
    model, _ = prepared(model_dir("dinov2"), config_of("lora", lora_targets="q_proj, fc1"))
    adapted = {
        name.split(".lora_")[0] for name, _ in model.backbone.named_parameters() if "lora_A" in name
    }
    assert {name.rpartition(".")[2] for name in adapted} == {"q_proj", "fc1"} and len(adapted) == 4
    with pytest.raises(ConfigError, match=r"--lora-targets nope.*attention\.q_proj"):
        prepared(model_dir("dinov2"), config_of("lora", lora_targets="q_proj,nope"))


CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def test_every_strategy_has_a_file_of_settings() -> None:
    from mirip_fast.finetune.strategy import KINDS as STRATEGIES
    from mirip_fast.settings import resolve

    found = set()
    for path in sorted(CONFIGS.glob("finetune-*.yaml")):
        config = resolve((path,)).config
        strategy = parse_strategy(config.finetune, 12)
        found.add(strategy.kind)
        assert f"--config configs/{path.name}" in path.read_text()
    assert found == set(STRATEGIES)
