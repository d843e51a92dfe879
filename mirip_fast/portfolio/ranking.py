"""A portfolio sorted by score: ranks, and the files that hold them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mirip_fast.evaluation.text_table import format_table
from mirip_fast.files import spreadsheet_safe, write_csv, write_json

_COLUMNS = ("rank", "score", "file", "image_id")


@dataclass(frozen=True)
class Ranked:
    """One work and its place; equal scores share a rank."""

    rank: int
    score: float
    file: str
    image_id: str


def rank_scores(
    files: Sequence[str], image_ids: Sequence[str], scores: Sequence[float]
) -> list[Ranked]:
    """Sort by score, best first. Equal scores share the better rank, as in sports: 1, 2, 2, 4.

    Args:
        files: [n] names to show.
        image_ids: [n] ids.
        scores: [n], higher is better; works without a score (NaN) are left out.
    """
    scored = [i for i, score in enumerate(scores) if not math.isnan(score)]
    order = sorted(scored, key=lambda i: (-scores[i], files[i]))
    values = np.array([scores[i] for i in order], dtype=np.float64)
    first = np.searchsorted(-values, -values, side="left")
    return [
        Ranked(int(rank) + 1, float(scores[i]), files[i], image_ids[i])
        for rank, i in zip(first, order, strict=True)
    ]


def ranking_table(ranking: Sequence[Ranked]) -> str:
    """The ranking as text for a terminal."""
    rows = [(str(work.rank), f"{work.score:.4f}", work.file) for work in ranking]
    return format_table(("rank", "score", "file"), rows, align="rrl")


def write_ranking(folder: Path, ranking: Sequence[Ranked], about: dict[str, Any]) -> list[Path]:
    """Write ranking.csv and ranking.json.

    Args:
        folder: where to; made if missing.
        ranking: the sorted works.
        about: which model and folder; goes into the JSON file.

    Returns:
        The files written.
    """
    rows = [
        {
            "rank": work.rank,
            "score": f"{work.score:.6g}",
            "file": spreadsheet_safe(work.file),
            "image_id": spreadsheet_safe(work.image_id),
        }
        for work in ranking
    ]
    write_csv(folder / "ranking.csv", _COLUMNS, rows)
    works = [vars(work) for work in ranking]
    write_json(folder / "ranking.json", {**about, "works": works})
    return [folder / "ranking.csv", folder / "ranking.json"]
