"""``mirip-fast cache``: what is in the feature stores, whether it is whole, and looking after them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mirip_fast.evaluation.text_table import format_table, printable
from mirip_fast.files import format_bytes
from mirip_fast.progress import Bar
from mirip_fast.settings import Resolved
from mirip_fast.text import counted

from .options import command_line, config_options
from .say import echo

if TYPE_CHECKING:
    from mirip_fast.features.maintenance import StorePlan, StoreReport

_MOST_ROWS = 50  # damaged rows shown of a store

_PATH = click.Path(path_type=Path)


@click.group("cache")
def cache_command() -> None:
    """Look after the feature stores."""


@cache_command.command("info")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON, for programs.")
@config_options("embed.cache_dir")
def info_command(resolved: Resolved, as_json: bool) -> None:
    """List stores, series, rows, sizes, data sets, and who is writing."""
    from mirip_fast.features.maintenance import describe_cache

    path = Path(resolved.config.embed.cache_dir)
    stores = describe_cache(path)
    used, free = sum(store["bytes"] for store in stores), shutil.disk_usage(path).free
    if as_json:
        told = {"path": path, "stores": stores, "bytes": used, "free": free}
        click.echo(json.dumps(told, default=str, indent=2, ensure_ascii=False))
        return
    for store in stores:
        _say_store(store)
    echo(
        f"{counted(len(stores), 'store')}, {format_bytes(used)} on disk; "
        f"{format_bytes(free)} are free"
    )


@cache_command.command("verify")
@click.option(
    "--repair",
    is_flag=True,
    help="Mark damaged rows as missing and replace bad shards, so that embed computes exactly these.",
)
@config_options("embed.cache_dir")
def verify_command(resolved: Resolved, repair: bool) -> int:
    """Check every stored row against its checksum, and that no shard or image is missing.

    Exits with status 1 if anything is damaged or missing (with --repair: if anything is left to do by hand).
    """
    from mirip_fast.features.maintenance import repair_store, verify_cache, verify_store

    with Bar(" shards") as bar:
        reports = verify_cache(Path(resolved.config.embed.cache_dir), lambda _: bar.add())
    for report in reports:
        _say_report(report)
    todo = [report for report in reports if report.damaged or report.faults]
    if todo and not repair:
        echo("Put it right with: mirip-fast cache verify --repair")
        return 1
    left = 0
    for report in todo:
        for line in repair_store(report.path, command=command_line()):
            echo(f"Repaired: {printable(line)}")
        now = reports[reports.index(report)] = verify_store(report.path)
        for fault in now.faults:
            echo(f"Left: {printable(fault)}", err=True)
        left += len(now.faults) + len(now.damaged)
    for command in dict.fromkeys(item[-1] for r in reports for item in r.lacking):
        echo(f"Compute what is missing with: {printable(command)}")
    lacking = any(report.lacking for report in reports)
    return 1 if left or (lacking and not repair) else 0


@cache_command.command("prune")
@click.option("--dry-run", is_flag=True, help="Only say what would be freed.")
@click.option("--yes", "-y", is_flag=True, help="Do it without asking.")
@click.option(
    "--older-than",
    type=click.FloatRange(min=0),
    default=14.0,
    show_default=True,
    metavar="DAYS",
    help="Keep rows that no data set names if their shard was written to within so many days.",
)
@click.option("--trials", is_flag=True, help="Forget data sets that were embedded with --limit.")
@click.option(
    "--unused-series", is_flag=True, help="Drop views and token kinds that no data set lists."
)
@config_options("embed.cache_dir")
def prune_command(
    resolved: Resolved,
    dry_run: bool,
    yes: bool,
    older_than: float,
    trials: bool,
    unused_series: bool,
) -> int:
    """Free the space of what nobody uses; never a row that a data set names.

    Rows of images that no data set names (also those that were only ranked), stores without a data set, and
    what killed runs left. Says first what it would free, and asks.
    """
    from mirip_fast.features.maintenance import carry_out, plan_prune

    cache = Path(resolved.config.embed.cache_dir)
    plans = plan_prune(cache, older_than=older_than, trials=trials, series=unused_series)
    for plan in plans:
        _say_plan(plan)
    todo = [plan for plan in plans if not plan.empty]
    if not todo:
        echo("Nothing to free.")
        return 0
    echo(f"Together {format_bytes(sum(plan.frees for plan in todo))} would be free.")
    if dry_run:
        return 0
    if not yes and not click.confirm("Delete this?"):
        echo("Nothing was changed.")
        return 1
    freed = sum(carry_out(plan, command=command_line()) for plan in todo)
    echo(f"{format_bytes(freed)} freed.")
    return 0


@cache_command.command("export")
@click.argument("file", type=_PATH)
@click.option(
    "--data", "source", type=_PATH, help="The data set, as given to embed (default: the newest)."
)
@click.option("--overwrite", is_flag=True, help="Replace FILE if it is there.")
@config_options("embed.cache_dir")
def export_command(resolved: Resolved, file: Path, source: Path | None, overwrite: bool) -> None:
    """Write one data set's features to FILE, one plain HDF5 file for other programs.

    /features/cls, /features/patch, /features/views/…, /image_id, /path and, where there are grades, /tier.
    """
    from mirip_fast.features.datasets import newest_dataset
    from mirip_fast.features.maintenance import export_dataset

    dataset = newest_dataset(Path(resolved.config.embed.cache_dir), source)
    with Bar("B") as bar:
        shapes = export_dataset(dataset, file, overwrite=overwrite, progress=bar)
    for name, (shape, dtype) in shapes.items():
        echo(f"{name}  {' × '.join(map(str, shape))}  {dtype}")
    images = shape[0]
    if images < dataset.info["images"]:
        left_out = dataset.info["images"] - images
        echo(f"{left_out} images that failed are left out: {dataset.failures_csv}")
    echo(f"Written: {file} ({images} images, {format_bytes(file.stat().st_size)})")


@cache_command.command("merge")
@click.argument("others", metavar="OTHER…", nargs=-1, required=True, type=_PATH)
@click.option("--force", is_flag=True, help="Join caches whose shared images do not agree, too.")
@config_options("embed.cache_dir")
def merge_command(resolved: Resolved, others: tuple[Path, ...], force: bool) -> int:
    """Copy what OTHER caches have into this one: rows, and the data sets that name them.

    Features of the same fingerprint are joined; others come as stores of their own. OTHER stays as it is.
    """
    from mirip_fast.features.maintenance import merge_caches

    with Bar("B") as bar:
        done = merge_caches(
            Path(resolved.config.embed.cache_dir),
            others,
            force=force,
            command=command_line(),
            progress=bar.add,
        )
    for store in done:
        _say_merged(store)
    return 1 if any(store["problems"] or store["corrupt"] for store in done) else 0


def _say_store(store: dict[str, Any]) -> None:
    """What one store holds."""
    made = store["fingerprint"]
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
    echo(f"{printable(str(store['path']))}  {format_bytes(store['bytes'])}  {printable(what)}")
    echo(f"  last written {store['changed']:%Y-%m-%d %H:%M}")
    if store["writing"]:
        echo(f"  being written to by {printable(store['writing'])}")
    if store["problem"]:
        echo(f"  PROBLEM: {printable(store['problem'])}")
    for d in store["datasets"]:
        grades = "graded" if d["graded"] else "no grades"
        trial = ", a trial (--limit)" if d["limit"] is not None else ""
        echo(
            f"  {printable(d['source'])}: {d['images']} images, {d['failed']} failed, {grades}{trial}, "
            f"{printable(d['backbone'])}, {d['embedded_at']:%Y-%m-%d %H:%M}"
        )
    if store["unused_rows"]:
        echo(f"  {store['unused_rows']} rows that no data set names (`mirip-fast cache prune`)")
    rows = [
        (
            *(s["name"], " × ".join(map(str, s["shape"])), s["dtype"]),
            *(s["rows"], s["free"], format_bytes(s["bytes"])),
        )
        for s in store["series"]
    ]
    header = ("series", "row", "format", "rows", "free slots", "on disk")
    echo(format_table(header, rows, align="lllrrr") + "\n")


def _say_report(report: StoreReport) -> None:
    """What was found wrong with one store, and how much was looked at."""
    for shard, slot, sha256, files in report.damaged[:_MOST_ROWS]:
        unknown = "an image that no data set names" if any(sha256) else "an empty slot"
        images = ", ".join(map(str, files)) or unknown
        echo(f"Damaged: {shard} row {slot}: {printable(images)}")
    if len(report.damaged) > _MOST_ROWS:
        echo(f"Damaged: … and {len(report.damaged) - _MOST_ROWS} more rows")
    for fault in report.faults:
        echo(f"Damaged: {printable(fault)}")
    for source, lacking, of, _ in report.lacking:
        echo(f"Missing: {lacking} of {of} images of {printable(source)} have no features")
    if report.killed:
        echo(f"{report.path}: a run was killed while it wrote; the next embed looks after that")
    if report.writing:
        echo(f"{report.path}: being written to by {printable(report.writing)}")
    state = "whole" if report.whole else f"{len(report.damaged)} damaged"
    shards = counted(report.shards, "shard")
    echo(f"{report.path}: {counted(report.rows, 'row')} in {shards} checked, {state}")


def _say_plan(plan: StorePlan) -> None:
    """What pruning would do in one store."""
    echo(f"{plan.path}: {format_bytes(plan.frees)} to free")
    if plan.whole:
        echo("  no data set uses it: the whole store would go")
    for dataset in plan.trials:
        echo(f"  forget the trial of {printable(str(dataset.source))}")
    if plan.dropped:
        echo(f"  drop {plan.dropped} rows that no data set names, keep {plan.kept}")
    if plan.series:
        echo(f"  drop the series {', '.join(plan.series)}")
    if plan.leftovers:
        echo(f"  delete {len(plan.leftovers)} files that killed runs and repairs left")
    if plan.needs:
        echo(f"  needs {format_bytes(plan.needs)} of room while it works")
    if plan.young:
        echo(
            f"  kept: {plan.young} rows that no data set names, written lately (--older-than 0 drops them)"
        )
    if plan.kept_trials:
        echo(f"  kept: {plan.kept_trials} trial data sets (--trials forgets them)")


def _say_merged(store: dict[str, Any]) -> None:
    """What became of one store of another cache."""
    echo(f"{printable(str(store['source']))} → {store['target']}")
    for name, (added, shared, differing, worst) in store["series"].items():
        echo(f"  {name}: {added} rows added, {shared} were there")
        if differing:
            echo(
                f"    {differing} of these differ (cosine similarity down to "
                f"{worst:.4f}): the rows that were there stay"
            )
    for source in store["datasets"]:
        echo(f"  data set {printable(source)} came along")
    for source in store["twice"]:
        echo(
            f"    there is another data set of {printable(source)}: both are kept, the newer one is taken"
        )
    if store["corrupt"]:
        echo(f"  {store['corrupt']} damaged rows were left out; embed computes them again")
    for problem in store["problems"]:
        echo(f"  left out: {printable(problem)}")
