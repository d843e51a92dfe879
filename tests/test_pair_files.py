"""Files of judged pairs: how images are named, and what is said when something is wrong."""

from __future__ import annotations

import logging
import unicodedata
from pathlib import Path

import pandas as pd
import pytest
from made_tables import named_table

from mirip_fast.data.pair_files import read_pairs
from mirip_fast.errors import DataError

NAMES = ["a.png", "sub/b.png", "c.png", "그림.png"]


def known(root: Path) -> pd.DataFrame:
    return named_table(root, NAMES, [f"id{i}" for i in range(len(NAMES))])


def read(tmp_path: Path, text: str, **options: str) -> pd.DataFrame:
    path = tmp_path / "judged" / "pairs.csv"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    root = tmp_path / "data" / "images"
    return read_pairs([path], known(root), [tmp_path / "data", root], **options)


def faults(tmp_path: Path, text: str) -> str:
    with pytest.raises(DataError) as caught:
        read(tmp_path, text)
    return str(caught.value)


def test_images_are_known_by_file_path_and_id(tmp_path: Path) -> None:
    absolute = tmp_path / "data" / "images" / "a.png"
    decomposed = unicodedata.normalize("NFD", "그림.png")
    judged = read(
        tmp_path,
        "judge,image_path_1,image_path_2,label,weight\n"
        f"Kim,{absolute},sub\\b.png,1,2.5\n"
        f"Lee,images/c.png,{decomposed},-1,\n"
        "Kim, id0 ,../data/images/sub/b.png,0,0\n",
    )
    assert judged[["one", "other"]].to_numpy().tolist() == [[0, 1], [2, 3], [0, 1]]
    assert judged.label.tolist() == [1, -1, 0]
    assert judged.weight.tolist() == [2.5, 1.0, 0.0]
    assert judged["row"].tolist() == [2, 3, 4]
    assert judged["judge"].tolist() == ["Kim", "Lee", "Kim"]


def test_a_file_name_comes_before_an_id(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("image_path_1,image_path_2,label\nx,y,1\n")
    images = named_table(Path("/d"), ["y", "x"], ["x", "z"])
    assert read_pairs([path], images, [])[["one", "other"]].to_numpy().tolist() == [[1, 0]]


def test_separators_and_spellings_of_labels(tmp_path: Path) -> None:
    judged = read(
        tmp_path,
        "image_path_1;image_path_2;label\na.png;c.png;1.0\na.png;c.png;−1\na.png;c.png;+1\n",
    )
    assert judged.label.tolist() == [1, -1, 1]


def test_every_fault_is_told_with_its_row(tmp_path: Path) -> None:
    told = faults(
        tmp_path,
        "image_path_1,image_path_2,label,weight\n"
        "a.png,c.pgn,1,1\n"
        "a.png,images/a.png,1,1\n"
        "a.png,c.png,2,1\n"
        "a.png,c.png,better,1\n"
        "a.png,c.png,1,-1\n"
        'a.png,c.png,1,"0,5"\n'
        "a.png,,1,nan\n",
    ).splitlines()
    found = [line.split("pairs.csv:")[1] for line in told[:-1]]
    assert found[0] == "2, image_path_2: 'c.pgn' is no image of the data set. Did you mean 'c.png'?"
    assert found[1].startswith("3, image_path_2: both images are 'a.png'")
    assert found[2].startswith("4, label: '2'; 1 (the first image is better), -1")
    assert found[3].startswith("5, label: 'better'")
    assert found[4].startswith("6, weight: '-1' is no number of at least 0")
    assert found[5].startswith("7, weight: '0,5'") and "point" in found[5]
    assert found[6].startswith("8, image_path_2: empty")
    assert found[7].startswith("8, weight: 'nan'")
    assert "4 images are known, such as 'a.png'" in told[-1]


def test_a_missing_column_is_told(tmp_path: Path) -> None:
    told = faults(tmp_path, "image_1,image_path_2,label\na.png,c.png,1\n")
    assert "no column 'image_path_1'. It has: image_1, image_path_2, label. Is it 'image_" in told


def test_an_empty_file_is_told(tmp_path: Path) -> None:
    assert "a header and no rows" in faults(tmp_path, "image_path_1,image_path_2,label\n")


def test_pairs_judged_both_ways_are_kept_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "mirip_fast"):
        judged = read(
            tmp_path,
            "image_path_1,image_path_2,label\n"
            "a.png,c.png,1\n"
            "c.png,a.png,1\n"  # the other way round
            "a.png,sub/b.png,1\n"
            "sub/b.png,a.png,-1\n"  # the same again
            "a.png,그림.png,0\n"
            "a.png,그림.png,1\n",  # a tie and a decision are no contradiction
        )
    assert len(judged) == 6
    assert "1 pair judged both ways (rows 2 and 3)" in caplog.text


@pytest.mark.parametrize(
    ("column", "weight", "said"),
    [("Weight", 2.5, "is read as weight"), ("WEIGHT ", 2.5, "is read as weight"),
     ("weights", 1.0, "column 'weights' is not read; if it holds the weights, call it weight"),
     ("height", 1.0, "")],
)  # fmt: skip
def test_columns_nearly_called_weight_are_read_or_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, column: str, weight: float, said: str
) -> None:
    caplog.set_level(logging.INFO, "mirip_fast")
    judged = read(tmp_path, f"image_path_1,ImagePath2,Label,{column}\na.png,c.png,1,2.5\n")
    assert judged.weight.tolist() == [weight] and judged[["one", "other"]].to_numpy().tolist() == [
        [0, 2]
    ]
    assert said in caplog.text and (said or column not in caplog.text)


def test_old_paths_are_known_by_their_ends_where_no_doubt_is_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    head = "image_path_1,image_path_2,label\n"
    judged = read(
        tmp_path, head + "C:\\art\\images\\a.png,/old/sub/b.png,1\nC:\\art\\images\\a.png,c.png,1\n"
    )
    assert judged[["one", "other"]].to_numpy().tolist() == [[0, 1], [0, 2]]
    assert "2 file names known by the end of the path" in caplog.text
    told = faults(tmp_path, head + "/x/1/a.png,c.png,1\n/x/2/a.png,c.png,1\nC.JPG,a,1\n")
    assert (
        "3, image_path_1: '/x/2/a.png' is no image of the data set. Did you mean 'a.png'?" in told
    )
    assert "'C.JPG' is no image of the data set. Did you mean 'c.png'?" in told


ZEROS = "image_path_1,image_path_2,label\na.png,c.png,1\na.png,sub/b.png,0\n"


@pytest.mark.parametrize(
    ("more", "zero", "labels", "said"),
    [("", None, [1, 0], "never -1, and 1 label of 0 count as ties"),
     ("", "tie", [1, 0], ""),
     ("", "second", [1, -1], "1 label of 0: the second image is better"),
     ("c.png,sub/b.png,-1\n", None, [1, 0, -1], ""),
     ("c.png,sub/b.png,-1\n", "second", [1, 0, -1], "has -1 as well, so 1 label of 0 are ties")],
)  # fmt: skip
def test_what_a_zero_means_is_asked_where_it_is_in_doubt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture,
    more: str, zero: str | None, labels: list[int], said: str,
) -> None:  # fmt: skip
    """Files labelled 1 and 0 are usual elsewhere; as ties, half of them would teach nothing."""
    caplog.set_level(logging.INFO, "mirip_fast")
    path = tmp_path / "pairs.csv"
    path.write_text(ZEROS + more)
    judged = read_pairs([path], known(tmp_path), [tmp_path], zero=zero)
    assert judged.label.tolist() == labels
    assert (said in caplog.text) if said else not caplog.text


def test_several_files_are_one_list_of_judgements(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, label in (("one.csv", 1), ("two.csv", -1)):
        (tmp_path / name).write_text(f"image_path_1,image_path_2,label\na.png,c.png,{label}\n")
    files = [tmp_path / "one.csv", tmp_path / "two.csv"]
    judged = read_pairs(files, known(tmp_path), [tmp_path])
    assert judged.label.tolist() == [1, -1] and judged["file"].tolist() == [*map(str, files)]
    assert f"(rows {files[0]}:2 and {files[1]}:2)" in caplog.text
