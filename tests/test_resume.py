"""A training that was killed and resumed ends with the same weights, to the last bit.

``python tests/test_resume.py --kills 30`` kills at random moments instead, resumed runs too, and counts.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import signalled
from forked import start as start_forked
from mirip_fast_cli.main import run
from test_cli import TINY, make_data

from mirip_fast.ranking import fit

TRAIN = [
    "train",
    "--head-only",
    "--epochs",
    "24",
    "--batch-size",
    "8",
    "--early-stopping-patience",
    "0",
]

#: What a run may hold besides weights and optimizer: drawn pairs, averages, a column, judged pairs.
WAYS = {
    "all": [],
    "sampled, within, EMA": ["--pairs", "sampled", "--within", "department", "--ema-decay", "0.9"],
    "judged, accumulated, SWA": [
        *("--pairs", "pairs.csv", "--gradient-accumulation-steps", "3", "--swa-start", "10"),
        *("--train-ratio", "0.6", "--val-ratio", "0.2", "--test-ratio", "0.2"),
    ],
    "grades, logistic, within, EMA": [
        *("--label", "tier_score", "--within", "department"),
        *("--loss", "logistic", "--ema-decay", "0.99"),
        *("--early-stopping-patience", "12"),
    ],
}


def prepare(folder: Path) -> None:
    """A graded data set with finer grades and judged pairs, embedded with two views of each image."""
    make_data(folder / "data")
    table = folder / "data" / "metadata.csv"
    header, *lines = table.read_text(encoding="utf-8-sig").splitlines()
    rng = np.random.default_rng(0)
    graded = [f"{line},{4 - i % 4 + rng.integers(10) / 10}" for i, line in enumerate(lines)]
    table.write_text("\n".join([header + ",tier_score", *graded]) + "\n", encoding="utf-8")
    pairs = list(itertools.combinations(range(40), 2))[::3]
    judged = [f"id{i:02d},id{j:02d},{(j % 4 > i % 4) - (j % 4 < i % 4)}" for i, j in pairs]
    (folder / "pairs.csv").write_text("\n".join(["image_path_1,image_path_2,label", *judged]))
    assert run(["--quiet", "embed", "data", "--tta", "flip", *TINY]) == 0


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    return tmp_path


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    state = torch.load(folder / name, weights_only=True)["model_state_dict"]
    assert isinstance(state, dict)
    return state


def history(folder: Path) -> list[list[str]]:
    """Every epoch's values but the seconds it took."""
    rows = (folder / "history.csv").read_text().splitlines()
    return [line.split(",")[:-1] for line in rows]


def start(*arguments: str) -> subprocess.Popen[bytes]:
    """A command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "mirip_fast_cli", "--quiet", *arguments],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def assert_same(whole: Path, other: Path) -> None:
    from safetensors.numpy import load_file

    names = sorted(path.name for path in whole.glob("*.pt"))
    assert names == sorted(path.name for path in other.glob("*.pt"))
    for name in names:
        first, second = weights(whole, name), weights(other, name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), name
    assert history(whole) == history(other)
    first, second = (load_file(folder / "head.safetensors") for folder in (whole, other))
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert not list(other.glob(".*.partial"))


@pytest.mark.parametrize("way", WAYS)
def test_killed_and_resumed_equals_uninterrupted(
    work: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    options = WAYS[way]
    monkeypatch.setattr(fit, "_SAVE_SECONDS", 0.0)  # it goes on from the epoch before
    assert run(["--quiet", *TRAIN, *options, "--output-dir", "whole"]) == 0
    (whole,) = (work / "whole").iterdir()
    command = ["--quiet", *TRAIN, *options, "--output-dir", "killed"]
    code, _, err = signalled(lambda: run(command), work / "process", signal.SIGKILL, 13)
    assert code == -signal.SIGKILL, err
    assert run(["train", "--head-only", "--resume", "latest", "--output-dir", "killed"]) == 0
    assert_same(whole, next((work / "killed").iterdir()))


def test_resuming_a_finished_run_changes_nothing(work: Path) -> None:
    assert run(TRAIN) == 0
    (folder,) = (work / "runs").iterdir()
    before = weights(folder, "last_model.pt"), history(folder)
    assert run(["train", "--head-only", "--resume", str(folder)]) == 0
    after = weights(folder, "last_model.pt"), history(folder)
    assert all(torch.equal(before[0][key], after[0][key]) for key in before[0])
    assert before[1] == after[1]


def on_a_full_disk(command: list[str]) -> int:
    """The kernel lets no file grow from the fourth epoch on."""
    train_epoch = fit.HeadFit._train_epoch

    def until_full(self: fit.HeadFit, epoch: int) -> float:
        if epoch == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        return train_epoch(self, epoch)

    fit._SAVE_SECONDS, fit.HeadFit._train_epoch = 0.0, until_full  # type: ignore[method-assign]
    return run(command)


def test_a_full_disk_is_told_and_costs_nothing_that_was_saved(work: Path) -> None:
    assert run(["--quiet", *TRAIN, "--epochs", "8", "--output-dir", "whole"]) == 0
    command = [*TRAIN, "--epochs", "8", "--output-dir", "full"]
    (process,) = start_forked(lambda: on_a_full_disk(command), 1, work / "process")
    code, _, err = process.wait()
    assert code == 1
    error = err.splitlines()[-1]
    assert error.startswith("Error: No room to write full/") and "--resume latest" in error
    assert "Traceback" not in err
    (full,) = (work / "full").iterdir()
    assert torch.load(full / "last_model.pt", weights_only=True)["epoch"] == 3
    assert not list(full.glob(".*.partial"))
    assert run(["train", "--head-only", "--resume", "latest", "--output-dir", "full"]) == 0
    (whole,) = (work / "whole").iterdir()
    assert_same(whole, full)


def main() -> None:
    """Kill at random moments, until so many kills have been survived; print the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    wanted = parser.parse_args()
    dice = random.Random(wanted.seed)
    kills = early = runs = 0
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        work = Path(folder)
        prepare(work)
        whole = {}
        for way, options in WAYS.items():
            place = f"whole {len(whole)}"
            begun = time.monotonic()
            assert start(*TRAIN, *options, "--output-dir", place).wait() == 0
            (path,) = (work / place).iterdir()
            whole[way] = (path, time.monotonic() - begun)
        for number in itertools.count():
            if kills >= wanted.kills:
                break
            way = list(WAYS)[number % len(WAYS)]
            place = work / f"killed {number}"
            command = [*TRAIN, *WAYS[way]]
            while True:
                process = start(*command, "--output-dir", str(place))
                try:
                    code = process.wait(dice.uniform(0, whole[way][1]))
                except subprocess.TimeoutExpired:
                    process.kill()
                    code = process.wait()
                if code == 0:
                    break
                assert code == -signal.SIGKILL, f"{way}: ended with {code}"
                kills += 1
                if list(place.glob("*/last_model.pt")):
                    command = ["train", "--head-only", "--resume", "latest"]
                else:
                    early += 1  # nothing to go on from yet
                if kills >= wanted.kills:  # let it end
                    assert start(*command, "--output-dir", str(place)).wait() == 0
                    break
            (ended,) = [path.parent for path in place.glob("*/head.safetensors")]
            assert_same(whole[way][0], ended)
            runs += 1
            print(f"{kills} kills, {runs} runs, the same bits", flush=True)
    print(
        f"{kills} kills at random moments ({early} before the first checkpoint) in {runs} runs: every "
        "run ended with the weights and the history of an uninterrupted one"
    )


if __name__ == "__main__":
    main()
