"""Phase one as a whole: from embed's options to a store that has every image's features."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mirip_fast.config import EmbedConfig
from mirip_fast.data.hashes import HashMemory
from mirip_fast.features.backbone_files import find_backbone
from mirip_fast.features.embed import Progress, Settings, embed
from mirip_fast.features.needs import wanted_series
from mirip_fast.features.outcomes import Outcome
from mirip_fast.features.recipe import Recipe, make_recipe
from mirip_fast.features.speed import SpeedReport
from mirip_fast.features.store import FeatureStore
from mirip_fast.files import format_bytes
from mirip_fast.runtime import resolve_device, resolve_precision

if TYPE_CHECKING:
    import torch

    from mirip_fast.features.backbone import Backbone

log = logging.getLogger(__name__)

HASHES_FILE = "hashes.sqlite"


@dataclass(frozen=True)
class PhaseOne:
    """A recipe, the store that holds its features, and the device that would compute them."""

    recipe: Recipe
    store: FeatureStore
    device: torch.device
    compile: bool = False  # have code made for the backbone

    def embed(
        self,
        paths: Sequence[Path],
        hashes: HashMemory,
        settings: Settings,
        progress: Callable[[Progress], None] = lambda _: None,
        on_speed: Callable[[SpeedReport], None] = lambda _: None,
    ) -> Sequence[Outcome]:
        """Compute what is missing; see :func:`mirip_fast.features.embed.embed`."""
        return embed(
            paths, self.recipe, self.store, self._load, hashes, settings, progress, on_speed
        )

    def _load(self) -> Backbone:
        from mirip_fast.features.backbone import load_backbone

        backbone = load_backbone(self.recipe.backbone, self.device, self.recipe.precision)
        if self.compile:
            backbone.compile()
        return backbone

    def bytes_per_image(self) -> int:
        """Disk space of one image's features, in bytes."""
        return sum(spec.row_bytes for _, _, spec in wanted_series(self.recipe))

    def say_size(self, n_images: int) -> None:
        """Tell the rough size of ``n_images`` features and the free space; warn if it is too little."""
        free = shutil.disk_usage(self.store.path).free
        size = n_images * self.bytes_per_image()
        log.info(
            "%d images take about %s in %s; %s are free",
            n_images,
            format_bytes(size),
            self.store.path,
            format_bytes(free),
        )
        there = sum(file.stat().st_size for file in self.store.path.glob("*.h5"))
        if size - there > free:
            log.warning(
                "There may be too little room: %s are wanted and %s are free. What fits is kept; "
                "--patches mean or none stores less, --cache-dir chooses another disk.",
                format_bytes(size - there),
                format_bytes(free),
            )


def open_hashes(cache_dir: Path) -> HashMemory:
    """The memory of content hashes that lies in a cache folder."""
    return HashMemory(cache_dir / HASHES_FILE)


def prepare(options: EmbedConfig, device_name: str, hashes: HashMemory) -> PhaseOne:
    """Find the backbone, decide the recipe, open its store. No weights are loaded yet.

    Raises:
        BackboneError: the backbone can not be found.
        ConfigError: device, precision, patches or image size do not go.
        StoreError: the cache folder holds something else under that name.
    """
    backbone = find_backbone(options.backbone, hashes.sha256)
    device = resolve_device(device_name)
    precision = resolve_precision(options.precision, device)
    recipe = make_recipe(options, backbone, precision)
    if recipe.size != options.image_size:
        log.info(
            "Image size %d is no multiple of the patch (%d pixels): %d is used, the same tokens",
            options.image_size,
            backbone.patch_size,
            recipe.size,
        )
    store = FeatureStore.create(Path(options.cache_dir) / recipe.fingerprint_id, recipe.fingerprint)
    return PhaseOne(recipe, store, device, options.compile)


def with_kinds(phase: PhaseOne, kinds: tuple[str, ...]) -> PhaseOne:
    """The same phase one, restricted to the token kinds that a head needs."""
    return dataclasses.replace(phase, recipe=dataclasses.replace(phase.recipe, kinds=kinds))
