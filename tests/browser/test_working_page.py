"""Working on the page of a ranking: what is selected, marked, moved and exported, in headless Chromium."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openpyxl
import pytest
from made_page import made_page, pictures
from test_report_page import in_focus, names, wait_for_picture

pytestmark = pytest.mark.browser

WORKS = [f"지원자 {i}/작품 {i}.png" for i in range(6)] + ["=formula, <b>&.png", "x/y.png"]


@pytest.fixture
def page_file(tmp_path: Path) -> Path:
    pictures(tmp_path / "works", WORKS, side=900)
    given = {"학과": ["회화", "조소"] * 4, "번호": [f"0{i}" for i in range(8)], "<b>": ["-1"] * 8}
    made_page(tmp_path / "works", WORKS, tmp_path / "report.html", given=given)
    return tmp_path / "report.html"


@pytest.fixture
def page(page_file: Path, opened: Any) -> Iterator[Any]:
    yield opened(page_file)
    assert opened.wrong == []


def exported(page: Any, name: str) -> bytes:
    page.keyboard.press("e")
    with page.expect_download() as found:
        page.get_by_role("button", name=name, exact=True).click()
    page.keyboard.press("Escape")
    return Path(found.value.path()).read_bytes()


def said(page: Any, place: int) -> str:
    return page.locator(".card").nth(place).locator(".said").text_content()


def test_marks_by_keys_alone_survive_a_reload_and_are_taken_back(page: Any) -> None:
    page.keyboard.press("ArrowRight")
    page.keyboard.press("5")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("n")
    page.keyboard.type("2차, 다시 보기，2차")
    page.keyboard.press("Tab")
    page.keyboard.type("색이 좋다")
    page.keyboard.press("Escape")
    assert said(page, 0) == "★★★★★" and said(page, 1) == "2차다시 보기색이 좋다"
    page.reload()
    assert said(page, 0) == "★★★★★" and said(page, 1) == "2차다시 보기색이 좋다"
    for keys in ("ArrowRight", "3", "0"):
        page.keyboard.press(keys)
    assert said(page, 0) == ""
    page.keyboard.press("Control+z")
    assert said(page, 0) == "★★★"
    page.keyboard.press("Control+z")
    assert said(page, 0) == "★★★★★" and page.locator("#undo").is_disabled()
    page.keyboard.press("Control+Shift+z")
    assert said(page, 0) == "★★★"
    page.keyboard.press("/")
    page.keyboard.type("색이")
    assert names(page) == [WORKS[1]]


def test_select_by_click_shift_and_keys_and_mark_them_together(page: Any) -> None:
    cards = page.locator(".card .open")
    cards.nth(1).click(modifiers=["Control"])
    cards.nth(3).click(modifiers=["Shift"])
    assert page.locator(".selected .name").all_text_contents() == WORKS[1:4]
    page.keyboard.press("4")
    assert [said(page, i) for i in range(5)] == ["", "★★★★", "★★★★", "★★★★", ""]
    page.keyboard.press("Escape")
    assert page.locator(".selected").count() == 0 and page.locator("#tray").is_hidden()
    page.keyboard.press("Home")
    page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("x")  # the second one not
    assert page.locator(".selected .name").all_text_contents() == WORKS[:1]
    page.keyboard.press("Control+a")
    assert "8 selected" in page.locator("#tray").text_content()
    page.locator(".tick").first.click()
    assert "7 selected" in page.locator("#tray").text_content()


def test_the_own_order_stands_beside_the_models(page: Any) -> None:
    page.keyboard.press("End")
    for _ in range(2):
        page.keyboard.press("[")
    assert names(page) == [*WORKS[:5], WORKS[7], *WORKS[5:7]] and in_focus(page) == WORKS[7]
    assert page.locator("#sort").input_value() == "mine"
    page.keyboard.press("Enter")
    page.get_by_label("Place in your order").fill("1")
    page.keyboard.press("Tab")
    page.keyboard.press("Escape")
    assert names(page)[0] == WORKS[7] and "yours: 1" in said(page, 0)
    page.locator("#sort").select_option("best")
    assert names(page) == WORKS
    page.reload()
    assert names(page)[0] == WORKS[7]
    rows = list(csv.DictReader(io.StringIO(exported(page, "Table (CSV)").decode("utf-8-sig"))))
    assert [(row["own_rank"], row["rank"]) for row in rows[:2]] == [("1", "8"), ("2", "1")]


def test_filters_of_the_users_columns_marks_and_uncertainty(page: Any) -> None:
    page.keyboard.press("f")
    page.get_by_label("학과").select_option("=조소")
    assert names(page) == WORKS[1::2]
    assert page.get_by_label("번호").count() == 0  # tells every work apart: it is searched for
    page.keyboard.press("Escape")
    page.locator(".card .open").first.focus()
    page.keyboard.press("3")
    page.get_by_label("Your marks").select_option("stars3")
    assert names(page) == [WORKS[1]] and "1 of 8" in page.locator("#count").text_content()
    page.get_by_role("button", name="Show all").click()
    assert names(page) == WORKS
    page.get_by_label("not settled").check()
    unsettled = page.locator(".range", has_text="~").count()
    assert names(page) and len(names(page)) == unsettled


def test_exports_hold_what_was_said_in_the_formats_of_others(page: Any, opened: Any) -> None:
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("4")
    page.keyboard.press("n")
    page.keyboard.type("a<b>&")
    page.keyboard.press("Escape")
    page.keyboard.press("x")
    raw = exported(page, "Table (CSV)")
    (row,) = csv.DictReader(io.StringIO(raw.decode("utf-8-sig")))
    assert raw.startswith(b"\xef\xbb\xbf") and row["file"] == "'" + WORKS[6]
    assert (row["stars"], row["tags"], row["학과"], row["<b>"]) == ("4", "a<b>&", "회화", "-1")
    book = exported(page, "Table (Excel)")
    sheet = openpyxl.load_workbook(io.BytesIO(book))["ranking"]
    head, cells = [[cell.value for cell in line] for line in sheet.iter_rows()]
    work = dict(zip(head, cells, strict=True))
    assert head == list(row) and sheet.auto_filter.ref == sheet.dimensions
    assert sheet.freeze_panes == "A2" and sheet.cell(2, head.index("file") + 1).data_type != "f"
    assert (work["file"], work["rank"], work["번호"], work["<b>"]) == (WORKS[6], 7, "06", -1)
    assert exported(page, "List of names").decode() == WORKS[6] + "\n"
    with zipfile.ZipFile(io.BytesIO(exported(page, "Ratings (XMP)"))) as found:
        assert found.testzip() is None and found.namelist() == ["=formula, <b>&.xmp"]
        sidecar = found.read("=formula, <b>&.xmp").decode()
    assert 'xmp:Rating="4"' in sidecar and "<rdf:li>a&#60;b&#62;&#38;</rdf:li>" in sidecar
    work = json.loads(exported(page, "JSON"))["works"][0]
    assert work["stars"] == 4 and work["file"] == WORKS[6]
    marks = exported(page, "Your marks")
    page.keyboard.press("Control+z")
    page.keyboard.press("Control+z")
    page.keyboard.press("e")
    foreign = {"__proto__": {"stars": 1}, "0" * 16: {"stars": 2}, "x": 3}
    given = json.dumps({"marks": {**json.loads(marks)["marks"], **foreign}}).encode()
    page.locator("#import").set_input_files({"name": "m.json", "mimeType": "", "buffer": given})
    told = "Marks of 1 works were read in; 1 others"
    page.locator("#export [role=status]", has_text=told).wait_for()
    page.keyboard.press("Escape")
    assert said(page, 6) == "★★★★a<b>&"


def test_looking_closely_and_four_side_by_side(page: Any) -> None:
    page.locator(".card .open").first.click()
    page.locator("#large img.whole").wait_for()
    wait_for_picture(page, "#large img.whole")
    page.keyboard.press("z")
    scale = "large.querySelector('img').getBoundingClientRect().width / large.querySelector('img').offsetWidth"
    shown = "large.querySelector('img').offsetWidth / 900"
    assert page.evaluate(scale) * min(1, page.evaluate(shown)) == pytest.approx(1, rel=0.02)
    page.keyboard.press("+")
    before = page.evaluate("large.querySelector('img').getBoundingClientRect().x")
    page.keyboard.press("Shift+ArrowRight")
    assert page.evaluate("large.querySelector('img').getBoundingClientRect().x") < before
    page.keyboard.press("z")
    assert page.evaluate(scale) == 1
    page.keyboard.press("Escape")
    for _ in range(3):
        page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("c")
    assert page.locator("#compare[open] .name").all_text_contents() == WORKS[:4]
    page.get_by_role("button", name="Put first in your order").nth(2).click()
    page.keyboard.press("Escape")
    page.locator("#sort").select_option("mine")
    assert names(page)[:3] == [WORKS[2], WORKS[0], WORKS[1]]
    page.keyboard.press("?")
    listed = page.locator("#keys[open] kbd").all_text_contents()
    assert {"x", "c", "n", "z", "[", "]", "f", "e"} <= set(listed)


def test_applicants_stand_in_order_and_show_their_works_alone(tmp_path: Path, opened: Any) -> None:
    pictures(tmp_path / "works", WORKS)
    hands = ["나 <b>", "가", "가", "나 <b>", "나 <b>", None, "다", "다"]
    made_page(tmp_path / "works", WORKS, tmp_path / "report.html", hands=hands)
    page = opened(tmp_path / "report.html")
    chips = page.locator("#people .chip")
    assert chips.all_text_contents() == ["가", "나 <b>", "다"]
    assert page.locator("#people li").nth(1).locator(".their").count() == 3
    chips.nth(1).click()
    assert names(page) == [WORKS[0], WORKS[3], WORKS[4]]
    chips.nth(1).click()
    page.select_option("#sort", "applicant")
    assert names(page) == [WORKS[i] for i in (1, 2, 0, 3, 4, 6, 7, 5)]
    page.locator("#people .their").nth(2).click()
    assert page.locator("#large").is_visible() and WORKS[0] in page.locator("#large").text_content()
    assert opened.wrong == []
