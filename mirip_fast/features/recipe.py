"""A recipe: everything that decides what numbers a feature row holds. Its hash names the cache folder.

Views are the test-time augmentations of an image whose features are kept side by side. A *kind* says which
tokens a series holds: ``cls``, ``mean`` (of the patch tokens), ``grid4`` (those averaged over a 4 × 4 grid),
``patch`` (every one). Register tokens are in none of them. ``cls_6`` and ``mean_6`` are those after block 6,
put through the backbone's final norm; without a number they are the last block's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mirip_fast.config import EmbedConfig
from mirip_fast.errors import ConfigError
from mirip_fast.features.backbone_files import BackboneSpec
from mirip_fast.features.shards import SeriesSpec
from mirip_fast.features.store import fingerprint_id

if TYPE_CHECKING:
    import torch


def stored_kinds(patches: str, layers: Sequence[int] = ()) -> tuple[str, ...]:
    """The kinds that ``--patches`` and ``--layers`` ask for; the CLS token is always kept, and beside a
    grid or all patches their mean, which a head sees.

    Args:
        patches: none, mean, std (mean and standard deviation), grid:K or all.
        layers: blocks before the last one, whose CLS token and patch mean are kept, too.

    Raises:
        ConfigError: ``patches`` is none of these.
    """
    grid = re.fullmatch(r"grid:([1-9]\d?)", patches)
    kinds = {
        "none": ("cls",), "mean": ("cls", "mean"), "std": ("cls", "mean", "std"),
        "all": ("cls", "mean", "patch"),
    }  # fmt: skip
    if grid is None and patches not in kinds:
        raise ConfigError(f"--patches {patches}: use none, mean, std, grid:K (like grid:4) or all")
    last = ("cls", "mean", f"grid{int(grid[1])}") if grid else kinds[patches]
    of_layer = last if patches in ("none", "std") else ("cls", "mean")
    return (*last, *(f"{kind}_{layer}" for layer in layers for kind in of_layer))


def middle_layers(layers: str, depth: int) -> tuple[int, ...]:
    """The blocks that ``--layers`` names, without the last one, which is always kept; rising.

    Args:
        layers: ``last``; ``auto`` for each quarter of the depth; or numbers separated by commas:
            of blocks, counted from 1, or fractions of the depth such as 0.5.
        depth: blocks of the backbone.

    Raises:
        ConfigError: ``layers`` is none of these, or names a block that the backbone does not have.
    """
    if layers == "last":
        return ()
    if layers == "auto":
        return tuple(sorted({depth * quarter // 4 for quarter in (1, 2, 3)} - {0}))
    found = set()
    for word in layers.split(","):
        try:
            layer = round(float(word) * depth) if "." in word else int(word)
        except (ValueError, OverflowError):
            layer = 0
        if not 1 <= layer <= depth:
            raise ConfigError(
                f"--layers {layers}: use last, auto, or blocks from 1 to {depth} (fractions of the depth "
                "go as well), such as 6,9 or 0.5,0.75"
            )
        found.add(layer)
    return tuple(sorted(found - {depth}))


def layer_of(kind: str) -> int | None:
    """The block after which a kind's tokens are taken, counted from 1; None for the last one."""
    layer = kind.partition("@")[0].partition("_")[2]
    return int(layer) if layer else None


def kind_shape(kind: str, hidden_size: int, side: int) -> tuple[int, ...]:
    """Shape of one row: [D], [K, K, D] for a grid, [side², D] for all patches.

    Args:
        kind: see the module.
        hidden_size: D, numbers per token.
        side: patches along one edge of the image.
    """
    kind = kind.partition("_")[0]
    if kind in ("cls", "mean", "std"):
        return (hidden_size,)
    if kind == "patch":
        return (side * side, hidden_size)
    cells = int(kind.removeprefix("grid"))
    return (cells, cells, hidden_size)


def pool_tokens(kind: str, cls: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
    """Pool one batch of tokens.

    Args:
        kind: see the module.
        cls: [B, D] CLS tokens after the backbone's final norm, of the kind's layer.
        patches: [B, side, side, D] patch tokens, register tokens taken out.

    Returns:
        [B, *kind_shape(kind, D, side)], float32 (float64 for float64 tokens).
    """
    from torch.nn import functional

    kind = kind.partition("_")[0]
    if kind == "cls":
        return _at_least_float32(cls)
    patches = _at_least_float32(patches)
    if kind == "mean":
        return patches.mean(dim=(1, 2))
    if kind == "std":
        return patches.std(dim=(1, 2), correction=0)
    if kind == "patch":
        return patches.flatten(1, 2)
    cells = int(kind.removeprefix("grid"))
    grid = functional.adaptive_avg_pool2d(patches.permute(0, 3, 1, 2), cells)
    return grid.permute(0, 2, 3, 1)


def _at_least_float32(tokens: torch.Tensor) -> torch.Tensor:
    return tokens if tokens.element_size() >= 4 else tokens.float()


def head_kinds(features: str) -> tuple[str, ...]:
    """The kinds that a head looks at, e.g. ``cls+mean`` → (``cls``, ``mean``)."""
    return tuple(features.split("+"))


def is_patches(kind: str) -> bool:
    """Whether a kind keeps several patch tokens of an image apart: a grid, or all of them."""
    return kind.startswith(("grid", "patch"))


def head_input(parts: list[NDArray[np.floating]]) -> NDArray[np.float32]:
    """Join the kinds a head looks at into its input: the one place where that is done.

    Args:
        parts: per kind [n, *kind_shape], in the order of :func:`head_kinds`.

    Returns:
        [n, T · D], float32: the T tokens of all kinds behind each other.
    """
    flat = [part.reshape(len(part), math.prod(part.shape[1:])) for part in parts]
    joined = flat[0] if len(flat) == 1 else np.concatenate(flat, axis=-1)
    return np.ascontiguousarray(joined, dtype=np.float32)


#: Raise them when decoding, resizing or pooling changes the numbers; old caches are then left alone.
PREPROCESSING_VERSIONS = {"stored": 1, "srgb": 2}


#: Side lengths of the ``scales`` views, relative to the base view.
SCALES = (1.0, 0.9, 1.1)


@dataclass(frozen=True)
class View:
    """One way of looking at an image: the whole image, square, at ``size`` pixels a side."""

    size: int
    flip: bool = False  # mirrored left to right

    @property
    def name(self) -> str:
        """As used in series names: ``756`` or ``756-flip``."""
        return f"{self.size}-flip" if self.flip else str(self.size)


def effective_size(size: int, patch_size: int) -> int:
    """``size`` rounded down to whole patches: 768 → 756 for patches of 14 pixels.

    A patch embedding with stride = patch size ignores the remaining strip at the right and bottom edge;
    resizing to whole patches gives the same number of tokens and shows the model the whole image.

    Raises:
        ConfigError: ``size`` is smaller than one patch.
    """
    if size < patch_size:
        raise ConfigError(f"--image-size {size} is smaller than one patch of {patch_size} pixels")
    return size - size % patch_size


def make_views(tta: str, size: int, patch_size: int) -> tuple[View, ...]:
    """The views of a test-time augmentation setting, the base view first.

    Args:
        tta: ``none``, ``flip``, ``scales`` (0.9, 1.0, 1.1 of ``size``) or ``full`` (flip × scales).
        size: effective side of the base view, in pixels.
        patch_size: pixels per patch; scaled sides go to the nearest multiple. Views that then
            coincide are listed once.
    """
    scales = SCALES if tta in ("scales", "full") else (1.0,)
    sizes = [max(patch_size, round(size * scale / patch_size) * patch_size) for scale in scales]
    flips = (False, True) if tta in ("flip", "full") else (False,)
    return tuple(View(side, flip) for flip in flips for side in dict.fromkeys(sizes))


@dataclass(frozen=True)
class Recipe:
    """Backbone, preprocessing and precision (the fingerprint), and which series of them are wanted."""

    backbone: BackboneSpec
    size: int  # effective side of the base view, in pixels
    resize: str
    decode: str
    colours: str
    precision: str  # compute precision, resolved
    store_dtype: str
    views: tuple[View, ...]  # the base view first
    kinds: tuple[str, ...]

    @property
    def srgb(self) -> bool:
        """Whether colour profiles are applied."""
        return self.colours == "srgb"

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The fields that two caches must share to hold the same numbers; no paths, no batch size."""
        return {
            "backbone": self.backbone.weights_id,
            "model_type": self.backbone.model_type,
            "image_size": self.size,
            "resize": self.resize,
            "mean": list(self.backbone.mean),
            "std": list(self.backbone.std),
            "decode": self.decode,
            "precision": self.precision,
            "store_dtype": self.store_dtype,
            "preprocessing": PREPROCESSING_VERSIONS[self.colours],
        }

    @property
    def fingerprint_id(self) -> str:
        """Name of the cache folder: 16 hex digits."""
        return fingerprint_id(self.fingerprint)

    def series(self, view: View, kind: str) -> SeriesSpec:
        """The series that holds ``kind`` of ``view``."""
        side = view.size // self.backbone.patch_size
        shape = kind_shape(kind, self.backbone.hidden_size, side)
        return SeriesSpec(series_name(view, kind), shape, self.store_dtype)


def series_name(view: View, kind: str) -> str:
    """``cls.756``, ``mean.756-flip``, ``grid4.686`` …"""
    return f"{kind}.{view.name}"


def make_recipe(options: EmbedConfig, backbone: BackboneSpec, precision: str) -> Recipe:
    """The recipe that embed's options describe.

    Args:
        options: image size, resize, decode, views, kinds, layers, stored precision.
        backbone: where patch size, hidden size, mean and std come from.
        precision: the compute precision, resolved for the device.

    Raises:
        ConfigError: an image smaller than a patch, an unknown ``--patches`` or ``--layers``, or a grid with
            more cells than patches.
    """
    size = effective_size(options.image_size, backbone.patch_size)
    kinds = stored_kinds(options.patches, middle_layers(options.layers, backbone.num_layers))
    views = make_views(options.tta, size, backbone.patch_size)
    most = min(view.size for view in views) // backbone.patch_size
    if options.patches.startswith("grid:") and int(options.patches.removeprefix("grid:")) > most:
        raise ConfigError(
            f"--patches {options.patches}: {size} pixels have {most}×{most} patches of {backbone.patch_size} "
            f"pixels{' in the smallest view' if len(views) > 1 else ''}; the largest is grid:{most}"
        )
    return Recipe(
        backbone=backbone,
        size=size,
        resize=options.resize,
        decode=options.decode,
        colours=options.colours,
        precision=precision,
        store_dtype=options.store_dtype,
        views=views,
        kinds=kinds,
    )


#: A wanted series: which view it is of, which kind of token it holds, and its row's shape.
Wanted = tuple[View, str, SeriesSpec]
#: The series that a picture lacks.
Need = tuple[Wanted, ...]


def wanted_series(recipe: Recipe) -> list[Wanted]:
    """Every series that a recipe asks for, view by view."""
    return [(v, kind, recipe.series(v, kind)) for v in recipe.views for kind in recipe.kinds]


def sizes_of(need: Need) -> tuple[int, ...]:
    """Side lengths of the squares from which a need is computed: one decoding serves all its views."""
    return tuple(dict.fromkeys(view.size for view, _, _ in need))
