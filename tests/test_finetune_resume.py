"""An end-to-end run that was killed or preempted, and resumed, ends with the same weights, to the last bit."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from forked import start
from mirip_fast_cli.main import run
from test_finetune_cli import FULL, headed, info, loaded, newest, one_head

__all__ = ["headed", "one_head"]


def weights_equal(first: Path, second: Path) -> None:
    a, b = loaded(first)["model_state_dict"], loaded(second)["model_state_dict"]
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


LONG = [*FULL[:-4], "--epochs", "5", "--batch-size", "8", "--augment", "strong", "--mixup", "0.2",
        "--stochastic-depth", "0.2", "--ema-decay", "0.9", "--learning-rate", "1e-3",
        "--early-stopping-patience", "0", "--save-every-n-epochs", "1"]  # fmt: skip


@pytest.mark.parametrize("how", ["SIGKILL", "SIGUSR1"])
def test_killed_or_preempted_and_resumed_equals_uninterrupted(headed: Path, how: str) -> None:
    assert (
        run([*LONG, "--output-dir", "whole", "--init-from", str(newest(headed, "head-only"))]) == 0
    )
    command = [*LONG, "--output-dir", "stopped", "--init-from", str(newest(headed, "head-only"))]
    (process,) = start(lambda: run(command), 1, headed / "process")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(Path("stopped").glob("*/checkpoint_epoch_2.pt")):
        time.sleep(0.005)
    os.kill(process.pid, getattr(signal, how))
    code, _, err = process.wait()
    expected = -signal.SIGKILL if how == "SIGKILL" else 75
    assert code == expected, "the training ended before it could be stopped"
    (folder,) = Path("stopped").iterdir()
    if how != "SIGKILL":
        assert f"Stopped by {how}" in err and "--resume latest" in err
        assert info(folder)["status"] == "interrupted"
    assert run(["train", "--full", "--resume", "latest", "--output-dir", "stopped"]) == 0
    (whole,) = Path("whole").iterdir()
    for name in ("last_model.pt", "best_model.pt"):
        weights_equal(whole / name, folder / name)
    assert info(folder)["status"] == "finished"
    epochs = [row.split(",")[0] for row in (folder / "history.csv").read_text().split()[1:]]
    assert epochs == [str(i) for i in range(1, 6)]
