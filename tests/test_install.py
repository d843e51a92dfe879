"""What is installed is whole: a wheel in an empty environment, and processes that are spawned, not forked."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
import yaml
from made_run import TINY, make_data
from mirip_fast_cli.main import run
from packaging.metadata import Metadata

import mirip_fast
from mirip_fast.finetune import data

ROOT = Path(__file__).resolve().parent.parent
#: What a wheel has besides modules.
FILES = {
    "mirip_fast/py.typed",
    "mirip_fast/features/canary.jpg",
    *(f"mirip_fast/configs/{path.name}" for path in ROOT.glob("configs/*.yaml")),
    *(
        str(path.relative_to(ROOT))
        for files in ("portfolio/*_files/*", "label/page/*", "locale/*/*/*.mo")
        for path in ROOT.glob(f"mirip_fast/{files}")
    ),
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, built from a copy: building leaves files behind."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("mirip_fast", "cli", "configs"):
        shutil.copytree(
            ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps"]
    done = subprocess.run(
        [*pip, "--no-build-isolation", "--wheel-dir", folder, source],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``bin`` of an environment that has the wheel, and what it depends on from this one."""
    folder = tmp_path_factory.mktemp("empty")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python3*/site-packages")
    borrowed = {str(Path(module.__file__ or "").parents[1]) for module in (pytest, yaml)}
    (packages / "borrowed.pth").write_text("\n".join(borrowed))  # its own .pth files do not count
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--quiet"]
    subprocess.run([*pip, "--no-index", "--no-deps", wheel], check=True)
    return folder / "bin"


def test_the_wheel_has_all_files_and_no_others(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    modules = {
        str(Path(package, path.relative_to(ROOT / folder)))
        for folder, package in (("mirip_fast", "mirip_fast"), ("cli", "mirip_fast_cli"))
        for path in (ROOT / folder).rglob("*.py")
    }
    assert names == FILES | modules


def test_the_wheel_tells_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        text = archive.read(name).decode()
        assert any(n.endswith("licenses/LICENSE") for n in archive.namelist())
    told = Metadata.from_email(text, validate=True)
    assert (told.name, str(told.version)) == ("mirip-fast", mirip_fast.__version__)
    assert told.license_expression == "Apache-2.0"
    assert message_from_string(text)["Author"] == "the mirip-fast authors"
    assert told.description_content_type == "text/markdown" and "# mirip-fast" in (
        told.description or ""
    )
    assert not told.project_urls  # there is no public address; a made-up one would be worse


@pytest.mark.parametrize(
    ("command", "printed"),
    [
        (["--version"], f"mirip-fast, version {re.escape(mirip_fast.__version__)}"),
        (["config", "--config", "finetune-lora.yaml"], "strategy: lora"),
        (["rank", "--help"], "Sort the images in FOLDER"),
    ],
)
def test_an_installed_wheel_works(
    installed: Path, command: list[str], printed: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [installed / "mirip-fast", *command],
        cwd=tmp_path, env={"PATH": "/usr/bin:/bin"}, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and re.search(printed, done.stdout), done.stdout + done.stderr


def test_processes_may_be_spawned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS and Windows: nothing that a worker needs is there because it was forked."""

    def refused() -> int:
        raise AssertionError("forked")

    monkeypatch.setattr(os, "fork", refused)
    monkeypatch.setattr(data, "_PROCESSES", multiprocessing.get_context("spawn"))
    monkeypatch.chdir(tmp_path)
    make_data(tmp_path / "data", 8)
    assert run(["--quiet", "embed", "data", *TINY, "--workers", "1"]) == 0
    pictures = data.Pictures(sorted(tmp_path.glob("data/images/*")), 24)
    with data.Batches(pictures, workers=1, prefetch=1, pinned=False) as batches:
        (batch,) = batches.load([[data.Sample(0, 0), data.Sample(7, 0)]])
    assert batch.shape == (2, 24, 24, 3)


def test_no_message_names_an_install_that_cannot_work() -> None:
    """Not ``pip install mirip-fast[…]``: it would ask a registry for a checkout."""
    for folder in ("mirip_fast", "cli", "configs", "docs", "benchmarks"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".md", ".yaml"):
                assert "mirip-fast[" not in path.read_text(encoding="utf-8"), path


def test_the_conventions_are_kept() -> None:
    """Files that other tools read are readable, and name no version of their own."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= cited.keys() and "version" not in cited
    checks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert {hook["language"] for repo in checks["repos"] for hook in repo["hooks"]} == {"system"}
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    typed = [
        step["run"].split()[1]
        for job in workflow["jobs"].values()
        for step in job["steps"]
        if step.get("run", "").startswith("make ")
    ]
    assert set(typed) <= targets and {"check", "test", "site", "wheel"} <= set(typed)
    supported = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == supported
