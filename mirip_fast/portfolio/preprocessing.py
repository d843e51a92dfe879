"""What a user of an exported model has to do to an image first, as plain data."""

from __future__ import annotations

from typing import Any

from mirip_fast.features.recipe import Recipe
from mirip_fast.models.onnx_graph import OUTPUT
from mirip_fast.ranking.scorer import ScoreModel
from mirip_fast.ranking.torch_score import view_sizes

#: Input of the head's graph.
HEAD_INPUT = "features"

_STEPS = (
    "decode the first frame (that is not of a single colour); apply the EXIF orientation; leave colour "
    "profiles aside",
    "lay transparency over white (over black, where nothing is seen on white); scale 16-bit pixels to 8 "
    "bits; convert to RGB",
    "make it square as `resize` says, `size` pixels a side: bicubic with antialiasing (as Pillow does)",
    "divide by 255; subtract `mean` and divide by `std`, per channel",
    "order the axes: batch, channel, row, column; float32",
)


def input_name(size: int) -> str:
    """Name of the whole model's input for squares of ``size`` pixels."""
    return f"pixels_{size}"


def preprocessing(model: ScoreModel, recipe: Recipe | None) -> dict[str, Any]:
    """What goes into and comes out of the exported graphs.

    Args:
        model: what was exported.
        recipe: the backbone's preprocessing; None where the backbone was not exported.
    """
    info = model.info
    head = {
        "file": "head.onnx",
        "inputs": [{"name": HEAD_INPUT, "shape": ["batch", info.input_dim], "dtype": "float32"}],
        "features": list(info.kinds),
        "note": "one row per image and view; an image's score is the mean over its views",
    }
    about: dict[str, Any] = {
        "output": {"name": OUTPUT, "shape": ["batch"], "meaning": "higher is better"},
        "tiers": list(info.tiers),
        "members": len(model.members),
        "views": [{"size": view.size, "mirrored": view.flip} for view in info.views],
        "fingerprint": info.fingerprint,
        "head": head,
    }
    if recipe is None:
        return about
    image = {
        "file": "model.onnx",
        "inputs": [
            {"name": input_name(size), "shape": ["batch", 3, size, size], "dtype": "float32"}
            for size in view_sizes(info)
        ],
        "steps": list(_STEPS),
        "resize": recipe.resize,
        "mean": list(recipe.backbone.mean),
        "std": list(recipe.backbone.std),
        "jpeg": "decoded at 1/2, 1/4 or 1/8 where both sides stay at least twice `size`; a full decode "
        "differs slightly"
        if recipe.decode == "fast"
        else "decoded at full size",
        "note": "mirroring and the mean over views and members happen inside",
    }
    return {"model": image, **about}
