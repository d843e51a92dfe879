"""The evaluation page as a person meets it, in headless Chromium."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contrast import contrast
from made_evaluation import made_evaluation_page, made_report
from made_page import HOSTILE

from mirip_fast.evaluation.text_table import printable
from mirip_fast.ranking.judged_pairs import PairReport

pytestmark = pytest.mark.browser

HISTORY = (
    "epoch,train/loss,val/loss,train/accuracy,val/accuracy\n"
    "1,0.7,0.69,0.5,0.55\n2,0.5,0.55,0.8,0.7\n3,0.3,0.6,0.9,0.65\n"
)
LONG = "서울특별시 종로구 아주아주 긴 이름의 미술학원과 <b>그</b> 부설 연구소 "
PARTS = ["measures", "violins", "confusion", "tierPairs", "groups", "within", "reliability",
         "learning", "mistakes"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with everything: hostile file names, fifty groups with long names, a within column."""
    rng = np.random.default_rng(0)
    tiers = np.arange(200) % 4
    scores = rng.normal(size=200) - 0.6 * tiers
    for number in range(len(HOSTILE)):  # they are the worst mistakes
        scores[number] = -9 + tiers[number] * 6
    report = made_report(
        scores, tiers, groups=[f"{LONG}{i % 50}" for i in range(200)],
        within=["회화", "<i>조소</i>", "print"] * 66 + ["회화"] * 2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("whole")
    return made_evaluation_page(
        folder, report, files=HOSTILE, within="<script>department", history=HISTORY
    )


def test_everything_is_there_and_nothing_runs_or_is_fetched(whole: Path, opened: Any) -> None:
    page = opened(whole)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.reload()
    assert page.locator(".part").evaluate_all("all => all.map((it) => it.id)") == PARTS
    page.locator("details.more summary").first.click()
    assert [url for url in asked if not url.startswith(("data:", whole.as_uri()))] == []
    assert page.evaluate("window.hacked") is None and opened.wrong == []
    shown = page.locator(".mistake .name").all_text_contents()
    assert set(shown) & {printable(name) for name in HOSTILE}
    assert page.locator("#groups .share").count() == 50
    assert page.locator("#groups b, #within i.evil").count() == 0
    assert page.locator("#within h2").text_content() == "Accuracy inside each <script>department"
    # 20 at once, the rest on demand.
    assert page.locator("#groups .shares").first.locator(".share").count() == 20


def test_the_numbers_that_are_read_are_those_of_the_report(tmp_path: Path, opened: Any) -> None:
    report = made_report()
    page = opened(made_evaluation_page(tmp_path, report))
    lead = page.locator(".lead").text_content()
    assert f"it puts {round(100 * report.pairwise_accuracy)} in the right order" in lead
    row = page.locator("[data-measure=accuracy] td").all_text_contents()
    interval = report.pairwise_accuracy_interval
    assert interval is not None
    assert row[0] == f"{100 * report.pairwise_accuracy:.1f}%"
    assert row[1] == f"{100 * interval.low:.1f}%–{100 * interval.high:.1f}%"
    assert report.probabilities is not None
    cells = page.locator("#confusion td").all_text_contents()
    confusion = report.probabilities["tiers"]["confusion"]
    assert cells == [str(count) for counts in confusion for count in counts]
    values = page.locator("#tierPairs span.value").all_text_contents()
    assert values == [f"{100 * row.accuracy:.1f}%" for row in report.tier_pairs.itertuples()]
    # The mark of a value lies where its track says.
    left = page.locator("#tierPairs .track .value").first.evaluate(
        "it => parseFloat(it.style.left)"
    )
    start = page.locator("#tierPairs .track .chance").first.evaluate(
        "it => parseFloat(it.style.left)"
    )
    first = report.tier_pairs["accuracy"][0]
    low = (0.5 - start / 100) / (1 - start / 100)
    assert left == pytest.approx(100 * (first - low) / (1 - low), abs=0.1)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_is_written_can_be_read(whole: Path, opened: Any, scheme: str) -> None:
    """WCAG's contrast of 4.5 for the darkest field of a matrix, and of 3 for the lines."""
    page = opened(whole, color_scheme=scheme)
    darkest = "color-mix(in oklab, var(--accent) 45%, var(--empty))"
    assert contrast(page, "var(--ink)", darkest) >= 4.5
    for line in ("var(--accent)", "var(--second)", "var(--soft)"):
        assert contrast(page, line, "var(--paper)") >= 3
    assert contrast(page, "var(--second)", "var(--paper)") >= 4.5  # warnings


@pytest.mark.parametrize("width", [360, 390, 1280])
def test_nothing_is_wider_than_the_screen(whole: Path, opened: Any, width: int) -> None:
    page = opened(whole, viewport={"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    for track in page.locator("#groups .track").all()[:3]:
        assert track.bounding_box()["width"] > 100


def test_both_languages_and_all_colours(whole: Path, opened: Any) -> None:
    page = opened(whole, locale="ko-KR")
    assert "순서를 맞힙니다" in page.locator(".lead").text_content()
    page.locator("#language").click()
    assert "in the right order" in page.locator(".lead").text_content()
    assert page.locator("html").get_attribute("lang") == "en"
    page.locator("#theme").click()
    assert page.locator("html").get_attribute("data-theme") in ("light", "dark")
    assert opened.wrong == []


def test_pages_of_little(tmp_path: Path, opened: Any) -> None:
    cases = {
        "two works": made_report([1.0, 2.0], [0, 3]),
        "equal scores": made_report(np.zeros(60), np.arange(60) % 4),
        "tiers missing": made_report(tiers=np.arange(90) % 2 * 2, rounds=0),
        "26 tiers": made_report(
            names=[f"등급 {chr(65 + i)}" for i in range(26)], tiers=np.arange(208) % 26
        ),
        "judged pairs": None,
    }
    for name, report in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        pairs = None if report else PairReport(40, 3, 0.8, None, "val", False)
        page = opened(
            made_evaluation_page(folder, report, pairs=pairs),
            viewport={"width": 390, "height": 800},
        )
        assert page.locator(".lead").count() == 1, name
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, name
        for bad in ("NaN", "undefined", "Infinity", "null"):
            assert bad not in page.locator("body").inner_text(), (name, bad)
    assert opened.wrong == []
