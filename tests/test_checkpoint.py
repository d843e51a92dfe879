"""Checkpoints: plain data, whole or not there, and never anything that runs."""

from __future__ import annotations

import errno
import os
import pickle
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import start

from mirip_fast.config import Config, EmbedConfig
from mirip_fast.errors import CheckpointError, DiskFullError
from mirip_fast.features.recipe import View
from mirip_fast.models.checkpoint import KEYS, load_checkpoint, save_checkpoint
from mirip_fast.models.head import RankingHead
from mirip_fast.models.model_info import ModelInfo

INFO = ModelInfo(
    fingerprint={"backbone": "abc", "image_size": 28, "mean": [0.1, 0.2, 0.3]},
    embed=EmbedConfig(backbone="some/model", tta="flip"),
    views=(View(28), View(28, True)),
    features="cls+mean",
    tiers=("금", "S"),
    input_dim=24,
)


def content(**more: Any) -> dict[str, Any]:
    head = RankingHead(24)
    return {
        "epoch": 3,
        "model_state_dict": head.state_dict(),
        "optimizer_state_dict": torch.optim.AdamW(head.parameters()).state_dict(),
        "scheduler_state_dict": {"last_epoch": 5},
        "best_accuracy": 0.75,
        "config": Config().to_dict(),
        "model": INFO.to_dict(),
        **more,
    }


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    saved = content()
    path = tmp_path / "new folder" / "best_model.pt"
    save_checkpoint(path, saved)
    loaded = torch.load(path, weights_only=True)
    assert set(loaded) == set(saved) >= set(KEYS)
    assert type(loaded["config"]) is dict and loaded["config"] == Config().to_dict()
    again = load_checkpoint(path)
    assert again["best_accuracy"] == 0.75 and again["epoch"] == 3
    for name, value in saved["model_state_dict"].items():
        assert torch.equal(again["model_state_dict"][name], value)
    assert ModelInfo.from_dict(again["model"]) == INFO
    assert [p.name for p in path.parent.iterdir()] == ["best_model.pt"]


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch executed",)


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle"])
def test_a_checkpoint_can_not_run_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pt"
    evil = content(epoch=Evil())
    if how == "pickle":
        path.write_bytes(pickle.dumps(evil, protocol=2))
    else:
        torch.save(evil, path, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(CheckpointError, match="plain data") as error:
        load_checkpoint(path)
    assert not (tmp_path / "executed").exists()
    assert "evil.pt" in str(error.value) and "weights_only" not in str(error.value)


def test_foreign_and_damaged_files_are_told(tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    for foreign in ({"state_dict": {}}, [1, 2], torch.zeros(3)):
        torch.save(foreign, path)
        with pytest.raises(CheckpointError, match=r"other\.pt is no mirip-fast checkpoint.*epoch"):
            load_checkpoint(path)
    save_checkpoint(path, content())
    data = path.read_bytes()
    for damage in (b"", b"image_id,filename\n", data[:100], data[: len(data) // 2]):
        path.write_bytes(damage)
        with pytest.raises(CheckpointError, match=r"other\.pt is no checkpoint"):
            load_checkpoint(path)
    with pytest.raises(CheckpointError, match="no such file"):
        load_checkpoint(tmp_path / "absent.pt")
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path)


@pytest.fixture
def saved(tmp_path: Path) -> Iterator[Path]:
    """A checkpoint that is still there, alone and unchanged, when the test ends."""
    path = tmp_path / "last_model.pt"
    save_checkpoint(path, content())
    before = path.read_bytes()
    yield path
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kib", [0, 300])
def test_a_full_disk_in_the_middle_leaves_the_old_one(saved: Path, kib: int) -> None:
    assert saved.stat().st_size > 400 << 10
    # The kernel itself refuses to let a file grow beyond the limit, in the midst of torch's writing.
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kib << 10, hard))
    try:
        with pytest.raises(DiskFullError, match=r"last_model\.pt"):
            save_checkpoint(saved, content())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_at_the_end_leaves_the_old_one(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(DiskFullError, match=r"last_model\.pt.*are free"):
        save_checkpoint(saved, content())


class Stopping:
    """Pickled into the file, it stops the writing as Ctrl-C does."""

    def __reduce__(self) -> tuple[object, ...]:
        raise KeyboardInterrupt


def test_ctrl_c_in_the_middle_leaves_the_old_one(saved: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(saved, content(epoch=Stopping()))


def test_a_folder_that_can_not_be_written_is_told_by_the_files_own_name(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file'?") as error:
        save_checkpoint(tmp_path / "file" / "best_model.pt", content())
    assert "partial" not in str(error.value)


def test_a_reader_never_sees_half_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last_model.pt"
    save_checkpoint(path, content())
    (writer,) = start(
        lambda: [save_checkpoint(path, content()) for _ in range(10**5)] and 0, 1, tmp_path
    )
    try:
        seen, changes = path.stat().st_mtime_ns, 0
        while changes < 5:
            load_checkpoint(path)
            changes += path.stat().st_mtime_ns != seen
            seen = path.stat().st_mtime_ns
    finally:
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
    load_checkpoint(path)  # killed in the midst of writing


@pytest.mark.parametrize(
    "change",
    [
        {"views": [[28]]}, {"views": None}, {"embed": {"image_size": "big"}},
        {"input_dim": None}, {"fingerprint": None}, {"tiers": None},
    ],
)  # fmt: skip
def test_a_head_that_does_not_say_what_it_expects(change: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="what its head expects"):
        ModelInfo.from_dict({**INFO.to_dict(), **change})
    for key in change:
        values = INFO.to_dict()
        del values[key]
        with pytest.raises(CheckpointError, match=key):
            ModelInfo.from_dict(values)
