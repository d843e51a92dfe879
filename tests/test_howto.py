"""The pages of «how to» and the notebook do what they show; the web site is built without a network."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from made_run import draw, rows_of
from mirip_fast_cli.main import run

from mirip_fast.files import write_csv

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs" / "howto").glob("*.md"))
#: So that what is typed without options is quick here.
QUICK = """
embed: {backbone: tiny-random, image_size: 28, workers: 0}
evaluate: {bootstrap_rounds: 50}
runtime: {device: cpu}
"""


def blocks(page: Path, language: str = "") -> list[str]:
    found = re.findall(
        r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    return [text for name, text in found if name == language]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_shows_works(
    page: Path, headed: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every command, as it is typed, after those before it; what is only shown is marked ``console``."""
    Path("mirip.yaml").write_text(QUICK)
    for i in range(4):
        draw(headed / "folder" / f"{i}.png", i / 4, 50 + i)
    works = rows_of(headed / "data" / "metadata.csv")
    graded = [
        {"filename": work["filename"], "tier": work["tier"], "grader": grader}
        for work in works
        for grader in ("김", "lee")
    ]
    write_csv(headed / "graders.csv", ("filename", "tier", "grader"), graded)
    if page.stem == "move-cache":
        assert run(["embed", "data", "--cache-dir", "elsewhere"]) == 0
    commands = [line for block in blocks(page) for line in block.splitlines() if line]
    assert commands, "nothing to type"
    for command in commands:
        program, *arguments = command.replace('"', "").split()
        assert program == "mirip-fast"
        assert run(arguments) == 0, f"{command}\n{capfd.readouterr().err}"
    for block in blocks(page, "python"):
        exec(block, {})


def test_the_notebook_runs(tmp_path: Path) -> None:
    nbformat, client = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    text = (ROOT / "docs" / "tutorial.ipynb").read_text(encoding="utf-8")
    quick = text.replace(
        'make_sample(Path(\\"data\\"))', 'make_sample(Path(\\"data\\"), n=60, size=56)'
    )
    quick = quick.replace("image_size=112", "image_size=28, workers=0")
    assert quick.count("size=") > text.count("size=")
    notebook = nbformat.reads(quick, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # they would grow stale
    client.NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = {
        kind for c in notebook.cells for out in c.get("outputs", []) for kind in out.get("data", {})
    }
    assert {"text/html", "image/png"} <= shown and (tmp_path / "report.html").is_file()


def test_the_site_is_whole_and_asks_no_other_server(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    build = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", tmp_path]
    offline = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    done = subprocess.run(
        build, cwd=ROOT, env={**os.environ, **offline}, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for page in ("start", "ko", "api", "howto/own-taste", "commands/rank"):
        text = (tmp_path / page / "index.html").read_text(encoding="utf-8")
        asked = re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(https?:[^"]*)"', text)
        assert not asked, page
    assert "push_to_hub" in (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    found = (tmp_path / "search" / "search_index.json").read_text(encoding="utf-8")
    assert "등급" in str(json.loads(found)) and "near duplicates" in found
