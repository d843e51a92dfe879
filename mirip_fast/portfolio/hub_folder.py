"""`export --hf`: a trained model as a folder to share: safetensors, settings, and a model card.

The folder is a model of its own: ``mirip-fast rank --checkpoint FOLDER`` scores with it. Nothing in it names
a path or a file of the machine that it was trained on.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from mirip_fast import __version__
from mirip_fast.config import EmbedConfig
from mirip_fast.files import move_files, scratch_folder, write_json, write_text
from mirip_fast.models.model_info import ModelInfo
from mirip_fast.models.numpy_head import NumpyHead
from mirip_fast.portfolio.export import refuse_existing
from mirip_fast.portfolio.model_card import model_card
from mirip_fast.ranking.head_files import save_ensemble, save_process
from mirip_fast.ranking.scorer import ScoreModel
from mirip_fast.training.run_folder import ENSEMBLE, PROCESS

_CARD = "README.md"
_SETTINGS = "config.json"


def write_hub_folder(model: ScoreModel, out: Path, *, overwrite: bool = False) -> list[Path]:
    """Write a model's heads as safetensors, with what they expect and a model card.

    Args:
        model: one head or an ensemble, in its run's folder.
        out: the folder; made if missing.
        overwrite: replace files of an earlier export.

    Returns:
        The files written.

    Raises:
        ConfigError: ``out`` is a file or has the files already.
        DataError: the run's files are damaged.
    """
    process = model.process
    heads = ENSEMBLE if process is None else PROCESS
    refuse_existing(out, (heads, _SETTINGS, _CARD), overwrite=overwrite)
    info = shareable(model.info)
    card = model_card(model, info.embed.backbone)
    with scratch_folder(out, "export") as folder:
        if process is None:
            save_ensemble(folder, model.members, info)
        else:
            save_process(folder, process, info)
        write_json(folder / _SETTINGS, _settings(model, info))
        write_text(folder / _CARD, card)
        return move_files(folder, out)


def shareable(info: ModelInfo) -> ModelInfo:
    """What a head expects, without the folders of this machine: a local backbone keeps its name alone."""
    backbone = info.embed.backbone
    local = Path(backbone).expanduser()
    if local.is_absolute() or backbone.startswith((".", "~")) or local.is_dir():
        backbone = local.name
    embed = dataclasses.replace(
        info.embed, backbone=backbone, cache_dir=EmbedConfig.cache_dir, workers=None
    )
    return dataclasses.replace(info, embed=embed)


def _settings(model: ScoreModel, info: ModelInfo) -> dict[str, Any]:
    head, widths = model.members[0].head, {}
    if isinstance(head, NumpyHead):
        widths = {
            "projector_hidden_dim": len(head.arrays["projector.layers.0.bias"]),
            "projector_output_dim": len(head.arrays["projector.layers.4.bias"]),
            "score_hidden_dim": len(head.arrays["score_head.layers.0.bias"]),
        }
    return {
        "library_name": "mirip-fast",
        "library_version": __version__,
        "members": len(model.members),
        **widths,
        **info.to_dict(),
    }
