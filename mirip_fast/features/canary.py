"""A built-in picture that shows when the same backbone begins to give other features.

A new version of a library, another kernel or another device can change features without changing anything
that the fingerprint knows of. So each run that computes anything first computes the features of a picture
that comes with the package, decoded like any other, and compares them with those that the store's first
run kept in ``canary.json``. Where they differ by more than arithmetic does, nothing is written. Where
nothing can be compared, a warning says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import platform
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
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
_KINDS = ("cls", "mean")


class CanaryError(StoreError):
    """The backbone gives other features than those in the store; nothing was written."""


class Canary:
    """The check of one run. One thread checks, others wait for the verdict.

    Args:
        folder: the store's folder.
        recipe: how pictures are decoded, and in which precision the backbone computes.
    """

    def __init__(self, folder: Path, recipe: Recipe):
        self._file, self._recipe = folder / CANARY_FILE, recipe
        self._verdict: Future[None] = Future()

    def check(self, backbone: Backbone, copies: int = 1) -> None:
        """Compute the picture's features and compare them with the stored ones, or store them.

        Args:
            backbone: the loaded backbone.
            copies: pictures in the batch, for code that was compiled for a batch size.

        Raises:
            CanaryError: they differ; says what changed and what to type.
        """
        try:
            self._compare(self._features(backbone, copies), versions(backbone))
        except BaseException as error:
            self.give_up(error)
            raise
        with contextlib.suppress(InvalidStateError):  # given up meanwhile
            self._verdict.set_result(None)

    def wait(self) -> None:
        """Wait for the verdict; raises what :meth:`check` raised."""
        self._verdict.result()

    def give_up(self, error: BaseException) -> None:
        """Let those go who wait; they see ``error``. A verdict that is there already stays."""
        # Asking first whether there is one would leave a moment in which another thread gives it.
        with contextlib.suppress(InvalidStateError):
            self._verdict.set_exception(error)

    def _features(self, backbone: Backbone, copies: int) -> dict[str, NDArray[np.float32]]:
        import torch

        view = self._recipe.views[0]
        with torch.inference_mode():
            square = picture(self._recipe, view.size)
            pixels = backbone.normalise(torch.from_numpy(np.stack([square] * copies)))
            rows = backbone.features(pixels.flip(-1) if view.flip else pixels, _KINDS)
        return {f"{kind}.{view.name}": row[0].float().cpu().numpy() for kind, row in rows.items()}

    def _compare(self, ours: dict[str, NDArray[np.float32]], made_with: dict[str, str]) -> None:
        stored, before = self._stored()
        if not all(np.isfinite(row).all() for row in ours.values()):
            if stored:
                raise CanaryError(self._text("are not finite", before, made_with))
            # Each picture's row is judged alone; those that fit are stored.
            log.warning(
                "The features of the built-in test picture are not finite in %s: later runs can not be "
                "compared with this one%s.",
                self._recipe.precision,
                "" if self._recipe.precision == "fp32" else "; --precision fp32 may help",
            )
            return
        if not stored and self._has_rows():
            # Of several processes another may have stored both since: the picture comes before any row.
            stored, before = self._stored()
            if not stored:
                log.warning(
                    "%s is not there, but features are: whether the backbone still gives such ones can "
                    "not be told. The test picture's features are stored anew. If the libraries or the "
                    "device changed since, embed into another --cache-dir; if you have the file, stop "
                    "and put it back.",
                    self._file,
                )
        worst = 0.0
        for name, row in ours.items():
            if name in stored:
                old = stored[name]
                if old.shape != row.shape:
                    raise CanaryError(self._text("have another shape", before, made_with))
                scale = max(float(np.linalg.norm(old)), 1e-12)
                worst = max(worst, float(np.linalg.norm(row - old)) / scale)
        if worst > TOLERANCE[self._recipe.precision]:
            raise CanaryError(self._text(f"differ by {worst:.2%}", before, made_with))
        if not ours.keys() <= stored.keys():
            features = {name: [float(f"{x:.7g}") for x in row] for name, row in ours.items()}
            kept = {**{n: r.tolist() for n, r in stored.items()}, **features}
            write_canary(self._file, self._recipe.fingerprint_id, kept, before or made_with)

    def _stored(self) -> tuple[dict[str, NDArray[np.float32]], dict[str, str]]:
        try:
            return read_canary(self._file, self._recipe.fingerprint_id)
        except FileNotFoundError:
            return {}, {}
        except (OSError, ValueError) as error:
            raise CanaryError(
                f"{self._file} can not be read ({error}). It holds the features of a test picture that "
                "shows whether this cache still fits the installed libraries. Put it back, delete it if they "
                "have not changed since (this run then keeps its own), or embed into another --cache-dir."
            ) from error

    def _has_rows(self) -> bool:
        shards = find_shards(self._file.parent, self._recipe.fingerprint_id).values()
        return any(shard.checksums().any() for series in shards for shard in series)

    def _text(self, how: str, before: dict[str, str], now: dict[str, str]) -> str:
        changed = [
            f"{name} {before.get(name, 'none')} → {now.get(name, 'none')}"
            for name in dict.fromkeys([*before, *now])
            if before.get(name) != now.get(name)
        ]
        what = "; ".join(changed) or "nothing that is recorded: the weights' code, or the hardware"
        usual = TOLERANCE[self._recipe.precision]
        return (
            f"The backbone gives other features than those in {self._file.parent}: those of a built-in "
            f"test picture {how} (up to {usual:.1%} would be arithmetic). Changed since: {what}. "
            "Nothing was written, as features of both kinds must not be compared with each other. "
            "To embed everything anew with what is installed now, give another --cache-dir; to go on "
            "with this cache, install the earlier versions."
        )


def write_canary(
    file: Path,
    fingerprint_id: str,
    features: Mapping[str, Sequence[float]],
    made_with: Mapping[str, str],
) -> None:
    """Keep the test picture's features, by series, with the store that they belong to and a checksum."""
    content = {"features": features, "made_with": made_with, "fingerprint": fingerprint_id}
    write_json(file, {**content, "sha256": _digest(content)})


def read_canary(
    file: Path, fingerprint_id: str
) -> tuple[dict[str, NDArray[np.float32]], dict[str, str]]:
    """The test picture's features by series, [D] each, and what made them.

    Raises:
        OSError: the file can not be read.
        ValueError: it is damaged, empty, or of another store.
    """
    content: dict[str, Any] = read_json(file)
    try:
        rows = {str(k): np.array(v, np.float32) for k, v in content["features"].items()}
        made_with = {str(k): str(v) for k, v in content["made_with"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"an entry is missing or wrong ({error!r})") from error
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


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def picture(recipe: Recipe, size: int) -> NDArray[np.uint8]:
    """The built-in picture, decoded and resized as the recipe says: uint8 [size, size, 3], 0-255."""
    from mirip_fast.data.images import decode_squares, to_array

    data = resources.files("mirip_fast.features").joinpath("canary.jpg").read_bytes()
    squares = decode_squares(data, (size,), recipe.resize, draft=recipe.decode == "fast")
    return to_array(squares.images[0])


def versions(backbone: Backbone) -> dict[str, str]:
    """What may change features without changing the fingerprint: libraries, device, kernels."""
    import torch
    from PIL import features

    found = {name: metadata.version(name) for name in ("torch", "transformers", "pillow", "numpy")}
    found["JPEG library"] = features.version("jpg") or "unknown"
    device = backbone.device
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["CUDA"] = str(torch.version.cuda)
    else:
        found["device"] = (
            f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
        )
    found["compiled"] = "yes" if backbone.compiled else "no"
    return found
