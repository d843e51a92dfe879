"""A portfolio sorted by score: ranks and what is known about them, and the files that hold them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mirip_fast.evaluation.calibration import Calibration
from mirip_fast.evaluation.text_table import format_table, printable, shorten
from mirip_fast.files import spreadsheet_safe, write_csv, write_json
from mirip_fast.portfolio.rank_intervals import rank_intervals, ranks_of

UNKNOWN = "unknown"

_TABLE_WIDTH = 100  # terminal cells
_SHOWN_TIERS = 5  # more tiers than this have their probabilities in the files only


@dataclass(frozen=True)
class Ranked:
    """One work and its place; equal scores share a rank. What is None is unknown.

    Attributes:
        rank: 1 = best.
        score: higher is better.
        file, image_id: the work.
        view_spread: standard deviation of the score over the stored views.
        score_100: percentile among held-out works (0–100).
        tier: the most probable tier.
        tier_probabilities: tier → probability, the best tier first; they sum to 1.
        rank_low, rank_high: 95 % interval of the rank.
        settled: whether its order against both neighbours is settled.
        win_rates: tier → share (0–1) of its anchors that the work beats, the best tier first; None where
            a tier has no anchor to compare with.
    """

    rank: int
    score: float
    file: str
    image_id: str
    view_spread: float | None = None
    score_100: float | None = None
    tier: str | None = None
    tier_probabilities: Mapping[str, float] | None = None
    rank_low: int | None = None
    rank_high: int | None = None
    settled: bool | None = None
    win_rates: Mapping[str, float | None] | None = None


def rank_scores(
    files: Sequence[str],
    image_ids: Sequence[str],
    scores: Sequence[float],
    *,
    view_spread: Sequence[float] | None = None,
    calibration: Calibration | None = None,
    draws: NDArray[np.float64] | None = None,
    win_rates: Mapping[str, NDArray[np.float64]] | None = None,
) -> list[Ranked]:
    """Sort by score, best first. Equal scores share the better rank, as in sports: 1, 2, 2, 4.

    Args:
        files: [n] names to show.
        image_ids: [n] ids.
        scores: [n], higher is better; works without a score (NaN) are left out.
        view_spread: [n] standard deviations over the views, where there are several.
        calibration: what the scores mean.
        draws: [H, n] scores of the same works by H bootstrap heads, of
            :func:`mirip_fast.portfolio.rank_intervals.draw_scores`.
        win_rates: tier → [n] shares of its anchors that the works beat, NaN for unknown.
    """
    scored = [i for i, score in enumerate(scores) if not math.isnan(score)]
    order = sorted(scored, key=lambda i: (-scores[i], files[i]))
    if not order:
        return []
    values = np.array([scores[i] for i in order], dtype=np.float64)
    ranks = ranks_of(values)
    known: dict[str, list[Any]] = {}
    if view_spread is not None:
        known["view_spread"] = [float(view_spread[i]) for i in order]
    if calibration is not None:
        known.update(_meaning(calibration, values))
    if draws is not None:
        spread = rank_intervals(draws[:, order], ranks)
        known["rank_low"], known["rank_high"] = spread.low.tolist(), spread.high.tolist()
        known["settled"] = spread.settled.tolist()
    if win_rates is not None:
        known["win_rates"] = [
            {
                tier: None if math.isnan(rates[i]) else float(rates[i])
                for tier, rates in win_rates.items()
            }
            for i in order
        ]
    return [
        Ranked(
            int(ranks[place]), float(scores[i]), files[i], image_ids[i],
            **{name: column[place] for name, column in known.items()},
        )
        for place, i in enumerate(order)
    ]  # fmt: skip


def _meaning(calibration: Calibration, values: NDArray[np.float64]) -> dict[str, list[Any]]:
    """Columns of what the scores mean; none if it is unknown."""
    percentiles = calibration.score_100(values)
    chances = calibration.tier_probabilities(values)
    if percentiles is None or chances is None:
        return {}
    names = calibration.tier_names
    return {
        "score_100": percentiles.tolist(),
        "tier": [names[k] for k in chances.argmax(axis=1)],
        "tier_probabilities": [dict(zip(names, row, strict=True)) for row in chances.tolist()],
    }


def ranking_table(ranking: Sequence[Ranked]) -> str:
    """The ranking as text for a terminal of 100 columns; long file names are shortened.

    Unknown columns are left out. ``~`` marks ranks whose order against a neighbour is not settled.
    """
    if not ranking:
        return format_table(("rank", "score", "file"), [], align="rrl")
    headers, columns = ["rank"], [[str(work.rank) for work in ranking]]
    if ranking[0].rank_low is not None:
        headers.append("95 %")
        columns.append([f"{w.rank_low}–{w.rank_high}{' ' if w.settled else '~'}" for w in ranking])
    headers.append("score")
    columns.append([f"{work.score:.4f}" for work in ranking])
    if ranking[0].score_100 is not None:
        headers.append("0–100")
        columns.append([f"{work.score_100:.0f}" for work in ranking])
    if ranking[0].tier is not None:
        headers.append("tier")
        columns.append([printable(str(work.tier)) for work in ranking])
    if ranking[0].win_rates is not None:
        for header, column in _compared_columns(ranking):
            headers.append(header)
            columns.append(column)
    elif ranking[0].tier is not None:
        names = list(ranking[0].tier_probabilities or ())
        if len(names) <= _SHOWN_TIERS:
            headers += [f"{printable(name)} %" for name in names]
            for name in names:
                columns.append([f"{100 * (w.tier_probabilities or {})[name]:.0f}" for w in ranking])
    numbers = list(zip(*columns, strict=True))
    used = (
        len(format_table(headers, numbers).split("\n")[1]) + 2
    )  # the rule is as wide as the columns
    room = max(20, _TABLE_WIDTH - used)
    rows = [
        (*cells, shorten(printable(work.file), room))
        for cells, work in zip(numbers, ranking, strict=True)
    ]
    return format_table((*headers, "file"), rows, align="r" * len(headers) + "l")


def _compared_columns(ranking: Sequence[Ranked]) -> list[tuple[str, list[str]]]:
    """The probability of the tier, and the win rates against few tiers."""
    columns = []
    if ranking[0].tier_probabilities is not None:
        chances = [max((work.tier_probabilities or {}).values()) for work in ranking]
        columns.append(("sure %", [f"{100 * chance:.0f}" for chance in chances]))
    names = list(ranking[0].win_rates or ())
    for name in names if len(names) <= _SHOWN_TIERS else ():
        rates = [(work.win_rates or {})[name] for work in ranking]
        cells = ["?" if rate is None else f"{100 * rate:.0f}" for rate in rates]
        columns.append((f">{printable(name)} %", cells))
    return columns


def write_ranking(folder: Path, ranking: Sequence[Ranked], about: dict[str, Any]) -> list[Path]:
    """Write ranking.csv and ranking.json.

    Args:
        folder: where to; made if missing.
        ranking: the sorted works.
        about: which model and folder, and what the numbers rest on; goes into the JSON file.

    Returns:
        The files written.
    """
    tiers = list((ranking[0].tier_probabilities if ranking else None) or ())
    against = list((ranking[0].win_rates if ranking else None) or ())
    columns = [
        "rank", "rank_low", "rank_high", "settled", "score", "view_spread", "score_100", "tier",
        *(f"p_{tier}" for tier in tiers),
        *(f"wins_{tier}" for tier in against), "file", "image_id",
    ]  # fmt: skip
    rows = [
        {
            "rank": work.rank,
            "rank_low": _cell(work.rank_low, "d"),
            "rank_high": _cell(work.rank_high, "d"),
            "settled": {True: "yes", False: "no", None: UNKNOWN}[work.settled],
            "score": f"{work.score:.6g}",
            "view_spread": _cell(work.view_spread, ".6g"),
            "score_100": _cell(work.score_100, ".2f"),
            "tier": spreadsheet_safe(work.tier or UNKNOWN),
            **{f"p_{tier}": f"{p:.4f}" for tier, p in (work.tier_probabilities or {}).items()},
            **{f"wins_{t}": _cell(rate, ".4f") for t, rate in (work.win_rates or {}).items()},
            "file": spreadsheet_safe(work.file),
            "image_id": spreadsheet_safe(work.image_id),
        }
        for work in ranking
    ]
    write_csv(folder / "ranking.csv", columns, rows)
    works = [vars(work) for work in ranking]
    write_json(folder / "ranking.json", {**about, "works": works})
    return [folder / "ranking.csv", folder / "ranking.json"]


def _cell(value: float | None, form: str) -> str:
    return UNKNOWN if value is None else format(value, form)
