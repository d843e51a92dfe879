"""`train --full` as a user types it: what it starts from, what it leaves, what it refuses."""

from __future__ import annotations

import csv
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from forked import signalled
from made_run import draw, make_data
from mirip_fast_cli.main import run
from PIL import Image

from mirip_fast import PairwiseRankingModel
from mirip_fast.ranking.scorer import load_score_model, score_files
from mirip_fast.training.run_folder import accept_files

FULL = ["train", "--full", "--loader-workers", "0", "--workers", "0", "--epochs", "2", "--batch-size", "8"]  # fmt: skip


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_data(tmp_path / "data")
    return tmp_path


def newest(work: Path, mode: str = "full") -> Path:
    runs = [p for p in (work / "runs").iterdir() if info(p)["mode"] == mode]
    return max(runs, key=lambda path: path.stat().st_mtime_ns)


def info(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / "run.json").read_text())
    assert isinstance(content, dict)
    return content


def loaded(path: Path) -> dict[str, Any]:
    content = torch.load(path, weights_only=True)
    assert isinstance(content, dict)
    return content


def test_from_a_head_to_a_ranking(
    headed: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []
    monkeypatch.setattr("mirip_fast.finetune.train.keep_freed_memory", lambda: kept.append(1))
    # The documented `--data-dir data/images` means the data set.
    assert run(["train", "--data-dir", "data/images", *FULL[1:], "--learning-rate", "1e-3"]) == 0
    assert kept
    out, err = capfd.readouterr()
    assert "Starting from the head of runs/" in err and "with its split" in err
    assert "Finished after 2 epochs" in out
    folder, head = newest(headed), newest(headed, "head-only")
    assert (folder / "split.csv").read_bytes() == (head / "split.csv").read_bytes()
    made = {path.name for path in folder.iterdir()}
    assert made >= {
        "config.yaml", "split.csv", "train.log", "history.csv", "learning_curves.png", "best_model.pt",
        "last_model.pt", "head.safetensors", "backbone", "calibration.json", "held_out.csv",
    }  # fmt: skip
    first = loaded(head / "best_model.pt")["model"]["fingerprint"]
    assert run(["evaluate", "--split", "val"]) == 0
    report = json.loads((folder / "evaluation_val.json").read_text())
    accuracy = info(folder)["val_pairwise_accuracy"]
    assert report["pairwise_accuracy"] == pytest.approx(accuracy, abs=0.03)
    assert run(["rank", "data/images", "--out", "ranked"]) == 0
    assert run(["export", "--hf", "shared"]) == 0
    shared = headed / "shared"
    folder.rename(headed / "away")  # the shared backbone scores, not the run's
    held = b"".join(path.read_bytes() for path in shared.rglob("*") if path.is_file())
    assert str(headed).encode() not in held
    assert run(["rank", "data/images", "--out", "two", "--checkpoint", "shared"]) == 0
    assert Path("two/ranking.csv").read_bytes() == Path("ranked/ranking.csv").read_bytes()
    stores = {
        json.loads(p.read_text())["fingerprint"]["backbone"]
        for p in Path("cache").glob("*/store.json")
    }
    assert len(stores) == 2 and first["backbone"] in stores
    the_document_loads(headed / "away", sorted((headed / "data/images").iterdir())[:4])


def the_document_loads(folder: Path, paths: list[Path]) -> None:
    """Its backbone comes along, and scores are those of `rank`."""
    model = PairwiseRankingModel()
    model.load_state_dict(loaded(folder / "best_model.pt")["model_state_dict"])
    model.eval()
    scored = load_score_model(folder / "best_model.pt")
    expected = score_files(scored, paths, cache_dir=Path("cache")).scores
    side = scored.info.views[0].size
    images = []
    for path in paths:
        image = Image.open(path).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.spec.mean, model.spec.std))
        images.append((pixels - mean) / std)
    with torch.no_grad():
        found = torch.cat(model(torch.stack(images[:2]), torch.stack(images[2:]))).numpy()
    np.testing.assert_allclose(found, expected, atol=0.02 * max(1.0, float(np.ptp(expected))))
    untrained, trained = (
        PairwiseRankingModel("tiny-random").backbone.state_dict(),
        model.backbone.state_dict(),
    )
    assert any(not torch.equal(trained[name], value) for name, value in untrained.items())


def test_a_numbered_checkpoint_and_a_moved_run_are_models_too(headed: Path) -> None:
    """And adapters are merged into plain weights."""
    assert run([*FULL, "--save-every-n-epochs", "1", "--strategy", "lora"]) == 0
    folder = newest(headed)
    state = loaded(folder / "best_model.pt")["model_state_dict"]
    assert not [name for name in state if "lora" in name or "base_layer" in name]
    assert "backbone.encoder.layer.0.attention.q_proj.weight" in state
    first = str(folder / "checkpoint_epoch_1.pt")
    assert run(["evaluate", "--checkpoint", first, "--split", "val"]) == 0
    assert (folder / "backbone-checkpoint_epoch_1" / "model.safetensors").is_file()
    moved = headed / "elsewhere"
    folder.rename(moved)
    assert run(["evaluate", "--checkpoint", str(moved), "--cache-dir", "other"]) == 0
    (moved / "head.safetensors").unlink()
    for path in (moved / "backbone").iterdir():
        path.unlink()
    accept_files(moved)
    assert run(["evaluate", "--checkpoint", str(moved), "--cache-dir", "third"]) == 0


def test_without_a_head_run_the_head_learns_first(
    work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (work / "data" / "images" / "broken.png").write_bytes(b"no image")
    with (work / "data" / "metadata.csv").open("a") as stream:
        stream.write("bad,broken.png,S,회화\n")
    listed = [f"id{i:02d}" for i in range(0, 40, 3)]
    (work / "near.csv").write_text("near_group,image_id\n" + "".join(f"near,{i}\n" for i in listed))
    options = ["--backbone", "tiny-random", "--image-size", "28", "--learning-rate", "1e-3"]
    assert run([*FULL, "data", *options, "--near-groups", "near.csv"]) == 0
    err = capfd.readouterr().err
    assert "No finished head-only run" in err and "first 1: head only" in err
    assert "1 of 41 images cannot be read and are left out" in err and "broken.png" in err
    weights = loaded(newest(work) / "best_model.pt")
    assert weights["config"]["embed"]["image_size"] == 28
    with (newest(work) / "split.csv").open(encoding="utf-8-sig", newline="") as stream:
        table = {row["image_id"]: row for row in csv.DictReader(stream)}
    assert {table[image_id]["near_group"] for image_id in listed} == {"near"}
    assert len({table[image_id]["split"] for image_id in listed}) == 1
    assert run(["evaluate"]) == 0


def refused(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    capfd.readouterr()
    assert run(arguments) == 1
    error = capfd.readouterr().err
    assert "Traceback" not in error
    return error


def test_what_can_not_be_is_told(
    headed: Path, model_dir: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    runs = len(list((headed / "runs").iterdir()))
    for options, *words in (
        # Another backbone or preprocessing than the head's.
        (["--image-size", "42", "--resize", "pad"], "image_size", "resize", "28", "42", "--init-from none"),
        (["--backbone", str(model_dir("vit"))], "backbone", "model_type"),
        (["--features", "mean"], "head.features", "has cls+mean"),
        (["--strategy", "last:9"], "has 4 blocks"),
        (["--init-from", "nowhere"], "--init-from nowhere"),
        (["--init-from", "none", "elsewhere"], "elsewhere"),
        (["--metadata", "x.csv"], "--metadata goes with --head-only"),
        (["--precision", "bf16"], "--precision bf16"),
        (["--gradient-accumulation-steps", "4"], "--accumulation-steps 4"),
        (["--remote-sync", "nosuch://x"], "--remote-sync nosuch://x"),
        (["--remote-sync", "s3://me:pw@b/x"], "a user or a password in it"),
        (["--report-to", "nobody"], "--report-to nobody"),
        (["--resume", "latest", "--output-dir", "empty"], "--resume latest"),
        (["--head-only"], "Say what to train"),
    ):  # fmt: skip
        error = refused([*FULL, *options], capfd)
        assert all(word in error for word in words), (options, error)
    error = refused(["train", "--head-only", "--strategy", "full", "--image-size", "28"], capfd)
    assert "--strategy" in error and "--image-size" in error and "only with --full" in error
    assert len(list((headed / "runs").iterdir())) == runs


def test_kept_images_and_workers_give_the_same_run(
    headed: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ways = {"images": "0", "workers": "2", "plain": "0"}
    losses = {}
    head = str(newest(headed, "head-only"))
    for name, workers in ways.items():
        if name == "plain":  # 32 training images of 28 × 28 pixels do not fit, 4 to validate on do
            monkeypatch.setattr("mirip_fast.finetune.train.room_in_memory", lambda: 50_000)
            capfd.readouterr()
        command = [*FULL, "--strategy", "last:2", "--augment", "none", "--learning-rate", "1e-3"]
        command += ["--loader-workers", workers, *(["--cache-images"] if workers == "0" else [])]
        assert run([*command, "--output-dir", name, "--init-from", head]) == 0
        (folder,) = Path(name).iterdir()
        rows = [line.split(",") for line in (folder / "history.csv").read_text().splitlines()]
        at = [rows[0].index(column) for column in ("train/loss", "val/loss", "val/accuracy")]
        losses[name] = [[float(row[i]) for i in at] for row in rows[1:]]
    assert losses["plain"] == losses["images"] == losses["workers"]
    err = capfd.readouterr().err
    assert "--cache-images: 32 decoded images take" in err and "decoded in every epoch" in err
    assert "Keeping 4 decoded images in memory" in err


def test_a_lost_run_goes_on_from_its_copy(headed: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """To the last bit, from the remote alone: run, settings, split and history go along."""
    url = f"memory://far-{headed.name}"
    options = ["--remote-sync", url, "--save-every-n-epochs", "1"]
    assert run([*FULL, *options, "--strategy", "llrd", "--report-to", "tensorboard"]) == 0
    folder = newest(headed)
    every_value_was_reported(folder / "tensorboard")
    remote = fsspec.filesystem("memory")
    remote.get(f"{url}/{folder.name}", str(headed / "copy"), recursive=True)
    names = {path.name for path in (headed / "copy").iterdir()}
    assert names >= {
        "best_model.pt", "last_model.pt", "checkpoint_epoch_1.pt", "checkpoint_epoch_2.pt",
        "run.json", "config.yaml", "split.csv", "history.csv", "head.safetensors", "calibration.json",
    }  # fmt: skip
    assert "files.json" not in names and not [name for name in names if "partial" in name]
    for name in names:
        assert (folder / name).read_bytes() == (headed / "copy" / name).read_bytes(), name
    expected, history = loaded(folder / "last_model.pt"), (folder / "history.csv").read_text()
    shutil.rmtree(folder)
    shutil.move(headed / "copy", folder)
    for name in ("last_model.pt", "checkpoint_epoch_2.pt"):
        (folder / name).unlink()  # as after the first epoch
    assert run(["train", "--full", "--resume", str(folder / "checkpoint_epoch_1.pt")]) == 0
    found = loaded(folder / "last_model.pt")
    for key in ("model_state_dict", "optimizer_state_dict"):
        assert repr(found[key]) == repr(expected[key])
    for name, value in expected["model_state_dict"].items():
        assert torch.equal(found["model_state_dict"][name], value), name
    assert len((folder / "history.csv").read_text().splitlines()) == len(history.splitlines()) == 3
    assert run(["rank", "data/images", "--checkpoint", str(folder)]) == 0


def every_value_was_reported(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert tags >= {
        "train/loss", "train/accuracy", "val/loss", "val/accuracy", "gradient_norm", "images_per_second",
        "memory_gib", "data_seconds", "learning_rate/block 0", "learning_rate/block 3, no decay",
        "learning_rate/embeddings", "learning_rate/norm, no decay", "learning_rate/head",
    }  # fmt: skip
    rates = {tag: events.Scalars(tag)[0].value for tag in tags if tag.startswith("learning_rate/")}
    assert rates["learning_rate/block 0"] == pytest.approx(0.8**4 * rates["learning_rate/head"])
    assert [event.value > 0 for event in events.Scalars("gradient_norm")] == [True, True]


def test_resume_latest_means_the_newest_of_its_kind(
    headed: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run([*FULL, "--debug"]) == 0
    full, head = newest(headed), newest(headed, "head-only")
    capfd.readouterr()
    assert run(["train", "--head-only", "--resume", "latest"]) == 0
    assert f"Run: runs/{head.name}" in capfd.readouterr().out
    assert run(["train", "--full", "--resume", "latest"]) == 0
    assert f"Run: runs/{full.name}" in capfd.readouterr().out
    error = refused(["train", "--full", "--resume", str(full / "best_model.pt")], capfd)
    assert "give last_model.pt" in error
    draw(headed / "data" / "images" / "work_01.png", 0.5, 99)
    for changed in (FULL, ["train", "--full", "--resume", "latest"]):
        error = refused(changed, capfd)
        assert "1 of 40 images" in error and "work_01.png: its content changed" in error
    error = refused(["train", "--head-only", "--resume", str(full)], capfd)
    assert "was not written by `mirip-fast train --head-only`" in error
    error = refused(["train", "--full", "--resume", str(head)], capfd)
    assert "cannot be resumed by `train --full`" in error


LONG = [*FULL[:-4], "--epochs", "3", "--batch-size", "8", "--augment", "strong", "--mixup", "0.2",
        "--stochastic-depth", "0.2", "--ema-decay", "0.9", "--learning-rate", "1e-3",
        "--early-stopping-patience", "0", "--save-every-n-epochs", "1"]  # fmt: skip


def test_killed_or_preempted_and_resumed_equals_uninterrupted(headed: Path) -> None:
    """To the last bit."""
    command = [*LONG, "--init-from", str(newest(headed, "head-only")), "--output-dir"]
    assert run([*command, "whole"]) == 0
    (whole,) = Path("whole").iterdir()
    place = headed / "process"
    code, _, err = signalled(lambda: run([*command, "SIGKILL"]), place, signal.SIGKILL, 2)
    assert code == -signal.SIGKILL, err
    code, _, err = signalled(lambda: run([*command, "SIGUSR1"]), place, signal.SIGUSR1)
    assert code == 75 and "Stopped by SIGUSR1" in err and "--resume latest" in err
    assert info(next(Path("SIGUSR1").iterdir()))["status"] == "interrupted"
    for how in ("SIGKILL", "SIGUSR1"):
        (folder,) = Path(how).iterdir()
        assert run(["train", "--full", "--resume", "latest", "--output-dir", how]) == 0
        for name in ("last_model.pt", "best_model.pt"):
            a, b = (loaded(each / name)["model_state_dict"] for each in (whole, folder))
            assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        assert info(folder)["status"] == "finished"
        epochs = [row.split(",")[0] for row in (folder / "history.csv").read_text().split()[1:]]
        assert epochs == [str(i) for i in range(1, 4)]
