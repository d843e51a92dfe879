"""Settings that follow from the data set which is trained on."""

from __future__ import annotations

import dataclasses
import logging
import re
import shlex
from collections.abc import Sequence

from mirip_fast.config import Config, DataConfig, EmbedConfig
from mirip_fast.data.csv_reader import shown
from mirip_fast.errors import ConfigError
from mirip_fast.features.datasets import Dataset
from mirip_fast.features.pooling import head_kinds, is_patches, layer_of
from mirip_fast.settings import config_from_dict

log = logging.getLogger(__name__)

#: Settings of ``embed`` that say which cache is meant and what is in it.
_MAKE_A_CACHE = (
    "backbone", "image_size", "resize", "patches", "layers", "tta", "precision", "store_dtype", "decode",
)  # fmt: skip


def with_dataset(
    config: Config, dataset: Dataset, readout: str = "head", data: DataConfig | None = None
) -> Config:
    """The settings of a run on ``dataset``: how it was read and embedded is part of the run.

    What this command's options say of data and embedding is put aside, but for the cache folder; the
    features that the head sees are chosen among those that are there. ``data``, where given, says how its
    grades are read.
    """
    kept = config_from_dict({"data": dataset.info["data"], "embed": dataset.info["embed"]})
    kept.embed.cache_dir = config.embed.cache_dir
    kinds = dataset.info["kinds"]
    if config.head.features == "auto":
        _tell_of_old_cache(dataset, readout)
    if readout in ("gp", "auto", "ensemble"):
        features = gp_features(config.head.features, kinds)
    elif readout == "attention":
        patches = next(filter(is_patches, kinds), None)
        features = choose_features(config.head.features, kinds)
        if patches is None:
            raise ConfigError(
                f"--readout attention looks at patch tokens; of {shown(dataset.source)} there are only "
                f"{', '.join(kinds)}. To add them: {_again(dataset, patches='grid:7')}"
            )
        if not is_patches(head_kinds(features)[-1]):  # else the grid was named
            features = f"{features}+{patches}"
        log.info("The head sees %s", features)
    else:
        features = choose_features(config.head.features, kinds)
        if features != config.head.features:
            log.info("The head sees %s", features)
    _check_kinds(features, readout)
    head = dataclasses.replace(config.head, features=features)
    return dataclasses.replace(config, data=data or kept.data, embed=kept.embed, head=head)


def _tell_of_old_cache(dataset: Dataset, readout: str) -> None:
    """Say what an earlier version did not keep, and what to type for it."""
    embed, kinds = dataset.info["embed"], dataset.info["kinds"]
    lacks = []
    if "mean" not in kinds and any(map(is_patches, kinds)):
        lacks.append("the mean of the patches")
    if readout == "gp" and "layers" not in embed:
        lacks.append("the middle blocks")
    if lacks:
        log.warning(
            "An earlier version embedded %s without %s, from which a model learns more. To add them: %s",
            shown(dataset.source), " and ".join(lacks), _again(dataset),
        )  # fmt: skip


def _check_kinds(features: str, readout: str) -> None:
    """Refuse ``--features`` that are none, and patch tokens where only their mean can be looked at."""
    single = r"(cls|mean)(_[1-9]\d*)?"
    patches = r"(\+(grid[1-9]\d*|patch))?" if readout == "attention" else ""
    if not re.fullmatch(rf"{single}(\+{single})*{patches}", features):
        raise ConfigError(
            f"--features {features}: name kinds like cls, mean, cls_9 or mean_9, joined by +"
            + (
                "; then a grid or patch"
                if patches
                else "; patch tokens go with --readout attention"
            )
        )


def _again(dataset: Dataset, **other: str) -> str:
    """The command that embedded a data set, with other settings; what is there is not computed again."""
    embed = {**dataset.info["embed"], **other}
    flags = (
        f"--{name.replace('_', '-')} {shlex.quote(str(embed[name]))}"
        for name in _MAKE_A_CACHE
        if name in embed and embed[name] != getattr(EmbedConfig(), name)
    )
    return " ".join(("mirip-fast embed", shlex.quote(shown(dataset.source)), *flags))


def choose_features(wanted: str, kinds: Sequence[str]) -> str:
    """``auto`` is CLS and mean patch token side by side where both are stored, else CLS.

    Both together are what DINOv2's own linear probes look at (Oquab et al. 2023, section 7.1); measured here
    on two data sets they were better than CLS alone, see docs/benchmarks.md.
    """
    if wanted != "auto":
        return wanted
    return "cls+mean" if "mean" in kinds else "cls"


def gp_features(wanted: str, kinds: Sequence[str]) -> str:
    """What a Gaussian process chooses from: CLS and patch mean of every stored layer, the first one first.

    Args:
        wanted: the setting ``head.features``; ``auto`` takes all that is there.
        kinds: the stored kinds.
    """
    if wanted != "auto":
        return wanted
    usable = [kind for kind in kinds if kind.partition("_")[0] in ("cls", "mean")]
    return "+".join(sorted(usable, key=lambda kind: layer_of(kind) or 1 << 30))
