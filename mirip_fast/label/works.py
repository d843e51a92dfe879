"""The works that are judged: embedded where they are not yet, divided as training will divide them."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mirip_fast.config import Config
from mirip_fast.data.csv_reader import counted, shown
from mirip_fast.data.records import Record
from mirip_fast.data.splits import SPLITS
from mirip_fast.errors import DataError
from mirip_fast.features.command import embed_data
from mirip_fast.features.datasets import Dataset, find_datasets
from mirip_fast.features.embed import Progress
from mirip_fast.features.on_demand import embed_options
from mirip_fast.features.pooling import head_kinds
from mirip_fast.features.store import FeatureStore
from mirip_fast.ranking.dataset_settings import gp_features
from mirip_fast.ranking.graded import GradedImages, graded_of_dataset, left_out
from mirip_fast.ranking.rows import read_features
from mirip_fast.settings import Resolved, config_from_dict
from mirip_fast.text import nfc

log = logging.getLogger(__name__)

Index = NDArray[np.int64]
#: Settings that only say how fast or where to embed, and not what.
_HOW = {"embed.cache_dir", "embed.workers", "embed.embed_batch_size", "embed.compile"}


@dataclass(frozen=True)
class Works:
    """n works of a data set, in the order of training.

    Attributes:
        dataset: the embedded data set.
        images: the works, each with its content hash and its split.
        others: images of the data set that could not be embedded; a file of pairs may name them.
        shown: [n] bool; the others are never put before the judge.
        features: [n, D] float32, CLS and patch mean of every stored layer, of the base view.
        blocks: numbers per kind in a row of features.
        store: where the features are.
    """

    dataset: Dataset
    images: GradedImages
    others: Sequence[Record]
    shown: NDArray[np.bool_]
    features: NDArray[np.float32]
    blocks: Sequence[int]
    store: FeatureStore

    def __len__(self) -> int:
        return len(self.images)

    def name(self, number: int) -> str:
        """What a file of pairs calls a work: its file, as the data set names it."""
        return _name(self.images.manifest.records[number])

    def path(self, number: int) -> Path:
        """The file of a work."""
        return self.images.manifest.records[number].path

    def in_split(self, split: str) -> Index:
        """The works of one split that may be shown."""
        here = np.array(self.images.splits) == split
        return np.flatnonzero(here & self.shown)


def prepare_works(
    folder: Path,
    resolved: Resolved,
    *,
    command: str = "",
    progress: Callable[[Progress], None] = lambda _: None,
) -> Works:
    """Embed what is missing and take the works as ``train --pairs`` will take them.

    A folder that was embedded before is embedded as it was then; a new one as the newest data set of the
    cache was, so that its models fit; without any, as the settings say. Settings that are given count.

    Args:
        folder: folder of images, with grades or without, or a CSV file.
        resolved: the settings, and which of them were given.
        command: what is running, for whoever finds the store locked.
        progress: called while images are embedded.

    Raises:
        DataError: no image can be read, or there are too few to compare.
        BackboneError: features are missing and the backbone can not be found.
    """
    config = _as_embedded(folder, resolved)
    done = embed_data(folder, config, command=command, progress=progress)
    if done.dataset is None:
        raise DataError("label runs as one process: start it without torchrun")
    dataset = done.dataset
    images = graded_of_dataset(dataset, config.split, need_tiers=False)
    store = FeatureStore.open(dataset.store_path)
    features, blocks = preference_rows(dataset, store, images.hashes, config)
    keep = _may_be_shown(images)
    works = Works(dataset, images, left_out(dataset), keep, features, blocks, store)
    for split in SPLITS[:2]:
        if len(works.in_split(split)) < 2:
            raise DataError(
                f"{shown(folder)}: the {split} split has {counted(len(works.in_split(split)), 'work')} that "
                f"can be compared; two are needed. {counted(int(works.shown.sum()), 'work')} can be shown in "
                "all: add images, or give larger shares (--train-ratio 0.6 --val-ratio 0.3 --test-ratio 0.1)."
            )
    return works


def preference_rows(
    dataset: Dataset, store: FeatureStore, hashes: Sequence[bytes], config: Config
) -> tuple[NDArray[np.float32], Sequence[int]]:
    """What judgements are learned from: [n, D] features of the base view, and numbers per kind.

    Raises:
        StoreError: features are missing.
    """
    kind = gp_features(config.head.features, dataset.info["kinds"])
    rows = read_features(store, hashes, kind, dataset.views()[:1])[:, 0]
    count = len(head_kinds(kind))
    return rows, [rows.shape[1] // count] * count


def _as_embedded(folder: Path, resolved: Resolved) -> Config:
    config = resolved.config
    said = [key for key in resolved.given if key.startswith("embed.") and key not in _HOW]
    cache = Path(config.embed.cache_dir)
    datasets = find_datasets(cache)
    same = next((dataset for dataset in datasets if dataset.is_called(folder)), None)
    if same is not None:
        data = config_from_dict({"data": same.info["data"]}).data
        if not any(key.startswith("data.") for key in resolved.given):
            config = dataclasses.replace(config, data=data)
    model = same or next(iter(datasets), None)
    if said or model is None:
        return config
    embed = dataclasses.replace(
        embed_options(model),
        cache_dir=config.embed.cache_dir,
        workers=config.embed.workers,
        embed_batch_size=config.embed.embed_batch_size,
        compile=False,
    )
    return dataclasses.replace(config, embed=embed)


def _name(record: Record) -> str:
    return record.filename or record.image_id


def _may_be_shown(images: GradedImages) -> NDArray[np.bool_]:
    """Leave out what no file of pairs can name, links that lead elsewhere, and second copies; tell it."""
    manifest = images.manifest
    places = {place.resolve() for place in (manifest.root, *manifest.places)}
    composed = [nfc(_name(record)) for record in manifest.records]
    times = Counter(composed)
    keep = np.ones(len(images), dtype=bool)
    seen: set[bytes] = set()
    reasons: Counter[str] = Counter()
    for i, (record, sha) in enumerate(zip(manifest.records, images.hashes, strict=True)):
        real = record.path.resolve()
        if not any(real.is_relative_to(place) for place in places):
            why = "outside the folder (a link, or a path in the CSV file)"
        elif not _can_be_written(_name(record)) or times[composed[i]] > 1:
            why = "with a name that no CSV file can hold or tell apart"
        elif sha in seen:
            why = "with the same bytes as another"
        else:
            seen.add(sha)
            continue
        keep[i] = False
        reasons[why] += 1
    for why, count in reasons.items():
        log.warning("%s not shown: %s", counted(count, "work"), why)
    return keep


def _can_be_written(name: str) -> bool:
    """Whether the name comes back as it is from a CSV file in UTF-8, whose cells lose blanks around them."""
    return (
        name == name.strip()
        and "\0" not in name
        and not any(0xD800 <= ord(c) < 0xE000 for c in name)
    )
