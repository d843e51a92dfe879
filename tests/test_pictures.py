"""The pictures of an evaluation: made whatever the files are called, and about what they should be."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from matplotlib import rcParams
from PIL import Image

from mirip_fast.evaluation.plots import (
    drawing,
    label,
    write_contact_sheet,
)
from mirip_fast.evaluation.text_table import display_width

pytestmark = pytest.mark.usefixtures("drawn")

NAMES = [
    "작품 1.png", "🎨 👩‍🎨 art.png", "$\\frac{x$.png", "two\nlines\tand\x1b[31m.png", "עברית\u202egnp.png",
    "very " * 40 + ".png", "\udcff\udcfe.png", "漢字かな交じり文.png", "_^{}.png", "plain.png",
]  # fmt: skip


def make_images(folder: Path) -> dict[str, Path]:
    files = {}
    for i, name in enumerate(NAMES):
        # The picture's own name on disk does not matter here, what is written below it does.
        files[f"id{i}"] = folder / f"{i}" / name[:200]
        files[f"id{i}"].parent.mkdir()
        size = (30 + 200 * (i % 3), 400 - 100 * (i % 2))
        Image.new("RGB", size, (25 * i, 128, 128)).save(files[f"id{i}"], format="png")
    return files


def make_mistakes(pairs: int) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "better_id": f"id{2 * i % 10}", "better_tier": "S", "better_score": 0.1, "gap": 2.4 + i,
            "worse_id": f"id{(2 * i + 1) % 10}", "worse_tier": "특급", "worse_score": 2.5 + i,
        }
        for i in range(pairs)
    )  # fmt: skip


@pytest.mark.parametrize("pairs", [1, 10])
def test_a_sheet_of_any_names(
    tmp_path: Path, pairs: int, decoded_elsewhere: Callable[[], None]
) -> None:
    decoded_elsewhere()
    files = make_images(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of letters that it cannot draw
        write_contact_sheet(tmp_path / "sheet.png", make_mistakes(pairs), files, "최악의 $x$ 실수")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.format == "PNG"
        assert sheet.width == 1300
        colours = {colour for _, colour in sheet.convert("RGB").getcolors(10_000_000)}
    shown = {i % 10 for i in range(2 * pairs)}
    assert {(25 * i, 128, 128) for i in shown} <= colours


def test_a_lost_file_leaves_a_frame(tmp_path: Path) -> None:
    files = make_images(tmp_path)
    files["id0"].unlink()
    files["id1"].write_bytes(b"no picture")
    write_contact_sheet(tmp_path / "sheet.png", make_mistakes(1), files, "title")
    assert (tmp_path / "sheet.png").stat().st_size > 1000


def test_text_is_cut() -> None:
    assert label("a\u200db", 10) == "ab"
    assert label("a\nb", 10) == "a\\nb"
    assert label("abcdefghij", 5) == "ab…ij"
    assert label("가가가가가가", 8) == "가가…가"
    for width in range(3, 14):
        assert display_width(label("가a가가bb가c가a", width)) <= width


def test_plain_names_need_no_other_font_and_what_none_has_is_told() -> None:
    with drawing(["a.png", "b c.png"]) as lacking:
        assert rcParams["font.family"] == ["DejaVu Sans"] and not lacking
    with drawing([*NAMES, "\U0010fffd"]) as lacking:  # of private use
        assert not any("Last Resort" in family for family in rcParams["font.family"])
        assert 0x10FFFD in lacking and ord("a") not in lacking
