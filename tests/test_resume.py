"""A training that was killed and resumed ends with the same weights, to the last bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mirip_fast_cli.main import run
from test_cli import TINY, make_data

TRAIN = [
    "train",
    "--head-only",
    "--epochs",
    "40",
    "--batch-size",
    "8",
    "--early-stopping-patience",
    "0",
]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_data(tmp_path / "data")
    assert run(["embed", "data", "--tta", "flip", *TINY]) == 0
    return tmp_path


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    state = torch.load(folder / name, weights_only=True)["model_state_dict"]
    assert isinstance(state, dict)
    return state


def history(folder: Path) -> list[list[str]]:
    """Every epoch's values but the seconds it took."""
    rows = (folder / "history.csv").read_text().splitlines()
    return [line.split(",")[:-1] for line in rows]


@pytest.mark.parametrize("pairs", ["all", "sampled"])
def test_killed_and_resumed_equals_uninterrupted(work: Path, pairs: str) -> None:
    assert run([*TRAIN, "--pairs", pairs, "--output-dir", "whole"]) == 0
    (whole,) = (work / "whole").iterdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "mirip_fast_cli", *TRAIN, "--pairs", pairs, "--output-dir", "killed"],
        stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(
        (work / "killed").glob("*/checkpoint_epoch_10.pt")
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the training ended before it could be killed"
    (killed,) = (work / "killed").iterdir()
    assert run(["train", "--head-only", "--resume", "latest", "--output-dir", "killed"]) == 0
    for name in ("last_model.pt", "best_model.pt"):
        first, second = weights(whole, name), weights(killed, name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), name
    assert history(whole) == history(killed)


def test_resuming_a_finished_run_changes_nothing(work: Path) -> None:
    assert run(TRAIN) == 0
    (folder,) = (work / "runs").iterdir()
    before = weights(folder, "last_model.pt"), history(folder)
    assert run(["train", "--head-only", "--resume", str(folder)]) == 0
    after = weights(folder, "last_model.pt"), history(folder)
    assert all(torch.equal(before[0][key], after[0][key]) for key in before[0])
    assert before[1] == after[1]
