"""The page of `label` as a judge meets it, in headless Chromium: keys, taps, and what pairs.csv then holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from made_run import rows_of
from test_label_server import NAMES, Browser, photos, serving, settings

pytestmark = pytest.mark.browser


@pytest.fixture
def label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Browser]:
    """A session over 30 pictures, four of which have hostile names; no head is trained meanwhile."""
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos")
    rare = settings(**{"label.retrain_every": 1000})
    with serving(tmp_path / "photos", tmp_path / "pairs.csv", rare) as browser:
        yield browser


def wait_until(page: Any, true: Callable[[], object]) -> None:
    for _ in range(300):
        if true():
            return
        page.wait_for_timeout(50)
    raise AssertionError("it did not come")


def shown(page: Any, label: Browser) -> tuple[str, str]:
    """File names of the left and the right work, once both are visible."""
    wait_until(
        page,
        lambda: page.evaluate(
            "document.querySelectorAll('.work').length > 1"
            " && [...document.querySelectorAll('.work img')]"
            ".every((img) => img.complete && img.naturalWidth > 0)"
        ),
    )
    numbers = page.evaluate(
        "[...document.querySelectorAll('.work img')].map((img) => +img.src.split('/').at(-1))"
    )
    left, right = (label.label.works.name(number) for number in numbers)
    return left, right


def judged(page: Any, label: Browser, act: Callable[[], None]) -> tuple[tuple[str, str], list[Any]]:
    """The pair that was shown, and the rows of pairs.csv once the next pair is there."""
    pair = shown(page, label)
    act()
    wait_until(page, lambda: shown(page, label) != pair)
    wait_until(page, lambda: page.evaluate("!document.body.classList.contains('busy')"))
    path = Path("pairs.csv")
    return pair, rows_of(path) if path.exists() else []


def row(pair: tuple[str, str], label: str) -> tuple[str, str, str]:
    return (*pair, label)


def told(rows: list[Any]) -> list[tuple[str, str, str]]:
    return [(line["image_path_1"], line["image_path_2"], line["label"]) for line in rows]


def test_keys_write_judgements(label: Browser, opened: Any) -> None:
    page = opened(label.label.server.address)
    shown(page, label)
    assert page.locator("h1").text_content() == "Which work is better?"
    assert page.locator("#undo").is_disabled()
    expected = []
    for key, verdict in (("ArrowLeft", "1"), ("ArrowRight", "-1"), ("0", "0"), ("ArrowDown", "0")):
        pair, rows = judged(page, label, lambda key=key: page.keyboard.press(key))
        expected.append(row(pair, verdict))
        assert told(rows) == expected
    assert page.locator("#judged").text_content() == "4 judgements (4 now)"
    assert all(0 <= float(line["seconds"]) < 60 for line in rows)

    skipped, rows = judged(page, label, lambda: page.keyboard.press("Space"))
    assert told(rows) == expected
    for key in ("u", "Backspace"):  # the pairs come back, the last one first
        _, rows = judged(page, label, lambda key=key: page.keyboard.press(key))
        again = expected.pop()
        assert told(rows) == expected and shown(page, label) == again[:2]
    pair, rows = judged(page, label, lambda: page.keyboard.press("ArrowLeft"))
    expected.append(row(pair, "1"))
    assert told(rows) == expected and skipped not in [line[:2] for line in expected]

    page.keyboard.down("ArrowRight")  # a key that is held judges one pair, not many
    for _ in range(5):
        page.keyboard.down("ArrowRight")
    page.keyboard.up("ArrowRight")
    wait_until(page, lambda: len(rows_of(Path("pairs.csv"))) == 4)
    page.wait_for_timeout(300)
    assert len(rows_of(Path("pairs.csv"))) == 4
    for key in ("a", "1", "Enter", "Tab"):
        page.keyboard.press(key)
    page.keyboard.press("Control+ArrowLeft")
    page.wait_for_timeout(300)
    assert len(rows_of(Path("pairs.csv"))) == 4
    page.keyboard.press("z")
    assert page.evaluate("document.body.classList.contains('large')")
    height = page.viewport_size["height"]
    for button in page.locator("nav button").all():  # whole, or one would not know what to press
        box = button.bounding_box()
        assert box["y"] + box["height"] <= height
    assert opened.wrong == []


def test_hostile_names_never_reach_the_page(label: Browser, opened: Any) -> None:
    page = opened(label.label.server.address)
    shown(page, label)
    works = label.label.works
    number = {works.name(i): i for i in range(len(works))}
    assert set(NAMES) < {name.replace("∕", "/") for name in number}
    for name in NAMES:  # the picture is there all the same
        page.evaluate(
            "(number) => { document.querySelector('#left img').src = `image/${number}` }",
            number[name.replace("/", "∕")],
        )
        assert shown(page, label)[0] == name.replace("/", "∕")
    text = page.content() + page.title()
    assert not any(part in text for part in ("alert(1)", "quote", "불꽃", "🔥", "photos"))
    # A judgement of a pair with a hostile name is kept under it.
    page.reload()
    for _ in range(40):
        pair, rows = judged(page, label, lambda: page.keyboard.press("ArrowLeft"))
        assert told(rows)[-1] == row(pair, "1")
        if any(name in pair for name in number if not name.startswith("p")):
            break
    else:
        raise AssertionError("no hostile name was shown")
    assert opened.wrong == []


def test_a_phone(label: Browser, opened: Any) -> None:
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    page = opened(label.label.server.address, locale="ko-KR", **phone)
    shown(page, label)
    assert page.locator("h1").text_content() == "어느 작품이 더 좋은가요?"
    assert page.evaluate("document.documentElement.lang") == "ko"
    pair, rows = judged(page, label, lambda: page.locator("#left").tap())
    upper, lower = (page.locator(name).bounding_box() for name in ("#left", "#right"))
    assert upper["y"] + upper["height"] <= lower["y"] and upper["x"] == lower["x"]
    assert told(rows) == [row(pair, "1")]
    pair, rows = judged(page, label, lambda: page.locator("#right").tap())
    assert told(rows)[-1] == row(pair, "-1")
    # All verdicts are in sight without scrolling, and nothing is wider than the screen.
    for zoomed in (False, True):
        if zoomed:
            page.locator("#zoom").tap()
        for button in page.locator("nav .verdict").all():
            box = button.bounding_box()
            assert box["y"] + box["height"] <= 844 and box["height"] >= 44
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert opened.wrong == []


def test_keys_give_tiers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: Any) -> None:
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos", 12)
    out = tmp_path / "grades.csv"
    with serving(tmp_path / "photos", out, settings(), grade=True) as label:
        page = opened(label.label.server.address, color_scheme="dark")

        def tiers() -> list[str]:
            return [line["tier"] for line in rows_of(out)] if out.exists() else []

        def press(key: str, expected: list[str]) -> None:
            wait_until(page, lambda: page.evaluate("!document.body.classList.contains('busy')"))
            page.keyboard.press(key)
            wait_until(page, lambda: tiers() == expected)

        page.wait_for_selector("nav .verdict")
        assert page.locator("nav .verdict").all_inner_texts() == ["1S", "2A", "3B", "4C"]
        for key, expected in (("1", ["S"]), ("b", ["S", "B"]), ("4", ["S", "B", "C"])):
            press(key, expected)
        press("u", ["S", "B"])
        press("A", ["S", "B", "A"])
        for key in ("5", "ArrowLeft", "0", "f"):  # these mean nothing here
            page.keyboard.press(key)
        wait_until(page, lambda: page.evaluate("!document.body.classList.contains('busy')"))
        page.evaluate(  # a Korean keyboard
            "document.dispatchEvent(new KeyboardEvent('keydown', { key: 'ㅊ', code: 'KeyC' }))"
        )
        wait_until(page, lambda: tiers() == ["S", "B", "A", "C"])
        # the list: the second one is undone, and comes again
        page.keyboard.press("l")
        undo = page.locator("#listed li button")
        undo.first.wait_for()
        assert undo.count() == 4
        undo.nth(2).click()
        wait_until(page, lambda: undo.count() == 3)
        page.keyboard.press("1")  # nothing is judged behind the list
        page.keyboard.press("Escape")
        assert tiers() == ["S", "A", "C"]
        page.keyboard.press("?")
        assert page.locator("#keys dt").first.is_visible()
        page.locator("#keys .close").click()
        press("2", ["S", "A", "C", "A"])
    assert opened.wrong == []


def test_four_are_put_in_order(label: Browser, opened: Any) -> None:
    page = opened(label.label.server.address)
    shown(page, label)
    page.keyboard.press("f")
    page.wait_for_selector("[data-mode=four]")
    works = label.label.works
    four = [works.name(number) for number in label.state()["works"]]
    for key in ("3", "1", "1", "u", "2"):  # a key twice is nothing; the second is taken back
        page.keyboard.press(key)
    assert [work.get_attribute("data-place") for work in page.locator(".work").all()] == [
        "",
        "2",
        "1",
        "",
    ]
    page.locator(".work").nth(3).click()
    path = Path("pairs.csv")
    wait_until(page, lambda: path.exists() and len(rows_of(path)) == 6)
    order = [four[2], four[1], four[3], four[0]]
    for line in rows_of(path):
        one, other = order.index(line["image_path_1"]), order.index(line["image_path_2"])
        assert line["label"] == ("1" if one < other else "-1")
    wait_until(page, lambda: page.evaluate("!document.body.classList.contains('busy')"))
    page.keyboard.press("u")
    wait_until(page, lambda: rows_of(path) == [])
    assert opened.wrong == []
