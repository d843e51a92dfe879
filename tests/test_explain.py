"""`explain`: occlusion maps against the plain loop, where the square lies, the graded look-alikes, errors."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from made_run import Restored, make_data
from mirip_fast_cli.main import run
from PIL import Image, ImageFilter
from small_models import backbone_of, member

import mirip_fast as mf
from mirip_fast.evaluation.calibration import fit_calibration
from mirip_fast.features.recipe import head_kinds, pool_tokens
from mirip_fast.features.store import FeatureStore
from mirip_fast.models.head import attention_maps
from mirip_fast.models.numpy_head import NumpyHead
from mirip_fast.portfolio import occlusion
from mirip_fast.portfolio.explain import (
    GradedWorks,
    overlay,
    where,
)
from mirip_fast.portfolio.occlusion import occlusion_map
from mirip_fast.ranking.evaluate import pick_model
from mirip_fast.ranking.torch_score import MeanHead
from mirip_fast.training.run_folder import SPLIT_FILE

LARGER = ["--backbone", "tiny-random", "--image-size", "56", "--workers", "0"]


@pytest.mark.parametrize(
    ("kind", "features"),
    [("dinov2", "cls"), ("registers", "mean"), ("dinov3", "cls+mean"), ("vit", "cls+mean")],
)
def test_a_map_is_the_plain_loop(
    kind: str, features: str, model_dir: Callable[[str], Path]
) -> None:
    """Every backbone, token kind and an ensemble: value = mean over regions of score − covered score."""
    backbone = backbone_of(model_dir(kind))
    width = 32 * len(head_kinds(features))
    members = [member(width, 1), member(width, 2, mean=0.5, spread=0.1)]
    square = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    scorer = MeanHead(members)
    values, own, token = occlusion_map(backbone, scorer, features, square, detail=3, batch_size=3)

    def score(picture: np.ndarray) -> float:
        pixels = backbone.normalise(torch.from_numpy(picture[None].copy()))
        cls, patches = backbone.tokens(pixels)
        row = torch.cat([pool_tokens(k, cls, patches) for k in head_kinds(features)], -1).numpy()
        return float(np.mean([(m.head(row)[0] - m.mean) / m.spread for m in members]))

    radius = occlusion.BLUR * 48
    blurred = np.asarray(Image.fromarray(square).filter(ImageFilter.GaussianBlur(radius)))
    total, count = np.zeros((6, 6)), np.zeros((6, 6))
    for top in (0, 2):
        for left in (0, 2):
            covered = square.copy()
            y, x = slice(8 * top, 8 * top + 32), slice(8 * left, 8 * left + 32)
            covered[y, x] = blurred[y, x]
            total[top : top + 4, left : left + 4] += score(square) - score(covered)
            count[top : top + 4, left : left + 4] += 1
    assert np.abs(total).max() > 1e-4
    np.testing.assert_allclose(values, total / count, atol=2e-5)
    assert own == pytest.approx(score(square), abs=1e-5)
    assert token.shape == (32,)


def test_a_batch_that_does_not_fit_is_halved(model_dir: Callable[[str], Path]) -> None:
    backbone = backbone_of(model_dir("vit"))
    passed, sizes = backbone.features, []

    def small_memory(pixels: torch.Tensor, kinds: Sequence[str]) -> dict[str, torch.Tensor]:
        if len(pixels) > 3:
            raise torch.OutOfMemoryError("out of memory")
        sizes.append(len(pixels))
        return passed(pixels, kinds)

    square = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    head = MeanHead([member(32, 1)])
    whole, *_ = occlusion_map(backbone, head, "cls", square, detail=4, batch_size=8)
    backbone.features = small_memory  # type: ignore[method-assign]
    halved, *_ = occlusion_map(backbone, head, "cls", square, detail=4, batch_size=8)
    np.testing.assert_allclose(halved, whole, atol=1e-5)
    assert sum(sizes) == 10 and max(sizes) == 2


@pytest.mark.parametrize(
    ("resize", "size", "coloured"),
    [
        ("squash", (60, 30), [(5, 5), (55, 5)]),
        ("crop", (60, 30), [(17, 5), (42, 5)]),
        ("pad", (30, 60), [(5, 5), (25, 5)]),
    ],
)
def test_the_map_lies_where_the_backbone_looked(
    resize: str, size: tuple[int, int], coloured: list[tuple[int, int]]
) -> None:
    """Left half raises, right half lowers; what was cropped away stays grey."""
    values = np.repeat(np.array([[1, 1, -1, -1]], np.float32), 4, axis=0)
    image = overlay(Image.new("RGB", size, (128, 128, 128)), values, resize)
    assert image.size == size
    (left, right) = (image.getpixel(place) for place in coloured)
    assert left[0] > left[2] + 50 and right[2] > right[0] + 50  # orange, blue
    if resize == "crop":
        red, green, blue = image.getpixel((3, 5))
        assert red == green == blue
    if resize == "pad":  # the square's outer columns lie beyond the picture
        narrow = np.array([[9, 1, -1, -9]] * 4, np.float32)
        inside = np.asarray(overlay(Image.new("RGB", size), narrow, resize, limit=9.0), int)
        assert np.abs(inside - inside[..., :1]).max() < 170


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Restored:
    train = ["train", "--head-only", "--epochs", "4", "--features", "cls+mean"]
    return Restored(tmp_path_factory.mktemp("explained"), 40, ["embed", "data", *LARGER], train)


@pytest.fixture
def work(finished: Restored, monkeypatch: pytest.MonkeyPatch) -> Path:
    return finished(monkeypatch)


def test_explaining_files(
    work: Path,
    capfd: pytest.CaptureFixture[str],
    decoded_elsewhere: Callable[[], None],
) -> None:
    decoded_elsewhere()
    names = ["그림 🎨.png", "plain.png"]
    for i, name in enumerate(names):
        pixels = np.random.default_rng(i).integers(0, 256, (70, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(work / name)
    (work / "broken.png").write_text("no picture")
    capfd.readouterr()
    assert run(["explain", *names, "broken.png", "--out", "새 폴더", "--detail", "4"]) == 1
    out, err = capfd.readouterr()
    assert "Not explained: broken.png" in err and "passes through the backbone on cpu" in err
    assert run(["compare", *names]) == 0
    compared = capfd.readouterr().out
    for name in names:
        picture = work / "새 폴더" / f"{Path(name).stem}.explain.png"
        assert Image.open(picture).size[0] > 1000
        score = next(line.split()[0] for line in compared.splitlines() if line.endswith(name))
        assert f"{name}: score {score}" in out
    assert sorted(p.name for p in (work / "새 폴더").iterdir()) == sorted(
        f"{Path(name).stem}.explain.png" for name in names
    )
    # Told likenesses: three of S, and three of the tier it is in unless that is S.
    for block in out.split("Written")[:2]:
        tier = block.split("tier ")[1][0]
        told = [line.split()[0] for line in block.splitlines() if "cosine" in line]
        assert told == ["S"] * 3 + ([tier] * 3 if tier != "S" else [])


def test_the_graded_works_that_a_picture_looks_like(
    work: Path, caplog: pytest.LogCaptureFixture
) -> None:
    works = GradedWorks(pick_model(None, Path("runs")), Path("cache"))
    store, pictures = works._store, sorted((work / "data" / "images").iterdir())
    tiers = [int(path.stem[-2:]) % 4 for path in pictures]
    hashes = [hashlib.sha256(path.read_bytes()).digest() for path in pictures]
    rows = store.read("cls.56", store.rows("cls.56", hashes)).astype(np.float64)
    cosine = rows @ rows.T / np.outer(np.linalg.norm(rows, axis=1), np.linalg.norm(rows, axis=1))
    itself = tiers.index(0)  # an S: it is not its own likeness
    likes = works.likes(rows[itself], hashes[itself], "C")
    for tier, found in ((0, likes[:3]), (3, likes[3:])):
        others = [j for j in range(40) if tiers[j] == tier and j != itself]
        expected = sorted(others, key=lambda j: -cosine[itself, j])[:3]
        assert [path.name for path in found["file"]] == [pictures[j].name for j in expected]
        np.testing.assert_allclose(found["cosine"], cosine[itself, expected], atol=1e-3)
    best = works.likes(rows[itself], hashes[itself], "S")
    assert best["tier"].tolist() == ["S"] * 3
    best["file"][1].write_bytes(b"another content")
    assert len(works.likes(rows[itself], hashes[itself], "S")) == 2
    told = "1 of the 3 graded works of tier S that it looks like is not shown"
    assert told in caplog.text
    # Of a tier without a graded work there is nothing to show.
    works._works = works._works[works._works["tier"] != "S"]
    assert works.likes(rows[itself], hashes[itself], "C")["tier"].tolist() == ["C"] * 3

    # Its tier is that of its place among held-out scores: above 9, S; then two of A; B has none; then C.
    assert works._calibration.ordinal is None
    works._places = (np.array([9.0, 7.0, 5.0, 3.0, 1.0]), np.array([1, 2, 0, 2]))
    expected = {10.0: "S", 9.0: "S", 8.0: "A", 6.0: "A", 5.0: "A", 4.0: "C", 0.0: "C"}
    assert {score: works.tier_of(score) for score in expected} == expected
    # Or the most probable one, where probabilities are known.
    scores = np.linspace(-3, 3, 200)
    works._calibration = fit_calibration(
        scores, np.repeat([3, 2, 1, 0], 50), ("S", "A", "B", "C"), source="validation"
    )
    probable = works._calibration.tier_probabilities(scores)
    assert [works.tier_of(s) for s in scores.tolist()] == ["SABC"[k] for k in probable.argmax(1)]


def test_without_the_graded_works_the_map_is_still_made(
    work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (run_folder,) = Path("runs").iterdir()
    (run_folder / SPLIT_FILE).unlink()
    logging.getLogger("mirip_fast").handlers = []
    assert run(["explain", "data/images/work_01.png", "--detail", "3"]) == 0
    out, err = capfd.readouterr()
    assert "cannot be shown" in err and SPLIT_FILE in err and "tier" not in out.splitlines()[-3]
    assert (work / "work_01.explain.png").is_file()


def test_where_a_head_attends_is_shown_without_the_backbone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The mean of the queries' own softmax over the cached tokens, against an even look."""
    monkeypatch.chdir(tmp_path)
    make_data(tmp_path / "data", 40)
    assert run(["-q", "embed", "data", *LARGER, "--patches", "grid:4"]) == 0
    picture = "data/images/work_01.png"
    assert run(["-q", "train", "--head-only"]) == 0
    assert run(["explain", picture, "--map", "attention"]) == 1
    said = capfd.readouterr().err
    assert "mirip-fast embed DATA --patches grid:7 --backbone tiny-random --image-size 56" in said
    assert "mirip-fast train --head-only --readout attention" in said

    attention = ["--readout", "attention", "--epochs", "4", "--output-dir", "attends"]
    attention += [
        "--learning-rate",
        "0.05",
    ]  # else they hardly leave the even look that they begin with
    assert run(["-q", "train", "--head-only", *attention]) == 0
    pixels = np.zeros((56, 56, 3), np.uint8)
    pixels[:14, 28:] = 255, 120, 0
    Image.fromarray(pixels).save(tmp_path / "corner.png")
    assert (
        run(["-q", "compare", "corner.png", picture, "--output-dir", "attends"]) == 0
    )  # caches it
    monkeypatch.setattr("mirip_fast.features.backbone.load_backbone", None)  # none is needed
    capfd.readouterr()
    assert run(["explain", picture, "--map", "attention", "--output-dir", "attends"]) == 0
    assert "It looks at all parts nearly alike" in capfd.readouterr().out  # a picture of noise
    picture = "corner.png"
    show = ["explain", picture, "--map", "attention", "--output-dir", "attends"]
    assert run(show) == 0
    out = capfd.readouterr().out
    assert "is not why" in out and "Raised" not in out and "it looks like these" in out
    assert Image.open(tmp_path / "corner.explain.png").size[0] > 1000

    model = pick_model(None, Path("attends"))
    store = FeatureStore.open(Path("cache") / model.info.fingerprint_id)
    sha = hashlib.sha256(Path(picture).read_bytes()).digest()
    tokens = torch.tensor(store.read("grid4.56", store.rows("grid4.56", [sha]))).float()
    head = model.members[0].head
    assert isinstance(head, NumpyHead) and np.abs(head.arrays["queries"]).max() > 1e-4
    looks = attention_maps(tokens.reshape(16, -1), torch.tensor(head.arrays["queries"]))
    shares = looks.mean(0).reshape(4, 4).numpy() * 16
    (folder,) = Path("attends").iterdir()
    (explained,) = mf.load(folder).explain(picture, map="attention")
    np.testing.assert_allclose(explained.map.values, shares - 1, atol=1e-4)
    place = where(shares - 1, raises=True)
    told = re.search(r"Looked at most: ([a-z ]+) \((\d\.\d\d) times an even share\)", out)
    assert told is not None and place == (told[1], pytest.approx(float(told[2]) - 1, abs=0.006))


def test_errors_are_plain(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    picture = "data/images/work_01.png"

    def fails(arguments: list[str], *words: str) -> None:
        capfd.readouterr()
        assert run(["explain", *arguments]) in (1, 2)
        err = capfd.readouterr().err
        assert all(word in err for word in words) and "Traceback" not in err, err

    fails([picture, "--output-dir", "none"], "No trained model", "mirip-fast train")
    fails(["absent.png"], "absent.png: there is no such file")
    fails(["data"], "is a folder", "mirip-fast rank data")
    fails([picture, "--out", picture], "--out", "is a file")
    (work / "broken.png").write_text("no picture")
    fails(["broken.png"], "broken.png")
    fails([picture, "--backbone", str(work / "nowhere")], "nowhere", "there is no such folder")
    fails([picture, "--detail", "1"], "explain.detail: 1 is below 2")
    fails([picture, "--out", "/proc/nothing/here", "--detail", "2"], "/proc/nothing")
