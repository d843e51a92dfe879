"""``mirip-fast similar``: works that look like an image."""

from __future__ import annotations

from pathlib import Path

import click

from mirip_fast.progress import Bar
from mirip_fast.settings import Resolved

from .options import FILE, PATH, command_line, config_options, moved_backbone
from .say import echo


@click.command("similar")
@click.argument("image", type=PATH)
@click.option(
    "--top", type=click.IntRange(min=1), default=10, show_default=True, help="Works shown."
)
@click.option(
    "--data", type=PATH, help="Search this embedded data set only (default: all of the cache)."
)
@click.option(
    "--cache",
    "caches",
    type=PATH,
    multiple=True,
    help="Search another cache folder, too; repeatable.",
)
@click.option("--out", type=FILE, help="Write the result to this CSV file, too.")
@moved_backbone
@config_options("embed.cache_dir", "embed.max_megapixels", "runtime")
def similar_command(
    resolved: Resolved,
    image: Path,
    top: int,
    data: Path | None,
    caches: tuple[Path, ...],
    out: Path | None,
    backbone: str | None,
) -> None:
    """Show the embedded works that look most like IMAGE, by the cosine of their CLS features.

    IMAGE is embedded first if it is not in the cache. Without --data the works of all data sets that were
    embedded in the same way as the newest one are searched.
    """
    from mirip_fast.evaluation.text_table import format_table
    from mirip_fast.portfolio.similar import find_similar, write_matches

    with Bar(" images") as bar:
        matches = find_similar(
            image, resolved.config, top,
            data=data, caches=caches, backbone=backbone, command=command_line(), progress=bar.embedding,
        )  # fmt: skip
    if matches.empty:
        echo("There is no other work in the cache.")
    else:
        rows = [
            (
                i,
                f"{row['cosine']:.4f}",
                f"{row['distance']:.4f}",
                row["tier"] or "",
                _file(row["file"], row["exact"]),
            )
            for i, row in enumerate(matches.to_dict("records"), start=1)
        ]
        echo(format_table(("", "cosine", "distance", "tier", "file"), rows, align="rrrll"))
    if out is not None:
        write_matches(out, matches)
        echo(f"Written: {out}")


def _file(path: Path, same_bytes: bool) -> str:
    from mirip_fast.data.sources import is_gone
    from mirip_fast.text import shown

    remark = "  (the same file)" if same_bytes else ""
    return shown(path) + remark + ("  (gone)" if is_gone(path) else "")
