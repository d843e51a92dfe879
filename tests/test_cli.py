"""The commands as a user types them: the main job, and what is said when something is wrong."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from forked import signalled, start, wait_for
from made_run import TINY, draw, make_data, rows_of
from mirip_fast_cli.main import COMMANDS, run
from PIL import Image

from mirip_fast.features.store import FeatureStore
from mirip_fast.files import list_files
from mirip_fast.ranking.evaluate import pick_model

__all__ = ["TINY", "draw", "make_data"]  # for the other tests


def test_the_main_job(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_data(work / "data")
    assert run(["embed", "data", *TINY]) == 0
    assert run(["train", "--head-only", "--epochs", "6"]) == 0
    out, err = capfd.readouterr()
    assert "40 images = 40 embedded + 0 already there + 0 duplicates + 0 failed" in out
    assert "UNTRAINED" in err and "data/metadata.csv" in err
    (run_folder,) = (work / "runs").iterdir()
    made = {path.name for path in run_folder.iterdir()}
    assert made >= {
        "config.yaml", "split.csv", "train.log", "history.csv", "learning_curves.png", "best_model.pt",
        "last_model.pt", "checkpoint_epoch_5.pt", "head.safetensors", "run.json",
    }  # fmt: skip

    for i in range(5):
        draw(work / "folder" / "sub" / f"작품 {i} 🎨.png", i / 5, 100 + i)
    assert run(["rank", "folder", "--workers", "0"]) == 0
    assert f"Model {run_folder.relative_to(work)}/best_model.pt" in capfd.readouterr().err
    works = json.loads((work / "ranking.json").read_text(encoding="utf-8"))["works"]
    assert [w["rank"] for w in works] == [1, 2, 3, 4, 5]
    assert {w["file"] for w in works} == {f"sub/작품 {i} 🎨.png" for i in range(5)}
    rows = rows_of(work / "ranking.csv")
    assert [row["file"] for row in rows] == [w["file"] for w in works]
    assert {row["view_spread"] for row in rows} == {"unknown"}  # a single view

    assert run(["evaluate"]) == 0
    assert "pairwise accuracy" in capfd.readouterr().out
    report = json.loads((run_folder / "evaluation_test.json").read_text(encoding="utf-8"))
    assert 0 <= report["pairwise_accuracy"] <= 1

    first, second = (work / "folder" / works[i]["file"] for i in (0, 4))
    assert run(["compare", str(second), str(first)]) == 0
    assert f"Winner: {first}" in capfd.readouterr().out

    # A spreadsheet program shows Korean names of all these files as they are; epochs have no names.
    tables = [path for path in work.rglob("*.csv") if path.name != "history.csv"]
    assert {path.name for path in tables} >= {"ranking.csv", "failures.csv", "split.csv"}
    assert all(path.read_bytes().startswith(codecs.BOM_UTF8) for path in tables)

    # A second run computes nothing, wherever the works lie now.
    (work / "data").rename(work / "moved")
    for path in (work / "moved" / "images").iterdir():
        os.utime(path, (1, 1))
    assert run(["embed", "moved", *TINY]) == 0
    assert "0 embedded + 40 already there" in capfd.readouterr().out
    draw(work / "moved" / "images" / "work_01.png", 0.5, 999)
    assert run(["embed", "moved", *TINY]) == 0
    assert "1 embedded + 39 already there" in capfd.readouterr().out


def test_what_is_not_embedded_is_told_on_the_screen_and_in_a_table(
    work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (work / "data").mkdir()
    for i in range(3):
        (work / "data" / f"{i}.png").write_text(f"no picture {i}")
    (work / "data" / "empty.jpg").touch()
    assert run(["embed", "data", *TINY]) == 1  # nothing could be read
    err = capfd.readouterr().err
    assert "Not embedded: 3 images: not a picture in a known format" in err
    assert "data/empty.jpg: the file is empty" in err
    draw(work / "data" / "good.png", 0.5, 1)
    Image.new("RGB", (40, 30), "white").save(work / "data" / "white.png")
    Image.new("RGBA", (40, 30)).save(work / "data" / "clear.png")
    noise = np.random.default_rng(0).integers(0, 255, (1000, 1010), np.uint8)
    Image.fromarray(noise).save(work / "data" / "large.png", compress_level=1)
    assert run(["embed", "data", "--max-megapixels", "1", *TINY]) == 0
    out, err = capfd.readouterr()
    assert "8 images = 3 embedded + 0 already there + 0 duplicates + 5 failed" in out
    assert "2 pictures are of a single colour: data/clear.png, data/white.png" in err
    (failures,) = (work / "cache").glob("*/datasets/*/failures.csv")
    reasons = {Path(row["path"]).name: row["reason"] for row in rows_of(failures)}
    assert len(reasons) == 5 and all(reasons.values())
    told = "1010 x 1000 pixels is over the limit of 1 megapixels; --max-megapixels"
    assert told in reasons["large.png"]
    assert run(["embed", "data", "--strict", *TINY]) == 1
    out, err = capfd.readouterr()
    assert "8 images = 1 embedded + 3 already there" in out and "colour" not in err


def test_training_leaves_out_broken_and_missing_images(
    headed: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    metadata = headed / "data" / "metadata.csv"
    graded = metadata.read_text(encoding="utf-8-sig")
    (headed / "data" / "images" / "work_01.png").write_text("no picture")
    metadata.write_text(graded + "id99,absent.png,S,회화\n")
    assert run(["embed", "data", *TINY]) == 0
    (headed / "data" / "images" / "work_02.png").unlink()  # its features are still there
    assert run(["train", "--head-only", "--epochs", "1"]) == 0
    err = capfd.readouterr().err
    assert "absent.png" in err and "2 of 41 images could not be embedded and are left out" in err
    assert "2 of 41 image files are not there" in err


def test_grades_are_read_when_training(headed: Path, capfd: pytest.CaptureFixture[str]) -> None:
    metadata = headed / "data" / "metadata.csv"
    text = metadata.read_text(encoding="utf-8-sig")
    text = text.replace("id00,그림 00.png,S", "id00,그림 00.png,C")
    metadata.write_text(text.replace("id01,work_01.png,A", "id01,work_01.png,"))
    assert run(["train", "--head-only", "--epochs", "1", "--output-dir", "new"]) == 0
    assert "39 of 40 works have a grade; the others (first: row 3" in capfd.readouterr().err
    (split,) = Path("new").glob("*/split.csv")
    tiers = {row["image_id"]: row["tier"] for row in rows_of(split)}
    assert tiers["id00"] == "C" and "id01" not in tiers
    draw(headed / "data" / "images" / "new.png", 0.5, 7)
    metadata.write_text(text + "id77,new.png,S,회화\n")
    assert run(["train", "--head-only"]) == 1
    assert "1 of 41 images" in (err := capfd.readouterr().err) and "mirip-fast embed" in err
    # To ranking, grades do not matter.
    metadata.write_text(text.replace(",S,", ",unheard of,"))
    assert run(["rank", "data"]) == 0
    assert len(json.loads(Path("ranking.json").read_text())["works"]) == 40


def test_given_splits_and_a_lost_cache(
    headed: Path, capfd: pytest.CaptureFixture[str], decoded_elsewhere: Callable[[], None]
) -> None:
    assert run(["split", "data", "--seed", "7"]) == 0
    names = ("train", "val", "test")
    flags = zip(("--metadata", "--val-metadata", "--test-metadata"), names, strict=True)
    given = [word for flag, name in flags for word in (flag, f"data/{name}_metadata.csv")]
    assert run(["train", "--head-only", "--epochs", "2", "--output-dir", "new", *given]) == 0
    (split,) = Path("new").glob("*/split.csv")
    used = {row["image_id"]: row["split"] for row in rows_of(split)}
    for name in names:
        listed = {row["image_id"] for row in rows_of(Path(f"data/{name}_metadata.csv"))}
        assert listed == {key for key, value in used.items() if value == name}
    assert run(["split", "data", "--out", "parts"]) == 0  # elsewhere: usable as it is, too
    shutil.rmtree("cache")
    decoded_elsewhere()
    capfd.readouterr()
    assert run(["evaluate"]) == 0
    assert "they are computed" in capfd.readouterr().err
    assert run(["evaluate", "--test-data", "parts/test_metadata.csv"]) == 0
    shutil.rmtree("cache")
    test = ["--test-data", "data/test_metadata.csv", "--image-dir", "data/images"]
    assert run(["evaluate", *test]) == 0


def test_within_and_sampled_pairs_and_views(work: Path) -> None:
    make_data(work / "data")
    assert run(["embed", "data", "--tta", "full", "--patches", "grid:2", *TINY]) == 0
    assert run(["train", "--head-only", "--epochs", "2", "--within", "department"]) == 0
    assert run(["evaluate", "--within", "department"]) == 0
    assert run(["train", "--head-only", "--epochs", "2", "--pairs", "sampled"]) == 0
    assert run(["embed", "data", "--tta", "full", *TINY]) == 0
    assert run(["train", "--head-only", "--epochs", "2", "--features", "cls+mean"]) == 0
    assert run(["rank", "data/images", "--out", "out"]) == 0
    model = pick_model(None, Path("runs"))
    assert len(model.info.views) > 1
    store = FeatureStore.open(Path("cache") / model.info.fingerprint_id)
    for row in rows_of(Path("out/ranking.csv")):
        sha = hashlib.sha256(Path("data/images", row["file"]).read_bytes()).digest()
        by_view = model.score_views(store, [sha])[0].tolist()
        assert float(row["score"]) == pytest.approx(statistics.mean(by_view), abs=1e-4)
        assert float(row["view_spread"]) == pytest.approx(statistics.stdev(by_view), abs=1e-4)
    assert run(["cache", "verify"]) == 0
    assert run(["cache", "info"]) == 0


def test_a_cache_of_an_earlier_version_tells_what_it_lacks(
    work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_data(work / "data")
    assert run(["embed", "data", "--patches", "grid:2", *TINY]) == 0
    (ledger,) = (work / "cache").glob("*/datasets/*/dataset.json")
    info = json.loads(ledger.read_text())
    del info["embed"]["layers"]
    info["kinds"] = ["cls", "grid2"]
    ledger.write_text(json.dumps(info))
    ledger.with_name("files.json").unlink()
    capfd.readouterr()
    assert run(["train", "--head-only"]) == 0
    assert (
        "without the mean of the patches and the middle blocks, from which a model learns more. To add them: "
        "mirip-fast embed data/metadata.csv --backbone tiny-random --image-size 28 --patches grid:2"
    ) in capfd.readouterr().err
    assert run(["train", "--head-only", "--features", "cls"]) == 0  # as asked
    assert "An earlier version" not in capfd.readouterr().err


def test_the_project_file_and_precedence(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (work / "mirip.yaml").write_text(
        "embed:\n  backbone: tiny-random\n  image_size: 28\n  workers: 0\n"
    )
    make_data(work / "data")
    assert run(["embed", "data"]) == 0
    assert "28 × 28" in capfd.readouterr().err
    assert run(["embed", "data", "--image-size", "42"]) == 0
    assert "42 × 42" in capfd.readouterr().err
    (work / "mirip.yaml").write_text("train:\n  epocs: 3\n  learning_rate: fast\n")
    assert run(["train", "--head-only"]) == 1
    err = capfd.readouterr().err
    assert "Unknown key 'train.epocs'. Did you mean 'train.epochs'?" in err
    assert "train.learning_rate: 'fast'" in err


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["embed", "nowhere"], "nowhere"),
        (["embed", "empty"], "no images"),
        (["embed", "data", "--backbone", "nobody/nothing"], "--backbone DIR"),
        (["embed", "data", "--backbone", "./nothing"], "no such folder"),
        (["embed", "data", *TINY, "--image-size", "5"], "smaller than one patch"),
        (["embed", "data", *TINY, "--patches", "grid:x"], "grid:K"),
        (["embed", "data", *TINY, "--patches", "grid:99"], "largest is grid:2"),
        (["embed", "data", *TINY, "--device", "cuda:99"], "this machine has"),
        (["train"], "--head-only"),
        (["train", "--head-only"], "mirip-fast embed data/"),
        (["train", "--head-only", "--data", "data"], "mirip-fast embed data"),
        (["train", "--head-only", "--resume", "latest"], "last_model.pt"),
        (["train", "--head-only", "--report-to", "nobody"], "wandb"),
        (["rank", "data"], "mirip-fast train --head-only"),
        (["rank", "data", "--checkpoint", "absent.pt"], "absent.pt"),
        (["rank", "data", "--checkpoint", "data/metadata.csv"], "no checkpoint"),
        (["evaluate"], "mirip-fast train"),
        (["compare", "a.png", "b.png"], "mirip-fast train"),
        (["cache", "info"], "mirip-fast embed"),
        (["split", "images"], "no grades"),
        # What cannot both count.
        (["embed", "none", "--tiers", "A,B", "--tiers=C,D"], "--tiers is given 2 times: the last value counts, C,D"),
        (["train", "--full", "--data", "a", "--data-dir", "b"], "given 2 times: the last value counts, b"),
        (["cache", "info", "--cache-dir", "a", "--cache-dir", "b"], "--cache-dir is given 2 times"),
        (["train", "--head-only", "--compile", "--no-compile"], "--compile and --no-compile are given"),
        (["train", "--full", "a", "--data", "b"], "Two data sets: a and --data b"),
        (["evaluate", "a", "--checkpoint", "b"], "Two models: a and --checkpoint b"),
        (["evaluate", "--image-dir", "a"], "--test-data"),
        (["evaluate", "--test-data", "a", "--split", "val"], "give one"),
        # What was mistyped.
        (["rnak", "x"], "Did you mean 'rank'?"),
        (["nothing-like-it"], "There are: embed, audit"),
        (["rank", "new", "folder"], "in quotes: 'new folder'"),
        (["embed", "new", "folder"], "in quotes: 'new folder'"),
        (["evaluate", "runs/nosuch"], "runs/nosuch: there is no such run"),
        (["rank", "new folder", "--html", "report.pdf"], "write it to report.html"),
        (["evaluate", "--html", "report.docx"], "write it to report.html"),
        # A pipe in the place of a file, which is not waited for.
        (["embed", "pipe.csv"], "no regular file"),
        (["embed", "pipe.tar"], "no regular file"),
        (["embed", "images", "--export", "pipe.h5", *TINY], "no HDF5 file"),
        (["rank", "images", "--config", "pipe.yaml"], "no file"),
    ],
)  # fmt: skip
def test_mistakes_are_told(
    work: Path, capfd: pytest.CaptureFixture[str], typed: list[str], said: str
) -> None:
    make_data(work / "data", 4)
    draw(work / "images" / "one.png", 0.5, 1)
    for folder in ("empty", "new folder"):
        (work / folder).mkdir()
    for ending in ("csv", "tar", "h5", "yaml"):
        os.mkfifo(f"pipe.{ending}")
    assert run(typed) in (1, 2)
    err = capfd.readouterr().err
    assert said in err and "Traceback" not in err and "fault of mirip-fast" not in err
    assert err.count("the last value counts") <= 1  # however often the command ran before


def test_one_picture_with_two_grades_is_told(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_data(work / "data", 16)
    shutil.copyfile(work / "data/images/work_01.png", work / "data/images/copy.png")
    with (work / "data" / "metadata.csv").open("a", encoding="utf-8") as stream:
        stream.write("id99,copy.png,C,x\n")
    assert run(["split", "data", "--out", "parts"]) == 0
    assert (
        "1 picture is in more than one tier (first: 'id01' in A, 'id99' in C)"
        in capfd.readouterr().err
    )
    assert run(["split", "data", "--out", "data/metadata.csv"]) == 2
    assert "is a file" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("image_id,filename\na,work_01.png\n", "no grades"),
        ("image_id,file,tier\na,work_01.png,S\n", "the column 'file' names the pictures"),
        ("image_id,filename,tier\na,work_01.png,S\nb,work_02.png,S\n", "at least two tiers"),
        ("image_id,filename,tier\na,work_01.png,S\nb,work_02.png,A\n", "has one image"),
        ("image_id,filename,tier\na,work_01.png,S\na,work_01.png,A\n", "metadata.csv:3"),
        ("image_id,filename,tier\na,work_01.png,X\n", "'X'"),
        ("", "empty"),
    ],
)
def test_faulty_grades_are_told(
    work: Path, capfd: pytest.CaptureFixture[str], content: str, said: str
) -> None:
    make_data(work / "data", 4)
    (work / "data" / "metadata.csv").write_text(content)
    embedded = run(["embed", "data", *TINY])
    assert embedded or run(["train", "--head-only"]) == 1
    err = capfd.readouterr().err
    assert said in err and "Traceback" not in err and "fault of mirip-fast" not in err


@pytest.mark.parametrize(
    ("stopped_in", "options", "said"),
    [
        ("mirip_fast.ranking.readouts.GaussianProcess.fit", [], "the same command begins it again"),
        ("mirip_fast.ranking.train.HeadFit.run", ["--epochs", "2"], "the same command begins it again"),
        ("mirip_fast.ranking.train.finish_run", ["--epochs", "2"], "--resume latest` goes on from there"),
    ],
)  # fmt: skip
def test_ctrl_c_tells_what_there_is_to_go_on_from(
    headed: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    stopped_in: str, options: list[str], said: str,
) -> None:  # fmt: skip
    """`--resume latest` would be refused, or take up another run, where this one has no checkpoint."""

    # There is an older run with one.
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stopped_in, stop)
    capfd.readouterr()
    assert run(["train", "--head-only", *options]) == 130
    assert said in capfd.readouterr().err


def test_ctrl_c_keeps_what_was_committed(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for i in range(150):
        draw(work / "data" / f"{i:02d}.png", 0.5, i)
    embed = ["embed", "data", *TINY, "--batch-size", "1"]
    (process,) = start(lambda: run(embed), 1, work / "process")
    wait_for(work / "cache", "*/cls.*.h5")
    os.kill(process.pid, signal.SIGINT)
    code, _, err = process.wait()
    assert code == 130 and "Traceback" not in err and "goes on from there" in err
    told = re.search(
        r"150 images = (\d+) embedded \+ 0 already there \+ 0 duplicates \+ 0 failed \+ (\d+) left",
        err,
    )
    assert told is not None, err
    committed, left = int(told[1]), int(told[2])
    assert committed > 0 and committed + left == 150
    assert run(["embed", "data", *TINY]) == 0
    again = f"150 images = {left} embedded + {committed} already there + 0 duplicates + 0 failed"
    assert again in capfd.readouterr().out


def test_an_export_that_fails_does_not_hide_what_was_embedded(
    work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (work / "data").mkdir()
    for i in range(3):
        (work / "data" / f"{i}.png").write_bytes(b"no picture %d" % i)
    assert run(["embed", "data", *TINY, "--export", "features.h5"]) == 1
    out, err = capfd.readouterr()
    assert "3 images = 0 embedded + 0 already there + 0 duplicates + 3 failed" in out
    assert "Failures: " in out and "no image has features" in err
    draw(work / "data" / "good.png", 0.5, 1)
    assert run(["embed", "data", *TINY, "--export", "features.h5"]) == 0
    assert "Exported: features.h5 (1 images)" in capfd.readouterr().out


def test_a_training_that_is_stopped_says_how_to_go_on(headed: Path) -> None:
    shutil.rmtree("runs")
    train = ["train", "--head-only", "--epochs", "50", "--early-stopping-patience", "0"]
    code, _, err = signalled(lambda: run(train), headed / "process", signal.SIGINT, 2)
    assert code == 130 and "--resume latest" in err and "Traceback" not in err
    (info,) = Path("runs").glob("*/run.json")
    assert json.loads(info.read_text())["status"] == "interrupted"


def test_features_that_a_model_does_not_know(
    headed: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def change_fingerprint(**fields: object) -> None:
        (path,) = Path("runs").glob("*/best_model.pt")
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["model"]["fingerprint"].update(fields)
        torch.save(checkpoint, path)
        list_files(path.parent)  # nothing is damaged here: it is another model

    change_fingerprint(precision="bf16")
    assert run(["rank", "data"]) == 0
    assert "trained on bf16 features; this machine computes in fp32" in capfd.readouterr().err
    change_fingerprint(backbone="other", resize="pad")
    assert run(["rank", "data"]) == 1
    err = capfd.readouterr().err
    assert "backbone: other ≠" in err and "resize: pad ≠ squash" in err and "--backbone DIR" in err


def test_help_is_quick_to_import_and_complete() -> None:
    code = (
        "import sys, mirip_fast, mirip_fast_cli.main as m; mirip_fast.set_seed; m.run(['--help']);"
        "bad = {'torch', 'pandas', 'h5py', 'transformers', 'scipy', 'wandb', 'PIL'} & set(sys.modules);"
        "sys.exit(', '.join(bad) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in COMMANDS)
    assert all(run([name, "--help"]) == 0 for name in COMMANDS)


@pytest.mark.parametrize(("given", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_waiting_threads_sleep_unless_the_user_says_otherwise(
    given: str | None, expected: str
) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    if given:
        environment["OMP_WAIT_POLICY"] = given
    code = (
        "import atexit, os, sys; from mirip_fast_cli.main import main; "
        "atexit.register(lambda: print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)); "
        "sys.argv = ['mirip-fast', '--version']; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == f"{expected} False"


@pytest.mark.parametrize("typed", [["-q", "cache", "info"], ["cache", "info", "-q"], ["cache", "-q", "info"]])  # fmt: skip
def test_quiet_may_stand_anywhere(
    work: Path, capfd: pytest.CaptureFixture[str], typed: list[str]
) -> None:
    draw(work / "folder" / "a.png", 0.5, 1)
    assert run(["embed", "folder", *TINY, *(word for word in typed if word == "-q")]) == 0
    out, err = capfd.readouterr()
    assert "1 images = 1 embedded" in out and "Backbone tiny-random at" not in err
    assert run(typed) == 0 and "1 store" in capfd.readouterr().out


def test_middle_layers_are_filled_into_a_cache_that_lacks_them(
    work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Paid for once: what is there stays, the layers come beside it, and the third time is instant."""
    for i in range(3):
        draw(work / "folder" / f"{i}.png", 0.3 * i, i)
    export = ["--export", "features.h5"]
    assert run(["embed", "folder", *TINY, "--layers", "last", *export]) == 0
    with h5py.File("features.h5") as file:
        assert set(file["features"]) == {"cls", "patch"}
        before = file["features/cls"][:]
    assert run(["embed", "folder", *TINY, *export]) == 0
    with h5py.File("features.h5") as file:
        assert set(file["features"]) == {
            "cls", "patch", "cls_1", "mean_1", "cls_2", "mean_2", "cls_3", "mean_3"
        }  # fmt: skip
        assert (file["features/cls"][:] == before).all()
        assert not (file["features/cls_2"][:] == file["features/cls_3"][:]).any()
    capfd.readouterr()
    assert run(["embed", "folder", *TINY]) == 0
    assert "0 embedded + 3 already there" in capfd.readouterr().out
    assert run(["embed", "folder", *TINY, "--layers", "7"]) == 1
    assert "blocks from 1 to 4" in capfd.readouterr().err
