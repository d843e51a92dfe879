"""What end-to-end training starts from: a head-only run, an embedded data set, or a plain folder."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mirip_fast.config import Config, DataConfig, EmbedConfig
from mirip_fast.data.csv_reader import shown
from mirip_fast.data.decode_pool import DecodeJob, DecodePool
from mirip_fast.data.manifest import check_trainable, grade_remarks, only_graded, read_manifest
from mirip_fast.data.near_groups import near_labels
from mirip_fast.data.records import DataOptions, Record
from mirip_fast.data.splits import SPLITS, split_manifest
from mirip_fast.data.unlisted import tell_unlisted
from mirip_fast.errors import DataError, ImageError, RunNotFoundError
from mirip_fast.features.command import default_workers
from mirip_fast.features.datasets import newest_graded
from mirip_fast.features.outcomes import warn_of_flat
from mirip_fast.features.phase_one import open_hashes
from mirip_fast.finetune.head_runs import HeadRun
from mirip_fast.ranking.graded import GradedImages, graded_of_dataset, load_split
from mirip_fast.settings import config_from_dict
from mirip_fast.training.run_folder import SPLIT_FILE

log = logging.getLogger(__name__)

_CHECK_SIZE = 32  # pixels: enough to know that an image can be decoded


@dataclass(frozen=True)
class Source:
    """Where a run's images come from.

    Attributes:
        images: with their split.
        data: how they were read.
        embed: backbone and preprocessing.
        name: the folder or CSV file.
        head_run: the run whose head is taken, if any.
    """

    images: GradedImages
    data: DataConfig
    embed: EmbedConfig
    name: str
    head_run: HeadRun | None = None


def source_of_run(head_run: HeadRun, config: Config) -> Source:
    """The images and the split of a head-only run.

    Raises:
        DataError: files are gone, or are not what they were.
    """
    info = head_run.info
    images = load_split(head_run.run.path / SPLIT_FILE, info.tiers, head_run.data)
    check_unchanged(images, Path(config.embed.cache_dir))
    embed = dataclasses.replace(info.embed, cache_dir=config.embed.cache_dir)
    name = str(head_run.run.info.get("dataset", ""))
    return Source(images, head_run.data, embed, name, head_run)


def check_unchanged(images: GradedImages, cache_dir: Path) -> None:
    """Refuse a split whose files are gone or hold something else now.

    Raises:
        DataError: names the first such file, and how many there are.
    """
    paths = [record.path for record in images.manifest.records]
    with open_hashes(cache_dir) as memory:
        known = list(memory.sha256_many(paths))
    wrong = [
        f"{path}: {now if isinstance(now, ImageError) else 'its content changed'}"
        for path, now, then in zip(paths, known, images.hashes, strict=True)
        if now != then
    ]
    if wrong:
        raise DataError(
            f"{len(wrong)} of {len(paths)} images of the run's split are not what they were (first: "
            f"{wrong[0]}). Bring them back, or train anew with --init-from none."
        )


def source_of_data(source: Path | None, config: Config) -> Source:
    """Graded images divided anew: of an embedded data set, else of a folder or CSV file itself.

    Raises:
        RunNotFoundError: no folder was given, and none was ever embedded.
        DataError: faulty grades or too few images.
    """
    cache_dir = Path(config.embed.cache_dir)
    try:
        dataset = newest_graded(cache_dir, source)
    except RunNotFoundError:
        if source is None:
            raise RunNotFoundError(
                "Say which images to train on: `mirip-fast train --full data/`"
            ) from None
        return _source_of_folder(source, config)
    log.info("Data set %s", shown(dataset.source))
    data = config_from_dict({"data": dataset.info["data"]}).data
    return Source(graded_of_dataset(dataset, config.split), data, config.embed, str(dataset.source))


def _source_of_folder(source: Path, config: Config) -> Source:
    whole = read_manifest(source, DataOptions.from_config(config.data))
    tell_unlisted(whole)
    manifest = only_graded(whole)
    manifest.require_files()
    check_trainable(manifest)
    with open_hashes(Path(config.embed.cache_dir)) as memory:
        known = list(memory.sha256_many([record.path for record in manifest.records]))
    reasons = {i: str(sha) for i, sha in enumerate(known) if isinstance(sha, ImageError)}
    reasons |= _undecodable(manifest.records, set(reasons), config)
    if reasons:
        first = next(iter(reasons))
        log.warning(
            "%d of %d images can not be read and are left out (first: %s: %s)",
            len(reasons),
            len(manifest),
            manifest.records[first].path,
            reasons[first],
        )
    good = [i for i in range(len(manifest)) if i not in reasons]
    hashes = [sha for sha in (known[i] for i in good) if isinstance(sha, bytes)]
    manifest = manifest.subset(good)
    for remark in grade_remarks(manifest):
        log.warning(remark)
    split = config.split
    ratios = (split.train_ratio, split.val_ratio, split.test_ratio)
    near = near_labels(split.near_groups, manifest)
    divided = split_manifest(
        manifest, ratios=ratios, seed=split.split_seed, duplicates=hashes, near_groups=near
    )
    log.info("Split %s", ", ".join(f"{name} {divided.assignment.count(name)}" for name in SPLITS))
    images = GradedImages(
        manifest, tuple(hashes), divided.assignment, None if near is None else tuple(near)
    )
    return Source(images, config.data, config.embed, str(manifest.source))


def _undecodable(records: Sequence[Record], known_bad: set[int], config: Config) -> dict[int, str]:
    """Index → reason of the files that no decoder can read."""
    limit = round(config.embed.max_megapixels * 1e6)
    jobs = (
        DecodeJob(i, record.path, (_CHECK_SIZE,), "squash", True, max_pixels=limit)
        for i, record in enumerate(records)
        if i not in known_bad
    )
    reasons, flat = {}, []
    with DecodePool(default_workers(config.embed.workers)) as pool:
        for item in pool.decode(jobs):
            if item.reason is not None:
                reasons[item.index] = item.reason
            elif item.flat:
                flat.append(records[item.index].path)
    warn_of_flat(flat)
    return reasons
