"""An audit as text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from mirip_fast.data.csv_reader import counted
from mirip_fast.evaluation.text_table import format_table, printable
from mirip_fast.ranking.audit import Audit
from mirip_fast.ranking.findings import KINDS, Finding, counts

_NAMES = 4  # images named per finding


def audit_text(audit: Audit, top: int) -> str:
    """What was checked, a table of the kinds found, and the ``top`` first findings of each kind."""
    parts = ["\n".join(f"- {sentence}" for sentence in audit.checked)]
    if not audit.findings:
        return "\n\n".join([*parts, "Nothing was found fault with."])
    found = counts(audit.findings)
    rows = [
        (severity, kind, found[kind], meaning)
        for kind, (severity, meaning) in KINDS.items()
        if found[kind]
    ]
    parts.append(format_table(("severity", "kind", "found", "meaning"), rows, "llrl"))
    for _, kind, count, meaning in rows:
        if top:
            shown = [f for f in audit.findings if f.kind == kind][:top]
            lines = [f"{meaning.capitalize()}:", *(_line(finding) for finding in shown)]
            if count > top:
                lines.append(f"  … and {count - top} more")
            parts.append("\n".join([*lines, f"  → {shown[0].advice}"]))
    return "\n\n".join(parts)


def verdict(audit: Audit) -> str:
    """The last line: whether the audit failed, and over what."""
    if not audit.failed:
        return "No finding of the kinds that --fail-on names."
    kinds = ", ".join(f"{kind} {count}" for kind, count in counts(audit.failed).items())
    return f"Failed: {counted(len(audit.failed), 'finding')} of the kinds that --fail-on names ({kinds})."


def _line(finding: Finding) -> str:
    names = [
        _named(image, finding.tiers, finding.splits, i) for i, image in enumerate(finding.images)
    ]
    if finding.kind == "cycle":
        names = [*finding.images[:_NAMES], *(["…"] if len(names) > _NAMES else [])]
        text = " > ".join([*names, finding.images[0]])
        text += f" (rows {', '.join(map(str, finding.rows))})"
    else:
        text = ", ".join(names[:_NAMES])
        text += f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    return printable(f"  {text}" + (f": {finding.value}" if finding.value else ""))


def _named(image: str, tiers: Sequence[str], splits: Sequence[str], i: int) -> str:
    known = [values[i] for values in (tiers, splits) if values and values[i] != "-"]
    return f"{image} ({', '.join(known)})" if known else image
