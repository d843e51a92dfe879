"""Reading lists of images and grades as people write them."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from mirip_fast.config import DataConfig
from mirip_fast.data.manifest import (
    check_trainable,
    imbalance_remark,
    read_manifest,
    write_manifest_csv,
)
from mirip_fast.data.records import DataOptions
from mirip_fast.errors import DataError
from mirip_fast.files import read_csv, write_csv


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png", "한글 그림.png", "sub/c.png"):
        picture(tmp_path / "data" / "images" / name)
    return tmp_path / "data"


def write(data: Path, text: str, encoding: str = "utf-8") -> Path:
    path = data / "metadata.csv"
    path.write_bytes(text.encode(encoding))
    return path


def options(**settings: object) -> DataOptions:
    return DataOptions.from_config(DataConfig(**settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_separators_and_byte_order_marks(data: Path, separator: str, encoding: str) -> None:
    rows = [
        "image_id,filename,tier,tier_score,group,학과",
        "1,a.png,S,9.5,김,회화",
        "2,한글 그림.png,C,,,조소",
    ]
    write(data, "\r\n".join(rows).replace(",", separator) + "\r\n", encoding)
    manifest = read_manifest(data)
    first, second = manifest.records
    assert (first.image_id, first.tier, first.tier_score, first.group) == ("1", 0, 9.5, "김")
    assert first.extra == {"학과": "회화"} and first.path == data / "images" / "a.png"
    assert (second.tier, second.tier_score, second.group) == (3, None, None)
    assert second.row == 3 and manifest.has_grades and not manifest.missing()


@pytest.mark.parametrize(
    "name", ["sub/c.png", "images/sub/c.png", "sub\\c.png", "images\\sub\\c.png"]
)
def test_where_files_are_looked_for(data: Path, name: str) -> None:
    write(data, f"image_id,image_path,tier\n1,{name},S\n")
    assert read_manifest(data).records[0].path == data / "images" / "sub" / "c.png"


def test_absolute_paths_and_image_root(data: Path, tmp_path: Path) -> None:
    elsewhere = picture(tmp_path / "elsewhere" / "x.png")
    write(data, f"image_id,filename,tier\n1,{elsewhere},S\n2,x.png,A\n")
    manifest = read_manifest(data, options(image_root=str(tmp_path / "elsewhere")))
    assert [record.path for record in manifest.records] == [elsewhere, elsewhere]


def test_other_names_and_tiers(data: Path) -> None:
    write(data, "name,file,grade,points,person\n1,a.png,gold,3,x\n2,b.png,bronze,1,y\n")
    manifest = read_manifest(
        data,
        options(
            tiers="gold,silver,bronze", id_column="name", image_column="file", tier_column="grade",
            score_column="points", group_column="person",
        ),
    )  # fmt: skip
    assert [(r.image_id, r.tier, r.tier_score, r.group) for r in manifest.records] == [
        ("1", 0, 3.0, "x"), ("2", 2, 1.0, "y"),
    ]  # fmt: skip


def test_all_faults_at_once(data: Path) -> None:
    write(
        data,
        "image_id,filename,tier,tier_score\n1,a.png,X,5\n2,,S,5\n3,b.png,S,many\n4,a.png,A,1\n4,a.png,B,1\n",
    )
    with pytest.raises(DataError) as error:
        read_manifest(data)
    text = str(error.value)
    for said in (":2, tier", "'X'", ":3, filename", ":4, tier_score", "'many'", ":6"):
        assert said in text, text


def test_missing_columns_are_told_with_what_there_is(data: Path) -> None:
    write(data, "image_id,file_name,tier\n1,a.png,S\n")
    with pytest.raises(DataError, match=r"(?s)filename.*file_name"):
        read_manifest(data)


def test_missing_files_are_kept_until_they_are_required(data: Path) -> None:
    write(data, "image_id,filename,tier\n1,a.png,S\n2,gone.png,A\n")
    manifest = read_manifest(data)
    assert [record.image_id for record in manifest.missing()] == ["2"]
    with pytest.raises(DataError, match=r"metadata\.csv:3, filename: .*gone\.png"):
        manifest.require_files()


def test_a_folder_per_tier_and_a_plain_folder(tmp_path: Path) -> None:
    for tier in "SC":
        for i in range(2):
            picture(tmp_path / "graded" / tier / "deep" / f"{i}.png")
    manifest = read_manifest(tmp_path / "graded")
    assert manifest.has_grades and [r.tier for r in manifest.records] == [3, 3, 0, 0]
    picture(tmp_path / "graded" / "loose.png")
    assert not read_manifest(tmp_path / "graded").has_grades


def test_what_can_not_be_trained_on(data: Path) -> None:
    write(data, "image_id,filename,tier\n1,a.png,S\n2,b.png,S\n3,한글 그림.png,C\n")
    with pytest.raises(DataError, match=r"metadata\.csv:4, tier: .*has one image"):
        check_trainable(read_manifest(data))
    lines = "".join(f"{i},a.png,B\n" for i in range(20))
    write(data, f"image_id,filename,tier\nx,b.png,S\ny,b.png,S\n{lines}")
    manifest = read_manifest(data)
    check_trainable(manifest)
    assert "very unequal" in (imbalance_remark(manifest) or "")


def test_korean_excel_files_are_explained(data: Path) -> None:
    write(data, "image_id,filename,tier\n1,한글 그림.png,S\n2,a.png,A\n", "cp949")
    with pytest.raises(DataError, match=r"(?s)metadata\.csv.*encoding"):
        read_manifest(data)
    manifest = read_manifest(data, options(encoding="cp949"))
    assert manifest.records[0].path.name == "한글 그림.png"


def test_round_trip(data: Path) -> None:
    write(data, 'image_id,filename,tier,group,note\n1,a.png,S,g,"a, b"\n2,한글 그림.png,A,,줄\n')
    manifest = read_manifest(data)
    write_manifest_csv(data / "copy.csv", manifest)
    again = read_manifest(data / "copy.csv")
    assert [(r.image_id, r.path, r.tier, r.group, r.extra) for r in again.records] == [
        (r.image_id, r.path, r.tier, r.group, r.extra) for r in manifest.records
    ]


def test_identical_rows_collapse(data: Path) -> None:
    write(data, "image_id,filename,tier\n1,a.png,S\n1,a.png,S\n2,b.png,A\n")
    assert len(read_manifest(data)) == 2


def test_every_line_end_in_a_value_is_quoted(tmp_path: Path) -> None:
    """A lone carriage return ends a line for every reader of CSV files."""
    rows = [["a\rb", "c\nd", "e\r\nf", "plain"], ["", 'q"', "x,y", "\r"]]
    names = ["one", "two", "three", "four"]
    write_csv(tmp_path / "x.csv", names, [dict(zip(names, row, strict=True)) for row in rows])
    assert [list(row.values()) for row in read_csv(tmp_path / "x.csv")] == rows
