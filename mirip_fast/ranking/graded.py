"""The graded, embedded images that phase two learns from: read, divided, and the settings that follow."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from mirip_fast.config import Config, DataConfig, SplitConfig
from mirip_fast.data.applicants import sets_of
from mirip_fast.data.graders import learned_grades, of_grader
from mirip_fast.data.locate import tell_unlisted
from mirip_fast.data.manifest import (
    check_trainable,
    grade_remarks,
    is_there,
    only_graded,
    read_manifest,
    write_manifest_csv,
)
from mirip_fast.data.remote import is_remote
from mirip_fast.data.sources import keep_indexes_in
from mirip_fast.data.splits import SPLITS, deviation, split_manifest
from mirip_fast.data.table import (
    Manifest,
    given_name,
    joined,
    own_column,
    own_columns,
    read_images,
    write_images,
)
from mirip_fast.errors import ConfigError, DataError, ImageError, StoreError
from mirip_fast.evaluation.metrics import codes_of, ranks
from mirip_fast.features.datasets import Dataset
from mirip_fast.features.embed import open_hashes
from mirip_fast.features.recipe import View, head_kinds, is_patches, layer_of
from mirip_fast.features.store import FeatureStore
from mirip_fast.ranking.rows import ListedPairs, Rows, with_features
from mirip_fast.text import address, closest, nfc, path_of, shown
from mirip_fast.training.run_folder import Run

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

_TRIAL_IMAGES, _TRIAL_EPOCHS = 100, 2


@dataclass(frozen=True, eq=False)
class GradedImages(Manifest):
    """Graded images whose table has ``sha256``, ``split`` and ``near_group`` of each.

    After :meth:`with_scores`, also the scores that a model gave them which had not trained on them.

    Attributes:
        decided: of images taken from others, whether tiers count in those, and so in every part of them, in
            place of several graders' grades (:func:`learned_grades`); None: these are all there are.
    """

    decided: bool | None = None

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        hashes: Sequence[bytes | None],
        splits: Sequence[str],
        near: Sequence[str | None] | None = None,
    ) -> GradedImages:
        """The images of a manifest, with the content [n] and the split [n] of each.

        ``near`` [n]: its group of near duplicates, where a list was given.
        """
        import pandas as pd

        columns = {"sha256": hashes, "split": splits, "near_group": near or [None] * len(splits)}
        more = {name: pd.Series(list(values), dtype=object) for name, values in columns.items()}
        known = {f.name: getattr(manifest, f.name) for f in dataclasses.fields(Manifest)}
        return cls(**known | {"table": manifest.table.assign(**more)})

    @functools.cached_property
    def hashes(self) -> list[bytes]:
        """[n] SHA-256 of each file's content."""
        return self.table["sha256"].tolist()

    @functools.cached_property
    def splits(self) -> list[str]:
        """[n] train, val or test."""
        return self.table["split"].tolist()

    def indexes(self, *splits: str) -> NDArray[np.int64]:
        """Indexes of the images of one split, or of several, ascending."""
        return np.flatnonzero(self.table["split"].isin(splits))

    def part(self, *splits: str) -> GradedImages:
        """The images of one split, or of several."""
        return self.subset(self.indexes(*splits))

    def subset(self, indexes: Iterable[int]) -> GradedImages:
        """The images with these indexes, in the order given."""
        decided = learned_grades(self.table) is None if self.decided is None else self.decided
        return replace(cast(GradedImages, super().subset(indexes)), decided=decided)

    def of_grader(self, grader: str | None) -> GradedImages:
        """The images that one grader graded, with that one's tiers; all as they are for None.

        Raises:
            DataError: there is no such grader.
        """
        if grader is None:
            return self
        theirs = cast(GradedImages, of_grader(self, grader))
        return theirs.subset(np.flatnonzero(theirs.tier_codes >= 0))

    def with_scores(self, scores: NDArray[np.floating], source: str) -> GradedImages:
        """The same with the scores [n] of models that had not trained on them, which ``source`` names."""
        made = np.asarray(scores, np.float64)
        return replace(self, table=self.table.assign(held_out_score=made, held_out_by=source))

    @property
    def scores(self) -> NDArray[np.float64]:
        """[n] held-out scores, in the unit that the run's model scores in; higher is better."""
        return np.array(self.table["held_out_score"], np.float64)

    @property
    def held_out_by(self) -> str:
        """Where the held-out scores come from, the same for all."""
        return str(self.table["held_out_by"].iloc[0])

    @property
    def has_tiers(self) -> bool:
        """Whether every image has a tier."""
        return bool(self.table["tier"].notna().all())

    @property
    def tier_names(self) -> tuple[str, ...]:
        """The tiers, the best first; none where images have none."""
        return self.tiers if self.has_tiers else ()

    @property
    def order(self) -> NDArray[np.int64]:
        """[n] tier of each image, or the rank of its finer grade where there are no tiers; 0 is the best; all
        −1 where there is neither."""
        scores = self.table["tier_score"]
        if self.has_tiers or scores.isna().any():
            return self.tier_codes if self.has_tiers else np.full(len(self), -1, dtype=np.int64)
        return ranks(np.array(scores, np.float64))

    @property
    def needed_tiers(self) -> NDArray[np.int64]:
        """[n] tier of each image, 0 is the best.

        Raises:
            DataError: images have none (a run on judged pairs, or on finer grades alone).
        """
        if not self.has_tiers:
            raise DataError(
                "The run's images have no tiers; this needs them (--data with a tier column, or "
                "--test-data FILE.csv with grades)"
            )
        return self.tier_codes

    @property
    def needed_scores(self) -> NDArray[np.float64]:
        """[n] finer grade of each image, higher is better.

        Raises:
            DataError: images have none; names the first.
        """
        scores = self.table["tier_score"]
        absent = self.table["image_id"][scores.isna()]
        if len(absent):
            raise DataError(
                f"--label tier_score: {len(absent):,} of {len(self):,} images have no number in the column "
                f"{self.options.score_column!r} (first: {absent.iloc[0]}). Fill it, take the "
                "images out, or train on the tiers (--label tier)."
            )
        return np.array(scores, dtype=np.float64)

    @property
    def grades(self) -> NDArray[np.float64] | None:
        """[n, G] of several graders, see :func:`learned_grades`; None where images have no tiers, or where
        tiers count in those that they were taken from."""
        return learned_grades(self.table) if self.has_tiers and not self.decided else None

    def column(self, name: str) -> list[str | None]:
        """[n] values of a CSV column; see :func:`column_of`."""
        return column_of(self, name)

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
        graded = self.has_tiers or label == "tier" if pairs is None else self.has_grades
        grades = None
        if pairs is None and label == "tier" and not self.decided:
            grades = learned_grades(self.table)
        return Rows(
            ids=self.ids,
            features=np.empty((len(self), 0, 0), dtype=np.float32),
            tiers=self.needed_tiers if graded else np.full(len(self), -1, dtype=np.int64),
            groups=self.groups,
            within=None if within is None else pairable(codes_of(self.column(within))),
            tier_scores=self.needed_scores if label == "tier_score" else None,
            grades=None if grades is None else np.nan_to_num(grades, nan=-1).astype(np.int64),
            pairs=pairs,
            sets=sets_of(self) if pairs is None and grades is None else None,
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


def column_of(manifest: Manifest, name: str) -> list[str | None]:
    """[n] values of the column that ``--within`` names.

    Raises:
        DataError: no image has that column; names those there are.
    """
    table, name, options = manifest.table, nfc(name), manifest.options
    if name == options.group_column and options.with_grades:
        return manifest.groups
    known = set(map(given_name, own_columns(table)))
    if table["group"].notna().any():
        known.add(options.group_column)
    if name not in known:
        there = ", ".join(sorted(known)) or "no further columns"
        close = closest(name, known)
        hint = f". Did you mean {close}?" if close else ""
        raise DataError(f"--within {name}: the data has no such column; it has {there}{hint}")
    return [value or None for value in table[own_column(name)]]


def images_of_dataset(dataset: Dataset) -> GradedImages:
    """All embedded images of a data set with the tiers that they have, in no split.

    Raises:
        DataError, StoreError: see :func:`graded_of_dataset`.
    """
    manifest, hashes = _current(dataset, dataset.data)
    return GradedImages.of(manifest, hashes, [""] * len(hashes))


def graded_of_dataset(
    dataset: Dataset,
    split: SplitConfig,
    *,
    need_tiers: bool = True,
    data: DataConfig | None = None,
    grader: str | None = None,
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
        grader: of several, the one whose tiers count; None: all.

    Raises:
        DataError: files that vanished, faulty grades, or too few images.
        StoreError: images were added since the data set was embedded.
    """
    manifest, hashes = _current(dataset, data or dataset.data)
    manifest = of_grader(manifest, grader)
    if need_tiers:
        graded = only_graded(manifest)
        if len(graded) < len(manifest):
            kept = set(graded.ids)
            hashes = [sha for sha, name in zip(hashes, manifest.ids, strict=True) if name in kept]
        manifest = graded
    if need_tiers or manifest.has_grades:
        check_trainable(manifest)
        for remark in grade_remarks(manifest):
            log.warning(remark)
    elif manifest.table["tier"].notna().any():
        log.warning("Not every image has a tier: tiers are left aside, the judged pairs count")
        manifest = manifest.without_tiers()
    return divide(manifest, hashes, split)


def divide(manifest: Manifest, hashes: Sequence[bytes], split: SplitConfig) -> GradedImages:
    """Graded images, divided into train, val and test; says in what shares."""
    divided = split_manifest(manifest, split, hashes)
    table = divided.table
    sizes = ", ".join(f"{name} {(table['split'] == name).sum()}" for name in SPLITS)
    shares = f"; tier shares within {deviation(divided):.1f} points of the whole"
    log.info("Split %s%s", sizes, shares if manifest.has_grades else "")
    return GradedImages.of(manifest, hashes, [*table["split"]], [*table["near_group"]])


def left_out(dataset: Dataset) -> pd.DataFrame:
    """The images of a data set that could not be embedded."""
    images = dataset.images()
    return images[images["status"] == "failed"]


def graded_of_files(
    files: Mapping[str, Path],
    data: DataConfig,
    root: Path,
    cache_dir: Path,
    *,
    need_tiers: bool = True,
    grader: str | None = None,
) -> GradedImages:
    """Graded images from one CSV file per split (``--metadata``, ``--val-metadata``, ``--test-metadata``).

    Raises:
        ConfigError: train or val is missing.
        DataError: a file is faulty, images are missing, or an image is in two splits.
    """
    if not {"train", "val"} <= set(files):
        raise ConfigError("--metadata and --val-metadata belong together: give both")
    data = data if data.image_root is not None else replace(data, image_root=str(root))
    manifests = {name: of_grader(read_manifest(path, data), grader) for name, path in files.items()}
    if need_tiers:
        manifests = {name: only_graded(manifest) for name, manifest in manifests.items()}
    splits: list[str] = []
    for name, manifest in manifests.items():
        manifest.require_files()
        splits += [name] * len(manifest)
    train = manifests["train"]
    whole = dataclasses.replace(train, table=joined([m.table for m in manifests.values()]))
    paths = whole.paths
    with open_hashes(cache_dir) as memory:
        known = list(memory.sha256_many(paths))
    first: dict[bytes, int] = {}
    hashes: list[bytes] = []
    for i, (path, sha) in enumerate(zip(paths, known, strict=True)):
        if isinstance(sha, ImageError):
            raise DataError(f"{path}: {sha}")
        other = first.setdefault(sha, i)
        if splits[other] != splits[i]:
            raise DataError(
                f"{path} (in {files[splits[i]]}) is the same picture as {paths[other]} "
                f"(in {files[splits[other]]}): a picture belongs in one split"
            )
        hashes.append(sha)
    if need_tiers or train.has_grades:
        check_trainable(train)
        for remark in grade_remarks(train):
            log.warning(remark)
    return GradedImages.of(whole, hashes, splits)


def pairable(codes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Codes in which every unknown value (−1) has one of its own: such an image is in no pair."""
    unknown = codes < 0
    return np.where(unknown, codes.max(initial=0) + 1 + np.cumsum(unknown), codes)


def trial(images: GradedImages) -> GradedImages:
    """About 100 of the images, every tier of every split in its share (``--debug``)."""
    if len(images) <= _TRIAL_IMAGES:
        return images
    keys = [*zip(images.splits, images.tier_codes.tolist(), strict=True)]
    order = sorted(range(len(images)), key=lambda i: keys[i])
    places = np.linspace(0, len(order) - 1, _TRIAL_IMAGES)
    return images.subset(sorted({order[int(i)] for i in places}))


def as_trial(config: Config) -> Config:
    """The settings of a training on a :func:`trial`: two epochs, without tracking."""
    log.info("Trial: %d images, %d epochs, no tracking", _TRIAL_IMAGES, _TRIAL_EPOCHS)
    train = replace(config.train, epochs=_TRIAL_EPOCHS)
    return replace(config, train=train, tracking=replace(config.tracking, report_to="none"))


def _current(dataset: Dataset, data: DataConfig) -> tuple[Manifest, list[bytes]]:
    """The data set's manifest as its source reads now, and the hash of each embedded image."""
    known = dataset.images()
    info = dataset.info
    keep_indexes_in(dataset.store_path.parent)
    if is_there(dataset.source):
        manifest = read_manifest(dataset.source, data)
        tell_unlisted(manifest.source, manifest.table["file"])
        if info["limit"]:
            log.info("%s was embedded as a trial of %d images", dataset.source, info["limit"])
            manifest = manifest.subset(range(min(info["limit"], len(manifest))))
    else:
        if is_remote(dataset.source):
            log.info("%s: the grades are those it had when embedded", shown(dataset.source))
        else:
            log.warning("%s is gone: the grades kept in the cache are used", dataset.source)
        tiers, root = data.tier_names(), path_of(info["root"])
        table = known.assign(tier=_with_tiers(known["tier"], tiers))
        manifest = Manifest(dataset.source, root, tiers, table, data.as_read())
    place = {file: i for i, file in enumerate(known["file"])}
    found = np.array([place.get(file, -1) for file in manifest.table["file"]], dtype=np.int64)
    new = manifest.subset(np.flatnonzero(found < 0))
    new.require_files()
    if len(new):
        source = address(dataset.source)
        raise StoreError(
            f"{len(new)} of {len(manifest)} images of {source} are new since it was embedded "
            f"(first: {new.paths[0]}). Run `mirip-fast embed {shlex.quote(source)}` again."
        )
    usable = (known["status"] != "failed").to_numpy()[found]
    if not usable.all():
        log.warning(
            "%d of %d images could not be embedded and are left out (%s)",
            len(usable) - usable.sum(),
            len(manifest),
            dataset.failures_csv,
        )
    hashes = known["sha256"].iloc[found[usable]].tolist()
    return manifest.subset(np.flatnonzero(usable)), hashes


def _with_tiers(kept: pd.Series[Any], tiers: Sequence[str]) -> pd.Series[Any]:
    """A column of tiers as one that counts into ``tiers``.

    Raises:
        DataError: a tier that images have is not among ``tiers``.
    """
    absent = set(kept.dropna()) - set(tiers)
    if absent:
        raise DataError(
            f"--tiers {','.join(tiers)}: the grades kept in the cache have {', '.join(sorted(absent))}, too: "
            "name all tiers, the best first"
        )
    return kept.cat.set_categories(list(tiers), ordered=True)


def save_split(path: Path, images: GradedImages) -> None:
    """Write which image is in which split, with all that evaluating needs."""
    table = images.table
    write_images(
        path, table.drop(columns="near_group") if table["near_group"].isna().all() else table
    )


def load_split(path: Path, tiers: Sequence[str], data: DataConfig | None = None) -> GradedImages:
    """Read what :func:`save_split` wrote.

    Args:
        path: the file, in a run's folder.
        tiers: names of the tiers, best first.
        data: how its columns are called; None: as the run says.

    Raises:
        DataError: the file is missing or damaged.
    """
    try:
        table = read_images(path, tiers, ("split",))
        if not len(table):
            raise ValueError("no image is in it")
    except FileNotFoundError as error:
        raise DataError(
            f"{path} cannot be read: there is none. A shared model knows no images of its own (give "
            "graded ones with --test-data); to a run put back its copy"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    options = (Run(path.parent).data if data is None else data).as_read()
    if "near_group" not in table:
        table["near_group"] = None
    return GradedImages(path, path.parent, tuple(tiers), table, options)


def with_dataset(
    config: Config, dataset: Dataset, readout: str = "head", data: DataConfig | None = None
) -> Config:
    """The settings of a run on ``dataset``: how it was read and embedded is part of the run.

    What this command's options say of data and embedding is put aside, but for the cache folder; the
    features that the head sees are chosen among those that are there. ``data``, where given, says how its
    grades are read.
    """
    embed = replace(dataset.embed, cache_dir=config.embed.cache_dir)
    kinds = dataset.info["kinds"]
    if config.head.features == "auto":
        _tell_of_old_cache(dataset, readout)
    if readout in ("gp", "auto", "ensemble"):
        features = gp_features(config.head.features, kinds)
    elif readout == "attention":
        patches = next(filter(is_patches, kinds), None)
        features = choose_features(config.head.features, kinds)
        if patches is None:
            source = shown(dataset.source)
            again = dataset.embed_command(whole=True, source=source, patches="grid:7")
            raise ConfigError(
                f"--readout attention looks at patch tokens; of {source} there are only {', '.join(kinds)}. "
                f"To add them: {again}"
            )
        if not is_patches(head_kinds(features)[-1]):  # else the grid was named
            features = f"{features}+{patches}"
        log.info("The head sees %s", features)
    else:
        features = choose_features(config.head.features, kinds)
        if features != config.head.features:
            log.info("The head sees %s", features)
    check_kinds(features, readout)
    head = dataclasses.replace(config.head, features=features)
    return dataclasses.replace(config, data=data or dataset.data, embed=embed, head=head)


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
            shown(dataset.source), " and ".join(lacks),
            dataset.embed_command(whole=True, source=shown(dataset.source)),
        )  # fmt: skip


def check_kinds(features: str, readout: str) -> None:
    """Refuse ``--features`` that are none, and patch tokens where only their mean can be looked at.

    Raises:
        ConfigError: says what can be named.
    """
    single = r"(cls|mean)(_[1-9]\d*)?"
    patches = r"\+(grid[1-9]\d*|patch)" if readout == "attention" else ""
    if not re.fullmatch(rf"{single}(\+{single})*{patches}", features):
        raise ConfigError(
            f"--features {features}: name kinds like cls, mean, cls_9 or mean_9, joined by +"
            + (
                "; then a grid or patch"
                if patches
                else "; patch tokens go with --readout attention"
            )
        )


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
    usable = [kind for kind in kinds if kind.partition("_")[0] in ("cls", "mean", "std")]
    return "+".join(sorted(usable, key=lambda kind: layer_of(kind) or 1 << 30))


def write_split_files(
    source: Path, config: Config, out: Path | None
) -> tuple[Manifest, list[Path]]:
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
    import pandas as pd

    whole = read_manifest(source, config.data)
    tell_unlisted(whole.source, whole.table["file"])
    manifest = only_graded(whole)
    manifest.require_files()
    check_trainable(manifest)
    for remark in grade_remarks(manifest):
        log.warning(remark)
    paths = manifest.paths
    with open_hashes(Path(config.embed.cache_dir)) as memory:
        hashes = list(memory.sha256_many(paths))
    for path, sha in zip(paths, hashes, strict=True):
        if isinstance(sha, ImageError):
            raise DataError(f"{path}: {sha}")
    divided = split_manifest(manifest, config.split, hashes)
    folder = out or manifest.root
    folder.mkdir(parents=True, exist_ok=True)
    link = _link_to(manifest.root, folder.absolute())
    files = []
    for name in SPLITS:
        part = divided.subset(np.flatnonzero(divided.table["split"] == name))
        if len(part):
            if link is not None:
                root = manifest.root
                files_there = [
                    str(link / p.relative_to(root) if p.is_relative_to(root) else p)
                    for p in part.paths
                ]
                table = part.table.assign(file=pd.Series(files_there, dtype=object))
                part = replace(part, table=table)
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
        why = "cannot be made: something else has its name"
    except OSError as error:
        why = f"cannot be made ({error.strerror})"
    log.warning(
        "%s: the link to the images %s, so the files have absolute names; give --image-root %s with them",
        *(shown(link), why, shlex.quote(str(root))),
    )
    return None
