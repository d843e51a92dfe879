"""A run's folder: its configuration, log, history, checkpoints, and whether it finished.

``run.json`` says what the run is and its status; everything else is named in the README of the project.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import itertools
import logging
import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from mirip_fast.config import DataConfig
from mirip_fast.errors import CheckpointError, PreemptedError, RunNotFoundError
from mirip_fast.files import (
    LIST_FILE,
    damaged_files,
    disk_full,
    fsync_folder,
    has_file,
    is_disk_full,
    list_files,
    open_regular,
    read_file,
    read_json,
    remove_files,
    try_lock,
    write_json,
    write_text,
)
from mirip_fast.settings import config_from_dict

BEST = "best_model.pt"
LAST = "last_model.pt"
ENSEMBLE = "ensemble.safetensors"
PROCESS = "gp.safetensors"
RUN_FILE = "run.json"
SPLIT_FILE = "split.csv"
FOLDS_FILE = "folds.json"
IN_USE_FILE = "in_use"  # beside the runs: the name of the one that commands take

_ANOTHER_IN_USE = (
    "`mirip-fast use RUN` names another, `mirip-fast use --newest` goes back to the newest"
)

_LOG = "train.log"
#: What a run's folder holds before there is a checkpoint.
_FIRST_FILES = {
    LIST_FILE,
    RUN_FILE,
    SPLIT_FILE,
    _LOG,
    "config.yaml",
    "history.csv",
    "pairs.csv",
    "files.json",
}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A folder below ``runs/``."""

    path: Path

    @property
    def info(self) -> dict[str, Any]:
        """The content of run.json (empty where there is none: a checkpoint that lies elsewhere).

        Raises:
            CheckpointError: it is damaged, or gone.
        """
        path = self.path / RUN_FILE
        try:
            return read_json(path) if self.has(RUN_FILE) else {}
        except CheckpointError:
            raise
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error

    @property
    def data(self) -> DataConfig:
        """How the images that the run learned from are read."""
        return config_from_dict({"data": self.info.get("data", {})}).data

    def has(self, name: str) -> bool:
        """Whether the run has this file.

        Raises:
            CheckpointError: it had it, and it is gone.
        """
        try:
            return has_file(self.path / name)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path / name} cannot be read: {error}") from error

    def update(self, **values: Any) -> None:
        """Change entries of run.json."""
        write_json(self.path / RUN_FILE, {**self.info, **values})

    @property
    def best(self) -> Path:
        """Checkpoint with the best validation accuracy; what the run ends with."""
        return self.path / BEST

    @property
    def last(self) -> Path:
        """Checkpoint of the last finished epoch; what resuming starts from."""
        return self.path / LAST

    @property
    def model(self) -> Path:
        """What scores with this run: its ensemble, its Gaussian process, or its best checkpoint.

        Raises:
            CheckpointError: it is gone.
        """
        for name in (ENSEMBLE, PROCESS):
            if self.has(name):
                return self.path / name
        self.has(BEST)
        return self.best

    @property
    def has_folds(self) -> bool:
        """Whether it is a run of several folds, each a run of its own below it."""
        return self.has(FOLDS_FILE)

    @property
    def title(self) -> str:
        """A name that no other run has, to report it under."""
        return self.place.replace("/", "-")

    @property
    def place(self) -> str:
        """Where its files go in a folder of several runs: a fold's below the run that it is part of."""
        parent = Run(self.path.parent)
        return f"{parent.path.name}/{self.path.name}" if parent.has_folds else self.path.name

    def small_files(self) -> dict[str, Path]:
        """Its files but for checkpoints, logs and pictures, with those of the run that it is a fold of, by
        their places: what resuming needs besides a checkpoint. Without files.json, as not all may be copied.
        """
        runs = [self, Run(self.path.parent)] if "/" in self.place else [self]
        return {
            f"{run.place}/{file.name}": file
            for run in runs
            for file in sorted(run.path.iterdir())
            if file.suffix in (".json", ".csv", ".yaml", ".safetensors")
            and file.name != LIST_FILE
            and not file.name.startswith(".")
        }

    @property
    def is_alive(self) -> bool:
        """Whether a process works on it at this moment; True where this machine cannot tell.

        The system frees the lock of train.log when its holder dies. Before there is one, the process's number
        must do.
        """
        pid, host = self.info.get("pid"), self.info.get("host")
        if host not in (None, socket.gethostname()) or not isinstance(pid, int) or os.name == "nt":
            return True
        if host is not None and (self.path / _LOG).is_file():
            with (self.path / _LOG).open("rb") as stream:
                return not try_lock(stream.fileno())
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except (OSError, OverflowError):
            pass
        return True

    @contextlib.contextmanager
    def in_progress(self) -> Iterator[None]:
        """Inside, its status is running; an error makes it failed or interrupted, with the reason."""
        self.update(status="running")
        try:
            yield
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt | PreemptedError)
            with contextlib.suppress(OSError):  # a full disk: the first error is the one to tell
                self.update(status="interrupted" if stopped else "failed", reason=str(error))
            raise

    @contextlib.contextmanager
    def log_to_file(self) -> Iterator[None]:
        """Inside, the package's log lines are copied, with time stamps, to train.log."""
        stream = _appending(self.path / _LOG)
        try_lock(stream.fileno())  # says that the run is alive
        handler = logging.StreamHandler(stream)
        handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s"))
        # On a full disk the log is cut short; the run goes on, or says itself why it cannot.
        handler.handleError = lambda record: None  # type: ignore[method-assign]
        logger = logging.getLogger("mirip_fast")
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            with contextlib.suppress(OSError):
                stream.close()

    def append_history(self, row: Mapping[str, object]) -> None:
        """Append one epoch to history.csv.

        Raises:
            DiskFullError: there is no room.
        """
        path = self.path / "history.csv"
        new = not path.exists()
        try:
            with _appending(path) as stream:
                writer = csv.DictWriter(stream, list(row))
                if new:
                    writer.writeheader()
                writer.writerow(row)
        except OSError as error:
            if is_disk_full(error):
                raise disk_full(path) from error
            raise

    def sync_history(self) -> None:
        """Make the rows of history.csv survive a power loss."""
        path = self.path / "history.csv"
        if path.exists():
            with _appending(path) as stream:
                os.fsync(stream.fileno())

    def history(self) -> list[dict[str, str]]:
        """The rows of history.csv so far, up to the first one that a full disk or a power loss spoiled.

        Raises:
            CheckpointError: it cannot be read.
        """
        path = self.path / "history.csv"
        if not path.exists():
            return []
        rows: list[dict[str, str]] = []
        try:
            lines = read_file(path).decode("utf-8", "replace").splitlines()
            for row in csv.DictReader(lines):
                if None in row or None in row.values() or not row.get("epoch", "").isdecimal():
                    break
                rows.append(row)
        except csv.Error:
            pass  # a zero byte
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        return rows

    def truncate_history(self, epochs: int) -> None:
        """Drop the rows after ``epochs``: they were written after the checkpoint that is resumed.

        Raises:
            CheckpointError: rows before that are damaged.
        """
        path, rows = self.path / "history.csv", self.history()
        if path.exists() and max([0, *(int(row["epoch"]) for row in rows)]) < epochs:
            raise CheckpointError(
                f"{path} is damaged: it does not reach epoch {epochs}, which the checkpoint is of. It only "
                "holds the learning curves: put back a good copy, or remove it, and they begin anew."
            )
        rows = [row for row in rows if int(row["epoch"]) <= epochs]
        if not rows:
            path.unlink(missing_ok=True)
            return
        lines = [",".join(rows[0])] + [",".join(row.values()) for row in rows]
        write_text(path, "\r\n".join(lines) + "\r\n")

    def remove_partial_files(self) -> None:
        """Remove files that a killed run had not finished writing."""
        for partial in self.path.glob(".*.partial"):
            partial.unlink(missing_ok=True)

    def prune_checkpoints(self, keep: int) -> None:
        """Remove all numbered checkpoints but the last ``keep``."""
        numbered = sorted(self.path.glob("checkpoint_epoch_*.pt"), key=_epoch_of)
        remove_files(self.path, [old.name for old in numbered[:-keep]])


def _appending(path: Path) -> IO[str]:
    """A text file that grows, made if there is none.

    Raises:
        CheckpointError: there is something else of that name.
    """
    try:
        handle = open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error
    return os.fdopen(handle, "a", encoding="utf-8", newline="")


def create_folder(output_dir: Path, name: str) -> Path:
    """Make ``<output_dir>/<time>-<name>/``, which nothing else has."""
    clean = "".join(c if c.isalnum() or c in "-_." else "-" for c in name) or "run"
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    for attempt in itertools.count(1):
        path = output_dir / f"{stamp}-{clean}{'' if attempt == 1 else f'-{attempt}'}"
        try:
            path.mkdir(parents=True)
            break
        except FileExistsError:
            continue  # two in the same second
    fsync_folder(output_dir)
    return path


def create_run(output_dir: Path, name: str, **info: Any) -> Run:
    """Make ``<output_dir>/<time>-<name>/``, with status running."""
    run = Run(create_folder(output_dir, name))
    list_files(run.path)
    started = datetime.now().astimezone().isoformat(timespec="microseconds")
    run.update(name=name, status="running", started=started, **_process(), **info)
    return run


def _process() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname()}


def remove_runs_without_checkpoint(output_dir: Path) -> None:
    """Remove what trainings left that were stopped before their first checkpoint, and tell it.

    Only folders of dead trainings are, and only where nothing is in them but what each begins with.
    """
    for run in find_runs(output_dir):
        try:
            status = run.info.get("status")
        except CheckpointError:
            continue  # a damaged one is told where it is asked for
        if status not in ("running", "interrupted"):
            continue  # of one that failed the log says why
        names = {path.name for path in run.path.iterdir() if not path.name.endswith(".partial")}
        if names <= _FIRST_FILES and not run.is_alive:
            log.warning(
                "%s was stopped before its first checkpoint, and nothing can go on from it: removed",
                run.path,
            )
            shutil.rmtree(run.path, ignore_errors=True)


def find_runs(output_dir: Path) -> list[Run]:
    """Every run below ``output_dir``, the newest first."""
    if not output_dir.is_dir():
        return []
    runs = [Run(path) for path in output_dir.iterdir() if is_run(path)]
    return sorted(runs, key=lambda run: (_started(run), run.path.name), reverse=True)


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run, be it a damaged one."""
    try:
        return Run(folder).has(RUN_FILE)
    except CheckpointError:
        return True


def run_folders(output_dir: Path) -> list[Path]:
    """The folders of all runs below ``output_dir``, damaged ones too, by name.

    Raises:
        RunNotFoundError: there is none.
    """
    found = sorted(run.path for run in find_runs(output_dir))
    if not found:
        raise RunNotFoundError(f"No run in {output_dir.resolve()}: name one, or give --output-dir")
    return found


def verify_run(folder: Path) -> dict[Path, tuple[int, list[str]]]:
    """Compare the files of a run, of its folds and of fine-tuned backbones with their lists.

    Returns:
        Folder → how many files its list has (0: there is no list) and what is wrong, a sentence each.

    Raises:
        RunNotFoundError: there is no such folder.
    """
    if not folder.is_dir():
        raise RunNotFoundError(f"{folder}: there is no such run")
    _require_run(folder)
    parts = [folder, *(path.parent for path in sorted(folder.glob(f"*/{LIST_FILE}")))]
    return {part: damaged_files(part) for part in parts}


def _require_run(folder: Path) -> None:
    if not is_run(folder) and not (folder / LIST_FILE).exists():
        raise RunNotFoundError(f"{folder} is no folder of a run: it has no {RUN_FILE}")


def accept_files(folder: Path) -> None:
    """List the files of a run, and of its folds, as they are now.

    Raises:
        RunNotFoundError: there is no such folder.
    """
    if folder.is_dir():
        _require_run(folder)
    for part in [folder, *(path.parent for path in folder.glob(f"*/{RUN_FILE}"))]:
        if not part.is_dir():
            raise RunNotFoundError(f"{folder}: there is no such run")
        list_files(part)


def _started(run: Run) -> datetime:
    """When a run began; of one whose run.json is damaged by its name, so that it is met in its turn."""
    with contextlib.suppress(ValueError):  # a CheckpointError, too
        return datetime.fromisoformat(str(run.info.get("started"))).astimezone()
    with contextlib.suppress(ValueError):
        return datetime.strptime(run.path.name[:15], "%Y%m%d-%H%M%S").astimezone()
    return datetime.fromtimestamp(run.path.stat().st_mtime).astimezone()


def run_in_use(output_dir: Path) -> Run | None:
    """The run that :func:`use_run` named; None where none is named.

    Raises:
        RunNotFoundError: it is gone.
        CheckpointError: its name cannot be read.
    """
    path = output_dir / IN_USE_FILE
    try:
        name = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. {_ANOTHER_IN_USE}") from error
    if not name:
        return None
    if Path(name).name != name or not is_run(output_dir / name):
        raise RunNotFoundError(f"{path} names {name}, which is no run there. {_ANOTHER_IN_USE}")
    return Run(output_dir / name)


def use_run(output_dir: Path, folder: Path | None) -> None:
    """Have commands take this run, until another is named, where none is named to them.

    Args:
        output_dir: folder of the runs.
        folder: the run; None goes back to the newest finished one.

    Raises:
        RunNotFoundError: there is no such run in ``output_dir``, or it is a trial or not finished.
    """
    path = output_dir / IN_USE_FILE
    if folder is None:
        path.unlink(missing_ok=True)
        return
    run, _ = run_of_checkpoint(folder if folder.exists() else output_dir / folder)
    if run.path.resolve().parent != output_dir.resolve():
        raise RunNotFoundError(
            f"{folder} is not in {output_dir.resolve()}: only a run there can be the one in use. Name it "
            "with --checkpoint, or its folder of runs with --output-dir"
        )
    if run.info.get("debug") or run.info.get("status") != "finished":
        what = "a trial" if run.info.get("debug") else run.info.get("status", "not finished")
        raise RunNotFoundError(f"{run.path} is {what}: only a finished run can be the one in use")
    write_text(path, f"{run.path.resolve().name}\n")


def default_run(output_dir: Path) -> Run:
    """The run in use, else the newest finished one that is no trial and has a model.

    Raises:
        RunNotFoundError: there is none; says what there is and what to type.
        CheckpointError: a newer one is damaged.
    """
    if used := run_in_use(output_dir):
        return used
    runs = find_runs(output_dir)
    for run in runs:
        info = run.info
        if info.get("status") == "finished" and not info.get("debug"):
            if not run.model.exists():
                raise CheckpointError(
                    f"{run.path} is finished, but {run.model} is gone. Put it back, or name another model "
                    "with --checkpoint RUN."
                )
            return run
    if not runs:
        raise RunNotFoundError(
            f"No trained model in {output_dir.resolve()}: run `mirip-fast train --head-only` first, "
            "or name one with --checkpoint FILE."
        )
    states = ", ".join(
        f"{run.path.name} ({'trial' if run.info.get('debug') else run.info.get('status', '?')})"
        for run in runs[:5]
    )
    raise RunNotFoundError(
        f"No finished run in {output_dir.resolve()}; there are {states}. Finish one with "
        "`mirip-fast train --head-only --resume latest`, or name a model with --checkpoint FILE."
    )


def run_of_checkpoint(path: Path) -> tuple[Run, Path]:
    """The run and model file that a command names: a run's folder, a .pt file or an ensemble.

    Raises:
        RunNotFoundError: neither.
    """
    if path.is_dir():
        run = Run(path)
        if not run.model.is_file():
            raise RunNotFoundError(f"{path}: the folder has no {BEST} or {ENSEMBLE}")
        return run, run.model
    if not path.is_file():
        there = [run.path.name for run in find_runs(path.parent)]
        close = difflib.get_close_matches(path.name, there, 1)
        hint = f"Did you mean {path.parent / close[0]}?" if close else _newest(path.parent, there)
        raise RunNotFoundError(f"{path}: there is no such run or model file. {hint}")
    return Run(path.parent), path


def _newest(folder: Path, names: Sequence[str]) -> str:
    if not names:
        return "Runs are made by `mirip-fast train`, in the folder runs/."
    return f"The newest in {folder}: {', '.join(names[:3])}."


def resumable_run(output_dir: Path, which: str, *, full: bool | None = None) -> tuple[Run, Path]:
    """The run and checkpoint to go on from; a run of folds, which has no checkpoint of its own, with one
    that does not exist.

    Args:
        output_dir: folder of the runs.
        which: ``latest`` (the newest run, never an older one in its place), a run's folder or a checkpoint.
        full: whether ``latest`` looks for end-to-end runs or for others; None for any.

    Raises:
        RunNotFoundError: nothing to resume.
    """
    if which == "latest":
        runs = [
            run
            for run in find_runs(output_dir)
            if full is None or (run.info.get("mode") == "full") == full
        ]
        resumable = [run for run in runs if run.last.is_file() or run.has_folds]
        if runs and runs[0] not in resumable:
            raise RunNotFoundError(_newest_has_no_checkpoint(runs[0], resumable))
        if not resumable:
            raise RunNotFoundError(
                f"--resume latest: no run in {output_dir.resolve()} has a {LAST}"
            )
        return resumable[0], resumable[0].last
    path = Path(which)
    run = Run(path if path.is_dir() else path.parent)
    checkpoint = run.last if path.is_dir() else path
    if not checkpoint.is_file() and not run.has_folds:
        raise RunNotFoundError(f"--resume {which}: there is no {checkpoint}")
    return run, checkpoint


def _newest_has_no_checkpoint(newest: Run, resumable: list[Run]) -> str:
    text = f"--resume latest: the newest run, {newest.path}, has no checkpoint yet"
    if newest.info.get("status") == "finished":
        text = (
            f"--resume latest: the newest run, {newest.path}, is finished and keeps no checkpoint"
        )
    elif newest.info.get("status") == "running" and newest.is_alive:
        text += ": it is being trained at this moment, wait for it"
    else:
        text += (
            f" (status {newest.info.get('status', 'unknown')}): nothing can go on from it. Start it again "
            f"with the command that began it (its settings: --config {newest.path / 'config.yaml'})"
        )
    if resumable:
        text += f", or go on with the newest that has one: --resume {resumable[0].path}"
    return text


def fold_name(fold: int) -> str:
    """Folder of a fold's own run, below the run with folds."""
    return f"fold_{fold}"


def _epoch_of(path: Path) -> int:
    digits = path.stem.rpartition("_")[2]
    return int(digits) if digits.isdigit() else -1
