"""The documents: made ones are fresh, what they name exists, and what they show is what is printed."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from mirip_fast_cli.main import cli

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
WRITTEN = [Path(name) for name in ("README.md", "README.ko.md")] + sorted(
    path.relative_to(ROOT) for path in [*DOCS.glob("*.md"), *DOCS.glob("howto/*.md")]
)
PAGES = sorted(path.relative_to(ROOT) for path in DOCS.glob("commands/*.md"))
#: Commands of the examples that take half a minute or need a package that may be missing.
NOT_RUN = ("mirip-fast sweep", "mirip-fast export", "mirip-fast benchmark")
#: What one training finds and another may not; the rest of a line's numbers are masked anyway.
MAY_DIFFER = re.compile(r"(Raised|Lowered) most by|score .*, tier |  cosine ")
#: Fewer epochs, rounds and processes than the documents were recorded with; the same lines.
QUICK = """
embed: {workers: 0}
evaluate: {bootstrap_rounds: 100}
explain: {detail: 3}
"""


@pytest.fixture(autouse=True)
def _import_docs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(DOCS))
    yield
    for name in ("generate", "command_pages", "recorded"):
        sys.modules.pop(name, None)


def read(path: Path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


# What is made from the code


def test_made_files_are_fresh_and_stale_ones_are_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import generate
    import mirip_fast_cli.main

    monkeypatch.setattr(sys, "argv", ["generate.py", "--check"])
    assert (generate.main(), capsys.readouterr().out) == (0, "")
    rank = cli.get_command(click.Context(cli), "rank")
    (top,) = (p for p in rank.params if p.name == "top")
    monkeypatch.setattr(top, "help", "Show some.")
    left = tuple(name for name in mirip_fast_cli.main.COMMANDS if name != "label")
    monkeypatch.setattr(mirip_fast_cli.main, "COMMANDS", left)
    assert generate.main() == 1
    said = capsys.readouterr().out
    assert "docs/commands/rank.md is stale: run `make docs`\n" in said
    assert "docs/commands/label.md is of a command that is gone" in said


def test_the_index_lists_every_document() -> None:
    index = read(DOCS / "README.md")
    for path in DOCS.rglob("*.md"):
        assert path.name == "README.md" or f"]({path.relative_to(DOCS)})" in index, path


# What documents name


def commands_below(path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], click.Command]]:
    """All commands below ``path``, itself too, with their words."""
    command: click.Command = cli
    for word in path:
        assert isinstance(command, click.Group)
        found = command.get_command(click.Context(command), word)
        assert found is not None, path
        command = found
    here = [(path, command)] if path else []
    if not isinstance(command, click.Group):
        return here
    names = command.list_commands(click.Context(command))
    return here + [item for name in names for item in commands_below((*path, name))]


def code(path: Path) -> list[str]:
    """The lines of fenced blocks, with continued ones joined, and the inline code of a document."""
    text = read(path).replace("\\\n", " ")
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    inline = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    return [line.removeprefix("$ ") for block in fenced for line in block.splitlines()] + inline


#: Of srun, docker, pip and torch's launcher, where they are named alone.
FOREIGN = {
    "--signal", "--shm-size", "--index-url", "--rdzv_id", "--standalone", "--kill-on-bad-exit",
    "--requeue",
}  # fmt: skip


@pytest.mark.parametrize("path", WRITTEN, ids=str)
def test_commands_and_flags_that_are_named_exist(path: Path) -> None:
    commands = dict(commands_below())
    flags = {
        words: {f for p in (*c.params, *cli.params) for f in (*p.opts, *p.secondary_opts)}
        | {"--help"}
        for words, c in commands.items()
    }
    known = FOREIGN.union(*flags.values())
    for typed in code(path):
        for name, sub in re.findall(r"\bmirip-fast ([a-z]+)(?: ([a-z]+))?", typed):
            assert (name,) in flags, typed
            assert name != "cache" or not sub or (name, sub) in flags, typed
        words = typed.split("#")[0].removeprefix("mirip-fast ").split()
        named = {w.split("=")[0].rstrip(",.") for w in words if re.match("--[a-z]", w)}
        if typed.startswith("--"):
            assert named <= known, typed
        elif typed.startswith("mirip-fast "):
            of = flags.get(tuple(words[:2])) or flags.get(tuple(words[:1]), known)
            assert named <= of, typed


@pytest.mark.parametrize("path", [*WRITTEN, *PAGES], ids=str)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", read(path)):
        assert (ROOT / path.parent / target).exists(), target


@pytest.mark.parametrize("path", WRITTEN, ids=str)
def test_files_of_the_repository_that_are_named_exist(path: Path) -> None:
    for name in re.findall(
        r"\b((?:benchmarks|configs|docs|tests)/[\w./-]+\.(?:py|yaml|md))", read(path)
    ):
        assert (ROOT / name).exists(), name
    for script, options in re.findall(
        r"python (benchmarks/\w+\.py)((?: --[\w-]+[^-`\n]*)*)", read(path)
    ):
        for flag in re.findall(r"--[\w-]+", options):
            assert f'"{flag}"' in read(Path(script)), f"{script} {flag}"


def test_both_readmes_show_the_same_commands_and_figures() -> None:
    def shown(name: str) -> tuple[list[str], list[str]]:
        text = re.sub(r"<!-- options:start.*", "", read(Path(name)), flags=re.DOTALL)
        fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        lines = [line.split(" #")[0].rstrip() for block in fenced for line in block.splitlines()]
        table = re.findall(r"^\| (`mirip-fast [^|]*?) \|", text, re.MULTILINE)
        times = re.findall(r"\| ([\d.]+ s) \|$", text, re.MULTILINE)
        return [re.sub(r"<[^>]*>", "<>", line) for line in lines], table + times

    assert shown("README.md") == shown("README.ko.md")


KOREAN = [path for path in WRITTEN if ".ko." in path.name and path.parent != Path()]


@pytest.mark.parametrize("path", KOREAN, ids=str)
def test_a_page_in_korean_keeps_step(path: Path) -> None:
    """The same blocks, paragraphs, headings, rows of tables, and links (to the Korean page where there is one)."""

    def shown(page: Path) -> list[object]:
        text = re.sub(r"\[(한국어|English)\].*", "", read(page))
        blocks = re.findall(r"^```\w*\n.*?^```$", text, re.DOTALL | re.MULTILINE)
        prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
        links = re.findall(r"\]\(([^)]*)\)", prose)
        return [
            blocks,
            len(re.split(r"\n{2,}", prose.strip())),
            re.findall(r"^#+", prose, re.MULTILINE),
            re.findall(r"^\||^- |^\d+\. ", prose, re.MULTILINE),
            sorted(link.replace(".ko.", ".") for link in links),
        ]

    english = Path(str(path).replace(".ko.", "."))
    assert shown(path) == shown(english)
    for link in re.findall(r"\]\(([^)#:]+\.md)", read(path)):
        korean = path.parent / link.replace(".md", ".ko.md")
        assert ".ko." in link or link == english.name or korean not in KOREAN, link
