"""The report page of a large folder: its size, how soon it can be looked at, and how smoothly it scrolls.

``python benchmarks/report_page.py [works] [--data folder] [--keep folder]`` embeds generated pictures of one
megapixel (or those of a folder) with the built-in backbone, trains a head on made-up grades, writes the page
with `rank --html`, and looks at it in headless Chromium, which draws without a graphics card here: on a
desktop scrolling costs less. ``--keep`` keeps the page and screenshots of it: light, dark and a phone.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import Line, machine, show
from mirip_fast_cli.main import run
from pictures import picture_files

from mirip_fast.data.image_files import scan_images

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_DESKTOP = {"viewport": {"width": 1400, "height": 900}, "locale": "en-US"}
_PHONE = {
    "viewport": {"width": 390, "height": 844}, "locale": "ko-KR", "device_scale_factor": 2,
    "is_mobile": True, "has_touch": True,
}  # fmt: skip

#: Runs before the page's own script: when the first thumbnail is there, and what holds up the page.
_WATCH = """
window.long = [];
new PerformanceObserver((list) => long.push(...list.getEntries().map((e) => [e.startTime, e.duration])))
  .observe({ type: "longtask", buffered: true });
const look = () => {
  const picture = document.querySelector(".card img");
  if (picture && picture.complete && picture.naturalWidth > 0) window.firstPicture = performance.now();
  else requestAnimationFrame(look);
};
requestAnimationFrame(look);
"""

#: Scrolls to the end, a tenth of the window per frame; milliseconds of each frame, and how often the picture
#: in the middle of the window was not there yet.
_SCROLL = """
() => new Promise((done) => {
  const frames = [], started = performance.now();
  let last = started, blank = 0;
  const step = (now) => {
    frames.push(now - last);
    last = now;
    const there = document.elementFromPoint(innerWidth / 2, innerHeight / 2);
    const middle = there?.closest(".card")?.querySelector("img");
    if (middle && !(middle.complete && middle.naturalWidth > 0)) blank += 1;
    const before = scrollY;
    scrollBy(0, innerHeight / 10);
    if (scrollY > before) requestAnimationFrame(step);
    else done({ frames: frames.slice(1), blank, from: started, to: now });
  };
  requestAnimationFrame(step);
})
"""


def make_page(folder: Path, n: int, data: Path | None) -> tuple[Path, float]:
    """The page of ``n`` works, and the seconds that `rank --html` took over cached features."""
    files = picture_files(data, folder / "works", n)
    if data is not None:
        (folder / "works").mkdir()
        for number, path in enumerate(files):
            shutil.copy(path, folder / "works" / f"{number:05d}{path.suffix}")
    names = sorted(path.name for path in scan_images(folder / "works"))
    rows = [f"{name},{'SABC'[i % 4]}" for i, name in enumerate(names)]
    grades = folder / "works" / "metadata.csv"
    grades.write_text("\n".join(["filename,tier", *rows]) + "\n", encoding="utf-8")
    _quietly("embed", str(grades), "--backbone", "tiny-random", "--image-size", "28")
    _quietly("train", "--head-only")
    started = time.perf_counter()
    _quietly("rank", "works", "--html", "report.html", "--tiers")
    return folder / "report.html", time.perf_counter() - started


def _quietly(*arguments: str) -> None:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = run(list(arguments))
    if status:
        raise SystemExit(said.getvalue())


def look_at(page: Any, path: Path, boxes: list[float]) -> list[Line]:
    """Open the page, scroll through it, and say what it took.

    Args:
        page: of the browser.
        path: the page.
        boxes: sorted milliseconds of the frames of the same scroll over empty boxes.
    """
    page.add_init_script(_WATCH)
    page.goto(path.as_uri())
    _wait(page, lambda: page.evaluate("window.firstPicture !== undefined"))
    page.wait_for_timeout(500)
    known = page.evaluate(
        "() => ({ ...performance.getEntriesByType('navigation')[0].toJSON(), first: firstPicture,"
        " heap: performance.memory.usedJSHeapSize,"
        " paint: performance.getEntriesByName('first-contentful-paint')[0]?.startTime })"
    )
    opening = [duration for _, duration in page.evaluate("long")]
    scroll = page.evaluate(_SCROLL)
    frames = sorted(scroll["frames"])
    during = [d for at, d in page.evaluate("long") if scroll["from"] <= at <= scroll["to"]]
    return [
        Line("parsed (DOMContentLoaded)", known["domContentLoadedEventEnd"], "ms"),
        Line("loaded", known["loadEventEnd"], "ms"),
        Line("first text painted", known["paint"] or 0, "ms"),
        Line("first thumbnail there", known["first"], "ms"),
        Line("longest task while opening", max(opening, default=0), "ms"),
        Line("script memory", known["heap"] / 2**20, "MiB"),
        Line("frames of a scroll to the end", len(frames), "frames"),
        Line("median frame", frames[len(frames) // 2], "ms"),
        Line("95 % of the frames below", frames[int(0.95 * len(frames))], "ms"),
        Line("longest frame", frames[-1], "ms"),
        Line("mean frame ÷ that over empty boxes", _mean(frames) / _mean(boxes)),
        Line("frames above 50 ms", 100 * sum(f > 50 for f in frames) / len(frames), "%"),
        Line("frames whose middle picture was not there", 100 * scroll["blank"] / len(frames), "%"),
        Line("long tasks (over 50 ms) in the scroll", len(during), "tasks"),
        Line("longest of them", max(during, default=0), "ms"),
    ]


def empty_boxes(page: Any, path: Path, n: int) -> list[float]:
    """What the machine can do at best: frames of the same scroll over a page of n empty boxes."""
    style = "div{display:grid;grid-template-columns:repeat(5,1fr);gap:16px}p{height:300px;background:#ccc}"
    text = f"<!doctype html><style>{style}</style><div>{'<p></p>' * n}</div>"
    path.write_text(text, encoding="utf-8")
    page.goto(path.as_uri())
    return sorted(page.evaluate(_SCROLL)["frames"])


def _mean(frames: list[float]) -> float:
    return sum(frames) / len(frames)


def _wait(page: Any, true: Callable[[], object]) -> None:
    for _ in range(600):
        if true():
            return
        page.wait_for_timeout(50)
    raise SystemExit("the page shows no thumbnail")


def keep_screenshots(chromium: Any, path: Path, folder: Path) -> None:
    """The gallery and the large view: light, dark and on a phone."""
    for name, options in (
        ("light", {**_DESKTOP, "color_scheme": "light"}),
        ("dark", {**_DESKTOP, "color_scheme": "dark"}),
        ("phone", {**_PHONE, "color_scheme": "light"}),
    ):
        context = chromium.new_context(**options)
        page = context.new_page()
        page.goto(path.as_uri())
        page.wait_for_timeout(2000)
        page.screenshot(path=folder / f"{name}.png")
        page.locator(".card .open").nth(2).click()
        page.wait_for_timeout(1000)
        page.screenshot(path=folder / f"{name}_large.png")
        context.close()


def main() -> None:
    """Make the page, look at it, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("works", type=int, nargs="?", default=1000)
    parser.add_argument("--data", type=Path, help="folder of pictures (default: generated ones)")
    parser.add_argument("--keep", type=Path, help="folder for the page and screenshots of it")
    asked = parser.parse_args()
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise SystemExit("playwright is missing: pip install playwright") from None
    browser = next((found for name in _NAMES if (found := shutil.which(name))), None)
    if browser is None:
        raise SystemExit("Chromium is missing (Debian: apt install chromium)")
    print(machine())
    data, keep = (path and path.resolve() for path in (asked.data, asked.keep))
    with tempfile.TemporaryDirectory() as made, sync_playwright() as playwright:
        os.chdir(made)
        path, seconds = make_page(Path(made), asked.works, data)
        size = path.stat().st_size
        beside = sum(file.stat().st_size for file in Path(made, "report_files").glob("*"))
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        plain = chromium.new_context(**_DESKTOP).new_page()
        boxes = empty_boxes(plain, Path(made, "boxes.html"), asked.works)
        lines = [
            Line("rank --html --tiers, features cached", seconds, "s"),
            Line("page", size / 1e6, "MB", most=30),
            Line("pictures beside it", beside / 1e6, "MB"),
            *look_at(chromium.new_context(**_DESKTOP).new_page(), path, boxes),
        ]
        show(f"Report page of {asked.works:,} works", lines)
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            keep_screenshots(chromium, path, keep)
            shutil.copy(path, keep)
            if beside:
                shutil.copytree("report_files", keep / "report_files", dirs_exist_ok=True)
        chromium.close()


if __name__ == "__main__":
    main()
