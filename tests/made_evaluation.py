"""Evaluations whose scores are made up, and the page of one: no model is trained, no picture looked at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from mirip_fast.config import Config
from mirip_fast.data.table import Manifest, image_table
from mirip_fast.evaluation.calibration import fit_calibration
from mirip_fast.evaluation.report import Report, evaluate
from mirip_fast.portfolio.evaluation_page import write_evaluation_page
from mirip_fast.ranking.evaluate import Evaluation
from mirip_fast.ranking.graded import GradedImages
from mirip_fast.ranking.judged_pairs import PairReport


def made_report(
    scores: ArrayLike | None = None,
    tiers: ArrayLike | None = None,
    *,
    names: Sequence[str] = ("S", "A", "B", "C"),
    groups: Sequence[str | None] | None = None,
    within: Sequence[str | None] | None = None,
    calibrated: bool = True,
    rounds: int = 60,
) -> Report:
    """A report on made scores; 96 works of four tiers unless others are given."""
    rng = np.random.default_rng(0)
    tier = np.arange(96) % len(names) if tiers is None else np.asarray(tiers)
    values = rng.normal(size=len(tier)) - 0.8 * tier if scores is None else np.asarray(scores)
    calibration = fit_calibration(values, tier, names, source="validation") if calibrated else None
    return evaluate(
        values, tier, tier_names=names, image_ids=[f"id {i}" for i in range(len(tier))],
        groups=groups, within=within, calibration=calibration, rounds=rounds,
    )  # fmt: skip


def made_evaluation_page(
    folder: Path,
    report: Report | None,
    *,
    files: Sequence[str] = (),
    within: str | None = None,
    pairs: PairReport | None = None,
    history: str | None = None,
) -> Path:
    """Write ``folder``/report.html on a run that lies in ``folder``/run.

    Args:
        folder: everything is made below it.
        report: the figures, or None for judged pairs alone.
        files: names of the judged works, made as pictures; the rest is missing.
        within: the column's name.
        pairs: agreement with judged pairs.
        history: text of history.csv.
    """
    run = folder / "run <b>1"
    run.mkdir(exist_ok=True)
    if history is not None:
        (run / "history.csv").write_text(history, encoding="utf-8", newline="\r\n")
        (run / "run.json").write_text('{"best_epoch": 2}', encoding="utf-8")
    for i, name in enumerate(files):
        (folder / "works" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 20), (i * 9 % 256, 90, 60)).save(folder / "works" / name, "PNG")
    tiers = ("S", "A", "B", "C") if report is None else report.tier_names
    model: Any = SimpleNamespace(
        checkpoint=run / "best_model.pt", info=SimpleNamespace(tiers=tiers)
    )
    judgement = None
    if report is not None:
        names = [*files, *(f"gone {i}.png" for i in range(len(files), report.n_images))]
        known = {
            "image_id": [f"id {i}" for i in range(len(names))],
            "file": [str(folder / "works" / name) for name in names],
        }
        table = Manifest(folder, folder, tiers, image_table(known, tiers))
        images = GradedImages.of(table, [None] * len(names), [""] * len(names))
        about = f"test split, {report.n_images} images"
        judgement = Evaluation(report, run / "evaluation_test.json", images, model, about, within)
    config = Config()
    config.embed.workers = 0
    return write_evaluation_page(folder / "report.html", model, judgement, pairs, config)
