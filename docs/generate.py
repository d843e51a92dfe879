"""Write what is made from the code: configs/default.yaml and the option table of the READMEs.

``python docs/generate.py`` writes, ``--check`` only says what is stale (exit status 1).
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from mirip_fast.config import Config, settings, to_yaml

ROOT = Path(__file__).resolve().parent.parent
_TABLE = re.compile(r"(<!-- options:start -->\n).*?(<!-- options:end -->)", re.DOTALL)


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


def generated() -> dict[Path, str]:
    """Path → what the file should hold."""
    header = "# Every setting with its default. Made from the code by `make docs`; copy what you change.\n"
    files = {ROOT / "configs" / "default.yaml": header + to_yaml(Config(), comments=True)}
    for name in ("README.md", "README.ko.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        files[ROOT / name] = _TABLE.sub(lambda m: m[1] + option_table() + m[2], text)
    return files


def main() -> int:
    """Write what is stale, or say so; returns the exit status."""
    stale = 0
    for path, text in generated().items():
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        if "--check" in sys.argv:
            print(f"{path.relative_to(ROOT)} is stale: run `make docs`")
            stale = 1
        else:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")
    return stale


if __name__ == "__main__":
    sys.exit(main())
