"""`rank --by`: applicants in order, each with its works."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mirip_fast.evaluation.text_table import format_table, printable, shorten
from mirip_fast.files import spreadsheet_safe, write_csv
from mirip_fast.portfolio.ranking import UNKNOWN, rank_intervals, ranks_of
from mirip_fast.ranking.applicants import aggregate, members_of

if TYPE_CHECKING:
    import pandas as pd

#: What a row of a work says of its applicant, before ``file`` in a ranking.
COLUMNS = (
    "applicant",
    "applicant_rank",
    "applicant_rank_low",
    "applicant_rank_high",
    "applicant_score",
)


@dataclass(frozen=True)
class Applicants:
    """Applicants in order.

    Attributes:
        by: the column that names them; ``within``: the column inside whose values they are ranked, or None.
        table: a row per applicant, the best first; see :func:`rank_applicants`.
        how: works make a score; ``why`` says so in a sentence.
        remarks: what else has to be said, in sentences.
    """

    by: str
    within: str | None
    table: pd.DataFrame
    how: str
    why: str
    remarks: tuple[str, ...]

    def records(self) -> list[dict[str, Any]]:
        """Plain JSON types, the best applicant first."""
        names = ("name", "rank", "low", "high", "settled", "score", "sd")
        own = ("applicant", "rank", "rank_low", "rank_high", "settled", "score", "score_sd")
        return [
            {
                **{name: row.get(column) for name, column in zip(names, own, strict=True)},
                "within": row.get("within"),
                "works": row["files"],
            }
            for row in self.table.to_dict("records")
        ]

    def write(self, folder: Path) -> Path:
        """Write applicants.csv: a row per applicant, the best first."""
        within = [] if self.within is None else [self.within]
        columns = [
            *("rank", "rank_low", "rank_high", "settled", "score", "score_sd", "works"),
            "applicant",
        ]
        rows = []
        for row in self.table.to_dict("records"):
            known = {c: str(row.get(c, UNKNOWN)) for c in columns}
            known["applicant"] = spreadsheet_safe(str(row["applicant"]))
            for name in ("score", "score_sd"):
                known[name] = format(row[name], ".6g") if name in row else UNKNOWN
            if "settled" in row:
                known["settled"] = "yes" if row["settled"] else "no"
            for name in within:
                known[name] = spreadsheet_safe(row["within"])
            rows.append({**known, "files": spreadsheet_safe("; ".join(row["files"]))})
        write_csv(folder / "applicants.csv", [*columns, *within, "files"], rows)
        return folder / "applicants.csv"

    def to_text(self, ranks: dict[str, int], top: int | None, width: int) -> str:
        """A table for a terminal: behind each applicant the ranks and names of the works."""
        rows: list[list[str]] = []
        headers = ["rank", "95 %", "score", "works", "applicant", "their works, by rank"]
        for row in self.table[:top].to_dict("records"):
            span = ""
            if "rank_low" in row:
                span = f"{row['rank_low']}–{row['rank_high']}{' ' if row['settled'] else '~'}"
            name = (
                row["applicant"] if self.within is None else f"{row['within']}: {row['applicant']}"
            )
            of = ", ".join(f"{ranks[file]} {printable(Path(file).name)}" for file in row["files"])
            rows.append(
                [str(row["rank"]), span, f"{row['score']:.4f}", str(row["works"]),
                 shorten(printable(name), 24), of]
            )  # fmt: skip
        used = len(format_table(headers, [[*row[:-1], ""] for row in rows]).split("\n")[1]) - len(
            headers[-1]
        )
        for cells in rows:
            cells[-1] = shorten(cells[-1], max(20, width - used))
        return format_table(headers, rows, align="rrrrll")


def rank_applicants(
    names: Sequence[str | None],
    scores: ArrayLike,
    files: Sequence[str],
    how: str,
    *,
    draws: NDArray[np.float64] | None = None,
    within: Sequence[str | None] | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Sort applicants by what their works' scores make. Equal scores share the better rank.

    The interval counts how far grades lie from the model's scores (``draws``), and which works were handed
    in: in each draw an applicant's works are drawn anew around their mean, by how far works of one applicant
    lie from their mean among all who have several.

    Args:
        names: [n] whose work each is; None: nobody's, left out.
        scores: [n], higher is better; NaN: left out.
        files: [n] names of the works.
        how: mean, median or best:K.
        draws: [H, n] grades that the works may get, in which an applicant's works err together as they do.
        within: [n] values inside which applicants are ranked; one with works in two is there twice.
        seed: of the works drawn anew.

    Returns:
        A row per applicant: ``applicant``, ``within`` where there is one, ``rank``, ``rank_low``,
        ``rank_high`` and ``settled`` (with draws), ``score``, ``score_sd`` (with draws), ``works`` (how
        many), ``files`` (their names, the best first).
    """
    import pandas as pd

    values = np.asarray(scores, dtype=np.float64)
    keys = [
        None if name is None or np.isnan(score) else (inside or "", name)
        for name, score, inside in zip(names, values, within or [""] * len(values), strict=True)
    ]
    known, members = members_of(keys)
    own = aggregate(np.nan_to_num(values), members, how)
    drawn = None
    if draws is not None:
        drawn = aggregate(np.nan_to_num(draws), members, how)
        drawn += _other_works(values, members, how, len(draws), seed)
    parts = []
    for inside in dict.fromkeys(key[0] for key in known):
        here = np.array([i for i, key in enumerate(known) if key[0] == inside])
        here = here[np.lexsort((here, -own[here]))]
        rows: dict[str, Any] = {"applicant": [known[i][1] for i in here]}
        if within is not None:
            rows["within"] = [inside] * len(here)
        rows["rank"] = ranks_of(own[here])
        if drawn is not None:
            ends = rank_intervals(drawn[:, here], rows["rank"])
            rows["rank_low"], rows["rank_high"], rows["settled"] = ends
        rows["score"] = own[here]
        if drawn is not None:
            rows["score_sd"] = drawn[:, here].std(axis=0, ddof=1)
        places = [members[i][np.argsort(-values[members[i]], kind="stable")].tolist() for i in here]
        rows["works"] = [len(place) for place in places]
        rows["files"] = [[files[p] for p in place] for place in places]
        parts.append(pd.DataFrame(rows))
    return pd.concat(parts, ignore_index=True)


def _other_works(
    values: NDArray[np.float64],
    members: Sequence[NDArray[np.int64]],
    how: str,
    draws: int,
    seed: int,
) -> NDArray[np.float64]:
    """[draws, G] how far an applicant's score would lie from this one with other works of the same hand.

    Deviations from the mean are pooled over all applicants of several works, as two or three works alone do
    not tell how far they scatter; √(n / (n − 1)) makes up for the mean being that of the same works.
    """
    several = [values[own] for own in members if len(own) > 1]
    if not several:
        return np.zeros((draws, len(members)))
    pool = np.concatenate(
        [(own - own.mean()) * (len(own) / (len(own) - 1)) ** 0.5 for own in several]
    )
    rng = np.random.default_rng([seed, 1])
    made = aggregate(rng.choice(pool, size=(draws, len(values))), members, how)
    centred: NDArray[np.float64] = made - made.mean(axis=0)
    return centred


def of_works(
    table: pd.DataFrame, names: Sequence[str | None], within: Sequence[str | None] | None
) -> dict[str, NDArray[Any]]:
    """What each of n works says of its applicant: :data:`COLUMNS` as far as known, None where it has none.

    Args:
        table: of :func:`rank_applicants`.
        names: [n] whose work each is.
        within: [n] values inside which applicants are ranked.
    """
    keys = zip(table["within"] if within else [""] * len(table), table["applicant"], strict=True)
    row_of = dict(zip(keys, table.to_dict("records"), strict=True))
    found = [
        row_of.get((inside or "", name), {}) if name else {}
        for name, inside in zip(names, within or [""] * len(names), strict=True)
    ]
    made = {}
    for column in COLUMNS:
        name = column if column == COLUMNS[0] else column.removeprefix("applicant_")
        if name in table:
            made[column] = np.array([row.get(name) for row in found], dtype=object)
    return made
