"""Backbones by local directory: what is read from their files, and what is kept of their tokens."""

from __future__ import annotations

import contextlib
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
from safetensors.torch import load_file, save_file
from small_models import MODEL_KINDS

from mirip_fast.config import EmbedConfig
from mirip_fast.data.hashes import HashMemory
from mirip_fast.errors import BackboneError, ConfigError
from mirip_fast.features import backbone_files
from mirip_fast.features.backbone import Backbone, load_backbone
from mirip_fast.features.backbone_files import BackboneSpec, find_backbone
from mirip_fast.features.recipe import (
    View,
    effective_size,
    kind_shape,
    make_recipe,
    make_views,
    middle_layers,
    pool_tokens,
    stored_kinds,
)

Models = Callable[[str], Path]

#: What a model of images and texts has besides its image half.
TEXT = {"text_model.final_layer_norm.weight": torch.ones(8), "logit_scale": torch.ones(1)}


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
    assert spec.num_register_tokens == registers and spec.folder
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


@pytest.mark.parametrize("wrong", [None, "a", [0.5, 0.5], [0.5, "a", 0.5], [1, None, 1], [1, 2, 0]])
def test_mean_and_std_that_make_no_sense_are_told(
    model_dir: Models, tmp_path: Path, wrong: object
) -> None:
    folder = copy_of(model_dir("dinov2"), tmp_path / "m", image_std=wrong)
    with pytest.raises(BackboneError, match=r"preprocessor_config\.json: image_std"):
        spec_of(folder)


@pytest.mark.parametrize("layout", ["preprocessor_config.json", "processor_config.json"])
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"do_normalize": False},
        {"do_rescale": False},
        {"do_rescale": None, "do_normalize": False},
        {"rescale_factor": 1 / 127.5},
        {"image_mean": 0.1, "image_std": 0.7},
        {"image_mean": [0.2, 0.3, 0.4], "image_std": [2]},
        {"image_mean": ..., "image_std": ...},
    ],
)
def test_pixels_are_made_ready_as_transformers_does(
    model_dir: Models, tmp_path: Path, values: dict[str, object], layout: str
) -> None:
    from transformers import AutoImageProcessor

    folder = tmp_path / "m"
    shutil.copytree(model_dir("dinov2"), folder)
    settings = {"image_processor_type": "ViTImageProcessor", "do_resize": False}
    settings |= {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.3, 0.2, 0.25]} | values  # type: ignore[dict-item]
    settings = {key: value for key, value in settings.items() if value is not ...}
    (folder / "preprocessor_config.json").unlink()
    nested = {"image_processor": settings, "processor_class": "AnyProcessor"}
    (folder / layout).write_text(json.dumps(nested if layout[:4] == "proc" else settings))
    images = pictures(2, 32)
    theirs = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    expected = theirs(images=list(images.numpy()), return_tensors="pt")["pixel_values"]
    ours = load_backbone(spec_of(folder), torch.device("cpu"), "fp32").normalise(images)
    torch.testing.assert_close(ours, expected.float(), rtol=1e-4, atol=1e-4)


def test_other_preprocessing_is_another_cache_and_the_usual_one_keeps_its_name(
    model_dir: Models, tmp_path: Path
) -> None:
    def cache_of(name: str, **values: object) -> str:
        spec = spec_of(copy_of(model_dir("dinov2"), tmp_path / name, **values))
        recipe = make_recipe(
            EmbedConfig(image_size=32, colours="stored"), replace(spec, weights_id="w"), "fp32"
        )
        return recipe.fingerprint_id

    usual = cache_of("usual")
    assert usual == "64bccc5decf0a032"  # as it was before these flags were read
    said = {"do_rescale": True, "rescale_factor": 0.00392156862745098, "do_normalize": True}
    assert cache_of("said", **said) == usual
    others = [{"do_rescale": False}, {"do_normalize": False}, {"rescale_factor": 1 / 127.5}]
    names = {cache_of(f"other{i}", **values) for i, values in enumerate(others)}
    assert len(names | {usual}) == 4
    with pytest.raises(BackboneError, match="do_flip_channel_order"):
        cache_of("order", do_flip_channel_order=True)


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


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the weights of a model; ``change`` gives others, or changes them where they are."""
    state = load_file(folder / "model.safetensors")
    changed = change(state)
    save_file(
        changed if isinstance(changed, dict) else state,
        folder / "model.safetensors",
        {"format": "pt"},
    )


def configure(folder: Path, **values: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def loaded(folder: Path) -> Backbone:
    return load_backbone(spec_of(folder), torch.device("cpu"), "fp32")


@pytest.mark.parametrize("kind", ["dinov2", "registers", "vit"])
@pytest.mark.parametrize("prefix", ["module.", "model.", "backbone.", "base_model.model."])
def test_weights_under_other_names_are_refused(
    model_dir: Models, tmp_path: Path, kind: str, prefix: str
) -> None:
    folder = copy_of(model_dir(kind), tmp_path / "m")
    rewrite(folder, lambda state: {prefix + name: value for name, value in state.items()})
    with pytest.raises(BackboneError, match=r"\d+ weights are missing .*embeddings") as error:
        loaded(folder)
    assert str(folder) in str(error.value) and f"{prefix}embeddings" in str(error.value)


def without(text: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda state: {name: value for name, value in state.items() if text not in name}


@pytest.mark.parametrize("kind", ["dinov2", "dinov3", "vit", "siglip", "siglip2", "clip"])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (without(".1."), r"weights are missing .*1\."),
        (without("norm"), "weights are missing .*norm"),
        (without("bias"), "weights are missing .*bias"),
        (lambda s: {n: torch.cat([v, v]) for n, v in s.items()}, "another shape"),
        (lambda s: s | {"embeddings.new_tokens": torch.ones(3)}, "no place .*new_tokens"),
        (lambda s: [v.flatten()[:1].fill_(float("nan")) for v in s.values()], "not finite"),
        (lambda s: next(v for n, v in s.items() if "norm" in n).fill_(float("inf")), "not finite"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    model_dir: Models,
    tmp_path: Path,
    kind: str,
    change: Callable[[dict[str, torch.Tensor]], object],
    told: str,
) -> None:
    folder = copy_of(model_dir(kind), tmp_path / "m")
    rewrite(folder, change)
    with pytest.raises(BackboneError, match=told):
        loaded(folder)


def test_weights_that_no_feature_depends_on_may_be_missing(
    model_dir: Models, tmp_path: Path
) -> None:
    images = pictures(1, 32)
    for kind, unused in (("dinov2", "mask_token"), ("vit", "pooler")):
        folder = copy_of(model_dir(kind), tmp_path / kind)
        rewrite(folder, without(unused))
        rewrite(folder, lambda state: state | {"classifier.weight": torch.ones(2, 32)})
        features = [b.tokens(b.normalise(images)) for b in (loaded(folder), loaded(folder))]
        whole = loaded(model_dir(kind))
        for again in (features[1], whole.tokens(whole.normalise(images))):
            assert all(map(torch.equal, features[0], again))


@pytest.mark.parametrize("kind", ["siglip", "siglip2", "clip"])
@pytest.mark.parametrize("whole", [False, True])
def test_vision_towers_just_work(model_dir: Models, tmp_path: Path, kind: str, whole: bool) -> None:
    import transformers

    folder = copy_of(model_dir(kind), tmp_path / "m")
    name = {"siglip": "Siglip", "siglip2": "Siglip2", "clip": "CLIP"}[kind]
    tower = getattr(transformers, f"{name}VisionModel").from_pretrained(folder).eval()
    if whole:  # as hub repositories have them: the image half of a model of images and texts
        rewrite(folder, lambda s: {f"vision_model.{n}": v for n, v in s.items()} | TEXT)
        config = json.loads((folder / "config.json").read_text())
        shown = {"model_type": kind, "vision_config": config, "text_config": {}}
        (folder / "config.json").write_text(json.dumps(shown))
    backbone = loaded(folder)
    images = pictures(2, 32)
    cls, patches = backbone.tokens(backbone.normalise(images))
    pixels = backbone.normalise(images)
    if kind == "siglip2":
        rows = pixels.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).reshape(2, 16, -1)
        output = tower(rows, torch.ones(2, 16, dtype=torch.int32), torch.tensor([[4, 4]] * 2))
    else:
        output = tower(pixels)
    tokens = output.last_hidden_state
    if kind == "clip":
        expected, tokens = tokens[:, 0], tokens[:, 1:]
    else:
        expected = output.pooler_output
    torch.testing.assert_close(cls, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(patches.flatten(1, 2), tokens, rtol=1e-4, atol=1e-5)
    cls, patches = backbone.tokens(backbone.normalise(pictures(1, 48)))
    assert cls.shape == (1, 32) and patches.shape == (1, 6, 6, 32)
    middle = backbone.features(pixels, ("cls", "cls_1", "mean_1"))
    assert torch.equal(middle["cls_1"], middle["mean_1"]) != (kind == "clip")
    torch.testing.assert_close(middle["cls"], expected, rtol=1e-4, atol=1e-5)


def test_a_tower_without_pooling_gives_the_mean_of_its_patches(
    model_dir: Models, tmp_path: Path
) -> None:
    folder = configure(copy_of(model_dir("siglip"), tmp_path / "m"), vision_use_head=False)
    backbone = loaded(folder)
    cls, patches = backbone.tokens(backbone.normalise(pictures(2, 32)))
    torch.testing.assert_close(cls, patches.mean(dim=(1, 2)))


@pytest.mark.parametrize("kind", ["dinov2", "siglip"])
@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"patch_size": 0}, "patch_size .* at least 1, not 0"),
        ({"patch_size": [8, 4]}, "rectangles"),
        ({"image_size": [32, 64]}, "rectangles"),
        ({"patch_size": 10**9}, "far more than the weights"),
        ({"hidden_size": -32}, "hidden_size .* not -32"),
        ({"hidden_size": "32"}, "hidden_size .* not '32'"),
        ({"hidden_size": True}, "hidden_size .* not True"),
        ({"hidden_size": 10**12}, "far more than the weights"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers .* at most"),
        ({"num_attention_heads": 3}, "num_attention_heads .* divide"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_channels": 4}, "num_channels"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps .* finite"),
        ({"layer_norm_eps": 1e300}, "layer_norm_eps .* between 0 and 1"),
        ({"image_size": 10**6}, "far more than the weights"),
        ({"intermediate_size": 10**12, "mlp_ratio": 10**12}, "far more than the weights"),
        ({"intermediate_size": -8, "mlp_ratio": -8}, "negative"),
        ({"num_register_tokens": "4"}, "num_register_tokens"),
        ({"hidden_act": "nope"}, "does not know 'nope'"),
        ({"model_type": "nope"}, "model type `nope`"),
        ({"model_type": "nope", "auto_map": {"AutoConfig": "x.X"}}, "code of its own"),
    ],
)
def test_impossible_configs_are_told(
    model_dir: Models, tmp_path: Path, kind: str, values: dict[str, object], told: str
) -> None:
    folder = configure(copy_of(model_dir(kind), tmp_path / "m"), **values)
    with pytest.raises(BackboneError, match=told) as error:
        loaded(folder)
    assert "trust_remote_code" not in str(error.value)


def test_code_of_a_backbone_is_never_run_nor_asked_about(
    model_dir: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    names = {"AutoConfig": "x.X", "AutoModel": "x.X", "AutoImageProcessor": "x.X"}
    folder = copy_of(model_dir("dinov2"), tmp_path / "m")
    (folder / "x.py").write_text("raise SystemExit('was run')")
    config = json.loads((folder / "config.json").read_text())
    works = []
    for values in ({"image_mean": 0.5, "image_std": 0.5}, {}):  # its class would have to say them
        settings = json.dumps({**values, "auto_map": names})
        (folder / "preprocessor_config.json").write_text(settings)
        for kind in ("nope", "dinov2", None):
            for cut in ((), ("hidden_size",)):
                shown = {**config, "auto_map": names, "model_type": kind}
                shown = {key: value for key, value in shown.items() if key not in cut}
                (folder / "config.json").write_text(json.dumps(shown))
                with contextlib.suppress(BackboneError):
                    works.append(loaded(folder))
    assert works  # a model that transformers knows itself needs no code


TINY_RANDOM_CHECKSUM = "75b81a0ba570eb007b6a058166dbe5e75a34ffc60cd48516967baf81d1ab5adf"


def test_the_built_in_backbone_is_the_same_everywhere() -> None:
    code = (
        "import hashlib, mirip_fast.features.backbone_files as t;"
        "h = hashlib.sha256();"
        "[h.update(v.numpy().tobytes()) for _, v in sorted(t.build_tiny_random().state_dict().items())];"
        "print(h.hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == TINY_RANDOM_CHECKSUM
    checksum = hashlib.sha256()
    for _, value in sorted(backbone_files.build_tiny_random().state_dict().items()):
        checksum.update(value.numpy().tobytes())
    assert checksum.hexdigest() == TINY_RANDOM_CHECKSUM


def test_the_built_in_backbone_says_that_it_is_untrained(caplog: pytest.LogCaptureFixture) -> None:
    spec = backbone_files.tiny_random_spec()
    assert spec.folder is None and (spec.hidden_size, spec.patch_size) == (64, 14)
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


def test_the_standard_deviation_of_patches_is_kept_of_every_layer() -> None:
    patches = torch.randn(3, 7, 7, 5)
    pooled = pool_tokens("std_6", torch.randn(3, 5), patches).double().numpy()
    np.testing.assert_allclose(pooled, patches.double().numpy().std(axis=(1, 2)), atol=1e-6)
    assert stored_kinds("std", (6,)) == ("cls", "mean", "std", "cls_6", "mean_6", "std_6")


def test_a_mean_of_half_precision_tokens_is_taken_in_single() -> None:
    patches = torch.full((1, 40, 40, 1), 60.0, dtype=torch.float16)  # their sum is beyond float16
    assert pool_tokens("mean", torch.zeros(1, 1), patches).item() == 60.0


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
    assert middle_layers("last", 24) == () and middle_layers("auto", 24) == (6, 12, 18)
    assert middle_layers("auto", 2) == (1,) and middle_layers("auto", 1) == ()
    assert middle_layers("6,12,24", 24) == (6, 12) and middle_layers("0.25,1.0", 12) == (3,)
    assert stored_kinds("mean", (12,)) == ("cls", "mean", "cls_12", "mean_12")
    assert stored_kinds("none", (12,)) == ("cls", "cls_12")
    for wrong in ("middle", "0", "25", "6;12", "1.5", "-1", "nan", "1e9"):
        with pytest.raises(ConfigError, match="blocks from 1 to 24"):
            middle_layers(wrong, 24)
