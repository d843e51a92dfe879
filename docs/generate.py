"""Write what is made from the code: configs/default.yaml, option tables of the READMEs, pages of commands.

``python docs/generate.py`` writes, ``--check`` only says what is stale (exit status 1). The index of the
documents, docs/README.md, is made from their headings. Pages in Korean get the English ones' code blocks.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from command_pages import DOCS, FOLDER, command_pages, commands, first_sentence

from mirip_fast.config import Config
from mirip_fast.settings import settings, to_yaml

ROOT = DOCS.parent
_TABLE = re.compile(r"(<!-- options:start -->\n).*?(<!-- options:end -->)", re.DOTALL)
_BLOCK = re.compile(r"^```\w*\n.*?^```$", re.DOTALL | re.MULTILINE)
#: Documents in the order of the index; others follow by name.
_FIRST = (
    "install.md",
    "tutorial.md",
    "examples.md",
    "use.md",
    "troubleshooting.md",
)


def option_table() -> str:
    """Every setting as a Markdown table: option, default, meaning."""
    lines = []
    section = ""
    for setting in settings():
        if setting.section != section:
            section = setting.section
            doc = (type(getattr(Config(), section)).__doc__ or "").strip()
            lines += [
                "",
                f"**{section}**: {doc}",
                "",
                "| option | default | meaning |",
                "|---|---|---|",
            ]
        help_text = setting.help.replace("|", "\\|")
        if setting.choices:
            help_text += f" One of {', '.join(setting.choices)}."
        lines.append(f"| `{setting.flag}` | {setting.default_text} | {help_text} |")
    return "\n".join(lines).strip() + "\n"


def index() -> str:
    """The list of all documents, a line each: the heading, and what the first sentence says."""
    paths = sorted([*DOCS.glob("*.md"), *DOCS.glob("howto/*.md")], key=_place)
    english = [path for path in paths if ".ko." not in path.name]
    lines = [
        "<!-- Made by `make docs` from the headings of the documents. -->",
        "",
        "# Documents",
        "",
    ]
    lines += [f"- {_line(p)}" for p in english if p.parent == DOCS and p.name != "README.md"]
    lines += ["", "## How to", ""]
    lines += [f"- {_line(path)}" for path in english if path.parent != DOCS]
    lines += ["", "## 한국어", ""]
    lines += [f"- {_line(path)}" for path in paths if path not in english]
    lines += ["", "## Commands", "", "| command | what it does |", "|---|---|"]
    for name, command in commands().items():
        sentence = first_sentence(command).replace("|", "\\|")
        lines.append(f"| [`mirip-fast {name}`](commands/{name}.md) | {sentence} |")
    return "\n".join(lines) + "\n"


def _place(path: Path) -> tuple[bool, int, str]:
    name = path.name.replace(".ko.", ".")
    return path.parent != DOCS, _FIRST.index(name) if name in _FIRST else len(_FIRST), name


def _line(path: Path) -> str:
    heading, _, rest = path.read_text(encoding="utf-8").partition("\n")
    paragraph = " ".join(rest.strip().split("\n\n")[0].split())
    sentence = re.split(r"(?<=\.)\s", paragraph)[0].rstrip(":.")
    return f"[{heading.removeprefix('# ')}]({path.relative_to(DOCS).as_posix()}): {sentence}."


def generated() -> dict[Path, str]:
    """Path → what the file should hold."""
    header = "# Every setting with its default. Made from the code by `make docs`; copy what you change.\n"
    files = {ROOT / "configs" / "default.yaml": header + to_yaml(Config(), comments=True)}
    for name in ("README.md", "README.ko.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        files[ROOT / name] = _TABLE.sub(lambda m: m[1] + option_table() + m[2], text)
    files[DOCS / "README.md"] = index()
    for path in DOCS.rglob("*.ko.md"):
        files[path] = _with_blocks_of(path.with_name(path.name.replace(".ko.", ".")), path)
    return files | command_pages()


def _with_blocks_of(english: Path, korean: Path) -> str:
    """A page with the code blocks of its English one; another number of them is left for a test to tell."""
    blocks = iter(_BLOCK.findall(english.read_text(encoding="utf-8")))
    return _BLOCK.sub(lambda m: next(blocks, m[0]), korean.read_text(encoding="utf-8"))


def main() -> int:
    """Write what is stale, or say so; returns the exit status."""
    wanted = generated()
    check = "--check" in sys.argv
    stale = 0
    for path in sorted(set(FOLDER.glob("*.md")) - wanted.keys()):
        stale = _stale(path, "is of a command that is gone", "removed", check) or stale
        if not check:
            path.unlink()
    for path, text in wanted.items():
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale = _stale(path, "is stale", "wrote", check) or stale
        if not check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return stale


def _stale(path: Path, fault: str, done: str, check: bool) -> int:
    name = path.relative_to(ROOT)
    print(f"{name} {fault}: run `make docs`" if check else f"{done} {name}")
    return int(check)


if __name__ == "__main__":
    sys.exit(main())
