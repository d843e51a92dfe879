"""One HTML file from the parts in ``page_files/``: style, script, words and data in one page.

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
from importlib.resources import files
from typing import Any

#: Put together in this order into one script.
SCRIPTS = (
    "words.js", "elements.js", "charts.js", "gallery.js", "compare.js", "large.js", "main.js",
)  # fmt: skip

_NOT_IN_HTML = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


def page_html(title: str, data: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """The whole page.

    Args:
        title: of the browser's window.
        data: what the script shows, plain JSON types; ``words`` is added.
        pictures: name → WebP file to be kept inside the page.
    """
    style = _part("page.css")
    script = "\n".join(_part(name) for name in SCRIPTS)
    words = json.loads(_part("words.json"))
    filled = {
        "policy": html.escape(_policy(script, style)),
        "title": html.escape(title),
        "style": style,
        "data": json_for_html({**data, "words": words}),
        "pictures": "\n".join(_picture(name, webp) for name, webp in pictures.items()),
        "script": script,
    }
    # In one pass: what is filled in is not looked at again.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: filled[found[1]], _part("page.html"))


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


def _part(name: str) -> str:
    return (files(__package__) / "page_files" / name).read_text(encoding="utf-8").strip()
