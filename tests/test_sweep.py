"""Sweeps: the words of a grid, cells that are kept, and figures against plain loops."""

from __future__ import annotations

import csv
import itertools
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import yaml
from forked import start, wait_for
from mirip_fast_cli.main import run
from test_cli import TINY, make_data

from mirip_fast.config import Config
from mirip_fast.errors import ConfigError, TrainingError
from mirip_fast.evaluation.metrics import PairCounter
from mirip_fast.ranking.sweep import cell_text, compare_cells, configure, make_cells

SWEEP = ["sweep", "--grid", "learning_rate=3e-4,1e-2", "--grid", "features=cls,cls+mean",
         "--epochs", "2", "--batch-size", "8", "--folds", "2"]  # fmt: skip


def test_a_grid_is_every_combination_after_the_settings_as_they_are() -> None:
    grid = ["learning_rate=1e-4,3e-4", "head.features=cls,cls+mean", "dropout=0,0.1"]
    cells = make_cells(grid, None, 0)
    assert cells[0] == {} and len(cells) == 9
    assert cells[1] == {
        "train.learning_rate": 1e-4, "head.features": "cls", "head.projector_dropout": 0.0,
    }  # fmt: skip
    assert len({cell_text(cell) for cell in cells}) == 9
    config = configure(Config(), cells[-1])
    assert (config.train.learning_rate, config.head.features) == (3e-4, "cls+mean")
    assert Config().train.learning_rate is None, "the settings as they were stay as they are"


def test_random_cells_are_drawn_from_lists_and_ranges() -> None:
    grid = ["learning_rate=1e-5..1e-2", "dropout=0..0.5", "loss=margin,logistic",
            "score_hidden_dim=16..128"]  # fmt: skip
    cells = make_cells(grid, 300, 3)[1:]
    assert len(cells) == 300 and make_cells(grid, 300, 3)[1:] == cells
    rates = np.log10([cell["train.learning_rate"] for cell in cells])
    assert rates.min() >= -5 and rates.max() <= -2
    assert abs(rates.mean() + 3.5) < 0.15, "evenly in the logarithm"
    drops = np.array([cell["head.projector_dropout"] for cell in cells])
    assert drops.min() >= 0 and drops.max() <= 0.5 and abs(drops.mean() - 0.25) < 0.03
    widths = [cell["head.score_hidden_dim"] for cell in cells]
    assert all(isinstance(width, int) for width in widths) and 16 <= min(widths) <= max(widths)
    assert {cell["train.loss"] for cell in cells} == {"margin", "logistic"}
    few = make_cells(["loss=margin,logistic", "margin=0.5,1"], 3, 0)
    assert len({cell_text(cell) for cell in few}) == 4, "no cell twice"
    assert len(make_cells(["margin=0.5,1"], 50, 0)) == 3, "the whole grid is enough"


@pytest.mark.parametrize(
    ("specs", "random", "words"),
    [
        (["learnin_rate=1"], None, "Did you mean 'learning_rate'"),
        (["seed=1,2"], None, "--seeds N"),
        (["loss=hinge"], None, "hinge"),
        (["loss"], None, "setting=value"),
        (["loss=a..b"], None, "has no range"),
        (["dropout=0.5..0.1"], None, "no range from a smaller number"),
        (["dropout=0..0.5"], None, "--random N"),
        (["loss=margin", "train.loss=logistic"], None, "there twice"),
        ([], None, "Say what to vary"),
        (["output_dir=a"], None, "no setting 'output_dir'"),
        (["margin=" + ",".join(map(str, range(100))), "batch_size=" + ",".join(map(str, range(2, 90)))],
         None, "draw some of them"),
    ],
)  # fmt: skip
def test_what_a_grid_can_not_be_is_told(specs: list[str], random: int | None, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_cells(specs, random, 0)


def accuracy(
    scores: np.ndarray, tiers: np.ndarray, fold_of: np.ndarray, times: np.ndarray
) -> float:
    """Mean over the pairs inside a fold, seed by seed, images counted ``times`` times: a plain loop."""
    right = pairs = 0.0
    for of_seed in scores:
        for i in range(len(times)):
            for j in range(len(times)):
                if tiers[i] < tiers[j] and fold_of[i] == fold_of[j]:
                    weight = times[i] * times[j]
                    gap = of_seed[i] - of_seed[j]
                    right += weight * (1.0 if gap > 0 else 0.5 if gap == 0 else 0.0)
                    pairs += weight
    return right / pairs


def test_figures_and_intervals_against_plain_loops() -> None:
    rng = np.random.default_rng(0)
    n, seeds = 24, 2
    tiers = rng.integers(3, size=n)
    groups = [str(i // 2) for i in range(n)]
    fold_of = np.arange(n) // 2 % 3
    fits = [
        ((rng.standard_normal((seeds, n)) - strength * tiers).astype(np.float32), np.ones((seeds, 3), np.int64))
        for strength in (0.3, 1.5, 0.0)
    ]  # fmt: skip
    fits.append((np.full((seeds, n), np.nan, np.float32), np.ones((seeds, 3), np.int64)))
    cells = [{}, {"train.margin": 1.0}, {"train.margin": 2.0}, {"train.margin": 3.0}]
    table, text = compare_cells(cells, fits, tiers, fold_of, groups, rounds=300)
    once = np.ones(n)
    plain = [accuracy(scores, tiers, fold_of, once) for scores, _ in fits[:3]]
    assert table["cell"].tolist() == sorted(range(3), key=lambda i: -plain[i])
    assert "Not finite, left out: margin=3" in text and "6 heads" in text and "12 groups" in text
    draws = []
    for _ in range(300):
        drawn = np.bincount(rng.integers(12, size=12), minlength=12)
        times = drawn[np.arange(n) // 2]
        draws.append([accuracy(fits[i][0], tiers, fold_of, times) for i in (0, 1)])
    drawn_accuracies = np.array(draws)
    for row in table.itertuples():
        assert row.accuracy == pytest.approx(plain[row.cell])
        assert row.difference == pytest.approx(plain[row.cell] - plain[0])
    row = table[table["cell"] == 1].iloc[0]
    low, high = np.quantile(drawn_accuracies[:, 1], [0.025, 0.975])
    assert row["accuracy_low"] == pytest.approx(low, abs=0.05)
    assert row["accuracy_high"] == pytest.approx(high, abs=0.05)
    low, high = np.quantile(drawn_accuracies[:, 1] - drawn_accuracies[:, 0], [0.025, 0.975])
    assert row["difference_low"] == pytest.approx(low, abs=0.07)
    assert row["difference_high"] == pytest.approx(high, abs=0.07)


def test_pairs_of_several_graders_are_those_inside_one() -> None:
    rng = np.random.default_rng(2)
    quality, fold_of = rng.random(60), np.arange(60) % 3
    grades = np.floor(2.99 * (1 - quality))[:, None] + [0.0, 2.0]  # mild, strict
    grades[np.arange(60), rng.integers(2, size=60)] = np.nan  # everyone graded by one
    tiers = np.nanmax(grades, axis=1).astype(np.int64)
    epochs = np.ones((2, 3), np.int64)
    fits = [(np.tile(s, (2, 1)).astype(np.float32), epochs) for s in (quality, rng.random(60))]
    cells, groups = [{}, {"train.margin": 1.0}], [str(i) for i in range(60)]
    table, _ = compare_cells(cells, fits, tiers, fold_of, groups, grades=grades, rounds=50)
    right = pairs = 0.0
    for g, fold in itertools.product(range(2), range(3)):
        rows = np.flatnonzero(np.isfinite(grades[:, g]) & (fold_of == fold))
        counter = PairCounter(fits[1][0][0, rows], grades[rows, g].astype(np.int64))
        right, pairs = (a + b.sum() for a, b in zip((right, pairs), counter.table(), strict=True))
    assert table["accuracy"].tolist() == pytest.approx([1.0, right / pairs])
    assert table["difference"].iloc[1] == pytest.approx(right / pairs - 1)
    assert table["accuracy_low"].iloc[1] < right / pairs < table["accuracy_high"].iloc[1]


def test_the_winner_of_pure_chance_is_told_to_be_flattered() -> None:
    rng = np.random.default_rng(1)
    n = 200
    tiers, epochs = rng.integers(4, size=n), np.ones((1, 5), np.int64)
    fits = [(rng.standard_normal((1, n)).astype(np.float32), epochs) for _ in range(40)]
    cells = [{}, *({"train.margin": float(i)} for i in range(1, 40))]
    groups = [str(i) for i in range(n)]
    table, text = compare_cells(cells, fits, tiers, np.arange(n) % 5, groups, rounds=50)
    honest = float(text.split("the best cell has ")[1][:6])
    assert table["accuracy"].iloc[0] > 0.53 and abs(honest - 0.5) < 0.04
    assert "flatters it" in text


def test_nothing_to_compare_with_is_told() -> None:
    lost = (np.full((1, 2), np.nan, np.float32), np.ones((1, 1), np.int64))
    with pytest.raises(TrainingError, match="cell 0"):
        compare_cells([{}], [lost], np.array([0, 1]), np.zeros(2, np.int64), ["a", "b"])


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_data(folder / "data", 48)
        assert run(["embed", "data", *TINY]) == 0
    return folder


@pytest.fixture
def work(embedded: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(embedded)
    for name in ("runs", "whole", "killed", "process"):
        shutil.rmtree(embedded / name, ignore_errors=True)
    return embedded


def only(folder: Path) -> Path:
    (found,) = folder.iterdir()
    return found


def test_a_sweep_from_end_to_end(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run([*SWEEP, "--seeds", "2"]) == 0
    told = capfd.readouterr()
    assert "4 cells besides the settings as they are" in told.err
    assert "(as configured)" in told.out and "best.yaml" in told.out
    folder = only(work / "runs")
    with (folder / "sweep.csv").open(encoding="utf-8-sig", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert sorted(int(row["cell"]) for row in rows) == list(range(5))
    accuracies = [float(row["accuracy"]) for row in rows]
    assert accuracies == sorted(accuracies, reverse=True)
    best = yaml.safe_load((folder / "best.yaml").read_text())
    assert set(best) == {"head", "train"} and best["train"]["epochs"] == 2
    assert {"learning_rate", "batch_size"} <= set(best["train"])
    text = " ".join(f"{k}={v}" for k, v in {**best["train"], **best["head"]}.items())
    if rows[0]["settings"] != "(as configured)":
        for word in rows[0]["settings"].split():
            name, _, value = word.partition("=")
            assert name in text and str(value)[:4] in text
    # A sweep is no run: there is no model in it.
    assert run(["evaluate"]) == 1 and run(["train", "--head-only", "--resume", "latest"]) == 1
    assert run(["train", "--head-only", "--config", str(folder / "best.yaml")]) == 0
    with (folder / "split.csv").open(encoding="utf-8-sig", newline="") as stream:
        assert {row["split"] for row in csv.DictReader(stream)} == {"train", "val"}


def tables(folder: Path) -> tuple[str, str]:
    return (folder / "sweep.csv").read_text(), (folder / "best.yaml").read_text()


def test_killed_and_resumed_it_is_the_same(work: Path) -> None:
    assert run([*SWEEP, "--output-dir", "whole"]) == 0
    (process,) = start(lambda: run([*SWEEP, "--output-dir", "killed"]), 1, work / "process")
    wait_for(work / "killed", "*/cells/*.npz")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    killed = only(work / "killed")
    kept = {path: path.stat().st_mtime_ns for path in (killed / "cells").glob("*.npz")}
    assert kept
    # The settings of the first command hold, whatever stands beside --resume.
    resume = ["sweep", "--resume", "latest", "--output-dir", "killed", "--learning-rate", "1"]
    (killed / "cells" / "cell_0099.npz.partial").write_bytes(b"half")
    assert run(resume) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert tables(killed) == tables(only(work / "whole"))
    next(iter(kept)).write_bytes(b"broken")  # is fitted again
    assert run(resume) == 0
    assert tables(killed) == tables(only(work / "whole"))


def test_cells_that_can_not_be_are_left_out(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    grid = ["--grid", "label_smoothing=0,0.1", "--grid", "loss=margin,logistic"]
    assert run(["sweep", *grid, "--epochs", "2", "--folds", "2"]) == 0
    err = capfd.readouterr().err
    assert "Left out: label_smoothing=0.1 loss=margin" in err
    assert "Left out: label_smoothing=0 loss=margin (the same as (as configured))" in err
    assert "2 cells besides" in err
    assert run(["sweep", "--grid", "loss=margin", "--epochs", "2"]) == 1
    assert "no cell is left" in capfd.readouterr().err
    assert run(["sweep", "--resume", "latest", "--output-dir", "nowhere"]) == 1
    assert "there is no sweep" in capfd.readouterr().err
