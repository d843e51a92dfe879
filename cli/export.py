"""``mirip-fast export``: a trained model for other programs."""

from __future__ import annotations

import math
from pathlib import Path

import click

from mirip_fast.settings import Resolved

from .options import FOLDER, PATH, checkpoint_option, config_options, moved_backbone
from .say import echo


@click.command("export")
@checkpoint_option
@click.option(
    "--out",
    type=FOLDER,
    help="Folder for the ONNX files (default: export, unless --hf is given).",
)
@click.option("--hf", type=PATH, help="Write a folder to share: safetensors and a model card.")
@click.option("--head-only", is_flag=True, help="Leave the backbone out of the ONNX files.")
@click.option(
    "--images", type=PATH, help="Folder of images to compare with torch on (default: the run's)."
)
@click.option("--overwrite", is_flag=True, help="Replace the files of an earlier export.")
@moved_backbone
@config_options("export", "train.output_dir", "embed.cache_dir", "embed.embed_batch_size")
def export_command(
    resolved: Resolved,
    checkpoint: Path | None,
    out: Path | None,
    hf: Path | None,
    head_only: bool,
    images: Path | None,
    overwrite: bool,
    backbone: str | None,
) -> None:
    """Write a trained model as ONNX files (head.onnx and model.onnx), or as a folder to share.

    ONNX files are compared with torch on real images first, and only kept if they agree. The members of
    an ensemble become one graph.

    Either folder holds the model itself, too, with its calibration and anchors: `rank
    --checkpoint FOLDER`, with --tiers or without, gives the table that the run gives. No names and no
    pictures of graded works are in it.
    """
    from mirip_fast.evaluation.text_table import format_table
    from mirip_fast.files import format_bytes
    from mirip_fast.ranking.evaluate import pick_model

    model = pick_model(checkpoint, Path(resolved.config.train.output_dir))
    files: list[Path] = []
    if hf is not None:
        from mirip_fast.portfolio.hub_folder import write_hub_folder

        cache_dir = Path(resolved.config.embed.cache_dir)
        files += write_hub_folder(model, hf, cache_dir, overwrite=overwrite)
    if out is not None or hf is None:
        from mirip_fast.portfolio.export import export_onnx

        written, compared = export_onnx(
            model, out or Path("export"), resolved.config,
            head_only=head_only, backbone=backbone, images=images, overwrite=overwrite,
            with_model=hf is None or out is None or out.resolve() != hf.resolve(),
        )  # fmt: skip
        files += written
        rows = [
            (*row, f"{difference:.2g}", "–" if math.isnan(tau) else f"{tau:.4f}")
            for *row, difference, tau in compared.itertuples(index=False)
        ]
        names = ("file", "compared with", "rows", "largest difference", "Kendall tau")
        echo(format_table(names, rows, align="llrrr"))
    for path in files:
        echo(f"Written: {path} ({format_bytes(path.stat().st_size)})")
