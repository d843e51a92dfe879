"""Tables of images row by row, and small ones of their own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd

from mirip_fast.data.table import COLUMNS, Manifest, given_name, image_table, or_none, own_columns

TIERS = ("S", "A", "B", "C")


def images_of(table: pd.DataFrame | Manifest) -> list[Any]:
    """What a table says of each image; its tier as a number, its file as a path, the user's own as ``own``."""
    table = table.table if isinstance(table, Manifest) else table
    columns = {name: or_none(table[name]) for name in COLUMNS if name in table.columns}
    columns["path"] = [Path(file) for file in table["file"]]
    columns["tier"] = [None if code < 0 else code for code in table["tier"].cat.codes.tolist()]
    own = {name: or_none(table[name]) for name in own_columns(table)}
    columns["own"] = [
        {given_name(name): values[i] for name, values in own.items() if values[i] is not None}
        for i in range(len(table))
    ]
    return [
        SimpleNamespace(**dict(zip(columns, row, strict=True)))
        for row in zip(*columns.values(), strict=True)
    ]


def named_table(root: Path, names: list[str], ids: list[str] | None = None) -> pd.DataFrame:
    """Images below a folder, without grades."""
    files = [str(root / name) for name in names]
    return image_table({"image_id": ids or names, "file": files, "named": names}, TIERS)
