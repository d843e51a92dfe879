"""A fine-tuned checkpoint as a backbone folder and a head, like those of a head-only run.

Everything that uses a model (``evaluate``, ``rank``, …) then treats it as it treats any other: its
backbone is a local directory, whose features have a fingerprint and a cache of their own.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mirip_fast.data.hashes import HashMemory
from mirip_fast.errors import CheckpointError
from mirip_fast.features.backbone_files import BackboneSpec, find_backbone
from mirip_fast.features.recipe import make_recipe
from mirip_fast.files import list_files, read_json, sha256_of, write_json
from mirip_fast.models.model_info import ModelInfo

_PREFIX = "backbone."
_MARK = "made_from.json"

#: Key in a checkpoint's ``model`` entry that says that it brings a backbone of its own.
FINETUNED = "finetuned"


def describe_backbone(spec: BackboneSpec, model: nn.Module) -> dict[str, Any]:
    """What a checkpoint has to say of its backbone, so that it can be built without the original."""
    config: Any = model.config
    return {
        "name": spec.name,
        "config": json.dumps(config.to_dict()),
        "mean": list(spec.mean),
        "std": list(spec.std),
    }


def backbone_folder(checkpoint: Path) -> Path:
    """Where the backbone of a fine-tuned checkpoint lies: beside it."""
    suffix = "" if checkpoint.stem == "best_model" else f"-{checkpoint.stem}"
    return checkpoint.parent / f"backbone{suffix}"


def head_state(content: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Projector and score head of a checkpoint."""
    state = content["model_state_dict"]
    return {name: value for name, value in state.items() if not name.startswith(_PREFIX)}


def is_finetuned(content: Mapping[str, Any]) -> bool:
    """Whether a checkpoint brings a backbone of its own."""
    return FINETUNED in content.get("model", {})


def deploy(checkpoint: Path, content: Mapping[str, Any]) -> ModelInfo:
    """Write the backbone of a fine-tuned checkpoint beside it, unless it is there, and describe it.

    Args:
        checkpoint: the file.
        content: what is in it.

    Raises:
        CheckpointError: the backbone cannot be built from it.
    """
    info = ModelInfo.from_dict(content["model"])
    folder = backbone_folder(checkpoint)
    sha = sha256_of(checkpoint)
    if not _is_of(folder, sha):
        _write(folder, content, sha)
    with HashMemory(None) as hashes:
        spec = find_backbone(str(folder), hashes.sha256)
    embed = dataclasses.replace(info.embed, backbone=str(folder.resolve()))
    recipe = make_recipe(embed, spec, str(info.fingerprint["precision"]))
    return dataclasses.replace(info, embed=embed, fingerprint=recipe.fingerprint)


def _is_of(folder: Path, sha: str) -> bool:
    try:
        return bool(read_json(folder / _MARK)["checkpoint_sha256"] == sha)
    except (OSError, ValueError, KeyError):
        return False


def _write(folder: Path, content: Mapping[str, Any], sha: str) -> None:
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    described = content["model"][FINETUNED]
    write_backbone(partial, described, content["model_state_dict"])
    write_json(partial / _MARK, {"checkpoint_sha256": sha, "made_from": described["name"]})
    list_files(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def write_backbone(folder: Path, described: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write a backbone's files from what :func:`describe_backbone` said of it and a model's weights.

    Raises:
        CheckpointError: it cannot be built from them.
    """
    from transformers import AutoConfig, AutoModel
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    weights = {n.removeprefix(_PREFIX): v for n, v in state.items() if n.startswith(_PREFIX)}
    try:
        values = json.loads(described["config"])
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        model = AutoModel.from_config(config, trust_remote_code=False)
        model.load_state_dict(weights)
    except (KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"the checkpoint's backbone cannot be built with this version of transformers: {error}"
        ) from error
    model.save_pretrained(folder)
    write_json(
        folder / "preprocessor_config.json",
        {"image_mean": described["mean"], "image_std": described["std"]},
    )
