"""Data sets that were embedded: a manifest per data set, beside the store that holds its features.

``cache/<fingerprint>/datasets/<name>/`` holds ``dataset.json`` (where the data came from and how it was
read), ``manifest.csv`` (the ledger: one line per input, with its grade, its content hash and what became
of it) and ``failures.csv`` (path, reason).
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from mirip_fast.config import DataConfig, EmbedConfig
from mirip_fast.data.manifest import Manifest, Record
from mirip_fast.data.remote import address, located, path_of
from mirip_fast.errors import RunNotFoundError, StoreError
from mirip_fast.features.outcomes import STATUSES, Outcome
from mirip_fast.features.recipe import Recipe, View, series_name
from mirip_fast.features.shards import unreadable
from mirip_fast.features.store import listed
from mirip_fast.files import (
    LIST_FILE,
    fsync_folder,
    has_file,
    list_files,
    read_csv,
    read_json,
    scratch_folder,
    write_csv,
    write_json,
)
from mirip_fast.settings import settings, yaml_text

log = logging.getLogger(__name__)

_FOLDER = "datasets"
_COLUMNS = (
    "image_id", "path", "status", "reason", "tier", "tier_score", "group", "row", "sha256", "extra",
)  # fmt: skip
_INFO_FILE = "dataset.json"
#: What dataset.json holds, as far as anything depends on it.
_INFO: dict[str, Any] = {
    "source": str, "root": str, "tiers": list, "graded": bool, "images": int, "failed": int,
    "limit": int | None, "backbone": str, "views": list, "kinds": list, "data": dict, "embed": dict,
    "embedded_at": str,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One line of the ledger: an input, and what became of it."""

    record: Record
    outcome: Outcome


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
                f"{path} can not be read ({error}); remove its folder and run `mirip-fast embed` again"
            ) from error

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

    def embed_command(self, backbone: str | None = None, *, whole: bool = False) -> str:
        """What to type to embed it again as it was embedded, or with another backbone, or not as a trial."""
        info = self.info
        if backbone is not None:
            info["embed"]["backbone"] = backbone
        words = ["mirip-fast", "embed", info["source"]]
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
        outcomes = (entry.outcome for entry in self.entries())
        return {o.sha256 for o in outcomes if o.sha256 is not None and o.status != "failed"}

    def entries(self) -> list[Entry]:
        """The ledger, in the order of the data.

        Raises:
            StoreError: the manifest is damaged.
        """
        path = self.folder / "manifest.csv"
        info = self.info
        try:
            rows = read_csv(path, _COLUMNS)
            if len(rows) != info["images"]:
                raise ValueError(f"{len(rows)} of {info['images']} images are in it")
            return [_parse_line(row, list(info["tiers"])) for row in rows]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{path} can not be read ({error}); run `mirip-fast embed {info['source']}` again"
            ) from error


def dataset_folder(store_path: Path, manifest: Manifest) -> Path:
    """Where a data set's ledger lies: by the name of its folder and its whole path."""
    key = hashlib.sha256(str(manifest.source).encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return store_path / _FOLDER / f"{_name_of(manifest)}-{key}"


def save_dataset(
    store_path: Path,
    manifest: Manifest,
    outcomes: Sequence[Outcome],
    recipe: Recipe,
    data: DataConfig,
    embed: EmbedConfig,
    *,
    limit: int | None = None,
    backbones: Sequence[str] = (),
) -> Dataset:
    """Write a data set's ledger and description beside the store.

    It is written even where it says nothing new: training takes the data set that was embedded last. Only
    where it can not be written (a read-only disk) one that says the same stays and serves.

    Args:
        store_path: the store's folder.
        manifest: the inputs.
        outcomes: what became of each, in the same order.
        recipe: what was computed.
        data: how the data was read, so that training reads it the same way.
        embed: how it was embedded.
        limit: the trial's number of images, where it was one.
        backbones: all that the same command embeds it with.

    Raises:
        DiskFullError: there is no room for it.
        StoreError: it can not be written, and there is none that says the same.
    """
    dataset = Dataset(dataset_folder(store_path, manifest))
    info = {
        "name": _name_of(manifest),
        "source": address(manifest.source),
        "root": address(manifest.root),
        "tiers": list(manifest.tiers),
        # Faulty grades count: training tells what is wrong with them.
        "graded": any(
            record.tier is not None or record.tier_score is not None for record in manifest.records
        ),
        "images": len(manifest),
        "failed": sum(outcome.status == "failed" for outcome in outcomes),
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
        _write(dataset, manifest.records, outcomes, info)
    except StoreError:
        raise
    except OSError as error:
        what = f"{error.filename or dataset.folder} can not be written ({error.strerror})"
        if not _says_the_same(dataset, manifest.records, outcomes, info):
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
    info, entries = dataset.info, dataset.entries()
    for number in itertools.count(1):
        name = dataset.folder.name if number == 1 else f"{dataset.folder.name}-{number}"
        copy = Dataset(store_path / _FOLDER / name)
        if not _is_dataset(copy.folder):
            shutil.rmtree(copy.folder, ignore_errors=True)  # what a full disk or a kill left
            break
        with contextlib.suppress(StoreError):  # a damaged one stays, and is told by verify
            if copy.entries() == entries and copy.series() == dataset.series():
                return copy, False
    with scratch_folder(copy.folder.parent, copy.folder.name) as scratch:
        made = Dataset(scratch / name)
        _write(made, [each.record for each in entries], [each.outcome for each in entries], info)
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
    """The newest data set with grades, or the newest one of ``source``.

    Args:
        cache_dir: the cache folder.
        source: the folder or CSV file given to embed (``--data``).

    Raises:
        RunNotFoundError: there is none; says what to type.
    """
    datasets = find_datasets(cache_dir)
    if source is not None:
        for dataset in datasets:
            if dataset.is_called(source):
                return dataset
        given = address(located(source)) if ":/" in str(source) else str(source)
        raise RunNotFoundError(
            f"--data {given}: not embedded in {cache_dir.resolve()} yet; "
            f"run `mirip-fast embed {given}` first."
        )
    for dataset in datasets:
        if dataset.info["graded"]:
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
                f"run `{dataset.embed_command(name)}` first"
            )
    return [there[name] for name in backbones]


def newest_dataset(cache_dir: Path, source: Path | None = None) -> Dataset:
    """The newest data set, with grades or without, or the newest one of ``source``.

    Raises:
        RunNotFoundError: there is none; says what to type.
    """
    if source is None:
        datasets = find_datasets(cache_dir)
        if datasets:
            return datasets[0]
    return newest_graded(cache_dir, source)


def _write(
    dataset: Dataset,
    records: Sequence[Record],
    outcomes: Sequence[Outcome],
    info: Mapping[str, Any],
) -> None:
    """Write the three files of a data set; without the last one it is none."""

    def rows() -> Iterator[dict[str, object]]:  # one after the other: there may be millions
        for record, outcome in zip(records, outcomes, strict=True):
            yield _line(record, outcome, info["tiers"])

    failed = (
        {"path": address(records[i].path), "reason": outcome.reason}
        for i, outcome in enumerate(outcomes)
        if outcome.status == "failed"
    )
    write_csv(dataset.folder / "manifest.csv", _COLUMNS, rows())
    write_csv(dataset.failures_csv, ("path", "reason"), failed)
    write_json(dataset.folder / _INFO_FILE, info)
    if not (dataset.folder / LIST_FILE).exists():
        list_files(dataset.folder)


def _says_the_same(
    dataset: Dataset,
    records: Sequence[Record],
    outcomes: Sequence[Outcome],
    info: Mapping[str, Any],
) -> bool:
    """Whether the files of a data set tell of the same images, with features of the same kinds.

    When they were computed, and by what options of the same results, makes no difference.
    """
    try:
        there = dataset.info
        rows = read_csv(dataset.folder / "manifest.csv", _COLUMNS)
    except (OSError, ValueError):
        return False
    free = ("embed", "embedded_at")
    if any(there.get(key) != info[key] for key in info if key not in free):
        return False

    ours = (_line(r, o, info["tiers"]) for r, o in zip(records, outcomes, strict=True))
    return [*map(_lasting, rows)] == [*map(_lasting, ours)]


def _line(record: Record, outcome: Outcome, tiers: Sequence[str]) -> dict[str, object]:
    """The cells of one line."""
    return {
        "image_id": record.image_id,
        "path": address(record.path),
        "status": outcome.status,
        "reason": outcome.reason,
        "tier": None if record.tier is None else tiers[record.tier],
        "tier_score": record.tier_score,
        "group": record.group,
        "row": record.row,
        "sha256": outcome.sha256.hex() if outcome.sha256 else None,
        "extra": json.dumps(record.extra, ensure_ascii=False) if record.extra else None,
    }


def _lasting(cells: Mapping[str, object]) -> list[str]:
    """What a line says of its image, whichever run computed the features."""
    texts = {key: "" if cells.get(key) is None else str(cells[key]) for key in _COLUMNS}
    if texts["status"] == "embedded":
        texts["status"] = "present"
    return list(texts.values())


def _parse_line(row: dict[str, str], tiers: list[str]) -> Entry:
    """What one line says; nothing in it is trusted.

    Args:
        row: the cells as they stand in the file.
        tiers: names of the tiers, the best first.

    Raises:
        ValueError, KeyError, TypeError: it is damaged.
    """
    if None in row.values() or None in row:
        raise ValueError(f"{row['image_id']}: the line is cut short")
    record = Record(
        image_id=row["image_id"],
        path=path_of(row["path"]),
        tier=tiers.index(row["tier"]) if row["tier"] else None,
        tier_score=float(row["tier_score"]) if row["tier_score"] else None,
        group=row["group"] or None,
        extra=json.loads(row["extra"]) if row["extra"] else {},
        row=int(row["row"]) if row["row"] else None,
    )
    sha256 = bytes.fromhex(row["sha256"]) if row["sha256"] else None
    length = 0 if sha256 is None else len(sha256)
    if row["status"] not in STATUSES or length not in (
        (32, 0) if row["status"] == "failed" else (32,)
    ):
        raise ValueError(f"{row['image_id']}: status {row['status']!r}, sha256 {row['sha256']!r}")
    return Entry(record, Outcome(row["status"], sha256, row["reason"] or None))


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
