"""A report as aligned plain text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mirip_fast.evaluation.intervals import FEW_GROUPS, Interval
from mirip_fast.evaluation.text_table import format_table

if TYPE_CHECKING:
    from mirip_fast.evaluation.report import Report
    from mirip_fast.evaluation.report_parts import Mistake, Probabilities

_SHOWN_VALUES = 12  # more within values than this are in the JSON file only


def report_text(report: Report, mistakes: int) -> str:
    """Figures, tier pairs, confusion matrix, the ``mistakes`` worst mistakes and remarks."""
    counts = zip(report.tier_names, report.tier_counts, strict=True)
    listed = ", ".join(f"{name} {count}" for name, count in counts) or "no tiers"
    head = (
        f"{report.n_images} images ({listed}) in {report.n_groups} groups, {report.n_pairs} pairs of "
        f"different {'tiers' if report.tier_names else 'tier_score'}"
    )
    parts = [head, _figures(report)]
    if report.tier_names:
        parts.append(_tier_pairs(report))
    if 1 < len(report.within_values) <= _SHOWN_VALUES:
        parts.append(_within_values(report))
    if report.tier_names:
        parts.append(_confusion(report))
    if report.probabilities is not None:
        parts.append(_probabilities(report, report.probabilities))
    worst = report.worst_mistakes(mistakes)
    if worst:
        parts.append(
            "Worst mistakes\n" + mistake_table(worst, "tier" if report.tier_names else "tier_score")
        )
    return "\n\n".join([*parts, *_remarks(report)])


def mistake_table(mistakes: Sequence[Mistake], grade: str = "tier") -> str:
    """One line per wrongly ordered pair: the image of the better tier, that of the worse, the gap."""
    headers = ["should be higher", grade, "score", "scores higher", grade, "score", "gap"]
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
    ]
    if report.tier_names:
        rows.append(
            _row("  mean over tier pairs", report.macro_accuracy, report.macro_accuracy_interval)
        )
    if report.judged.within is not None:
        name = f"  inside the same within value ({report.within_pairs} pairs)"
        rows.append(_row(name, report.within_accuracy, report.within_accuracy_interval))
        name = f"  mean over within values ({len(report.within_values)} values)"
        macro, interval = report.within_macro_accuracy, report.within_macro_accuracy_interval
        rows.append(_row(name, macro, interval))
    rows.append(_row("Kendall tau-b", report.kendall_tau_b, report.kendall_tau_b_interval))
    if report.spearman_images:
        name = f"Spearman with tier_score ({report.spearman_images} images)"
        rows.append(_row(name, report.spearman, report.spearman_interval))
    rows += [_row(f"NDCG@{k}", value, report.ndcg_intervals[k]) for k, value in report.ndcg.items()]
    judged = [("tiers by quota", report.by_quota)]
    if report.probabilities is not None:
        judged.insert(0, ("most probable tier", report.probabilities.tiers))
        pairs = report.probabilities.pairs
        if pairs is not None:
            rows.append(_row("calibration error of pair probabilities", pairs.ece, pairs.interval))
    for name, tiers in judged:
        if tiers is not None:
            rows.append(_row(f"tier accuracy ({name})", tiers.accuracy, tiers.accuracy_interval))
            rows.append(_row(f"macro F1 ({name})", tiers.macro_f1, tiers.macro_f1_interval))
    return format_table(["measure", "value", _interval_header(report)], rows, "lrl")


def _tier_pairs(report: Report) -> str:
    rows = [
        [row.better, row.worse, row.pairs, _number(row.accuracy), _span(row.interval)]
        for row in report.tier_pairs
    ]
    headers = ["better", "worse", "pairs", "accuracy", _interval_header(report)]
    return format_table(headers, rows, "llrrl")


def _within_values(report: Report) -> str:
    rows = [
        [row.value, row.pairs, _number(row.accuracy), _span(row.interval)]
        for row in report.within_values
    ]
    return format_table(["within", "pairs", "accuracy", _interval_header(report)], rows, "lrrl")


def _confusion(report: Report) -> str:
    corner, confusion = "true \\ by quota", report.confusion
    if report.probabilities is not None and report.probabilities.tiers is not None:
        corner, confusion = "true \\ most probable", report.probabilities.tiers.confusion
    rows = [[name, *counts] for name, counts in zip(report.tier_names, confusion, strict=True)]
    return format_table([corner, *report.tier_names], rows, "l" + "r" * len(report.tier_names))


def _probabilities(report: Report, known: Probabilities) -> str:
    lines = []
    if known.pairs is not None:
        rows = [
            [
                f"{part.low:.1f} – {part.high:.1f}", part.pairs,
                *("" if x is None else f"{x:.3f}" for x in (part.said, part.came_true)),
                _span(part.interval) if part.pairs else "",
            ]
            for part in known.pairs.bins
        ]  # fmt: skip
        headers = ["P(higher score wins)", "pairs", "said", "came true", _interval_header(report)]
        lines.append(format_table(headers, rows, "lrrrl"))
    lines.append(f"Probabilities were learned from {known.images} held-out works ({known.source}).")
    return "\n".join([*lines, *known.remarks])


def _remarks(report: Report) -> list[str]:
    interval = report.pairwise_accuracy_interval
    remarks = []
    if report.seen:
        remarks.append(
            f"{report.seen} of the {report.n_images} images are among those that the model was made with: "
            "the figures are too good."
        )
    if report.probabilities_unknown is not None:
        remarks.append(f"Probabilities {report.probabilities_unknown}.")
    if interval is None:
        why = "too few groups in each tier" if report.rounds else "no bootstrap rounds"
        return [*remarks, f"Intervals unknown: {why}."]
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
