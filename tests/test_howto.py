"""What the documents show works: every command of every page is typed, the tutorial's output compared."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import openpyxl
import pytest
from made_run import draw, rows_of
from made_tars import make_tar, samples
from mirip_fast_cli.demo import make_portfolio, make_sample
from mirip_fast_cli.main import run

from mirip_fast import serving
from mirip_fast.files import write_csv

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
sys.path.append(str(DOCS))
import recorded  # noqa: E402

#: Pages whose blocks are those of the page without `.ko` (another test) are not typed twice.
PAGES = [
    path
    for path in (
        ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md")),
        *sorted(DOCS.glob("howto/*.md")), *sorted(DOCS.glob("commands/*.md")),
    )
    if ".ko." not in path.name and path.name not in ("tutorial.md", "examples.md")
]  # fmt: skip
#: What is not run, by how it begins, and why. All other commands are.
NOT_RUN = re.compile(
    "git clone"  # an address that only the reader knows
    "|(make|source|python3 -m venv|pip|uv|pipx) "  # the network; .github's workflow, test_install.py
    "|docker |ssh |#!|RAY_ADDRESS"  # Docker, another machine, Slurm, a cluster of Ray
    "|wandb sync|curl "  # wandb's server; a server: test_serve.py sends the same
    "|mirip-fast (embed s3:|rank gs:|embed https:)"  # test_remote.py, in memory and from this machine
    "|mirip-fast (export$|benchmark)"  # slow: test_export.py, test_benchmark.py
)
#: What is typed instead, to be quick: an untrained backbone, fewer folds and epochs, runs that are there.
INSTEAD = (
    (r"--backbone (?!tiny-random)\S+( --image-size \d+)?", "--backbone tiny-random"),
    (r"(train .*)--folds 5", r"\1--folds 2 --epochs 1"),
    (r"(sweep .*)", r"\1 --epochs 1"),
    (r"(train --full (?!.*--epochs).*)", r"\1 --epochs 1"),
    (r"/(shared|models)/", ""),
    (r"runs/HEAD runs/FULL", "runs/*-head runs/*-full"),
    # One process in place of a launcher, in the foreground.
    (r"^(?:nohup|torchrun|MIRIP_FAST_TOKEN).*?mirip(-fast|_fast_cli)", "mirip-fast"),
    (r" > \S+ 2>&1 &$", ""),
    (r"part-017.csv", "data/images/part-017.csv"),
)
QUICK = """
embed: {workers: 0}
evaluate: {bootstrap_rounds: 50}
explain: {detail: 3}
runtime: {device: cpu}
"""
#: What one training finds and another may not; the rest of a line's numbers are masked anyway.
MAY_DIFFER = re.compile(
    r"It looks at|(Raised|Lowered) most by|score .*, tier |  cosine |The best of 2|Cell 1 is not"
)


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and content of a page's code blocks; `text` is only shown."""
    text = page.read_text(encoding="utf-8")
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


RECORDED = [shown for name in ("tutorial", "examples") for shown in blocks(DOCS / f"{name}.md")]


def typed(block: str) -> list[str]:
    """The commands of a block: what stands behind `$`, or else every line."""
    if block.startswith("#!"):
        return [block]
    lines = block.replace("\\\n", " ").splitlines()
    prompted = [line[2:] for line in lines if line.startswith("$ ")]
    return prompted or [line for line in lines if line and "[OPTIONS]" not in line]


def type_in(command: str) -> None:
    """Run a command as the shell does; our own ones in this process."""
    for pattern, put in INSTEAD:
        command = re.sub(pattern, put, command)
    if not command.startswith("mirip-fast "):
        with tempfile.NamedTemporaryFile() as after:
            subprocess.run(["bash", "-ec", f"{command}\nenv -0 > {after.name}"], check=True)
            kept = Path(after.name).read_text().split("\0")
        now = {name: value for name, _, value in (pair.partition("=") for pair in kept)}
        os.environ.update({k: now[k] for k in ("HF_HUB_OFFLINE", "WANDB_MODE") if k in now})
        os.chdir(now["PWD"])
        return
    words = subprocess.run(
        ["bash", "-c", f"shopt -s nullglob; printf '%s\\0' {command}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")[1:-1]
    assert run(words) == 0 or words[0] == "audit", shlex.join(words)


def judge(_: serving.LocalServer) -> None:
    """What a person does on the page of `label`, until Ctrl-C."""
    works = rows_of(Path("data/metadata.csv"))
    better = [
        {"image_path_1": a["filename"], "image_path_2": b["filename"], "label": "1"}
        for a, b in itertools.product(works[:24], works[:24])
        if "SABC".index(a["tier"]) < "SABC".index(b["tier"])
    ]
    write_csv(Path("pairs.csv"), ("image_path_1", "image_path_2", "label"), better)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers end as soon as they were used; what `export` sets is unset afterwards."""
    monkeypatch.setattr(serving.LocalServer, "run", judge)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.fixture
def place(headed: Path, quick: None) -> Path:
    """A folder that has what pages speak of."""
    Path("mirip.yaml").write_text(QUICK.replace("{w", "{backbone: tiny-random, image_size: 28, w"))
    works = rows_of(Path("data/metadata.csv"))
    table = ("filename", "tier", "applicant", "department")
    for i, work in enumerate(works):
        work["applicant"] = f"applicant {i // 2}"
    write_csv(Path("data/metadata.csv"), ("image_id", *table), works)
    grades = [{"applicant": w["applicant"], "tier": w["tier"]} for w in works[::2]]
    write_csv(Path("grades.csv"), ("applicant", "tier"), grades)
    by_two = [{**work, "grader": grader} for work in works for grader in ("김", "lee")]
    write_csv(Path("graders.csv"), (*table, "grader"), by_two)
    for i in range(6):
        draw(Path(f"folder/{i}.png"), i / 6, 50 + i)
    news = [
        {"filename": f"{i}.png", "applicant": f"new {i // 2}", "department": "회화"}
        for i in range(6)
    ]
    write_csv(Path("folder/metadata.csv"), table[:1] + table[2:], news)
    return headed


def _office(_: Path) -> None:
    for folder, columns in (("작년", ("김 교수", "박 선생", "Lee")), ("올해", ())):
        book = openpyxl.Workbook()
        book.active.append(["번호", "파일", "지원자", "학과", *columns])
        for i in range(40):
            draw(Path(folder, "그림", f"{i}.png"), 0.9 - 0.2 * (i % 4), 70 + i)
            book.active.append(
                [i, f"그림/{i}.png", f"지원자 {i // 2}", "회화", *["SABC"[i % 4]] * len(columns)]
            )
        book.save(Path(folder, "metadata.xlsx" if columns else "지원자.xlsx"))


def _tars(place: Path) -> None:
    shutil.rmtree(place / "data")
    Path("data").mkdir()
    make_tar(Path("photos.tar"), samples(0))
    for i in range(100):
        make_tar(Path(f"data/{i:03d}.tar"), samples(i, 1))


#: What a page needs besides, before its commands.
BEFORE: dict[str, Callable[[Path], object]] = {
    "office": _office,
    "remote": _tars,
    "scale": lambda _: shutil.copy("data/metadata.csv", "data/images/part-017.csv"),
    "excel": lambda _: run(["train", "--head-only"]),
    "move-cache": lambda _: run(["embed", "data", "--cache-dir", "elsewhere"]),
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_shows_works(page: Path, request: pytest.FixtureRequest) -> None:
    """Every command, as it is typed, after those before it, but for those of NOT_RUN."""
    shown = blocks(page)
    assert {name for name, _ in shown} <= {"", "bash", "console", "python", "text"}
    commands = [c for name, block in shown if name in ("", "bash", "console") for c in typed(block)]
    if page.parent.name == "commands":  # they quote the tutorial and the examples
        quoted = {c for _, block in RECORDED for c in typed(block)}
        commands = [c for c in commands if c not in quoted]
    commands = [c for c in commands if not NOT_RUN.match(c)]
    if page.parent.name == "howto":
        assert commands, "nothing to type"
    if not commands and not any(name == "python" for name, _ in shown):
        return
    place = request.getfixturevalue("place")
    BEFORE.get(page.stem, lambda _: None)(place)
    for command in commands:
        type_in(command)
    names: dict[str, object] = {}
    for name, block in shown:
        if name == "python" and page.stem != "cache":  # test_cache_document.py
            exec(block, names)


def test_the_tutorial_prints_what_it_shows(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    quick: None,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Every command of the tutorial and its further examples, in one folder, as a reader types them."""
    monkeypatch.chdir(tmp_path)
    make_sample(tmp_path / "demo/data")
    make_portfolio(tmp_path / "demo/portfolio")
    for _, block in RECORDED:
        for command in (c for c in typed(block) if not NOT_RUN.match(c)):
            capfd.readouterr()
            type_in(command)
            if command.startswith("mkdir"):
                Path("mirip.yaml").write_text(QUICK)
            captured = capfd.readouterr()
            printed = captured.out + captured.err
            for example in recorded.recorded(f"```\n{block}```"):
                lines = recorded.not_printed(example, printed)
                missing = [line for line in lines if not MAY_DIFFER.search(line)]
                assert not missing, "\n".join([f"$ {command}", *missing, "", "Printed:", printed])


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
    for page in ("start", "ko", "api", "howto/own-taste.ko", "commands/rank"):
        text = (tmp_path / page / "index.html").read_text(encoding="utf-8")
        asked = re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(https?:[^"]*)"', text)
        assert not asked, page
    assert "push_to_hub" in (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    found = (tmp_path / "search" / "search_index.json").read_text(encoding="utf-8")
    assert "등급" in str(json.loads(found)) and "near duplicates" in found
