"""``mirip-fast embed``: phase one."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mirip_fast.errors import ConfigError
from mirip_fast.progress import Bar
from mirip_fast.settings import Resolved
from mirip_fast.text import shown

from .interrupted import Interrupted, only_results_are_left
from .options import command_line, config_options
from .say import echo

if TYPE_CHECKING:
    from mirip_fast.features.engine import Speed
    from mirip_fast.features.phase_one import EmbedDone


@click.command("embed")
@click.argument("data", nargs=-1, required=True, metavar="DATA")
@click.option(
    "--limit", type=click.IntRange(min=1), help="Embed the first N images only, as a trial."
)
@click.option("--rehash", is_flag=True, help="Read every file again instead of trusting its time.")
@click.option("--strict", is_flag=True, help="Exit with status 1 if any image failed.")
@click.option(
    "--explain-speed", is_flag=True, help="Print how busy each stage was and what limits the speed."
)
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Compute in this process, or in Ray actors on the cluster that RAY_ADDRESS names (else here).",
)
@click.option(
    "--actors",
    type=click.IntRange(min=1),
    metavar="N",
    help="With --engine ray: processes that compute (default: one per GPU, without GPUs one per machine).",
)
@click.option(
    "--export",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the features to FILE as well, one plain HDF5 file for other programs.",
)
@config_options("embed", "data", "runtime")
def embed_command(
    resolved: Resolved,
    data: tuple[str, ...],
    limit: int | None,
    rehash: bool,
    strict: bool,
    explain_speed: bool,
    engine: str,
    actors: int | None,
    export: Path | None,
) -> int:
    """Compute the features of every image in DATA once, and keep them.

    DATA is a folder with images/ and metadata.csv or .xlsx, any folder of images, a folder per tier, a CSV
    file or Excel workbook, or tars: data.tar, 'data/*.tar', or several by name. All of these may lie at an
    address, such as s3://bucket/folder.

    Started by torchrun or srun, each process takes its share of the images; the same command alone, after
    them, finds all features there and writes the list of the images.
    """
    from mirip_fast.data.manifest import as_one
    from mirip_fast.features.maintenance import check_export, export_dataset
    from mirip_fast.features.outcomes import EmbedInterrupt, summarise
    from mirip_fast.features.phase_one import each_backbone, embed_data
    from mirip_fast.runtime import distributed

    passes = each_backbone(resolved.config)
    ranks = distributed()
    if engine == "ray" and ranks is not None:
        raise ConfigError("--engine ray starts its processes itself: leave torchrun or srun away.")
    if engine == "ray" and explain_speed:
        raise ConfigError("--explain-speed is only valid with --engine local.")
    if engine == "local" and actors is not None:
        raise ConfigError("--actors is only valid with --engine ray.")
    if export is not None:
        check_export(export)
        if len(passes) > 1:
            raise ConfigError(
                f"--export {export}: a file holds the features of one backbone: give one --backbone"
            )
        if ranks is not None:
            raise ConfigError(
                "--export writes the whole data set: leave it to the run alone, after torchrun or srun."
            )
    if ranks is not None and ranks.rank > 0:  # one of them tells how it goes
        package = logging.getLogger("mirip_fast")
        package.setLevel(max(package.level, logging.WARNING))
    names, failed = [config.embed.backbone for config in passes], False
    for number, config in enumerate(passes, 1):
        started = time.monotonic()
        try:
            with Bar(" images") as bar:
                done = embed_data(
                    as_one(data),
                    config,
                    limit=limit,
                    rehash=rehash and number == 1,
                    command=command_line(),
                    progress=bar.embedding,
                    engine=engine,
                    actors=actors,
                    backbones=names,
                )
        except EmbedInterrupt as stopped:
            share = "" if ranks is None else f"Rank {ranks.rank} of {ranks.size}: "
            told = _identity(summarise(stopped.images), started)
            raise Interrupted(f"{share}{told}. The same command goes on from there.") from None
        if number == len(passes) and export is None:
            only_results_are_left()
        _say(done, started)
        if explain_speed and done.speed is not None and (ranks is None or ranks.rank == 0):
            _explain(done.speed)
        counts = done.summary
        failed |= counts["failed"] > 0 and (strict or counts["failed"] == counts["inputs"])
    if export is not None and done.dataset is not None:
        # Last of all: where it fails, what is embedded has been told.
        ((images, *_), _), *_ = export_dataset(done.dataset, export, overwrite=True).values()
        only_results_are_left()
        echo(f"Exported: {export} ({images} images)")
    return 1 if failed else 0


def _say(done: EmbedDone, started: float) -> None:
    from mirip_fast.evaluation.agreement import agreement

    counts, ranks = done.summary, done.ranks
    echo((f"Rank {ranks.rank} of {ranks.size}: " if ranks else "") + _identity(counts, started))
    if done.dataset is None:
        if ranks is not None and ranks.rank == 0:
            echo(
                "When all ranks have ended, type the same without torchrun or srun: it finds their features "
                "and writes the list of the images that training reads."
            )
        return
    if counts["embedded"]:
        echo(f"{counts['embedded'] / done.compute_seconds:.1f} images/s")
    echo(f"Features: {done.store_path}")
    agreed = agreement(done.images)
    if agreed is not None:
        echo(agreed.to_line())
    if counts["failed"]:
        from mirip_fast.features.outcomes import failures_by_kind

        failures = done.images[done.images["status"] == "failed"]
        names = (shown(Path(file)) for file in failures["file"])
        for line in failures_by_kind(zip(names, failures["reason"], strict=True)):
            echo(f"Not embedded: {line}", err=True)
        echo(f"Failures: {done.dataset.failures_csv}")


def _identity(counts: dict[str, int], started: float) -> str:
    """Every image is accounted for, also in a run that was stopped."""
    left = f" + {counts['left']} left" if counts["left"] else ""
    seconds = time.monotonic() - started
    return (
        f"{counts['inputs']} images = {counts['embedded']} embedded + {counts['present']} already there + "
        f"{counts['duplicate']} duplicates + {counts['failed']} failed{left}, in {seconds:.1f} s"
    )


def _explain(speed: Speed) -> None:
    from mirip_fast.evaluation.text_table import format_table

    echo(
        format_table(("stage", "busy", "seconds", "done by"), speed.rows(), align="lrrl")
        + f"\n{speed.images} images in {speed.seconds:.1f} s. {speed.bottleneck()}"
    )
