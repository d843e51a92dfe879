"""Works that have a finer grade (tier_score) and no tiers, from the data set to the ranking."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from made_run import rows_of
from mirip_fast_cli.main import run
from scipy import stats
from test_cli import TINY, draw
from test_metrics import row_resamples

from mirip_fast.errors import DataError
from mirip_fast.evaluation.bootstrap import accuracy_interval
from mirip_fast.evaluation.metrics import pairwise_accuracy
from mirip_fast.evaluation.report import evaluate


def make_scored(folder: Path, n: int = 60, header: str = "filename,tier_score") -> None:
    """The brighter the higher; every tenth work has no number."""
    rows = [header]
    for i in range(n):
        draw(folder / "images" / f"{i:02d}.png", i / n, i)
        rows.append(
            f"{i:02d}.png,{'' if i % 10 == 5 else 40 + i / 2}" + ",C" * header.endswith("tier")
        )
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("finer")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        make_scored(work / "data")
        assert run(["-q", "embed", "data", *TINY]) == 0
        assert run(["train", "--head-only"]) == 0
    return work


@pytest.fixture
def work(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(trained)
    yield trained


def test_works_are_ranked_without_an_option_and_without_tiers(
    work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder,) = (work / "runs").iterdir()
    log = (folder / "train.log").read_text()
    assert "No tiers, their probabilities or win rates" in log
    assert len(rows_of(folder / "split.csv")) == 54  # those with a number
    assert run(["rank", "data", "--workers", "0", "--html", "r.html"]) == 0
    out = capfd.readouterr().out
    assert out.count("No tiers") == 1 and " tier " not in out
    rows = rows_of(work / "ranking.csv")
    assert [row["file"] for row in rows[:2]] == ["images/59.png", "images/58.png"]
    for row in rows:
        assert int(row["rank_low"]) <= int(row["rank"]) <= int(row["rank_high"])
        assert 0 <= float(row["score_100"]) <= 100 and row["tier"] == "unknown"
    assert (
        '"tiers": []' in (work / "r.html").read_text()
        or '"tiers":[]' in (work / "r.html").read_text()
    )


def test_it_is_evaluated_by_the_finer_grade(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder,) = (work / "runs").iterdir()
    assert run(["evaluate", "--html", "e.html"]) == 0
    out = capfd.readouterr().out
    assert "Spearman with tier_score" in out and "pairs of different tier_score" in out
    assert "true \\" not in out and "macro F1" not in out and "better than chance" in out
    told = json.loads((folder / "evaluation_test.json").read_text())
    assert told["pairwise_accuracy"] > 0.9 and told["pairwise_accuracy_interval"] is not None
    assert told["tier_names"] == [] and told["tier_pairs"] == []


@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        (["evaluate", "--test-data", "data"], 0, "are among those that the model was made with"),
        (["compare", "data/images/00.png", "data/images/59.png"], 0, "Winner: data/images/59.png"),
        (["explain", "data/images/50.png", "--detail", "2"], 0, "Written: 50.explain.png"),
        (["audit", "--fail-on", "none"], 0, "left-out groups scores of "),
        (["export", "--hf", "share", "--overwrite"], 0, "README.md"),
        (["rank", "data", "--tiers", "--workers", "0"], 1, "learned from works without tiers"),
        (["train", "--head-only", "--folds", "3"], 1, "--folds divides works by their tiers"),
        (
            ["train", "--head-only", "--readout", "auto", "--epochs", "2", "--output-dir", "heads"],
            0,
            "54 of 60 works have a number in the column 'tier_score'",
        ),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, list) else "",
)
def test_every_command_takes_it_or_says_why_not(
    work: Path, capfd: pytest.CaptureFixture[str], command: list[str], status: int, said: str
) -> None:
    assert run(command) == status
    told = "".join(capfd.readouterr())
    assert said in told and "None" not in told


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("filename,tier_score,tier", "all tiers are 'C': they are left aside"),
        ("filename,tier_score", "the column tier_score is learned from"),
    ],
)
def test_tiers_that_tell_nothing_apart_are_left_aside(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    header: str,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    make_scored(tmp_path / "data", 40, header)
    assert run(["-q", "embed", "data", *TINY]) == 0
    assert run(["train", "--head-only"]) == 0
    assert said in capfd.readouterr().err


def test_accuracy_by_finer_grades_counts_every_pair_once() -> None:
    rng = np.random.default_rng(0)
    scores, grades = rng.integers(0, 20, 70).astype(float), rng.integers(0, 40, 70)
    codes = np.unique(-grades, return_inverse=True)[1]
    pairs = [(i, j) for i in range(70) for j in range(70) if grades[i] > grades[j]]
    right = [(np.sign(scores[i] - scores[j]) + 1) / 2 for i, j in pairs]
    assert pairwise_accuracy(scores, codes, finer=True) == pytest.approx(np.mean(right))
    # A resample is what repeating its rows gives.
    names = [str(i % 30) for i in range(70)]
    within = np.arange(70) % 2
    for codes_in in (None, within):
        cells = np.zeros(70, int) if codes_in is None else codes_in
        found = accuracy_interval(scores, codes, names, within=codes_in, finer=True, rounds=40)
        values = []
        for rows in row_resamples(names, 40, 0):
            better = (codes[rows][:, None] < codes[rows]) & (cells[rows][:, None] == cells[rows])
            gaps = np.sign(scores[rows][:, None] - scores[rows])[better]
            values.append(((gaps + 1) / 2).mean())
        assert found is not None
        tail = stats.norm.cdf((30 / 29) ** 0.5 * stats.t.ppf(0.025, 29))
        expected = tuple(np.quantile(values, [tail, 1 - tail]))
        assert (found.low, found.high) == pytest.approx(expected, abs=1e-12)


def test_a_report_by_finer_grades_tells_no_tiers() -> None:
    rng = np.random.default_rng(1)
    grades = rng.normal(size=90)
    about = {"tier_names": "SABC", "image_ids": list(map(str, range(90))), "rounds": 50}
    groups = [str(i // 3) for i in range(90)]
    report = evaluate(
        grades + rng.normal(size=90), None, tier_scores=grades, groups=groups, **about
    )
    assert report.n_pairs == 90 * 89 // 2 and report.kendall_tau_b == pytest.approx(
        2 * report.pairwise_accuracy - 1
    )
    assert report.tier_names == () and report.by_quota is None
    mistake = report.worst_mistakes(1).iloc[0]
    assert float(mistake.better_tier) > float(mistake.worse_tier)
    assert "tier_score" in report.to_table(3) and len(report.groups) == 30
    with pytest.raises(DataError, match="no pair of different tier_score"):
        evaluate(grades, None, tier_scores=[1.0] * 90, **about)
    with pytest.raises(DataError, match="not finite"):
        evaluate(grades, None, tier_scores=[None, *grades[1:]], **about)
