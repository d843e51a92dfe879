"""The file of judgements: nothing is lost by kills, full disks, undo, second programs or strange names."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from made_tables import named_table

from mirip_fast.data.pair_files import read_pairs
from mirip_fast.errors import DataError, DiskFullError
from mirip_fast.label import judgement_file
from mirip_fast.label.judgement_file import COLUMNS, JudgementFile


def row(one: str, other: str, label: int = 1) -> dict[str, str]:
    return {
        "image_path_1": one, "image_path_2": other, "label": str(label),
        "time": "2026-01-02T03:04:05+09:00", "judge": "Kim", "seconds": "1.5", "kind": "teach",
        "predicted": "",
    }  # fmt: skip


def known(*names: str) -> pd.DataFrame:
    return named_table(Path("/works"), [*names])


def test_a_judgement_is_on_the_disk_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    write, fsync, cut = os.write, os.fsync, os.ftruncate
    monkeypatch.setattr(judgement_file.os, "write", lambda *a: done.append("write") or write(*a))
    monkeypatch.setattr(judgement_file.os, "fsync", lambda *a: done.append("fsync") or fsync(*a))
    monkeypatch.setattr(judgement_file.os, "ftruncate", lambda *a: done.append("cut") or cut(*a))
    with JudgementFile(tmp_path / "pairs.csv") as file:
        file.append(row("a.png", "b.png"))
        assert done[:2] == ["write", "fsync"]  # header and judgement at once
        done.clear()
        (last,) = file.append(row("b.png", "c.png"))
        assert done == ["write", "fsync"]
        done.clear()
        file.take_back(last)
        assert [what for what in done if what != "fsync"] == ["write", "cut"]
        assert done.index("fsync") < done.index("cut") and done[-1] == "fsync"


NAMES = (
    '<script>alert("x")</script>.png', 'quote".png', "comma,semicolon;.png", "line\nbreak.png",
    "return\r.png", "불꽃🔥.png", "=1+1.png", "-1.png", "tab\t.png", "a'b.png",
)  # fmt: skip


def test_hostile_names_come_back_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    for start in range(2):  # written in two sessions
        with JudgementFile(path) as file:
            for i in range(start, len(NAMES) - 1, 2):
                file.append(row(NAMES[i], NAMES[i + 1]))
    read = read_pairs([path], known(*NAMES), [Path("/works")])
    assert sorted(read[["one", "other"]].to_numpy().tolist()) == [
        [i, i + 1] for i in range(len(NAMES) - 1)
    ]


_KILLED = """
import sys
from pathlib import Path
from mirip_fast.label.judgement_file import JudgementFile
file = JudgementFile(Path(sys.argv[1]))
for i in range(100_000):
    file.append({"image_path_1": f"a\\n{i}.png", "image_path_2": "b.png", "label": "1", "judge": "x" * (i % 300)})
    print(i, flush=True)
"""


def test_a_kill_loses_no_judgement(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    for _ in range(3):
        before = path.read_bytes() if path.exists() else b""
        process = subprocess.Popen(
            [sys.executable, "-c", _KILLED, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(20)]
        process.send_signal(signal.SIGKILL)
        said += process.stdout.readlines()
        process.wait()
        process.stdout.close()
        acknowledged = int(said[-1]) + 1
        data = path.read_bytes()
        assert data.startswith(before)
        added = data[len(before) :].decode()
        assert added.count('.png",b.png,1,') >= acknowledged >= 20
    with JudgementFile(path) as file:  # the lock went with its holder
        assert file.rows and file.mended is None


@pytest.mark.parametrize("cut", [1, 2, 3, 9, 10, 20, 30, 38, 39])
def test_a_last_line_that_was_cut_short(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "pairs.csv"
    with JudgementFile(path) as file:
        file.append(row("a.png", "b.png"))
        whole = path.read_bytes()
        file.append(row("c\n.png", "d.png", -1))
    torn = path.read_bytes()[:-cut]
    path.write_bytes(torn)
    with JudgementFile(path) as file:
        if torn.count(b",") == 2 * (len(COLUMNS) - 1) + len(COLUMNS) - 1:  # every cell is there
            assert file.mended is None and path.read_bytes() == torn + b"\n"
        else:
            assert "cut short" in (file.mended or "")
            assert path.read_bytes() == whole
            assert file.aside.read_bytes().endswith(torn[len(whole) :] + b"\n")
        file.append(row("e.png", "f.png"))
    names = ("a.png", "b.png", "c\n.png", "d.png", "e.png", "f.png")
    assert read_pairs([path], known(*names), [Path("/works")]).label.iloc[-1] == 1


def test_a_file_made_by_hand_is_gone_on_from(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    text = "\ufefflabel;image_path_2;note;image_path_1\n1;b.png;nice;a.png"  # no end of line
    path.write_bytes(text.encode())
    with JudgementFile(path) as file:
        assert file.rows and file.mended is None
        file.append(row("b.png", "c.png", -1))
    assert path.read_text(encoding="utf-8") == text + "\n-1;c.png;;b.png\n"
    read = read_pairs([path], known("a.png", "b.png", "c.png"), [Path("/works")])
    assert read[["one", "other"]].to_numpy().tolist() == [[0, 1], [1, 2]]


@pytest.mark.parametrize(
    "text",
    ["image_id,tier\nx,S\n", "hello", "label\n1\n", "\x00\x01\x02", "image_path_1,label\na,1\n"],
)
def test_a_foreign_file_is_told_and_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"no column 'image_path_"):
        JudgementFile(path)
    assert path.read_text(encoding="utf-8") == text


def test_the_second_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    first = JudgementFile(path)
    first.append(row("a.png", "b.png"))
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"pairs.csv is in use: another .* --out"):
        JudgementFile(path)
    assert path.read_bytes() == before
    first.append(row("b.png", "c.png"))
    first.close()
    with JudgementFile(path) as second:
        assert second.rows


def test_taking_back(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    with JudgementFile(path) as file:
        file.append(row("a.png", "b.png"))
    earlier = path.read_bytes()
    with JudgementFile(path) as file:
        first, last = file.append(row("c\n.png", "d.png", -1), row("e.png", "f.png", 0))
        file.take_back(last)
        file.take_back(first)
        assert path.read_bytes() == earlier
        aside = file.aside.read_text(encoding="utf-8")
        assert aside.index("e.png,f.png,0") < aside.index('"c\n.png",d.png,-1')  # nothing is lost
        file.append(row("g.png", "h.png"))
    assert path.read_bytes().startswith(earlier) and path.read_bytes().count(b".png") == 4


def test_a_full_disk_leaves_no_half_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pairs.csv"
    with JudgementFile(path) as file:
        file.append(row("a.png", "b.png"))
        before, write = path.read_bytes(), os.write
        room = [10]

        def full(handle: int, data: bytes) -> int:
            if not room:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(handle, data[: room.pop()])

        monkeypatch.setattr(judgement_file.os, "write", full)
        with pytest.raises(DiskFullError):
            file.append(row("c.png", "d.png"))
        assert path.read_bytes() == before
        monkeypatch.undo()
        file.append(row("c.png", "d.png"))
    assert path.read_bytes().startswith(before + b"c.png,d.png,1,")


def test_a_file_that_others_touch_is_not_written_blindly(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    file = JudgementFile(path)
    file.append(row("a.png", "b.png"))
    with path.open("a", encoding="utf-8") as stream:
        stream.write("x.png,y.png,1,,,,,\n")
    with pytest.raises(DataError, match="changed by another program"):
        file.append(row("b.png", "c.png"))
    with pytest.raises(DataError, match="changed by another program"):
        file.take_back(1)  # it would cut off the other's row
    path.rename(tmp_path / "elsewhere.csv")
    with pytest.raises(DataError, match="moved, removed or replaced"):
        file.append(row("b.png", "c.png"))
    file.close()
