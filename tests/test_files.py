"""Files that are made aside and put in place together."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from mirip_fast.errors import DiskFullError
from mirip_fast.files import move_files, scratch_folder


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
