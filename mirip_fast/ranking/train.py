"""`train --head-only` as a whole: find the data, split it, fit the head, leave a finished run."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mirip_fast.config import Config, DataConfig
from mirip_fast.data.applicants import sets_of
from mirip_fast.data.graders import grades_of, learned_grades
from mirip_fast.data.pair_files import pairs_table, says_content
from mirip_fast.errors import CheckpointError, ConfigError, StoreError
from mirip_fast.evaluation.agreement import agreement
from mirip_fast.evaluation.report import Report
from mirip_fast.features.datasets import (
    Dataset,
    datasets_through,
    find_datasets,
    newest_dataset,
    newest_graded,
)
from mirip_fast.features.recipe import is_patches
from mirip_fast.features.store import STORE_FILE, FeatureStore, differing_fields
from mirip_fast.files import write_text
from mirip_fast.models.checkpoint import load_checkpoint
from mirip_fast.models.model_info import ModelInfo
from mirip_fast.ranking.anchors import keep_anchors
from mirip_fast.ranking.finished import finish_run, report_run, show_run
from mirip_fast.ranking.fit import HeadFit
from mirip_fast.ranking.folds import (
    FoldsPlan,
    load_plan,
    plan_folds,
    train_folds,
)
from mirip_fast.ranking.graded import (
    GradedImages,
    as_trial,
    graded_of_dataset,
    graded_of_files,
    load_split,
    save_split,
    trial,
    with_dataset,
)
from mirip_fast.ranking.held_out import keep_references
from mirip_fast.ranking.judged_pairs import (
    JoinedPairs,
    JudgedPairs,
    PairReport,
    load_joined_pairs,
    load_judged_pairs,
    read_judged_pairs,
    save_judged_pairs,
    tell_pairs,
    warn_of_few,
    with_train_and_val,
)
from mirip_fast.ranking.objective import describe_pairs, make_loss, pairs_files, require_pairs
from mirip_fast.ranking.readouts import choose_readout, fit_readout, learns_pairs
from mirip_fast.ranking.rows import (
    JoinedStore,
    ListedPairs,
    Rows,
    missing_rows,
    read_features,
    with_features,
)
from mirip_fast.ranking.score_model import save_head
from mirip_fast.ranking.scorer import load_score_model
from mirip_fast.runtime import resolve_device
from mirip_fast.settings import config_from_dict, to_yaml
from mirip_fast.text import path_of, shown
from mirip_fast.training.optim import Preset, check_averaging, choose_preset
from mirip_fast.training.run_folder import (
    FOLDS_FILE,
    SPLIT_FILE,
    Run,
    create_run,
    find_runs,
    remove_runs_without_checkpoint,
    resumable_run,
)
from mirip_fast.training.trackers import parse_report_to, start_trackers

log = logging.getLogger(__name__)


def train_head(
    config: Config,
    source: Path | None = None,
    *,
    split_files: Mapping[str, Path] | None = None,
    debug: bool = False,
    only_folds: Sequence[int] = (),
    grades: Mapping[str, str] | None = None,
    served: bool = False,
    backbones: Sequence[str] = (),
) -> tuple[Run, Report | PairReport | None]:
    """Train on cached features: a Gaussian process, a head, or a head per fold.

    Args:
        config: the settings.
        source: folder or CSV file that was embedded; None takes the newest one with grades.
        split_files: CSV file per split, where the split is given.
        debug: a trial on 100 images and two epochs, without tracking.
        only_folds: with folds: those to train now; none: all.
        grades: settings of the section data that are other than when the data set was embedded: what its
            tiers and grade columns are called.
        served: learn the judged pairs, too, that `serve` made with runs on the same data.
        backbones: learn from the features of these side by side, local folders named with their whole path;
            none: of all that the command named that embedded the data set last.

    Returns:
        The run, and how works that were left out are ordered by a Gaussian process or by all folds together;
        None for a single head, and while folds are missing.

    Raises:
        ConfigError: folds that do not exist.
        RunNotFoundError: nothing embedded that could be trained on.
        DataError, StoreError: the data or the cache cannot be used; says why.
        TrainingError: the loss is not finite.
    """
    parse_report_to(config.tracking.report_to)
    if only_folds and not config.train.folds:
        raise ConfigError("--only-folds goes with --folds: say how many there are")
    grades = grades or {}
    cache_dir = Path(config.embed.cache_dir)
    judged_files = pairs_files(config.train)
    readout = choose_readout(config, listed=bool(judged_files))
    find = newest_graded if all(map(says_content, judged_files)) and not grades else newest_dataset
    datasets = datasets_through(cache_dir, find(cache_dir, source), backbones)
    dataset = datasets[0]
    data = dataclasses.replace(dataset.data, **grades)
    # Grades may be named now that embedding did not find; what was moved in `serve` never takes their place.
    graded = dataset.info["graded"] or not {"tier_column", "score_column"}.isdisjoint(grades)
    if served and not judged_files:
        graded, judged_files = True, _served_pairs(config, dataset, readout)
        if judged_files:
            config = _with_train(config, pairs=",".join(map(str, judged_files)))
    alone = _learns_pairs_alone(config, judged_files, graded=graded)
    _tell_of(cache_dir, datasets, named=bool(backbones))
    config, images = _images(config, dataset, data, split_files, need_tiers=not alone)
    if debug:
        config = as_trial(config)
        images = images if alone else trial(images)
    judged: JudgedPairs | JoinedPairs | None = None
    if judged_files:
        judged, readout = _judged(config, judged_files, images, dataset, readout, alone=alone)
    config, store, info = _looked_at(config, data, datasets, images, readout)
    preset, mode, name = None, "folds" if config.train.folds else "head-only", "head"
    if readout in ("gp", "auto", "ensemble"):
        mode, name = "head-only", readout
    else:
        preset = _preset(config, images, judged)
        check_averaging(config.train, preset.epochs)
        if mode != "folds":  # each fold has its own
            config = _with_train(config, **vars(preset))
    remove_runs_without_checkpoint(Path(config.train.output_dir))
    run = create_run(
        Path(config.train.output_dir), config.train.name or name,
        mode=mode, debug=debug, dataset=str(dataset.source), store=str(dataset.store_path),
        backbones=[each.embed.backbone for each in info.backbones], data=vars(data),
        within=config.evaluate.within, grader=config.evaluate.grader,
    )  # fmt: skip
    write_text(run.path / "config.yaml", to_yaml(config))
    if mode == "folds":
        return run, _folded(run, plan_folds(run, config, info, images), store, only_folds)
    save_split(run.path / SPLIT_FILE, images)
    save_judged_pairs(run, judged)
    if preset is None:
        patches = _patches_to_try(dataset, info, readout)
        return run, fit_readout(run, config, readout, images, store, info, patches, judged)
    _fit(run, config, preset, images, judged, store, info, None)
    return run, None


def _images(
    config: Config,
    dataset: Dataset,
    data: DataConfig,
    files: Mapping[str, Path] | None,
    *,
    need_tiers: bool,
) -> tuple[Config, GradedImages]:
    """The images with their split, of which it is told how they are graded, and the settings for them."""
    how: Any = {"need_tiers": need_tiers, "grader": config.evaluate.grader}
    if files:
        root, cache_dir = path_of(dataset.info["root"]), Path(config.embed.cache_dir)
        images = graded_of_files(files, data, root, cache_dir, **how)
    else:
        images = graded_of_dataset(dataset, config.split, data=data, **how)
    tell_agreement(images, config, learned=need_tiers)
    if need_tiers and not images.has_tiers:
        if config.train.folds:
            raise ConfigError(
                "--folds divides works by their tiers, and these have none: leave it out"
            )
        log.info("The works have no tiers: the column %s is learned from", data.score_column)
        config = _with_train(config, label="tier_score")
    sets = sets_of(images) if need_tiers else None
    if sets is not None and learned_grades(images.table) is None:
        log.info(
            "Applicants are graded, not works: the mean score of each one's works is learned (%d applicants, "
            "%d works)",
            sets.max() + 1, len(sets),
        )  # fmt: skip
    return config, images


def _patches_to_try(dataset: Dataset, info: ModelInfo, readout: str) -> str | None:
    patches = next(filter(is_patches, dataset.info["kinds"]), None)
    if info.more and patches and readout != "gp":
        log.info("Attention is not tried: it looks through one backbone")
    return None if info.more else patches


def _learns_pairs_alone(config: Config, files: Sequence[Path], *, graded: bool) -> bool:
    """Whether judged pairs are all that is learned.

    Raises:
        ConfigError: settings that do not go with them.
    """
    make_loss(config.train)
    if files and config.train.folds:
        raise ConfigError(
            "--folds goes with --pairs all or sampled, not with a file of pairs: it divides the images, and "
            "of judged pairs hardly any would keep both theirs"
        )
    alone = bool(files) and (config.train.label == "pairs" or not graded)
    if alone and config.train.label == "tier_score":
        raise ConfigError(
            "--label goes with --pairs all or sampled, not with a file, without grades"
        )
    return alone


def _served_pairs(config: Config, dataset: Dataset, readout: str) -> list[Path]:
    """The files of judged pairs that `serve` made with runs on this data set."""
    runs = [run.info for run in find_runs(Path(config.train.output_dir))]
    known = [
        f for i in runs if i.get("dataset") == str(dataset.source) for f in i.get("served", ())
    ]
    files = []
    for path in map(Path, dict.fromkeys(known)):
        if not path.is_file():
            log.info("%s is gone: what was moved in `serve` is not learned from", shown(path))
        elif len(pairs_table(path).cells):
            files.append(path)
    if files and (config.train.folds or readout in ("auto", "ensemble")):
        log.warning(
            "%s: the judged pairs are left out: --folds, auto and ensemble learn from grades alone",
            ", ".join(map(shown, files)),
        )
        return []
    return files


def _folded(run: Run, plan: FoldsPlan, store: FeatureStore, only: Sequence[int]) -> Report | None:
    """Train a head per fold, each reported as a run of its own, and report what they are together."""

    def fit(
        own: Run, _: int, config: Config, images: GradedImages, checkpoint: Path | None
    ) -> None:
        preset = _preset(config, images, None)
        config = _with_train(config, **vars(preset))
        begun = None if checkpoint is None else load_checkpoint(checkpoint)
        _fit(own, config, preset, images, None, store, plan.info, begun)

    held_out, report = train_folds(
        run, plan, fit, lambda model, images: model.score(store, images.hashes), only
    )
    if report is not None:
        keep_anchors(load_score_model(run.model), plan.images, store)
    report_run(run, plan.config, held_out, report)
    return report


def tell_agreement(images: GradedImages, config: Config, *, learned: bool = True) -> None:
    """Say how far several graders agree, and what of their grades is learned."""
    found = agreement(images.table)
    if found is None:
        return
    log.info(found.to_line())
    if not learned or config.train.label != "tier":
        return
    grades = grades_of(images.table)
    log.info(
        "Works are compared inside one grader's tiers, so a strict and a mild one are not mixed"
        if learned_grades(images.table) is not None
        else "No grader gave two tiers: works are compared by tier, whoever gave it"
        if (np.nanmin(grades, axis=0) == np.nanmax(grades, axis=0)).all()
        else "The column of tiers is another than the graders' median: it counts as decided, and is learned"
    )


def _tell_of(cache_dir: Path, datasets: Sequence[Dataset], *, named: bool) -> None:
    """Say what is learned from, and with which other backbones the same was embedded."""
    names = [shown(Path(each.info["backbone"])) for each in datasets]
    log.info("Data set %s (embedded with %s)", shown(datasets[0].source), " and ".join(names))
    ours = [each.info["embed"]["backbone"] for each in datasets]
    source = datasets[0].info["source"]
    others = {
        known.info["embed"]["backbone"]
        for known in find_datasets(cache_dir)
        if known.info["source"] == source
    } - {*ours}
    if others and not named:
        flags = " ".join(f"--backbone {shlex.quote(name)}" for name in [*ours, *sorted(others)])
        log.info("It is embedded with others, too; to learn from all of them: %s", flags)


def _looked_at(
    config: Config,
    data: DataConfig,
    datasets: Sequence[Dataset],
    images: GradedImages,
    readout: str,
) -> tuple[Config, FeatureStore, ModelInfo]:
    """The settings of a run, the store to learn from, and what is learned from: through each backbone.

    Raises:
        ConfigError: the data sets have other numbers of views, or are several for --readout attention.
        StoreError: a backbone lacks features of some images; says what to type.
    """
    if readout == "attention" and len(datasets) > 1:
        raise ConfigError(
            "--readout attention looks through one backbone: name one with --backbone"
        )
    configs = [with_dataset(config, each, readout, data) for each in datasets]
    stores = [FeatureStore.open(each.store_path) for each in datasets]
    infos = []
    for dataset, own, store in zip(datasets, configs, stores, strict=True):
        if len(dataset.views()) != len(datasets[0].views()):
            raise ConfigError(
                f"Embedded with {dataset.info['backbone']} are {len(dataset.views())} views of each image, "
                f"with {datasets[0].info['backbone']} {len(datasets[0].views())}: embed with the same --tta"
            )
        lack = missing_rows(store, images.hashes, own.head.features, dataset.views())
        if lack and len(datasets) > 1:
            raise StoreError(
                f"{lack} of {len(images)} images have no features of {dataset.info['backbone']} yet: run "
                f"`{dataset.embed_command(whole=True)}` to add them"
            )
        features, views = own.head.features, tuple(dataset.views())
        width = read_features(store, images.hashes[:1], features, views).shape[2]
        infos.append(
            ModelInfo(store.fingerprint, own.embed, views, features, images.tier_names, width)
        )
    if len(infos) == 1:
        return configs[0], stores[0], infos[0]
    info = ModelInfo.joined(infos)
    names = ",".join(each.embed.backbone for each in infos)
    embed = dataclasses.replace(configs[0].embed, backbone=names)
    config = dataclasses.replace(configs[0], embed=embed)
    return config, JoinedStore(stores, info), info


def _judged(
    config: Config,
    files: Sequence[Path],
    images: GradedImages,
    dataset: Dataset,
    readout: str,
    *,
    alone: bool,
) -> tuple[JudgedPairs | JoinedPairs | None, str]:
    """The judged pairs, alone or to join the grades (None without one to learn from), and what learns."""
    zero = config.train.pairs_zero
    table = read_judged_pairs(files, images, dataset, zero, elsewhere=not alone)
    if readout == "gp":
        splits = [row["split"] for row in table if row["split"]]
        readout = "gp" if learns_pairs(splits, config.head.readout) else "head"
    if readout == "gp":
        table = with_train_and_val(table, images, elsewhere=not alone)
    learned = ("train", "val") if readout == "gp" else ("train",)
    if not alone:
        joined = JoinedPairs.of(table, learned)
        tell_pairs(files, table, len(joined.pairs), len(images.part(*learned)))
        return (joined if joined.pairs.decided else None), readout
    judged = JudgedPairs.of(table, images)
    tell_pairs(files, table)
    if readout != "gp":
        warn_of_few(judged, graded=images.has_grades)
    return judged, readout


def resume_head(
    which: str,
    output_dir: Path,
    only_folds: tuple[int, ...] = (),
) -> tuple[Run, Report | None]:
    """Go on with an interrupted run, with its own configuration, split and data.

    Args:
        which: ``latest``, a run's folder or a checkpoint.
        output_dir: folder of the runs.
        only_folds: with folds: those to train now; none: all that are missing.

    Raises:
        RunNotFoundError: nothing to resume.
        CheckpointError: the checkpoint does not belong to the cached features.
    """
    run, path = resumable_run(output_dir, which, full=False)
    if run.has_folds:
        if run.info.get("mode") == "full":
            raise CheckpointError(
                f"{run.path} was not written by `mirip-fast train --head-only`: `mirip-fast train --full "
                f"--resume {run.path}` goes on with it"
            )
        log.info("Resuming %s, with its own settings", run.path)
        plan = load_plan(run)
        store = _store_of(plan.info, Path(plan.config.embed.cache_dir), run.path / FOLDS_FILE)
        return run, _folded(run, plan, store, only_folds)
    if only_folds:
        raise ConfigError(f"--only-folds: {run.path} has no folds")
    checkpoint = load_checkpoint(path)
    if "model" not in checkpoint or "pace" not in checkpoint.get("training_state", {}):
        raise CheckpointError(f"{path} was not written by `mirip-fast train --head-only`")
    config = config_from_dict(checkpoint["config"])
    info = ModelInfo.from_dict(checkpoint["model"])
    log.info("Resuming %s after epoch %d, with its own settings", run.path, checkpoint["epoch"])
    store = _store_of(info, Path(config.embed.cache_dir), path)
    images = load_split(run.path / SPLIT_FILE, info.tiers, config.data)
    preset = Preset(**checkpoint["training_state"]["pace"])
    judged = load_joined_pairs(run) or load_judged_pairs(run.path, images)
    run.remove_partial_files()
    run.truncate_history(int(checkpoint["epoch"]))
    _fit(run, config, preset, images, judged, store, info, checkpoint)
    return run, None


def _store_of(info: ModelInfo, cache_dir: Path, checkpoint: Path) -> FeatureStore:
    """The store that a checkpoint's head was trained on.

    Raises:
        CheckpointError: it is not there; names what the nearest one has different.
    """
    if info.more:
        return JoinedStore(
            [_store_of(each, cache_dir, checkpoint) for each in info.backbones], info
        )
    path = cache_dir / info.fingerprint_id
    there = [FeatureStore.open(found.parent) for found in sorted(cache_dir.glob(f"*/{STORE_FILE}"))]
    for store in there:
        if store.fingerprint == info.fingerprint and store.path == path:
            return store
    if not there:
        raise CheckpointError(
            f"{checkpoint} needs the features in {path}, and there are none: run `mirip-fast embed` again"
        )
    differences = [(differing_fields(info.fingerprint, s.fingerprint), s.path) for s in there]
    nearest = min(differences, key=lambda found: found[0].count("≠"))
    raise CheckpointError(
        f"{checkpoint} does not fit the features in {cache_dir.resolve()}: the nearest are "
        f"{nearest[1].name} ({nearest[0]}; the checkpoint's come first). Embed as it was trained, or train "
        "again."
    )


def _fit(
    run: Run,
    config: Config,
    preset: Preset,
    images: GradedImages,
    judged: JudgedPairs | JoinedPairs | None,
    store: FeatureStore,
    info: ModelInfo,
    checkpoint: dict[str, Any] | None,
) -> None:
    """Fit into the run's folder, and leave it finished, failed or interrupted."""
    with run.log_to_file(), run.in_progress(), contextlib.ExitStack() as failing:
        train, val = (
            with_features(labels, store, part.hashes, info.features, info.views)
            for part, labels in (_labels(images, judged, s, config) for s in ("train", "val"))
        )
        device = resolve_device(config.runtime.device)
        log.info(
            "Run %s: %d training and %d validation images, %s, batch %d, learning rate %g, "
            "at most %d epochs, on %s",
            run.path,
            len(train),
            len(val),
            describe_pairs(config.train, train),
            preset.batch_size,
            preset.learning_rate,
            preset.epochs,
            device,
        )
        if train.pairs is not None or config.train.label != "tier":
            log.info(
                "val accuracy is that of the validation split's own pairs of this kind; behind it, "
                "that of all pairs of different tiers"
                if train.pairs is None or val.pairs is not None
                else "val accuracy is that of the tiers: too few judged pairs lie in the val split"
            )
        joined = None
        if isinstance(judged, JoinedPairs):
            joined = judged.rows(store, info.features, info.views)
        fit = HeadFit(train, val, config, preset, info.to_dict(), device, joined)
        if checkpoint is not None:
            fit.resume(checkpoint)
        trackers = start_trackers(config.tracking, run.path, config.to_dict())
        failing.callback(trackers.finish, None)
        result = fit.run(run, trackers)
        show_run(trackers, run, *_finish(run, result, config, info, images, store))
        trackers.finish(run.best)
        failing.pop_all()


def _finish(
    run: Run,
    result: Mapping[str, Any],
    config: Config,
    info: ModelInfo,
    images: GradedImages,
    store: FeatureStore,
) -> tuple[GradedImages | None, Report | None]:
    """What a run leaves; returns the works with held-out scores, and how these order them."""
    best = load_checkpoint(run.best)
    arrays = {name: value.numpy() for name, value in best["model_state_dict"].items()}
    save_head(run.path, run.best, arrays, info)
    held_out, report = None, None
    # Folds are calibrated together, on what each left out; judged pairs alone give no tiers to learn from.
    if (images.has_grades or images.has_scores) and run.info.get("mode") != "fold":
        model, val = load_score_model(run.best), images.part("val")
        held_out = val.with_scores(model.score(store, val.hashes), "validation")
        report = keep_references(model, held_out, config.evaluate.within)
        keep_anchors(model, images, store)
    finish_run(run, held_out, report, **result)
    return held_out, report


def _with_train(config: Config, **values: Any) -> Config:
    """The settings with other values in the section train."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **values))


def _preset(
    config: Config, images: GradedImages, judged: JudgedPairs | JoinedPairs | None
) -> Preset:
    """How fast to learn; refuses a train or val split that has no pair (DataError)."""
    loss, sizes = make_loss(config.train), []
    for split in ("train", "val"):
        rows = _labels(images, judged, split, config)[1]
        require_pairs(rows, loss, split)
        sizes.append(images.splits.count(split) if rows.pairs is None else len(rows.pairs))
    return choose_preset(config.train, sizes[0])


def _labels(
    images: GradedImages, judged: JudgedPairs | JoinedPairs | None, split: str, config: Config
) -> tuple[GradedImages, Rows]:
    """The images of a split that training looks at, and what is known of them but their features."""
    label = config.train.label
    if not isinstance(judged, JudgedPairs):
        part = images.part(split)
        return part, part.labels(config.evaluate.within, label=label)
    # People judged them: the pairs are fair whatever the within column says.
    part = judged.part(split, images, only_judged=split == "train")
    pairs: ListedPairs | None = judged.listed(split, images, part)
    if split == "val" and not judged.can_choose and part.has_grades:
        pairs = None
    return part, part.labels(None, label=label, pairs=pairs)
