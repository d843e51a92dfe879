"""What ``mirip-fast cache`` says of stores, of what is wrong with them, and of what was done."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mirip_fast.evaluation.text_table import format_table, printable
from mirip_fast.files import format_bytes

if TYPE_CHECKING:
    from mirip_fast.features.maintenance import (
        MergedStore,
        StoreInfo,
        StorePlan,
        StoreReport,
    )

_MOST_ROWS = 50  # damaged rows shown of a store


def say_store(store: StoreInfo) -> None:
    """What one store holds."""
    made = store.fingerprint
    what = ", ".join(
        f"{made[key]}{unit}"
        for key, unit in (
            ("model_type", ""),
            ("image_size", " px"),
            ("resize", ""),
            ("precision", ""),
        )
        if key in made
    )
    click.echo(f"{printable(str(store.path))}  {format_bytes(store.bytes)}  {printable(what)}")
    click.echo(f"  last written {store.changed:%Y-%m-%d %H:%M}")
    if store.writing:
        click.echo(f"  being written to by {printable(store.writing)}")
    if store.problem:
        click.echo(f"  PROBLEM: {printable(store.problem)}")
    for d in store.datasets:
        grades = "graded" if d.graded else "no grades"
        trial = ", a trial (--limit)" if d.limit is not None else ""
        click.echo(
            f"  {printable(d.source)}: {d.images} images, {d.failed} failed, {grades}{trial}, "
            f"{printable(d.backbone)}, {d.embedded_at:%Y-%m-%d %H:%M}"
        )
    if store.unused_rows:
        click.echo(f"  {store.unused_rows} rows that no data set names (`mirip-fast cache prune`)")
    rows = [
        (s.name, " × ".join(map(str, s.shape)), s.dtype, s.rows, s.free, format_bytes(s.bytes))
        for s in store.series
    ]
    header = ("series", "row", "format", "rows", "free slots", "on disk")
    click.echo(format_table(header, rows, align="lllrrr") + "\n")


def say_report(report: StoreReport) -> None:
    """What was found wrong with one store, and how much was looked at."""
    for row in report.damaged[:_MOST_ROWS]:
        unknown = "an image that no data set names" if any(row.sha256) else "an empty slot"
        images = ", ".join(map(str, row.images)) or unknown
        click.echo(f"Damaged: {row.shard} row {row.slot}: {printable(images)}")
    if len(report.damaged) > _MOST_ROWS:
        click.echo(f"Damaged: … and {len(report.damaged) - _MOST_ROWS} more rows")
    for fault in report.faults:
        click.echo(f"Damaged: {printable(fault)}")
    for item in report.lacking:
        click.echo(
            f"Missing: {item.images} of {item.of} images of {printable(item.source)} have no features"
        )
    if report.killed:
        click.echo(
            f"{report.path}: a run was killed while it wrote; the next embed looks after that"
        )
    if report.writing:
        click.echo(f"{report.path}: being written to by {printable(report.writing)}")
    state = "whole" if report.whole else f"{len(report.damaged)} damaged"
    shards = counted(report.shards, "shard")
    click.echo(f"{report.path}: {counted(report.rows, 'row')} in {shards} checked, {state}")


def counted(count: int, thing: str) -> str:
    """``1 row``, ``2 rows``."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def say_plan(plan: StorePlan) -> None:
    """What pruning would do in one store."""
    click.echo(f"{plan.path}: {format_bytes(plan.frees)} to free")
    if plan.whole:
        click.echo("  no data set uses it: the whole store would go")
    for dataset in plan.trials:
        click.echo(f"  forget the trial of {printable(str(dataset.source))}")
    if plan.dropped:
        click.echo(f"  drop {plan.dropped} rows that no data set names, keep {plan.kept}")
    if plan.series:
        click.echo(f"  drop the series {', '.join(plan.series)}")
    if plan.leftovers:
        click.echo(f"  delete {len(plan.leftovers)} files that killed runs and repairs left")
    if plan.needs:
        click.echo(f"  needs {format_bytes(plan.needs)} of room while it works")
    if plan.young:
        click.echo(
            f"  kept: {plan.young} rows that no data set names, written lately (--older-than 0 drops them)"
        )
    if plan.kept_trials:
        click.echo(f"  kept: {plan.kept_trials} trial data sets (--trials forgets them)")


def say_merged(store: MergedStore) -> None:
    """What became of one store of another cache."""
    click.echo(f"{printable(str(store.source))} → {store.target}")
    shared = {overlap.series: overlap for overlap in store.overlaps}
    for name, added in store.added.items():
        overlap = shared[name]
        click.echo(f"  {name}: {added} rows added, {overlap.shared} were there")
        if overlap.differing:
            click.echo(
                f"    {overlap.differing} of these differ (cosine similarity down to "
                f"{overlap.worst:.4f}): the rows that were there stay"
            )
    for source in store.datasets:
        click.echo(f"  data set {printable(source)} came along")
    for source in store.twice:
        click.echo(
            f"    there is another data set of {printable(source)}: both are kept, the newer one is taken"
        )
    if store.spoiled:
        click.echo(f"  {store.spoiled} damaged rows were left out; embed computes them again")
    for problem in store.problems:
        click.echo(f"  left out: {printable(problem)}")
