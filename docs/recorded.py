"""Recorded commands: code blocks of a document that begin with ``$ `` and show what was printed.

The tutorial and its further examples hold them; a test runs them again, and the pages of the commands
quote them. A line ``…`` in a block stands for lines that were left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_BLOCK = re.compile(r"^```\n\$ (.*?)\n```$", re.DOTALL | re.MULTILINE)
_PATH = re.compile(r"(?<!\S)/\S*?(?=(?:data|portfolio)/)")
_RUN_NAME = re.compile(r"\b\d{8}-\d{6}\b")
_FINGERPRINT = re.compile(r"\b[0-9a-f]{16}\b")
_UNIT = re.compile(r"\b([KMGT]iB|bytes)\b")
_MACHINE = re.compile(r"\b(cpu|cuda|mps|fp32|bf16|fp16)\b")
_NUMBER = re.compile(r"[-+]?\d[\d.,]*\d|[-+]?\d")
_RULE = re.compile(r"\s+|-{2,}")
_WRITTEN = "Written: "


@dataclass(frozen=True)
class Recorded:
    """One command as it was typed, and the lines that it printed."""

    command: str
    lines: tuple[str, ...]

    @property
    def block(self) -> str:
        """The code block as it stands in the document."""
        return "\n".join(("```", f"$ {self.command}", *self.lines, "```"))


def recorded(text: str) -> list[Recorded]:
    """The recorded commands of a Markdown text, in its order."""
    blocks = [match[1].split("\n") for match in _BLOCK.finditer(text)]
    return [Recorded(lines[0], tuple(lines[1:])) for lines in blocks]


def normal(line: str) -> str:
    """``line`` without what differs from machine to machine, and without the mark that nobody sees."""
    line = line.replace("\ufeff", "")
    for pattern, put in (
        (_PATH, ""), (_RUN_NAME, "0"), (_FINGERPRINT, "0"), (_UNIT, "B"), (_MACHINE, "cpu"), (_NUMBER, "0"),
        (_RULE, " "),
    ):  # fmt: skip
        line = pattern.sub(put, line)
    return line.strip()


def not_printed(example: Recorded, output: str) -> list[str]:
    """Lines of ``example`` that ``output`` lacks, numbers aside; more files may be written than it names."""
    printed = {normal(line) for line in output.splitlines()}
    written = {file for line in printed if line.startswith(_WRITTEN) for file in _files(line)}
    missing = []
    for line in example.lines:
        wanted = normal(line)
        if wanted in ("", "…") or wanted in printed:
            continue
        if not (wanted.startswith(_WRITTEN) and written.issuperset(_files(wanted))):
            missing.append(line)
    return missing


def _files(line: str) -> list[str]:
    return line.removeprefix(_WRITTEN).split(", ")
