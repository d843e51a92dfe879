"""Excel workbooks where a CSV file goes: what people's sheets are like, and what is refused."""

from __future__ import annotations

import datetime as dt
import io
import logging
import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import openpyxl
import pytest
from made_run import TINY, draw, rows_of
from mirip_fast_cli.main import run

from mirip_fast.config import DataConfig
from mirip_fast.data.manifest import read_manifest
from mirip_fast.data.spreadsheets import read_table
from mirip_fast.errors import DataError

HEAD = ("filename", "tier", "applicant")
ROWS = (("그림 1.png", "S", "김민지"), ("b.png", "A", "이서준"))


def save(
    path: Path, *rows: Sequence[Any], change: Callable[[Any], object] = lambda _: None
) -> None:
    """Save a workbook with a sheet «작품» of these rows; ``change`` may do more to it."""
    book = openpyxl.Workbook()
    book.active.title = "작품"
    for row in rows:
        book.active.append(row)
    change(book)
    path.parent.mkdir(parents=True, exist_ok=True)
    book.save(path)


def patch(path: Path, part: str, old: str, new: str) -> None:
    """Replace text in a part of a workbook, as another program would have written it."""
    with zipfile.ZipFile(path) as book:
        parts = {name: book.read(name) for name in book.namelist()}
    text = parts[part].decode()
    assert old in text
    parts[part] = text.replace(old, new).encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as book:
        for name, data in parts.items():
            book.writestr(name, data)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "data"
    for i, name in enumerate(("그림 1.png", "b.png")):
        draw(folder / "images" / name, 0.5, i)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


def test_a_workbook_describes_its_folder(data: Path, told: pytest.LogCaptureFixture) -> None:
    save(data / "metadata.xlsx", HEAD, *ROWS)
    (data / "~$metadata.xlsx").write_bytes(b"\x05Kim" + bytes(160))  # it is open in Excel
    manifest = read_manifest(data)
    assert manifest.table["tier"].tolist() == ["S", "A"] and not len(manifest.missing())
    assert manifest.table["applicant"].tolist() == ["김민지", "이서준"]
    assert read_manifest(data / "metadata.xlsx").table.equals(manifest.table)
    (data / "metadata.csv").write_text("filename,tier\nb.png,C\n", encoding="utf-8-sig")
    assert read_manifest(data).table["tier"].tolist() == ["C"]
    assert "metadata.csv is read, and metadata.xlsx beside it is not" in told.text
    with pytest.raises(DataError, match=r"while metadata\.xlsx is open; give that file's name"):
        read_manifest(data / "~$metadata.xlsx")


def test_commands_take_workbooks(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An office's file goes through embed, train and rank, judged pairs too, as the CSV file would."""
    for i in range(24):
        draw(data / "images" / f"{i}.png", 0.9 - 0.2 * (i % 4), i)
    rows = [(f"{i}.png", "SABC"[i % 4], f"지원자 {i // 3}") for i in range(24)]
    save(data / "grades.xlsx", HEAD, *rows, change=lambda book: book.create_sheet("메모", 0))
    assert run(["embed", "data/grades.xlsx", "--sheet", "작품", *TINY]) == 0
    head = ["train", "--head-only", "--readout", "head", "--epochs", "2"]
    assert run([*head, "--tiers", "S,A,B,C"]) == 0
    assert run(["rank", "data/grades.xlsx", "--sheet", "작품"]) == 0
    assert {row["applicant"] for row in rows_of(Path("ranking.csv"))} == {
        f"지원자 {i}" for i in range(8)
    }
    pairs = [(f"{i}.png", f"{j}.png", 1) for i in range(24) for j in range(i) if i % 4 < j % 4]
    save(Path("pairs.xlsx"), ("image_path_1", "image_path_2", "label"), *pairs)
    assert run([*head, "--pairs", "pairs.xlsx"]) == 0
    assert run(["split", "data/grades.xlsx", "--sheet", "작품", "--out", "split"]) == 0
    assert len(rows_of(Path("split/train_metadata.csv"))) > 10


def test_cells_are_read_as_they_are_seen(tmp_path: Path) -> None:
    cells = [
        ("00123", "00123"), (123, "123"), (1.0, "1"), (0.1 + 0.2, "0.3"), (True, "TRUE"), (None, ""),
        (dt.datetime(2026, 11, 28), "2026-11-28"), (dt.datetime(2026, 11, 28, 9, 30), "2026-11-28 09:30:00"),
        ("=not", "=not"), (" 공백 ", " 공백 "), ("줄\n둘", "줄\n둘"), (12345678901234567, "1.23456789012346e+16"),
        ("#N/A", "#N/A"), (-0.5, "-0.5"),
    ]  # fmt: skip

    def change(book: Any) -> None:
        sheet = book.active
        for row, (value, _) in enumerate(cells, 2):
            sheet.cell(row, 2).value = value
            if isinstance(value, str):
                sheet.cell(row, 2).data_type = "s"
        for value, shape in ((123, "00000"), (1, "0.0"), (1.25, "0.0"), (-5, "000"), (7, "#,##0")):
            sheet.append(("x", value))
            sheet.cell(sheet.max_row, 2).number_format = shape

    save(tmp_path / "a.xlsx", ("name", "value"), *[("x", None) for _ in cells], change=change)
    table = read_table(tmp_path / "a.xlsx", expected=("name", "value"))
    seen = table.cells["value"].tolist()
    assert seen[: len(cells)] == [text for _, text in cells]
    assert seen[len(cells) :] == ["00123", "1.0", "1.25", "-05", "7"]


def test_merged_cells_stand_in_every_row(data: Path, told: pytest.LogCaptureFixture) -> None:
    """An applicant's name over the rows of its works: all of them are the applicant's."""
    rows = [("b.png", "S", "김민지"), ("그림 1.png", "A", None), (), ("c.png", "A", "이서준")]
    save(data / "metadata.xlsx", (), HEAD, *rows, change=lambda b: b.active.merge_cells("C3:C4"))
    table = read_manifest(data).table
    assert table["applicant"].tolist() == ["김민지", "김민지", "이서준"]
    assert table["row"].tolist() == [3, 4, 6]  # as Excel counts them
    assert "the value of 1 merged cell is read for every row that they span" in told.text


def test_faults_are_told_with_sheet_row_and_column(data: Path) -> None:
    save(data / "metadata.xlsx", HEAD, *ROWS, ("b.png", "수", ""))
    with pytest.raises(DataError) as error:
        read_manifest(data)
    assert "data/metadata.xlsx, sheet '작품', row 4, tier: unknown tier '수'" in str(error.value)
    save(data / "metadata.xlsx", ("2026학년도 작품 목록",), (), HEAD, *ROWS)
    with pytest.raises(
        DataError, match=r"sheet '작품', row 3: the names of the columns stand here"
    ):
        read_manifest(data)
    save(data / "metadata.xlsx", ("파일", "등급"), ("b", "S"))
    with pytest.raises(DataError, match="sheet '작품': no column 'filename'.*It has: 파일, 등급"):
        read_manifest(data)
    save(data / "metadata.xlsx")
    with pytest.raises(DataError, match="sheet '작품': empty"):
        read_manifest(data)


def test_formulas_are_read_if_they_were_computed(data: Path) -> None:
    save(data / "metadata.xlsx", HEAD, ("b.png", '=UPPER("s")', '=""'))
    with pytest.raises(
        DataError, match=r"row 2, tier: a formula whose value is not in the file; open"
    ):
        read_manifest(data)
    part = "xl/worksheets/sheet1.xml"
    with zipfile.ZipFile(data / "metadata.xlsx") as book:
        text = book.read(part).decode()
    cells = re.findall(r'<c r="([BC]2)"[^>]*>(<f>.*?</f>)<v */?>', text)
    assert len(cells) == 2
    for (place, formula), value in zip(cells, ("S", ""), strict=True):
        whole = re.search(rf'<c r="{place}".*?</c>', text)
        assert whole is not None
        patch(
            data / "metadata.xlsx",
            part,
            whole[0],
            f'<c r="{place}" t="str">{formula}<v>{value}</v></c>',
        )
    table = read_manifest(data).table
    assert table["tier"].tolist() == ["S"] and "applicant" in table


def test_the_sheet_is_the_first_seen_or_the_named_one(
    data: Path, told: pytest.LogCaptureFixture
) -> None:
    def change(book: Any) -> None:
        book.create_sheet("설정", 0).sheet_state = "hidden"
        other = book.create_sheet("Second Round")
        other.append(HEAD)
        other.append(("b.png", "C", ""))

    save(data / "metadata.xlsx", HEAD, *ROWS, change=change)
    assert read_manifest(data).table["tier"].tolist() == ["S", "A"]
    assert "the sheet '작품' is read; not read: '설정' (hidden), 'Second Round'" in told.text
    assert read_manifest(data, DataConfig(sheet="second round")).table["tier"].tolist() == ["C"]
    with pytest.raises(DataError, match=r"no sheet 'Second Ruond' .*Did you mean 'Second Round'"):
        read_manifest(data, DataConfig(sheet="Second Ruond"))
    with pytest.raises(DataError, match="sheet '설정': empty"):
        read_manifest(data, DataConfig(sheet="설정"))


def _zip(**parts: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as book:
        for name, content in parts.items():
            book.writestr(name.replace("__", "/"), content)
    return stream.getvalue()


#: A workbook that says that a part of it is 2 GiB long.
_BOMB = _zip(**{"xl/workbook.xml": bytes(1234567)}).replace(
    (1234567).to_bytes(4, "little"), (1 << 31).to_bytes(4, "little")
)


def _hostile(kind: str) -> bytes:
    save(path := Path("good.xlsx"), HEAD, *ROWS)
    sheet = "xl/worksheets/sheet1.xml"
    if kind == "entities":
        bomb = '<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]><worksheet'
        patch(path, sheet, "<worksheet", bomb)
    if kind == "overlap":
        patch(
            path, sheet, "</sheetData>", "</sheetData><mergeCells>" + '<mergeCell ref="A2:C3"/>' * 9
        )
        patch(
            path,
            sheet,
            '<mergeCell ref="A2:C3"/>' * 9,
            '<mergeCell ref="A2:C3"/>' * 9 + "</mergeCells>",
        )
    if kind == "wide":
        patch(path, sheet, 'ref="A1:C3"', 'ref="A1:XFD1048576"')
    data = path.read_bytes()
    return {"cut": data[: len(data) // 2], "bytes": data[:200] + bytes(200) + data[400:]}.get(
        kind, data
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"\xd0\xcf\x11\xe0" + bytes(600), "older Excel"),
     (b"\xd0\xcf\x11\xe0" + bytes(600) + "EncryptedPackage".encode("utf-16-le"), "by a password"),
     (b"PK\x03\x04", "damaged"), (_zip(a=b"x"), "a zip file, neither CSV"),
     (_zip(**{"content.xml": b"<a/>"}), "OpenDocument"), (_zip(xl__workbook__bin=b""), "zip file"),
     (_BOMB, "2,048 MiB unpacked"),
     (_zip(**{"xl/workbook.xml": b"<workbook/>"}), "damaged Excel workbook"),
     ("cut", "damaged"), ("bytes", "damaged"), ("entities", "EntitiesForbidden"), ("overlap", "overlap")],
)  # fmt: skip
@pytest.mark.parametrize("name", ["metadata.xlsx", "metadata.csv"])
def test_what_is_no_sound_workbook_is_refused_in_one_line(
    data: Path, content: bytes | str, said: str, name: str
) -> None:
    (data / name).write_bytes(_hostile(content) if isinstance(content, str) else content)
    with pytest.raises(DataError, match=re.escape(said)) as error:
        read_manifest(data)
    assert str(error.value).startswith(f"data/{name}") and "\n" not in str(error.value)


def test_a_size_that_a_workbook_claims_is_not_believed(data: Path) -> None:
    (data / "metadata.xlsx").write_bytes(_hostile("wide"))
    assert len(read_manifest(data)) == 2
