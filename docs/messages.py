"""The messages of the program, found in the code, and the catalogues of their translations.

``python docs/messages.py`` adds new messages to the catalogues, takes out what is gone, and compiles them.
"""

from __future__ import annotations

import ast
import inspect
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from babel.messages.catalog import Catalog
from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po, write_po

ROOT = Path(__file__).resolve().parent.parent
#: Where messages to people stand; pages have words of their own (words.json), files of settings too.
_ROOMS = ("cli", "mirip_fast")
#: SQL, programs, HTML, headers of HTTP.
_NO_MESSAGE = re.compile(r"^(PRAGMA|SELECT|INSERT|CREATE|BEGIN|import|TABLE) |</|charset=|-src |^<")
_ABOUT = (
    "What the program says. «{}» is what varies; number them ({0}, {1}) where the order changes."
)


def messages() -> dict[str, str]:
    """Each message with «{}» for what varies in it, and the first file that says it."""
    found: dict[str, str] = {}
    for room in _ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for text in _texts(tree, room == "cli"):
                found.setdefault(text, path.relative_to(ROOT).as_posix())
    return found


class _Catalogue(Catalog):
    """One without names, dates and versions, so that it is the same wherever it is written."""

    @property
    def mime_headers(self) -> list[tuple[str, str]]:
        """What readers need to know."""
        return [("Content-Type", "text/plain; charset=utf-8"), ("Language", str(self.locale))]


def catalogues() -> dict[Path, bytes]:
    """Every catalogue with the messages of today, in text and compiled.

    Entries whose comment says «kept» stand for themselves: headings of tables, and words of click.
    """
    files = {}
    now = messages()
    for path in sorted((ROOT / "mirip_fast/locale").glob("*/LC_MESSAGES/messages.po")):
        with path.open("rb") as stream:
            old = read_po(stream)
        new = _Catalogue(path.parent.parent.name, header_comment=f"# {_ABOUT}", fuzzy=False)
        kept = [entry for entry in old if entry.id and "kept" in entry.auto_comments]
        for entry in kept:
            new.add(entry.id, entry.string, auto_comments=["kept"])
        for text, file in now.items():
            known = old.get(text)
            new.add(text, known.string if known else "", locations=[(file, None)])
        for content, write in ((path, _write_po), (path.with_suffix(".mo"), write_mo)):
            written = io.BytesIO()
            write(written, new)
            files[content] = written.getvalue()
    return files


def _write_po(stream: IO[bytes], catalogue: Catalog) -> None:
    write_po(stream, catalogue, width=0, include_lineno=False)


def _texts(tree: ast.Module, with_docstrings: bool) -> Iterator[str]:
    docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    if with_docstrings:  # of commands: the paragraphs of their help
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_command"):
                for paragraph in (inspect.cleandoc(ast.get_docstring(node) or "")).split("\n\n"):
                    if not paragraph.startswith("\b"):
                        yield from filter(_says_something, [" ".join(paragraph.split())])
    inner: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            inner.update(node.values)
            text = "".join(v.value if isinstance(v, ast.Constant) else "{}" for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node in inner or node in docstrings:
                continue
            text = node.value
        else:
            continue
        text = re.sub(r"%[-+#0]*\d*(\.\d+)?[sdfrg]", "{}", text).replace("%%", "%").strip()
        text = re.sub(r"\{[^{} ]+\}", "{}", text)
        if _says_something(text):
            yield text


def _says_something(text: str) -> bool:
    if _NO_MESSAGE.search(text):
        return False
    words = re.findall(r"[A-Za-z]{2,}", text.replace("{}", ""))
    return len(words) > (3 if text.startswith("--") else 1) and " " in text


if __name__ == "__main__":
    for path, content in catalogues().items():
        path.write_bytes(content)
        print(f"wrote {path.relative_to(ROOT)}")
