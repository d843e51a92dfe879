"""Ranks and what is said of them: intervals against simulation, tables and files as people meet them."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_page import data_of, works
from made_run import flat
from mirip_fast_cli.main import run
from PIL import Image

from mirip_fast.evaluation.calibration import Calibration, fit_calibration
from mirip_fast.evaluation.text_table import display_width
from mirip_fast.portfolio.ranking import (
    rank_intervals,
    rank_scores,
    ranks_of,
    write_ranking,
)
from mirip_fast.training.run_folder import accept_files

TIERS = ("S", "A", "B", "C")


def known_calibration(tiers: tuple[str, ...] = TIERS) -> Calibration:
    rng = np.random.default_rng(0)
    codes = np.arange(200) % len(tiers)
    return fit_calibration(rng.normal(size=200) - codes, codes, tiers, source="out-of-fold")


def plain_ranks(scores):
    return [1 + sum(other > score for other in scores) for score in scores]


def test_ranks_as_in_sports():
    scores = np.random.default_rng(0).integers(0, 6, (7, 12)).astype(float)
    assert ranks_of(scores).tolist() == [plain_ranks(row) for row in scores]
    assert ranks_of([3.0, 5.0, 5.0, 1.0]).tolist() == [3, 1, 1, 4]


@pytest.mark.parametrize("draws", [30, 79, 200, 999])
def test_an_interval_is_the_shortest_that_holds_95_percent_of_the_ranks(draws):
    drawn = np.random.default_rng(draws).normal(size=(draws, 9)) - 0.4 * np.arange(9)
    own, held = np.arange(1, 10), min(draws, math.ceil(0.95 * (draws + 1)))
    low, high, _ = rank_intervals(drawn, own)
    ranks = np.array([plain_ranks(row) for row in drawn])
    for work in range(9):
        within = {
            (a, b): np.count_nonzero((a <= ranks[:, work]) & (ranks[:, work] <= b))
            for a in range(1, 10)
            for b in range(a, 10)
        }
        shortest = min(b - a for (a, b), count in within.items() if count >= held)
        good = [(a, b) for (a, b), n in within.items() if n >= held and b - a == shortest]
        own_rank = work + 1
        assert (low[work], high[work]) in {(min(a, own_rank), max(b, own_rank)) for a, b in good}
    turned = rank_intervals(drawn + np.arange(9) * 99, own)  # the draws rank the other way round
    assert turned[0].tolist() == np.minimum(own[::-1], own).tolist()
    assert turned[1].tolist() == np.maximum(own[::-1], own).tolist()


def test_settled_is_95_percent_of_the_draws_against_both_neighbours():
    draws = np.zeros((100, 4))
    draws[:, 0] = 9
    draws[:, 1] = np.where(np.arange(100) < 95, 2, 0)  # 95 of 100 above the third
    draws[:, 2] = 1
    draws[:, 3] = np.where(np.arange(100) < 94, 0.5, 1.5)  # 94 of 100 below the third
    assert rank_intervals(draws, [1, 2, 3, 4])[2].tolist() == [True, True, False, False]
    same = np.zeros((60, 2))
    assert rank_intervals(same, [1, 1])[2].tolist() == [False, False]
    assert rank_intervals(np.zeros((60, 1)), [1])[2].tolist() == [True]


def test_what_is_known_goes_with_the_right_work():
    rng = np.random.default_rng(1)
    scores = rng.normal(size=12).astype(np.float32).tolist()
    scores[4] = float("nan")
    files = [f"작품 {i}.png" for i in range(12)]
    draws = np.array(scores) + 0.1 * rng.normal(size=(60, 12))
    calibration = known_calibration()
    ranking = rank_scores(works(files), scores, calibration=calibration, draws=draws)
    assert len(ranking) == 11
    kept = [i for i in range(12) if i != 4]
    order = sorted(kept, key=lambda i: -scores[i])
    low, high, _ = rank_intervals(draws[:, order], np.arange(1, 12))
    for work in ranking.itertuples():
        i = files.index(work.file)
        assert work.score == scores[i]
        assert work.score_100 == calibration.score_100([scores[i]])[0]
        chances = calibration.tier_probabilities([scores[i]])[0]
        assert [getattr(work, f"p_{tier}") for tier in TIERS] == chances.tolist()
        assert work.tier == TIERS[chances.argmax()]
        place = order.index(i)
        assert (work.rank_low, work.rank_high) == (low[place], high[place])


def test_files_hold_what_is_known_and_say_unknown(tmp_path: Path):
    files = ["b.png", "=a.png", "c,\n.png"]
    draws = np.random.default_rng(0).normal(size=(60, 3)) + np.array([50, 0, 0])
    calibration = known_calibration()
    known = rank_scores(works(files), [5.0, 2.0, 1.0], calibration=calibration, draws=draws)
    write_ranking(tmp_path / "known", known, {"folder": "x"})
    write_ranking(tmp_path / "unknown", rank_scores(works(files), [5.0, 2.0, 1.0]), {})
    rows = {}
    for name in ("known", "unknown"):
        with (tmp_path / name / "ranking.csv").open(encoding="utf-8-sig", newline="") as stream:
            rows[name] = list(csv.DictReader(stream))
    first, second, _ = rows["known"]
    assert (first["rank"], first["rank_low"], first["rank_high"], first["settled"]) == (
        "1",
        "1",
        "1",
        "yes",
    )
    assert second["settled"] == "no" and second["file"] == "'=a.png"
    assert sum(float(first[f"p_{tier}"]) for tier in TIERS) == pytest.approx(1, abs=3e-4)
    assert float(first["score_100"]) == pytest.approx(known["score_100"][0], abs=0.01)
    for name in ("rank_low", "rank_high", "settled", "score_100", "tier"):
        assert {row[name] for row in rows["unknown"]} == {"unknown"}
    read = json.loads((tmp_path / "unknown" / "ranking.json").read_text())["works"]
    assert read[0]["rank_low"] is read[0]["tier_probabilities"] is read[0]["settled"] is None


def test_the_columns_of_a_table_of_works_come_through_in_their_order(calibrated: Path) -> None:
    """An applicant or a department that is dropped has to be matched by hand again."""
    names = [f"작품 {i:03d}.png" for i in (3, 0, 2)]
    (calibrated / "data" / "new.csv").write_text(
        "department,filename,tier,rank,applicant\n"
        + "".join(f"회화 {i},images/{name},C,{i},=a{i}\n" for i, name in enumerate(names))
        + ",images/작품 001.png,,,\n",
        encoding="utf-8",
    )
    assert run(["rank", "data/new.csv", "--workers", "0", "--html", "page.html"]) == 0
    table = pd.read_csv("ranking.csv", encoding="utf-8-sig", keep_default_na=False)
    assert list(table.columns[-6:]) == [
        "file", "image_id", "department", "given_tier", "given_rank", "applicant",
    ]  # fmt: skip
    for work in json.loads(Path("ranking.json").read_text())["works"]:
        assert list(work["given"]) == ["department", "given_tier", "given_rank", "applicant"]
    row = table[table["department"] == "회화 1"].iloc[0]
    assert (
        row["file"].endswith(names[1]) and row["applicant"] == "'=a1" and row["given_tier"] == "C"
    )
    assert "회화 1" in json.dumps(data_of(Path("page.html")), ensure_ascii=False)


def test_commands_tell_what_is_known(
    calibrated: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder,) = (calibrated / "runs").iterdir()
    assert {"held_out.csv", "calibration.json"} <= {path.name for path in folder.iterdir()}
    capfd.readouterr()
    assert run(["rank", "data/images"]) == 0
    out = flat(capfd.readouterr().out)
    assert "0-100 and tiers: from 48 held-out works (validation)." in out
    assert "where the graders may put a work: their scatter around what the model had said" in out
    assert "128 of 160 works are among those that the model was made with" in out
    first, second = (calibrated / "data" / "images" / f"작품 {i:03d}.png" for i in (0, 3))
    copy = calibrated / "data" / "images" / "같은 그림.png"
    copy.write_bytes(first.read_bytes())
    assert run(["rank", "data/images"]) == 0
    out = capfd.readouterr().out
    assert max(map(display_width, out.split("\nWritten")[0].split("\n"))) <= 100
    told = json.loads((calibrated / "ranking.json").read_text(encoding="utf-8"))
    assert told["rank_intervals"] == {
        "confidence": 0.95, "draws": 500, "views": 1, "unknown": None,
    }  # fmt: skip
    assert told["held_out"]["source"] == "validation" and told["held_out"]["images"] == 48
    works = {work["file"]: work for work in told["works"]}
    twin, original = works["같은 그림.png"], works["작품 000.png"]
    assert (twin["rank_low"], twin["rank_high"]) == (original["rank_low"], original["rank_high"])
    assert any(work["rank_low"] < work["rank"] < work["rank_high"] for work in told["works"])

    assert run(["compare", str(second), str(first)]) == 0
    out = capfd.readouterr().out
    assert "Probability that it is the better one: " in out and "unknown" not in out
    assert run(["compare", str(copy), str(first)]) == 0
    assert "A tie" in (out := capfd.readouterr().out) and "50.0%" in out

    assert run(["evaluate"]) == 0
    out = capfd.readouterr().out
    assert "calibration error of pair probabilities" in out and "too good" not in out
    made = {path.name for path in folder.iterdir()}
    assert {"evaluation_test_reliability.png", "evaluation_test_mistakes.png"} <= made
    assert run(["evaluate", "--split", "val"]) == 0
    assert (
        "48 of the 48 images are among those that the model was made with" in capfd.readouterr().out
    )
    root = ["--image-dir", "data/images"]
    assert run(["evaluate", "--test-data", "data/metadata.csv", *root, "--out", "o/all.json"]) == 0
    assert "128 of the 160 images are among those" in capfd.readouterr().out
    made = {path.name for path in (calibrated / "o").iterdir()}
    drawn = ("scores_by_tier", "confusion", "tier_pairs", "reliability", "mistakes")
    assert made == {"all.json", *(f"all_{name}.png" for name in drawn)}

    # What lies at a run's paths now may be the reader's own: it is not put into pictures to be shown.
    for path in (calibrated / "data" / "images").iterdir():
        Image.new("RGB", (28, 28), "red").save(path)
    (folder / "evaluation_test_mistakes.png").unlink()
    assert run(["evaluate"]) == 0
    assert "mistakes not drawn: a file has another content" in capfd.readouterr().err
    assert not (folder / "evaluation_test_mistakes.png").exists()


def test_a_calibration_of_another_model_is_left_aside(
    calibrated: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder,) = (calibrated / "runs").iterdir()
    capfd.readouterr()
    assert run(["rank", "data/images", "--checkpoint", str(folder / "checkpoint_epoch_5.pt")]) == 0
    out = flat(capfd.readouterr().out)
    assert "was made for best_model.pt, not for this checkpoint_epoch_5.pt" in out
    (folder / "calibration.json").write_text("{}")
    accept_files(folder)
    assert run(["rank", "data/images"]) == 0
    (folder / "calibration.json").write_text("{")
    accept_files(folder)
    assert run(["rank", "data/images"]) == 1
    assert "calibration.json cannot be read" in capfd.readouterr().err
    (folder / "calibration.json").unlink()
    accept_files(folder)
    assert run(["rank", "data/images"]) == 0
    assert "calibration.json is missing" in flat(capfd.readouterr().out)
