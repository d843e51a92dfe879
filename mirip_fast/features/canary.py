"""A built-in picture that shows when the same backbone begins to give other features.

A new version of a library, another kernel or another device can change features without changing anything
that the fingerprint knows of. So each run that computes anything first computes the features of a picture
that comes with the package, decoded like any other, and compares them with those that the store's first
run kept in ``canary.json``. Where they differ by more than arithmetic does, nothing is written. Where
nothing can be compared, a warning says so.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections.abc import Mapping
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mirip_fast.errors import StoreError
from mirip_fast.features.recipe import Recipe
from mirip_fast.features.store import find_shards
from mirip_fast.files import read_json, write_json

if TYPE_CHECKING:
    from mirip_fast.features.backbone import Backbone

log = logging.getLogger(__name__)

CANARY_FILE = "canary.json"
#: Largest relative difference |a - b| / |a| of a token that the same computation may show on another
#: machine, by compute precision. Other batch sizes, thread counts and kernels differ by a tenth of it.
TOLERANCE = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 5e-2}

#: Series → [D] of the picture.
Rows = Mapping[str, NDArray[np.float32]]


def check_canary(folder: Path, recipe: Recipe, backbone: Backbone, copies: int = 1) -> None:
    """Compute the picture's features and compare them with those of the store in ``folder``, or keep them.

    Args:
        folder: the store's.
        recipe: how pictures are decoded, and in which precision the backbone computes.
        backbone: the loaded backbone.
        copies: pictures in the batch, for code that was compiled for a batch size.

    Raises:
        StoreError: they differ; says what changed and what to type.
    """
    file, usual, now = folder / CANARY_FILE, TOLERANCE[recipe.precision], versions(backbone)
    ours = _features(recipe, backbone, copies)
    kept, before = read_canary(file, recipe.fingerprint_id)
    if finite := all(np.isfinite(row).all() for row in ours.values()):
        shards = [] if kept else find_shards(folder, recipe.fingerprint_id).values()
        if any(shard.checksums().any() for series in shards for shard in series):
            # Another process may have stored it before its rows.
            kept, before = read_canary(file, recipe.fingerprint_id)
            if not kept:
                log.warning(
                    "%s is not there, but features are: whether the backbone still gives such ones cannot "
                    "be told. The test picture's features are stored anew. If the libraries or the device "
                    "changed since, embed into another --cache-dir; if you have the file, stop and put it "
                    "back.",
                    file,
                )
    elif not kept:  # each picture's row is judged alone; those that fit are stored
        log.warning(
            "The features of the built-in test picture are not finite in %s: later runs cannot be compared "
            "with this one%s.",
            recipe.precision,
            "" if recipe.precision == "fp32" else "; --precision fp32 may help",
        )
        return
    worst = difference(kept, ours)
    if not finite or worst > usual:
        how = f"differ by {worst:.2%}" if finite else "are not finite"
        what = (
            changes(before, now) or "nothing that is recorded: the weights' code, or the hardware"
        )
        raise StoreError(
            f"The backbone gives other features than those in {folder}: those of a built-in test picture "
            f"{how} (up to {usual:.1%} would be arithmetic). Changed since: {what}. Nothing was written, as "
            "features of both kinds must not be compared with each other. To embed everything anew with "
            "what is installed now, give another --cache-dir; to go on with this cache, install the "
            "earlier versions."
        )
    if not ours.keys() <= kept.keys():
        write_canary(file, recipe.fingerprint_id, {**ours, **kept}, before or now)


def _features(recipe: Recipe, backbone: Backbone, copies: int) -> dict[str, NDArray[np.float32]]:
    import torch

    view = recipe.views[0]
    with torch.inference_mode():
        squares = np.stack([picture(recipe, view.size)] * copies)
        pixels = backbone.normalise(torch.from_numpy(squares))
        rows = backbone.features(pixels.flip(-1) if view.flip else pixels, ("cls", "mean"))
    return {f"{kind}.{view.name}": row[0].float().cpu().numpy() for kind, row in rows.items()}


def difference(ours: Rows, theirs: Rows) -> float:
    """The largest |a - b| / |a| among the series of both; infinite where shapes differ."""
    worst = 0.0
    for name in ours.keys() & theirs.keys():
        a, b = ours[name].astype(np.float64), theirs[name].astype(np.float64)
        apart = float(np.linalg.norm(a - b) / np.linalg.norm(a)) if a.shape == b.shape else np.inf
        worst = max(worst, apart)
    return worst


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """``torch 2.8.0 → 2.9.0; …``: what two computations were not made with alike."""
    names = [n for n in {**before, **now} if before.get(n) != now.get(n)]
    return "; ".join(f"{n} {before.get(n, 'none')} → {now.get(n, 'none')}" for n in names)


def write_canary(
    file: Path, fingerprint_id: str, features: Rows, made_with: Mapping[str, str]
) -> None:
    """Keep the test picture's features, with the store that they belong to and a checksum."""
    rows = {name: [float(f"{x:.9g}") for x in row] for name, row in features.items()}
    content = {"features": rows, "made_with": made_with, "fingerprint": fingerprint_id}
    write_json(file, {**content, "sha256": _digest(content)})


def read_canary(file: Path, fingerprint_id: str) -> tuple[Rows, dict[str, str]]:
    """The test picture's features by series, [D] each, and what made them; empty where there is no file.

    Raises:
        StoreError: it cannot be read, is damaged, or of another store.
    """
    try:
        content: dict[str, Any] = read_json(file)
        rows = {str(k): np.array(v, np.float32) for k, v in content["features"].items()}
        made_with = {str(k): str(v) for k, v in content["made_with"].items()}
        if not rows or not all(row.ndim == 1 and row.any() for row in rows.values()):
            raise ValueError("it holds no features")
        if not all(np.isfinite(row).all() for row in rows.values()):
            raise ValueError("a feature is not finite")
        # Files of before have neither of the two.
        if content.get("fingerprint", fingerprint_id) != fingerprint_id:
            raise ValueError(f"it is of another store, {content['fingerprint']}")
        if "sha256" in content and content.pop("sha256") != _digest(content):
            raise ValueError("its content does not match its checksum")
        return rows, made_with
    except FileNotFoundError:
        return {}, {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"an entry is missing: {error}" if isinstance(error, KeyError) else error
        raise StoreError(
            f"{file} cannot be read ({why}). It holds the features of a test picture that shows whether "
            "this cache still fits the installed libraries. Put it back, delete it if they have not changed "
            "since (the next run then keeps its own), or embed into another --cache-dir."
        ) from error


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def picture(recipe: Recipe, size: int) -> NDArray[np.uint8]:
    """The built-in picture, decoded and resized as the recipe says: uint8 [size, size, 3], 0-255."""
    from mirip_fast.data.images import decode_squares, to_array

    data = resources.files("mirip_fast.features").joinpath("canary.jpg").read_bytes()
    squares = decode_squares(
        data, (size,), recipe.resize, draft=recipe.decode == "fast", srgb=False
    )
    return to_array(squares.images[0])


def versions(backbone: Backbone) -> dict[str, str]:
    """What may change features without changing the fingerprint: libraries, device, kernels."""
    import torch
    from PIL import features

    device, cuda = backbone.device, backbone.device.type == "cuda"
    cpu = f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {
        **{name: metadata.version(name) for name in ("torch", "transformers", "pillow", "numpy")},
        "JPEG library": features.version("jpg") or "unknown",
        "device": torch.cuda.get_device_name(device) if cuda else cpu,
        **({"CUDA": str(torch.version.cuda)} if cuda else {}),
        "compiled": "yes" if backbone.compiled else "no",
    }
