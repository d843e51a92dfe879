"""`split` as a whole: from a data set to one CSV file per split."""

from __future__ import annotations

import logging
from pathlib import Path

from mirip_fast.config import Config
from mirip_fast.data.manifest import (
    check_trainable,
    imbalance_remark,
    only_graded,
    read_manifest,
    write_manifest_csv,
)
from mirip_fast.data.near_groups import near_labels
from mirip_fast.data.records import DataOptions
from mirip_fast.data.splits import SPLITS, Split, split_manifest
from mirip_fast.errors import DataError, ImageError
from mirip_fast.features.phase_one import open_hashes

log = logging.getLogger(__name__)


def write_split_files(source: Path, config: Config, out: Path | None) -> tuple[Split, list[Path]]:
    """Divide a graded data set and write ``train_metadata.csv`` and so on.

    Args:
        source: folder or CSV file.
        config: the sections data and split are used; content hashes are remembered in its cache folder.
        out: folder for the files; None: beside the data.

    Raises:
        DataError: missing or unreadable files, faulty grades, or too few images.
    """
    manifest = only_graded(read_manifest(source, DataOptions.from_config(config.data)))
    manifest.require_files()
    check_trainable(manifest)
    remark = imbalance_remark(manifest)
    if remark:
        log.warning(remark)
    paths = [record.path for record in manifest.records]
    with open_hashes(Path(config.embed.cache_dir)) as memory:
        hashes = list(memory.sha256_many(paths))
    for path, sha in zip(paths, hashes, strict=True):
        if isinstance(sha, ImageError):
            raise DataError(f"{path}: {sha}")
    ratios = (config.split.train_ratio, config.split.val_ratio, config.split.test_ratio)
    divided = split_manifest(
        manifest,
        ratios=ratios,
        seed=config.split.split_seed,
        duplicates=hashes,
        near_groups=near_labels(config.split.near_groups, manifest),
    )
    folder = out or manifest.root
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name in SPLITS:
        part = divided.part(name)
        if len(part):
            files.append(folder / f"{name}_metadata.csv")
            write_manifest_csv(files[-1], part)
    return divided, files
