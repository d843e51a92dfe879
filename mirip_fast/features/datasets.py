"""Data sets that were embedded: a manifest per data set, beside the store that holds its features.

``cache/<fingerprint>/datasets/<name>/`` holds ``dataset.json`` (where the data came from and how it was
read), ``manifest.csv`` (the ledger: one line per input, with its grade, its content hash and what became
of it) and ``failures.csv`` (path, reason).
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mirip_fast.config import DataConfig, EmbedConfig
from mirip_fast.data.remote import located
from mirip_fast.data.table import COLUMNS, Manifest, own_columns, read_images, write_images
from mirip_fast.errors import RunNotFoundError, StoreError
from mirip_fast.features.recipe import Recipe, View, series_name
from mirip_fast.features.shards import unreadable
from mirip_fast.features.store import listed
from mirip_fast.files import (
    LIST_FILE,
    fsync_folder,
    has_file,
    list_files,
    read_json,
    scratch_folder,
    write_csv,
    write_json,
)
from mirip_fast.settings import config_from_dict, settings, yaml_text
from mirip_fast.text import address, path_of

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

_FOLDER = "datasets"
_INFO_FILE = "dataset.json"
_LEDGER = "manifest.csv"
#: What dataset.json holds, as far as anything depends on it.
_INFO: dict[str, Any] = {
    "source": str, "root": str, "tiers": list, "graded": bool, "images": int, "failed": int,
    "limit": int | None, "backbone": str, "views": list, "kinds": list, "data": dict, "embed": dict,
    "embedded_at": str,
}  # fmt: skip


@dataclass(frozen=True)
class Dataset:
    """One embedded data set."""

    folder: Path  # where its manifest lies

    @property
    def info(self) -> dict[str, Any]:
        """The content of dataset.json.

        Raises:
            StoreError: it is damaged.
        """
        path = self.folder / _INFO_FILE
        try:
            info = read_json(path)
            _check_info(info)
            return info
        except OSError as error:
            raise unreadable(path, error) from error
        except ValueError as error:
            raise StoreError(
                f"{path} cannot be read ({error}); remove its folder and run `mirip-fast embed` again"
            ) from error

    @property
    def data(self) -> DataConfig:
        """How its source was read."""
        return config_from_dict({"data": self.info["data"]}).data

    @property
    def embed(self) -> EmbedConfig:
        """How it was embedded."""
        return config_from_dict({"embed": self.info["embed"]}).embed

    @property
    def store_path(self) -> Path:
        """The store with its features."""
        return self.folder.parent.parent

    @property
    def source(self) -> Path:
        """What was given to embed: a folder, CSV file, tar, pattern of tars, or address of one."""
        return path_of(self.info["source"])

    @property
    def failures_csv(self) -> Path:
        """The list of inputs that could not be embedded."""
        return self.folder / "failures.csv"

    @property
    def embedded_at(self) -> datetime:
        """When its ledger was written."""
        return datetime.fromisoformat(self.info["embedded_at"])

    def is_called(self, path: Path) -> bool:
        """Whether ``path`` names it: what was given to embed, or the folder of that CSV file or tars."""
        path = located(path)
        names = {self.source, path_of(self.info["root"])}
        if len(names) > 1:  # a CSV file
            names.add(self.source.parent)
        return path.resolve() in {name.resolve() for name in names}

    def views(self) -> tuple[View, ...]:
        """The views that were embedded, the base view first."""
        return tuple(View(int(size), bool(flip)) for size, flip in self.info["views"])

    def series(self) -> list[str]:
        """The series that its features are in: every view of every kind of token."""
        return [series_name(view, kind) for view in self.views() for kind in self.info["kinds"]]

    def embed_command(self, *, whole: bool = False, source: str | None = None, **other: str) -> str:
        """What to type to embed it again as it was embedded, or not as a trial, another source in the same
        way, or with ``other`` settings; what is there is not computed again."""
        info = self.info
        # Earlier versions did not apply colour profiles.
        info["embed"] = {"colours": "stored", **info["embed"], **other}
        words = ["mirip-fast", "embed", source or info["source"]]
        for setting in settings("embed", "data"):
            value = info[setting.section].get(setting.name, setting.default)
            if setting.name == "cache_dir":
                value = str(self.store_path.parent)
            if value == setting.default:
                continue
            if setting.kind is bool:
                words.append(setting.flag if value else f"--no-{setting.flag[2:]}")
            else:
                words += [setting.flag, value if isinstance(value, str) else yaml_text(value)]
        if info["limit"] is not None and not whole:
            words += ["--limit", str(info["limit"])]
        return shlex.join(words)

    def hashes(self) -> set[bytes]:
        """The content hashes of its images that have features."""
        return set(self.embedded()["sha256"])

    def embedded(self) -> pd.DataFrame:
        """Those of its :meth:`images` that have features."""
        images = self.images()
        return images[images["status"] != "failed"].reset_index(drop=True)

    def images(self) -> pd.DataFrame:
        """The ledger: its images in the order of the data, see :mod:`mirip_fast.data.table`.

        Raises:
            StoreError: it is damaged.
        """
        path = self.folder / _LEDGER
        info = self.info
        try:
            images = read_images(path, info["tiers"], ("status", "reason"))
            if len(images) != info["images"]:
                raise ValueError(f"{len(images)} of {info['images']} images are in it")
            return images
        except (OSError, ValueError) as error:
            raise StoreError(
                f"{path} cannot be read ({error}); run `mirip-fast embed {info['source']}` again"
            ) from error


def dataset_folder(store_path: Path, manifest: Manifest) -> Path:
    """Where a data set's ledger lies: by the name of its folder and its whole path."""
    key = hashlib.sha256(str(manifest.source).encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return store_path / _FOLDER / f"{_name_of(manifest)}-{key}"


def save_dataset(
    store_path: Path,
    manifest: Manifest,
    images: pd.DataFrame,
    recipe: Recipe,
    data: DataConfig,
    embed: EmbedConfig,
    *,
    limit: int | None = None,
    backbones: Sequence[str] = (),
) -> Dataset:
    """Write a data set's ledger and description beside the store.

    It is written even where it says nothing new: training takes the data set that was embedded last. Only
    where it cannot be written (a read-only disk) one that says the same stays and serves.

    Args:
        store_path: the store's folder.
        manifest: the inputs.
        images: its table, and what became of each.
        recipe: what was computed.
        data: how the data was read, so that training reads it the same way.
        embed: how it was embedded.
        limit: the trial's number of images, where it was one.
        backbones: all that the same command embeds it with.

    Raises:
        DiskFullError: there is no room for it.
        StoreError: it cannot be written, and there is none that says the same.
    """
    dataset = Dataset(dataset_folder(store_path, manifest))
    info = {
        "name": _name_of(manifest),
        "source": address(manifest.source),
        "root": address(manifest.root),
        "tiers": list(manifest.tiers),
        # Faulty grades count: training tells what is wrong with them.
        "graded": bool(images[["tier", "tier_score"]].notna().any(axis=None)),
        "images": len(manifest),
        "failed": int((images["status"] == "failed").sum()),
        "limit": limit,
        "backbone": recipe.backbone.name,
        "views": [[view.size, view.flip] for view in recipe.views],
        "kinds": list(recipe.kinds),
        "data": asdict(data),
        "embed": asdict(embed),
        "embedded_at": datetime.now().astimezone().isoformat(timespec="microseconds"),
    }
    if len(backbones) > 1:
        info["backbones"] = list(backbones)
    try:
        _write(dataset, images, info)
    except StoreError:
        raise
    except OSError as error:
        what = f"{error.filename or dataset.folder} cannot be written ({error.strerror})"
        if not _says_the_same(dataset, images, info):
            raise StoreError(
                f"{what}. The features are in the cache, but training goes by this list of the images, "
                "which is missing or out of date: make the folder writable and run the same command "
                "again, or give another --cache-dir."
            ) from error
        log.warning(
            "%s. The one of %s says the same and stays. Training takes the data set embedded last: "
            "name this one with --data if there are others.",
            what,
            dataset.embedded_at.strftime("%Y-%m-%d %H:%M"),
        )
    return dataset


def copy_dataset(dataset: Dataset, store_path: Path) -> tuple[Dataset, bool]:
    """Put a data set of another cache beside a store, which has its features.

    What is read is checked and written anew. Where the store has another data set of that name, both
    stay; the one embedded last is the one that training takes.

    Returns:
        The data set beside the store, and whether it is new there.

    Raises:
        StoreError: its ledger is damaged.
    """
    info, images = dataset.info, dataset.images()
    for number in itertools.count(1):
        name = dataset.folder.name if number == 1 else f"{dataset.folder.name}-{number}"
        copy = Dataset(store_path / _FOLDER / name)
        if not _is_dataset(copy.folder):
            shutil.rmtree(copy.folder, ignore_errors=True)  # what a full disk or a kill left
            break
        with contextlib.suppress(StoreError):  # a damaged one stays, and is told by verify
            if copy.images().equals(images) and copy.series() == dataset.series():
                return copy, False
    with scratch_folder(copy.folder.parent, copy.folder.name) as scratch:
        made = Dataset(scratch / name)
        _write(made, images, info)
        made.folder.rename(copy.folder)
    fsync_folder(copy.folder.parent)
    return copy, True


def remove_dataset(dataset: Dataset) -> None:
    """Forget a data set; the features of its images stay."""
    for name in (LIST_FILE, _INFO_FILE):  # from here on it is no data set
        (dataset.folder / name).unlink(missing_ok=True)
    shutil.rmtree(dataset.folder, ignore_errors=True)


def find_datasets(cache_dir: Path) -> list[Dataset]:
    """Every embedded data set below a cache folder, the newest first."""
    found = [dataset for store in listed(cache_dir, "*") for dataset in datasets_beside(store)]
    return sorted(found, key=lambda dataset: dataset.embedded_at, reverse=True)


def datasets_beside(store_path: Path) -> list[Dataset]:
    """The data sets of one store, damaged ones included, in the order of their names."""
    folders = listed(store_path / _FOLDER, "[!.]*")
    return [Dataset(folder) for folder in folders if _is_dataset(folder)]


def unfinished_datasets(store_path: Path) -> list[Path]:
    """Folders that a killed run or a full disk left half written: they are no data sets."""
    folders = listed(store_path / _FOLDER, "*")
    return [f for f in folders if f.is_dir() and (f.name.startswith(".") or not _is_dataset(f))]


def _is_dataset(folder: Path) -> bool:
    try:
        return has_file(folder / _INFO_FILE)
    except (OSError, ValueError):
        return True  # what is wrong is told when it is read


def newest_graded(cache_dir: Path, source: Path | None = None) -> Dataset:
    """The newest data set with grades, or the newest one of ``source``; see :func:`newest_dataset`."""
    return newest_dataset(cache_dir, source, graded=True)


def newest_dataset(cache_dir: Path, source: Path | None = None, *, graded: bool = False) -> Dataset:
    """The newest data set, or the newest one of ``source``.

    Args:
        cache_dir: the cache folder.
        source: the folder or CSV file given to embed (``--data``).
        graded: without ``source``, only one with grades.

    Raises:
        RunNotFoundError: there is none; says what to type.
    """
    datasets = find_datasets(cache_dir)
    if source is not None:
        for dataset in datasets:
            if dataset.is_called(source):
                return dataset
        given = address(located(source)) if ":/" in str(source) else str(source)
        there = ", ".join(dataset.info["source"] for dataset in datasets[:5])
        raise RunNotFoundError(
            f"--data {given}: not embedded in {cache_dir.resolve()} yet (there is: {there or 'nothing'}); "
            f"run `mirip-fast embed {given}` first."
        )
    for dataset in datasets:
        if not graded or dataset.info["graded"]:
            return dataset
    if datasets:
        names = ", ".join(dataset.info["source"] for dataset in datasets[:5])
        raise RunNotFoundError(
            f"No data set with grades in {cache_dir.resolve()}; embedded without grades: {names}. "
            "Training needs a metadata.csv with a tier column (or tier_score), or a folder per tier."
        )
    raise RunNotFoundError(
        f"Nothing is embedded in {cache_dir.resolve()} yet: run `mirip-fast embed data/` first."
    )


def datasets_through(cache_dir: Path, dataset: Dataset, backbones: Sequence[str]) -> list[Dataset]:
    """The newest data set of the same source with each of some backbones.

    Args:
        cache_dir: the cache folder.
        dataset: one that was embedded.
        backbones: as ``embed`` was given them, local folders with their whole path; none: all that the
            command named that embedded it.

    Raises:
        RunNotFoundError: it is not embedded with one of them; says what to type.
    """
    info = dataset.info
    backbones = backbones or info.get("backbones", ())
    if not backbones:
        return [dataset]
    there: dict[str, Dataset] = {}
    for other in find_datasets(cache_dir):
        if other.info["source"] == info["source"]:
            there.setdefault(other.info["embed"]["backbone"], other)
    for name in backbones:
        if name not in there:
            raise RunNotFoundError(
                f"{address(dataset.source)} is not embedded with {name} yet, only with {', '.join(there)}: "
                f"run `{dataset.embed_command(backbone=name)}` first"
            )
    return [there[name] for name in backbones]


def _write(dataset: Dataset, images: pd.DataFrame, info: Mapping[str, Any]) -> None:
    """Write the three files of a data set; without the last one it is none."""
    failed = images[images["status"] == "failed"]
    reasons = zip(failed["file"], failed["reason"], strict=True)
    rows = [{"path": address(Path(file)), "reason": why} for file, why in reasons]
    write_images(dataset.folder / _LEDGER, images)
    write_csv(dataset.failures_csv, ("path", "reason"), rows)
    write_json(dataset.folder / _INFO_FILE, info)
    if not (dataset.folder / LIST_FILE).exists():
        list_files(dataset.folder)


def _says_the_same(dataset: Dataset, images: pd.DataFrame, info: Mapping[str, Any]) -> bool:
    """Whether the files of a data set tell of the same images, with features of the same kinds.

    When they were computed, and by what options of the same results, makes no difference.
    """
    try:
        there, known = dataset.info, dataset.images()
    except StoreError:
        return False
    free = ("embed", "embedded_at")
    if any(there.get(key) != info[key] for key in info if key not in free):
        return False
    return _lasting(known).equals(_lasting(images))


def _lasting(images: pd.DataFrame) -> pd.DataFrame:
    """What a ledger says of its images, whichever run computed the features."""
    own = own_columns(images)
    lasting = images[[c for c in COLUMNS if c in images.columns and c != "named"] + own]
    status = lasting["status"].where(lasting["status"] != "embedded", "present")
    return lasting.assign(status=status, **{name: lasting[name].fillna("") for name in own})


def _check_info(info: Mapping[str, Any]) -> None:
    """Whether dataset.json says what it must, in the right types: it may be a stranger's."""
    for key, kind in _INFO.items():
        if not isinstance(info.get(key), kind):
            raise ValueError(f"{key} is {info.get(key)!r}")
    texts = [*info["tiers"], *info["kinds"]]
    views = info["views"]
    if not all(isinstance(text, str) for text in texts) or not views:
        raise ValueError(f"tiers {info['tiers']!r}, kinds {info['kinds']!r}, views {views!r}")
    if not all(isinstance(view, list) and [*map(type, view)] == [int, bool] for view in views):
        raise ValueError(f"views are {views!r}")
    if datetime.fromisoformat(info["embedded_at"]).tzinfo is None:
        raise ValueError(f"embedded_at is {info['embedded_at']!r}")


def _name_of(manifest: Manifest) -> str:
    name = manifest.root.name or "data"
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)[:60] or "data"
