"""`evaluate runs/A runs/B`: the same images, both accuracies, an interval of the difference."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from made_run import TINY, Restored
from mirip_fast_cli.main import run
from sklearn.linear_model import RidgeCV
from sklearn.preprocessing import StandardScaler

from mirip_fast.config import Config
from mirip_fast.evaluation.bootstrap import paired_bootstrap
from mirip_fast.evaluation.report import plain
from mirip_fast.ranking.baselines import ridge_scores
from mirip_fast.ranking.evaluate import evaluate_side_by_side, evaluate_split, pick_model
from mirip_fast.training.run_folder import accept_files


@pytest.fixture(scope="session")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> Restored:
    head = ["train", "--head-only", "--test-ratio", "0.3", "--train-ratio", "0.6"]
    return Restored(
        tmp_path_factory.mktemp("runs"), 80, ["embed", "data", *TINY],
        [*head, "--epochs", "1", "--name", "one"],
        [*head, "--epochs", "20", "--name", "twenty", "--learning-rate", "1e-3"],
    )  # fmt: skip


@pytest.fixture
def work(two_runs: Restored, monkeypatch: pytest.MonkeyPatch) -> Path:
    return two_runs(monkeypatch)


def folder(work: Path, name: str) -> str:
    (found,) = (work / "runs").glob(f"*-{name}")
    return f"runs/{found.name}"


def test_runs_stand_side_by_side(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    full = ["train", "--full", "data", "--epochs", "1", "--loader-workers", "0", "--workers", "0"]
    assert run([*full, "--name", "full", "--init-from", folder(work, "twenty")]) == 0
    runs = [folder(work, name) for name in ("one", "twenty", "full")]
    capfd.readouterr()
    assert run(["evaluate", *runs, "--out", "both.json"]) == 0
    out = capfd.readouterr().out
    rows = json.loads((work / "both.json").read_text())["rows"]
    assert [row["run"] for row in rows] == [Path(name).name for name in runs]
    assert "Test split, 24 images" in out and all(Path(name).name in out for name in runs)
    alone = []
    for name in runs:
        assert run(["evaluate", name]) == 0
        alone.append(json.loads((work / name / "evaluation_test.json").read_text()))
    for row, report in zip(rows, alone, strict=True):
        assert row["accuracy"] == pytest.approx(report["pairwise_accuracy"])
        assert row["interval"]["low"] == pytest.approx(report["pairwise_accuracy_interval"]["low"])
        assert row["seconds_per_epoch"] > 0
    # Each alone says whether it is better than chance, a ridge regression and the run before it.
    for name, report in zip(runs, alone, strict=True):
        chance, ridge, last = report["baselines"]
        assert chance["difference"] == pytest.approx(report["pairwise_accuracy"] - 0.5)
        assert (ridge["unknown"] is None) != (
            name == runs[2]
        )  # its backbone has seen no other works
        assert (last["unknown"] is None) == (name != runs[0])
    assert runs[0][5:] in alone[1]["baselines"][2]["what"]
    assert alone[1]["baselines"][2]["difference"] == rows[1]["difference"]["difference"]
    assert alone[1]["baselines"][2]["interval"] == rows[1]["difference"]["interval"]
    assert rows[0]["difference"] is None
    assert rows[1]["difference"]["difference"] == pytest.approx(
        rows[1]["accuracy"] - rows[0]["accuracy"]
    )
    assert rows[1]["difference"]["interval"]["low"] <= rows[1]["difference"]["difference"]
    assert f"{rows[1]['difference']['difference']:+.4f}" in out


def test_the_difference_is_that_of_the_paired_bootstrap(work: Path) -> None:
    models = [pick_model(Path(folder(work, name)), Path("runs")) for name in ("one", "twenty")]
    first, second = (evaluate_split(model, "test", Config()).report for model in models)
    _, found = evaluate_side_by_side(models, "test", Config())
    expected = paired_bootstrap(second.scores, first.scores, first.tiers)
    assert found["rows"][1]["difference"] == plain(expected)


def test_one_sentence_says_what_a_model_is_better_than(
    work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def said(*options: str) -> str:
        capfd.readouterr()
        assert run(["evaluate", folder(work, "twenty"), *options]) == 0
        return " ".join(capfd.readouterr().out.split())

    told = said("--html", "page.html")
    for what in (
        "chance (",
        "a ridge regression on the same features (",
        f"{folder(work, 'one')[5:]} (",
    ):
        assert what in told
    page = (work / "page.html").read_text(encoding="utf-8")
    assert all(f'"name":"{name}"' in page for name in ("chance", "ridge", "lastrun"))
    why = "as the model had learned from 48 of the evaluated works"
    assert f"the last run before it is unknown, {why}" in said("--split", "train")
    assert "is unknown, with no bootstrap rounds" in said("--bootstrap-rounds", "0")
    # Other grades are another test, and a cache that lost works is no reason to fail.
    path = work / folder(work, "one") / "split.csv"
    path.write_text(path.read_text(encoding="utf-8").replace(",S,", ",B,"), encoding="utf-8")
    accept_files(path.parent)
    assert "there is none on the same data with the same test works" in said()
    (work / "cache").rename(work / "elsewhere")
    told = said()
    assert "than a ridge regression on the same features is unknown, as " in told
    assert "embed` again" in told and "better than chance" in told.replace("worse", "better")


def test_the_ridge_regression_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    for n, width in ((40, 9), (30, 200)):
        rows = rng.normal(3, 2, (n, width)).astype(np.float32)
        rows[:, 0] = 1  # says nothing
        y = rows[:, 1] + rng.normal(size=n)
        new = rng.normal(3, 2, (20, width))
        scaled = StandardScaler().fit(rows.astype(np.float64))
        x = scaled.transform(rows.astype(np.float64))
        alphas = (x**2).sum() / n * 10 ** np.arange(-4, 4.5, 0.5)
        expected = RidgeCV(alphas).fit(x, y).predict(scaled.transform(new))
        found = ridge_scores(rows, y, new)
        np.testing.assert_allclose(found - found.mean(), expected - expected.mean(), atol=1e-4)


def test_what_can_not_be_compared_is_refused(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    runs = [folder(work, "one"), folder(work, "twenty")]
    other = ["--epochs", "1", "--split-seed", "7", "--name", "other"]
    assert run(["train", "--head-only", *other]) == 0
    capfd.readouterr()
    assert run(["evaluate", runs[0], folder(work, "other")]) == 1
    err = capfd.readouterr().err
    assert "differ: 24 and 8 images" in err and "--split-seed" in err
    assert run(["evaluate", *runs, "--test-data", "data/metadata.csv"]) == 1
    assert "leave out --checkpoint" in capfd.readouterr().err
    path = work / runs[1] / "split.csv"
    lines = path.read_text(encoding="utf-8").splitlines()
    at = next(i for i, line in enumerate(lines) if ",test," in line and ",S," in line)
    lines[at] = lines[at].replace(",S,", ",C,")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    accept_files(path.parent)
    assert run(["evaluate", *runs]) == 1
    assert "1 of them graded differently" in capfd.readouterr().err
