"""A damaged file of a run is an error that names it, in every command; never another score in silence."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from made_run import make_runs, spoil
from mirip_fast_cli.main import run

from mirip_fast.files import LIST_FILE, list_files, listed_files, read_json, write_json


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_runs(folder)
    return folder


@pytest.fixture
def work(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def the_run(number: int) -> Path:
    return next(Path(f"runs{number}").iterdir())


@pytest.mark.parametrize("number", range(3))
def test_no_damage_of_a_file_changes_an_answer_in_silence(work: Path, number: int) -> None:
    failures: list[str] = []
    count = 0

    def told(failure: str | None) -> None:
        nonlocal count
        count += 1
        failures.extend([failure] if failure else [])

    spoil(the_run(number), 2, number, told)
    assert failures == [] and count > 50


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def gone(path: Path) -> None:
    path.unlink()


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


RANK = ["rank", "data/images", "--checkpoint", "{run}", "--tiers"]
RESUME = ["train", "--head-only", "--resume", "{run}"]
#: A file → how it is damaged and the command that reads it.
READERS = {
    "best_model.pt": (emptied, ["evaluate", "{run}"]),
    "head.safetensors": (
        flipped,
        ["compare", "data/images/work_01.png", "data/images/work_02.png"],
    ),
    "calibration.json": (flipped, RANK),
    "anchors.json": (a_pipe, RANK),
    "split.csv": (emptied, RESUME),
    "last_model.pt": (flipped, RESUME),
    "run.json": (a_pipe, ["rank", "data/images"]),
    "held_out.csv": (gone, [*RANK, "--anchors", "3"]),
}


@pytest.mark.parametrize("name", READERS)
def test_every_command_names_the_file(
    work: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = the_run(0).rename("runs0/20990101-000000-head")
    spoil_file, typed = READERS[name]
    spoil_file(folder / name)
    words = [word.format(run=folder) for word in typed]
    newest = [] if "{run}" in typed else ["--output-dir", "runs0"]
    assert run(["--quiet", *words, *newest]) == 1
    err = capfd.readouterr().err
    assert name in err and "fault of mirip-fast" not in err
    assert run(["--quiet", "verify", str(folder)]) == 1
    assert f"Damaged: {folder / name}" in capfd.readouterr().out


def test_verify_tells_and_accept_takes_what_is_meant_to_be_so(
    work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = the_run(1)
    assert run(["verify", "--output-dir", "runs1"]) == 0
    assert capfd.readouterr().out.count("whole") == 3  # two folds
    with (folder / "fold_1" / "run.json").open("a") as stream:
        stream.write("\n")
    (folder / "calibration.json").unlink()
    assert run(["verify", str(folder)]) == 1
    out = capfd.readouterr().out
    assert "fold_1/run.json" in out and "calibration.json" in out and "--accept" in out
    assert run(["verify", "--accept", str(folder)]) == 0
    assert run(["--quiet", "rank", "data/images", "--checkpoint", str(folder)]) == 0
    assert "Probabilities unknown" in capfd.readouterr().out.replace(
        "0-100 and tiers", "Probabilities"
    )
    assert run(["verify", "--accept"]) == 2 and run(["verify", "runs9"]) == 1


def test_a_folder_that_is_no_run_is_not_taken_for_one(tmp_path: Path) -> None:
    assert run(["verify", str(tmp_path)]) == 1
    assert run(["verify", "--accept", str(tmp_path)]) == 1
    assert not list(tmp_path.iterdir())


def test_runs_without_a_list_are_read_as_they_are(
    work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = the_run(0)
    (folder / LIST_FILE).unlink()
    (folder / "calibration.json").unlink()
    assert run(["--quiet", "rank", "data/images", "--checkpoint", str(folder)]) == 0
    assert run(["verify", str(folder)]) == 0
    assert "no checksums" in capfd.readouterr().out
    held_out = folder / "held_out.csv"
    held_out.write_bytes(held_out.read_bytes()[:-9])
    assert run(["--quiet", *(w.format(run=folder) for w in READERS["held_out.csv"][1])]) == 1
    assert "held_out.csv cannot be read: its last line is cut short" in capfd.readouterr().err


def test_a_damaged_history_is_named_and_its_end_may_be_lost(
    work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = the_run(0)
    words = [word.format(run=folder) for word in RESUME]
    history = folder / "history.csv"
    whole = history.read_bytes()
    history.write_bytes(whole + bytes(100))  # what a power loss leaves
    assert run(["--quiet", *words]) == 0 and history.read_bytes() == whole
    history.write_bytes(whole[:-90] + bytes(90))
    assert run(["--quiet", *words]) == 1
    assert "history.csv" in capfd.readouterr().err
    history.unlink()
    assert run(["--quiet", *words]) == 0


RANKED = """
import sys
from mirip_fast_cli.main import run
for n in range(4):
    tiers = ["--tiers", "--anchors", "5"] if n == 0 else []
    rank = ["-q", "rank", "data/images", "--anyway", "--html", "page.html"]
    assert run([*rank, "--output-dir", f"runs{n}", *tiers]) == 0
heavy = {"torch", "transformers", "scipy.stats", "scipy.optimize", "matplotlib", "sklearn", "faiss"}
sys.exit(", ".join(heavy & set(sys.modules)))
"""


def test_cached_works_are_ranked_without_torch(work: Path) -> None:
    """By a head, an ensemble of folds, judged pairs and a Gaussian process; with win rates and a page."""
    assert run(["-q", "train", "--head-only", "--output-dir", "runs3"]) == 0
    assert list(Path("runs3").glob("*/gp.safetensors"))
    done = subprocess.run(
        [sys.executable, "-c", RANKED], capture_output=True, text=True, check=False
    )
    assert done.stderr.strip() == "" and "Win rates: compared with S 5" in done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("replaced", [False, True])
def test_a_kill_at_any_moment_leaves_a_file_that_can_be_read(
    tmp_path: Path, replaced: bool
) -> None:
    """The child dies at the n-th call that changes the disk, for every n; then again after that."""
    list_files(tmp_path)
    path = tmp_path / "run.json"
    if replaced:
        write_json(path, {"value": 0})
    seen = set()
    for step in range(22):
        again = step % 2  # a second kill, where the first one left the list undecided
        status = [_killed_at(step // 2, path, value) for value in range(1, 2 + again)]
        if path.exists() or replaced:
            seen.add(read_json(path)["value"])
    assert status == [0, 0] and seen == ({0, 1, 2} if replaced else {1, 2})
    assert len(listed_files(tmp_path)["run.json"]) == 1
    assert not [name for name in listed_files(tmp_path) if name != "run.json"]


def _killed_at(step: int, path: Path, value: int) -> int:
    pid = os.fork()
    if pid == 0:
        left = step

        def counted(real: Callable[..., object]) -> Callable[..., object]:
            def call(*given: object, **named: object) -> object:
                nonlocal left
                if not left:
                    os._exit(9)
                left -= 1
                return real(*given, **named)

            return call

        os.fsync = counted(os.fsync)  # type: ignore[assignment]
        Path.replace = counted(Path.replace)  # type: ignore[assignment,method-assign]
        try:
            write_json(path, {"value": value})
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_two_processes_may_write_one_file_at_once(tmp_path: Path) -> None:
    list_files(tmp_path)
    path = tmp_path / "anchors.json"
    children = []
    for value in range(4):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                for _ in range(10):
                    write_json(path, {"value": value})
                    read_json(path)
                status = 0
            finally:
                os._exit(status)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 4
    assert read_json(path)["value"] in range(4) and len(listed_files(tmp_path)["anchors.json"]) == 1


def test_a_full_disk_leaves_the_old_file_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list_files(tmp_path)
    path = tmp_path / "run.json"
    write_json(path, {"value": 0})
    real = os.fsync
    for room in range(8):
        left = room

        def sync(handle: int) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(errno.ENOSPC, "full")
            real(handle)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", sync)
            try:
                write_json(path, {"value": room + 1})
            except OSError as error:
                assert "No room" in str(error)
        assert read_json(path)["value"] in range(room + 2)
