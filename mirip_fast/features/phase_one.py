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
from mirip_fast.features.engine import SpeedReport
from mirip_fast.features.needs import wanted_series
from mirip_fast.features.outcomes import Outcome
from mirip_fast.features.recipe import Recipe, make_recipe
from mirip_fast.features.shards import shard_bytes
from mirip_fast.features.store import FeatureStore
from mirip_fast.files import format_bytes
from mirip_fast.runtime import distributed, resolve_device, resolve_precision

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
            paths, self.recipe, self.store, self.load, hashes, settings, progress, on_speed
        )

    def load(self) -> Backbone:
        """The backbone with its weights."""
        from mirip_fast.features.backbone import load_backbone

        backbone = load_backbone(self.recipe.backbone, self.device, self.recipe.precision)
        if self.compile:
            backbone.compile()
        return backbone

    def most_bytes(self, n_images: int) -> int:
        """The most room on the disk that the features of ``n_images`` can take beyond what is taken.

        Shards are made at their full size, so their number counts: of those that are made if no image is
        there yet, by all processes of a distributed run together. Which images are there is not known
        before they are hashed.
        """
        ranks, total = distributed(), 0
        for _, _, spec in wanted_series(self.recipe):
            there = self.store.free_slots(spec.name)
            if ranks is None:
                free = [sum(there.values())]  # a run alone fills the shards of every part
            else:
                free = [there.get(part, 0) for part in range(1, ranks.size + 1)]
            shards = _most_shards(n_images, free, spec.shard_rows)
            total += shards * shard_bytes(spec)
        return total

    def say_size(self, n_images: int) -> None:
        """Tell the room that ``n_images`` take at most and what is free; warn if that may be too little."""
        size = self.most_bytes(n_images)
        free = shutil.disk_usage(self.store.path).free
        log.info(
            "The features of %d images take %s in %s; %s are free",
            n_images,
            f"at most {format_bytes(size)} more" if size else "no further space",
            self.store.path,
            format_bytes(free),
        )
        if size > free:
            log.warning(
                "There may be too little room: if none of these images is in the cache yet, %s are "
                "needed, and %s are free. What fits is kept; --patches mean or none stores less, "
                "--cache-dir chooses another disk.",
                format_bytes(size),
                format_bytes(free),
            )


def _most_shards(n_rows: int, free: Sequence[int], shard_rows: int) -> int:
    """The most shards that ``n_rows`` new rows can ask for, however they fall on the parts.

    Args:
        n_rows: rows to come.
        free: per part, the slots that are free in its shards.
        shard_rows: rows of a new shard.
    """
    shards, left = 0, n_rows
    # A part gets a shard for the first row that does not fit: most are made if the fullest come first.
    for slots in sorted(free):
        if left <= slots or (shards and slots >= shard_rows):
            break
        shards, left = shards + 1, left - slots - 1
    return shards + left // shard_rows if shards else 0


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
