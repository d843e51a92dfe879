"""``mirip-fast explain``: what in a picture raises and what lowers its score."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mirip_fast.language import tr
from mirip_fast.progress import Bar
from mirip_fast.settings import Resolved

from .options import FOLDER, PATH, checkpoint_option, command_line, config_options, moved_backbone
from .say import echo

if TYPE_CHECKING:
    from mirip_fast.portfolio.explain import Explained

_EVEN = 0.005  # of an even share; a head whose queries hardly learned looks everywhere


@click.command("explain")
@click.argument("images", type=PATH, nargs=-1, required=True, metavar="IMAGE...")
@checkpoint_option
@click.option("--out", type=FOLDER, default=Path(), help="Folder for the pictures (default: here).")
@moved_backbone
@config_options(
    "explain",
    "train.output_dir",
    "embed.cache_dir",
    "embed.embed_batch_size",
    "embed.max_megapixels",
    "runtime",
)
def explain_command(
    resolved: Resolved,
    images: tuple[Path, ...],
    checkpoint: Path | None,
    out: Path,
    backbone: str | None,
) -> int:
    """Show which regions of each IMAGE raise its score and which lower it.

    A region counts by how much the score changes when it is blurred away. Writes NAME.explain.png: the
    map over the picture, and the graded works that it looks like. Needs the backbone.

    With --map attention, the map shows instead where a head of `train --readout attention` looks. It is at
    hand at once, but says less: what is looked at may raise the score, lower it or leave it as it is.
    """
    from tqdm import tqdm

    from mirip_fast.portfolio.explain import Explainer, check_paths, explain_to_files
    from mirip_fast.ranking.evaluate import pick_model

    paths = check_paths(images, out)
    model = pick_model(checkpoint, Path(resolved.config.train.output_dir))
    explainer = Explainer(model, resolved.config, backbone=backbone, command=command_line())
    failures: list[tuple[Path, str]] = []
    with Bar(" passes", explainer.passes(len(paths))) as bar:
        for explained, target in explain_to_files(
            explainer, paths, out, progress=bar.add, failures=failures
        ):
            tqdm.write(_told(explained, target))  # above the bar
    if resolved.config.explain.map == "attention":
        echo(
            "Where the head looks is not why a picture has its score: what is looked at may raise it, lower "
            "it or leave it as it is. Without --map attention, that is measured."
        )
    for path, reason in failures:
        echo(f"Not explained: {path}: {reason}", err=True)
    return 1 if failures else 0


def _told(explained: Explained, target: Path) -> str:
    from mirip_fast.portfolio.explain import where
    from mirip_fast.text import shown

    tier = f", tier {explained.tier}" if explained.tier else ""
    lines = [f"{explained.path}: score {explained.score:.4f}{tier}"]
    values = explained.map.to_numpy()
    if explained.attention:
        found = where(values, raises=True)
        seen = "  It looks at all parts nearly alike"
        if found and found[1] >= _EVEN:
            seen = f"  Looked at most: {found[0]} ({1 + found[1]:.2f} times an even share)"
        lines.append(seen)
    for raises, told in (
        (True, "  Raised most by: {} ({:+.3f})"),
        (False, "  Lowered most by: {} ({:+.3f})"),
    ):
        found = where(values, raises=raises)
        if found and not explained.attention:
            lines.append(told.format(*found))
    if explained.tier:
        lines.append("  Because it looks like these:")
        lines += [
            f"    {like['tier']}  cosine {like['cosine']:.3f}  {shown(like['file'])}"
            for like in explained.likes.to_dict("records")
        ]
    return tr("\n".join([*lines, f"  Written: {target}"]))
