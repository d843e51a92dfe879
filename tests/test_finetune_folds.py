"""`train --full --folds K`: what each fold starts from and leaves out, and one model of all."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import finish, signalled, start
from made_run import TINY, Restored, draw, rows_of
from mirip_fast_cli.main import run
from test_finetune_cli import FULL, info, loaded, newest, refused

from mirip_fast.ranking.evaluate import pick_model
from mirip_fast.ranking.folds import LEFT_OUT
from mirip_fast.ranking.scorer import load_score_model, score_files

FOLDED = [*FULL, "--folds", "3", "--augment", "none", "--learning-rate", "1e-3"]


@pytest.fixture(scope="session")
def three_heads(tmp_path_factory: pytest.TempPathFactory) -> Restored:
    train = ["train", "--head-only", "--epochs", "4", "--folds", "3", "--batch-size", "8"]
    return Restored(tmp_path_factory.mktemp("folds"), 60, ["embed", "data", *TINY], train)


@pytest.fixture
def folded_heads(three_heads: Restored, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which a head-only run with three folds has finished."""
    return three_heads(monkeypatch)


def test_folds_are_judged_on_what_they_left_out_and_joined_to_one_model(
    folded_heads: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run([*FOLDED, "data"]) == 0
    out, err = capfd.readouterr()
    folder, heads = newest(folded_heads), newest(folded_heads, "folds")
    assert f"Starting from the heads of {Path('runs') / heads.name}" in err
    assert "3 fine-tuned models, each judged on the fold it left out" in out
    assert "Out-of-fold pairwise accuracy" in out and "Next: mirip-fast evaluate" in out
    assert (folder / "split.csv").read_bytes() == (heads / "split.csv").read_bytes()
    draw(folded_heads / "new" / "a.png", 0.2, 1)
    draw(folded_heads / "new" / "b.png", 0.8, 2)
    assert run(["rank", "new", "--workers", "0", "--html", "page.html"]) == 0
    assert "3 fine-tuned backbones: every image is embedded 3 times" in capfd.readouterr().err
    works = json.loads((folded_heads / "ranking.json").read_text())["works"]
    new = [Path("new") / work["file"] for work in works]
    held_out = {row["image_id"]: float(row["score"]) for row in rows_of(folder / "held_out.csv")}
    test = {row["image_id"] for row in rows_of(folder / "split.csv") if row["split"] == "test"}
    assert test and not test & set(held_out)
    seen: set[str] = set()
    of_new = []
    for fold in range(3):
        own, of_head = folder / f"fold_{fold}", heads / f"fold_{fold}"
        assert (own / "split.csv").read_bytes() == (of_head / "split.csv").read_bytes()
        assert not (own / "calibration.json").exists()  # what it left out is for all together
        left_out = {r["image_id"]: r for r in rows_of(own / "split.csv") if r["split"] == LEFT_OUT}
        seen |= left_out.keys()
        model = load_score_model(own / "best_model.pt")
        paths = [Path(row["file"]) for row in left_out.values()]
        raw = score_files(model, [*paths, *new], cache_dir=Path("cache")).scores.astype(float)
        mean, std = raw[: len(paths)].mean(), raw[: len(paths)].std()
        found = [held_out[image_id] for image_id in left_out]
        np.testing.assert_allclose(found, (raw[: len(paths)] - mean) / std, atol=1e-4)
        of_new.append((raw[len(paths) :] - mean) / std)
    assert seen == set(held_out)
    np.testing.assert_allclose([w["score"] for w in works], np.mean(of_new, axis=0), atol=1e-4)
    known = json.loads((folder / "calibration.json").read_text())
    assert known["source"] == "out-of-fold" and known["model"] == "ensemble.safetensors"

    model = pick_model(None, Path("runs"))
    assert model.checkpoint == Path("runs") / folder.name / "ensemble.safetensors"
    parts = model.parts()
    assert len({part.info.fingerprint_id for part in parts}) == len(parts) == 3
    assert run(["evaluate"]) == 0
    report = json.loads((folder / "evaluation_test.json").read_text())
    assert report["probabilities"]["source"] == "out-of-fold"
    assert run(["evaluate", str(heads), str(folder)]) == 0
    assert run(["compare", "new/a.png", "new/b.png"]) == 0
    error = refused(["explain", "new/a.png"], capfd)
    assert "3 fine-tuned ones" in error and "fold_0" in error
    error = refused(["train", "--head-only", "--resume", str(folder)], capfd)
    assert "`mirip-fast train --full --resume" in error
    moved = folded_heads / "elsewhere"
    folder.rename(moved)
    assert run(["evaluate", "--checkpoint", str(moved), "--cache-dir", "other"]) == 0
    assert run(["export", "--hf", "shared", "--checkpoint", str(moved)]) == 0
    moved.rename(folded_heads / "away")  # the shared backbones score, not the run's
    assert run(["rank", "new", "--workers", "0", "--checkpoint", "shared", "--out", "again"]) == 0
    assert Path("again/ranking.csv").read_bytes() == Path("ranking.csv").read_bytes()


def test_each_fold_starts_from_the_head_that_had_left_it_out(folded_heads: Path) -> None:
    still = ["--learning-rate", "0", "--head-learning-rate", "0", "--epochs", "1"]
    assert run([*FOLDED, *still, "--only-folds", "0,2"]) == 0
    folder, heads = newest(folded_heads), newest(folded_heads, "folds")
    for fold in (0, 2):
        own = loaded(folder / f"fold_{fold}" / "best_model.pt")["model_state_dict"]
        head = loaded(heads / f"fold_{fold}" / "best_model.pt")["model_state_dict"]
        assert all(torch.equal(own[name], value) for name, value in head.items())


def test_a_head_that_has_seen_the_folds_is_not_taken(
    headed: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    head = newest(headed, "head-only")
    error = refused([*FOLDED, "--init-from", str(head)], capfd)
    assert "has learnt from images that folds leave out" in error and "--folds 3" in error
    assert run([*FOLDED, "--only-folds", "1"]) == 0
    out, err = capfd.readouterr()
    folder = newest(headed)
    assert "each fold starts with a random head" in err and "first 1: head only" in err
    assert info(folder)["init_from"] is None
    assert "Folds still missing: 0, 2 of 3." in out and "train --full --resume" in out
    assert (folder / "split.csv").read_bytes() == (head / "split.csv").read_bytes()


def test_stopped_resumed_and_trained_in_parts_it_is_the_same(folded_heads: Path) -> None:
    command = [*FOLDED, "--save-every-n-epochs", "1", "--remote-sync", "remote"]
    command += ["--init-from", str(newest(folded_heads, "folds")), "--output-dir"]
    assert run([*command, "whole"]) == 0
    (whole,) = Path("whole").iterdir()
    remote = Path("remote") / whole.name
    copied = {str(path.relative_to(remote)) for path in remote.rglob("*") if path.is_file()}
    assert copied >= {"ensemble.safetensors", "fold_0/best_model.pt", "fold_2/last_model.pt"}

    place = folded_heads / "process"
    code, _, err = signalled(
        lambda: run([*command, "stopped"]), place, signal.SIGUSR1, part="fold_1"
    )
    assert code == 75 and "Stopped by SIGUSR1" in err
    (folder,) = Path("stopped").iterdir()
    assert info(folder)["status"] == "interrupted"
    assert info(folder / "fold_0")["status"] == "finished"
    shutil.rmtree(folder)
    shutil.copytree(Path("remote") / folder.name, folder)  # the copy is enough to go on from
    first = (folder / "fold_0" / "best_model.pt").stat().st_mtime_ns
    assert run(["train", "--full", "--resume", "latest", "--output-dir", "stopped"]) == 0
    assert (folder / "fold_0" / "best_model.pt").stat().st_mtime_ns == first

    assert run([*command, "parts", "--only-folds", "2,0"]) == 0
    (part,) = Path("parts").iterdir()
    assert info(part)["status"] == "partial"
    shutil.copytree(whole / "fold_1", part / "fold_1")  # trained elsewhere
    assert run(["train", "--full", "--resume", str(part)]) == 0
    for other in (folder, part):
        assert info(other)["status"] == "finished"
        for fold in range(3):
            found, expected = (
                loaded(each / f"fold_{fold}/best_model.pt")["model_state_dict"]
                for each in (other, whole)
            )
            assert all(torch.equal(found[name], value) for name, value in expected.items())
        scores = [
            [float(row["score"]) for row in rows_of(r / "held_out.csv")] for r in (other, whole)
        ]
        assert scores[0] == scores[1]


def test_processes_train_folds_together(folded_heads: Path) -> None:
    command = [*FOLDED, "--device", "cpu", "--output-dir", "many"]
    command += ["--init-from", str(newest(folded_heads, "folds"))]
    ended = finish(start(lambda: run(command), 2, folded_heads / "ranks"))
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert "Out-of-fold pairwise accuracy" in ended[0][1] and ended[1][1:] == ("", "")
    (folder,) = Path("many").iterdir()
    assert info(folder)["status"] == "finished"


def test_what_can_not_be_is_told(folded_heads: Path, capfd: pytest.CaptureFixture[str]) -> None:
    heads = str(newest(folded_heads, "folds"))
    runs = len(list(Path("runs").iterdir()))
    for options, words in (
        (["--folds", "4", "--init-from", heads], "has 3 folds, not 4"),
        (["--init-from", heads], "add --folds 3"),
        (["--only-folds", "0"], "--only-folds goes with --folds"),
        (["--folds", "3", "--split-seed", "5"], "split.split_seed"),
        (["--resume", heads], "train --head-only --resume"),
    ):
        assert words in refused([*FULL, *options], capfd)
    assert len(list(Path("runs").iterdir())) == runs
    assert "there are folds 0 to 2" in refused([*FOLDED, "--only-folds", "3"], capfd)
