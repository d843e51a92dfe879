"""Folds: what is left out of what, and one ensemble of all, however often the training was cut."""

from __future__ import annotations

import csv
import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from forked import signalled
from mirip_fast_cli.main import run
from test_cli import TINY, draw, make_data

from mirip_fast.config import DataConfig, HeadConfig, SplitConfig
from mirip_fast.data.table import Manifest, image_table
from mirip_fast.errors import ConfigError, DataError
from mirip_fast.features.datasets import newest_graded
from mirip_fast.features.store import FeatureStore
from mirip_fast.models.head import RankingHead
from mirip_fast.ranking.folds import LEFT_OUT, assign_folds, leave_out
from mirip_fast.ranking.graded import GradedImages, load_split, save_split
from mirip_fast.ranking.held_out import load_held_out
from mirip_fast.ranking.rows import read_features

TIERS = ("S", "A", "B", "C")
TRAIN = ["train", "--head-only", "--features", "cls", "--epochs", "8", "--batch-size", "8", "--folds", "3"]  # fmt: skip


def graded(n: int = 120, groups: int = 60, copies: bool = True) -> GradedImages:
    """Images in groups of two, every tenth a copy of the one three before it; a sixth is the test split."""
    groups_of, hashes, splits = [], [], []
    for i in range(n):
        groups_of.append(None if i % 4 == 3 else f"g{i % groups}")
        copy_of = i - 3 if copies and i % 10 == 9 else i
        hashes.append(copy_of.to_bytes(32, "big"))
        splits.append("test" if i % 12 in (0, 1) else ("val" if i % 12 == 2 else "train"))
    columns = {
        "image_id": [f"id{i}" for i in range(n)],
        "file": [f"{i}.png" for i in range(n)],
        "tier": [(i // 7) % 4 for i in range(n)],
        "group": groups_of,
    }
    manifest = Manifest(Path("m.csv"), Path(), TIERS, image_table(columns, TIERS))
    return GradedImages.of(manifest, hashes, splits)


@pytest.mark.parametrize("folds", [2, 5])
def test_every_image_is_left_out_once_and_the_test_split_never(folds: int) -> None:
    images = graded()
    fold_of = assign_folds(images, folds, 42)
    for image, split in zip(fold_of.tolist(), images.splits, strict=True):
        assert (image == -1) == (split == "test") and image < folds
    inside = fold_of >= 0
    for fold in range(folds):
        left_out = fold_of == fold
        for tier in range(4):
            share = (images.needed_tiers[inside] == tier).mean()
            assert abs((images.needed_tiers[left_out] == tier).mean() - share) < 0.1
        assert abs(left_out.sum() - inside.sum() / folds) <= 4
    assert (assign_folds(images, folds, 7) != fold_of).any()
    np.testing.assert_array_equal(assign_folds(images, folds, 42), fold_of)


def together(images: GradedImages, parts: list[str]) -> None:
    """What belongs together is in one part."""
    for labels in (images.groups, images.hashes):
        part_of: dict[object, str] = {}
        for label, part in zip(labels, parts, strict=True):
            if label is not None and part != "test":
                assert part_of.setdefault(label, part) == part


def test_groups_and_copies_stay_together() -> None:
    images = graded()
    fold_of = assign_folds(images, 5, 42)
    together(images, ["test" if f < 0 else str(f) for f in fold_of.tolist()])
    inner = []
    for fold in range(5):
        parts = leave_out(images, fold_of, fold, SplitConfig(train_ratio=0.8, val_ratio=0.2))
        together(images, list(parts.splits))
        assert [s == LEFT_OUT for s in parts.splits] == (fold_of == fold).tolist()
        assert [s == "test" for s in parts.splits] == [s == "test" for s in images.splits]
        share = parts.splits.count("val") / (
            parts.splits.count("val") + parts.splits.count("train")
        )
        assert 0.1 < share < 0.3
        inner.append(tuple(parts.splits))
    assert len(set(inner)) == 5


def test_near_duplicates_stay_together_and_are_kept_with_the_split(tmp_path: Path) -> None:
    images = graded(copies=False)
    near = tuple(f"n{i % 5}" if i % 3 == 0 else None for i in range(len(images)))
    images = replace(images, table=images.table.assign(near_group=near))
    save_split(tmp_path / "split.csv", images)
    kept = load_split(tmp_path / "split.csv", TIERS, DataConfig())
    assert tuple(kept.table["near_group"]) == near
    assert load_split_of_older_run(tmp_path).table["near_group"].isna().all()
    fold_of = assign_folds(kept, 3, 42)
    for label in set(near) - {None}:
        folds = {f for f, n in zip(fold_of.tolist(), near, strict=True) if n == label and f >= 0}
        assert len(folds) == 1


def load_split_of_older_run(folder: Path) -> GradedImages:
    """The split without the column that older runs do not have."""
    table = pd.read_csv(folder / "split.csv", dtype=str).drop(columns="near_group")
    table.to_csv(folder / "older.csv", index=False)
    return load_split(folder / "older.csv", TIERS, DataConfig())


def test_folds_that_can_not_be_are_told() -> None:
    with pytest.raises(ConfigError, match="--folds 1: 2 or more"):
        assign_folds(graded(), 1, 0)
    with pytest.raises(DataError, match="Ask for fewer folds"):
        assign_folds(graded(24, groups=2, copies=False), 15, 0)
    # At once: dividing into that many parts would take minutes before it is told.
    with pytest.raises(DataError, match="fold 1 would have 0 images"):
        assign_folds(graded(), 1000, 0)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folds")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_data(folder / "data", 48)
        assert run(["embed", "data", "--tta", "flip", *TINY]) == 0
    return folder


@pytest.fixture
def work(embedded: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with embedded data and no runs."""
    monkeypatch.chdir(embedded)
    for name in ("runs", "whole", "killed", "process", "parts", "one", "two"):
        shutil.rmtree(embedded / name, ignore_errors=True)
    return embedded


def only_run(folder: Path) -> Path:
    (found,) = folder.iterdir()
    return found


def scores_of(checkpoint: Path, features: np.ndarray) -> np.ndarray:
    """[n, V] scores by the torch head of a checkpoint."""
    content = torch.load(checkpoint, weights_only=True)
    head = RankingHead(features.shape[2], HeadConfig()).eval()
    head.load_state_dict(content["model_state_dict"])
    with torch.no_grad():
        return np.stack([head(torch.from_numpy(v)).numpy() for v in features]).astype(float)


def test_out_of_fold_scores_and_the_ensemble(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(TRAIN) == 0
    told = capfd.readouterr().out
    assert "3 heads, each judged on the fold it left out:" in told
    assert "Out-of-fold pairwise accuracy" in told and "95 % interval over" in told
    folder = only_run(work / "runs")
    with (folder / "split.csv").open(encoding="utf-8-sig", newline="") as stream:
        split = {row["image_id"]: row for row in csv.DictReader(stream)}
    held_out = load_held_out(folder, TIERS)
    assert held_out is not None and held_out.held_out_by == "out-of-fold"
    assert sorted(held_out.ids) == sorted(i for i, r in split.items() if r["split"] != "test")

    dataset = newest_graded(work / "cache")
    store = FeatureStore.open(dataset.store_path)
    views = dataset.views()
    score = dict(zip(held_out.ids, held_out.scores, strict=True))
    test_ids = [i for i, row in split.items() if row["split"] == "test"]
    test = read_features(store, [bytes.fromhex(split[i]["sha256"]) for i in test_ids], "cls", views)
    members, seen = [], set()
    for fold in range(3):
        own = folder / f"fold_{fold}"
        with (own / "split.csv").open(encoding="utf-8-sig", newline="") as stream:
            left_out = [r["image_id"] for r in csv.DictReader(stream) if r["split"] == LEFT_OUT]
        seen |= set(left_out)
        hashes = [bytes.fromhex(split[i]["sha256"]) for i in left_out]
        raw = scores_of(own / "best_model.pt", read_features(store, hashes, "cls", views)).mean(1)
        expected = (raw - raw.mean()) / raw.std()
        np.testing.assert_allclose([score[i] for i in left_out], expected, atol=1e-3)
        members.append((scores_of(own / "best_model.pt", test) - raw.mean()) / raw.std())
    assert seen == set(held_out.ids)

    from mirip_fast.ranking.evaluate import pick_model

    model = pick_model(None, work / "runs")
    assert model.checkpoint == folder / "ensemble.safetensors" and len(model.members) == 3
    hashes = [bytes.fromhex(split[i]["sha256"]) for i in test_ids]
    expected = np.mean(members, axis=0)
    np.testing.assert_allclose(model.score_views(store, hashes), expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(model.score(store, hashes), expected.mean(1), rtol=1e-3, atol=1e-3)

    for command in (["evaluate"], ["evaluate", "--checkpoint", str(folder)],
                    ["evaluate", "--checkpoint", str(folder / "fold_1")]):  # fmt: skip
        assert run(command) == 0
    draw(work / "new" / "a.png", 0.2, 1)
    draw(work / "new" / "b.png", 0.8, 2)
    assert run(["rank", "new", "--workers", "0"]) == 0
    assert json.loads((work / "ranking.json").read_text())["checkpoint"].endswith("safetensors")
    assert run(["compare", "new/a.png", "new/b.png"]) == 0
    kept = json.loads((folder / "anchors.json").read_text())
    assert (kept["source"], kept["model"]) == ("out-of-fold", "ensemble.safetensors")
    assert sum(kept["held_out"].values()) == len(held_out)
    assert all(score[anchor["image_id"]] == anchor["score"] for anchor in kept["anchors"])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for fold in range(3):
        content = torch.load(folder / f"fold_{fold}" / "best_model.pt", weights_only=True)
        found.update({f"{fold}.{k}": v for k, v in content["model_state_dict"].items()})
    return found


def the_same(first: Path, second: Path) -> None:
    one, other = weights(first), weights(second)
    assert all(torch.equal(one[name], other[name]) for name in one)
    for name in ("held_out.csv", "ensemble.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_killed_resumed_and_trained_in_parts_it_is_the_same(
    work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run([*TRAIN, "--output-dir", "whole"]) == 0
    whole = only_run(work / "whole")

    command = [*TRAIN, "--output-dir", "killed"]
    code, _, err = signalled(lambda: run(command), work / "process", signal.SIGKILL, 5, "fold_1")
    assert code == -signal.SIGKILL, err
    again = only_run(work / "killed")
    finished = (again / "fold_0" / "best_model.pt").stat().st_mtime_ns
    assert run(["train", "--head-only", "--resume", "latest", "--output-dir", "killed"]) == 0
    assert (again / "fold_0" / "best_model.pt").stat().st_mtime_ns == finished
    the_same(whole, again)

    capfd.readouterr()
    assert run([*TRAIN, "--output-dir", "parts", "--only-folds", "0,2"]) == 0
    told = capfd.readouterr()
    assert "Folds still missing: 1 of 3." in told.out and "Next" not in told.out
    parts = only_run(work / "parts")
    assert run(["rank", "data", "--output-dir", "parts"]) == 1
    assert "partial" in capfd.readouterr().err
    # The missing fold was trained elsewhere and is put beside the others.
    shutil.copytree(whole / "fold_1", parts / "fold_1")
    assert run(["train", "--head-only", "--resume", str(parts)]) == 0
    the_same(whole, parts)


def test_a_fold_of_another_division_is_refused(
    work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run([*TRAIN, "--output-dir", "one", "--only-folds", "0"]) == 0
    assert run([*TRAIN, "--output-dir", "two", "--only-folds", "0,1,2", "--split-seed", "5"]) == 0
    one, two = only_run(work / "one"), only_run(work / "two")
    for fold in (1, 2):
        shutil.copytree(two / f"fold_{fold}", one / f"fold_{fold}")
    capfd.readouterr()
    assert run(["train", "--head-only", "--resume", str(one)]) == 1
    assert "divides the images otherwise" in capfd.readouterr().err
    assert json.loads((one / "run.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--folds", "1"], "--folds 1: 2 or more"),
        (["--only-folds", "0"], "--only-folds goes with --folds"),
        (["--folds", "3", "--only-folds", "3"], "there are folds 0 to 2"),
        (["--folds", "3", "--only-folds", "x"], "give numbers like 0,1"),
    ],
)
def test_what_is_wrong_is_told(
    work: Path, capfd: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    assert run(["train", "--head-only", *options]) == 1
    assert words in capfd.readouterr().err
