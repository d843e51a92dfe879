"""What happens when training cannot go on, or must not: what is kept, and what is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from mirip_fast_cli.main import run
from test_cli import TINY
from test_fit import PRESET, history, rows, run_in, settings, spoil, weights

from mirip_fast.errors import TrainingError
from mirip_fast.features.store import fingerprint_id
from mirip_fast.models.checkpoint import load_checkpoint, save_checkpoint
from mirip_fast.ranking import fit as fit_module
from mirip_fast.ranking.fit import HeadFit
from mirip_fast.training.run_folder import Run
from mirip_fast.training.trackers import Trackers

CPU = torch.device("cpu")
TRAIN = ["train", "--head-only", "--epochs", "3", "--batch-size", "8"]


def make() -> HeadFit:
    config = settings(save_every_n_epochs=0)
    return HeadFit(rows(), rows(24, seed=1), config, PRESET, {}, CPU)


class PulledOutError(BaseException):
    """Ctrl-C, or anything else."""


@pytest.mark.parametrize("how", ["nan", "stopped"])
def test_epochs_that_were_not_saved_yet_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(fit_module, "_SAVE_SECONDS", 1e9)
    fit = make()
    train_epoch = fit._train_epoch

    def broken(epoch: int) -> float:
        if epoch == 5 and how == "nan":
            spoil(fit.head)
        loss = train_epoch(epoch)
        if epoch == 5:
            raise PulledOutError
        return loss

    fit._train_epoch = broken  # type: ignore[method-assign]
    with pytest.raises((TrainingError, PulledOutError)):
        fit.run(run_in(tmp_path), Trackers({}))
    accuracies = [float(line["val/accuracy"]) for line in history(tmp_path)]
    assert len(accuracies) == 4
    last, best = (load_checkpoint(tmp_path / f"{name}_model.pt") for name in ("last", "best"))
    assert last["epoch"] == 4
    assert best["epoch"] == 1 + accuracies.index(max(accuracies))
    whole = run_in(tmp_path / "whole")
    make().run(whole, Trackers({}))
    fit = make()
    fit.resume(last)
    fit.run(Run(tmp_path), Trackers({}))
    first, second = weights(whole.last), weights(tmp_path / "last_model.pt")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_a_kill_loses_is_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill leaves the first epoch's checkpoint alone: nothing is written at the end."""
    monkeypatch.setattr(fit_module, "_SAVE_SECONDS", 1e9)
    saves = []

    def counted(path: Path, checkpoint: dict[str, object]) -> None:
        saves.append((path.name, checkpoint["epoch"]))
        save_checkpoint(path, checkpoint)

    monkeypatch.setattr(fit_module, "save_checkpoint", counted)
    make().run(run_in(tmp_path), Trackers({}))
    assert saves[:2] == [("best_model.pt", 1), ("last_model.pt", 1)]
    assert saves[-1] == ("last_model.pt", 6) and len(saves) <= 4


def test_a_learning_rate_beyond_reason(headed: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--learning-rate", "1e38", "--gradient-clip-norm", "0"]
    assert run([*TRAIN, *options, "--output-dir", "new"]) == 1
    err = capfd.readouterr().err
    assert "in epoch 1. Likely causes: a learning rate that is too high" in err
    assert "Traceback" not in err
    (info,) = Path("new").glob("*/run.json")
    assert json.loads(info.read_text())["status"] == "failed"
    capfd.readouterr()
    assert run(["rank", "data", "--output-dir", "new"]) == 1  # a failed run is no model
    assert "failed" in capfd.readouterr().err


def test_resuming_on_other_features_names_what_differs(
    headed: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (store,) = Path("cache").glob("*/store.json")
    content = json.loads(store.read_text())
    content["fingerprint"].update(image_size=756, resize="pad")
    store.write_text(json.dumps(content))
    other = store.parent.rename(store.parent.with_name(fingerprint_id(content["fingerprint"])))
    capfd.readouterr()
    assert run(["train", "--head-only", "--resume", "latest"]) == 1
    err = capfd.readouterr().err
    assert "does not fit" in err and "image_size: 28 ≠ 756; resize: squash ≠ pad" in err
    (other / "store.json").unlink()
    assert run(["train", "--head-only", "--resume", "latest"]) == 1
    assert "run `mirip-fast embed` again" in capfd.readouterr().err


def test_features_that_were_not_embedded_are_told(
    headed: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["embed", "data", "--patches", "none", "--cache-dir", "other", *TINY]) == 0
    assert run([*TRAIN, "--features", "cls+mean", "--cache-dir", "other"]) == 1
    err = capfd.readouterr().err
    assert "has no series mean.28; it has cls.28" in err and "--patches" in err


def test_without_finer_grades_they_can_not_be_learned(
    headed: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run([*TRAIN, "--label", "tier_score", "--output-dir", "new"]) == 1
    err = capfd.readouterr().err
    assert "have no number in the column 'tier_score'" in err and "--label tier" in err
    assert not Path("new").exists()
