"""A trained model in a folder to share: `export --hf` adds settings and a model card, `export` ONNX graphs.

The folder is a model of its own: ``mirip-fast rank --checkpoint FOLDER`` gives the table that the run gives,
with percentiles, tiers, intervals and win rates. Nothing in it names a path, a file or a work of the data
that it was trained on.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mirip_fast import __version__
from mirip_fast.config import EmbedConfig
from mirip_fast.errors import ConfigError, DataError, StoreError
from mirip_fast.files import (
    LIST_FILE,
    list_files,
    move_files,
    read_json,
    scratch_folder,
    write_csv,
    write_json,
    write_text,
)
from mirip_fast.models.model_info import ModelInfo
from mirip_fast.models.numpy_head import NumpyHead
from mirip_fast.portfolio.model_card import model_card
from mirip_fast.ranking.anchors import ANCHORS_FILE, find_anchors, save_anchors
from mirip_fast.ranking.head_files import (
    BOOTSTRAP_FILE,
    load_bootstrap,
    save_bootstrap,
    save_ensemble,
    save_process,
)
from mirip_fast.ranking.references import (
    CALIBRATION_FILE,
    MADE_WITH_FILE,
    learned_from,
    load_calibration,
    save_calibration,
)
from mirip_fast.ranking.scorer import ScoreModel
from mirip_fast.training.run_folder import ENSEMBLE, PROCESS, RUN_FILE

log = logging.getLogger(__name__)

_CARD = "README.md"
_SETTINGS = "config.json"
#: What a shared model may have: of an earlier export, none of it may stay beside another model.
_MODEL_FILES = (
    ENSEMBLE, PROCESS, CALIBRATION_FILE, ANCHORS_FILE, BOOTSTRAP_FILE, MADE_WITH_FILE, LIST_FILE,
)  # fmt: skip
#: What a backbone of a run consists of; its weights are found by their ending.
_BACKBONE_FILES = ("config.json", "preprocessor_config.json")


def write_hub_folder(
    model: ScoreModel, out: Path, cache_dir: Path, *, overwrite: bool = False
) -> list[Path]:
    """Write a model as safetensors, with what gives its scores a meaning, its settings and a model card.

    Args:
        model: heads or a Gaussian process, in its run's folder.
        out: the folder; made if missing.
        cache_dir: folder of the stores, for anchors that are still to be chosen.
        overwrite: replace files of an earlier export.

    Returns:
        The files written.

    Raises:
        ConfigError: ``out`` is a file or a run, or has the files already.
        DataError: the run's files are damaged.
    """
    own = model_files(model)
    refuse_existing(out, (*own, _SETTINGS, _CARD), overwrite=overwrite)
    info = shareable(model.info)
    with scratch_folder(out, "export") as folder:
        known = write_model(model, folder, cache_dir)
        backbones = ", ".join(each.embed.backbone for each in info.backbones)
        write_json(folder / _SETTINGS, _settings(model, info))
        write_text(folder / _CARD, model_card(model, backbones, known))
        list_files(folder)
        return put_in_place(folder, out, own)


def model_files(model: ScoreModel) -> list[str]:
    """Names of everything that :func:`write_model` may write for a model."""
    return [*_MODEL_FILES, *sorted({path.parts[0] for path in _own_backbones(model).values()})]


def write_model(model: ScoreModel, folder: Path, cache_dir: Path) -> list[str]:
    """Write a model, with its own fine-tuned backbones, and what `rank` tells with its help.

    Those are calibration, bootstrap heads, anchors, and the contents of the works that it was made with. What
    the run does not have, and its anchors where none can be chosen, is left out, which is told.

    Returns:
        What was written besides the model, in words.

    Raises:
        DataError, CheckpointError: the run's files are damaged.
    """
    info, process = shareable(model.info), model.process
    if process is not None:
        path = save_process(folder, process, info)
    else:
        members = [
            dataclasses.replace(m, info=None if m.info is None else shareable(m.info))
            for m in model.members
        ]
        path = save_ensemble(folder, members, info, model.errors)
    for source, place in _own_backbones(model).items():
        _copy_backbone(source, folder / place)
    known = []
    calibration = load_calibration(model)
    if calibration.unknown is None:
        what = "percentiles and tiers" if calibration.ordinal else "percentiles"
        known.append(f"{what} learned from {calibration.images} held-out works")
    if calibration.source != "none":
        save_calibration(path, calibration)
    else:
        log.info("Probabilities do not go along: %s", calibration.unknown)
    heads = load_bootstrap(model.checkpoint)
    if heads is not None:
        save_bootstrap(path, heads, info)
        known.append(f"intervals of ranks by {len(heads)} bootstrap heads")
    elif model.knows_grades:
        known.append("intervals of ranks")
    try:
        anchors = find_anchors(model, cache_dir)
        save_anchors(path, anchors.shareable())
        known.append(f"win rates against {len(anchors.works)} anchors (`rank --tiers`)")
    except (DataError, StoreError) as error:
        log.info("No anchors for win rates go along: %s", error)
    made_with = sorted(learned_from(model))
    if made_with:
        rows = [{"sha256": sha} for sha in made_with]
        write_csv(folder / MADE_WITH_FILE, ("sha256",), rows)
    return known


def refuse_existing(out: Path, names: Sequence[str], *, overwrite: bool) -> None:
    """Make sure that nothing is in the way.

    Raises:
        ConfigError: ``out`` is a file or a run's folder, or has one of the files.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; give a folder")
    if (out / RUN_FILE).exists():
        raise ConfigError(
            f"{out} is a run's folder, whose files would be replaced; give another folder"
        )
    there = [name for name in names if (out / name).exists()]
    if there and not overwrite:
        raise ConfigError(
            f"{out} already has {', '.join(there)}; give another folder, or --overwrite"
        )


def put_in_place(folder: Path, out: Path, own: Sequence[str]) -> list[Path]:
    """Put what is in ``folder`` in place in ``out``, after removing ``own`` there, of an earlier export.

    Returns:
        The new files.
    """
    for name in sorted(own, key=LIST_FILE.__ne__):  # the list first: a kill leaves no false one
        if (out / name).is_dir():
            shutil.rmtree(out / name)
        else:
            (out / name).unlink(missing_ok=True)
    moved = move_files(folder, out)
    files = [path for top in moved for path in (sorted(top.rglob("*")) if top.is_dir() else [top])]
    return [path for path in files if path.is_file()]


def shareable(info: ModelInfo) -> ModelInfo:
    """What a head expects, without the folders of this machine: a local backbone keeps its name alone."""
    backbone = info.embed.backbone
    local = Path(backbone).expanduser()
    if local.is_absolute() or backbone.startswith((".", "~")) or local.is_dir():
        backbone = local.name
    embed = dataclasses.replace(
        info.embed, backbone=backbone, cache_dir=EmbedConfig.cache_dir, workers=None
    )
    return dataclasses.replace(info, embed=embed, more=tuple(map(shareable, info.more)))


def _own_backbones(model: ScoreModel) -> dict[Path, Path]:
    """Folders of the backbones that were fine-tuned with the model → their place in its run."""
    run = model.checkpoint.resolve().parent
    infos = [member.info or model.info for member in model.members]
    folders = {Path(info.embed.backbone).expanduser() for info in infos}
    inside = [path.resolve() for path in folders if path.is_dir()]
    return {path: path.relative_to(run) for path in inside if run in path.parents}


def _copy_backbone(source: Path, target: Path) -> None:
    """Copy a backbone's settings and weights; who trained it where is left out."""
    target.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        if path.name in _BACKBONE_FILES:
            values = read_json(path)
            write_json(
                target / path.name, {k: v for k, v in values.items() if k != "_name_or_path"}
            )
        elif ".safetensors" in path.name:
            shutil.copyfile(path, target / path.name)
    list_files(target)


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
