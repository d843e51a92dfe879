"""The graded, embedded images that phase two learns from: read, divided, and the settings that follow."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mirip_fast.config import Config, DataConfig, EmbedConfig, SplitConfig
from mirip_fast.data.csv_reader import closest, shown
from mirip_fast.data.locate import tell_unlisted
from mirip_fast.data.manifest import (
    check_trainable,
    grade_remarks,
    only_graded,
    read_manifest,
    write_manifest_csv,
)
from mirip_fast.data.near_groups import near_labels
from mirip_fast.data.records import DataOptions, Manifest, Record
from mirip_fast.data.remote import address, is_remote, path_of
from mirip_fast.data.source_lists import is_there
from mirip_fast.data.sources import keep_indexes_in
from mirip_fast.data.splits import SPLITS, Split, split_manifest
from mirip_fast.errors import ConfigError, DataError, ImageError, StoreError
from mirip_fast.evaluation.metrics import codes_of, ranks
from mirip_fast.features.datasets import Dataset, Entry
from mirip_fast.features.phase_one import open_hashes
from mirip_fast.features.recipe import View, head_kinds, is_patches, layer_of
from mirip_fast.features.store import FeatureStore
from mirip_fast.files import read_csv, write_csv
from mirip_fast.ranking.rows import ListedPairs, Rows, with_features
from mirip_fast.settings import config_from_dict
from mirip_fast.text import nfc

log = logging.getLogger(__name__)

_SPLIT_COLUMNS = (
    "image_id", "split", "path", "tier", "tier_score", "group", "near_group", "sha256", "extra",
)  # fmt: skip


@dataclass(frozen=True)
class GradedImages:
    """Graded images with the content hash of each and the split it belongs to."""

    manifest: Manifest
    hashes: tuple[bytes, ...]
    splits: tuple[str, ...]  # train, val or test for each record
    near: tuple[str | None, ...] | None = (
        None  # its group of near duplicates, where a list was given
    )

    def part(self, *splits: str) -> GradedImages:
        """The images of one split, or of several."""
        return self.subset([i for i, name in enumerate(self.splits) if name in splits])

    def subset(self, index: Iterable[int]) -> GradedImages:
        """The images with these indexes, in the order given."""
        index = [int(i) for i in index]
        return GradedImages(
            self.manifest.subset(index),
            tuple(self.hashes[i] for i in index),
            tuple(self.splits[i] for i in index),
            None if self.near is None else tuple(self.near[i] for i in index),
        )

    def __len__(self) -> int:
        return len(self.hashes)

    @property
    def has_tiers(self) -> bool:
        """Whether every image has a tier."""
        return all(record.tier is not None for record in self.manifest.records)

    @property
    def tier_names(self) -> tuple[str, ...]:
        """The tiers, the best first; none where images have none."""
        return self.manifest.tiers if self.has_tiers else ()

    @property
    def order(self) -> NDArray[np.int64]:
        """[n] tier of each image, or the rank of its finer grade where there are no tiers; 0 is the best.

        Raises:
            DataError: images have neither.
        """
        if self.has_tiers or any(record.tier_score is None for record in self.manifest.records):
            return self.tiers
        return ranks(self.tier_scores)

    @property
    def tiers(self) -> NDArray[np.int64]:
        """[n] tier of each image, 0 is the best.

        Raises:
            DataError: images have none (a run on judged pairs, or on finer grades alone).
        """
        if not self.has_tiers:
            raise DataError(
                "The run's images have no tiers; this needs them (--data with a tier column, or "
                "--test-data FILE.csv with grades)"
            )
        return np.array([record.tier for record in self.manifest.records], dtype=np.int64)

    @property
    def tier_scores(self) -> NDArray[np.float64]:
        """[n] finer grade of each image, higher is better.

        Raises:
            DataError: images have none; names the first.
        """
        scores = [record.tier_score for record in self.manifest.records]
        absent = [r for r in self.manifest.records if r.tier_score is None]
        if absent:
            raise DataError(
                f"--label tier_score: {len(absent):,} of {len(self):,} images have no number in the column "
                f"{self.manifest.options.score_column!r} (first: {absent[0].image_id}). Fill it, take the "
                "images out, or train on the tiers (--label tier)."
            )
        return np.array(scores, dtype=np.float64)

    def column(self, name: str) -> list[str | None]:
        """[n] values of a CSV column.

        Raises:
            DataError: no image has that column; names those there are.
        """
        records, name = self.manifest.records, nfc(name)
        if name == self.manifest.options.group_column:
            return [record.group for record in records]
        known = {key for record in records for key in record.extra}
        if any(record.group is not None for record in records):
            known.add(self.manifest.options.group_column)
        if name not in known:
            there = ", ".join(sorted(known)) or "no further columns"
            close = closest(name, known)
            hint = f". Did you mean {close}?" if close else ""
            raise DataError(f"--within {name}: the data has no such column; it has {there}{hint}")
        return [record.extra.get(name) or None for record in records]

    def labels(
        self, within: str | None, *, label: str = "tier", pairs: ListedPairs | None = None
    ) -> Rows:
        """What is known of the images but their features, which are left empty.

        Args:
            within: column inside which pairs count, or None.
            label: ``tier_score`` reads the finer grades too.
            pairs: judged pairs of these images; without tiers they are all there is to learn from.

        Raises:
            DataError: grades or the column are missing.
        """
        graded = self.has_tiers or label == "tier" if pairs is None else self.manifest.has_grades
        return Rows(
            ids=[record.image_id for record in self.manifest.records],
            features=np.empty((len(self), 0, 0), dtype=np.float32),
            tiers=self.tiers if graded else np.full(len(self), -1, dtype=np.int64),
            groups=[record.group for record in self.manifest.records],
            within=None if within is None else pairable(codes_of(self.column(within))),
            tier_scores=self.tier_scores if label == "tier_score" else None,
            pairs=pairs,
        )

    def rows(
        self,
        store: FeatureStore,
        features: str,
        views: Sequence[View],
        within: str | None,
        *,
        label: str = "tier",
        pairs: ListedPairs | None = None,
    ) -> Rows:
        """The images' cached features in memory, and their :meth:`labels`.

        Raises:
            DataError: grades or the column are missing.
            StoreError: features are missing.
        """
        labels = self.labels(within, label=label, pairs=pairs)
        return with_features(labels, store, self.hashes, features, views)


def graded_of_dataset(
    dataset: Dataset,
    split: SplitConfig,
    *,
    need_tiers: bool = True,
    data: DataConfig | None = None,
) -> GradedImages:
    """The graded images of an embedded data set, divided anew.

    Grades are read again from the data set's own file, so that a grade corrected after embedding
    counts. Images that could not be embedded are left out and told.

    Args:
        dataset: the data set.
        split: shares and seed.
        need_tiers: leave out images without a tier and refuse a data set that has none; else the images of
            one that has tiers for only some, or for none, are all taken as without.
        data: what its columns and tiers are called; None: as when it was embedded.

    Raises:
        DataError: files that vanished, faulty grades, or too few images.
        StoreError: images were added since the data set was embedded.
    """
    manifest, hashes = _current(dataset, data or DataConfig(**dataset.info["data"]))
    if need_tiers:
        graded = only_graded(manifest)
        if len(graded) < len(manifest):
            kept = {record.image_id for record in graded.records}
            rows = zip(hashes, manifest.records, strict=True)
            hashes = [sha for sha, record in rows if record.image_id in kept]
        manifest = graded
    if need_tiers or manifest.has_grades:
        check_trainable(manifest)
        for remark in grade_remarks(manifest):
            log.warning(remark)
    elif any(record.tier is not None for record in manifest.records):
        log.warning("Not every image has a tier: tiers are left aside, the judged pairs count")
        records = tuple(dataclasses.replace(r, tier=None) for r in manifest.records)
        manifest = dataclasses.replace(manifest, records=records)
    ratios = (split.train_ratio, split.val_ratio, split.test_ratio)
    near = near_labels(split.near_groups, manifest)
    divided = split_manifest(
        manifest, ratios=ratios, seed=split.split_seed, duplicates=hashes, near_groups=near
    )
    sizes = ", ".join(f"{name} {divided.assignment.count(name)}" for name in SPLITS)
    shares = f"; tier shares within {divided.deviation():.1f} points of the whole"
    log.info("Split %s%s", sizes, shares if manifest.has_grades else "")
    return GradedImages(
        manifest, tuple(hashes), divided.assignment, None if near is None else tuple(near)
    )


def left_out(dataset: Dataset) -> list[Record]:
    """The images of a data set that could not be embedded."""
    return [entry.record for entry in dataset.entries() if entry.outcome.status == "failed"]


def graded_of_files(
    files: dict[str, Path],
    data: DataConfig,
    root: Path,
    cache_dir: Path,
    *,
    need_tiers: bool = True,
) -> GradedImages:
    """Graded images from one CSV file per split (``--metadata``, ``--val-metadata``, ``--test-metadata``).

    Raises:
        ConfigError: train or val is missing.
        DataError: a file is faulty, images are missing, or an image is in two splits.
    """
    if not {"train", "val"} <= set(files):
        raise ConfigError("--metadata and --val-metadata belong together: give both")
    options = DataOptions.from_config(data)
    if options.image_root is None:
        options = DataOptions.from_config(DataConfig(**{**vars(data), "image_root": str(root)}))
    manifests = {name: read_manifest(path, options) for name, path in files.items()}
    if need_tiers:
        manifests = {name: only_graded(manifest) for name, manifest in manifests.items()}
    records: list[Record] = []
    splits: list[str] = []
    for name, manifest in manifests.items():
        manifest.require_files()
        records += manifest.records
        splits += [name] * len(manifest)
    with open_hashes(cache_dir) as memory:
        known = list(memory.sha256_many([record.path for record in records]))
    first: dict[bytes, int] = {}
    hashes: list[bytes] = []
    for i, (record, sha) in enumerate(zip(records, known, strict=True)):
        if isinstance(sha, ImageError):
            raise DataError(f"{record.path}: {sha}")
        other = first.setdefault(sha, i)
        if splits[other] != splits[i]:
            raise DataError(
                f"{record.path} (in {files[splits[i]]}) is the same picture as {records[other].path} "
                f"(in {files[splits[other]]}): a picture belongs in one split"
            )
        hashes.append(sha)
    train = manifests["train"]
    if need_tiers or train.has_grades:
        check_trainable(train)
        for remark in grade_remarks(train):
            log.warning(remark)
    whole = Manifest(
        train.source, train.root, train.tiers, tuple(records), train.options, train.places
    )
    return GradedImages(whole, tuple(hashes), tuple(splits))


def pairable(codes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Codes in which every unknown value (−1) has one of its own: such an image is in no pair."""
    unknown = codes < 0
    return np.where(unknown, codes.max(initial=0) + 1 + np.cumsum(unknown), codes)


def trial(images: GradedImages, n: int) -> GradedImages:
    """About ``n`` of the images, every tier of every split in its share (``--debug``)."""
    if len(images) <= n:
        return images
    keys = [(s, r.tier or 0) for s, r in zip(images.splits, images.manifest.records, strict=True)]
    order = sorted(range(len(images)), key=lambda i: keys[i])
    index = sorted({order[int(i)] for i in np.linspace(0, len(order) - 1, n)})
    return images.subset(index)


def _current(dataset: Dataset, data: DataConfig) -> tuple[Manifest, list[bytes]]:
    """The data set's manifest as its source reads now, and the hash of each embedded image."""
    entries = dataset.entries()
    info = dataset.info
    options = DataOptions.from_config(data)
    keep_indexes_in(dataset.store_path.parent)
    if is_there(dataset.source):
        manifest = read_manifest(dataset.source, options)
        tell_unlisted(manifest)
        if info["limit"]:
            log.info("%s was embedded as a trial of %d images", dataset.source, info["limit"])
            manifest = manifest.subset(range(min(info["limit"], len(manifest))))
        manifest.require_files()
    else:
        if is_remote(dataset.source):
            log.info("%s: the grades are those it had when embedded", shown(dataset.source))
        else:
            log.warning("%s is gone: the grades kept in the cache are used", dataset.source)
        records = _with_tiers([entry.record for entry in entries], info["tiers"], options.tiers)
        root = path_of(info["root"])
        manifest = Manifest(dataset.source, root, options.tiers, tuple(records), options)
    by_path = {entry.record.path: entry for entry in entries}
    found = [by_path.get(record.path) for record in manifest.records]
    _refuse_new(dataset, manifest, found)
    failed = [entry for entry in found if entry is not None and entry.outcome.status == "failed"]
    if failed:
        log.warning(
            "%d of %d images could not be embedded and are left out (%s)",
            len(failed),
            len(manifest),
            dataset.failures_csv,
        )
    usable = [i for i, entry in enumerate(found) if entry and entry.outcome.status != "failed"]
    hashes = [entry.outcome.sha256 for entry in (found[i] for i in usable) if entry]
    return manifest.subset(usable), [sha for sha in hashes if sha is not None]


def _with_tiers(records: list[Record], kept: Sequence[str], tiers: Sequence[str]) -> list[Record]:
    """Records whose tier counts into ``kept``, counted into ``tiers``.

    Raises:
        DataError: a tier that records have is not among ``tiers``.
    """
    if tuple(kept) == tuple(tiers):
        return records
    absent = {kept[r.tier] for r in records if r.tier is not None} - set(tiers)
    if absent:
        raise DataError(
            f"--tiers {','.join(tiers)}: the grades kept in the cache have {', '.join(sorted(absent))}, too: "
            "name all tiers, the best first"
        )
    return [
        record
        if record.tier is None
        else dataclasses.replace(record, tier=tiers.index(kept[record.tier]))
        for record in records
    ]


def _refuse_new(dataset: Dataset, manifest: Manifest, found: Sequence[Entry | None]) -> None:
    source = address(dataset.source)
    new = [record for record, entry in zip(manifest.records, found, strict=True) if entry is None]
    if new:
        raise StoreError(
            f"{len(new)} of {len(manifest)} images of {source} are new since it was embedded "
            f"(first: {new[0].path}). Run `mirip-fast embed {shlex.quote(source)}` again."
        )


def save_split(path: Path, images: GradedImages) -> None:
    """Write which image is in which split, with all that evaluating needs."""
    tiers = images.manifest.tiers
    rows: list[dict[str, Any]] = []
    near = images.near or (None,) * len(images)
    for record, sha, split, near_group in zip(
        images.manifest.records, images.hashes, images.splits, near, strict=True
    ):
        extra = json.dumps(record.extra, ensure_ascii=False) if record.extra else None
        rows.append(
            {
                "image_id": record.image_id,
                "split": split,
                "path": address(record.path),
                "tier": None if record.tier is None else tiers[record.tier],
                "tier_score": record.tier_score,
                "group": record.group,
                "near_group": near_group,
                "sha256": sha.hex(),
                "extra": extra,
            }
        )
    write_csv(path, _SPLIT_COLUMNS, rows)


def load_split(path: Path, tiers: Sequence[str], data: DataConfig) -> GradedImages:
    """Read what :func:`save_split` wrote.

    Raises:
        DataError: the file is missing or damaged.
    """
    names = list(tiers)
    records, hashes, splits = [], [], []
    near: list[str | None] = []
    try:
        # Older runs have no near_group.
        for row in read_csv(path, [name for name in _SPLIT_COLUMNS if name != "near_group"]):
            records.append(
                Record(
                    image_id=row["image_id"],
                    path=path_of(row["path"]),
                    tier=names.index(row["tier"]) if row["tier"] else None,
                    tier_score=float(row["tier_score"]) if row["tier_score"] else None,
                    group=row["group"] or None,
                    extra=json.loads(row["extra"]) if row["extra"] else {},
                )
            )
            hashes.append(bytes.fromhex(row["sha256"]))
            splits.append(row["split"])
            near.append(row.get("near_group") or None)
        if not records:
            raise ValueError("no image is in it")
    except FileNotFoundError as error:
        raise DataError(
            f"{path} can not be read: there is none. A shared model knows no images of its own (give "
            "graded ones with --test-data); to a run put back its copy"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} can not be read: {error}") from error
    options = DataOptions.from_config(data)
    manifest = Manifest(path, path.parent, tuple(names), tuple(records), options)
    return GradedImages(manifest, tuple(hashes), tuple(splits), tuple(near) if any(near) else None)


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
