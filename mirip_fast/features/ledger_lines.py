"""The lines of a data set's ledger, manifest.csv: one per input, with its grade and what became of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mirip_fast.data.manifest import Record
from mirip_fast.data.remote import address, path_of
from mirip_fast.features.outcomes import STATUSES, Outcome

COLUMNS = (
    "image_id", "path", "status", "reason", "tier", "tier_score", "group", "row", "sha256", "extra",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One line of the ledger: an input, and what became of it."""

    record: Record
    outcome: Outcome


def line(record: Record, outcome: Outcome, tiers: Sequence[str]) -> dict[str, object]:
    """The cells of one line."""
    return {
        "image_id": record.image_id,
        "path": address(record.path),
        "status": outcome.status,
        "reason": outcome.reason,
        "tier": None if record.tier is None else tiers[record.tier],
        "tier_score": record.tier_score,
        "group": record.group,
        "row": record.row,
        "sha256": outcome.sha256.hex() if outcome.sha256 else None,
        "extra": json.dumps(record.extra, ensure_ascii=False) if record.extra else None,
    }


def lasting(cells: Mapping[str, object]) -> list[str]:
    """What a line says of its image, whichever run computed the features."""
    texts = {key: "" if cells.get(key) is None else str(cells[key]) for key in COLUMNS}
    if texts["status"] == "embedded":
        texts["status"] = "present"
    return list(texts.values())


def parse_line(row: dict[str, str], tiers: list[str]) -> Entry:
    """What one line says; nothing in it is trusted.

    Args:
        row: the cells as they stand in the file.
        tiers: names of the tiers, the best first.

    Raises:
        ValueError, KeyError, TypeError: it is damaged.
    """
    if None in row.values() or None in row:
        raise ValueError(f"{row['image_id']}: the line is cut short")
    record = Record(
        image_id=row["image_id"],
        path=path_of(row["path"]),
        tier=tiers.index(row["tier"]) if row["tier"] else None,
        tier_score=float(row["tier_score"]) if row["tier_score"] else None,
        group=row["group"] or None,
        extra=json.loads(row["extra"]) if row["extra"] else {},
        row=int(row["row"]) if row["row"] else None,
    )
    sha256 = bytes.fromhex(row["sha256"]) if row["sha256"] else None
    length = 0 if sha256 is None else len(sha256)
    if row["status"] not in STATUSES or length not in (
        (32, 0) if row["status"] == "failed" else (32,)
    ):
        raise ValueError(f"{row['image_id']}: status {row['status']!r}, sha256 {row['sha256']!r}")
    return Entry(record, Outcome(row["status"], sha256, row["reason"] or None))
