"""Which model commands take where none is named, and that one no better than chance is not taken unasked."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path

import pytest
from made_run import TINY, make_data, rows_of
from mirip_fast_cli.main import run

from mirip_fast.training.run_folder import find_runs


def model_said(err: str) -> str:
    found = re.search(r"^Model (runs/[^/]+)/", err, re.MULTILINE)
    assert found, err
    return found[1]


def test_the_run_in_use_is_taken_until_another_is_named(
    headed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = next(p for p in Path("runs").iterdir() if p.is_dir())
    assert run(["use", str(first)]) == 0
    assert run(["train", "--head-only", "--epochs", "2"]) == 0
    told = capsys.readouterr()
    assert f"{first} stays in use; `mirip-fast use runs/" in told.out
    newest = find_runs(Path("runs"))[0].path
    assert run(["evaluate"]) == 0
    assert model_said(capsys.readouterr().err) == str(first)
    assert run(["use", newest.name]) == 0  # by its name alone
    assert run(["rank", "data"]) == 0
    assert model_said(capsys.readouterr().err) == str(newest)
    # A trial never becomes it, nor what is no run.
    assert run(["train", "--head-only", "--debug"]) == 0
    trial = find_runs(Path("runs"))[0].path
    capsys.readouterr()
    assert run(["use", str(trial)]) == 1 and "a trial" in capsys.readouterr().err
    assert run(["use", "runs/none"]) == 1 and "there is no such run" in capsys.readouterr().err
    newest.rename(newest.with_name("elsewhere"))
    assert run(["rank", "data"]) == 1
    assert "names" in (err := capsys.readouterr().err) and "mirip-fast use" in err
    assert run(["use", "--newest"]) == 0
    assert "the newest finished run" in capsys.readouterr().out
    Path("runs/elsewhere").rename(newest)
    assert run(["evaluate"]) == 0  # by the newest that is no trial
    assert model_said(capsys.readouterr().err) == str(newest)
    for real in (first, newest):
        shutil.rmtree(real)
    assert run(["rank", "data"]) == 1 and "(trial)" in capsys.readouterr().err


def test_a_model_no_better_than_chance_is_told_and_not_ranked_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_data(Path("data"), 60)
    lines = Path("data/metadata.csv").read_text(encoding="utf-8-sig").splitlines()
    cells = [line.split(",") for line in lines[1:]]
    tiers = [row[2] for row in cells]
    random.Random(3).shuffle(tiers)  # grades that say nothing of the pictures
    rows = [",".join([a, b, tier, d]) for (a, b, _, d), tier in zip(cells, tiers, strict=True)]
    Path("data/metadata.csv").write_text("\n".join([lines[0], *rows]), encoding="utf-8")
    assert run(["embed", "data", *TINY]) == 0
    assert run(["train", "--head-only"]) == 0
    assert "no better than chance" in capsys.readouterr().err
    assert run(["rank", "data"]) == 1
    err = capsys.readouterr().err
    assert "guessing orders 50 %" in err and "--anyway" in err
    assert not Path("ranking.csv").exists()
    assert run(["rank", "data", "--anyway"]) == 0
    assert len(rows_of(Path("ranking.csv"))) == 60


def test_verbose_tells_when_each_line_came(
    headed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["rank", "data", "-v"]) == 0
    assert re.search(r"^ *\d+ ms  Model runs/", capsys.readouterr().err, re.MULTILINE)
