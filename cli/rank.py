"""``mirip-fast rank``: a portfolio sorted by score."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mirip_fast.progress import Bar
from mirip_fast.settings import Resolved

from .options import (
    PATH,
    SCORES,
    WORKS,
    checkpoint_option,
    command_line,
    config_options,
    given_flags,
    moved_backbone,
)
from .say import echo

_WIDTH = 100
_FILES = re.compile(r"\.(xls[xm]?|html?|csv|json|docx?|pdf|od[st]|txt|zip)")
#: Options, the one that they need, and what to say where it is missing.
_NEEDS = (
    (("anchors",), "tiers", "--anchors says how many works --tiers compares with: give both"),
    (("explain",), "html", "--explain puts maps into the page: name it with --html FILE"),
    (("sheets_by",), "xlsx", "--sheets-by gives the workbook sheets: name it with --xlsx FILE"),
    (("sort_by", "sort_how", "dry_run"), "sort_into",
     "--sort-by, --sort-how and --dry-run say how --sort-into DIR sorts: give it, too"),
)  # fmt: skip

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mirip_fast.config import Config
    from mirip_fast.portfolio.rank import RankDone
    from mirip_fast.ranking.anchors import Anchors


@click.command("rank")
@click.argument("folder", nargs=-1, required=True, metavar="FOLDER")
@checkpoint_option
@click.option("--top", type=click.IntRange(min=1), help="Show the best N only; the files have all.")
@click.option(
    "--out", type=PATH, default=Path(), help="Folder for ranking.csv and .json (default: here)."
)
@click.option(
    "--html",
    type=PATH,
    metavar="FILE",
    help="Write a page to look at: the sorted works as pictures.",
)
@click.option(
    "--xlsx", type=PATH, metavar="FILE",
    help="Write an Excel workbook, too: small pictures, filters, colours of the tiers.",
)  # fmt: skip
@click.option(
    "--sheets-by", metavar="COLUMN",
    help="Give each value of a column (department, applicant) a sheet of its own in the workbook.",
)  # fmt: skip
@click.option(
    "--sort-into", type=PATH, metavar="DIR",
    help="Put the pictures into a folder per tier below DIR; `mirip-fast unsort DIR` undoes it.",
)  # fmt: skip
@click.option(
    "--sort-by", metavar="COLUMN",
    help="Column that names the folders of --sort-into; rank numbers the files in one (default: tier).",
)  # fmt: skip
@click.option(
    "--sort-how", type=click.Choice(("copy", "link", "move")),
    help="What --sort-into does with the pictures (default: copy).",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Only tell what --sort-into would do.")
@click.option(
    "--xmp", metavar="DIR|beside",
    help="Write XMP sidecars (stars and a keyword for the tier) into DIR, or beside the pictures.",
)  # fmt: skip
@click.option(
    "--explain", type=click.IntRange(min=1), metavar="N",
    help="Show in the page why the first N works have their scores; needs the backbone, and time, but for "
    "--map attention.",
)  # fmt: skip
@click.option(
    "--tiers",
    is_flag=True,
    help="Compare each work with graded works of every tier, too: win rates.",
)
@click.option(
    "--anchors", type=click.IntRange(min=1), metavar="N",
    help="Graded works of each tier to compare with (default: those kept with the model, else 10).",
)  # fmt: skip
@click.option("--rehash", is_flag=True, help="Read every file again instead of trusting its time.")
@click.option("--strict", is_flag=True, help="Exit with status 1 if any image failed.")
@click.option("--anyway", is_flag=True, help="Sort by a model that is no better than chance, too.")
@moved_backbone
@config_options(*SCORES, *WORKS, "explain", "evaluate.portfolio", "evaluate.within")
def rank_command(
    resolved: Resolved,
    folder: tuple[str, ...],
    checkpoint: Path | None,
    backbone: str | None,
    top: int | None,
    out: Path,
    html: Path | None,
    xlsx: Path | None,
    sheets_by: str | None,
    sort_into: Path | None,
    sort_by: str | None,
    sort_how: str | None,
    dry_run: bool,
    xmp: str | None,
    explain: int | None,
    tiers: bool,
    anchors: int | None,
    rehash: bool,
    strict: bool,
    anyway: bool,
) -> int:
    """Sort the images in FOLDER by score, best first.

    FOLDER may also be a CSV file or Excel workbook, tars ('x/*.tar', or several by name) or an address
    (s3://bucket/folder).

    0-100 is the percentile among graded works that the model had not trained on; the tier is the most
    probable one, with the probability of each tier beside it, learned from the same works.

    The 95 % interval of a rank says where graders may put a work: their scatter around what the model had
    said of graded works that it had not trained on. ~ marks works whose order against a neighbour is not
    settled.

    With --tiers, each work is compared with anchors: graded works of every tier that the model had not
    trained on. «>A %» is the share of tier A's anchors that a work beats. The tier stays the most probable
    one; «sure %» is its probability.

    With --by, applicants are ranked, each with their works; with --within, inside each value of that column.
    """
    from mirip_fast.data.manifest import as_one
    from mirip_fast.portfolio.rank import rank_folder
    from mirip_fast.ranking.anchors import find_anchors
    from mirip_fast.ranking.applicants import check_portfolio
    from mirip_fast.ranking.evaluate import pick_model

    sort_by = sort_by or _by_tier(sort_into, resolved.config)
    _check_options(out, html, xlsx, by=resolved.config.data.by)
    check_portfolio(resolved.config.evaluate.portfolio)
    source = as_one(folder)
    model = pick_model(checkpoint, Path(resolved.config.train.output_dir))
    if explain:
        from mirip_fast.portfolio.explain import check_map

        check_map(model, resolved.config, "rank --explain")
    found = find_anchors(model, Path(resolved.config.embed.cache_dir), anchors) if tiers else None
    with Bar(" images") as bar:
        done = rank_folder(
            model, source, resolved.config, anchors=found,
            backbone=backbone, rehash=rehash, anyway=anyway, command=command_line(), progress=bar.embedding,
        )  # fmt: skip
    files = done.write(out)
    _show(done, top, files)
    if html is not None:
        files += _write_page(html, explain or 0, done, resolved.config, backbone)
    if xlsx is not None:
        files.append(_write_workbook(xlsx, sheets_by, done, resolved.config))
    echo("Written: " + ", ".join(str(path) for path in files))
    if xmp is not None:
        _write_xmp(done, xmp)
    failed = bool(strict and done.failures)
    if sort_into is not None:
        failed |= _sort(done, sort_into, sort_by or "tier", sort_how or "copy", dry_run)
    from mirip_fast.features.outcomes import failures_by_kind
    from mirip_fast.text import address

    for line in failures_by_kind((address(Path(path)), why) for path, why in done.failures):
        echo(f"Not ranked: {line}", err=True)
    if done.failures:
        echo(f"Failures: {out / 'failures.csv'}", err=True)
    return 1 if failed else 0


def _by_tier(sort_into: Path | None, config: Config) -> str | None:
    """``--sort-into DIR --by tier`` says how pictures are sorted, as no applicant is called by a tier."""
    by = config.data.by
    if sort_into is None or by not in ("tier", "rank"):
        return None
    config.data.by = None
    return by


def _check_options(out: Path, html: Path | None, xlsx: Path | None, by: str | None) -> None:
    """Refuse what cannot be written, before anything is computed."""
    given = click.get_current_context().params
    for options, other, said in _NEEDS:
        if any(given[option] for option in options) and not given[other]:
            raise click.UsageError(said)
    if by is None and given_flags("evaluate_"):
        raise click.UsageError(
            "--portfolio and --within are about applicants: name their column with --by (a folder each: --by "
            "folder). Works alone, a sheet per department: --xlsx FILE --sheets-by department"
        )
    if html is not None:
        from mirip_fast.portfolio.page import check_page_path

        check_page_path(html)
    if xlsx is not None:
        from mirip_fast.portfolio.xlsx import check_workbook_path

        check_workbook_path(xlsx)
    if out.is_file() or (_FILES.fullmatch(out.suffix.lower()) and not out.is_dir()):
        flag = {".xlsx": "--xlsx", ".html": "--html", ".htm": "--html"}.get(out.suffix.lower())
        hint = f"; for that file give {flag} {out}" if flag else ""
        raise click.UsageError(
            f"--out {out}: the folder for ranking.csv and ranking.json is expected, not a file{hint}"
        )
    if by is not None:
        from mirip_fast.portfolio.ranking import check_applicants_path

        check_applicants_path(out)


def _write_workbook(path: Path, by: str | None, done: RankDone, config: Config) -> Path:
    from mirip_fast.portfolio.xlsx import write_workbook

    pictures = [done.root / file for file in done.ranking["file"]]
    with Bar(" pictures") as bar:
        return write_workbook(
            path, done.ranking, pictures, config,
            sheets_by=by, applicants=done.applicants, within=done.portfolio.get("within"), progress=bar,
        )  # fmt: skip


def _write_xmp(done: RankDone, where: str) -> None:
    from mirip_fast.portfolio.xmp import write_sidecars
    from mirip_fast.text import counted

    written, kept = write_sidecars(done, where)
    echo(f"XMP sidecars: {written:,} written ({where})")
    if kept:
        echo(
            f"{counted(len(kept), 'sidecar')} of another program left as before (first: {kept[0]})",
            err=True,
        )


def _sort(done: RankDone, into: Path, by: str, how: str, dry_run: bool) -> bool:
    """Sort the pictures into folders; whether some could not be."""
    from mirip_fast.portfolio.sort_into import plan, sort_files
    from mirip_fast.text import counted

    works = plan(done, into, by, how)
    left = works[~works["there"]]
    acts = list(zip(left["file"], left["target"], strict=True))
    verb = {"copy": "copied", "link": "linked", "move": "moved"}[how]
    counts = works["folder"].value_counts(sort=False)
    folders = ", ".join(f"{folder or 'in it'} {n:,}" for folder, n in counts.items())
    there = f"; {len(works) - len(left):,} there already" if len(left) < len(works) else ""
    if dry_run:
        echo(
            f"{counted(len(acts), 'work')} would be {verb} into {into} ({folders}){there}. Nothing was "
            "written there"
        )
        for file, target in acts[:10]:
            echo(f"  {file} -> {target}")
        return False
    echo(f"To undo the sorting, also if it is cut off: mirip-fast unsort {shlex.quote(str(into))}")
    with Bar(" files") as bar:
        failures = sort_files(into, how, acts, bar)
    echo(
        f"{counted(len(acts) - len(failures), 'work')} sorted into {into} ({verb}: {folders}){there}"
    )
    for file, why in failures[:10]:
        echo(f"Not sorted: {file}: {why}", err=True)
    if len(failures) > 10:
        echo(f"… and {len(failures) - 10:,} more could not be sorted", err=True)
    return bool(failures)


def _write_page(
    html: Path, explain: int, done: RankDone, config: Config, backbone: str | None
) -> list[Path]:
    from mirip_fast.portfolio.page import explain_works, write_page

    reasons = {}
    if explain:
        first = [done.root / file for file in done.ranking["file"][:explain]]
        with Bar(" passes") as bar:
            reasons = explain_works(
                done.model, first, config, backbone=backbone, command=command_line(), progress=bar
            )
    with Bar(" pictures") as bar:
        return write_page(html, done, config, reasons=reasons, progress=bar)


def _show(done: RankDone, top: int | None, files: Sequence[Path]) -> None:
    """Print the first works, or applicants, and what their order rests on."""
    from mirip_fast.portfolio.ranking import applicants_text, ranking_table

    people = done.applicants
    if people is None:
        echo(ranking_table(done.ranking[:top]))
        shown, where = done.ranking, files[0]
    else:
        ranks = dict(zip(done.ranking["file"], done.ranking["rank"], strict=True))
        echo(applicants_text(people[:top], ranks, _WIDTH))
        shown, where = people, files[2]
    if top is not None and top < len(shown):
        echo(f"… and {len(shown) - top} more in {where}")
    for line in () if people is None else (done.portfolio["why"], *done.portfolio["remarks"]):
        echo(line, wrap=True)
    _tell_what_it_rests_on(done)


def _tell_what_it_rests_on(done: RankDone) -> None:
    known = done.calibration
    lines = known.warnings()
    if known.unknown is not None:
        lines = [f"0-100 and tiers {known.unknown}"]
    else:
        what = "0-100 and tiers" if known.tier_names else "0-100"
        lines.insert(0, f"{what}: from {known.images} held-out works ({known.source}).")
    if done.anchors is not None:
        lines += _about_anchors(done.anchors)
    if done.seen:
        lines.append(
            f"{done.seen} of {len(done.ranking)} works are among those that the model was made with: "
            "what is said of them is too sure."
        )
    if done.no_intervals is not None:
        lines.append(f"95 % intervals of the ranks {done.no_intervals}")
    else:
        unsettled = int((~done.ranking["settled"]).sum())
        process = done.model.process
        rests = (
            "where more judged pairs of the same kind would put a work: how far those that were learned from "
            "leave it open (Gaussian process); not another judge"
            if process is not None and process.pairs_alone
            else "where the graders may put a work: their scatter around what the model had said of graded "
            "works that it had not trained on"
        )
        lines.append(
            f"95 %: {rests}. ~ marks works whose order against a neighbour is not "
            f"settled: {unsettled} of {len(done.ranking)}."
        )
    for line in lines:
        echo(line, wrap=True)


def _about_anchors(anchors: Anchors) -> list[str]:
    from mirip_fast.ranking.anchors import anchor_counts, anchor_remarks

    counts = ", ".join(f"{name} {count}" for name, count in anchor_counts(anchors).items())
    return [
        f"Win rates: compared with {counts} held-out works ({anchors['source']}).",
        *anchor_remarks(anchors),
    ]
