"""The report page as a person meets it, in headless Chromium."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from contrast import contrast
from made_page import HOSTILE, made_map, made_page, pictures

from mirip_fast.evaluation.text_table import printable

pytestmark = pytest.mark.browser

NINE = [f"work {i}.png" for i in range(9)]


@pytest.fixture(scope="module")
def nine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of nine works; 1, 3 and 8 show the same. The files are not beside it any more for 6."""
    folder = tmp_path_factory.mktemp("nine")
    pictures(folder / "works", NINE)
    stacks = {i: {"group": 1, "cosine": 0.98, "exact": i == 1} for i in (1, 3, 8)}
    given = {
        "지원자 " + "a_long_name_" * 9: ["김아무개"] * 9,
        "address": ["https://example.org/" + "x" * 200] * 9,
        **{f"<b>{i}</b>": ["회화 " * 40] * 9 for i in range(20)},
    }
    made_page(folder / "works", NINE, folder / "report.html", stacks=stacks, given=given)
    (folder / "works" / NINE[6]).unlink()
    return folder / "report.html"


def wait_for_picture(page: Any, selector: str) -> None:
    """Until it is decoded (the page's policy forbids what playwright's own waiting would run in it)."""
    for _ in range(600):
        if page.evaluate(
            "(selector) => document.querySelector(selector).naturalWidth > 0", selector
        ):
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"{selector} is not shown")


def names(page: Any) -> list[str]:
    return page.locator(".card .name").all_text_contents()


def eventually(holds: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait until something holds that the page does on its own."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def in_focus(page: Any) -> str:
    return page.evaluate(
        "document.activeElement.closest('.card')?.querySelector('.name').textContent"
    )


def test_hostile_names_are_shown_and_never_run(tmp_path: Path, opened: Any) -> None:
    pictures(tmp_path / "works", HOSTILE)
    failures = [(str(tmp_path / "works" / "<img src=x onerror=window.hacked=1>"), "<b>no</b>")]
    made_page(tmp_path / "works", HOSTILE, tmp_path / "report.html", failures=failures)
    page = opened(tmp_path / "report.html")
    assert names(page) == [printable(name) for name in HOSTILE]
    assert page.locator(".card img").first.get_attribute("alt") == printable(HOSTILE[0])
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    for _ in HOSTILE:  # each in the large view, with its original
        page.locator("#large img.whole").wait_for()
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Escape")
    page.locator("#failures summary").click()
    assert "<img src=x" in page.locator("#failures td").first.text_content()
    assert page.evaluate("window.hacked") is None
    # Nor does the page let anybody put a program into it.
    page.evaluate(
        "{ const it = document.createElement('script'); it.append('window.hacked = 2');"
        "try { document.body.append(it) } catch {} }"
    )
    assert page.evaluate("window.hacked") is None
    assert all(
        "Content Security Policy" in text or "TrustedScript" in text for text in opened.wrong
    )


def test_win_rates_in_the_large_view(tmp_path: Path, opened: Any) -> None:
    pictures(tmp_path / "works", NINE)
    made_page(tmp_path / "works", NINE, tmp_path / "report.html", against=True)
    page = opened(tmp_path / "report.html")
    assert "(S 5, A 5, B 5, C 0)" in page.locator("#notes").text_content()
    page.locator(".card .open").first.click()
    part = page.locator("#large section", has_text="Compared with graded works of each tier")
    rates = part.locator(".bars .many").all_text_contents()
    assert rates[-1] == "?" and rates[0] == "100%"
    assert part.locator(".bars .chosen .what").text_content() == "S"
    assert opened.wrong == []


def test_filter_and_sort(nine: Path, opened: Any) -> None:
    page = opened(nine)
    page.keyboard.press("s")  # no stacks
    assert names(page) == NINE
    page.locator("#sort").select_option("lowest")
    assert names(page) == NINE[::-1]
    page.locator("#sort").select_option("name")
    assert names(page) == NINE
    page.locator("#sort").select_option("best")
    chips = page.locator("#tiers .chip")
    counts = [int(text) for text in chips.locator(".soft").all_text_contents()]
    assert sum(counts) == 9 and chips.count() == 4
    last = max(i for i, count in enumerate(counts) if count)
    chips.nth(last).click()
    assert names(page) == NINE[9 - counts[last] :]
    chips.nth(last).click()
    page.keyboard.press("/")
    page.keyboard.type("WORK 4")
    assert names(page) == ["work 4.png"] and "1 of 9" in page.locator("#count").text_content()
    page.keyboard.type("4")
    assert names(page) == [] and page.locator("#nothing").is_visible()
    page.keyboard.press("Escape")
    assert names(page) == NINE
    assert opened.wrong == []


def test_hangul_names_are_found_however_they_are_spelt(tmp_path: Path, opened: Any) -> None:
    apart = "\u1112\u1161\u11ab.png"  # 한 in its three letters, as a Mac writes it
    pictures(tmp_path / "works", [apart, "b.png"])
    made_page(tmp_path / "works", [apart, "b.png"], tmp_path / "report.html")
    page = opened(tmp_path / "report.html")
    page.locator("#search").fill("한")
    assert names(page) == [apart]


def test_near_duplicates_are_stacked_under_the_best_of_them(nine: Path, opened: Any) -> None:
    page = opened(nine)
    assert names(page) == [NINE[i] for i in (0, 1, 2, 4, 5, 6, 7)]
    assert page.locator(".stacked .name").all_text_contents() == [NINE[1]]
    page.locator("#sort").select_option("lowest")
    assert names(page)[0] == NINE[8] and len(names(page)) == 7
    page.locator(".more:visible").click()
    assert len(names(page)) == 9 and in_focus(page) == NINE[8]
    page.locator("#stack").uncheck()
    page.locator("#stack").check()
    assert len(names(page)) == 7
    page.locator(".open").first.click()
    assert page.locator("#large .strip li").count() == 2
    page.locator("#large .strip button").last.click()
    assert page.locator("#large .filename").text_content() == NINE[3]


def test_keyboard_alone(nine: Path, opened: Any) -> None:
    page = opened(nine)
    assert page.locator(".open[tabindex='0']").count() == 1
    page.keyboard.press("ArrowRight")
    assert in_focus(page) == NINE[0]
    page.keyboard.press("ArrowRight")
    assert in_focus(page) == NINE[1]
    columns = page.evaluate("getComputedStyle(grid).gridTemplateColumns.split(' ').length", None)
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowDown")
    assert in_focus(page) == names(page)[columns]
    page.keyboard.press("End")
    assert in_focus(page) == NINE[7]
    page.keyboard.press("ArrowRight")  # stays
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    assert page.locator("#large[open] .filename").text_content() == NINE[0]
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.locator("#large .filename").text_content() == NINE[2]
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0
    eventually(
        lambda: in_focus(page) == NINE[2]
    )  # a dialog tells that it was closed a moment later
    page.keyboard.press("?")
    assert page.locator("#keys[open] dt").count() > 7
    page.keyboard.press("Escape")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"
    assert opened.wrong == []


def test_compare_two(nine: Path, opened: Any) -> None:
    page = opened(nine)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("c")
    assert page.locator("#tray").is_visible() and page.locator("#compare[open]").count() == 0
    page.keyboard.press("End")
    # The same key on a Korean keyboard.
    page.evaluate(
        "document.activeElement.dispatchEvent(new KeyboardEvent('keydown',"
        "{key: 'ㅊ', code: 'KeyC', bubbles: true}))"
    )
    dialog = page.locator("#compare[open]")
    assert dialog.locator(".name").all_text_contents() == [NINE[0], NINE[7]]
    chance, sharp = page.evaluate(
        "[(() => { const d = JSON.parse(document.getElementById('data').textContent); const w = d.works;"
        "return 1 / (1 + Math.exp(-(w[0].score - w[7].score) * d.sharpness)) })(), 1]"
    )
    assert sharp and chance > 0.5
    shown = ">99%" if chance > 0.995 else f"{round(100 * chance)}%"
    assert dialog.locator("h2").text_content() == (
        f"The left one is the better one with a probability of {shown}"
    )
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0 and page.locator("#tray").is_hidden()


def test_the_small_copy_stays_where_the_original_is_gone(nine: Path, opened: Any) -> None:
    page = opened(nine)
    page.locator(".open").nth(5).click()
    assert page.locator("#large .filename").text_content() == NINE[6]
    page.locator("#large .nooriginal").wait_for()
    assert page.locator("#large .stage img").get_attribute("src").startswith("data:image/webp")
    page.keyboard.press("ArrowLeft")
    page.locator("#large img.whole").wait_for()
    assert page.locator("#large .nooriginal").is_hidden()


@pytest.mark.parametrize(
    ("locale", "word"), [("ko-KR", "순"), ("en-GB", "Sort"), ("fr-FR", "Sort")]
)
def test_language_of_the_browser(nine: Path, opened: Any, locale: str, word: str) -> None:
    page = opened(nine, locale=locale)
    assert word in page.locator("[data-say='sort'], #sort option").all_text_contents()[0] + (
        page.locator("#sort").text_content()
    )
    assert page.evaluate("document.documentElement.lang") == ("ko" if "ko" in locale else "en")
    before = page.locator("#count").text_content()
    page.locator("#language").click()
    assert page.locator("#count").text_content() != before
    assert opened.wrong == []


def least_contrast(page: Any) -> float:
    return min(
        contrast(page, f"var(--{front})", f"var(--{back})")
        for back in ("paper", "raised", "empty")
        for front in ("ink", "soft", "accent")
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_with_contrast(nine: Path, opened: Any, scheme: str) -> None:
    page = opened(nine, color_scheme=scheme)
    brightness = "parseInt(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])"
    assert (page.evaluate(brightness) > 128) == (scheme == "light")
    # WCAG 2.2, 1.4.3: at least 4.5 to 1.
    assert least_contrast(page) >= 4.5
    other = "dark" if scheme == "light" else "light"
    while page.evaluate("document.documentElement.dataset.theme") != other:
        page.keyboard.press("t")
    assert (page.evaluate(brightness) > 128) == (other == "light")
    assert least_contrast(page) >= 4.5


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_screen(nine: Path, opened: Any, width: int) -> None:
    page = opened(nine, viewport={"width": width, "height": 700})
    wide = "document.documentElement.scrollWidth - innerWidth"
    assert page.evaluate(wide) <= 0
    page.locator(".open").first.click()
    assert page.evaluate("large.scrollWidth - innerWidth") <= 0
    aside = page.locator("#large aside")
    assert aside.evaluate("it => it.scrollWidth - it.clientWidth") <= 0
    assert aside.locator(".given dt").count() == 22
    assert aside.locator(".given").bounding_box()["height"] < 300  # what else is known is in reach
    box = page.locator("#large .stage img").bounding_box()
    assert box["width"] > 0.4 * width


def test_unknown_numbers_are_said_to_be_unknown(tmp_path: Path, opened: Any) -> None:
    pictures(tmp_path / "works", NINE[:3])
    made_page(tmp_path / "works", NINE[:3], tmp_path / "report.html", known=False)
    page = opened(tmp_path / "report.html")
    assert page.locator("#tiers").is_hidden() and page.locator("#notes li").count() >= 3
    assert "unknown: no heads" in page.locator("#notes").text_content()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert page.locator("#large").text_content().count("unknown") >= 3
    page.keyboard.press("Escape")
    eventually(lambda: page.locator("#large *").count() == 0)  # it hears of that a moment later
    page.keyboard.press("c")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("c")
    assert "unknown" in page.locator("#compare h2").text_content()
    assert opened.wrong == []


def test_a_thousand_works_open_and_only_those_in_sight_are_loaded(
    tmp_path: Path, opened: Any
) -> None:
    many = [f"{i:04d}.png" for i in range(1000)]
    pictures(tmp_path / "works", many)
    made_page(tmp_path / "works", many, tmp_path / "report.html")
    page = opened(tmp_path / "report.html")
    assert page.locator("#count").text_content() == "1,000 works"
    page.locator(".card img[src]").first.wait_for()
    assert 0 < page.locator(".card img[src]").count() < 200
    page.keyboard.press("End")
    assert in_focus(page) == many[-1]
    wait_for_picture(page, ".block:last-child .card:last-child img")
    assert page.locator(".card").count() < 500
    page.keyboard.press("/")
    page.keyboard.type("0777")
    assert names(page) == ["0777.png"]
    assert opened.wrong == []


def test_what_raises_and_lowers_the_score(tmp_path: Path, opened: Any) -> None:
    pictures(tmp_path / "works", NINE)
    maps = made_map(tmp_path / "works", NINE[1])
    made_page(tmp_path / "works", NINE, tmp_path / "report.html", maps=maps)
    page = opened(tmp_path / "report.html")
    page.locator(".open").first.click()
    page.keyboard.press("m")  # nothing is known of this one
    assert page.locator("#large .map").count() == 0
    page.keyboard.press("ArrowRight")
    assert page.locator("#large .map").is_hidden()
    page.keyboard.press("m")
    assert page.locator("#large .map").is_visible() and page.locator("#mapshown").is_checked()
    page.locator("#mapshown").uncheck()
    assert page.locator("#large .map").is_hidden()
    assert page.locator("#large .strip li").count() == 2
    page.keyboard.press("ArrowLeft")  # the box has the focus, and the arrows work
    assert page.locator("#large .filename").text_content() == NINE[0]
    assert opened.wrong == []
