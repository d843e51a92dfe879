"""A portfolio sorted by score: works and applicants, ranks and what is known about them, and their files."""

from __future__ import annotations

import codecs
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mirip_fast.data.splits import members_of
from mirip_fast.errors import DataError
from mirip_fast.evaluation.calibration import Calibration
from mirip_fast.evaluation.metrics import IntArray
from mirip_fast.evaluation.text_table import format_table, printable, shorten
from mirip_fast.files import spreadsheet_safe, write_csv, write_json
from mirip_fast.ranking.applicants import aggregate
from mirip_fast.text import shown

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

UNKNOWN = "unknown"
APPLICANTS_FILE = "applicants.csv"
CONFIDENCE = 0.95

#: Columns that ranking.csv has whatever is known.
_ALWAYS = (
    "rank", "rank_low", "rank_high", "settled", "score", "score_sd", "view_spread", "score_100", "tier",
)  # fmt: skip
#: What a row of a work says of its applicant, before ``file`` in a ranking.
_OF_APPLICANTS = (
    "applicant", "applicant_rank", "applicant_rank_low", "applicant_rank_high", "applicant_score",
    "applicant_tier",
)  # fmt: skip
_TABLE_WIDTH = 100  # terminal cells
_SHOWN_TIERS = 5  # more tiers than this have their probabilities in the files only


def rank_scores(
    works: pd.DataFrame,
    scores: ArrayLike,
    *,
    view_spread: ArrayLike | None = None,
    calibration: Calibration | None = None,
    draws: NDArray[np.float64] | None = None,
    win_rates: Mapping[str, NDArray[np.float64]] | None = None,
    applicants: Mapping[str, NDArray[Any]] | None = None,
) -> pd.DataFrame:
    """Sort works by score, best first. Equal scores share the better rank, as in sports: 1, 2, 2, 4.

    Args:
        works: [n rows] with ``file``, ``image_id`` and any further columns, which stand last in the result.
        scores: [n], higher is better; works without a score (NaN) are left out.
        view_spread: [n] standard deviations over the views, where there are several.
        calibration: what the scores mean.
        draws: [H, n] scores of the same works in H draws, of
            :meth:`mirip_fast.ranking.score_model.ScoreModel.draw`.
        win_rates: tier → [n] shares of its anchors that the works beat, NaN for unknown.
        applicants: further columns [n], of :func:`of_works`.

    Returns:
        A row per scored work. What is unknown of all of them has no column.

        - ``rank`` (1 = best), ``rank_low``, ``rank_high`` (95 % interval), ``settled`` (whether its order
          against both neighbours is);
        - ``score`` (higher is better), ``score_sd`` (standard deviation over the draws, in its unit),
          ``view_spread``, ``score_100`` (percentile among held-out works);
        - ``tier`` (the most probable one), ``p_<tier>`` (probabilities, which sum to 1), ``wins_<tier>``
          (shares of the anchors of a tier that it beats, NaN where the tier has none);
        - ``applicant``, ``applicant_rank``, ``applicant_rank_low``, ``applicant_rank_high``,
          ``applicant_score``, ``applicant_tier``: whose work it is and where that applicant stands, None for
          works of nobody;
        - ``file``, ``image_id``, and the further columns of ``works``. One that is called as one of the
          others gets ``given_`` before its name.
    """
    import pandas as pd

    values = np.asarray(scores, dtype=np.float64)
    files = works["file"].tolist()
    scored = np.flatnonzero(~np.isnan(values)).tolist()
    order = np.array(sorted(scored, key=lambda i: (-values[i], files[i])), dtype=np.int64)
    values = values[order]
    ranks = ranks_of(values) if len(order) else order
    known: dict[str, Any] = {"rank": ranks}
    if draws is not None and len(order):
        interval = rank_intervals(draws[:, order], ranks)
        known["rank_low"], known["rank_high"], known["settled"] = interval
    known["score"] = values
    if draws is not None and len(order):
        known["score_sd"] = draws[:, order].std(axis=0, ddof=1)
    if view_spread is not None:
        known["view_spread"] = np.asarray(view_spread, dtype=np.float64)[order]
    if calibration is not None and calibration.reference:
        known["score_100"] = calibration.score_100(values)
    chances = None if calibration is None else calibration.tier_probabilities(values)
    if calibration is not None and chances is not None:
        names = calibration.tier_names
        known["tier"] = [names[k] for k in chances.argmax(axis=1)]
        known.update((f"p_{tier}", chances[:, k]) for k, tier in enumerate(names))
    for tier, rates in (win_rates or {}).items():
        known[f"wins_{tier}"] = rates[order]
    known.update((name, cells[order]) for name, cells in (applicants or {}).items())
    for column in ("file", "image_id"):
        known[column] = works[column].to_numpy()[order]
    for column in works.columns:
        if column not in ("file", "image_id"):
            name = str(column)
            while name in known or name in _ALWAYS:
                name = f"given_{name}"
            known[name] = works[column].to_numpy()[order]
    return pd.DataFrame(known)


def of_tiers(ranking: pd.DataFrame, before: str) -> dict[str, str]:
    """Tier → the column ``<before>_<tier>`` of a ranking, best tier first; empty where it has none."""
    own = list(ranking.columns[: ranking.columns.get_loc("file")])
    return {
        str(c).removeprefix(f"{before}_"): str(c) for c in own if str(c).startswith(f"{before}_")
    }


def given_columns(ranking: pd.DataFrame) -> list[str]:
    """The columns of a ranking that came with the works."""
    columns = [str(column) for column in ranking.columns]
    return columns[columns.index("image_id") + 1 :]


def ranking_table(ranking: pd.DataFrame) -> str:
    """The ranking as text for a terminal of 100 columns; long file names are shortened.

    Unknown columns are left out. ``~`` marks ranks whose order against a neighbour is not settled.
    """
    if ranking.empty:
        return format_table(("rank", "score", "file"), [], align="rrl")
    columns = {"rank": [str(rank) for rank in ranking["rank"]]}
    if "rank_low" in ranking:
        ends = zip(ranking["rank_low"], ranking["rank_high"], ranking["settled"], strict=True)
        columns["95 %"] = [f"{low}–{high}{' ' if sure else '~'}" for low, high, sure in ends]
    columns["score"] = [f"{score:.4f}" for score in ranking["score"]]
    if "score_100" in ranking:
        columns["0–100"] = [
            str(math.floor(percent + 0.5)) for percent in ranking["score_100"]
        ]  # as on the page
    if "tier" in ranking:
        columns["tier"] = [printable(tier) for tier in ranking["tier"]]
    chances, wins = of_tiers(ranking, "p"), of_tiers(ranking, "wins")
    if wins and chances:
        columns["sure %"] = _percents(ranking[[*chances.values()]].max(axis=1))
    shown = (
        {f">{tier} %": c for tier, c in wins.items()}
        if wins
        else {f"{t} %": c for t, c in chances.items()}
    )
    if len(shown) <= _SHOWN_TIERS:
        columns.update((printable(header), _percents(ranking[c])) for header, c in shown.items())
    numbers = list(zip(*columns.values(), strict=True))
    used = (
        len(format_table(list(columns), numbers).split("\n")[1]) + 2
    )  # the rule is as wide as the columns
    room = max(20, _TABLE_WIDTH - used)
    rows = [
        (*cells, shorten(printable(file), room))
        for cells, file in zip(numbers, ranking["file"], strict=True)
    ]
    return format_table((*columns, "file"), rows, align="r" * len(columns) + "l")


def _percents(shares: pd.Series[float]) -> list[str]:
    return ["?" if math.isnan(share) else f"{100 * share:.0f}" for share in shares]


def write_ranking(folder: Path, ranking: pd.DataFrame, about: dict[str, Any]) -> list[Path]:
    """Write ranking.csv and ranking.json.

    Args:
        folder: where to; made if missing.
        ranking: the sorted works.
        about: which model and folder, and what the numbers rest on; goes into the JSON file.

    Returns:
        The files written.
    """
    chances, wins = of_tiers(ranking, "p"), of_tiers(ranking, "wins")
    given = given_columns(ranking)
    known = [c for c in ranking.columns if c not in given]
    applicants = [c for c in known if c.startswith("applicant")]
    columns = [*_ALWAYS, *chances.values(), *wins.values(), *applicants, "file", "image_id", *given]
    rows, works = [], []
    for row in ranking.to_dict("records"):
        work = {name: _plain(value) for name, value in row.items()}
        rows.append({c: _cell(c, work.get(c), own=c not in given) for c in columns})
        works.append(
            {
                **{name: work.get(name) for name in (*_ALWAYS, *applicants, "file", "image_id")},
                "tier_probabilities": {t: work[c] for t, c in chances.items()} or None,
                "win_rates": {t: work[c] for t, c in wins.items()} or None,
                "given": {name: work[name] for name in given},
            }
        )
    write_csv(folder / "ranking.csv", columns, rows)
    write_json(folder / "ranking.json", {**about, "works": works})
    return [folder / "ranking.csv", folder / "ranking.json"]


def _plain(value: Any) -> Any:
    """A cell as JSON has it; None for what is not known."""
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and math.isnan(value) else value


def _cell(name: str, value: Any, *, own: bool) -> str:
    """A cell as ranking.csv has it; what is not known says so, but for cells that were given empty."""
    if value is None:
        return UNKNOWN if own and not name.startswith("applicant") else ""
    if isinstance(value, bool) and own:
        return "yes" if value else "no"
    if isinstance(value, float) and own:
        form = (
            ".6g"
            if name in ("score", "score_sd", "view_spread", "applicant_score")
            else ".2f"
            if name == "score_100"
            else ".4f"
        )
        return format(value, form)
    return spreadsheet_safe(str(value))


def ranks_of(scores: ArrayLike) -> IntArray:
    """[…, n] scores → ranks along the last axis, 1 = the highest; equal scores share the better rank."""
    falling = -np.asarray(scores, dtype=np.float64)
    rows = falling.reshape(-1, falling.shape[-1])
    ranks = [np.searchsorted(np.sort(row), row, side="left") + 1 for row in rows]
    return np.array(ranks, dtype=np.int64).reshape(falling.shape)


def rank_intervals(
    draws: ArrayLike, own_ranks: ArrayLike
) -> tuple[IntArray, IntArray, NDArray[np.bool_]]:
    """95 % intervals of the ranks, and whose order is settled.

    Draws are of :meth:`ScoreModel.draw`: the interval says where the graders may
    put a work. It is the shortest that holds ⌈(H + 1) · 0.95⌉ of a work's ranks in H draws, the middle one
    of those equally short (the highest-density interval: at both ends of a list, where ranks can miss on one
    side only, that of equal tails would hold more). It is widened to hold the work's own rank.
    docs/uncertainty.md tells how often intervals were measured to hold the truth.

    Args:
        draws: [H, n] scores of n works in H draws, the works in the order of their own scores.
        own_ranks: [n] ranks by the model's own scores.

    Returns:
        ``low`` and ``high`` [n], 1 = best, low ≤ own rank ≤ high; ``settled`` [n] bool, whether the work
        scores higher than the next one, and lower than the one before, in at least 95 % of the draws each.
    """
    scores, own = np.asarray(draws, dtype=np.float64), np.asarray(own_ranks, dtype=np.int64)
    ranks = np.sort(ranks_of(scores), axis=0)
    held = min(len(ranks), math.ceil((len(ranks) + 1) * CONFIDENCE))
    spans = ranks[held - 1 :] - ranks[: len(ranks) - held + 1]
    shortest = np.cumsum(spans == spans.min(axis=0), axis=0)
    first, column = (2 * shortest > shortest[-1]).argmax(axis=0), np.arange(ranks.shape[1])
    ahead = (np.sign(scores[:, :-1] - scores[:, 1:]) / 2 + 0.5).mean(axis=0)
    clear = np.r_[
        True, ahead >= CONFIDENCE, True
    ]  # before the first, between neighbours, after the last
    return (
        np.minimum(ranks[first, column], own),
        np.maximum(ranks[first + held - 1, column], own),
        clear[:-1] & clear[1:],
    )


# ---------------------------------------------------------------------------------------- applicants


def applicant_records(applicants: pd.DataFrame) -> list[dict[str, Any]]:
    """Applicants of :func:`rank_applicants` as plain JSON types, the best first."""
    names = ("name", "rank", "low", "high", "settled", "score", "sd")
    own = ("applicant", "rank", "rank_low", "rank_high", "settled", "score", "score_sd")
    return [
        {
            **{name: row.get(column) for name, column in zip(names, own, strict=True)},
            "tier": row.get("tier"),
            "within": row.get("within"),
            "works": row["files"],
        }
        for row in applicants.to_dict("records")
    ]


def write_applicants(folder: Path, applicants: pd.DataFrame, within: str | None) -> Path:
    """Write applicants.csv: a row per applicant, the best first; ``within`` names the column of that."""
    check_applicants_path(folder)
    tier = ["tier"] if "tier" in applicants else []
    columns = [*_ALWAYS[:6], *tier, "works", "applicant", *filter(None, [within]), "files"]
    rows = []
    for row in applicants.to_dict("records"):
        known = {c: _plain(v) for c, v in row.items()} | {"files": "; ".join(row["files"])}
        known |= {} if within is None else {within: row["within"]}
        rows.append({c: _cell(c, known.get(c), own=True) for c in columns})
    write_csv(folder / APPLICANTS_FILE, columns, rows)
    return folder / APPLICANTS_FILE


def applicants_text(applicants: pd.DataFrame, ranks: dict[str, int], width: int) -> str:
    """A table for a terminal: behind each applicant the ranks and names of the works."""
    rows: list[list[str]] = []
    tier = ["tier"] if "tier" in applicants else []
    headers = ["rank", "95 %", "score", *tier, "works", "applicant", "their works, by rank"]
    for row in applicants.to_dict("records"):
        span = ""
        if "rank_low" in row:
            span = f"{row['rank_low']}–{row['rank_high']}{' ' if row['settled'] else '~'}"
        name = f"{row['within']}: {row['applicant']}" if "within" in row else row["applicant"]
        of = ", ".join(f"{ranks[file]} {printable(Path(file).name)}" for file in row["files"])
        rows.append(
            [str(row["rank"]), span, f"{row['score']:.4f}",
             *(printable(row[c]) for c in tier), str(row["works"]), shorten(printable(name), 24), of]
        )  # fmt: skip
    used = len(format_table(headers, [[*row[:-1], ""] for row in rows]).split("\n")[1]) - len(
        headers[-1]
    )
    for cells in rows:
        cells[-1] = shorten(cells[-1], max(20, width - used))
    return format_table(headers, rows, align="r" * (len(headers) - 2) + "ll")


def check_applicants_path(folder: Path) -> None:
    """Refuse a folder whose applicants.csv is the user's own.

    Raises:
        DataError: it is.
    """
    path = folder / APPLICANTS_FILE
    if path.is_file() and not _is_ours(path):
        raise DataError(
            f"{shown(path)} is no list that `rank --by` wrote, and stays: give another folder with "
            "--out, or another name to that file"
        )


def _is_ours(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.readline().removeprefix(codecs.BOM_UTF8).startswith(b"rank,rank_low,")


def remove_old_applicants(folder: Path) -> None:
    """Remove the list that an earlier ranking of applicants left where one of works is written now."""
    path = folder / APPLICANTS_FILE
    if path.is_file() and _is_ours(path):
        path.unlink()
        log.info("%s of an earlier ranking is removed", shown(path))


def rank_applicants(
    names: Sequence[str | None],
    scores: ArrayLike,
    files: Sequence[str],
    how: str,
    *,
    draws: NDArray[np.float64] | None = None,
    within: Sequence[str | None] | None = None,
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
        drawn += _other_works(values, members, how, len(draws))
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
    rng = np.random.default_rng([0, 1])
    made = aggregate(rng.choice(pool, size=(draws, len(values))), members, how)
    centred: NDArray[np.float64] = made - made.mean(axis=0)
    return centred


def of_works(
    table: pd.DataFrame, names: Sequence[str | None], within: Sequence[str | None] | None
) -> dict[str, NDArray[Any]]:
    """What each of n works says of its applicant: the columns that are known, None where it has none.

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
    for column in _OF_APPLICANTS:
        name = column if column == _OF_APPLICANTS[0] else column.removeprefix("applicant_")
        if name in table:
            made[column] = np.array([row.get(name) for row in found], dtype=object)
    return made
