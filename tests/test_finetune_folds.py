"""`train --full --folds K`: what each fold starts from and leaves out, and one model of all."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import finish, start
from mirip_fast_cli.main import run
from test_cli import TINY, draw
from test_finetune_cli import FULL, Restored, info, loaded, newest, refused, work

from mirip_fast.ranking.evaluate import pick_model
from mirip_fast.ranking.folds import LEFT_OUT
from mirip_fast.ranking.scorer import load_score_model, score_files

__all__ = ["work"]

FOLDED = [*FULL, "--folds", "3", "--augment", "none", "--learning-rate", "1e-3"]


@pytest.fixture(scope="session")
def three_heads(tmp_path_factory: pytest.TempPathFactory) -> Restored:
    return Restored(tmp_path_factory.mktemp("folds"), 60, "--folds", "3", "--batch-size", "8")


@pytest.fixture
def headed(three_heads: Restored, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which a head-only run with three folds has finished."""
    return three_heads(monkeypatch)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        return list(csv.DictReader(stream))


def test_folds_are_judged_on_what_they_left_out_and_joined(
    headed: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    assert run([*FOLDED, "data"]) == 0
    out, err = capfd.readouterr()
    folder, heads = newest(headed), newest(headed, "folds")
    assert f"Starting from the heads of {Path('runs') / heads.name}" in err
    assert "3 fine-tuned models, each judged on the fold it left out" in out
    assert "Out-of-fold pairwise accuracy" in out and "Next: mirip-fast evaluate" in out
    assert (folder / "split.csv").read_bytes() == (heads / "split.csv").read_bytes()
    held_out = {row["image_id"]: float(row["score"]) for row in rows(folder / "held_out.csv")}
    test = {row["image_id"] for row in rows(folder / "split.csv") if row["split"] == "test"}
    assert test and not test & set(held_out)
    seen: set[str] = set()
    for fold in range(3):
        own, of_head = folder / f"fold_{fold}", heads / f"fold_{fold}"
        assert (own / "split.csv").read_bytes() == (of_head / "split.csv").read_bytes()
        assert not (own / "calibration.json").exists()  # what it left out is for all together
        left_out = [row for row in rows(own / "split.csv") if row["split"] == LEFT_OUT]
        seen |= {row["image_id"] for row in left_out}
        model = load_score_model(own / "best_model.pt")
        paths = [Path(row["path"]) for row in left_out]
        raw = score_files(model, paths, cache_dir=Path("cache")).scores.astype(float)
        expected = (raw - raw.mean()) / raw.std()
        np.testing.assert_allclose(
            [held_out[row["image_id"]] for row in left_out], expected, atol=1e-4
        )
    assert seen == set(held_out)
    known = json.loads((folder / "calibration.json").read_text())
    assert known["source"] == "out-of-fold" and known["model"] == "ensemble.safetensors"


def test_each_fold_starts_from_the_head_that_had_left_it_out(headed: Path) -> None:
    still = ["--learning-rate", "0", "--head-learning-rate", "0", "--epochs", "1"]
    assert run([*FOLDED, *still, "--only-folds", "0,2"]) == 0
    folder, heads = newest(headed), newest(headed, "folds")
    for fold in (0, 2):
        own = loaded(folder / f"fold_{fold}" / "best_model.pt")["model_state_dict"]
        head = loaded(heads / f"fold_{fold}" / "best_model.pt")["model_state_dict"]
        assert all(torch.equal(own[name], value) for name, value in head.items())


def test_all_members_rank_and_evaluate(headed: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run([*FOLDED, "data"]) == 0
    folder = newest(headed)
    model = pick_model(None, Path("runs"))
    assert model.checkpoint == Path("runs") / folder.name / "ensemble.safetensors"
    parts = model.parts()
    assert len({part.info.fingerprint_id for part in parts}) == len(parts) == 3
    held_out = rows(folder / "held_out.csv")
    draw(headed / "new" / "a.png", 0.2, 1)
    draw(headed / "new" / "b.png", 0.8, 2)
    capfd.readouterr()
    assert run(["rank", "new", "--workers", "0", "--html", "page.html"]) == 0
    err = capfd.readouterr().err
    assert "3 fine-tuned backbones: every image is embedded 3 times" in err
    ranking = json.loads((headed / "ranking.json").read_text())
    paths = [Path("new") / work["file"] for work in ranking["works"]]
    expected = []
    for fold in range(3):
        own = load_score_model(folder / f"fold_{fold}" / "best_model.pt")
        left_out = {
            r["image_id"] for r in rows(folder / f"fold_{fold}/split.csv") if r["split"] == LEFT_OUT
        }
        of_fold = [Path(r["path"]) for r in held_out if r["image_id"] in left_out]
        raw = score_files(own, of_fold, cache_dir=Path("cache")).scores
        scores = score_files(own, paths, cache_dir=Path("cache")).scores
        expected.append((scores - raw.mean()) / raw.std())
    np.testing.assert_allclose(
        [work["score"] for work in ranking["works"]], np.mean(expected, axis=0), atol=1e-4
    )
    assert run(["evaluate"]) == 0
    report = json.loads((folder / "evaluation_test.json").read_text())
    assert report["probabilities"]["source"] == "out-of-fold"
    assert run(["evaluate", str(newest(headed, "folds")), str(folder)]) == 0
    assert run(["compare", "new/a.png", "new/b.png"]) == 0
    error = refused(["explain", "new/a.png"], capfd)
    assert "3 fine-tuned ones" in error and "fold_0" in error
    moved = headed / "elsewhere"
    folder.rename(moved)
    assert run(["evaluate", "--checkpoint", str(moved), "--cache-dir", "other"]) == 0
    assert run(["export", "--hf", "shared", "--checkpoint", str(moved)]) == 0
    moved.rename(headed / "away")  # the shared backbones score, not the run's
    assert run(["rank", "new", "--workers", "0", "--checkpoint", "shared", "--out", "again"]) == 0
    assert (headed / "again/ranking.csv").read_bytes() == (headed / "ranking.csv").read_bytes()


def test_a_head_that_has_seen_the_folds_is_not_taken(
    work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["embed", "data", *TINY]) == 0
    assert run(["train", "--head-only", "--epochs", "3"]) == 0
    head = newest(work, "head-only")
    error = refused([*FOLDED, "--init-from", str(head)], capfd)
    assert "has learnt from images that folds leave out" in error and "--folds 3" in error
    assert run([*FOLDED, "--only-folds", "1"]) == 0
    out, err = capfd.readouterr()
    folder = newest(work)
    assert "each fold starts with a random head" in err and "first 1: head only" in err
    assert info(folder)["init_from"] is None
    assert "Folds still missing: 0, 2 of 3." in out and "train --full --resume" in out
    assert (folder / "split.csv").read_bytes() == (head / "split.csv").read_bytes()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{fold}.{name}": value
        for fold in range(3)
        for name, value in loaded(folder / f"fold_{fold}" / "best_model.pt")[
            "model_state_dict"
        ].items()
    }


def test_stopped_resumed_and_trained_in_parts_it_is_the_same(headed: Path) -> None:
    command = [*FOLDED, "--save-every-n-epochs", "1", "--remote-sync", "remote"]
    assert (
        run([*command, "--output-dir", "whole", "--init-from", str(newest(headed, "folds"))]) == 0
    )
    (whole,) = Path("whole").iterdir()
    copied = {
        str(p.relative_to(Path("remote") / whole.name))
        for p in Path("remote").rglob("*")
        if p.is_file()
    }
    assert copied >= {"ensemble.safetensors", "fold_0/best_model.pt", "fold_2/last_model.pt"}

    stopped = [*command, "--output-dir", "stopped", "--init-from", str(newest(headed, "folds"))]
    (process,) = start(lambda: run(stopped), 1, headed / "process")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(
        Path("stopped").glob("*/fold_1/checkpoint_epoch_1.pt")
    ):
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGUSR1)
    code, _, err = process.wait()
    assert code == 75 and "Stopped by SIGUSR1" in err, (
        "the training ended before it could be stopped"
    )
    (folder,) = Path("stopped").iterdir()
    assert (
        info(folder)["status"] == "interrupted" and info(folder / "fold_0")["status"] == "finished"
    )
    shutil.rmtree(folder)
    shutil.copytree(Path("remote") / folder.name, folder)  # the copy is enough to go on from
    first = (folder / "fold_0" / "best_model.pt").stat().st_mtime_ns
    assert run(["train", "--full", "--resume", "latest", "--output-dir", "stopped"]) == 0
    assert (folder / "fold_0" / "best_model.pt").stat().st_mtime_ns == first

    parts = [*command, "--output-dir", "parts", "--init-from", str(newest(headed, "folds"))]
    assert run([*parts, "--only-folds", "2,0"]) == 0
    (part,) = Path("parts").iterdir()
    assert info(part)["status"] == "partial"
    shutil.copytree(whole / "fold_1", part / "fold_1")  # trained elsewhere
    assert run(["train", "--full", "--resume", str(part)]) == 0
    expected = weights(whole)
    for other in (folder, part):
        found = weights(other)
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        assert info(other)["status"] == "finished"
        same = [float(row["score"]) for row in rows(other / "held_out.csv")]
        assert same == [float(row["score"]) for row in rows(whole / "held_out.csv")]


def test_processes_train_folds_together(headed: Path) -> None:
    command = [*FOLDED, "--device", "cpu", "--output-dir", "many"]
    command += ["--init-from", str(newest(headed, "folds"))]
    ended = finish(start(lambda: run(command), 2, headed / "ranks"))
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert "Out-of-fold pairwise accuracy" in ended[0][1] and ended[1][1:] == ("", "")
    (folder,) = Path("many").iterdir()
    assert info(folder)["status"] == "finished"


def test_what_can_not_be_is_told(headed: Path, capfd: pytest.CaptureFixture[str]) -> None:
    heads = str(newest(headed, "folds"))
    runs = len(list((headed / "runs").iterdir()))
    for options, words in (
        (["--folds", "4", "--init-from", heads], "has 3 folds, not 4"),
        (["--init-from", heads], "add --folds 3"),
        (["--only-folds", "0"], "--only-folds goes with --folds"),
        (["--folds", "3", "--split-seed", "5"], "split.split_seed"),
        (["--resume", heads], "train --head-only --resume"),
    ):
        assert words in refused([*FULL, *options], capfd)
    assert len(list((headed / "runs").iterdir())) == runs
    assert "there are folds 0 to 2" in refused([*FOLDED, "--only-folds", "3"], capfd)


def test_the_kinds_of_folds_are_resumed_by_their_own_command(
    headed: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run([*FOLDED, "--debug"]) == 0
    error = refused(["train", "--head-only", "--resume", str(newest(headed))], capfd)
    assert "`mirip-fast train --full --resume" in error
