"""Backbones by local directory: what is read from their files, and what is kept of their tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mirip_fast.data.hashes import HashMemory
from mirip_fast.errors import BackboneError, ConfigError
from mirip_fast.features import backbone_files
from mirip_fast.features.backbone import load_backbone
from mirip_fast.features.backbone_files import find_backbone, locate
from mirip_fast.features.pooling import kind_shape, pool_tokens, stored_kinds
from mirip_fast.features.views import View, effective_size, make_views

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "patch_size": 8, "image_size": 32,
}  # fmt: skip


def save_model(folder: Path, kind: str, *, mean: float = 0.4, std: float = 0.3) -> Path:
    import transformers

    torch.manual_seed(0)
    config_class, model_class, extra = {
        "dinov2": (transformers.Dinov2Config, transformers.Dinov2Model, {}),
        "registers": (
            transformers.Dinov2WithRegistersConfig,
            transformers.Dinov2WithRegistersModel,
            {"num_register_tokens": 4},
        ),
        "dinov3": (
            transformers.DINOv3ViTConfig,
            transformers.DINOv3ViTModel,
            {"num_register_tokens": 3},
        ),
        "vit": (transformers.ViTConfig, transformers.ViTModel, {}),
    }[kind]
    model_class(config_class(**SMALL, **extra)).save_pretrained(folder)
    settings = {"image_mean": [mean] * 3, "image_std": [std] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def spec_of(folder: Path):
    with HashMemory(None) as hashes:
        return find_backbone(str(folder), hashes.sha256)


@pytest.mark.parametrize(
    ("kind", "registers"), [("dinov2", 0), ("registers", 4), ("dinov3", 3), ("vit", 0)]
)
@pytest.mark.parametrize("size", [32, 48])
def test_tokens_are_those_of_the_model(
    tmp_path: Path, kind: str, registers: int, size: int
) -> None:
    spec = spec_of(save_model(tmp_path / kind, kind))
    assert (spec.hidden_size, spec.patch_size, spec.num_register_tokens) == (32, 8, registers)
    assert spec.mean == (0.4,) * 3 and spec.std == (0.3,) * 3
    backbone = load_backbone(spec, torch.device("cpu"), "fp32")
    images = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    cls, patches = backbone.tokens(backbone.normalise(torch.from_numpy(images)))
    # Independently: normalise by hand, take CLS and the last side² tokens.
    pixels = (
        torch.from_numpy((images.astype(np.float64) / 255 - 0.4) / 0.3).permute(0, 3, 1, 2).float()
    )
    options = {"interpolate_pos_encoding": True} if kind == "vit" else {}
    with torch.no_grad():
        tokens = backbone.model(pixels, **options).last_hidden_state
    side = size // 8
    assert tokens.shape[1] == 1 + registers + side * side
    torch.testing.assert_close(cls, tokens[:, 0], rtol=1e-4, atol=1e-5)
    expected = tokens[:, -side * side :].reshape(2, side, side, 32)
    torch.testing.assert_close(patches, expected, rtol=1e-4, atol=1e-5)


def test_weights_id_is_of_the_content(tmp_path: Path) -> None:
    first, same = save_model(tmp_path / "a", "dinov2"), save_model(tmp_path / "b" / "c", "dinov2")
    assert spec_of(first).weights_id == spec_of(same).weights_id
    weights = same / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert spec_of(first).weights_id != spec_of(same).weights_id
    config = json.loads((first / "config.json").read_text())
    before = spec_of(first).weights_id
    (first / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 0.5}))
    assert spec_of(first).weights_id != before


def test_a_model_that_is_no_vit_is_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", "dinov2")
    (folder / "config.json").write_text(json.dumps({"model_type": "resnet", "hidden_size": 8}))
    with pytest.raises(BackboneError, match="patch_size"):
        spec_of(folder)
    (folder / "config.json").write_text("{not json")
    with pytest.raises(BackboneError, match=r"config\.json"):
        spec_of(folder)


def test_damaged_weights_are_told(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", "dinov2")
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(BackboneError, match="can not be loaded"):
        load_backbone(spec_of(folder), torch.device("cpu"), "fp32")


def test_a_failing_download_is_tried_again_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import constants, errors

    calls = []

    def fail(name: str, **how: object) -> str:
        calls.append(how)
        if how.get("local_files_only"):
            raise errors.LocalEntryNotFoundError("not cached")
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(BackboneError) as error:
        locate("facebook/dinov2-large", attempts=3, pause_s=0)
    assert len(calls) == 4  # the cache, then three downloads
    for text in (
        "facebook/dinov2-large",
        str(constants.HF_HUB_CACHE),
        "hf download",
        "--backbone DIR",
    ):
        assert text in str(error.value)


def test_a_download_that_works_at_last_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    folder = save_model(tmp_path / "m", "dinov2")
    answers = [OSError("cache"), ConnectionError("once"), str(folder)]

    def answer(name: str, **how: object) -> str:
        value = answers.pop(0)
        if isinstance(value, Exception):
            raise value
        return value

    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert locate("someone/model", pause_s=0) == folder and not answers


def test_the_built_in_backbone_is_the_same_everywhere() -> None:
    code = (
        "import hashlib, mirip_fast.features.tiny_random as t;"
        "h = hashlib.sha256();"
        "[h.update(v.numpy().tobytes()) for _, v in sorted(t.build().state_dict().items())];"
        "print(h.hexdigest())"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    }
    assert runs == {"75b81a0ba570eb007b6a058166dbe5e75a34ffc60cd48516967baf81d1ab5adf\n"}
    assert not backbone_files.tiny_random_spec().trained


def test_sizes_and_views() -> None:
    assert effective_size(768, 14) == 756 and effective_size(224, 16) == 224
    with pytest.raises(ConfigError, match="smaller than one patch"):
        effective_size(10, 14)
    assert make_views("none", 756, 14) == (View(756),)
    assert make_views("flip", 756, 14) == (View(756), View(756, True))
    # 0.9 · 756 = 680.4 → 49 patches, 1.1 · 756 = 831.6 → 59 patches
    assert [v.size for v in make_views("scales", 756, 14)] == [756, 686, 826]
    assert [v.name for v in make_views("full", 756, 14)] == [
        "756", "686", "826", "756-flip", "686-flip", "826-flip",
    ]  # fmt: skip
    assert [v.size for v in make_views("scales", 28, 14)] == [28]  # 25.2 and 30.8 coincide with 28


@pytest.mark.parametrize(("kind", "cells"), [("mean", 1), ("grid2", 2), ("grid3", 3)])
def test_pooling_against_float64(kind: str, cells: int) -> None:
    patches = torch.randn(3, 7, 7, 5)
    pooled = pool_tokens(kind, torch.randn(3, 5), patches).double().numpy()
    expected = np.empty((3, cells, cells, 5))
    for i in range(cells):
        for j in range(cells):
            rows = slice(i * 7 // cells, -(-(i + 1) * 7 // cells))
            columns = slice(j * 7 // cells, -(-(j + 1) * 7 // cells))
            expected[:, i, j] = patches.double().numpy()[:, rows, columns].mean(axis=(1, 2))
    np.testing.assert_allclose(pooled.reshape(expected.shape), expected, atol=1e-6)
    assert pooled.shape[1:] == kind_shape(kind, 5, 7)


def test_stored_kinds() -> None:
    assert stored_kinds("none") == ("cls",) and stored_kinds("grid:4") == ("cls", "grid4")
    for wrong in ("grid", "grid:0", "some"):
        with pytest.raises(ConfigError, match="grid:K"):
            stored_kinds(wrong)
