"""What an audit can find: kinds, how grave they are, and the file they are written to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mirip_fast.data.csv_reader import closest
from mirip_fast.errors import ConfigError
from mirip_fast.files import spreadsheet_safe, write_csv

AUDIT_FILE = "audit.csv"

#: Gravest first. An error makes a measured accuracy untrue or grades contradict each other; a warning
#: is worth a look; a note is only told.
SEVERITIES = ("error", "warning", "note")

#: Kind → (severity, what it means for a person).
KINDS = {
    "copy-across-splits": ("error", "the same file in different splits"),
    "near-across-splits": ("error", "near duplicates in different splits"),
    "group-across-splits": ("error", "a group in different splits"),
    "copy-other-tier": ("error", "the same file with different tiers"),
    "near-other-tier": ("warning", "near duplicates with different tiers"),
    "disagreement": ("warning", "held-out score contradicts the tier"),
    "cycle": ("warning", "judgements that contradict each other"),
    "unreadable": ("warning", "files that could not be embedded"),
    "missing": ("warning", "files that are gone"),
    "changed": ("warning", "files that changed since they were embedded"),
    "not-embedded": ("warning", "images without features"),
    "copy": ("note", "the same file more than once"),
    "near": ("note", "near duplicates"),
}

_COLUMNS = (
    "kind", "severity", "images", "rows", "splits", "tiers", "value", "advice", "paths",
)  # fmt: skip
_BETWEEN = "; "


@dataclass(frozen=True)
class Finding:
    """One finding; ``images``, ``rows``, ``splits``, ``tiers`` and ``paths`` run in parallel where known.

    Attributes:
        kind: one of :data:`KINDS`.
        images: image ids.
        advice: what to do.
        rows: lines in the CSV file of the data, or in the pairs file for a cycle (with its name
            where there are several).
        splits: train, val or test.
        tiers: names of the tiers.
        value: what was measured, in words.
        paths: image files.
        weight: for the order among findings of a kind, the largest first.
    """

    kind: str
    images: Sequence[str]
    advice: str
    rows: Sequence[int | str] = ()
    splits: Sequence[str] = ()
    tiers: Sequence[str] = ()
    value: str = ""
    paths: Sequence[Path] = ()
    weight: float = 0.0

    @property
    def severity(self) -> str:
        """How grave it is, one of :data:`SEVERITIES`."""
        return KINDS[self.kind][0]


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """Gravest first, kinds together, and inside a kind by weight."""
    kinds = list(KINDS)
    return sorted(findings, key=lambda f: (kinds.index(f.kind), -f.weight))


def write_findings(path: Path, findings: Sequence[Finding]) -> None:
    """Write one line per finding; cells with several values have «; » between them."""
    rows = [
        {
            "kind": finding.kind,
            "severity": finding.severity,
            "images": spreadsheet_safe(_BETWEEN.join(finding.images)),
            "rows": _BETWEEN.join(map(str, finding.rows)),
            "splits": _BETWEEN.join(finding.splits),
            "tiers": spreadsheet_safe(_BETWEEN.join(finding.tiers)),
            "value": finding.value,
            "advice": finding.advice,
            "paths": spreadsheet_safe(_BETWEEN.join(map(str, finding.paths))),
        }
        for finding in findings
    ]
    write_csv(path, _COLUMNS, rows)


def failing_kinds(text: str) -> frozenset[str]:
    """The kinds that ``--fail-on`` names.

    Args:
        text: ``none``, a severity (it stands for itself and all graver ones), or kinds; several are
            separated by commas.

    Raises:
        ConfigError: an unknown word.
    """
    chosen: set[str] = set()
    for word in (part.strip() for part in text.split(",")):
        if word in SEVERITIES:
            grave = SEVERITIES[: SEVERITIES.index(word) + 1]
            chosen |= {kind for kind, (severity, _) in KINDS.items() if severity in grave}
        elif word in KINDS:
            chosen.add(word)
        elif word not in ("none", ""):
            known = ["none", *SEVERITIES, *KINDS]
            close = closest(word, known)
            hint = f" Did you mean {close}?" if close else ""
            raise ConfigError(f"--fail-on {word}: none of {', '.join(known)}.{hint}")
    return frozenset(chosen)


def counts(findings: Iterable[Finding]) -> Counter[str]:
    """Findings per kind."""
    return Counter(finding.kind for finding in findings)
