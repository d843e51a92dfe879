"""One data set's features as one plain HDF5 file, for other programs.

``/features/cls`` and ``/features/patch`` are those of the base view; further views lie in
``/features/views/<view>/``. Line i of every dataset is the same image: ``/image_id``, ``/path``, and
``/tier`` where there are grades. Images that could not be embedded are left out.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mirip_fast.errors import RunNotFoundError, StoreError
from mirip_fast.features.datasets import Dataset, find_datasets
from mirip_fast.features.ledger_lines import Entry
from mirip_fast.features.pooling import layer_of
from mirip_fast.features.recipe import series_name
from mirip_fast.features.store import FeatureStore
from mirip_fast.features.store_tools import export
from mirip_fast.files import format_bytes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Exported:
    """What was written."""

    file: Path
    datasets: dict[str, tuple[tuple[int, ...], str]]  # name in the file → shape, number format
    images: int
    left_out: int  # images without features, because they failed
    bytes: int


def choose_dataset(cache_dir: Path, source: Path | None) -> Dataset:
    """The data set of ``source``, else the one embedded last.

    Raises:
        RunNotFoundError: there is none; says which ones there are.
    """
    datasets = find_datasets(cache_dir)
    if not datasets:
        raise RunNotFoundError(
            f"Nothing is embedded in {cache_dir.resolve()} yet: run `mirip-fast embed data/` first."
        )
    for dataset in datasets:
        if source is None or dataset.is_called(source):
            return dataset
    names = ", ".join(dict.fromkeys(str(dataset.source) for dataset in datasets[:5]))
    raise RunNotFoundError(
        f"--data {source}: not embedded in {cache_dir.resolve()} (there is: {names}); run "
        f"`mirip-fast embed {source}` first."
    )


def export_series(dataset: Dataset) -> dict[str, str]:
    """Name below ``/features`` → series, of everything that a data set was embedded with."""
    views, names = dataset.views(), {}
    for view in views:
        folder = "" if view == views[0] else f"views/{view.name}/"
        for kind in dataset.info["kinds"]:
            name = kind if kind == "cls" or layer_of(kind) else "patch"
            names[f"{folder}{name}"] = series_name(view, kind)
    return names


def export_dataset(
    dataset: Dataset,
    file: Path,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Exported:
    """Write a data set's features to ``file``; it appears whole or not at all.

    Args:
        dataset: what to export.
        file: the file to write, on any disk.
        overwrite: replace a file that is there.
        progress: called with the bytes of features written and those to write.

    Raises:
        StoreError: the file is there, its folder is not, or an image's features are missing.
        DiskFullError: no room; says how much is needed. A file that was there stays.
    """
    if file.is_dir():
        raise StoreError(f"{file} is a folder; name a file in it, such as {file / 'features.h5'}")
    if file.exists() and not overwrite:
        raise StoreError(f"{file} is there already; add --overwrite to replace it")
    if not file.parent.is_dir():
        raise StoreError(f"{file}: there is no folder {file.parent}")
    store = FeatureStore.open(dataset.store_path)
    entries, series, specs = dataset.entries(), export_series(dataset), store.series()
    there = [(e, e.outcome.sha256) for e in entries if e.outcome.status != "failed"]
    if not there:
        raise StoreError(f"{dataset.source}: no image has features; see {dataset.failures_csv}")
    known = {name: specs[s] for name, s in series.items() if s in specs}
    total = len(there) * sum(spec.row_bytes for spec in known.values())
    log.info(
        "%d images of %s: %s to write to %s; %s are free",
        len(there),
        dataset.source,
        format_bytes(total),
        file,
        format_bytes(shutil.disk_usage(file.parent).free),
    )
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        progress(done, total)

    export(
        store,
        file,
        hashes=[sha for _, sha in there if sha is not None],
        image_ids=[entry.record.image_id for entry, _ in there],
        paths=[str(entry.record.path) for entry, _ in there],
        series=series,
        columns=_grades(dataset, [entry for entry, _ in there]),
        attributes={"source": str(dataset.source), "series": json.dumps(series)},
        progress=count,
    )
    shapes = {
        f"/features/{name}": ((len(there), *spec.shape), spec.dtype) for name, spec in known.items()
    }
    return Exported(file, shapes, len(there), len(entries) - len(there), file.stat().st_size)


def _grades(dataset: Dataset, entries: list[Entry]) -> dict[str, list[str]]:
    """The tier of each image, empty where it has none; nothing for a data set without grades."""
    tiers = dataset.info["tiers"]
    names = ["" if e.record.tier is None else tiers[e.record.tier] for e in entries]
    return {"tier": names} if any(names) else {}
