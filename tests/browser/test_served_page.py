"""The page of `serve` in headless Chromium: two browsers say things of the same works."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from test_report_page import eventually, names

pytest.importorskip("uvicorn")
pytest.importorskip("multipart")

from starlette.applications import Starlette
from starlette.middleware import Middleware
from test_serve import WORKS, open_page, pictures

from mirip_fast.serving import Guard, LocalServer

pytestmark = pytest.mark.browser


def test_two_browsers_and_a_reload(tmp_path: Path, opened: Any) -> None:
    pictures(tmp_path / "works", WORKS)
    with open_page(tmp_path) as live:
        server = LocalServer(
            lambda token: Starlette(
                routes=live.routes(token), middleware=[Middleware(Guard, token=token)]
            )
        )
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            one, other = opened(server.address), opened(server.address)
            for page, key in ((one, "5"), (other, "n")):
                page.keyboard.press("ArrowRight")
                page.keyboard.press(key)
            other.keyboard.type("다시")
            other.keyboard.press("Escape")
            one.keyboard.press("End")
            one.keyboard.press("[")
            eventually(lambda: len(live.marks.now) == 3)
            for page in (one, other):
                page.reload()
                eventually(
                    lambda page=page: (
                        page.locator(".card .said").first.text_content() == "★★★★★다시"
                    )
                )
                eventually(lambda page=page: names(page)[28:] == [WORKS[29], WORKS[28]])
            one.locator(".card .open").first.click()
            one.locator("#large img.whole").wait_for()
            assert live.pairs == 1 and opened.wrong == []
        finally:
            server.stop()
            thread.join(20)
