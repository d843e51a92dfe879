"""Backbones by local directory: what is read from their files, and what is kept of their tokens."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import MODEL_KINDS

from mirip_fast.data.hashes import HashMemory
from mirip_fast.errors import BackboneError, ConfigError
from mirip_fast.features import backbone_files, tiny_random
from mirip_fast.features.backbone import load_backbone
from mirip_fast.features.backbone_files import BackboneSpec, find_backbone, locate
from mirip_fast.features.pooling import (
    head_input,
    head_kinds,
    kind_shape,
    middle_layers,
    pool_tokens,
    stored_kinds,
)
from mirip_fast.features.views import View, effective_size, make_views

Models = Callable[[str], Path]


def spec_of(folder: Path) -> BackboneSpec:
    with HashMemory(None) as hashes:
        return find_backbone(str(folder), hashes.sha256)


def copy_of(folder: Path, to: Path, **preprocessing: object) -> Path:
    """A copy that may be changed, with other values in preprocessor_config.json."""
    shutil.copytree(folder, to)
    path = to / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **preprocessing}))
    return to


def pictures(n: int, size: int) -> torch.Tensor:
    """uint8 [n, size, size, 3]."""
    return torch.randint(256, (n, size, size, 3), dtype=torch.uint8)


@pytest.mark.parametrize("kind", MODEL_KINDS)
@pytest.mark.parametrize("size", [32, 48])
def test_tokens_are_those_of_the_model(model_dir: Models, kind: str, size: int) -> None:
    registers = MODEL_KINDS[kind]
    spec = spec_of(model_dir(kind))
    assert (spec.hidden_size, spec.patch_size, spec.num_layers) == (32, 8, 2)
    assert spec.num_register_tokens == registers and spec.trained
    assert spec.mean == (0.4, 0.5, 0.6) and spec.std == (0.3, 0.2, 0.25)
    backbone = load_backbone(spec, torch.device("cpu"), "fp32")
    assert not backbone.model.training
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    images = pictures(2, size)
    cls, patches = backbone.tokens(backbone.normalise(images))
    # Independently: normalise by hand, take CLS and the last side² tokens.
    values = images.double().numpy() / 255
    pixels = torch.from_numpy((values - [0.4, 0.5, 0.6]) / [0.3, 0.2, 0.25])
    options = {"interpolate_pos_encoding": True} if kind == "vit" else {}
    with torch.no_grad():
        output = backbone.model(pixels.permute(0, 3, 1, 2).float(), **options)
    tokens = output.last_hidden_state
    side = size // 8
    assert tokens.shape[1] == 1 + registers + side * side
    torch.testing.assert_close(cls, tokens[:, 0], rtol=1e-4, atol=1e-5)
    expected = tokens[:, -side * side :].reshape(2, side, side, 32)
    torch.testing.assert_close(patches, expected, rtol=1e-4, atol=1e-5)


def test_other_mean_and_std_give_other_features(model_dir: Models, tmp_path: Path) -> None:
    images = pictures(1, 32)
    features = []
    for name, values in (
        ("same", {}),
        ("mean", {"image_mean": [0.1] * 3}),
        ("std", {"image_std": [1, 1, 1]}),
    ):
        folder = copy_of(model_dir("dinov2"), tmp_path / name, **values)
        backbone = load_backbone(spec_of(folder), torch.device("cpu"), "fp32")
        features.append(backbone.tokens(backbone.normalise(images))[0])
    original = load_backbone(spec_of(model_dir("dinov2")), torch.device("cpu"), "fp32")
    torch.testing.assert_close(features[0], original.tokens(original.normalise(images))[0])
    assert (features[0] - features[1]).abs().max() > 1e-3
    assert (features[0] - features[2]).abs().max() > 1e-3


@pytest.mark.parametrize("wrong", [None, [0.5], 0.5, [0.5, "a", 0.5], [0.5, None, 0.5], [1, 2, 0]])
def test_mean_and_std_that_make_no_sense_are_told(
    model_dir: Models, tmp_path: Path, wrong: object
) -> None:
    folder = copy_of(model_dir("dinov2"), tmp_path / "m", image_std=wrong)
    with pytest.raises(BackboneError, match=r"preprocessor_config\.json: image_std"):
        spec_of(folder)


def test_a_model_that_says_nothing_of_mean_and_std_is_taken_for_imagenet_s(
    model_dir: Models, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copy_of(model_dir("dinov2"), tmp_path / "m")
    (folder / "preprocessor_config.json").unlink()
    assert spec_of(folder).mean == backbone_files.IMAGENET_MEAN
    assert "ImageNet" in caplog.text


def test_tokens_that_do_not_add_up_are_told(model_dir: Models) -> None:
    spec = replace(spec_of(model_dir("registers")), num_register_tokens=3)
    backbone = load_backbone(spec, torch.device("cpu"), "fp32")
    with pytest.raises(BackboneError, match="21 tokens for 32 × 32 pixels"):
        backbone.tokens(backbone.normalise(pictures(1, 32)))


def test_weights_id_is_of_the_content(model_dir: Models, tmp_path: Path) -> None:
    first, same = (copy_of(model_dir("dinov2"), tmp_path / name) for name in ("a", "b"))
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


def test_a_model_that_is_no_vit_is_refused(model_dir: Models, tmp_path: Path) -> None:
    folder = copy_of(model_dir("dinov2"), tmp_path / "m")
    (folder / "config.json").write_text(json.dumps({"model_type": "resnet", "hidden_size": 8}))
    with pytest.raises(BackboneError, match="patch_size"):
        spec_of(folder)
    (folder / "config.json").write_text("{not json")
    with pytest.raises(BackboneError, match=r"config\.json"):
        spec_of(folder)


def test_damaged_weights_are_told(model_dir: Models, tmp_path: Path) -> None:
    folder = copy_of(model_dir("dinov2"), tmp_path / "m")
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(BackboneError, match="can not be loaded"):
        load_backbone(spec_of(folder), torch.device("cpu"), "fp32")
    (folder / "model.safetensors").unlink()
    with pytest.raises(BackboneError, match="no weights"):
        spec_of(folder)


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


def hub(monkeypatch: pytest.MonkeyPatch, *answers: object) -> list[object]:
    """A hub that is reached and gives these answers, one per call; returns those not given yet."""
    import huggingface_hub
    from huggingface_hub import constants

    left = list(answers)

    def answer(name: str, **how: object) -> str:
        value = left.pop(0)
        if isinstance(value, Exception):
            raise value
        return str(value)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return left


def test_a_download_that_works_at_last_is_used(
    model_dir: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_dir("dinov2")
    left = hub(monkeypatch, OSError("cache"), ConnectionError("once"), folder)
    assert locate("someone/model", pause_s=0) == folder and not left


def test_a_download_that_broke_off_is_gone_on_with(
    model_dir: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = model_dir("dinov2")
    part = copy_of(whole, tmp_path / "part")
    (part / "model.safetensors").rename(part / "model-00001-of-00002.safetensors")
    weights = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (part / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    left = hub(monkeypatch, part, whole)
    assert locate("someone/model", pause_s=0) == whole and not left
    (part / "model-00002-of-00002.safetensors").touch()
    hub(monkeypatch, part)
    assert locate("someone/model", pause_s=0) == part


def test_what_will_not_help_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.errors import HFValidationError

    left = hub(monkeypatch, OSError("cache"), HFValidationError("no such repository"), "never")
    with pytest.raises(BackboneError, match="no such repository"):
        locate("someone/modell", pause_s=0)
    assert left == ["never"]
    left = hub(monkeypatch, OSError("cache"), tmp_path, "never")
    with pytest.raises(BackboneError, match="no config.json with"):
        locate("someone/dataset", pause_s=0)
    assert left == ["never"]


def test_without_a_network_nothing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    left = hub(monkeypatch, OSError("cache"), "never")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BackboneError, match="HF_HUB_OFFLINE") as error:
        locate("facebook/dinov2-large", pause_s=0)
    assert left == ["never"] and "asked the hub" not in str(error.value)


TINY_RANDOM_CHECKSUM = "75b81a0ba570eb007b6a058166dbe5e75a34ffc60cd48516967baf81d1ab5adf"


def test_the_built_in_backbone_is_the_same_everywhere() -> None:
    code = (
        "import hashlib, mirip_fast.features.tiny_random as t;"
        "h = hashlib.sha256();"
        "[h.update(v.numpy().tobytes()) for _, v in sorted(t.build().state_dict().items())];"
        "print(h.hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == TINY_RANDOM_CHECKSUM
    checksum = hashlib.sha256()
    for _, value in sorted(tiny_random.build().state_dict().items()):
        checksum.update(value.numpy().tobytes())
    assert checksum.hexdigest() == TINY_RANDOM_CHECKSUM


def test_the_built_in_backbone_says_that_it_is_untrained(caplog: pytest.LogCaptureFixture) -> None:
    spec = backbone_files.tiny_random_spec()
    assert not spec.trained and (spec.hidden_size, spec.patch_size) == (64, 14)
    backbone = load_backbone(spec, torch.device("cpu"), "fp32")
    assert "UNTRAINED" in caplog.text
    cls, patches = backbone.tokens(backbone.normalise(pictures(2, 42)))
    assert cls.shape == (2, 64) and patches.shape == (2, 3, 3, 64)


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
    assert [v.name for v in make_views("full", 28, 14)] == ["28", "28-flip"]
    assert [v.size for v in make_views("scales", 224, 16)] == [224, 208, 240]  # 201.6 and 246.4


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


def test_cls_and_single_patches_are_kept_as_they_are() -> None:
    cls, patches = torch.randn(3, 5).half(), torch.randn(3, 2, 2, 5).half()
    assert torch.equal(pool_tokens("cls", cls, patches), cls.float())
    every = pool_tokens("patch", cls, patches)
    assert every.shape[1:] == kind_shape("patch", 5, 2) == (4, 5)
    assert torch.equal(every[:, 1], patches[:, 0, 1].float())  # row by row


def test_a_mean_of_half_precision_tokens_is_taken_in_single() -> None:
    patches = torch.full((1, 40, 40, 1), 60.0, dtype=torch.float16)  # their sum is beyond float16
    assert pool_tokens("mean", torch.zeros(1, 1), patches).item() == 60.0


def test_a_head_sees_the_kinds_side_by_side() -> None:
    cls, mean = np.ones((2, 3), np.float16), np.zeros((2, 3), np.float16)
    assert head_kinds("cls+mean") == ("cls", "mean") and head_kinds("cls") == ("cls",)
    joined = head_input([cls, mean])
    assert joined.dtype == np.float32 and joined.tolist() == [[1, 1, 1, 0, 0, 0]] * 2


def test_stored_kinds() -> None:
    assert stored_kinds("none") == ("cls",) and stored_kinds("grid:4") == ("cls", "grid4")
    for wrong in ("grid", "grid:0", "some"):
        with pytest.raises(ConfigError, match="grid:K"):
            stored_kinds(wrong)


@pytest.mark.parametrize("kind", sorted(MODEL_KINDS))
def test_middle_layers_are_those_of_the_model(model_dir: Models, kind: str) -> None:
    """Of the same pass, each through the final norm: what a head learns from is what it is called."""
    spec = spec_of(model_dir(kind))
    backbone = load_backbone(spec, torch.device("cpu"), "fp32")
    pixels = backbone.normalise(pictures(2, 32))
    rows = backbone.features(pixels, ("cls", "mean", "cls_1", "mean_1"))
    options = {"interpolate_pos_encoding": True} if kind == "vit" else {}
    with torch.no_grad():
        states = backbone.model(pixels, output_hidden_states=True, **options).hidden_states
    norm = next(
        m for m in reversed(list(backbone.model.children())) if isinstance(m, torch.nn.LayerNorm)
    )
    assert len(states) == 3  # before the first block, after each of two
    for name, state in (("_1", states[1]), ("", states[2])):
        tokens = state.double()
        mean, variance = tokens.mean(-1, keepdim=True), tokens.var(-1, unbiased=False, keepdim=True)
        expected = (tokens - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias
        torch.testing.assert_close(
            rows[f"cls{name}"].double(), expected[:, 0], rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(
            rows[f"mean{name}"].double(), expected[:, -16:].mean(1), rtol=1e-4, atol=1e-4
        )


def test_which_layers_are_kept() -> None:
    assert middle_layers("last", 24) == () and middle_layers("auto", 24) == (12, 18)
    assert middle_layers("6,12,24", 24) == (6, 12) and middle_layers("0.25,1.0", 12) == (3,)
    assert stored_kinds("mean", (12,)) == ("cls", "mean", "cls_12", "mean_12")
    assert stored_kinds("none", (12,)) == ("cls", "cls_12")
    for wrong in ("middle", "0", "25", "6;12", "1.5", "-1", "nan", "1e9"):
        with pytest.raises(ConfigError, match="blocks from 1 to 24"):
            middle_layers(wrong, 24)
