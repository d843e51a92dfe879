"""Several graders of the same works: a column ``tier_<grader>`` each, with the name of the tier or nothing.

The ``tier`` of a work that no one decided is the consensus of its graders: the median of their tiers and,
halfway between two tiers, the worse one. Where nobody gave finer grades, ``tier_score`` is the mean of the
graders' tiers, the worst tier counted as 0, the next as 1 and so on.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mirip_fast.data.table import COLUMNS, Manifest, tier_column
from mirip_fast.errors import DataError
from mirip_fast.text import closest, counted, folded, nfc

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

PREFIX = "tier_"


def grader_of(column: str, tier_column: str, score_column: str) -> str | None:
    """The grader that a column of a file belongs to: 1 of ``tier_1`` and ``Tier1``, 김 of ``tier (김)``.

    None where it is no grader's by its name; ``tier_score`` never is.
    """
    if folded(column) in (folded(score_column), PREFIX + "score"):
        return None
    start = rf"{re.escape(tier_column)}(?:[\s_.\-]*(\d.*)|[\s_.\-]+(.+)|[\s_.\-]*[(\[](.+)[)\]])"
    found = re.fullmatch(start, column, re.IGNORECASE)
    name = "" if found is None else next(filter(None, found.groups())).strip(" ()[]")
    return name or None


def grader_names(table: pd.DataFrame) -> list[str]:
    """The graders that a table of images has grades of, in the order of their columns."""
    tiers = {"", None, *table["tier"].cat.categories}
    columns = [c for c in table.columns if str(c).startswith(PREFIX) and c not in COLUMNS]
    seen = {c: set(table[c].where(table[c].notna(), None).unique()) for c in columns}
    return [
        str(c).removeprefix(PREFIX) for c in columns if seen[c] <= tiers and seen[c] - {"", None}
    ]


def grades_of(table: pd.DataFrame) -> NDArray[np.float64]:
    """[n, G] tier by each of :func:`grader_names`, 0 is the best; NaN where one gave none."""
    code = {name: float(i) for i, name in enumerate(table["tier"].cat.categories)}
    columns = [table[PREFIX + name].map(code).to_numpy(np.float64) for name in grader_names(table)]
    return np.stack(columns, axis=1) if columns else np.empty((len(table), 0))


def consensus(grades: NDArray[np.float64]) -> NDArray[np.int64]:
    """[n, G] tiers, NaN for none → [n] the median and, halfway, the worse tier; −1 without a grade."""
    ordered, count = np.sort(grades, axis=1), np.isfinite(grades).sum(axis=1)  # NaN come last
    rows, last = np.arange(len(grades)), np.maximum(count - 1, 0)
    middle = (ordered[rows, last // 2] + ordered[rows, (last + 1) // 2]) / 2
    return np.where(count > 0, np.floor(np.nan_to_num(middle) + 0.5), -1).astype(np.int64)


def learned_grades(table: pd.DataFrame) -> NDArray[np.float64] | None:
    """:func:`grades_of`, where two graders and more are to be learned from.

    None where there are not, or a tier is another than their consensus: then somebody decided, and the
    decision is learned. None, too, where none of them gave two tiers: then one cannot be compared inside
    another's.
    """
    grades = grades_of(table)
    if grades.shape[1] < 2 or all(len(set(g[np.isfinite(g)].tolist())) < 2 for g in grades.T):
        return None
    agreed = (consensus(grades) == table["tier"].cat.codes.to_numpy()).all()
    return grades if agreed else None


def named_grader(table: pd.DataFrame, name: str | None) -> str | None:
    """The grader of a table of images who is called so, but for case and blanks; None without one."""
    names = [] if name is None else grader_names(table)
    return next((one for one in names if folded(one) == folded(name or "")), None)


def of_grader(manifest: Manifest, grader: str | None) -> Manifest:
    """The same images with the tiers that one grader gave, and no grades of others; as it is for None.

    Raises:
        DataError: there is no such grader; names those there are.
    """
    if grader is None:
        return manifest
    table, names = manifest.table, grader_names(manifest.table)
    wanted = named_grader(table, grader)
    if wanted is None:
        close = closest(nfc(grader), names)
        raise DataError(
            f"--grader {grader}: "
            + (
                f"no grader has that name; there are {', '.join(names)}"
                if names
                else "the data has no columns of several graders (tier_1, tier_2 … or a column 'grader')"
            )
            + (f". Did you mean {close}?" if close else "")
        )
    code = {name: i for i, name in enumerate(manifest.tiers)}
    own: Sequence[int | None] = [code.get(text) for text in table[PREFIX + wanted]]
    graded = len(own) - own.count(None)
    log.info(
        "%s graded %s of %s: only these tiers count",
        wanted,
        f"{graded:,}",
        counted(len(own), "work"),
    )
    table = table.drop(columns=[PREFIX + name for name in names if name != wanted])
    table = table.assign(tier=tier_column(own, manifest.tiers), tier_score=np.nan)
    return replace(manifest, table=table)
