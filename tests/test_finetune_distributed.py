"""Several processes train as one does: the same gradients, and they stop together."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_worker import BATCHES, main
from forked import finish, start, wait_for
from mirip_fast_cli.main import run

from mirip_fast.models.checkpoint import load_checkpoint, save_checkpoint

ModelDir = Callable[[str], Path]


def test_gradients_equal_those_of_one_process(model_dir: ModelDir, tmp_path: Path) -> None:
    folder, world = model_dir("dinov2"), 3
    main(folder, tmp_path)
    for code, _, err in finish(
        start(lambda: main(folder, tmp_path) or 0, world, tmp_path / "ranks")
    ):
        assert code == 0, err
    alone = torch.load(tmp_path / "1-0.pt")
    for rank in range(world):
        together = torch.load(tmp_path / f"{world}-{rank}.pt")
        for n, one, many in zip(BATCHES, alone, together, strict=True):
            assert many["loss"] == pytest.approx(one["loss"], rel=1e-12), n
            assert torch.allclose(many["scores"], one["scores"], rtol=1e-12)
            biggest = max(float(value.abs().max()) for value in one["gradients"].values())
            for name, value in many["gradients"].items():
                expected = one["gradients"].get(name, torch.zeros_like(value))
                assert float((value - expected).abs().max()) <= 1e-9 * biggest, (n, name)


FULL = [
    "train", "--full", "--device", "cpu", "--loader-workers", "0", "--workers", "0",
    "--batch-size", "7", "--augment", "none", "--projector-dropout", "0", "--learning-rate", "1e-3",
    "--early-stopping-patience", "0", "--save-every-n-epochs", "1",
]  # fmt: skip


def weights(folder: Path, name: str = "last_model.pt") -> dict[str, torch.Tensor]:
    (run_folder,) = folder.iterdir()
    state: dict[str, Any] = torch.load(run_folder / name, weights_only=True)
    return state["model_state_dict"]  # type: ignore[no-any-return]


def head(work: Path) -> list[str]:
    (folder,) = (work / "runs").iterdir()
    return ["--init-from", str(folder), "--epochs", "3"]


def test_a_distributed_run_equals_one_alone(headed: Path) -> None:
    assert run([*FULL, *head(headed), "--output-dir", "alone"]) == 0
    many = [*FULL, *head(headed), "--output-dir", "many"]
    ended = finish(start(lambda: run(many), 3, headed / "ranks"))
    assert [code for code, _, _ in ended] == [0, 0, 0], ended
    assert "Finished after 3 epochs" in ended[0][1] and "cpu × 3" in ended[0][2]
    assert all(out == "" and err == "" for _, out, err in ended[1:])
    first, second = weights(headed / "alone"), weights(headed / "many")
    for name, value in first.items():
        if name != "score_head.layers.3.bias":  # no pair depends on it: rounding alone moves it
            assert torch.allclose(value, second[name], atol=2e-4), name


@pytest.mark.parametrize("killed", [0, 1])
def test_one_killed_process_stops_all_and_the_last_checkpoint_is_good(
    headed: Path, killed: int
) -> None:
    command = [*FULL, *head(headed)[:2], "--epochs", "400", "--output-dir", "many"]
    processes = start(lambda: run(command), 2, headed / "ranks")
    wait_for(Path("many"), "*/checkpoint_epoch_2.pt")
    os.kill(processes[killed].pid, signal.SIGKILL)
    ended = finish(processes)
    codes = [code for code, _, _ in ended]
    assert codes.pop(killed) == -signal.SIGKILL and codes == [1], ended
    (told,) = [err for i, (_, _, err) in enumerate(ended) if i != killed]
    assert "Another process of this distributed run is gone" in told and "Traceback" not in told
    (folder,) = Path("many").iterdir()
    checkpoint = load_checkpoint(folder / "last_model.pt")
    assert checkpoint["epoch"] >= 1
    # To see it go on without waiting for the rest: as if it were the last epoch but one.
    checkpoint["training_state"]["plan"]["epochs"] = checkpoint["epoch"] + 1
    save_checkpoint(folder / "last_model.pt", checkpoint)
    assert run(["train", "--full", "--resume", "latest", "--output-dir", "many"]) == 0
    assert load_checkpoint(folder / "last_model.pt")["epoch"] == checkpoint["epoch"] + 1


def test_what_is_wrong_is_told_once(headed: Path) -> None:
    wrong = [*FULL, *head(headed), "--strategy", "last:77"]
    ended = finish(start(lambda: run(wrong), 2, headed / "ranks"))
    assert [code for code, _, _ in ended] == [1, 1]
    assert "has 4 blocks" in ended[0][2] and ended[1][2] == ""


def test_a_signal_to_one_process_saves_and_stops_all(headed: Path) -> None:
    command = [*FULL, *head(headed)[:2], "--epochs", "400", "--output-dir", "many"]
    processes = start(lambda: run(command), 2, headed / "ranks")
    wait_for(Path("many"), "*/checkpoint_epoch_1.pt")
    os.kill(processes[1].pid, signal.SIGUSR1)
    ended = finish(processes)
    assert [code for code, _, _ in ended] == [75, 75], ended
    assert "all is saved" in ended[0][2] and "--resume latest" in ended[0][2]
