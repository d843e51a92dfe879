"""What end-to-end training starts from: a head-only run, an embedded data set, or a plain folder."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirip_fast.config import Config, HeadConfig
from mirip_fast.data.decode_pool import DecodeJob, DecodePool
from mirip_fast.data.graders import of_grader
from mirip_fast.data.locate import tell_unlisted
from mirip_fast.data.manifest import check_trainable, grade_remarks, only_graded, read_manifest
from mirip_fast.errors import CheckpointError, ConfigError, DataError, ImageError, RunNotFoundError
from mirip_fast.features.datasets import newest_graded
from mirip_fast.features.embed import open_hashes
from mirip_fast.features.outcomes import warn_of
from mirip_fast.features.phase_one import default_workers
from mirip_fast.features.recipe import Recipe, head_kinds, is_patches
from mirip_fast.features.store import differing_fields
from mirip_fast.models.checkpoint import load_checkpoint
from mirip_fast.models.model_info import ModelInfo
from mirip_fast.ranking.folds import FoldsPlan, load_plan, run_of_fold
from mirip_fast.ranking.graded import GradedImages, divide, graded_of_dataset, load_split
from mirip_fast.settings import config_from_dict
from mirip_fast.text import shown
from mirip_fast.training.run_folder import BEST, SPLIT_FILE, Run, find_runs, run_of_checkpoint

log = logging.getLogger(__name__)

_CHECK_SIZE = 32  # pixels: enough to know that an image can be decoded
#: Fields of a fingerprint that say how features were computed and stored, not of what.
_HOW = ("precision", "store_dtype")


@dataclass(frozen=True)
class HeadRun:
    """A head-only run to start from.

    Attributes:
        run: its folder.
        checkpoint: its best one; of a run with folds that of the first.
        info: what its head looks at.
        plan: of a run with folds, how they are divided.
    """

    run: Run
    checkpoint: dict[str, Any]
    info: ModelInfo
    plan: FoldsPlan | None = None

    def __post_init__(self) -> None:
        if self.info.more:
            raise ConfigError(
                f"{self.run.path} looks through several backbones, and --full trains one: start from a run "
                "of one of them (--init-from RUN), or with a random head (--init-from none)"
            )
        if any(map(is_patches, head_kinds(self.info.features))):
            raise ConfigError(
                f"{self.run.path} has a head that attends to patch tokens, and --full trains one on the CLS "
                "token and the mean of the patches: start from a run of `train --head-only --readout head` "
                "(--init-from RUN), or with a random head (--init-from none)"
            )

    @property
    def heads(self) -> tuple[Path, ...]:
        """Checkpoints of the folds' heads; none without folds."""
        folds = 0 if self.plan is None else self.plan.folds
        return tuple(run_of_fold(self.run, fold).best for fold in range(folds))

    @property
    def head(self) -> HeadConfig:
        """The shape of its head."""
        head = config_from_dict(self.checkpoint["config"]).head
        return dataclasses.replace(head, features=self.info.features)


def find_images(
    path: Path | None, config: Config, given: Collection[str]
) -> tuple[Config, GradedImages, str, HeadRun | None]:
    """The images, and the head-only run that ``--init-from`` names, or the newest one of the same data.

    Without such a run they are divided anew: those of an embedded data set, else of the folder or CSV file
    itself.

    Args:
        path: folder or CSV file; None: the head-only run's, or the newest embedded one.
        config: the settings.
        given: dotted keys of those that were set.

    Returns:
        The settings, with those that the images or the head-only run bring; the images with their split; the
        folder or CSV file that they come from; the head-only run.

    Raises:
        RunNotFoundError: a run was named that is not there, or there is nothing to train on.
        CheckpointError: it is no head-only run, or has folds where none are wanted.
        ConfigError: it is on other data, or its folds are others.
        DataError: files are gone or not what they were, faulty grades, or too few images.
    """
    head_run = _find_head_run(config, path)
    cache_dir = Path(config.embed.cache_dir)
    if head_run is not None:
        info, theirs = head_run.info, head_run.run.info.get("grader")
        if config.evaluate.grader not in (None, theirs):
            raise ConfigError(
                f"--grader {config.evaluate.grader}: {head_run.run.path}, whose split and head are taken, "
                f"learned from {theirs or 'all graders'}; train one with --head-only --grader, or give "
                "--init-from none"
            )
        config.evaluate.grader = theirs
        images = load_split(head_run.run.path / SPLIT_FILE, info.tiers)
        check_unchanged(images, cache_dir)
        name = str(head_run.run.info.get("dataset", ""))
        return _with_head_run(config, given, head_run), images, name, head_run
    try:
        dataset = newest_graded(cache_dir, path)
    except RunNotFoundError:
        if path is None:
            raise RunNotFoundError(
                "Say which images to train on: `mirip-fast train --full data/`"
            ) from None
        return _source_of_folder(path, config)
    log.info("Data set %s", shown(dataset.source))
    images = graded_of_dataset(dataset, config.split, grader=config.evaluate.grader)
    return dataclasses.replace(config, data=dataset.data), images, str(dataset.source), None


def _with_head_run(config: Config, given: Collection[str], head_run: HeadRun) -> Config:
    """The settings with the data, split, preprocessing and head of a head-only run.

    Raises:
        ConfigError: another split or head was asked for.
    """
    split = config_from_dict(head_run.checkpoint["config"]).split
    asked = [key.partition(".")[2] for key in given if key.startswith("split.")]
    wrong = [name for name in asked if getattr(config.split, name) != getattr(split, name)]
    if wrong:
        raise ConfigError(
            f"{', '.join(f'split.{name}' for name in sorted(wrong))}: {head_run.run.path} brings its own "
            "split along; leave it out, or start with --init-from none"
        )
    own = {"cache_dir", *(k.partition(".")[2] for k in given if k.startswith("embed."))}
    embed = dataclasses.replace(
        head_run.info.embed, **{name: getattr(config.embed, name) for name in own}
    )
    head = head_run.head
    for name in (k.partition(".")[2] for k in given if k.startswith("head.")):
        if "dropout" not in name and getattr(config.head, name) not in (
            getattr(head, name),
            "auto",
        ):
            raise ConfigError(
                f"head.{name}: the head of {head_run.run.path} has "
                f"{getattr(head, name)}; leave it out, or start with --init-from none"
            )
    if "head.projector_dropout" in given:
        head = dataclasses.replace(head, projector_dropout=config.head.projector_dropout)
    return dataclasses.replace(config, data=head_run.run.data, split=split, embed=embed, head=head)


def check_unchanged(images: GradedImages, cache_dir: Path) -> None:
    """Refuse a split whose files are gone or hold something else now.

    Raises:
        DataError: names the first such file, and how many there are.
    """
    paths = images.paths
    with open_hashes(cache_dir) as memory:
        known = list(memory.sha256_many(paths))
    wrong = [
        f"{path}: {now if isinstance(now, ImageError) else 'its content changed'}"
        for path, now, then in zip(paths, known, images.hashes, strict=True)
        if now != then
    ]
    if wrong:
        raise DataError(
            f"{len(wrong)} of {len(paths)} images of the run's split are not what they were (first: "
            f"{wrong[0]}). Bring them back, or train anew with --init-from none."
        )


def check_same_features(head_run: HeadRun, recipe: Recipe) -> None:
    """Refuse a head that was trained on other features than those to be fine-tuned.

    Raises:
        ConfigError: names the fields that differ, and both values.
    """
    theirs = {k: v for k, v in head_run.info.fingerprint.items() if k not in _HOW}
    ours = {k: v for k, v in recipe.fingerprint.items() if k not in _HOW}
    if theirs != ours:
        raise ConfigError(
            f"The head of {head_run.run.path} was trained on other features than asked for now "
            f"({differing_fields(theirs, ours)}). Leave these options out to take the run's, give "
            "another run with --init-from, or --init-from none for a random head."
        )


def _find_head_run(config: Config, source: Path | None) -> HeadRun | None:
    """With folds one with as many folds, whose heads have not seen what each fold leaves out.

    Where there is none of these, a run without folds gives its split alone.
    """
    wanted, folds = config.finetune.init_from, config.train.folds
    if wanted == "none":
        return None
    if wanted is None:
        found = _newest_head_run(Path(config.train.output_dir), source, folds)
        if found is None:
            log.info("No finished head-only run of this data: the head starts from random weights")
        return found
    try:
        run, path = run_of_checkpoint(Path(wanted))
    except RunNotFoundError as error:
        raise RunNotFoundError(f"--init-from {error}") from error
    if run.info.get("mode", "head-only") not in ("head-only", "folds"):
        raise CheckpointError(f"--init-from {path}: this is no run of `train --head-only`")
    _require_folds(run, folds, wanted)
    if source is not None and not _is_of(run, source):
        raise ConfigError(
            f"--init-from {wanted} is a run on {run.info.get('dataset')}, and brings its split along: "
            f"leave out {source}, or name a run on it"
        )
    if not folds and path.suffix != ".pt":
        raise CheckpointError(
            f"--init-from {wanted}: a run of --readout {run.info.get('readout', 'gp')} has no one head to "
            "start from: name a run of `mirip-fast train --head-only --readout head`, or start with "
            "--init-from none"
        )
    return _folds_head_run(run) if folds else _head_run(run, path)


def _require_folds(run: Run, folds: int, wanted: str) -> None:
    """Refuse a head that has seen what a fold leaves out, and heads where one is wanted."""
    if run.has_folds and not folds:
        n = load_plan(run).folds
        raise CheckpointError(
            f"--init-from {wanted} is a run with {n} folds and has a head for each: add --folds {n}, or "
            "name a run without folds"
        )
    if folds and not run.has_folds:
        raise ConfigError(
            f"--init-from {wanted}: its head has learnt from images that folds leave out, so that no fold "
            f"would be evaluated fairly. Train `mirip-fast train --head-only --folds {folds}` and name that "
            "run, or start with --init-from none"
        )
    if folds and load_plan(run).folds != folds:
        n = load_plan(run).folds
        raise ConfigError(f"--init-from {wanted} has {n} folds, not {folds}: give --folds {n}")


def _newest_head_run(output_dir: Path, source: Path | None, folds: int) -> HeadRun | None:
    usable = [
        run
        for run in find_runs(output_dir)
        if run.info.get("status") == "finished"
        and not run.info.get("debug")
        and run.info.get("mode") in ("head-only", "folds")
        and (source is None or _is_of(run, source))
    ]
    if folds:
        divided = (run for run in usable if run.has_folds and load_plan(run).folds == folds)
        run = next(divided, None)
        if run is not None:
            return _folds_head_run(run)
    whole = next((run for run in usable if not run.has_folds and run.has(BEST)), None)
    if whole is None:
        return None
    if not folds:
        return _head_run(whole, whole.best)
    log.info(
        "The split is that of %s. Its head has seen what folds leave out, so each fold starts with a random "
        "head; after `mirip-fast train --head-only --folds %d` each would start with one of its own",
        whole.path,
        folds,
    )
    checkpoint = load_checkpoint(whole.best)
    return HeadRun(whole, checkpoint, ModelInfo.from_dict(checkpoint["model"]))


def _head_run(run: Run, path: Path) -> HeadRun:
    checkpoint = load_checkpoint(path)
    if "model" not in checkpoint:
        raise CheckpointError(f"--init-from {path}: this is no run of `train --head-only`")
    log.info("Starting from the head of %s, with its split", path)
    return HeadRun(run, checkpoint, ModelInfo.from_dict(checkpoint["model"]))


def _folds_head_run(run: Run) -> HeadRun:
    plan = load_plan(run)
    checkpoint = load_checkpoint(run_of_fold(run, 0).best)
    log.info("Starting from the heads of %s, with its split and its %d folds", run.path, plan.folds)
    return HeadRun(run, checkpoint, plan.info, plan)


def _is_of(run: Run, source: Path) -> bool:
    dataset = Path(str(run.info.get("dataset", "")))
    return source.resolve() in {dataset.resolve(), dataset.parent.resolve()}


def _source_of_folder(
    source: Path, config: Config
) -> tuple[Config, GradedImages, str, HeadRun | None]:
    whole = read_manifest(source, config.data)
    tell_unlisted(whole.source, whole.table["file"])
    manifest = only_graded(of_grader(whole, config.evaluate.grader))
    manifest.require_files()
    check_trainable(manifest)
    with open_hashes(Path(config.embed.cache_dir)) as memory:
        known = list(memory.sha256_many(manifest.paths))
    reasons = {i: str(sha) for i, sha in enumerate(known) if isinstance(sha, ImageError)}
    reasons |= _undecodable(manifest.paths, set(reasons), config)
    if reasons:
        first = next(iter(reasons))
        log.warning(
            "%d of %d images cannot be read and are left out (first: %s: %s)",
            len(reasons),
            len(manifest),
            manifest.paths[first],
            reasons[first],
        )
    good = [i for i in range(len(manifest)) if i not in reasons]
    hashes = [sha for sha in (known[i] for i in good) if isinstance(sha, bytes)]
    manifest = manifest.subset(good)
    for remark in grade_remarks(manifest):
        log.warning(remark)
    images = divide(manifest, hashes, config.split)
    return config, images, str(manifest.source), None


def _undecodable(paths: Sequence[Path], known_bad: set[int], config: Config) -> dict[int, str]:
    """Index → reason of the files that no decoder can read."""
    limit = round(config.embed.max_megapixels * 1e6)
    jobs = (
        DecodeJob(i, path, (_CHECK_SIZE,), "squash", True, max_pixels=limit)
        for i, path in enumerate(paths)
        if i not in known_bad
    )
    reasons, flat = {}, []
    with DecodePool(default_workers(config.embed.workers)) as pool:
        for item in pool.decode(jobs):
            if item.reason is not None:
                reasons[item.index] = item.reason
            elif item.flat:
                flat.append(paths[item.index])
    warn_of(flat, "of a single colour")
    return reasons
