"""A recipe: everything that decides what numbers a feature row holds. Its hash names the cache folder.

Views are the test-time augmentations of an image whose features are kept side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mirip_fast.config import EmbedConfig
from mirip_fast.errors import ConfigError
from mirip_fast.features.backbone_files import BackboneSpec
from mirip_fast.features.pooling import kind_shape, middle_layers, stored_kinds
from mirip_fast.features.shards import SeriesSpec
from mirip_fast.features.store import fingerprint_id

#: Raise it when decoding, resizing or pooling changes the numbers; old caches are then left alone.
PREPROCESSING_VERSION = 1


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
    precision: str  # compute precision, resolved
    store_dtype: str
    views: tuple[View, ...]  # the base view first
    kinds: tuple[str, ...]

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
            "preprocessing": PREPROCESSING_VERSION,
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
        precision=precision,
        store_dtype=options.store_dtype,
        views=views,
        kinds=kinds,
    )
