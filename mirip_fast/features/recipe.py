"""A recipe: everything that decides what numbers a feature row holds. Its hash names the cache folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mirip_fast.config import EmbedConfig
from mirip_fast.errors import ConfigError
from mirip_fast.features.backbone_files import BackboneSpec
from mirip_fast.features.pooling import kind_shape, middle_layers, stored_kinds
from mirip_fast.features.shards import SeriesSpec
from mirip_fast.features.store import fingerprint_id
from mirip_fast.features.views import View, effective_size, make_views

#: Raise it when decoding, resizing or pooling changes the numbers; old caches are then left alone.
PREPROCESSING_VERSION = 1


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
