"""Features of image files for comparing them: from the cache, and computed where they are missing."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mirip_fast.config import Config, EmbedConfig
from mirip_fast.data.hashes import HashMemory
from mirip_fast.errors import BackboneError, StoreError
from mirip_fast.features.command import settings_of
from mirip_fast.features.datasets import Dataset
from mirip_fast.features.embed import Progress, Settings
from mirip_fast.features.outcomes import InputHashes, Outcome, ledger
from mirip_fast.features.phase_one import PhaseOne, open_hashes, prepare, with_kinds
from mirip_fast.features.store import FeatureStore, differing_fields
from mirip_fast.files import temporary_folder
from mirip_fast.settings import config_from_dict

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OnDemand:
    """What became of the files, and the store that has the features of the readable ones."""

    outcomes: Sequence[Outcome]
    store: FeatureStore
    series: str


def embed_options(reference: Dataset) -> EmbedConfig:
    """How a data set was embedded."""
    return config_from_dict({"embed": reference.info["embed"]}).embed


def features_of_files(
    paths: Sequence[Path],
    options: EmbedConfig,
    config: Config,
    *,
    like: FeatureStore | None = None,
    series: str | None = None,
    rehash: bool = False,
    command: str = "",
    progress: Callable[[Progress], None] = lambda _: None,
) -> OnDemand:
    """The CLS tokens of image files, embedding those that are not in the cache.

    Neither torch nor the backbone is needed where ``like`` has all of them. A cache that can not be
    written to (read-only, full, in use) is left alone: the features are then kept until the program ends.

    Args:
        paths: image files.
        options: backbone and preprocessing.
        config: cache folder, device, batch size, workers.
        like: the store whose features they will be compared with; None for none.
        series: the series compared in ``like``.
        rehash: read every file again instead of trusting size and time.
        command: what is running, for whoever finds the store locked.
        progress: called after every committed batch.

    Raises:
        StoreError: the backbone or its preprocessing is not that of ``like``; names the fields.
        BackboneError: features are missing and the backbone can not be found.
    """
    cache_dir = Path(config.embed.cache_dir)
    with open_hashes(cache_dir) as hashes:
        if like is not None and series is not None:
            known = list(hashes.sha256_many(paths, rehash=rehash))
            readable = [sha for sha in known if isinstance(sha, bytes)]
            if (like.rows(series, readable) >= 0).all():
                return OnDemand(ledger(InputHashes.of(known)), like, series)
        phase = _prepare(options, config, like, hashes)
        settings = settings_of(config.embed, len(paths), rehash=rehash, command=command)
        outcomes, store = _embed(phase, paths, hashes, settings, progress)
        series = phase.recipe.series(phase.recipe.views[0], "cls").name
    return OnDemand(outcomes, store, series)


def _prepare(
    options: EmbedConfig, config: Config, like: FeatureStore | None, hashes: HashMemory
) -> PhaseOne:
    """Phase one for the CLS token of the whole image, on this machine."""
    from mirip_fast.runtime import resolve_device, supported_precisions

    options = dataclasses.replace(options, cache_dir=config.embed.cache_dir, tta="none")
    if like is not None:
        wanted = like.fingerprint["precision"]
        possible = supported_precisions(resolve_device(config.runtime.device))
        options.precision = wanted if wanted in possible else "fp32"
    phase = with_kinds(prepare(options, config.runtime.device, hashes), ("cls",))
    if like is not None:
        ours = {**phase.recipe.fingerprint, "precision": like.fingerprint["precision"]}
        if ours != like.fingerprint:
            raise StoreError(
                f"The backbone or its preprocessing is not that of {like.path} "
                f"({differing_fields(like.fingerprint, ours)}). Give the same backbone with "
                "--backbone DIR."
            )
        if phase.recipe.precision != like.fingerprint["precision"]:
            log.warning(
                "The cache holds %s features; this machine computes in fp32, which differs by about 1 %%",
                like.fingerprint["precision"],
            )
    return phase


def _embed(
    phase: PhaseOne,
    paths: Sequence[Path],
    hashes: HashMemory,
    settings: Settings,
    progress: Callable[[Progress], None],
) -> tuple[Sequence[Outcome], FeatureStore]:
    try:
        return phase.embed(paths, hashes, settings, progress), phase.store
    except BackboneError:
        raise
    except (StoreError, OSError) as error:
        log.warning("%s (the features computed now are not kept)", error)
    ending = contextlib.ExitStack()
    folder = ending.enter_context(temporary_folder())
    store = FeatureStore.create(folder / phase.recipe.fingerprint_id, phase.recipe.fingerprint)
    weakref.finalize(store, ending.close)
    spare = dataclasses.replace(phase, store=store)
    return spare.embed(paths, hashes, settings, progress), store
