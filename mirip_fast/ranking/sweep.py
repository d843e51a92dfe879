"""`sweep`: which settings rank best, by cross-validation inside train and val.

A sweep is a folder: what is tried (``sweep.json``), how the images are divided (``split.csv``), one file per
finished cell (``cells/``), and in the end the table (``sweep.csv``) and the best cell's settings
(``best.yaml``). The test split is never looked at. An interrupted sweep goes on with the cells it has not.

``learning_rate=1e-4,3e-4`` lists values; ``learning_rate=1e-5..1e-3`` is a range to draw from, evenly in the
logarithm where it spans a factor of ten or more (Bergstra & Bengio 2012 on random search).
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import logging
import time
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from mirip_fast.config import Config
from mirip_fast.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    RunNotFoundError,
    TrainingError,
)
from mirip_fast.evaluation.bootstrap import accuracy_interval
from mirip_fast.evaluation.metrics import PairCounter, ratio
from mirip_fast.evaluation.text_table import format_table
from mirip_fast.features.datasets import newest_graded
from mirip_fast.features.recipe import View
from mirip_fast.features.store import FeatureStore, differing_fields, fingerprint_id
from mirip_fast.files import read_json, write_atomically, write_csv, write_json, write_text
from mirip_fast.models.numpy_head import NumpyHead
from mirip_fast.ranking.fit import fit_quietly
from mirip_fast.ranking.folds import LEFT_OUT, assign_folds, leave_out, units_of
from mirip_fast.ranking.graded import (
    GradedImages,
    check_kinds,
    graded_of_dataset,
    load_split,
    save_split,
    with_dataset,
)
from mirip_fast.ranking.objective import make_loss, pairs_files
from mirip_fast.ranking.rows import Rows
from mirip_fast.runtime import resolve_device
from mirip_fast.settings import Setting, config_from_dict, settings, to_yaml, yaml_text
from mirip_fast.text import counted, shown
from mirip_fast.training.optim import choose_preset
from mirip_fast.training.run_folder import SPLIT_FILE, create_folder

log = logging.getLogger(__name__)

SWEEP_FILE, BEST_FILE, TABLE_FILE = "sweep.json", "best.yaml", "sweep.csv"

#: Settings of these sections can be swept, but for those that do not change what is learned.
_SECTIONS = ("head", "train")
_FIXED = {"name", "output_dir", "folds", "save_every_n_epochs", "save_total_limit", "seed"}
_FOLDS = 5  # where ``--folds`` says nothing
_MOST_CELLS = 5_000  # more take days, and a table of them is read by nobody
_SHOWN = 20  # rows of the printed table; the file has all

#: Dotted key → value: how a cell differs from the configuration it starts from.
Cell = Mapping[str, Any]


#: Of a cell, with S seeds, K folds and n images: [S, n] float32 score of each image by the head that left it
#: out, NaN throughout where a head's loss was not finite; and [S, K] the epoch that each head is of.
Fits = tuple[NDArray[np.float32], NDArray[np.int64]]


def make_cells(specs: Sequence[str], random: int | None, seed: int) -> list[dict[str, Any]]:
    """The cells of a sweep; the first one is empty: the configuration as it is.

    Args:
        specs: what varies: texts like ``learning_rate=1e-4,3e-4``, ``head.features=cls,cls+mean`` or
            ``weight_decay=1e-4..1``.
        random: how many cells to draw; None takes the whole grid.
        seed: of the draw.

    Raises:
        ConfigError: an unknown setting, a wrong value, a setting named twice, nothing that varies, a range
            without ``random``, or too many cells.
    """
    from sklearn.model_selection import ParameterGrid, ParameterSampler

    axes: dict[str, Any] = {}
    found: dict[str, Setting] = {}
    problems = []
    for spec in specs:
        try:
            setting, values = _parse_axis(spec)
            if setting.key in axes:
                raise ConfigError(f"{setting.name} is there twice; list its values with commas")
            axes[setting.key], found[setting.key] = values, setting
        except ConfigError as error:
            problems.append(f"--grid {spec}: {error}")
    if problems:
        raise ConfigError("\n".join(problems))
    if not axes:
        raise ConfigError(
            "Say what to vary, like --grid learning_rate=1e-4,3e-4 --grid features=cls,cls+mean"
        )
    if random is None:
        ranges = [key for key, values in axes.items() if not isinstance(values, list)]
        if ranges:
            name = found[ranges[0]].name
            raise ConfigError(f"{name} is a range: say how many cells to draw with --random N")
        drawn = ParameterGrid(axes)
        if len(drawn) > _MOST_CELLS:
            raise ConfigError(
                f"The grid has {len(drawn):,} cells; draw some of them with --random N"
            )
    else:
        drawn = ParameterSampler(axes, random, random_state=seed % 2**32)
    with warnings.catch_warnings():  # a grid of fewer cells is taken whole
        warnings.simplefilter("ignore")
        cells = [{key: _rounded(found[key], cell[key]) for key in axes} for cell in drawn]
    return [{}, *{cell_text(cell): cell for cell in cells}.values()]


def _parse_axis(spec: str) -> tuple[Setting, Any]:
    """A setting, and its values or the distribution (of SciPy) that they are drawn from."""
    from scipy.stats import loguniform, uniform

    name, equals, text = (part.strip() for part in spec.partition("="))
    if not equals or not text:
        raise ConfigError("write it as setting=value,value,…")
    setting = _find(name)
    if ".." not in text:
        return setting, list(dict.fromkeys(setting.parse(part.strip()) for part in text.split(",")))
    if setting.kind not in (int, float) or setting.choices:
        raise ConfigError(f"{setting.name} has no range; list its values with commas")
    low, high = (setting.parse(end) for end in text.split("..", 1))
    if low is None or high is None or not low < high:
        raise ConfigError(f"{text} is no range from a smaller number to a larger one")
    wide = low > 0 and high / low >= 10
    return setting, loguniform(low, high) if wide else uniform(low, high - low)


def wandb_sweep(
    config: Config,
    grid: Sequence[str],
    *,
    random: int | None = None,
    data: Path | None = None,
    given: frozenset[str] = frozenset(),
) -> str:
    """A sweep for wandb's own agents to run, as the YAML text that ``wandb sweep`` takes.

    Each of its runs is one head, compared by its validation split.

    Args:
        config: the settings that runs start from.
        grid: what varies, see :func:`make_cells`.
        random: how many runs; None tries the whole grid.
        data: folder or CSV file that was embedded; None takes the newest one with grades.
        given: dotted keys that the user set, which go along.

    Raises:
        ConfigError: what varies cannot be understood.
    """
    import yaml

    make_cells(grid, random, config.train.seed)  # says what is wrong
    parameters: dict[str, Any] = {}
    for spec in grid:
        setting, values = _parse_axis(spec)
        entry: dict[str, Any] = {}
        if isinstance(values, list):
            entry["values"] = ["auto" if v is None else v for v in values]
        else:
            low, high = (setting.kind(end) for end in values.support())
            names = {
                ("uniform", float): "uniform",
                ("uniform", int): "int_uniform",
                ("loguniform", float): "log_uniform_values",
                ("loguniform", int): "q_log_uniform_values",
            }
            kind = names[values.dist.name, setting.kind]
            entry = {"distribution": kind, "min": low, "max": high}
        parameters[setting.flag.removeprefix("--")] = entry
    fixed = [
        f"{s.flag}={yaml_text(getattr(getattr(config, s.section), s.name))}"
        for s in settings(*_SECTIONS)
        if s.key in given and s.flag.removeprefix("--") not in parameters and s.kind is not bool
    ]
    about = {
        "method": "grid" if random is None else "random",
        **({} if random is None else {"run_cap": random}),
        "metric": {"name": "val/accuracy", "goal": "maximize"},
        "parameters": parameters,
        "command": [
            *("mirip-fast", "train", "--head-only", "--readout", "head", "--report-to", "wandb"),
            *([] if data is None else ["--data", str(data)]),
            *fixed,
            "${args}",
        ],
    }
    text: str = yaml.safe_dump(about, sort_keys=False, allow_unicode=True)
    return text


def _rounded(setting: Setting, value: Any) -> Any:
    if isinstance(value, float) and setting.kind in (int, float):
        return round(value) if setting.kind is int else float(f"{value:.3g}")
    return value


def _find(name: str) -> Setting:
    if name.rpartition(".")[2] == "readout":
        raise ConfigError(
            "a sweep has one readout (--readout head or attention); `mirip-fast train --head-only --readout "
            "auto` compares them"
        )
    known = {s.name: s for s in settings(*_SECTIONS) if s.name not in _FIXED | {"readout"}}
    known["dropout"] = known["projector_dropout"]
    found = known.get(name) or next((s for s in known.values() if s.key == name), None)
    if found is not None:
        return found
    if name.rpartition(".")[2] == "seed":
        raise ConfigError("repeat every cell with other seeds by --seeds N")
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else f" There are: {', '.join(sorted(known))}."
    raise ConfigError(f"there is no setting {name!r} to vary.{hint}")


def configure(config: Config, cell: Cell) -> Config:
    """The configuration with a cell's values in it."""
    sections = {name: getattr(config, name) for name in _SECTIONS}
    for key, value in cell.items():
        section, name = key.split(".")
        sections[section] = dataclasses.replace(sections[section], **{name: value})
    return dataclasses.replace(config, **sections)


def cell_text(cell: Cell) -> str:
    """A cell as it would be typed: ``learning_rate=0.0003 features=cls+mean``."""
    words = [f"{key.split('.')[1]}={yaml_text(value)}" for key, value in cell.items()]
    return " ".join(words) or "(as configured)"


def start_sweep(
    config: Config,
    grid: Sequence[str],
    *,
    random: int | None = None,
    seeds: int = 1,
    data: Path | None = None,
    given: frozenset[str] = frozenset(),
) -> Path:
    """Say what a sweep is to try, and write it down; returns its folder.

    Args:
        config: the settings that cells start from.
        grid: what varies, see :func:`make_cells`.
        random: cells to draw; None takes the whole grid.
        seeds: heads per cell and fold.
        data: folder or CSV file that was embedded; None takes the newest one with grades.
        given: dotted keys that the user set, which go into the winner's file.

    Raises:
        ConfigError: what varies cannot be understood.
        RunNotFoundError: nothing embedded that could be trained on.
        DataError, StoreError: the data or the cache cannot be used.
    """
    if pairs_files(config.train):
        raise ConfigError("--pairs FILE: a sweep learns from grades; use --pairs all or sampled")
    if config.head.readout == "usual":
        config = dataclasses.replace(config, head=dataclasses.replace(config.head, readout="head"))
    if config.head.readout not in ("head", "attention"):
        raise ConfigError(
            f"--readout {config.head.readout}: a sweep tries settings of heads, --readout head or attention"
        )
    cells = make_cells(grid, random, config.train.seed)
    dataset = newest_graded(Path(config.embed.cache_dir), data)
    log.info("Data set %s", shown(dataset.source))
    if "backbones" in dataset.info:
        log.warning("A sweep looks through one backbone: %s", dataset.info["backbone"])
    config = with_dataset(config, dataset, config.head.readout)
    images = graded_of_dataset(dataset, config.split).part("train", "val")
    folds = config.train.folds or _FOLDS
    path = create_folder(Path(config.train.output_dir), config.train.name or "sweep")
    save_split(path / SPLIT_FILE, images)
    about = {
        "config": config.to_dict(),
        "cells": _possible(cells, config, len(images) * (folds - 1) // folds),
        "seeds": seeds,
        "given": sorted(given),
        "fold_of": assign_folds(images, folds, config.split.split_seed).tolist(),
        "tiers": list(images.tiers),
        "views": [[view.size, view.flip] for view in dataset.views()],
        "fingerprint": FeatureStore.open(dataset.store_path).fingerprint,
    }
    write_json(path / SWEEP_FILE, about)
    return path


def find_sweep(output_dir: Path, which: str) -> Path:
    """The folder of a sweep that was begun.

    Args:
        output_dir: folder of the runs.
        which: ``latest`` or the sweep's folder.

    Raises:
        RunNotFoundError: there is none.
    """
    if which != "latest":
        if not (Path(which) / SWEEP_FILE).is_file():
            raise RunNotFoundError(f"--resume {which}: there is no {Path(which) / SWEEP_FILE}")
        return Path(which)
    begun = sorted(path.parent for path in output_dir.glob(f"*/{SWEEP_FILE}"))
    if not begun:
        raise RunNotFoundError(f"--resume latest: there is no sweep in {output_dir.resolve()}")
    return begun[-1]


def run_sweep(path: Path, progress: Callable[[int, int], None] = lambda *_: None) -> str:
    """Fit the cells that are not there yet, compare all, and write the table and the winner.

    Args:
        path: of :func:`start_sweep` or :func:`find_sweep`.
        progress: called after every head with how many of how many there are.

    Returns:
        The table and how to read it, for a terminal.

    Raises:
        DataError: its files cannot be read.
        CheckpointError: the features are not those it was begun with.
        TrainingError: the loss was not finite even with the settings as they are.
    """
    try:
        about = read_json(path / SWEEP_FILE)
        config = config_from_dict(about["config"])
        views = tuple(View(int(size), bool(flip)) for size, flip in about["views"])
        fold_of = np.array(about["fold_of"], dtype=np.int64)
        cells, seeds, given = about["cells"], int(about["seeds"]), set(about["given"])
        tiers, fingerprint = about["tiers"], about["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path / SWEEP_FILE} cannot be read: {error}") from error
    images = load_split(path / SPLIT_FILE, tiers, config.data)
    store = FeatureStore.open(Path(config.embed.cache_dir) / fingerprint_id(fingerprint))
    if store.fingerprint != fingerprint:
        raise CheckpointError(
            f"{path / SWEEP_FILE} does not fit {store.path} "
            f"({differing_fields(fingerprint, store.fingerprint)})"
        )
    files = [path / "cells" / f"cell_{number:04d}.npz" for number in range(len(cells))]
    fits = {i: fit for i, file in enumerate(files) if (fit := _load_fits(file, seeds, images))}
    if fits:
        log.info("%d of %d cells are there already", len(fits), len(cells))
    within, device = config.evaluate.within, resolve_device(config.runtime.device)
    folds = [
        leave_out(images, fold_of, number, config.split) for number in range(fold_of.max() + 1)
    ]
    heads, started, before = seeds * len(folds), time.monotonic(), len(fits)
    own = [configure(config, cell) for cell in cells]

    def reads(number: int) -> tuple[str, str]:
        return own[number].head.features, own[number].train.label

    missing = sorted(set(range(len(cells))) - set(fits), key=reads)
    for (features, label), numbers in itertools.groupby(missing, key=reads):
        rows = images.rows(store, features, views, within, label=label)
        for number in numbers:

            def on_head(done: int) -> None:
                progress(len(fits) * heads + done, len(cells) * heads)

            fits[number] = _fit_cell(own[number], folds, seeds, rows, device, on_head)
            _save_fits(files[number], fits[number])
            left = (time.monotonic() - started) / (len(fits) - before) * (len(cells) - len(fits))
            more = f", about {left:.0f} s to go" if left else ""
            log.info("%d of %d cells%s", len(fits), len(cells), more)
    labels, groups = images.labels(within), [str(unit) for unit in units_of(images).tolist()]
    table, text = compare_cells(
        cells, [fits[i] for i in range(len(cells))], labels.tiers, fold_of, groups,
        within=labels.within, grades=images.grades, rounds=config.evaluate.bootstrap_rounds,
    )  # fmt: skip
    filled: Any = table.astype(object).where(table.notna(), None).to_dict("records")
    write_csv(path / TABLE_FILE, list(table.columns), filled)
    keep = {key for key in given if key == "evaluate.within" or _sweepable(key)}
    keep |= {"head.readout"}.union(*cells)
    best = own[int(table["cell"].iloc[0])]
    write_text(path / BEST_FILE, to_yaml(best, only=frozenset(keep)))
    return text


def _sweepable(key: str) -> bool:
    section, _, name = key.partition(".")
    return section in _SECTIONS and name not in _FIXED


def _possible(cells: Sequence[Cell], config: Config, n_train: int) -> list[Cell]:
    """The cells that can be trained and are not another one in other words; the others are told."""
    kept: dict[str, Cell] = {}
    for number, cell in enumerate(cells):
        own = configure(config, cell)
        try:
            make_loss(own.train)
            check_kinds(own.head.features, own.head.readout)
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
    return list(kept.values())


def _fit_cell(
    config: Config,
    folds: Sequence[GradedImages],
    seeds: int,
    rows: Rows,
    device: torch.device,
    on_head: Callable[[int], None],
) -> Fits:
    """A head per seed and fold; the same seeds for every cell, so that cells differ by settings only."""
    scores = np.full((seeds, len(rows)), np.nan, np.float32)
    epochs = np.zeros((seeds, len(folds)), np.int64)
    for place, (seed, fold) in enumerate(np.ndindex(epochs.shape)):
        train = dataclasses.replace(config.train, seed=config.train.seed + place)
        own = dataclasses.replace(config, train=train)
        arrays, epochs[seed, fold] = fit_quietly(rows, folds[fold], own, device)
        on_head(place + 1)
        if arrays is None:
            scores[:] = np.nan
            break
        left_out = folds[fold].indexes(LEFT_OUT)
        features = rows.features[left_out]
        found = NumpyHead(arrays)(features.reshape(-1, features.shape[2]))
        scores[seed, left_out] = found.reshape(features.shape[:2]).mean(1)
    return scores, epochs


def _save_fits(path: Path, fits: Fits) -> None:
    write_atomically(path, lambda stream: np.savez(stream, scores=fits[0], epochs=fits[1]))


def _load_fits(path: Path, seeds: int, images: GradedImages) -> Fits | None:
    """A finished cell; None where it has to be fitted."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            scores, epochs = arrays["scores"], arrays["epochs"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        log.warning("%s cannot be read and is fitted again (%s)", path, error)
        return None
    return (scores, epochs) if scores.shape == (seeds, len(images)) else None


def compare_cells(
    cells: Sequence[Cell],
    fits: Sequence[Fits],
    tiers: NDArray[np.int64],
    fold_of: NDArray[np.int64],
    groups: Sequence[str],
    *,
    within: NDArray[np.int64] | None = None,
    grades: NDArray[np.float64] | None = None,
    rounds: int = 1000,
) -> tuple[pd.DataFrame, str]:
    """The cells, the best one first, each with its difference to cell 0; and the same in words.

    Pairs count inside one fold and seed, since heads share no scale. The intervals come from drawing groups
    anew (the same draws for all cells, so differences are paired); they do not cover other training runs,
    which is what several seeds are for. Of many cells the best one looks better than it is: its figure was
    picked for being high. The text also has the accuracy of choosing the best cell without the fold that
    judges it (compare Tibshirani & Tibshirani 2009, «A bias correction for the minimum error rate in
    cross-validation»).

    Args:
        cells: the cells, cell 0 first.
        fits: what came of each.
        tiers: [n], 0 is best.
        fold_of: [n] the fold that leaves the image out.
        groups: [n] names of what is drawn together.
        within: [n] codes inside which pairs count, or None.
        grades: [n, G] tiers by several graders, NaN for none, whose pairs count where ``within`` is None.
        rounds: bootstrap rounds behind each interval.

    Raises:
        TrainingError: not even cell 0 could be trained.
    """
    every_score = [scores.reshape(-1).astype(np.float64) for scores, _ in fits]
    good = [i for i, scores in enumerate(every_score) if np.isfinite(scores).all()]
    if 0 not in good:
        raise TrainingError(
            "The loss was not finite with the settings as they are (cell 0), so there is nothing to compare "
            "with: give a lower --learning-rate."
        )
    seeds, folds = fits[0][1].shape
    every, fold = np.tile(tiers, seeds), np.tile(fold_of, seeds)
    place = np.repeat(np.arange(seeds) * folds, len(tiers)) + fold  # seed and fold
    inner = np.zeros_like(place) if within is None else np.tile(within, seeds)
    codes = np.unique(np.stack([place, inner]), axis=1, return_inverse=True)[1].reshape(-1)
    same: dict[str, Any] = {"groups": list(groups) * seeds, "within": codes, "rounds": rounds}
    of = np.arange(len(every))  # the image of each row that is counted
    if grades is not None and within is None:  # a grader of one fold and seed is one of their own
        own = np.full((len(every), seeds * folds, grades.shape[1]), np.nan)
        own[of, place] = np.tile(grades, (seeds, 1))
        same["grades"] = own.reshape(len(every), -1)
        of = np.nonzero(np.isfinite(same["grades"]))[0]
    rows, by_fit = [], []
    for i in good:
        scores = every_score[i]
        counter = PairCounter(scores, every, within=codes, grades=same.get("grades"))
        right, pairs = counter.by_image()
        right, pairs = (np.bincount(place[of], v, seeds * folds) / 2 for v in (right, pairs))
        by_fit.append(right)
        interval = accuracy_interval(scores, every, **same)
        difference = accuracy_interval(scores, every, minus=every_score[0], **same)
        rows.append(
            {
                "cell": i,
                "settings": cell_text(cells[i]),
                "accuracy": right.sum() / pairs.sum(),
                "accuracy_low": interval.low if interval else np.nan,
                "accuracy_high": interval.high if interval else np.nan,
                "difference": (right - by_fit[0]).sum() / pairs.sum(),
                "difference_low": difference.low if difference else np.nan,
                "difference_high": difference.high if difference else np.nan,
                "sd_of_fits": float(np.nanstd(ratio(right, pairs))),
                "median_epoch": float(np.median(fits[i][1])),
            }
        )
    # Each fold judges the cell that is best on all the others.
    by_fold = np.array(by_fit).reshape(len(good), seeds, folds).sum(1)
    best = (by_fold.sum(1, keepdims=True) - by_fold).argmax(0)
    honest = float(by_fold[best, np.arange(folds)].sum() / pairs.sum())
    table = pd.DataFrame(rows).sort_values(["accuracy", "cell"], ascending=[False, True])
    lost = [cells[i] for i in range(len(cells)) if i not in good]
    return table, _text(table, lost, honest, seeds * folds, len(set(groups)))


def _text(table: pd.DataFrame, lost: Sequence[Cell], honest: float, heads: int, groups: int) -> str:
    span = "95 % interval"
    headers = ["cell", "settings", "accuracy", span, "to cell 0", span, "sd", "epoch"]
    shown_rows = pd.concat([table[:_SHOWN], table[_SHOWN:].query("cell == 0")])
    cells = [
        [
            row.cell,
            row.settings,
            f"{row.accuracy:.4f}",
            _span(row.accuracy_low, row.accuracy_high, ""),
            f"{row.difference:+.4f}" if row.cell else "",
            _span(row.difference_low, row.difference_high, "+") if row.cell else "",
            f"{row.sd_of_fits:.4f}",
            f"{row.median_epoch:.0f}",
        ]
        for row in shown_rows.itertuples()
    ]
    lines = [format_table(headers, cells, "rlrlrlrr"), ""]
    if len(shown_rows) < len(table):
        lines.append(f"{len(table) - len(shown_rows)} more cells are in sweep.csv.")
    lines += [f"Not finite, left out: {cell_text(cell)}" for cell in lost]
    lines.append(
        f"Each figure is the mean over {heads} heads, evaluated on the folds they left out and weighed "
        f"by the pairs there; sd is that of single heads. Intervals: {groups} groups drawn again, "
        "training not repeated."
    )
    best = table.iloc[0]
    if best["cell"] == 0:
        lines.append("No cell does better than the settings as they are.")
        return "\n".join(lines)
    lines.append(
        f"The best of {len(table)} cells is picked for its figure, so {best['accuracy']:.4f} flatters "
        f"it: chosen without the fold that judges, the best cell has {honest:.4f}."
    )
    if not best["difference_low"] > 0:
        lines.append(
            f"Cell {best['cell']} is not surely better than cell 0: its difference may as well be chance."
        )
    return "\n".join(lines)


def _span(low: Any, high: Any, sign: str) -> str:
    return "unknown" if pd.isna(low) else f"{low:{sign}.4f} – {high:{sign}.4f}"
