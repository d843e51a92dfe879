"""A page that sorts pictures by a trained model: a Space of the Hugging Face Hub, or a page of your own.

The model is the one named in MODEL: ``user/name`` of the Hub, or a folder of ``mirip-fast export --hf``.
Pictures are read in processes of their own, scored, and thrown away with what the backbone saw in them.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pandas as pd

import mirip_fast as mf

#: Columns of a ranking that are shown, as far as the model tells them.
SHOWN = ("rank", "file", "score_100", "tier", "rank_low", "rank_high", "score")
MOST = 50  # pictures at a time

NOTE = """
Scores repeat the taste of the people whose grades the model learned from. They do not measure quality,
and must not decide alone about a person. `rank_low` and `rank_high` bound where the graders may put a
work; small differences mean little.
"""


@cache
def model() -> mf.Model:
    """The model named in MODEL, loaded once."""
    return mf.load(os.environ.get("MODEL", "model"))


def rank(files: Sequence[str] | None) -> tuple[pd.DataFrame, list[tuple[str, str]], str]:
    """Sort pictures.

    Args:
        files: paths of the pictures, as the page hands them over.

    Returns:
        The ranking, best first; the pictures in its order with what stands below each; what could not be
        read, and what to know of the numbers.
    """
    if not files:
        return pd.DataFrame(columns=[*SHOWN]), [], "Choose some pictures."
    if len(files) > MOST:
        return pd.DataFrame(columns=[*SHOWN]), [], f"At most {MOST} pictures at a time."
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "pictures")
        folder.mkdir()
        given = {}
        for number, file in enumerate(files):  # two pictures may have the same name
            name = f"{number + 1:02d} {Path(file).name}"
            given[name] = file
            shutil.copyfile(file, folder / name)
        try:
            ranking = model().rank(folder, cache_dir=Path(scratch, "cache"))
        except mf.errors.MiripError as error:
            return pd.DataFrame(columns=[*SHOWN]), [], str(error)
    told = [f"{name} cannot be read: {why}" for name, why in ranking.attrs["failures"]]
    told += ranking.attrs["warnings"]
    shown = ranking[[column for column in SHOWN if column in ranking]].round(2)
    pictures = [
        (given[name], f"{place}. {name}")
        for place, name in zip(ranking["rank"], ranking["file"], strict=True)
    ]
    return shown, pictures, "\n".join(told)


def main() -> None:
    """Serve the page."""
    import gradio as gr

    with gr.Blocks(title="Sorted by a grader's taste") as page:
        gr.Markdown(f"# Sorted by a grader's taste\n\n{NOTE}")
        files = gr.File(file_count="multiple", file_types=["image"], label="Pictures")
        button = gr.Button("Sort", variant="primary")
        table = gr.Dataframe(label="Ranking")
        gallery = gr.Gallery(label="Best first", columns=5)
        remarks = gr.Textbox(label="Remarks")
        button.click(rank, files, [table, gallery, remarks])
    page.launch()


if __name__ == "__main__":
    main()
