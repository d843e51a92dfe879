"""``mirip-fast audit``: what is wrong with the data."""

from __future__ import annotations

from pathlib import Path

import click

from mirip_fast.settings import Resolved

from .options import FOLDER, PATH, config_options
from .say import echo


@click.command("audit")
@click.argument("data", type=PATH, required=False)
@click.option(
    "--run",
    type=PATH,
    help="Run whose splits and held-out scores are looked at (default: the newest of the data).",
)
@click.option(
    "--pairs",
    type=PATH,
    multiple=True,
    help="CSV file of judged pairs, to look for preference cycles in; may be given several times.",
)
@click.option(
    "--top", type=click.IntRange(min=0), default=5, show_default=True,
    help="Findings shown of each kind; the file has all.",
)  # fmt: skip
@click.option(
    "--out",
    type=FOLDER,
    default=Path(),
    help="Folder for audit.csv and near_groups.csv.",
)
@config_options(
    "audit", "embed.cache_dir", "train.output_dir", "train.pairs_zero", "data.separator"
)
def audit_command(
    resolved: Resolved,
    data: Path | None,
    run: Path | None,
    pairs: tuple[Path, ...],
    top: int,
    out: Path,
) -> int:
    """Look for what makes scores untrue, in embedded DATA (default: the newest with grades).

    Copies and near duplicates across splits and in different tiers, groups that straddle splits, images
    whose held-out score contradicts their tier, preference cycles, files that are unreadable, gone or
    changed. Writes audit.csv (one finding per line) and near_groups.csv (for --near-groups of split and
    train). Ends with status 1 where it finds what --fail-on names: by default errors, which are copies,
    near duplicates and groups across splits, and equal files with different tiers.
    """
    from mirip_fast.ranking.audit import audit, audit_text, verdict

    done = audit(resolved.config, data=data, run=run, pairs=pairs, out=out)
    echo(audit_text(done, top))
    echo("\nWritten: " + ", ".join(str(path) for path in done.files))
    echo(verdict(done))
    return 1 if done.failed else 0
