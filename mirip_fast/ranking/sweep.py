"""`sweep` as a whole: which settings rank best, by cross-validation inside train and val.

A sweep is a folder: what is tried (``sweep.json``), how the images are divided (``split.csv``), one file per
finished cell (``cells/``), and in the end the table (``sweep.csv``) and the best cell's settings
(``best.yaml``). The test split is never looked at. An interrupted sweep goes on with the cells it has not.
"""

from __future__ import annotations

import dataclasses
import logging
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mirip_fast.config import Config
from mirip_fast.data.csv_reader import counted, shown
from mirip_fast.errors import CheckpointError, ConfigError, DataError, RunNotFoundError
from mirip_fast.features.datasets import newest_graded
from mirip_fast.features.recipe import View
from mirip_fast.features.store import FeatureStore, differing_fields, fingerprint_id
from mirip_fast.files import read_json, write_atomically, write_csv, write_json, write_text
from mirip_fast.ranking.dataset_settings import with_dataset
from mirip_fast.ranking.folds import assign_folds, folds_of, units_of
from mirip_fast.ranking.graded import GradedImages, graded_of_dataset, load_split, save_split
from mirip_fast.ranking.objective import make_loss, pairs_files
from mirip_fast.ranking.search_space import (
    Cell,
    cell_text,
    configure,
    make_cells,
    parse_axes,
    sweepable,
)
from mirip_fast.ranking.sweep_fits import CellFits, batches_of_cells, fit_cells
from mirip_fast.ranking.sweep_table import Graded, SweepTable, compare_cells, mean_accuracy
from mirip_fast.runtime import resolve_device
from mirip_fast.settings import config_from_dict, to_yaml
from mirip_fast.training.presets import choose_preset
from mirip_fast.training.run_folder import SPLIT_FILE, create_folder

log = logging.getLogger(__name__)

SWEEP_FILE = "sweep.json"
BEST_FILE = "best.yaml"
TABLE_FILE = "sweep.csv"

#: Folds where ``--folds`` says nothing.
_FOLDS = 5


@dataclass(frozen=True)
class SweepRequest:
    """What a sweep asks for, besides the configuration.

    Attributes:
        grid: what varies, see :func:`mirip_fast.ranking.search_space.parse_axes`.
        random: cells to draw; None takes the whole grid.
        seeds: heads per cell and fold.
        data: folder or CSV file that was embedded; None takes the newest one with grades.
        given: dotted keys that the user set, which go into the winner's file.
    """

    grid: Sequence[str]
    random: int | None = None
    seeds: int = 1
    data: Path | None = None
    given: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Progress:
    """How far a sweep is.

    Attributes:
        cells, done: cells in all, and finished ones.
        heads, epoch: heads still being trained in the current stack, and their epoch.
    """

    cells: int
    done: int
    heads: int
    epoch: int


@dataclass(frozen=True)
class Sweep:
    """A sweep's folder and what is in its ``sweep.json``.

    Attributes:
        path: the folder.
        config: the settings that cells start from.
        cells: how each differs; cell 0 not at all.
        seeds: heads per cell and fold.
        given: dotted keys that the user set.
        images: the images of train and val.
        fold_of: [n] the fold that leaves the image out.
        store: their features.
        views: the views that heads look at.
    """

    path: Path
    config: Config
    cells: tuple[Cell, ...]
    seeds: int
    given: frozenset[str]
    images: GradedImages
    fold_of: NDArray[np.int64]
    store: FeatureStore
    views: tuple[View, ...]


def start_sweep(config: Config, request: SweepRequest) -> Sweep:
    """Say what a sweep is to try, and write it down.

    Raises:
        ConfigError: what varies can not be understood.
        RunNotFoundError: nothing embedded that could be trained on.
        DataError, StoreError: the data or the cache can not be used.
    """
    if pairs_files(config.train):
        raise ConfigError("--pairs FILE: a sweep learns from grades; use --pairs all or sampled")
    cells = make_cells(parse_axes(request.grid), request.random, config.train.seed)
    cache_dir = Path(config.embed.cache_dir)
    dataset = newest_graded(cache_dir, request.data)
    log.info("Data set %s", shown(dataset.source))
    if "backbones" in dataset.info:
        log.warning("A sweep looks through one backbone: %s", dataset.info["backbone"])
    config = with_dataset(config, dataset)
    images = graded_of_dataset(dataset, config.split).part("train", "val")
    folds = config.train.folds or _FOLDS
    sweep = Sweep(
        path=create_folder(Path(config.train.output_dir), config.train.name or "sweep"),
        config=config,
        cells=_possible(cells, config, images, folds),
        seeds=request.seeds,
        given=request.given,
        images=images,
        fold_of=assign_folds(images, folds, config.split.split_seed),
        store=FeatureStore.open(dataset.store_path),
        views=tuple(dataset.views()),
    )
    save_split(sweep.path / SPLIT_FILE, images)
    write_json(
        sweep.path / SWEEP_FILE,
        {
            "config": config.to_dict(),
            "cells": sweep.cells,
            "seeds": sweep.seeds,
            "given": sorted(sweep.given),
            "fold_of": sweep.fold_of.tolist(),
            "tiers": list(images.manifest.tiers),
            "views": [[view.size, view.flip] for view in sweep.views],
            "fingerprint": sweep.store.fingerprint,
        },
    )
    return sweep


def resume_sweep(output_dir: Path, which: str) -> Sweep:
    """A sweep that was begun.

    Args:
        output_dir: folder of the runs.
        which: ``latest`` or the sweep's folder.

    Raises:
        RunNotFoundError: there is none.
        DataError: its files can not be read.
        CheckpointError: the features are not those it was begun with.
    """
    if which == "latest":
        begun = sorted(path.parent for path in output_dir.glob(f"*/{SWEEP_FILE}"))
        if not begun:
            raise RunNotFoundError(f"--resume latest: there is no sweep in {output_dir.resolve()}")
        path = begun[-1]
    else:
        path = Path(which)
    try:
        values = read_json(path / SWEEP_FILE)
        config = config_from_dict(values["config"])
        views = tuple(View(int(size), bool(flip)) for size, flip in values["views"])
        fold_of = np.array(values["fold_of"], dtype=np.int64)
        cells, seeds, given = values["cells"], int(values["seeds"]), frozenset(values["given"])
        tiers, fingerprint = values["tiers"], values["fingerprint"]
    except FileNotFoundError:
        raise RunNotFoundError(f"--resume {which}: there is no {path / SWEEP_FILE}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path / SWEEP_FILE} can not be read: {error}") from error
    images = load_split(path / SPLIT_FILE, tiers, config.data)
    store = FeatureStore.open(Path(config.embed.cache_dir) / fingerprint_id(fingerprint))
    if store.fingerprint != fingerprint:
        raise CheckpointError(
            f"{path / SWEEP_FILE} does not fit {store.path} "
            f"({differing_fields(fingerprint, store.fingerprint)})"
        )
    return Sweep(path, config, tuple(cells), seeds, given, images, fold_of, store, views)


def run_sweep(sweep: Sweep, progress: Callable[[Progress], None] = lambda _: None) -> SweepTable:
    """Fit the cells that are not there yet, compare all, and write the table and the winner.

    Args:
        sweep: of :func:`start_sweep` or :func:`resume_sweep`.
        progress: called after every epoch.

    Raises:
        TrainingError: the loss was not finite even with the settings as they are.
    """
    fits = {i: found for i in range(len(sweep.cells)) if (found := _load_cell(sweep, i))}
    if fits:
        log.info("%d of %d cells are there already", len(fits), len(sweep.cells))
    labels = sweep.images.labels(sweep.config.evaluate.within)
    graded = Graded(
        tiers=labels.tiers,
        fold_of=sweep.fold_of,
        groups=[str(unit) for unit in units_of(sweep.images).tolist()],
        within=labels.within,
    )
    _fit_missing(sweep, graded, fits, progress)
    table = compare_cells(
        sweep.cells,
        [fits[i] for i in range(len(sweep.cells))],
        graded,
        sweep.config.evaluate.bootstrap_rounds,
    )
    rows = table.to_rows()
    write_csv(sweep.path / TABLE_FILE, list(rows[0]), rows)
    swept = {key for cell in sweep.cells for key in cell}
    given = {key for key in sweep.given if key == "evaluate.within" or sweepable(key)}
    best = to_yaml(configure(sweep.config, table.best.cell), only=frozenset(swept | given))
    write_text(sweep.path / BEST_FILE, best)
    return table


def _fit_missing(
    sweep: Sweep,
    graded: Graded,
    fits: dict[int, CellFits],
    progress: Callable[[Progress], None],
) -> None:
    device = resolve_device(sweep.config.runtime.device)
    configs = {i: configure(sweep.config, cell) for i, cell in enumerate(sweep.cells)}
    folds = folds_of(sweep.images, sweep.fold_of, sweep.config.split)
    started, before = time.monotonic(), len(fits)
    for (features, label), numbers in _by_input(configs).items():
        missing = {i: configs[i] for i in numbers if i not in fits}
        if not missing:
            continue
        rows = sweep.images.rows(
            sweep.store, features, sweep.views, sweep.config.evaluate.within, label=label
        )
        for batch in batches_of_cells(missing, folds, sweep.seeds, rows.input_dim, device):

            def on_epoch(epoch: int, heads: int) -> None:
                progress(Progress(len(configs), len(fits), heads, epoch))

            found = fit_cells(
                rows, [configs[i] for i in batch], folds, sweep.seeds, device, on_epoch
            )
            for number, fit in zip(batch, found, strict=True):
                _save_cell(sweep, number, fit)
                fits[number] = fit
            _tell(sweep, graded, fits, time.monotonic() - started, before)


def _tell(
    sweep: Sweep, graded: Graded, fits: Mapping[int, CellFits], seconds: float, before: int
) -> None:
    """Log how far it is, what is best so far, and how long the rest will take."""
    figures = {i: mean_accuracy(fit, graded) for i, fit in fits.items() if fit.finite}
    best = max(figures, key=lambda i: figures[i], default=None)
    left = seconds / (len(fits) - before) * (len(sweep.cells) - len(fits))
    log.info(
        "%d of %d cells, %.0f s%s%s",
        len(fits),
        len(sweep.cells),
        seconds,
        ""
        if best is None
        else f"; best so far {figures[best]:.4f}: {cell_text(sweep.cells[best])}",
        f"; about {left:.0f} s to go" if left else "",
    )


def _by_input(configs: Mapping[int, Config]) -> dict[tuple[str, str], list[int]]:
    """Cells by what they read: the features, and the kind of label."""
    found: dict[tuple[str, str], list[int]] = {}
    for number, config in configs.items():
        found.setdefault((config.head.features, config.train.label), []).append(number)
    return found


def _possible(
    cells: Sequence[Cell], config: Config, images: GradedImages, folds: int
) -> tuple[Cell, ...]:
    """The cells that can be trained and are not another one in other words; the others are told."""
    kept: dict[str, Cell] = {}
    n_train = len(images) * (folds - 1) // folds
    for number, cell in enumerate(cells):
        own = configure(config, cell)
        try:
            make_loss(own.train, images.manifest.tiers, within=config.evaluate.within is not None)
        except ConfigError as error:
            if number == 0:
                raise
            log.warning("Left out: %s (%s)", cell_text(cell), error)
            continue
        train = dataclasses.replace(own.train, **vars(choose_preset(own.train, n_train)))
        same = kept.setdefault(repr((own.head, train)), cell)
        if same is not cell:
            log.info("Left out: %s (the same as %s)", cell_text(cell), cell_text(same))
    if len(kept) < 2:
        raise ConfigError("--grid: no cell is left that differs from the settings as they are")
    log.info("%s besides the settings as they are", counted(len(kept) - 1, "cell"))
    return tuple(kept.values())


def _save_cell(sweep: Sweep, number: int, fit: CellFits) -> None:
    def write(stream: Any) -> None:
        np.savez(stream, scores=fit.scores, epochs=fit.epochs)

    write_atomically(_cell_path(sweep, number), write)


def _load_cell(sweep: Sweep, number: int) -> CellFits | None:
    """A finished cell; None where it has to be fitted."""
    path = _cell_path(sweep, number)
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            fit = CellFits(arrays["scores"], arrays["epochs"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        log.warning("%s can not be read and is fitted again (%s)", path, error)
        return None
    expected = (sweep.seeds, len(sweep.images))
    return fit if fit.scores.shape == expected else None


def _cell_path(sweep: Sweep, number: int) -> Path:
    return sweep.path / "cells" / f"cell_{number:04d}.npz"
