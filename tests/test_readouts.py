"""Training every readout on the cache, and everything that a run is used for afterwards."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from made_run import rows_of
from mirip_fast_cli.main import run
from mirip_fast_cli.train import warn_of_the_order
from test_cli import TINY, draw, make_data

from mirip_fast.config import Config
from mirip_fast.errors import ConfigError
from mirip_fast.evaluation.metrics import pairwise_accuracy
from mirip_fast.evaluation.report import evaluate
from mirip_fast.models.gp import GaussianProcess
from mirip_fast.ranking.evaluate import pick_model
from mirip_fast.ranking.readouts import choose_readout, left_out_together


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with graded data, a trained run, and works to rank."""
    work = tmp_path_factory.mktemp("gp")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        make_data(work / "data", 60)
        for i in range(5):
            draw(work / "folder" / f"{i}.png", i / 5, 100 + i)
        assert run(["-q", "embed", "data", *TINY, "--patches", "grid:2"]) == 0
        assert run(["-q", "train", "--head-only"]) == 0
        assert run(["-q", "rank", "folder", "--workers", "0", "--out", "first"]) == 0
    return work


@pytest.fixture
def work(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(trained)
    yield trained


def test_tiers_and_intervals_are_there_without_an_option(work: Path) -> None:
    rows = rows_of(work / "first" / "ranking.csv")
    assert [row["file"] for row in rows[:3]] == ["4.png", "3.png", "2.png"] and len(rows) == 5
    for row in rows:
        assert 1 <= int(row["rank_low"]) <= int(row["rank"]) <= int(row["rank_high"]) <= 5
        assert float(row["score_sd"]) > 0
        assert row["tier"] in "SABC" and 0 <= float(row["score_100"]) <= 100
        assert sum(float(row[f"p_{tier}"]) for tier in "SABC") == pytest.approx(1, abs=1e-3)


def test_every_work_that_was_learned_from_has_a_left_out_score(work: Path) -> None:
    (folder,) = (work / "runs").iterdir()
    split = {row["image_id"]: row["split"] for row in rows_of(folder / "split.csv")}
    held_out = rows_of(folder / "held_out.csv")
    assert {row["image_id"] for row in held_out} == {
        name for name, part in split.items() if part != "test"
    }
    assert {row["source"] for row in held_out} == {"left-out groups"}
    tiers = ["SABC".index(row["tier"]) for row in held_out]
    told = json.loads((folder / "run.json").read_text())["left_out_pairwise_accuracy"]
    scores = [float(row["score"]) for row in held_out]
    assert pairwise_accuracy(scores, tiers) == pytest.approx(told) and told > 0.9


@pytest.mark.parametrize("readout", ["gp", "ensemble"])
@pytest.mark.parametrize(
    "command",
    [
        ["evaluate", "--html", "e.html"],
        ["compare", "folder/0.png", "folder/4.png"],
        ["rank", "folder", "--workers", "0", "--tiers", "--html", "r.html"],
        ["explain", "folder/4.png", "--detail", "3"],
        ["audit", "--fail-on", "none"],
    ],
    ids=lambda command: command[0],
)
def test_what_takes_a_model_takes_this_one(
    work: Path, capfd: pytest.CaptureFixture[str], command: list[str], readout: str
) -> None:
    runs = "runs" if readout == "gp" else readout
    if not Path(runs).exists():
        train = ["-q", "train", "--head-only", "--readout", "ensemble", "--epochs", "3"]
        assert run([*train, "--output-dir", runs]) == 0
    (folder,) = Path(runs).iterdir()
    assert run([*command, *([] if command[0] == "audit" else ["--checkpoint", str(folder)])]) == 0
    out = capfd.readouterr().out
    assert "robabilities unknown" not in out and "None" not in out
    if readout == "ensemble":
        held_out = rows_of(folder / "held_out.csv")
        assert len(held_out) == 54 and {row["source"] for row in held_out} == {"out-of-fold"}
        # A process, five heads and five that attend, each kind a third.
        assert len(pick_model(None, Path(runs)).members) == 11


@pytest.mark.parametrize(
    ("train", "export"),
    [
        ([], ["--hf"]),
        ([], ["--head-only", "--out"]),
        (["--folds", "3", "--epochs", "3", "--readout", "attention"], ["--hf"]),
        (["--epochs", "3", "--readout", "ensemble"], ["--hf"]),
    ],
    ids=["gp hf", "gp onnx", "folds hf", "ensemble hf"],
)
def test_an_exported_folder_gives_the_table_of_the_run(
    work: Path, capfd: pytest.CaptureFixture[str], train: list[str], export: list[str]
) -> None:
    """Percentiles, tiers, intervals and win rates; and nothing in it tells who was graded."""
    if "--out" in export:
        pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")
    runs = ["--output-dir", train[-1] if train else "runs"]
    if train and not Path(train[-1]).exists():
        assert run(["-q", "train", "--head-only", *runs, *train]) == 0
    (folder,) = Path(runs[1]).iterdir()
    assert run(["-q", "export", *runs, *export, "share", "--overwrite"]) == 0
    assert not list(
        Path("share").glob("ensemble.*" if not train else "gp.*")
    )  # of the export before
    shutil.rmtree("elsewhere", ignore_errors=True)
    shutil.copytree("share", "elsewhere")
    held = b"".join(path.read_bytes() for path in Path("elsewhere").iterdir())
    names = {row["image_id"] for row in rows_of(folder / "split.csv")}
    assert str(work).encode() not in held and not [n for n in names if n.encode() in held]
    tables = []
    for place, options in (("elsewhere", ["--backbone", "tiny-random"]), (str(folder), [])):
        capfd.readouterr()
        rank = ["rank", "data", "--workers", "0", "--tiers", "--out", "out"]
        assert run([*rank, "--checkpoint", place, *options]) == 0
        tables.append(rows_of(Path("out/ranking.csv")))
        assert "are among those that the model was made with" in capfd.readouterr().out
    assert run(["rank", "data", "--checkpoint", "elsewhere", "--tiers", "--anchors", "3"]) == 1
    assert "--anchors 3: a shared model keeps 10 of each tier" in capfd.readouterr().err
    assert run(["evaluate", "--checkpoint", "elsewhere"]) == 1
    assert "split.csv cannot be read: there is none. A shared model" in capfd.readouterr().err
    assert tables[0] == tables[1] and len(tables[0]) == 60
    assert all(row["rank_low"] != "unknown" and row["wins_S"] for row in tables[0])


def test_auto_says_by_how_much_and_how_surely(
    work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train = ["train", "--head-only", "--output-dir", "best", "--readout", "auto", "--epochs", "2"]
    assert run(train) == 0
    told = capfd.readouterr().err
    points = r"[+-]\d+\.\d points, [+-]\d+\.\d to [+-]\d+\.\d"
    first, others = r"(\w+) \d\.\d{3}", rf"\w+ \d\.\d{{3}} \(difference {points}\)"
    found = re.search(rf"cross-validation: {first}, {others}, {others}: (\w+) is used", told)
    assert found is not None and found[1] == found[2]
    (folder,) = Path("best").iterdir()
    about = json.loads((folder / "run.json").read_text())
    compared = about["compared"]
    assert set(compared) == {"gp", "head", "attention"}
    assert about["readout"] == found[1] == max(compared, key=compared.get)
    assert run(["rank", "folder", "--checkpoint", str(folder), "--workers", "0"]) == 0


def test_an_end_to_end_training_needs_the_head_of_a_run(
    work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    full = ["train", "--full", "--debug", "--init-from"]
    (folder,) = Path("runs").iterdir()
    assert run([*full, str(folder)]) == 1
    assert "a run of --readout gp has no one head to start from" in capfd.readouterr().err
    attention = ["--readout", "attention", "--epochs", "1", "--output-dir", "attends"]
    assert run(["-q", "train", "--head-only", *attention]) == 0
    (folder,) = Path("attends").iterdir()
    assert run([*full, str(folder)]) == 1
    assert "a head that attends to patch tokens" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--readout", "gp", "--grid", "epochs=1,2"], "--readout head or attention"),
        (["--grid", "readout=head,attention"], "`mirip-fast train --head-only --readout auto`"),
        (["--grid", "features=cls,cls+grid2"], "Left out: features=cls+grid2"),
    ],
)
def test_a_sweep_does_not_pass_over_a_readout(
    work: Path, capfd: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    few = ["--folds", "2", "--epochs", "1", "--output-dir", "sweeps"]
    assert run(["sweep", *few, *options]) == ("Left out" not in said)
    assert said in capfd.readouterr().err


def test_a_sweep_heeds_attention(work: Path) -> None:
    few = ["--folds", "2", "--epochs", "1", "--output-dir", "attending"]
    assert run(["-q", "sweep", *few, "--readout", "attention", "--grid", "seed=1"]) == 1
    assert run(["-q", "sweep", *few, "--readout", "attention", "--grid", "dropout=0,0.2"]) == 0
    (folder,) = Path("attending").iterdir()
    assert "readout: attention" in (folder / "best.yaml").read_text()
    assert json.loads((folder / "sweep.json").read_text())["config"]["head"]["features"] == (
        "cls+mean+grid2"
    )


def test_attention_without_patch_tokens_says_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_data(tmp_path / "data", 40)
    assert run(["-q", "embed", "data", *TINY]) == 0
    train = ["train", "--head-only", "--epochs", "2", "--readout"]
    assert run([*train, "attention"]) == 1
    told = capfd.readouterr().err
    assert "there are only cls, mean" in told
    again = "mirip-fast embed data/metadata.csv --backbone tiny-random --image-size 28"
    assert f"{again} --patches grid:7" in told
    assert run([*train, "head", "--features", "cls+grid2"]) == 1
    assert "patch tokens go with --readout attention" in capfd.readouterr().err


def test_a_setting_that_only_a_head_heeds_gives_a_head(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = Config()
    assert choose_readout(config) == "gp"
    config.train.epochs = 5
    with caplog.at_level("INFO", "mirip_fast"):
        assert choose_readout(config) == "head"
    assert "--epochs" in caplog.text
    config.head.readout = "gp"
    with pytest.raises(ConfigError, match="--epochs: of no use with --readout gp"):
        choose_readout(config)
    config = Config()
    config.evaluate.within = "department"
    assert choose_readout(config) == "head"
    config.head.readout = "auto"
    with pytest.raises(ConfigError, match="--within: of no use with --readout auto"):
        choose_readout(config)
    config = Config()
    config.head.readout, config.train.pairs = "auto", "pairs.csv"
    with pytest.raises(ConfigError, match="with --pairs FILE.csv use gp, head or attention"):
        choose_readout(config, listed=True)


def test_a_group_of_most_works_is_left_out_in_parts(caplog: pytest.LogCaptureFixture) -> None:
    groups = ["big"] * 70 + ["small"] * 5 + [None] * 25
    parts = left_out_together(groups, 0)
    assert parts[70:] == groups[70:]
    assert sorted(parts[:70].count(name) for name in set(parts[:70])) == [17, 17, 18, 18]
    assert "'big' holds 70 of 100 works" in caplog.text
    assert left_out_together(groups[65:], 0)[5:] == groups[70:]


def test_used_blocks_alone_score_the_same() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(90, 12))
    process = GaussianProcess.fit(rows, rows[:, 9], blocks=[4, 4, 4])
    used = process.used
    assert used[2] and not used.all()
    kept = rows[:, np.repeat(used, 4)]
    np.testing.assert_allclose(process.of_used().score(kept), process.score(rows), rtol=1e-12)
    np.testing.assert_allclose(process.of_used().spread(kept), process.spread(rows), rtol=1e-12)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Works in folders named for tiers that embed was not told of, and a run of them."""
    work = tmp_path_factory.mktemp("order")
    for i in range(45):
        draw(work / "data" / ("gold", "silver", "bronze")[i % 3] / f"{i}.png", 1 - (i % 3) / 2, i)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        assert run(["-q", "embed", "data", *TINY]) == 0
    return work


def test_the_order_of_the_tiers_can_be_given_when_training(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folders)
    assert run(["train", "--head-only"]) == 1  # nothing graded was embedded
    for order in ("gold,silver,bronze", "bronze,silver,gold"):
        assert run(["train", "--head-only", "--tiers", order, "--name", order[0]]) == 0
        (folder,) = (folders / "runs").glob(f"*-{order[0]}")
        assert {row["tier"] for row in rows_of(folder / "split.csv")} == set(order.split(","))
        assert run(["evaluate", str(folder)]) == 0
        told = json.loads((folder / "evaluation_test.json").read_text())
        assert told["tier_names"] == order.split(",") and told["pairwise_accuracy"] > 0.9
        assert run(["rank", "data", "--checkpoint", str(folder), "--workers", "0", "--tiers"]) == 0
        rows = rows_of(folders / "ranking.csv")
        assert rows[0]["file"].startswith(order.split(",")[0])
        assert {row["tier"] for row in rows} == set(order.split(","))
    capfd.readouterr()
    for wrong, said in (
        (["--tiers", "gold,tin"], "images without grades"),
        (["--id-column", "x"], "--id-column: of no use with --head-only"),
        (
            ["--resume", "latest", "--tiers", "gold,silver,bronze"],
            "--tiers: of no use with --resume",
        ),
    ):
        assert run(["train", "--head-only", *wrong]) == 1
        assert said in capfd.readouterr().err


def test_grades_of_a_source_that_is_gone_take_another_order_too(
    folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folders / "data", "data")
    assert run(["embed", "data", "--tiers", "bronze,silver,gold", *TINY]) == 0
    shutil.rmtree("data")
    assert run(["train", "--head-only", "--tiers", "gold,silver,bronze"]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    (first, *_) = rows_of(folder / "split.csv")
    assert Path(first["file"]).parent.name == first["tier"]
    assert json.loads((folder / "anchors.json").read_text())["anchors"][0]["tier"] == "gold"
    capfd.readouterr()
    assert run(["train", "--head-only", "--tiers", "gold,silver"]) == 1
    assert "the grades kept in the cache have bronze, too" in capfd.readouterr().err


def test_an_accuracy_wholly_below_chance_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    tiers = np.arange(60) % 3
    for scores, told in ((tiers, True), (-tiers, False), (np.zeros(60), False)):
        report = evaluate(
            scores.astype(float),
            tiers,
            tier_names="SAB",
            image_ids=list(map(str, range(60))),
            rounds=50,
        )
        warn_of_the_order(report)
        said = capfd.readouterr().err
        assert ("--tiers S,A,B may be the wrong way round" in said) == told
        assert ("type: mirip-fast train --head-only --tiers B,A,S" in said) == told
    swapped = np.choose(tiers, [3.0, 1.0, 2.0])  # the model finds B better than A
    report = evaluate(
        swapped, tiers, tier_names="SAB", image_ids=list(map(str, range(60))), rounds=50
    )
    warn_of_the_order(report)
    assert "Is 'B' better than 'A'? Then type: mirip-fast train --head-only --tiers S,B,A\n" in (
        capfd.readouterr().err
    )
