"""Files that are made aside and put in place together."""

from __future__ import annotations

import codecs
import errno
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

import pytest

from mirip_fast.errors import DiskFullError
from mirip_fast.files import (
    move_files,
    partial_path,
    read_csv,
    read_json,
    remove_abandoned_folders,
    scratch_folder,
    temporary_folder,
    write_atomically,
    write_csv,
    write_json,
)


def test_finished_files_are_put_in_place(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with scratch_folder(out, "export") as folder:
        assert folder.parent == out and folder.name.startswith(".export-")
        (folder / "b").write_text("new")
        (folder / "a").write_text("new")
        (out / "b").write_text("old")
        assert move_files(folder, out) == [out / "a", out / "b"]
    assert [path.name for path in sorted(out.iterdir())] == ["a", "b"]
    assert (out / "b").read_text() == "new"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "no room"), DiskFullError),
        (PermissionError(errno.EACCES, "no"), PermissionError),
        (ValueError("x"), ValueError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_nothing_is_left_of_what_failed(
    tmp_path: Path, error: BaseException, expected: type[BaseException]
) -> None:
    (tmp_path / "kept").write_text("old")
    with pytest.raises(expected) as caught, scratch_folder(tmp_path, "export") as folder:
        (folder / "kept").write_text("half")
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept").read_text() == "old"
    if expected is DiskFullError:
        assert str(tmp_path) in str(caught.value)


def test_no_two_temporary_files_have_one_name(tmp_path: Path) -> None:
    names = {partial_path(tmp_path / "store.json").name for _ in range(100)}
    assert len(names) == 100
    assert all(n.startswith(".store.json.") and n.endswith(".partial") for n in names)


def test_one_writer_does_not_see_the_other_ones_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks on several machines may have equal process ids. Step by step: the second writes and is done while the first is in the middle of its file."""
    monkeypatch.setattr(os, "getpid", lambda: 77)
    path = tmp_path / "canary.json"

    def first(stream: IO[bytes]) -> None:
        stream.write(b'{"who": ')
        stream.flush()
        write_json(path, {"who": "second"})
        assert read_json(path) == {"who": "second"}
        stream.write(b'"first"}')

    write_atomically(path, first)
    assert json.loads(path.read_text()) == {"who": "first"}


@pytest.mark.parametrize("where", ["open", "replace"])
def test_what_can_not_be_written_is_told_by_its_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """On a read-only disk even deleting the file that was never made is an error; it must not hide the first."""

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, where, refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    path = tmp_path / "manifest.csv"
    with pytest.raises(OSError, match="Read-only") as caught:
        write_json(path, {})
    assert caught.value.errno == errno.EROFS and caught.value.filename == str(path)


def test_tables_are_read_with_and_without_a_byte_order_mark_and_never_in_part(
    tmp_path: Path,
) -> None:
    path = tmp_path / "t.csv"
    write_csv(path, ["이름", "b"], [{"이름": "그림\n, 1", "b": None}])
    data = path.read_bytes()
    assert data.startswith(codecs.BOM_UTF8)
    for written in (data, data.removeprefix(codecs.BOM_UTF8)):
        path.write_bytes(written)
        assert read_csv(path) == [{"이름": "그림\n, 1", "b": ""}]
    for damaged in (b"", data[:-3], data[:-4], data + b"x,y,z\r\n"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"empty|value per column|no CSV|cut short"):
            read_csv(path)


def test_the_next_process_removes_what_a_killed_one_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = (
        "import time; from mirip_fast.files import temporary_folder\n"
        "with temporary_folder() as folder:\n"
        "    (folder / 'images').mkdir(); print(folder, flush=True); time.sleep(60)"
    )
    killed = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert killed.stdout is not None
    left = Path(killed.stdout.readline().strip())
    (tmp_path / "mirip-fast-mine").mkdir()  # somebody else's, as far as is known
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / ".owner").touch()
    (tmp_path / "mirip-fast-link").symlink_to("outside")
    with temporary_folder() as own:
        assert left.is_dir()  # its owner lives
        killed.kill()
        killed.communicate()
        remove_abandoned_folders()
        assert own.is_dir() and not left.exists()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"mirip-fast-mine", "outside", "mirip-fast-link"}
    assert (tmp_path / "outside" / ".owner").exists()
