"""A file of judged pairs from the command line: with tiers and without, split, trained, judged."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from made_run import rows_of
from mirip_fast_cli.main import run
from test_cli import TINY, draw, make_data

from mirip_fast.ranking.judged_pairs import share_in_order
from mirip_fast.ranking.rows import ListedPairs

TRAIN = ["train", "--head-only", "--epochs", "4", "--batch-size", "16"]
LARGER = ["--train-ratio", "0.4", "--val-ratio", "0.3", "--test-ratio", "0.3"]


def brightness_pairs(path: Path, names: list[str], better) -> None:
    """Every pair of the named images, each tenth one a tie."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image_path_1", "image_path_2", "label", "weight", "judge"])
        for i, (one, other) in enumerate(itertools.combinations(names, 2)):
            label = 0 if i % 10 == 0 else 1 if better(one, other) else -1
            writer.writerow([one, other, label, 1 + i % 3, "Kim"])


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
    alone = ["--label", "pairs"]
    assert run([*TRAIN, "--pairs", "pairs.csv", *alone, *LARGER, "--ema-decay", "0.9"]) == 0
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
    pairs = work / "pairs.csv"
    brightness_pairs(pairs, ids, lambda one, other: one > other)
    pairs.write_text(pairs.read_text(encoding="utf-8").replace(",weight,", ",weights,", 1))
    assert run(["embed", "data", *TINY]) == 0
    assert run([*TRAIN, "--pairs", "pairs.csv", "--label", "pairs"]) == 0
    err = capfd.readouterr().err
    assert err.count("column 'weights' is not read") == 1
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
    accuracy, interval = share_in_order(scores, pairs, np.arange(20), 200)
    assert accuracy == pytest.approx(hits / total)
    assert interval is not None and interval[0] < accuracy < interval[1]
    assert share_in_order(scores, pairs, np.zeros(20, np.int64), 200) == (accuracy, None)
    assert share_in_order(scores, pairs, np.arange(20), 0) == (accuracy, None)


@pytest.fixture(scope="module")
def by_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Works without grades, pairs of them, and a run that learned from these without an option."""
    work = tmp_path_factory.mktemp("preferences")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        names = ungraded(work / "photos")
        brightness_pairs(work / "pairs.csv", names, lambda one, other: one > other)
        assert run(["-q", "embed", "photos", *TINY]) == 0
        assert run(["-q", "train", "--head-only", "--pairs", "pairs.csv", *LARGER]) == 0
    return work


def test_few_judged_pairs_are_learned_from_by_a_gaussian_process(by_process: Path) -> None:
    (folder,) = (by_process / "runs").iterdir()
    about = json.loads((folder / "run.json").read_text())
    assert about["readout"] == "gp" and about["left_out_pair_accuracy"] > 0.8
    held_out = rows_of(folder / "held_out.csv")
    split = {row["image_id"]: row["split"] for row in rows_of(folder / "split.csv")}
    assert {row["image_id"] for row in held_out} == {n for n, s in split.items() if s != "test"}
    # It learns from train and val alike, so a pair of both is not lost; one with a test work is.
    for row in rows_of(folder / "pairs.csv"):
        tested = [split[row[name]] == "test" for name in ("image_id_1", "image_id_2")]
        assert row["split"] == ("test" if all(tested) else "" if any(tested) else row["split"])
        assert any(tested) or row["split"] in ("train", "val")
    # Left-out scores come of pairs of other works: on the judged pairs they are worse than the model's own.
    calibration = json.loads((folder / "calibration.json").read_text())
    assert calibration["unknown"] is not None and "held-out works" in calibration["unknown"]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["evaluate"], "Judged pairs of the test split: accuracy"),
        (["evaluate", "--split", "train", "--html", "e.html"], "Judged pairs of the train split"),
        (["rank", "photos", "--workers", "0", "--html", "r.html"], "where more judged pairs"),
        (["compare", "photos/p00.png", "photos/p29.png"], "Winner: photos/p29.png"),
        (["explain", "photos/p20.png", "--detail", "2"], "Written: p20.explain.png"),
        (["export", "--hf", "share", "--overwrite"], "README.md"),
        (["audit", "--fail-on", "none"], "images with features"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_run_of_judged_pairs_is_used_like_any_other(
    by_process: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    command: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(by_process)
    assert run(command) == 0
    out = " ".join(capfd.readouterr().out.split())
    assert said in out and "None" not in out
    if command[0] == "rank":
        rows = rows_of(by_process / "ranking.csv")
        assert rows[0]["file"] > rows[-1]["file"] and all(r["rank_low"] != "unknown" for r in rows)


def test_what_learns_from_judged_pairs_is_told(
    by_process: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(by_process)
    pairs = ["train", "--head-only", "--pairs", "pairs.csv", "--output-dir", "others", *LARGER]
    monkeypatch.setattr("mirip_fast.ranking.readouts.FEW_PAIRS", 20)
    assert run([*pairs, "--debug"]) == 0
    err = capfd.readouterr().err
    assert "judged pairs are enough for one" in err and err.count("435 judged pairs; used") == 1
    monkeypatch.setattr("mirip_fast.ranking.readouts.MOST_PAIRS", 50)
    for wrong, said in (
        (["--readout", "gp"], "learns from at most 50; leave it out"),
        (["--label", "tier_score"], "--label goes with --pairs all"),
    ):
        assert run([*pairs, *wrong]) == 1
        assert said in capfd.readouterr().err
    rows = [row | {"label": "0"} for row in rows_of(by_process / "pairs.csv")]
    with (by_process / "ties.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows[:9])
    assert run(["train", "--head-only", "--pairs", "ties.csv", *LARGER]) == 1
    assert "No judged pair to learn from (ties" in capfd.readouterr().err
    lines = (by_process / "pairs.csv").read_text(encoding="utf-8-sig").splitlines()
    (by_process / "few.csv").write_text("\n".join([lines[0], *lines[1::15]]), encoding="utf-8")
    assert (
        run(["train", "--head-only", "--pairs", "few.csv", "--output-dir", "others", *LARGER]) == 0
    )
    assert "judged pairs: too few to rank by" in capfd.readouterr().err


def test_tiers_beside_judged_pairs_say_what_scores_mean(
    work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_data(work / "data", 60)
    rows = rows_of(work / "data" / "metadata.csv")
    better = {row["filename"]: -"SABC".index(row["tier"]) for row in rows}
    names = [row["filename"] for row in rows][::3]
    brightness_pairs(work / "pairs.csv", names, lambda one, other: better[one] > better[other])
    assert run(["-q", "embed", "data", *TINY]) == 0
    assert run(["train", "--head-only", "--pairs", "pairs.csv", "--label", "pairs"]) == 0
    told = capfd.readouterr()
    assert "the tiers say what scores mean" in told.err and "in the right order" in told.out
    (folder,) = (work / "runs").iterdir()
    calibration = json.loads((folder / "calibration.json").read_text())
    assert calibration["ordinal"] is not None and calibration["unknown"] is None
    assert calibration["temperature"]["images"] == 2 * calibration["temperature"]["pairs"]
    assert run(["evaluate"]) == 0
    out = capfd.readouterr().out
    assert "Judged pairs of the test split" in out and "true \\ most probable" in out
    assert run(["rank", "data", "--tiers", "--workers", "0"]) == 0
    assert all(row["tier"] in "SABC" for row in rows_of(work / "ranking.csv"))
