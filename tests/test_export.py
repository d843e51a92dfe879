"""`export`: ONNX files against torch and against `rank`, refusals that leave nothing behind, the folder to share."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from made_run import Restored
from mirip_fast_cli.main import run
from PIL import Image
from small_models import backbone_of, member

from mirip_fast.config import Config, EmbedConfig
from mirip_fast.errors import ConfigError, DataError, MiripError
from mirip_fast.features.recipe import View
from mirip_fast.files import remove_files, write_json
from mirip_fast.models.model_info import ModelInfo
from mirip_fast.models.onnx_graph import run_graph, write_graph
from mirip_fast.portfolio import export as export_module
from mirip_fast.portfolio.export import export_onnx
from mirip_fast.portfolio.hub_folder import model_card, shareable, write_hub_folder
from mirip_fast.ranking.evaluate import pick_model
from mirip_fast.ranking.score_model import ScoreModel, load_members, save_members
from mirip_fast.ranking.scorer import score_files
from mirip_fast.ranking.torch_score import ImageScorer, MeanHead
from mirip_fast.training.run_folder import ENSEMBLE, SPLIT_FILE

pytest.importorskip("onnxruntime")


def inputs_of(path: Path) -> list[str]:
    """Names of a graph's inputs."""
    import onnx

    return [item.name for item in onnx.load(path).graph.input]


#: What a head's folder to share, and that of its graphs, has besides.
MODEL = (ENSEMBLE, "calibration.json", "anchors.json", "made_with.csv", "files.json")


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, model_dir: Callable[[str], Path]
) -> Restored:
    """A run on a DINOv2 of 2 layers, two views."""
    embed = ["embed", "data", "--backbone", str(model_dir("dinov2")), "--image-size", "32"]
    train = ["train", "--head-only", "--epochs", "3", "--features", "cls+mean"]
    root = tmp_path_factory.mktemp("export")
    return Restored(root, 40, [*embed, "--workers", "0", "--tta", "flip"], train)


@pytest.fixture
def work(finished: Restored, monkeypatch: pytest.MonkeyPatch) -> Path:
    return finished(monkeypatch)


def config(**values: float) -> Config:
    result = Config()
    result.export = dataclasses.replace(result.export, **values)
    return result


def by_the_json(path: Path, about: dict) -> np.ndarray:
    """[1, 3, S, S]: what a reader of preprocessing.json alone would do."""
    model = about["model"]
    size = model["inputs"][0]["shape"][2]
    assert model["resize"] == "squash" and "bicubic" in model["steps"][2]
    image = Image.open(path).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    values = (np.asarray(image) / 255 - model["mean"]) / model["std"]
    return values.transpose(2, 0, 1)[None].astype(np.float32)


def test_the_files_score_as_rank_does(
    work: Path,
    capfd: pytest.CaptureFixture[str],
    decoded_elsewhere: Callable[[], None],
) -> None:
    decoded_elsewhere()
    capfd.readouterr()
    assert run(["export", "--int8", "--check-images", "12", "--batch-size", "5"]) == 0
    out, _ = capfd.readouterr()
    files = {path.name for path in Path("export").iterdir()}
    assert files == {"head.onnx", "model.onnx", "model.int8.onnx", "preprocessing.json", *MODEL}
    told = {tuple(line.split()[:2]): line.split() for line in out.splitlines() if ".onnx" in line}
    assert float(told["model.onnx", "torch"][3]) < 1e-5 and told["model.onnx", "torch"][2] == "12"
    assert float(told["head.onnx", "torch"][3]) < 1e-5 and told["head.onnx", "torch"][2] == "24"
    assert float(told["model.onnx", "rank,"][-2]) < 0.02  # the cache holds float16
    assert float(told["model.int8.onnx", "model.onnx"][-1]) > 0.5  # Kendall tau

    about = json.loads(Path("export/preprocessing.json").read_text(encoding="utf-8"))
    whole, small = Path("export/model.onnx"), Path("export/model.int8.onnx")
    assert inputs_of(whole) == ["pixels_32"] == [i["name"] for i in about["model"]["inputs"]]
    paths = sorted((work / "data" / "images").iterdir())
    pixels = np.concatenate([by_the_json(path, about) for path in paths])
    model = pick_model(None, Path("runs"))
    expected = score_files(model, paths, cache_dir=Path("cache")).scores
    spread = expected.std()
    for n in (1, 7, 40):  # the batch is free
        found = run_graph(whole, [(pixels[:n],)])
        np.testing.assert_allclose(found, expected[:n], atol=0.02 * spread)
    found, of_small = (run_graph(path, [(pixels,)]) for path in (whole, small))
    assert np.abs(of_small - expected).max() > np.abs(found - expected).max()
    assert np.corrcoef(of_small, expected)[0, 1] > 0.95
    head = Path("export/head.onnx")
    rows = np.random.default_rng(0).normal(size=(9, 64)).astype(np.float32)
    assert inputs_of(head) == ["features"]
    np.testing.assert_allclose(run_graph(head, [(rows,)]), model.members[0](rows), atol=1e-5)
    assert about["views"] == [{"size": 32, "mirrored": False}, {"size": 32, "mirrored": True}]


@pytest.mark.parametrize("kind", ["registers", "dinov3"])
def test_ensembles_and_views_of_several_sizes_are_one_graph(
    kind: str, tmp_path: Path, model_dir: Callable[[str], Path]
) -> None:
    backbone = backbone_of(model_dir(kind))
    views = (View(32), View(40), View(32, True))
    info = ModelInfo({}, EmbedConfig(), views, "cls+mean", ("S", "A"), 64)
    members = [member(64, 1, mean=0.2, spread=0.5), member(64, 2), member(64, 3, mean=-1, spread=2)]
    scorer = ImageScorer(backbone.model, backbone.spec, MeanHead(members), info)
    names = ["pixels_32", "pixels_40"]
    write_graph(tmp_path / "m.onnx", scorer, names, [torch.zeros(2, 3, s, s) for s in (32, 40)])
    graph = tmp_path / "m.onnx"
    assert inputs_of(graph) == names
    rng = np.random.default_rng(0)
    for n in (1, 3):
        small, large = (rng.normal(size=(n, 3, s, s)).astype(np.float32) for s in (32, 40))
        per_view = []
        for view in views:  # the plain double loop: views, then members, in NumPy
            pixels = small if view.size == 32 else large
            pixels = pixels[..., ::-1].copy() if view.flip else pixels
            cls, patches = backbone.tokens(torch.from_numpy(pixels))
            rows = torch.cat([cls, patches.mean((1, 2))], -1).numpy()
            per_view.append(np.mean([(m.head(rows) - m.mean) / m.spread for m in members], axis=0))
        found = run_graph(graph, [(small, large)])
        np.testing.assert_allclose(found, np.mean(per_view, axis=0), atol=2e-5)


def test_a_graph_that_differs_is_not_left_behind(
    work: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = export_module.write_graph

    def spoiled(path: Path, module: torch.nn.Module, *rest: object) -> None:
        if isinstance(module, MeanHead):
            module = MeanHead([member(64, 5)])
        write(path, module, *rest)

    monkeypatch.setattr(export_module, "write_graph", spoiled)
    capfd.readouterr()
    assert run(["export", "--head-only", "--out", "new/export"]) == 1
    err = capfd.readouterr().err
    assert "head.onnx was not written" in err and "0.001 is allowed (--tolerance)" in err
    assert list(Path("new/export").iterdir()) == []
    assert run(["export", "--head-only", "--out", "new/export", "--tolerance", "1000"]) == 0


def test_the_head_alone_needs_no_backbone(
    work: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*arguments: object) -> None:
        raise AssertionError("the backbone was asked for")

    monkeypatch.setattr(export_module, "phase_of_model", none)
    monkeypatch.setattr(export_module, "load_model", none)
    assert run(["export", "--head-only"]) == 0
    assert {path.name for path in Path("export").iterdir()} == {
        "head.onnx", "preprocessing.json", *MODEL,
    }  # fmt: skip
    capfd.readouterr()
    assert run(["export", "--head-only"]) == 1
    assert "already has head.onnx, preprocessing.json" in capfd.readouterr().err
    before = Path("export/head.onnx").stat().st_mtime_ns
    assert run(["export", "--head-only", "--overwrite"]) == 0
    assert Path("export/head.onnx").stat().st_mtime_ns > before
    assert run(["export", "--head-only", "--int8", "--out", "x"]) == 1
    assert "leave --head-only or --int8 away" in capfd.readouterr().err


def test_errors_are_plain(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def fails(arguments: list[str], *words: str) -> None:
        capfd.readouterr()
        assert run(["export", *arguments]) in (1, 2)
        err = capfd.readouterr().err
        assert all(word in err for word in words) and "Traceback" not in err, err

    fails(["--output-dir", "no-runs"], "No trained model", "mirip-fast train")
    fails(["--backbone", "./nowhere"], "nowhere", "there is no such folder")
    fails(["--out", "cache/hashes.sqlite"], "--out", "is a file")
    fails(["--head-only", "--cache-dir", "empty"], "empty", "is no feature store")
    fails(["--out", "/proc/nothing"], "/proc/nothing")
    (work / "bad").mkdir()
    for name in ("a.png", "b.png"):
        (work / "bad" / name).write_text("no picture")
    fails(["--images", "bad", "--out", "e2"], "bad/a.png")
    assert list(Path("e2").iterdir()) == []
    (work / "one").mkdir()
    fails(["--images", "one", "--out", "e3"], "--images")
    for path in (work / "data" / "images").iterdir():
        path.unlink()
    fails(["--out", "e4"], "0 of 40 are there", "--images")


def test_a_missing_extra_is_told(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"onnxscript.*pip install onnx"):
        export_onnx(pick_model(None, Path("runs")), Path("export"), Config(), head_only=True)
    assert not Path("export").exists()


def test_a_score_that_is_no_number_is_refused(work: Path) -> None:
    model = pick_model(None, Path("runs"))
    broken = member(64, 1, mean=float("nan"))
    with pytest.raises(MiripError, match="was not written"):
        export_onnx(
            dataclasses.replace(model, members=(broken,)), Path("export"), config(), head_only=True
        )


# The folder to share


def test_the_card_tells_the_runs_own_figures(work: Path) -> None:
    model = pick_model(None, Path("runs"))
    assert "**Not evaluated.**" in model_card(model, "facebook/dinov2-large")
    assert run(["evaluate"]) == 0
    card = model_card(model, "facebook/dinov2-large")
    path = model.checkpoint.with_name("evaluation_test.json")
    values = json.loads(path.read_text(encoding="utf-8"))
    interval = values["pairwise_accuracy_interval"]
    assert f"**{values['pairwise_accuracy']:.3f}**" in card
    if interval:
        assert f"(95% interval {interval['low']:.3f} – {interval['high']:.3f}" in card
    else:
        assert "its interval is unknown" in card
    assert f"{values['n_pairs']:,} pairs" in card and f"{values['n_images']:,} pictures" in card
    rows = [line.split() for line in card.splitlines() if line.startswith("| S |")]
    assert [int(cell) for cell in rows[0][3::2]][-1] == 10  # ten pictures of S, counted by split
    assert sum(int(cell) for cell in rows[0][3:-2:2]) == 10
    assert f"fingerprint of its features: `{model.info.fingerprint_id}`" in card
    assert "40 graded pictures" in card and "base_model: facebook/dinov2-large" in card
    for heading in ("## Intended use", "## Limits", "## Data"):
        assert heading in card
    values["pairwise_accuracy_interval"] = {"low": 0.1, "high": 0.9, "confidence": 0.95}
    write_json(path, values)
    assert "(95% interval 0.100 – 0.900" in model_card(model, "x")
    os.utime(path, (1, 1))  # older than the model: of another one
    assert "**Not evaluated.**" in model_card(model, "x")
    os.utime(path)
    write_json(path, {})
    assert "**Not evaluated.**" in model_card(model, "x")
    write_json(path, {"checkpoint": "best_model.pt"})
    with pytest.raises(DataError, match="mirip-fast evaluate"):
        model_card(model, "x")


def test_an_ensembles_card_tells_out_of_fold_figures(work: Path) -> None:
    model = pick_model(None, Path("runs"))
    assert run(["evaluate"]) == 0
    folder = model.checkpoint.parent
    values = json.loads((folder / "evaluation_test.json").read_text(encoding="utf-8"))
    values["pairwise_accuracy"] = 0.7125
    write_json(folder / "evaluation_out_of_fold.json", values)
    members = (*model.members, *model.members)
    path = save_members(folder, members, model.info)
    card = model_card(ScoreModel(path, model.info, members), "x")
    assert "**0.713**" in card or "**0.712**" in card
    assert "ensemble of 2 heads" in card
    remove_files(folder, [SPLIT_FILE])
    assert "Not known" in model_card(ScoreModel(path, model.info, members), "x")
    write_hub_folder(ScoreModel(path, model.info, members), Path("hub"), Path("cache"))
    info, loaded, _ = load_members(Path("hub") / ENSEMBLE)
    assert len(loaded) == 2 and info.fingerprint == model.info.fingerprint


def test_shared_settings_name_no_folder(tmp_path: Path) -> None:
    def backbone(name: str) -> str:
        embed = EmbedConfig(backbone=name, cache_dir="/home/me/cache")
        info = shareable(ModelInfo({}, embed, (View(32),), "cls", ("S",), 32))
        assert info.embed.cache_dir == EmbedConfig.cache_dir
        return info.embed.backbone

    assert backbone("facebook/dinov2-large") == "facebook/dinov2-large"
    assert backbone(str(tmp_path / "vit-mine")) == "vit-mine"
    assert backbone("~/secret/vit-mine") == "vit-mine"
    assert backbone("../other/vit-mine") == "vit-mine"
