"""The pictures that a training run and an evaluation leave; a run survives when they fail."""

from __future__ import annotations

import builtins
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_evaluation import made_report
from made_run import TINY, Restored
from mirip_fast_cli.main import run
from PIL import Image

from mirip_fast.ranking.finished import plot_curves, read_curves
from mirip_fast.training.run_folder import Run, find_runs

pytestmark = pytest.mark.usefixtures("drawn")

LONG = "서울특별시 종로구 아주 긴 이름의 미술학원 <b>$x$ 🎨 "
ALWAYS = {"scores_by_tier", "confusion", "tier_pairs"}


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({"scores": [1.0, 2.0], "tiers": [0, 3]}, set()),
        ({"scores": np.zeros(60), "tiers": np.arange(60) % 4}, {"reliability"}),
        ({"tiers": np.arange(90) % 2 * 2, "rounds": 0}, {"reliability"}),
        ({"names": [chr(65 + i) for i in range(26)]}, set()),  # too few of each to calibrate
        ({"names": ["<b>$x$", "\n", "가", "🎨"], "calibrated": False}, set()),
        (
            {"groups": [f"{LONG}{i % 48}" for i in range(96)], "within": ["조소", LONG] * 48},
            {"reliability", "groups", "within"},
        ),
    ],
)
def test_whatever_is_judged_is_drawn(
    tmp_path: Path, options: dict[str, Any], more: set[str]
) -> None:
    report = made_report(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        files = report.draw(tmp_path, "it", f"{LONG}, {report.n_images} images")
    assert {path.stem.removeprefix("it_") for path in files} == ALWAYS | more
    for path in files:
        with Image.open(path) as picture:
            assert picture.format == "PNG" and min(picture.size) > 200


def test_curves_of_folds_are_read_in_their_order(tmp_path: Path) -> None:
    head = "epoch,train/loss,val/loss,train/accuracy,val/accuracy\n"
    (tmp_path / "folds.json").write_text('{"fold_of": [0, 1, 2, -1]}')
    for fold in (2, 0):  # one was never trained
        folder = tmp_path / f"fold_{fold}"
        folder.mkdir()
        (folder / "history.csv").write_text(f"{head}1,0.7,0.{fold}1,0.5,0.6\n")
    Run(tmp_path / "fold_2").update(best_epoch=1)
    curves = read_curves(Run(tmp_path))
    assert [(name, fit["val/loss"].tolist(), best) for name, fit, best in curves] == [
        ("fold 0", [0.01], None),
        ("fold 2", [0.21], 1),
    ]
    plot_curves(tmp_path / "c.png", curves)
    assert read_curves(Run(tmp_path / "nothing")) == []


@pytest.fixture(scope="session")
def eighty(tmp_path_factory: pytest.TempPathFactory) -> Restored:
    return Restored(tmp_path_factory.mktemp("eighty"), 80, ["embed", "data", *TINY])


@pytest.fixture
def work(eighty: Restored, monkeypatch: pytest.MonkeyPatch) -> Path:
    return eighty(monkeypatch)


def pictures(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.png")}


TRAIN = [*("train", "--head-only", "--epochs", "3"), *("--test-ratio", "0.3"),
         *("--train-ratio", "0.4", "--val-ratio", "0.3")]  # fmt: skip


def test_train_and_evaluate_leave_their_pictures(
    work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run([*TRAIN, "--within", "department"]) == 0
    (folder,) = (work / "runs").iterdir()
    held_out = {f"held_out_{name}.png" for name in ALWAYS | {"within"}}
    made = pictures(folder)
    assert made - {"held_out_reliability.png"} == held_out | {"learning_curves.png"}
    capfd.readouterr()
    assert run(["evaluate", "--html", "out/page.html"]) == 0
    assert "out/page.html" in capfd.readouterr().out.replace("\n", "")
    told = {f"evaluation_test_{name}.png" for name in ALWAYS | {"within"}}
    assert told <= pictures(folder)
    text = (work / "out" / "page.html").read_text(encoding="utf-8")
    assert '"withinColumn":"department"' in text and '"val_accuracy":[' in text

    assert run([*TRAIN, "--folds", "2"]) == 0
    folds = find_runs(work / "runs")[0].path
    assert {"learning_curves.png", "held_out_scores_by_tier.png"} <= pictures(folds)
    assert pictures(folds / "fold_0") == {"learning_curves.png"}
    assert run(["evaluate", str(folds), "--html", "out/folds.html"]) == 0
    text = (work / "out" / "folds.html").read_text(encoding="utf-8")
    assert '"name":"fold 1"' in text

    capfd.readouterr()
    assert run(["evaluate", str(folder), str(folds), "--html", "x.html"]) != 0
    assert "leave out --checkpoint, --test-data and --html" in " ".join(
        capfd.readouterr().err.split()
    )
    assert run(["evaluate", "--html", "out"]) != 0
    assert "name a file in it" in capfd.readouterr().err


def test_a_run_without_matplotlib_is_finished_all_the_same(
    work: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = builtins.__import__

    def refuse(name: str, *args: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError("no matplotlib here")
        return original(name, *args, **options)

    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", refuse)
    assert run(TRAIN) == 0
    (folder,) = (work / "runs").iterdir()
    assert Run(folder).info["status"] == "finished" and pictures(folder) == set()
    assert (folder / "calibration.json").is_file() and (folder / "best_model.pt").is_file()
    assert "pictures could not all be drawn: ImportError: no matplotlib here" in (
        capfd.readouterr().err
    )
    assert "pictures could not all be drawn" in (folder / "train.log").read_text(encoding="utf-8")
