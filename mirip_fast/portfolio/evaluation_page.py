"""`evaluate --html`: how good a model is, as one page for people who grade art.

The page has the figures of the report, drawn by its own script so that they follow the reader's language,
screen and colours, and the worst mistakes as pictures. It is one file and asks for nothing from elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from mirip_fast.config import Config
from mirip_fast.evaluation.bootstrap import FEW_GROUPS, Interval
from mirip_fast.evaluation.calibration import pair_probability
from mirip_fast.evaluation.report import Report
from mirip_fast.evaluation.text_table import printable
from mirip_fast.language import in_other_languages
from mirip_fast.portfolio.page import pictures_of, tier_curves, write_html
from mirip_fast.ranking.evaluate import Evaluation, files_of, shown_mistakes
from mirip_fast.ranking.finished import CURVES, read_curves
from mirip_fast.ranking.judged_pairs import PairReport
from mirip_fast.ranking.score_model import ScoreModel
from mirip_fast.training.run_folder import Run

_MISTAKES = 10
_SIDE, _BYTES = 560, 90_000  # of a mistake's picture: longest side in pixels, and its file
_POINTS = 300  # of a learning curve; more are not seen


def write_evaluation_page(
    path: Path,
    model: ScoreModel,
    evaluation: Evaluation | None,
    pairs: PairReport | None,
    config: Config,
) -> Path:
    """Write the page of an evaluation; an earlier one is replaced.

    Args:
        path: the HTML file.
        model: what was judged.
        evaluation: by tiers; None where the images have none.
        pairs: agreement with judged pairs; None where the run has none.
        config: the section embed (``workers``) is used.
    """
    run = Run(model.checkpoint.parent)
    pictures: dict[str, bytes] = {}
    data: dict[str, Any] = {
        "title": printable(run.path.absolute().name),
        "made": datetime.now().astimezone().isoformat(timespec="minutes"),
        "about": printable(evaluation.about) if evaluation else None,
        "pictures": None,  # inside the page
        "tiers": []
        if evaluation is None
        else [printable(name) for name in evaluation.report.tier_names],
        "learning": _learning(run),
        "judgedPairs": None if pairs is None else _pairs(pairs),
        "report": None,
    }
    if evaluation is not None:
        within = evaluation.within
        data["report"] = {
            **_figures(evaluation.report),
            "withinColumn": None if within is None else printable(within),
            "agreement": _agreement(evaluation),
            "mistakes": _mistakes(evaluation, config, pictures),
            "baselines": [
                {
                    "name": baseline["name"].replace(" ", ""),
                    "word": baseline["word"],
                    **_measure(baseline["difference"], baseline["interval"]),
                    "unknown": baseline["unknown"] and printable(baseline["unknown"]),
                }
                for baseline in evaluation.baselines
            ],
        }
    data["spoken"] = in_other_languages(_said(data))
    write_html(path, data, pictures, "evaluation_files")
    return path


def _said(data: dict[str, Any]) -> list[str]:
    """What the page shows in sentences that the program said in English."""
    report = data["report"] or {}
    said = [data["about"], *((report.get("probabilities") or {}).get("warnings", []))]
    said.append(report.get("unknown") and f"Probabilities {report['unknown']}")
    return [text for text in said if text]


def _figures(report: Report) -> dict[str, Any]:
    known = report.probabilities
    most_probable = None if known is None else known["tiers"]
    judged = report.by_quota if most_probable is None else most_probable
    pairs = None if known is None else known["pairs"]
    measures = {
        "accuracy": (report.pairwise_accuracy, report.pairwise_accuracy_interval),
        "macro": (report.macro_accuracy, report.macro_accuracy_interval),
        "within": (report.within_accuracy, report.within_accuracy_interval),
        "tierAccuracy": (None, None)
        if judged is None
        else (judged["accuracy"], judged["accuracy_interval"]),
        "macroF1": (None, None)
        if judged is None
        else (judged["macro_f1"], judged["macro_f1_interval"]),
        "tau": (report.kendall_tau_b, report.kendall_tau_b_interval),
        "spearman": (report.spearman, report.spearman_interval),
        "ndcg10": (report.ndcg.get(10), report.ndcg_intervals.get(10)),
        "ece": (None, None) if pairs is None else (pairs["ece"], pairs["interval"]),
    }
    return {
        "images": report.n_images,
        "counts": list(report.tier_counts),
        "groupCount": report.n_groups,
        "fewGroups": report.n_groups < FEW_GROUPS,
        "pairs": report.n_pairs,
        "withinPairs": report.within_pairs,
        "gradedFiner": report.spearman_images,
        "confidence": report.confidence,
        "seen": report.seen,
        "measures": {name: _measure(*both) for name, both in measures.items()},
        "violins": tier_curves(
            report.scores, report.tiers, [printable(name) for name in report.tier_names]
        ),
        "confusion": [] if judged is None else judged["confusion"],
        "byQuota": most_probable is None,
        "tierPairs": [
            _share(row, name=None, better=printable(row["better"]), worse=printable(row["worse"]))
            for row in report.tier_pairs.to_dict("records")
        ],
        "groups": [
            _share(row, name=printable(row["group"]), works=row["images"])
            for row in report.groups.to_dict("records")
        ],
        "within": [
            _share(row, name=printable(row["value"]))
            for row in report.within_values.sort_values("accuracy", kind="stable").to_dict(
                "records"
            )
        ],
        "probabilities": None
        if known is None
        else {
            "source": known["source"],
            "images": known["images"],
            "warnings": [printable(text) for text in known["warnings"]],
            "bins": []
            if pairs is None
            else [
                {**part, "interval": part["interval"] and asdict(part["interval"])}
                for part in pairs["bins"]
            ],
            "overconfidence": None if pairs is None else pairs["overconfidence"],
        },
        "unknown": report.probabilities_unknown and printable(report.probabilities_unknown),
    }


def _agreement(evaluation: Evaluation) -> dict[str, Any] | None:
    """How far several graders agree; None where there are not, or no work has grades of two."""
    known = evaluation.report.agreement
    if known is None or not known.overlap:
        return None
    plain = known.to_dict()
    names = {
        "alpha": "alpha", "ceiling": "humanCeiling", "model": "modelOnSame", "model_within": "modelWithin",
    }  # fmt: skip
    return {
        "works": known.works,
        "overlap": known.overlap,
        "figures": {
            names[name]: _measure(plain[name], known.intervals.get(name)) for name in known.figures
        },
        "graders": [{**row, "grader": printable(row["grader"])} for row in plain["graders"]],
    }


def _measure(value: float | None, interval: Interval | None) -> dict[str, float | None]:
    low, high = (None, None) if interval is None else (interval.low, interval.high)
    return {"value": value, "low": low, "high": high}


def _share(row: Mapping[Any, Any], **more: Any) -> dict[str, Any]:
    return {"pairs": row["pairs"], **_measure(row["accuracy"], row.get("interval")), **more}


def _pairs(pairs: PairReport) -> dict[str, Any]:
    low, high = pairs.interval or (None, None)
    return {
        "pairs": pairs.pairs,
        "ties": pairs.ties,
        "split": pairs.split,
        "value": pairs.accuracy,
        "low": low,
        "high": high,
    }


def _learning(run: Run) -> list[dict[str, Any]]:
    """Learning curves, thinned out; none where the model has no readable history beside it."""
    try:
        curves = read_curves(run)
    except (OSError, ValueError, KeyError):
        return []
    thinned = []
    for name, fit, best in curves:
        epochs, last = fit["epoch"].tolist(), len(fit) - 1
        step = max(1, len(fit) // _POINTS)
        kept = sorted(
            {*range(0, last + 1, step), last, *(i for i in range(last) if epochs[i] == best)}
        )
        some = fit.iloc[kept].round(5)
        drawn = {key.replace("/", "_"): some[key].tolist() for key in CURVES}
        thinned.append({"name": name, "best": best, "epochs": some["epoch"].tolist(), **drawn})
    return thinned


def _mistakes(
    evaluation: Evaluation, config: Config, pictures: dict[str, bytes]
) -> list[dict[str, Any]]:
    """The worst mistakes; their pictures are put into ``pictures`` by name."""
    mistakes, whole = (
        shown_mistakes(evaluation.report, evaluation.images, _MISTAKES),
        files_of(evaluation.images),
    )
    files = {name: whole[name] for name in mistakes[["better_id", "worse_id"]].to_numpy().ravel()}
    names: dict[str, str | None] = {}
    copies = pictures_of(files.values(), _SIDE, _BYTES, config)
    for image_id, (name, webp) in zip(files, copies, strict=True):
        names[image_id] = name
        if name is not None:
            pictures[name] = webp
    report = evaluation.report

    def side(mistake: Mapping[Any, Any], which: str) -> dict[str, Any]:
        image_id, tier = mistake[f"{which}_id"], mistake[f"{which}_tier"]
        return {
            "name": printable(files[image_id].name),
            "tier": report.tier_names.index(tier) if report.tier_names else None,
            "grade": tier,
            "score": float(f"{mistake[f'{which}_score']:.6g}"),
            "picture": names[image_id],
        }

    chances = np.full(len(mistakes), None)
    if (known := report.probabilities) is not None:
        temperature = float("inf") if known["temperature"] is None else known["temperature"]
        chances = pair_probability(mistakes["gap"], temperature).round(4)
    return [
        {"better": side(mistake, "better"), "worse": side(mistake, "worse"), "chance": chance}
        for mistake, chance in zip(mistakes.to_dict("records"), chances.tolist(), strict=True)
    ]
