"""Headless Chromium for the pages; the tests are skipped where it is missing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def missing(what: str) -> None:
    """Skip, or fail where the browser is asked for."""
    if os.environ.get("MIRIP_FAST_BROWSER") == "required":
        pytest.fail(f"{what} is missing (Debian: apt install chromium)")
    pytest.skip(f"{what} is missing: `make test-browser` requires it")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright")
    path = next((found for name in _NAMES if (found := shutil.which(name))), None)
    if path is None:
        missing("Chromium")
    with sync_playwright() as playwright:
        # Its sandbox needs rights that containers lack; the pages here are our own.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Any]:
    """Opens a page file or an address and collects what goes wrong in it."""
    contexts, wrong = [], []

    def open_page(path: Path | str, **options: Any) -> Any:
        context = browser.new_context(**{"locale": "en-US", "color_scheme": "light", **options})
        context.set_default_timeout(60_000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
        page.goto(path if isinstance(path, str) else path.as_uri())
        return page

    open_page.wrong = wrong
    yield open_page
    for context in contexts:
        context.close()
