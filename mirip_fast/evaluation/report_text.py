"""A report as aligned plain text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mirip_fast.evaluation.intervals import FEW_GROUPS, Interval
from mirip_fast.evaluation.text_table import format_table

if TYPE_CHECKING:
    from mirip_fast.evaluation.report import Mistake, Report


def report_text(report: Report, mistakes: int) -> str:
    """Figures, tier pairs, confusion matrix, the ``mistakes`` worst mistakes and remarks."""
    counts = zip(report.tier_names, report.tier_counts, strict=True)
    head = (
        f"{report.n_images} images ({', '.join(f'{name} {count}' for name, count in counts)}) "
        f"in {report.n_groups} groups, {report.n_pairs} pairs of different tiers"
    )
    parts = [head, _figures(report), _tier_pairs(report), _confusion(report)]
    worst = report.worst_mistakes(mistakes)
    if worst:
        parts.append("Worst mistakes\n" + mistake_table(worst))
    return "\n\n".join([*parts, *_remarks(report)])


def mistake_table(mistakes: Sequence[Mistake]) -> str:
    """One line per wrongly ordered pair: the image of the better tier, that of the worse, the gap."""
    headers = ["should be higher", "tier", "score", "scores higher", "tier", "score", "gap"]
    rows = [
        [
            *(m.better_id, m.better_tier, f"{m.better_score:.4g}"),
            *(m.worse_id, m.worse_tier, f"{m.worse_score:.4g}", f"{m.gap:.4g}"),
        ]
        for m in mistakes
    ]
    return format_table(headers, rows, "llrllrr")


def _figures(report: Report) -> str:
    rows = [
        _row("pairwise accuracy", report.pairwise_accuracy, report.pairwise_accuracy_interval),
        _row("  mean over tier pairs", report.macro_accuracy, report.macro_accuracy_interval),
    ]
    if report.judged.within is not None:
        name = f"  inside the same within value ({report.within_pairs} pairs)"
        rows.append(_row(name, report.within_accuracy, report.within_accuracy_interval))
    rows.append(_row("Kendall tau-b", report.kendall_tau_b, report.kendall_tau_b_interval))
    if report.spearman_images:
        name = f"Spearman with tier_score ({report.spearman_images} images)"
        rows.append([name, _number(report.spearman), ""])
    rows += [[f"NDCG@{k}", _number(value), ""] for k, value in report.ndcg.items()]
    rows.append(["tier accuracy (tiers by quota)", _number(report.tier_accuracy), ""])
    rows.append(["macro F1 (tiers by quota)", _number(report.macro_f1), ""])
    return format_table(["measure", "value", _interval_header(report)], rows, "lrl")


def _tier_pairs(report: Report) -> str:
    rows = [
        [row.better, row.worse, row.pairs, _number(row.accuracy), _span(row.interval)]
        for row in report.tier_pairs
    ]
    headers = ["better", "worse", "pairs", "accuracy", _interval_header(report)]
    return format_table(headers, rows, "llrrl")


def _confusion(report: Report) -> str:
    named = zip(report.tier_names, report.confusion, strict=True)
    rows = [[name, *counts] for name, counts in named]
    headers = ["true \\ by quota", *report.tier_names]
    return format_table(headers, rows, "l" + "r" * len(report.tier_names))


def _remarks(report: Report) -> list[str]:
    interval = report.pairwise_accuracy_interval
    if interval is None:
        why = "too few groups in each tier" if report.rounds else "no bootstrap rounds"
        return [f"Intervals unknown: {why}."]
    remarks = []
    if report.n_groups < FEW_GROUPS:
        remarks.append(f"Only {report.n_groups} groups: take the intervals as rough.")
    if interval.low == interval.high:
        remarks.append(
            "The interval has no width because every resample gave the same value: "
            "that is no sign of certainty."
        )
    if interval.dropped:
        remarks.append(f"{interval.dropped} resamples held no pair of different tiers.")
    return remarks


def _row(name: str, value: float | None, interval: Interval | None) -> list[str]:
    return [name, _number(value), _span(interval)]


def _interval_header(report: Report) -> str:
    return f"{100 * report.confidence:g} % interval"


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"


def _span(interval: Interval | None) -> str:
    return "unknown" if interval is None else f"{interval.low:.4f} – {interval.high:.4f}"
