"""One HTML file from parts beside this module: style, script, words and data in one page.

Nothing in the page comes from elsewhere, and nothing that came from outside (file names, reasons) is ever
HTML: data is JSON in a block that browsers do not run, and the script makes text of it, never markup. The
page's Content-Security-Policy admits only its own script and style, by their hashes, and pictures.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any


@dataclass(frozen=True)
class PageParts:
    """What a kind of page is made of, as paths from this package.

    Attributes:
        markup: the page with ``{{…}}`` where the rest goes.
        styles, scripts: put together in this order into one style and one script.
        words: JSON files of language → key → text; later ones add to the earlier.
    """

    markup: str
    styles: tuple[str, ...]
    scripts: tuple[str, ...]
    words: tuple[str, ...]


def _shared(*names: str) -> tuple[str, ...]:
    return tuple(f"page_files/{name}" for name in names)


#: A ranked portfolio.
GALLERY = PageParts(
    "page_files/page.html",
    _shared("look.css", "page.css"),
    _shared(
        *("words.js", "elements.js", "theme.js", "charts.js"),
        *("gallery.js", "compare.js", "large.js", "main.js"),
    ),
    _shared("words.json"),
)
#: How good a model is.
EVALUATION = PageParts(
    "evaluation_files/page.html",
    (*_shared("look.css"), "evaluation_files/page.css"),
    (
        *_shared("words.js", "elements.js", "theme.js", "charts.js"),
        *(f"evaluation_files/{name}" for name in ("plots.js", "parts.js", "main.js")),
    ),
    (*_shared("words.json"), "evaluation_files/words.json"),
)

_NOT_IN_HTML = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


def page_html(
    title: str,
    data: Mapping[str, Any],
    pictures: Mapping[str, bytes],
    parts: PageParts = GALLERY,
) -> str:
    """The whole page.

    Args:
        title: of the browser's window.
        data: what the script shows, plain JSON types; ``words`` is added.
        pictures: name → WebP file to be kept inside the page.
        parts: what kind of page it is.
    """
    style = "\n".join(_part(name) for name in parts.styles)
    script = "\n".join(_part(name) for name in parts.scripts)
    filled = {
        "policy": html.escape(_policy(script, style)),
        "title": html.escape(title),
        "style": style,
        "data": json_for_html({**data, "words": _words(parts)}),
        "pictures": "\n".join(_picture(name, webp) for name, webp in pictures.items()),
        "script": script,
    }
    # In one pass: what is filled in is not looked at again.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: filled[found[1]], _part(parts.markup))


def json_for_html(value: object) -> str:
    """JSON that stays what it is inside a ``<script>`` block: ASCII without ``<``, ``>`` and ``&``.

    Names that are not UTF-8 (lone surrogates) survive as escapes.
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&]", lambda found: _NOT_IN_HTML[found[0]], text)


def _picture(name: str, webp: bytes) -> str:
    address = "data:image/webp;base64," + base64.b64encode(webp).decode("ascii")
    # A block of its own, so that the script touches the text of those pictures only that are looked at.
    return f'<script type="application/json" id="picture-{name}">"{address}"</script>'


def _policy(script: str, style: str) -> str:
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hash(script)}",
            f"style-src {_hash(style)}",
            "img-src data: 'self' file:",  # the page's folder, where the page is opened as a file
            "base-uri 'none'",
            "form-action 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def _words(parts: PageParts) -> dict[str, dict[str, str]]:
    words: dict[str, dict[str, str]] = {}
    for name in parts.words:
        for language, said in json.loads(_part(name)).items():
            words.setdefault(language, {}).update(said)
    return words


def _part(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8").strip()
