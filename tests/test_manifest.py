"""Reading lists of images and grades as people write them."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Literal
from unicodedata import normalize

import numpy as np
import pytest
from made_tables import images_of
from PIL import Image

from mirip_fast.config import DataConfig
from mirip_fast.data.locate import tell_unlisted
from mirip_fast.data.manifest import (
    check_trainable,
    grade_remarks,
    only_graded,
    read_manifest,
    write_manifest_csv,
)
from mirip_fast.data.table import Manifest
from mirip_fast.errors import DataError
from mirip_fast.files import read_csv, write_csv


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path, "PNG")
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


def options(**settings: object) -> DataConfig:
    return DataConfig(**settings)  # type: ignore[arg-type]


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
    first, second = images_of(manifest)
    assert (first.image_id, first.tier, first.tier_score, first.group) == ("1", 0, 9.5, "김")
    assert first.own == {"학과": "회화"} and first.path == data / "images" / "a.png"
    assert (second.tier, second.tier_score, second.group) == (3, None, None)
    assert second.row == 3 and manifest.has_grades and not manifest.missing()


@pytest.mark.parametrize(
    "name", ["sub/c.png", "images/sub/c.png", "sub\\c.png", "images\\sub\\c.png"]
)
def test_where_files_are_looked_for(data: Path, name: str) -> None:
    write(data, f"image_id,image_path,tier\n1,{name},S\n")
    assert images_of(read_manifest(data))[0].path == data / "images" / "sub" / "c.png"


def test_absolute_paths_and_image_root(data: Path, tmp_path: Path) -> None:
    elsewhere = picture(tmp_path / "elsewhere" / "x.png")
    write(data, f"image_id,filename,tier\n1,{elsewhere},S\n2,x.png,A\n")
    manifest = read_manifest(data, options(image_root=str(tmp_path / "elsewhere")))
    assert [record.path for record in images_of(manifest)] == [elsewhere, elsewhere]


def test_other_names_and_tiers(data: Path) -> None:
    write(data, "name,file,grade,points,person\n1,a.png,gold,3,x\n2,b.png,bronze,1,y\n")
    manifest = read_manifest(
        data,
        options(
            tiers="gold,silver,bronze", id_column="name", image_column="file", tier_column="grade",
            score_column="points", group_column="person",
        ),
    )  # fmt: skip
    assert [(r.image_id, r.tier, r.tier_score, r.group) for r in images_of(manifest)] == [
        ("1", 0, 3.0, "x"), ("2", 2, 1.0, "y"),
    ]  # fmt: skip


def test_all_faults_at_once(data: Path) -> None:
    write(
        data,
        "image_id,filename,tier,tier_score\n1,a.png,X,5\n2,,S,1_0\n3,b.png,S,many\n4,a.png,A,1\n4,a.png,B,1\n",
    )
    with pytest.raises(DataError) as error:
        read_manifest(data)
    text = str(error.value)
    for said in (":2, tier", "'X'", ":3, filename", "'1_0'", ":4, tier_score", "'many'", ":6"):
        assert said in text, text


def test_missing_columns_are_told_with_what_there_is(data: Path) -> None:
    write(data, "image_id,filenames,tier\n1,a,S\n")
    with pytest.raises(DataError, match=r"(?s)filename.*Did you mean --image-column filenames\?"):
        read_manifest(data)


def test_missing_files_are_kept_until_they_are_required(
    data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(data, "image_id,filename,tier\n1,a.png,S\n2,\x1b[31mgone.png,A\n")
    manifest = read_manifest(data)
    assert "'\\x1b[31mgone.png')" in caplog.text  # nothing that a terminal obeys
    assert manifest.missing().ids == ["2"]
    with pytest.raises(DataError, match=r"metadata\.csv:3, filename: .*gone\.png"):
        manifest.require_files()


def test_a_folder_per_tier_and_a_plain_folder(tmp_path: Path) -> None:
    for tier in "SC":
        for i in range(2):
            picture(tmp_path / "graded" / tier / "deep" / f"{i}.png")
    manifest = read_manifest(tmp_path / "graded")
    assert manifest.has_grades and [r.tier for r in images_of(manifest)] == [3, 3, 0, 0]


def told_of(caplog: pytest.LogCaptureFixture, source: Path, *tiers: str) -> tuple[Manifest, str]:
    """What is read of a folder, and what is said on the screen."""
    caplog.clear()
    with caplog.at_level(logging.INFO, "mirip_fast"):
        return read_manifest(
            source, DataConfig(tiers=",".join(tiers) or DataConfig.tiers)
        ), caplog.text


def test_system_folders_are_no_works_and_take_no_grades_away(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / ".cache" / "data"  # hidden above the source: it was asked for
    for name in (
        "S/a.png", "S/b.png", "C/c.png", "S/@eaDir/a.png/SYNOFILE_THUMB_M.png", "@eaDir/x.png",
        ".thumbnails/x.png", "__MACOSX/S/._a.png", "C/._c.png", "$RECYCLE.BIN/S-1/x.png", "lost+found/x.png",
        "C/.hidden.png", "C/..jpg", "C/.png", "#recycle/x.png", "S/Thumbs.db", "S/.DS_Store",
    ):  # fmt: skip
        picture(root / name)
    manifest, text = told_of(caplog, root)
    assert manifest.tier_counts() == {"S": 2, "A": 0, "B": 0, "C": 1}
    assert "11 pictures left out as hidden or a system's own: 3 .*, 2 @eaDir/," in text
    assert "graded by folders: S 2, C 1" in text and "passed over" not in text


def test_what_lies_beside_the_tiers_is_counted_and_costs_no_grades(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in (
        "S/1.png",
        "S/2.png",
        "C/1.png",
        "C/2.png",
        "backup/S/1.png",
        "backup/2.png",
        "top.png",
    ):
        picture(tmp_path / name)
    manifest, text = told_of(caplog, tmp_path)
    assert (
        len(manifest) == 7 and only_graded(manifest).has_grades and len(only_graded(manifest)) == 4
    )
    assert "graded by folders: S 2, C 2. Without a grade, so not trained on:" in text
    assert "3 images elsewhere (2 backup/, 1 at the top)" in text
    manifest, text = told_of(caplog, tmp_path, "S", "A")
    assert len(manifest) == 7 and not manifest.has_grades
    assert (
        "without grades: folders are named for tiers (S 2), but there are 5 images elsewhere"
        in text
    )
    manifest, text = told_of(caplog, tmp_path, "s", "c")
    assert manifest.tier_counts() == {"s": 2, "c": 2}
    assert "read as tiers: C/ as c, S/ as s" in text
    (tmp_path / "deep").mkdir()
    for tier in "SC":
        (tmp_path / tier).rename(tmp_path / "deep" / tier)
    assert "Such folders are in backup/: name that" in told_of(caplog, tmp_path)[1]


def test_an_alphabet_of_folders_is_no_folder_per_tier(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for letter in "ABCDEFG":
        picture(tmp_path / letter / "1.png")
    manifest, text = told_of(caplog, tmp_path)
    assert not any(manifest.tier_counts().values())
    assert "folders are named for tiers (A 1, B 1, C 1), but there are 4 images elsewhere" in text


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_composed_and_decomposed_folder_names_are_one_tier(
    tmp_path: Path, form: Literal["NFC", "NFD"]
) -> None:
    names = [
        normalize(f, n) + "/1.png" for f, n in (("NFC", "대상"), ("NFD", "대상"), ("NFD", "입선"))
    ]
    for name in names:
        picture(tmp_path / name)
    manifest = read_manifest(tmp_path, DataConfig(tiers=normalize(form, "대상,입선")))
    assert manifest.tier_counts() == {"대상": 2, "입선": 1}
    assert not len(manifest.missing()) and {r.image_id for r in images_of(manifest)} == set(names)
    assert len(read_manifest(tmp_path / normalize(form, "입선"))) == 1


def test_what_can_not_be_trained_on(data: Path) -> None:
    write(data, "image_id,filename,tier\n1,a.png,S\n2,b.png,S\n3,한글 그림.png,C\n")
    with pytest.raises(DataError, match=r"metadata\.csv:4, tier: .*has one image"):
        check_trainable(read_manifest(data))
    write(data, "image_id,filename,tier_score\n1,a.png,7\n2,b.png,7\n")
    with pytest.raises(DataError, match="'tier_score' has the same number everywhere"):
        check_trainable(read_manifest(data))
    lines = "".join(f"{i},a.png,B\n" for i in range(20))
    write(data, f"image_id,filename,tier\nx,b.png,S\ny,b.png,S\n{lines}")
    manifest = read_manifest(data)
    check_trainable(manifest)
    assert "very unequal" in (" ".join(grade_remarks(manifest)))


@pytest.mark.parametrize(
    ("order", "told"),
    [("S,A,B,C", False), ("C,B,A,S", True), ("A,B,C,S", True), ("A,S,B,C", False)],
)
def test_an_order_of_tiers_that_finer_grades_contradict_is_told(
    tmp_path: Path, order: str, told: bool
) -> None:
    rng = np.random.default_rng(0)
    centres = {"S": 80, "A": 79, "B": 60, "C": 50}  # S and A hardly differ
    rows = [
        f"{i}.png,{tier},{centres[tier] + 5 * rng.normal()}" for tier in "SABC" for i in range(12)
    ]
    rows = ["filename,tier,tier_score", *(f"{n}-{row}" for n, row in enumerate(rows))]
    (tmp_path / "m.csv").write_text("\n".join(rows), encoding="utf-8")
    options = DataConfig(tiers=order)
    said = grade_remarks(read_manifest(tmp_path / "m.csv", options))
    assert bool(said) == told
    if told:
        assert said[0].startswith(f"--tiers {order} may be the wrong way round")
        assert said[0].endswith("(higher is better) the order is S, A, B, C")


def test_korean_excel_files_are_explained(data: Path) -> None:
    write(data, "image_id,filename,tier\n1,한글 그림.png,S\n2,a.png,A\n", "cp949")
    with pytest.raises(DataError, match=r"(?s)metadata\.csv.*encoding"):
        read_manifest(data)
    manifest = read_manifest(data, options(encoding="cp949"))
    assert images_of(manifest)[0].path.name == "한글 그림.png"


def test_round_trip(data: Path) -> None:
    write(data, 'image_id,filename,tier,group,note\n1,a.png,S,g,"a, b"\n2,한글 그림.png,A,,줄\n')
    manifest = read_manifest(data)
    write_manifest_csv(data / "copy.csv", manifest)
    again = read_manifest(data / "copy.csv")
    assert [(r.image_id, r.path, r.tier, r.group, r.own) for r in images_of(again)] == [
        (r.image_id, r.path, r.tier, r.group, r.own) for r in images_of(manifest)
    ]


def test_identical_rows_collapse(data: Path) -> None:
    write(data, "image_id,filename,tier\n1,a.png,S\n1,images/a.png,S\n2,b.png,A\n")
    assert len(read_manifest(data)) == 2


def test_a_score_spelled_otherwise_is_the_same(data: Path) -> None:
    head = "image_id,filename,tier_score\n1,a.png,0.134\n"
    write(data, f"{head}1,a.png,0.1340\n2,b.png,\n2,b.png,\n")
    assert [r.tier_score for r in images_of(read_manifest(data))] == [0.134, None]
    for other in ("0.1341", ""):
        write(data, f"{head}1,a.png,{other}\n")
        with pytest.raises(
            DataError, match=f"csv:3, tier_score: '1' has '{other}' here and '0.134'"
        ):
            read_manifest(data)


def test_two_files_that_look_alike_are_not_taken_for_one(data: Path) -> None:
    names = [normalize(form, "그림.png") for form in ("NFC", "NFD")]
    for name in names:
        picture(data / "images" / name)
    write(data, "filename,tier\n" + "".join(f"{name},S\n" for name in names))
    with pytest.raises(
        DataError, match=r"csv:3, filename: '그림.png' has '.u1100.*' here and '.uadf8"
    ):
        read_manifest(data)


def test_every_line_end_in_a_value_is_quoted(tmp_path: Path) -> None:
    """A lone carriage return ends a line for every reader of CSV files."""
    rows = [["a\rb", "c\nd", "e\r\nf", "plain"], ["", 'q"', "x,y", "\r"]]
    names = ["one", "two", "three", "four"]
    write_csv(tmp_path / "x.csv", names, [dict(zip(names, row, strict=True)) for row in rows])
    assert [list(row.values()) for row in read_csv(tmp_path / "x.csv")] == rows


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What the commands print as notes and warnings."""
    caplog.set_level(logging.INFO, "mirip_fast")
    return caplog


@pytest.mark.parametrize(
    "group", ["Group", " GROUP ", "group_", "Gr-oup", "ｇｒｏｕｐ", "gro\u200bup", "\ufeffgroup"]
)
@pytest.mark.parametrize("score", ["Tier_Score", "tierscore", "tier-score", "Tier Score"])
def test_columns_that_differ_in_no_letter_are_read_and_told(
    data: Path, told: pytest.LogCaptureFixture, group: str, score: str
) -> None:
    """Else applicants straddle the splits, and nobody knows."""
    write(data, f"Image ID,File Name,TIER,{score},{group}\n1,a.png,S,9,kim\n2,b.png,A,8,lee\n")
    records = images_of(read_manifest(data))
    assert [(r.image_id, r.tier, r.tier_score, r.group) for r in records] == [
        ("1", 0, 9.0, "kim"), ("2", 1, 8.0, "lee"),
    ]  # fmt: skip
    assert "is read as tier_score" in told.text
    assert ("is read as group" in told.text) == (group.strip() != "group")


@pytest.mark.parametrize(
    ("column", "flag"),
    [("groups", "--group-column"), ("gruop", "--group-column"), ("grup", "--group-column"),
     ("Group1", "--group-column"), ("tier_scores", "--score-column"), ("image_ids", "--id-column"),
     ("growth", None), ("title", None), ("department", None)],
)  # fmt: skip
def test_columns_one_letter_off_are_told_and_others_are_not(
    data: Path, told: pytest.LogCaptureFixture, column: str, flag: str | None
) -> None:
    write(data, f"filename,tier,{column}\na.png,S,kim\nb.png,A,lee\n")
    assert images_of(read_manifest(data))[0].own == {column: "kim"}
    hint = f"column '{column}' is not read; did you mean {flag} {column}?"
    assert (hint in told.text) if flag else not told.text


def test_two_columns_that_could_be_meant_are_refused(data: Path) -> None:
    write(data, "filename,tier,Group,GROUP\na.png,S,x,y\n")
    with pytest.raises(DataError, match="'GROUP' and 'Group' are both like 'group'"):
        read_manifest(data)
    nfd = normalize("NFD", "학과")
    write(data, f"filename,tier,학과,{nfd}\na.png,S,x,y\n")
    with pytest.raises(DataError, match=r"occurs 2 times, spelled .*u1112.* and .*ud559"):
        read_manifest(data)


def test_names_are_one_in_both_unicode_forms(data: Path) -> None:
    """One applicant, typed on Windows in one row and copied from a Mac in the other."""
    nfd = normalize("NFD", "이름,등급,지원자,홍길동,금,한글 그림.png,회화").split(",")
    name, grade, who, person, gold, picture_name, painting = nfd
    write(
        data,
        f"{name},filename,{grade},{who},학과\n"
        f"가,{picture_name},{gold},{person},{painting}\n나,a.png,금,홍길동,회화\n다,b.png,은,x,조소\n",
    )
    manifest = read_manifest(
        data,
        options(id_column="이름", tier_column=grade, group_column="지원자", tiers=f"{gold},은"),
    )
    first, second, _ = images_of(manifest)
    assert (first.tier, first.group, first.own) == (second.tier, second.group, second.own)
    assert first.path.is_file() and manifest.tiers == ("금", "은")


def test_tiers_spelled_otherwise_are_read_and_told(
    data: Path, told: pytest.LogCaptureFixture
) -> None:
    write(data, "filename,tier\na.png,s \nb.png,Ａ\n한글 그림.png,a\nsub/c.png,A\n")
    assert [record.tier for record in images_of(read_manifest(data))] == [0, 1, 1, 1]
    assert "'a' as 'A' (1), 's' as 'S' (1), 'Ａ' as 'A' (1)" in told.text
    write(data, "filename,tier\na.png,1.0\nb.png,2.0\n")
    assert [r.tier for r in images_of(read_manifest(data, options(tiers="1,2")))] == [0, 1]
    write(data, "filename,tier\na.png,A-\nb.png,a\nsub/c.png,A\n")
    manifest = read_manifest(data, options(tiers="A,A-,a"))
    assert [record.tier for record in images_of(manifest)] == [1, 2, 0]


def test_the_order_of_unknown_tiers_is_never_guessed(data: Path) -> None:
    """A list in order of appearance, worst first, turns the model upside down when it is copied."""
    write(data, "filename,tier\na.png,bronze\nb.png,silver\n한글 그림.png,gold\nsub/c.png,bronze\n")
    with pytest.raises(DataError) as error:
        read_manifest(data)
    text = str(error.value)
    assert "in alphabetical order: bronze 2, gold 1, silver 1." in text
    assert '--tiers "BEST,…,WORST"' in text and "bronze,silver" not in text


@pytest.mark.parametrize("first", ["sep=;\r\n", '"SEP=;"\n', "sep=; \r"])
def test_the_line_that_tells_excel_the_separator_is_no_header(data: Path, first: str) -> None:
    write(data, first + "filename;tier;note\na.png;S;1,5\nb.png;X;2,5\n", "utf-8-sig")
    with pytest.raises(DataError, match=r"metadata\.csv:4, tier: unknown tier 'X'"):
        read_manifest(data)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_unicode_text_of_excel_is_read(data: Path, encoding: str) -> None:
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    write(data, mark + "filename\ttier\tgroup\r\n한글 그림.png\tS\t홍길동\r\n", encoding)
    (record,) = images_of(read_manifest(data))
    assert record.group == "홍길동" and record.path.is_file()


@pytest.mark.parametrize(
    ("content", "kind"),
    [(b"PAR1", "Parquet"), (b'[{"filename": "a.png"}]', "JSON"), (b"<html><table>", "HTML")],
)  # fmt: skip
def test_files_of_another_kind_are_named(data: Path, content: bytes, kind: str) -> None:
    (data / "metadata.csv").write_bytes(content)
    with pytest.raises(DataError, match=rf"{kind}.*, not CSV; save it"):
        read_manifest(data)


def test_cells_that_are_lacking_or_nameless_are_told(
    data: Path, told: pytest.LogCaptureFixture
) -> None:
    write(data, "filename,tier,group,\na.png,S\nb.png,A,x,lost\n")
    assert [record.group for record in images_of(read_manifest(data))] == [None, "x"]
    assert "1 row has fewer values than columns (first: row 2)" in told.text
    assert "values in a column without a name are not read (1 row)" in told.text


def test_old_paths_are_read_by_their_ends_where_no_doubt_is_left(
    data: Path, told: pytest.LogCaptureFixture
) -> None:
    """A list made on another machine, as Windows and old project folders write it."""
    nfd = normalize("NFD", "한글 그림.png")
    names = [
        r"C:\Users\Kim\a.png",
        "/old/images/sub/c.png",
        rf"\\nas\art\{nfd}",
        "data/images/b.png",
    ]
    rows = "".join(f"{name},S\n" for name in names)
    write(data, "filename,tier\n" + rows)
    manifest = read_manifest(data)
    assert not manifest.missing()
    assert [r.path.name for r in images_of(manifest)] == [
        "a.png",
        "c.png",
        "한글 그림.png",
        "b.png",
    ]
    assert "4 file names read by the end of the path" in told.text
    told.clear()
    write(data, "filename,tier\n/x/1/a.png,S\n/x/2/a.png,S\n/x/b.png,A\nb.png,A\nold/sub/c.png,A\n")
    assert read_manifest(data).missing().table["row"].tolist() == [2, 3, 4, 6]  # two people's a.png
    assert (
        "4 of 5 image files are not there (row 2: '/x/1/a.png'. Did you mean 'a.png'?" in told.text
    )


@pytest.mark.parametrize(
    "name", ["SUB/C.PNG", "c", "c.jpg", "0c.png", "old/c.png", "C.tiff", r"D:\x\..\c.png"]
)
def test_what_a_missing_file_may_be_called_is_suggested(
    data: Path, told: pytest.LogCaptureFixture, name: str
) -> None:
    if name[0] == "0":
        picture(data / "images" / "007.png")
        name, wanted = "7.png", "007.png"
    else:
        wanted = "sub/c.png"
    write(data, f"filename,tier\n{name},S\na.png,A\n")
    manifest = read_manifest(data)
    hint = f"Did you mean '{wanted}'?"
    assert f"1 of 2 image files is not there (row 2: '{name}'. {hint})" in told.text
    with pytest.raises(DataError) as error:
        manifest.require_files()
    assert hint in str(error.value)


def test_files_outside_the_data_are_read_only_where_asked_for(data: Path, tmp_path: Path) -> None:
    """A table that somebody sent must not bring the reader's own pictures into what is shared."""
    private = picture(tmp_path / "private" / "x.png")
    names = [str(private), "../private/x.png", r"images\..\..\private\x.png"]
    for name in names:
        write(data, f"filename,tier\na.png,S\n{name},A\n")
        with pytest.raises(DataError) as error:
            read_manifest(data)
        assert "metadata.csv:3, filename: " in str(error.value)
        assert f"--image-root {private.parent}" in str(error.value)
        manifest = read_manifest(data, options(image_root=str(private.parent)))
        assert not manifest.missing()
    inside = [str(data / "images" / "a.png"), "images/../images/b.png"]
    write(data, "filename,tier\n" + "".join(f"{name},S\n" for name in inside))
    (tmp_path / "link").symlink_to(data)
    for folder in (data, tmp_path / "link"):
        assert not read_manifest(folder).missing()


GRADES = "image_id,filename,tier\n1,a.png,S\n2,b.png,A\n3,sub/c.png,\n"


@pytest.mark.parametrize("name", ["metadata.CSV", "Metadata.csv", "METADATA.csv"])
def test_grades_under_capital_letters_are_read(
    data: Path, told: pytest.LogCaptureFixture, name: str
) -> None:
    (data / name).write_text(GRADES)
    assert [record.tier for record in images_of(read_manifest(data))] == [0, 1, None]
    assert f"{name} is read as metadata.csv" in told.text


def test_two_lists_of_grades_and_a_broken_one_are_refused(data: Path) -> None:
    (data / "metadata.csv").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"metadata\.csv: no file that can be read"):
        read_manifest(data)
    (data / "metadata.csv").unlink()
    for name in ("metadata.CSV", "Metadata.csv"):
        (data / name).write_text(GRADES)
    with pytest.raises(DataError, match=r"Metadata\.csv and metadata\.CSV; leave one"):
        read_manifest(data)


@pytest.mark.parametrize(
    ("name", "way"),
    [("data/meta.csv", "give its name"), ("data/grades.tsv", "give its name"),
     ("data/성적.xlsx", "give its name"), ("data/list.xls", "save it as CSV"),
     ("data/x.parquet", "save it as CSV"), ("data/metadata.jsonl", "save it as CSV"),
     ("data/metadata.csv.txt", "give its name"), ("data/images/metadata.csv", "give data/images"),
     ("metadata.csv", "give . instead"), ("grades.xlsx", "give its name"),
     ("data/ranking.csv", None), ("data/about.json", None), ("ranking.csv", None), ("x.xlsx", None)],
)  # fmt: skip
def test_grades_that_are_not_read_are_told(
    data: Path, told: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
    name: str, way: str | None,
) -> None:  # fmt: skip
    """A folder whose grades lie elsewhere looks like one without; training would find nothing."""
    monkeypatch.chdir(data.parent)
    Path(name).write_text(GRADES)
    assert len(read_manifest("data")) == 4
    assert (
        (f"Not read: {name} (" in told.text and way in told.text) if way else name not in told.text
    )
    told.clear()
    read_manifest("data", with_grades=False)  # rank asks for no grades
    assert name not in told.text


def test_works_without_a_grade_are_counted_and_left_out(
    data: Path, told: pytest.LogCaptureFixture
) -> None:
    write(data, GRADES + "4,한글 그림.png,\n")
    graded = only_graded(read_manifest(data))
    assert [record.image_id for record in images_of(graded)] == ["1", "2"]
    assert "2 of 4 works have a grade; the others (first: row 4, '3') are left out" in told.text
    write(data, GRADES.replace(",S\n", ",\n").replace(",A\n", ",\n"))
    assert len(only_graded(read_manifest(data))) == 3
    assert "none of 3 works has a grade; the column 'tier' is empty" in told.text


def test_pictures_that_no_row_names_are_told(data: Path, told: pytest.LogCaptureFixture) -> None:
    """A row that was forgotten is a work that nobody ranks."""
    for name in ("images/d.png", "more/noending", "more/.hidden.png", "runs/x/curves.png"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(data / "images" / "a.png", data / name)
    (data / "runs" / "x" / "run.json").write_text("{}")
    (data / "linked").symlink_to("images", target_is_directory=True)
    write(data, GRADES.replace("1,a.png", "1,linked/a.png") + "4,한글 그림.png,S\n")
    manifest = read_manifest(data)
    tell_unlisted(manifest.source, manifest.table["file"])
    assert "2 pictures in " in told.text and told.text.count("named by no row") == 1
    assert "metadata.csv: images/d.png, more/noending\n" in told.text
    told.clear()
    (data / "metadata.csv").rename(data / "test_metadata.csv")  # a part, as split writes it
    tell_unlisted(data / "test_metadata.csv", [])
    assert "no row" not in told.text


@pytest.mark.parametrize(
    ("tiers", "said"),
    [("1 2 10 2", 'numerical order: 1 1, 2 2, 10 1.*Is 1 the best, or 10. --tiers "1,2,10", or --tiers "10,2,1"'),
     ("상 중 하 하", "alphabetical order: 상 1, 중 1, 하 2"), ("수 우 미 양 가", "가 1, 미 1, 수 1, 양 1, 우 1"),
     ("pass fail Pass", "fail 1, pass 1, Pass 1|fail 1, Pass 1, pass 1"), ("A B D F", "A 1, B 1, D 1, F 1"),
     (" ".join(map(str, range(30))), "If they are points, the more the better: --score-column tier")],
)  # fmt: skip
def test_unknown_tiers_are_listed_and_no_direction_is_guessed(
    data: Path, tiers: str, said: str
) -> None:
    write(
        data,
        "image_id,filename,tier\n"
        + "".join(f"{i},b.png,{t}\n" for i, t in enumerate(tiers.split())),
    )
    with pytest.raises(DataError, match=rf"{said}(.|\n)*") as error:
        read_manifest(data)
    assert 'the best first: --tiers "BEST,…,WORST"' in str(error.value)
