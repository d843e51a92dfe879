"""`split` as a whole: from a data set to one CSV file per split."""

from __future__ import annotations

import logging
import os
import shlex
from dataclasses import replace
from pathlib import Path

from mirip_fast.config import Config
from mirip_fast.data.csv_reader import shown
from mirip_fast.data.locate import tell_unlisted
from mirip_fast.data.manifest import (
    check_trainable,
    grade_remarks,
    only_graded,
    read_manifest,
    write_manifest_csv,
)
from mirip_fast.data.near_groups import near_labels
from mirip_fast.data.records import DataOptions, Record
from mirip_fast.data.remote import is_remote
from mirip_fast.data.splits import SPLITS, Split, split_manifest
from mirip_fast.errors import DataError, ImageError
from mirip_fast.features.phase_one import open_hashes

log = logging.getLogger(__name__)


def write_split_files(source: Path, config: Config, out: Path | None) -> tuple[Split, list[Path]]:
    """Divide a graded data set and write ``train_metadata.csv`` and so on.

    Where they lie outside the data, a link beside them leads to it: a list is read only with files below its
    folder.

    Args:
        source: folder or CSV file.
        config: the sections data and split are used; content hashes are remembered in its cache folder.
        out: folder for the files; None: beside the data.

    Raises:
        DataError: missing or unreadable files, faulty grades, or too few images.
    """
    whole = read_manifest(source, DataOptions.from_config(config.data))
    tell_unlisted(whole)
    manifest = only_graded(whole)
    manifest.require_files()
    check_trainable(manifest)
    for remark in grade_remarks(manifest):
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
    link = _link_to(manifest.root, folder.absolute())
    files = []
    for name in SPLITS:
        part = divided.part(name)
        if len(part):
            if link is not None:
                part = replace(
                    part, records=[_through(link, manifest.root, r) for r in part.records]
                )
            files.append(folder / f"{name}_metadata.csv")
            write_manifest_csv(files[-1], part)
    return divided, files


def _link_to(root: Path, folder: Path) -> Path | None:
    """A link in ``folder`` to where the images are; None where they are below it, or have an address."""
    if root.is_relative_to(folder) or is_remote(root):
        return None
    link = folder / (root.name or "images")
    try:
        if not os.path.lexists(link):
            link.symlink_to(os.path.relpath(root.resolve(), folder.resolve()))
        if link.resolve() == root.resolve():
            log.info(
                "%s is a link to %s, through which the files name the images",
                *map(shown, (link, root)),
            )
            return link
        why = "can not be made: something else has its name"
    except OSError as error:
        why = f"can not be made ({error.strerror})"
    log.warning(
        "%s: the link to the images %s, so the files have absolute names; give --image-root %s with them",
        *(shown(link), why, shlex.quote(str(root))),
    )
    return None


def _through(link: Path, root: Path, record: Record) -> Record:
    inside = record.path.is_relative_to(root)
    return replace(record, path=link / record.path.relative_to(root)) if inside else record
