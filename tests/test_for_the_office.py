"""What `rank` hands on: the workbook, folders by tier, sidecars; and that folders are undone without a loss."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openpyxl
import pandas as pd
import pytest
from made_run import TINY, Restored, rows_of
from made_tars import make_tar
from mirip_fast_cli.main import run
from PIL import Image

from mirip_fast.config import Config
from mirip_fast.data.spreadsheets import read_table
from mirip_fast.portfolio.xlsx import write_workbook

Held = dict[str, str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Restored:
    train = [
        "train",
        "--head-only",
        "--train-ratio",
        "0.5",
        "--val-ratio",
        "0.4",
        "--test-ratio",
        "0.1",
    ]
    return Restored(tmp_path_factory.mktemp("office"), 40, ["embed", "data", *TINY], train)


@pytest.fixture
def office(made: Restored, monkeypatch: pytest.MonkeyPatch) -> Path:
    return made(monkeypatch)


RANK = ["rank", "data", "--workers", "0"]


def held(folder: Path) -> Held:
    """Name → content of all pictures below a folder."""
    files = sorted(p for p in folder.rglob("*") if p.suffix == ".png" and not p.is_symlink())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_the_workbook_holds_the_ranking(office: Path) -> None:
    assert run([*RANK, "--xlsx", "r.xlsx", "--sheets-by", "department"]) == 0
    book = openpyxl.load_workbook("r.xlsx")
    rows = rows_of(Path("ranking.csv"))
    assert set(book.sheetnames[1:]) == {row["department"] for row in rows} == {"회화", "조소"}
    sheet = book["ranking"]
    head = [cell.value for cell in sheet[1]]
    assert sheet.freeze_panes == "C2" and sheet.auto_filter.ref.endswith(f"{len(rows) + 1}")
    assert [r[head.index("file")].value for r in sheet.iter_rows(min_row=2)] == [
        r["file"] for r in rows
    ]
    assert len(sheet._images) == len(rows) == sum(len(book[s]._images) for s in ("회화", "조소"))
    tiers = {r[head.index("tier")].value: r[head.index("tier")].fill.fgColor.rgb
             for r in sheet.iter_rows(min_row=2)}  # fmt: skip
    assert len(set(tiers.values())) == len(tiers) and set(tiers) == {row["tier"] for row in rows}
    back = read_table(Path("r.xlsx"), expected=("rank", "file"))
    assert back.cells["image_id"].tolist() == [row["image_id"] for row in rows]
    assert run([*RANK, "--xlsx", "r.xlsx", "--sheets-by", "departmnt"]) == 1


def test_csv_files_open_in_excel_and_are_read_back(office: Path) -> None:
    """Without a byte order mark Excel shows Korean as garbage; with one, nobody may read a column «\ufeffrank»."""
    run(["audit"])
    assert run(["split", "data", "--out", "parts"]) == 0 and run(RANK) == 0
    assert run(["duplicates", "data"]) == 0
    names = [
        "ranking.csv",
        "audit.csv",
        "near_groups.csv",
        "duplicates.csv",
        "parts/train_metadata.csv",
    ]
    for name in names:
        assert Path(name).read_bytes().startswith(b"\xef\xbb\xbf"), name
        own = rows_of(Path(name))
        assert not own or list(pd.read_csv(name).columns) == list(own[0])
    table = read_table(Path("ranking.csv"), expected=("rank",))
    assert table.columns[0] == "rank" and "department" in table.columns


def test_cells_that_came_with_the_works_stay_what_they_were(tmp_path: Path) -> None:
    """A formula in a student's title must not run at the office; an id must not lose its zeros."""
    given = [
        "=1+1",
        "+82 10",
        "-5",
        "@x",
        "00123",
        "12",
        "0.50",
        "a\x0bb",
        "\udcff",
        "1e5",
        "nan",
        "",
    ]
    names = ["회화/조소", "History", "x" * 40, "X" * 40, "'", "A", "a", *"bcdef"]
    table = pd.DataFrame({
        "rank": np.arange(1, 13), "score": np.linspace(1, 0, 12), "file": ["a.png"] * 12,
        "image_id": [f"{i:03d}" for i in range(12)], "note": given, "by": [*names[:11], None],
    })  # fmt: skip
    config = Config()
    config.embed.workers = 0
    path = write_workbook(
        tmp_path / "r.xlsx", table, [tmp_path / "gone.png"] * 12, config, sheets_by="by"
    )
    book = openpyxl.load_workbook(path)
    cells = [row[5] for row in book["ranking"].iter_rows(min_row=2)]
    expected = ["=1+1", "+82 10", -5, "@x", "00123", 12, "0.50", "a�b", "�", "1e5", "nan", None]
    assert [cell.value for cell in cells] == expected
    assert all(cell.data_type != "f" for cell in cells) and cells[0].quotePrefix
    assert len(book.sheetnames) == 13 == len({name.casefold() for name in book.sheetnames})
    assert "회화_조소" in book.sheetnames and max(map(len, book.sheetnames)) == 31
    assert [book[book.sheetnames[1]]["E2"].value] == ["000"]


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--out", "x.docx"], "the folder for ranking.csv"), (["--out", "r.xlsx"], "--xlsx r.xlsx"),
     (["--xlsx", "r.docx"], "r.xlsx"), (["--html", "report.pdf"], "report.html"),
     (["--sheets-by", "tier"], "--xlsx FILE"), (["--dry-run"], "--sort-into"),
     (["--sort-into", "data/images/sorted"], "--sort-how move"), (["--sort-into", "s", "--sort-by", "teir"], "tier"),
     (["--xmp", "beside", "--out", "pairs.csv"], "not a file")],
)  # fmt: skip
def test_what_can_not_be_written_is_refused(
    office: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    before = held(office)
    assert run([*RANK[:1], "data/images", *RANK[2:], *options]) != 0
    assert said in capsys.readouterr().err and held(office) == before


@pytest.mark.parametrize("how", ["copy", "link", "move"])
def test_works_are_sorted_into_folders_and_back(office: Path, how: str) -> None:
    shutil.copytree("data/images", "in/a")
    shutil.copytree("data/images", "in/b")  # each name twice
    before = held(Path("in"))
    sort = ["rank", "in", "--workers", "0", "--sort-into", "out", "--sort-how", how]
    assert run([*sort, "--dry-run"]) == 0 and not Path("out").exists()
    assert run(sort) == 0
    tier = {row["file"]: row["tier"] for row in rows_of(Path("ranking.csv"))}
    sorted_ = list(Path("out").rglob("*.png"))
    assert len(sorted_) == 80 and {p.parent.name for p in sorted_} == set(tier.values())
    assert sum(p.name.endswith(" (2).png") for p in sorted_) == 40
    assert held(Path("in")) == ({} if how == "move" else before)
    if how != "move":  # again: nothing is there twice
        assert run(sort) == 0 and len([*Path("out").rglob("*.png")]) == 80
    assert run(["unsort", "out"]) == 0
    assert held(Path("in")) == before and not [*Path("out").rglob("*.png")]
    assert run(["unsort", "out"]) == 1  # it is done


def test_what_was_changed_after_sorting_is_left(
    office: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*RANK, "--sort-into", "out", "--sort-by", "department"]) == 0
    first, second = sorted(Path("out/회화").iterdir())[:2]
    first.write_bytes(b"painted over")
    second.unlink()
    Path("out/조소/notes.txt").write_text("ours")
    assert run(["unsort", "out/sorted.jsonl"]) == 1
    assert f"Left as it is: {first.absolute()}: was changed" in capsys.readouterr().err
    assert first.read_bytes() == b"painted over" and not Path("out/조소/work_01.png").exists()
    assert Path("out/조소/notes.txt").read_text() == "ours"


def test_files_that_are_there_or_can_not_be_moved_are_kept(
    office: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*RANK, "--sort-into", "out", "--sort-by", "rank"]) == 0
    names = sorted(p.name for p in Path("out").glob("*.png"))
    assert [name.split(" ")[0] for name in names] == [f"{i:02d}" for i in range(1, 41)]
    foreign = Path("moved/회화/work_01.png")
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"not ours")
    before = held(Path("data"))
    assert (
        run([*RANK, "--sort-into", "moved", "--sort-by", "department", "--sort-how", "move"]) == 0
    )
    assert foreign.read_bytes() == b"not ours" and Path("moved/회화/work_01 (2).png").exists()
    assert run(["unsort", "moved"]) == 0
    assert held(Path("data")) == before and foreign.read_bytes() == b"not ours"


def test_works_in_a_tar_are_copied_out(office: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = {p.name: p.read_bytes() for p in sorted(Path("data/images").iterdir())}
    make_tar(Path("t.tar"), pictures)
    rank = ["rank", "t.tar", "--workers", "0", "--sort-into", "out"]
    assert run([*rank, "--sort-how", "move"]) == 1
    assert "can be copied only: --sort-how copy" in capsys.readouterr().err
    assert run(rank) == 0
    assert {p.name: p.read_bytes() for p in Path("out").rglob("*.png")} == pictures
    assert run(["unsort", "out"]) == 0 and not [*Path("out").rglob("*.png")]
    assert run(["rank", "t.tar", "--workers", "0", "--xmp", "beside"]) == 1


_KILLED = """
import os, sys
from pathlib import Path
from mirip_fast.portfolio import sort_into
how, stop = sys.argv[1], int(sys.argv[2])
calls = 0
def at(*_):  # dies at one of its calls of fsync, rename, unlink
    global calls
    calls += 1
    if calls == stop:
        os.kill(os.getpid(), 9)
for place, name in ((os, "fsync"), (Path, "rename"), (Path, "replace"), (Path, "unlink")):
    def wrap(*args, real=getattr(place, name), **kwargs):
        at()
        done = real(*args, **kwargs)
        at()
        return done
    setattr(place, name, wrap)
if len(sys.argv) > 3:  # as across file systems
    class Stat:
        def __init__(self, device): self.st_dev = device
    real_stat = Path.stat
    Path.stat = lambda self, **kw: Stat(1) if self.name.endswith("png") else (
        Stat(2) if "out" in self.parts else real_stat(self, **kw))
acts = [(p, Path("out").absolute() / "S" / p.name) for p in sorted(Path("in").absolute().iterdir())]
sort_into.sort_files(Path("out"), how, acts)
print("whole")
"""


@pytest.mark.parametrize(("how", "far"), [("copy", False), ("move", False), ("move", True)])
def test_a_kill_in_the_middle_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, far: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    for stop in range(1, 90, 7 if how == "copy" else 4):
        shutil.rmtree("in", ignore_errors=True), shutil.rmtree("out", ignore_errors=True)
        Path("in").mkdir()
        for i in range(3):
            (Path("in") / f"{i}.png").write_bytes(bytes([i]) * 5000)
        before = held(Path("in"))
        pid = os.fork()
        if pid == 0:
            sys.argv = ["x", how, str(stop), *(["far"] if far else [])]
            try:
                exec(compile(_KILLED, "killed", "exec"), {"__name__": "killed"})
            finally:
                os._exit(0)
        killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        there = {*held(Path("in")).values(), *held(Path("out")).values()}
        assert there >= set(before.values()), stop
        if Path("out/sorted.jsonl").exists():
            assert run(["unsort", "out"]) == 0, stop
        assert held(Path("in")) == before and not [*Path("out").rglob("*png*")], stop
        if not killed:
            return
    raise AssertionError("it was killed each time")


def test_a_portfolio_in_one_pdf_has_the_sidecar_of_its_best_page(office: Path) -> None:
    pictures = [Image.open(p).convert("RGB") for p in sorted(Path("data/images").iterdir())[:4]]
    Path("new").mkdir()
    pictures[0].save("new/지원자 1.pdf", save_all=True, append_images=pictures[1:3])
    pictures[3].save("new/other.png")
    assert run(["rank", "new", "--workers", "0", "--xmp", "beside"]) == 0
    assert {p.name for p in Path("new").glob("*.xmp")} == {"지원자 1.xmp", "other.xmp"}
    best = next(row for row in rows_of(Path("ranking.csv")) if ".pdf" in row["file"])
    assert f"<rdf:li>tier {best['tier']}<" in Path("new/지원자 1.xmp").read_text()


def test_sorting_by_tier_may_be_said_with_by(office: Path) -> None:
    assert run([*RANK, "--sort-into", "sorted", "--by", "tier"]) == 0
    tiers = {row["tier"] for row in rows_of(Path("ranking.csv"))}
    assert {p.name for p in Path("sorted").iterdir() if p.is_dir()} == tiers


def test_sidecars_tell_stars_and_tier(office: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("data/images/work_01.xmp").write_text("<x:xmpmeta>Lightroom's</x:xmpmeta>")
    for _ in range(2):  # ours are written anew
        assert run([*RANK, "--xmp", "beside"]) == 0
        said = capsys.readouterr()
        assert "XMP sidecars: 39 written" in said.out
        assert "1 sidecar of another program left as before (first: " in said.err
    assert "Lightroom" in Path("data/images/work_01.xmp").read_text()
    assert run([*RANK, "--xmp", "side"]) == 0
    assert len([*Path("side/images").glob("*.xmp")]) == 40
    if shutil.which("exiftool") is None:
        pytest.skip("exiftool is not here")
    done = subprocess.run(
        ["exiftool", "-j", "-Rating", "-Subject", "-HierarchicalSubject", "-charset", "filename=utf8",
         "-r", "-ext", "xmp", "side"], capture_output=True, check=True,
    )  # fmt: skip
    seen = {Path(one["SourceFile"]).stem: one for one in json.loads(done.stdout)}
    stars = {"S": 5, "A": 4, "B": 2, "C": 1}
    for row in rows_of(Path("ranking.csv")):
        one: dict[str, Any] = seen[Path(row["file"]).stem]
        assert one["Rating"] == stars[row["tier"]] and one["Subject"] == f"tier {row['tier']}"
        assert one["HierarchicalSubject"] == f"tier|tier {row['tier']}"
