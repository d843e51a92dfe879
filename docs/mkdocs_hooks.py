"""What the web site adds to the documents: both READMEs, whose links are those of the repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
#: File of the repository → page of the site.
PAGES = {"README.md": "start.md", "README.ko.md": "ko.md"}
_LINK = re.compile(r"\]\((?!https?:|#)([^)\s#]*)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the READMEs to the site's pages."""
    from mkdocs.structure.files import File

    for name, page in PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        text = _LINK.sub(lambda m: f"]({_from_root(m[1])}{m[2] or ''})", text)
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Have links to a README lead to its page."""
    up = "../" * page.file.src_uri.count("/")
    for name, to in PAGES.items():
        markdown = markdown.replace(f"]({up}../{name}", f"]({up}{to}")
    return markdown


def _from_root(target: str) -> str:
    return PAGES.get(target, target.removeprefix("docs/"))


def on_page_content(html: str, **_: Any) -> str:
    """Take the roles of docstrings (``:func:``) from before what they mark up."""
    return re.sub(r":(?:func|class|attr|meth|mod|data):(?=<code>)", "", html)
