"""Tables line up whatever script their cells are in."""

import unicodedata

import pytest

from mirip_fast.evaluation.text_table import display_width, format_table, printable


@pytest.mark.parametrize(
    "text, width",
    [
        ("", 0),
        ("abc", 3),
        ("그림", 4),
        (unicodedata.normalize("NFD", "그림"), 4),
        ("é", 1),
        ("e\u0301", 1),
        ("日本", 4),
        ("Ａ", 2),
        ("ｱ", 1),
        ("½–", 2),
    ],
)
def test_display_width(text, width):
    assert display_width(text) == width


def test_columns_line_up():
    table = format_table(
        ["file", "score", "tier"], [["그림 1.png", 1.5, "S"], ["x", 10, "금상"]], "lrl"
    )
    assert table.split("\n") == [
        "file        score  tier",
        "----------  -----  ----",
        "그림 1.png    1.5  S",
        "x              10  금상",
    ]


def test_a_file_name_can_not_break_the_table():
    table = format_table(["file"], [["a\nb\x1b[31m\u202egnp.\udcff"]])
    assert table.split("\n")[2:] == ["a\\nb\\x1b[31m\\u202egnp.\\udcff"]
    table.encode("utf-8")
    assert printable("한글 é 👍") == "한글 é 👍"
