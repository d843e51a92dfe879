"""Runs are found again, the newest first."""

from __future__ import annotations

from pathlib import Path

from mirip_fast.training.run_folder import create_run, find_runs


def test_the_later_of_two_runs_of_one_second_is_the_newest(tmp_path: Path) -> None:
    names = ["head", "full", "zero", "all", "full"]  # in no order that their names would give
    runs = [create_run(tmp_path, name, mode="head-only") for name in names]
    assert [run.path for run in find_runs(tmp_path)] == [run.path for run in reversed(runs)]
