"""A file of judged pairs from the command line: with tiers and without, split, trained, judged."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mirip_fast_cli.main import run
from test_cli import TINY, draw, make_data

from mirip_fast.ranking.evaluate_pairs import agreement
from mirip_fast.ranking.rows import ListedPairs

TRAIN = ["train", "--head-only", "--epochs", "4", "--batch-size", "16"]
LARGER = ["--train-ratio", "0.4", "--val-ratio", "0.3", "--test-ratio", "0.3"]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def brightness_pairs(path: Path, names: list[str], better) -> None:
    """Every pair of the named images, each tenth one a tie."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image_path_1", "image_path_2", "label", "weight", "judge"])
        for i, (one, other) in enumerate(itertools.combinations(names, 2)):
            label = 0 if i % 10 == 0 else 1 if better(one, other) else -1
            writer.writerow([one, other, label, 1 + i % 3, "Kim"])


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        return list(csv.DictReader(stream))


def ungraded(folder: Path) -> list[str]:
    names = [f"p{i:02d}.png" for i in range(30)]
    for i, name in enumerate(names):
        draw(folder / name, 0.1 + 0.02 * i, i)
    return names


def test_pairs_without_tiers(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    names = ungraded(work / "photos")
    brightness_pairs(work / "pairs.csv", names, lambda one, other: one > other)
    assert run(["embed", "photos", *TINY]) == 0
    header, *rows = (work / "pairs.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    for name, part in (("one.csv", rows[:200]), ("two.csv", rows[200:])):
        (work / name).write_text("".join([header, *part]), encoding="utf-8")
    twice = ["--pairs", "one.csv", "--pairs", "one.csv"]
    assert run([*TRAIN, *twice, *LARGER]) == 1
    assert "one file is named twice" in capfd.readouterr().err
    assert run([*TRAIN, "--pairs", "one.csv", "--pairs", "two.csv", *LARGER]) == 0
    err = capfd.readouterr().err
    assert (
        "one.csv, two.csv: 435 judged pairs; used: train" in err
        and "images in different splits" in err
    )
    (folder,) = (work / "runs").iterdir()
    split = {row["image_id"]: row["split"] for row in rows_of(folder / "split.csv")}
    kept = rows_of(folder / "pairs.csv")
    assert len(kept) == 435 and {row["judge"] for row in kept} == {"Kim"}
    assert {row["file"] for row in kept} == {"one.csv", "two.csv"}
    for row in kept:
        one, other = split[row["image_id_1"]], split[row["image_id_2"]]
        assert (row["split"], row["dropped"]) == (
            (one, "") if one == other else ("", "images in different splits")
        )
    assert "val/tier_accuracy" not in rows_of(folder / "history.csv")[0]

    assert run(["evaluate"]) == 0
    assert "Judged pairs of the test split: accuracy" in capfd.readouterr().out
    report = json.loads((folder / "evaluation_test.json").read_text(encoding="utf-8"))
    test_pairs = [row for row in kept if row["split"] == "test"]
    ties = sum(row["label"] == "0" for row in test_pairs)
    assert report["judged_pairs"]["ties"] == ties
    assert report["judged_pairs"]["pairs"] == len(test_pairs) - ties > 0
    low, high = report["judged_pairs"]["interval"]
    assert 0 <= low <= report["judged_pairs"]["accuracy"] <= high <= 1

    assert run(["train", "--head-only", "--resume", "latest"]) == 0  # its pairs are in its folder
    assert run(["rank", "photos", "--workers", "0"]) == 0


def test_pairs_beside_tiers(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_data(work / "data", 60)
    ids = [f"id{i:02d}" for i in range(60)]
    tiers = {name: int(name[2:]) % 4 for name in ids}
    brightness_pairs(work / "pairs.csv", ids, lambda one, other: tiers[one] < tiers[other])
    assert run(["embed", "data", *TINY]) == 0
    assert run([*TRAIN, "--pairs", "pairs.csv", *LARGER, "--ema-decay", "0.9"]) == 0
    (folder,) = (work / "runs").iterdir()
    assert all(
        0 <= float(line["val/tier_accuracy"]) <= 1 for line in rows_of(folder / "history.csv")
    )
    capfd.readouterr()
    assert run(["evaluate"]) == 0
    out = capfd.readouterr().out
    assert "Judged pairs of the test split" in out and "pairwise accuracy" in out
    # head.safetensors, which rank and evaluate read, holds the averaged weights of the best epoch
    from safetensors.numpy import load_file

    best = torch.load(folder / "best_model.pt", weights_only=True)["model_state_dict"]
    quick = load_file(folder / "head.safetensors")
    assert all(np.array_equal(quick[name], best[name].numpy()) for name in best)


def test_few_validation_pairs_leave_the_choice_to_the_tiers(
    work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_data(work / "data", 60)
    ids = [f"id{i:02d}" for i in range(12)]
    brightness_pairs(work / "pairs.csv", ids, lambda one, other: one > other)
    assert run(["embed", "data", *TINY]) == 0
    assert run([*TRAIN, "--pairs", "pairs.csv"]) == 0
    err = capfd.readouterr().err
    assert "the tiers choose the best epoch" in err and "val accuracy is that of the tiers" in err


def test_what_can_not_be_used_is_told(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    names = ungraded(work / "photos")
    (work / "photos" / "p05.png").write_text("no picture")
    (work / "photos" / "p07.png").write_bytes((work / "photos" / "p06.png").read_bytes())
    assert run(["embed", "photos", *TINY]) == 0
    pairs = work / "pairs.csv"
    pairs.write_text("image_path_1,image_path_2,label\np01.png,p02.png,1\n")
    assert run([*TRAIN, "--pairs", "pairs.csv", "--train-ratio", "0.1", "--val-ratio", "0.8"]) == 1
    err = capfd.readouterr().err
    assert "No judged pair lies inside the train split" in err or "the val split" in err
    assert not (work / "runs").exists()
    pairs.write_text("image_path_1,image_path_2,label\np01.png,nope.png,1\n")
    assert run([*TRAIN, "--pairs", "pairs.csv"]) == 1
    assert "pairs.csv:2, image_path_2: 'nope.png' is no image" in capfd.readouterr().err
    brightness_pairs(pairs, names, lambda one, other: one > other)
    assert run([*TRAIN, "--pairs", "pairs.csv", *LARGER]) == 0
    err = capfd.readouterr().err
    assert "an image could not be embedded 29" in err
    assert "the same picture under two names 1" in err


def test_agreement_is_the_plain_loop() -> None:
    rng = np.random.default_rng(0)
    images = np.array([rng.choice(20, 2, replace=False) for _ in range(80)])
    pairs = ListedPairs(images, rng.integers(-1, 2, 80), rng.integers(0, 3, 80).astype(float))
    scores = rng.integers(0, 5, 20).astype(np.float32)
    total = hits = 0.0
    for (one, other), label, weight in zip(images, pairs.label, pairs.weight, strict=True):
        if label:
            gap = (scores[one] - scores[other]) * label
            hits += weight * (1.0 if gap > 0 else 0.5 if gap == 0 else 0.0)
            total += weight
    accuracy, interval = agreement(scores, pairs, np.arange(20), 200)
    assert accuracy == pytest.approx(hits / total)
    assert interval is not None and interval[0] < accuracy < interval[1]
    assert agreement(scores, pairs, np.zeros(20, np.int64), 200) == (accuracy, None)
    assert agreement(scores, pairs, np.arange(20), 0) == (accuracy, None)
