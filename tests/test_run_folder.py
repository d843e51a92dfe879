"""Runs are found again, the newest first; what is gone on from, and what a kill left, are told."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from forked import Process, start

from mirip_fast.errors import RunNotFoundError
from mirip_fast.training.run_folder import (
    Run,
    create_run,
    find_runs,
    remove_runs_without_checkpoint,
    resumable_run,
)


def test_the_later_of_two_runs_of_one_second_is_the_newest(tmp_path: Path) -> None:
    names = ["head", "full", "zero", "all", "full"]  # in no order that their names would give
    runs = [create_run(tmp_path, name, mode="head-only") for name in names]
    assert [run.path for run in find_runs(tmp_path)] == [run.path for run in reversed(runs)]


def test_latest_is_the_newest_run_or_none(tmp_path: Path) -> None:
    with pytest.raises(RunNotFoundError, match="no run in"):
        resumable_run(tmp_path, "latest")
    older = create_run(tmp_path, "head", mode="head-only")
    older.last.touch()
    assert resumable_run(tmp_path, "latest", full=False) == (older, older.last)
    newer = create_run(tmp_path, "head", mode="head-only")
    create_run(tmp_path, "full", mode="full")
    with pytest.raises(RunNotFoundError, match="is being trained at this moment") as error:
        resumable_run(tmp_path, "latest", full=False)
    assert str(newer.path) in str(error.value)
    newer.update(status="interrupted")
    with pytest.raises(RunNotFoundError, match="has no checkpoint yet") as error:
        resumable_run(tmp_path, "latest", full=False)
    for named in (newer.path, newer.path / "config.yaml", f"--resume {older.path}"):
        assert str(named) in str(error.value)


def dying(name: str, when: str, *files: str) -> int:
    run = create_run(Path("runs"), name, mode="head-only")
    for file in ("config.yaml", "split.csv", ".last_model.pt.1-ab.partial", *files):
        (run.path / file).touch()
    print(run.path, flush=True)
    if when == "early":
        os.kill(os.getpid(), signal.SIGKILL)
    with run.log_to_file():
        print(flush=True)
        if when == "late":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    return 0


def test_what_a_kill_left_before_the_first_checkpoint_is_removed_and_told(
    work: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def killed(name: str, when: str, *files: str) -> tuple[Path, Process]:
        (process,) = start(lambda: dying(name, when, *files), 1, work / name)
        path = Path(process.said(2 if when == "alive" else 1)[0])
        if when != "alive":
            process.wait()
        return path, process

    gone = [killed("early", "early")[0], killed("late", "late", "history.csv")[0]]
    kept = [
        killed("checkpoint", "late", "last_model.pt")[0],
        killed("numbered", "late", "checkpoint_epoch_1.pt")[0],
        killed("notes", "late", "my notes.txt")[0],
    ]
    alive, process = killed("alive", "alive")
    failed = create_run(Path("runs"), "failed")
    failed.update(status="failed", pid=2**22 + 1)
    elsewhere = create_run(Path("runs"), "elsewhere")
    elsewhere.update(host="another", pid=2**22 + 1)
    own = create_run(Path("runs"), "own")
    # A process of the same number, as in containers: the lock tells that the run is dead.
    Run(gone[1]).update(pid=os.getpid())
    try:
        with caplog.at_level("WARNING", logger="mirip_fast"):
            remove_runs_without_checkpoint(Path("runs"))
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not any(path.exists() for path in gone)
    assert all(p.exists() for p in (*kept, alive, failed.path, elsewhere.path, own.path))
    assert len(caplog.messages) == 2 and all(
        any(f"{path} was stopped before its first checkpoint" in m for m in caplog.messages)
        for path in gone
    )
    with caplog.at_level("WARNING", logger="mirip_fast"):
        remove_runs_without_checkpoint(Path("runs"))
    assert not alive.exists()
