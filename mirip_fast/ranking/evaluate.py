"""`evaluate`: a model on a split or on other files, and several models side by side."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mirip_fast.config import Config
from mirip_fast.data.graders import named_grader, of_grader
from mirip_fast.data.manifest import only_graded, read_manifest
from mirip_fast.data.sources import is_unchanged
from mirip_fast.errors import DataError, StoreError
from mirip_fast.evaluation.agreement import agreement
from mirip_fast.evaluation.bootstrap import paired_bootstrap, span
from mirip_fast.evaluation.metrics import codes_of
from mirip_fast.evaluation.plots import write_contact_sheet
from mirip_fast.evaluation.report import Report, evaluate, plain
from mirip_fast.evaluation.text_table import format_table
from mirip_fast.features.embed import OnProgress
from mirip_fast.features.phase_one import settings_of
from mirip_fast.files import write_json
from mirip_fast.ranking.applicants import evaluate_applicants
from mirip_fast.ranking.baselines import Baseline, baselines_text, compare_with_baselines
from mirip_fast.ranking.graded import GradedImages, load_split
from mirip_fast.ranking.held_out import load_calibration, made_with
from mirip_fast.ranking.rows import open_store
from mirip_fast.ranking.score_model import ScoreModel
from mirip_fast.ranking.scorer import load_score_model, score_files
from mirip_fast.text import counted
from mirip_fast.training.run_folder import SPLIT_FILE, Run, default_run, run_of_checkpoint

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)


def pick_model(checkpoint: Path | None, output_dir: Path) -> ScoreModel:
    """The model that ``--checkpoint`` names, or that of the newest finished run; says which.

    Raises:
        RunNotFoundError: there is none.
        CheckpointError: it cannot be read.
    """
    if checkpoint is None:
        run = default_run(output_dir)
        path = run.model
    else:
        run, path = run_of_checkpoint(checkpoint)
    log.info("Model %s", path)
    model = load_score_model(path)
    backbones = len(model.parts())
    if backbones > 1:
        log.info(
            "An ensemble of %d fine-tuned backbones: every image is embedded %d times, once with each, "
            "unless its features are in the cache",
            backbones,
            backbones,
        )
    return model


@dataclass(frozen=True)
class Evaluation:
    """A report on a model, where it belongs, and the images it is about.

    Attributes:
        report: the figures.
        path: JSON file in the run's folder.
        images: what was evaluated on.
        model: what was evaluated.
        about: the images in words.
        within: the column inside whose values works were compared, or None.
        baselines: what the model was compared with; none where nobody asked.
    """

    report: Report
    path: Path
    images: GradedImages
    model: ScoreModel
    about: str
    within: str | None = None
    baselines: tuple[Baseline, ...] = ()

    def write(self, path: Path | None = None, **more: Any) -> list[Path]:
        """Write the JSON file, and the figures and the worst mistakes as pictures beside it.

        Args:
            path: another place for the JSON file.
            more: further entries of the JSON file.

        Returns:
            The files written.
        """
        path = path or self.path
        about = {"checkpoint": str(self.model.checkpoint), **more, **self.report.to_dict()}
        if self.baselines:
            about["baselines"] = plain(self.baselines)
        if self.report.agreement is not None:
            about["agreement"] = self.report.agreement.to_dict()
        write_json(path, about)
        files = [path, *self.report.draw(path.parent, path.stem, self.about)]
        mistakes = shown_mistakes(self.report, self.images)
        hidden = len(self.report.worst_mistakes()) - len(mistakes)
        if hidden:
            log.warning(
                "%s not drawn: a file has another content than the one that was evaluated",
                counted(hidden, "mistake"),
            )
        if len(mistakes):
            files.append(path.with_name(f"{path.stem}_mistakes.png"))
            write_contact_sheet(
                files[-1], mistakes, files_of(self.images), f"Worst mistakes, {self.about}"
            )
        return files


def shown_mistakes(report: Report, images: GradedImages, k: int = 10) -> pd.DataFrame:
    """The worst mistakes whose pictures are those that were evaluated.

    Who made a run chose the paths in its split.csv: a file that only lies there now is shown to nobody.

    Args:
        report: the figures.
        images: what was evaluated on.
        k: how many at most.
    """
    mistakes = report.worst_mistakes(k)
    content, files = dict(zip(images.ids, images.hashes, strict=True)), files_of(images)
    ids = mistakes[["better_id", "worse_id"]]
    names = set(ids.to_numpy().ravel())
    other = {n for n in names if content[n] and not is_unchanged(files[n], content[n])}
    return mistakes[~ids.isin(other).any(axis=1)]


def files_of(images: GradedImages) -> dict[str, Path]:
    """Image id → file."""
    return dict(zip(images.ids, images.paths, strict=True))


def evaluate_split(
    model: ScoreModel, split: str, config: Config, *, baselines: bool = False
) -> Evaluation:
    """Evaluate a model on one split of its own run, from the cache.

    Args:
        model: a run's model.
        split: train, val or test.
        config: the sections evaluate, embed and runtime are used.
        baselines: also compare it with chance, ridge regression and the last run.

    Raises:
        DataError: the run has no such split.
        StoreError: the features are not in the cache any more.
    """
    folder = model.checkpoint.parent
    info = Run(folder).info
    if config.evaluate.within is None and info.get("within"):  # compared as in training
        evaluate = dataclasses.replace(config.evaluate, within=info["within"])
        config = dataclasses.replace(config, evaluate=evaluate)
    images = _part(model, split, config)
    if not len(images):
        raise DataError(f"{folder / SPLIT_FILE} has no images in the {split} split")
    if not (images.has_grades or images.has_scores):
        raise DataError(
            f"{folder} was trained on judged pairs of images without grades: give graded images with "
            "--test-data"
        )
    log.info("%s split: %d images", split.capitalize(), len(images))
    scores = np.mean([_split_scores(part, images, config) for part in model.parts()], axis=0)
    path, about = folder / f"evaluation_{split}.json", f"{split} split, {len(images)} images"
    return _evaluation(scores, images, config, model, path, about, baselines and split)


def _split_scores(model: ScoreModel, images: GradedImages, config: Config) -> NDArray[np.float32]:
    """Scores from the cache, else of the image files, each of which has to be the one that was split."""
    cache_dir, paths = Path(config.embed.cache_dir), images.paths
    try:
        return model.score(open_store(cache_dir, model.info), images.hashes)
    except StoreError as error:
        log.info("Not all features of these images are in the cache: they are computed")
        log.debug("%s", error)
    scored = score_files(
        model, paths,
        cache_dir=cache_dir, device=config.runtime.device,
        settings=settings_of(config.embed, len(paths)),
    )  # fmt: skip
    found = scored.outcomes
    for path, reason, now, sha in zip(
        paths, found["reason"], found["sha256"], images.hashes, strict=True
    ):
        if reason or now != sha:
            why = reason or "its content changed since training"
            raise DataError(f"{path} of the run's split cannot be scored: {why}")
    return scored.scores


def evaluate_files(
    model: ScoreModel,
    source: Path,
    image_dir: Path | None,
    config: Config,
    backbone: str | None,
    progress: OnProgress,
    *,
    baselines: bool = False,
) -> Evaluation:
    """Evaluate a model on graded images from anywhere, embedding what is not cached.

    Raises:
        DataError: faulty grades, other tiers than the model's, or images that cannot be read.
    """
    data = config.data
    if model.info.tiers:  # one that learned from finer grades alone takes any
        data = dataclasses.replace(data, tiers=",".join(model.info.tiers))
    if image_dir is not None:
        data = dataclasses.replace(data, image_root=str(image_dir))
    whole, grader = read_manifest(source, data), config.evaluate.grader
    if grader is None:  # judged as in training
        grader = named_grader(whole.table, Run(model.checkpoint.parent).info.get("grader"))
    manifest = only_graded(of_grader(whole, grader))
    manifest.require_files()
    if not (manifest.has_grades or manifest.has_scores):
        raise DataError(
            f"{source} has no grades to evaluate by: a column {data.tier_column!r} with two tiers, or a "
            f"column {data.score_column!r} with two numbers, is needed"
        )
    scored = score_files(
        model,
        manifest.paths,
        cache_dir=Path(config.embed.cache_dir),
        device=config.runtime.device,
        backbone=backbone,
        settings=settings_of(config.embed, len(manifest)),
        progress=progress,
    )
    good = np.flatnonzero(scored.outcomes["status"] != "failed").tolist()
    if len(good) < len(scored.outcomes):
        log.warning(
            "%d images could not be read and are left out", len(scored.outcomes) - len(good)
        )
    hashes = scored.outcomes["sha256"][good].tolist()
    images = GradedImages.of(manifest.subset(good), hashes, ["test"] * len(good))
    path = model.checkpoint.parent / f"evaluation_{source.stem}.json"
    about = f"{source.name}, {len(images)} images"
    return _evaluation(scored.scores[good], images, config, model, path, about, baselines and "")


def _evaluation(
    scores: NDArray[Any],
    images: GradedImages,
    config: Config,
    model: ScoreModel,
    path: Path,
    about: str,
    beside: str | bool,
) -> Evaluation:
    """Evaluate scores [n] of images; ``beside``: of which split they are, to be compared with baselines."""
    within, rounds = config.evaluate.within, config.evaluate.bootstrap_rounds
    report = evaluate(
        scores,
        images.tier_codes if images.has_tiers else None,
        tier_names=images.tiers,
        image_ids=images.ids,
        groups=images.groups,
        tier_scores=images.tier_scores,
        within=None if within is None else images.column(within),
        grades=images.grades,
        calibration=load_calibration(model),
        seen=made_with(model, images.hashes),
        rounds=rounds,
    )
    baselines: tuple[Baseline, ...] = ()
    if beside is not False:
        baselines = compare_with_baselines(model, images, report, config, own_test=beside == "test")
    report = dataclasses.replace(
        report,
        applicants=evaluate_applicants(model, scores, images, config),
        agreement=agreement(images.table, scores, rounds=rounds),
        better_than=baselines_text(baselines),
    )
    return Evaluation(report, path, images, model, about, within, baselines)


def evaluate_side_by_side(
    models: Sequence[ScoreModel], split: str, config: Config
) -> tuple[str, dict[str, Any]]:
    """Evaluate several models on one split, which has to be the same in all their runs.

    Args:
        models: at least two.
        split: train, val or test.
        config: the sections evaluate, embed and runtime are used.

    Returns:
        A table as text, and in plain types ``split``, ``n_images`` and ``rows``: per run, in the order given,
        its folder's name ``run``, pairwise ``accuracy`` (0–1) and its ``interval`` (None means unknown), the
        ``difference`` to the first one on the same resamples (None for that), and the ``seconds_per_epoch``
        of its training (None where its history is gone).

    Raises:
        DataError: their splits differ, so that one may have learnt from what another is evaluated on.
    """
    parts = [_part(model, split, config) for model in models]
    first = parts[0]
    for model, part in zip(models[1:], parts[1:], strict=True):
        _require_same(models[0], first, model, part, split)
    rows: list[dict[str, Any]] = []
    cells: list[list[str]] = []
    tiers, groups = first.order, first.groups
    within = config.evaluate.within
    codes = None if within is None else codes_of(first.column(within))
    base = np.empty(0)
    for model, part in zip(models, parts, strict=True):
        report = evaluate_split(model, split, config).report
        place = {sha: i for i, sha in enumerate(part.hashes)}
        scores = np.asarray(report.scores)[[place[sha] for sha in first.hashes]]
        difference = None
        if rows:
            difference = paired_bootstrap(
                scores, base, tiers, groups, within=codes, finer=not first.has_tiers,
                grades=first.grades if within is None else None,
                rounds=config.evaluate.bootstrap_rounds,
            )  # fmt: skip
        else:
            base = scores
        run = Run(model.checkpoint.parent)
        inside = codes is not None and report.within_accuracy is not None
        accuracy = report.within_accuracy if inside else report.pairwise_accuracy
        interval = report.within_accuracy_interval if inside else report.pairwise_accuracy_interval
        assert accuracy is not None
        seconds = [float(row["epoch_seconds"]) for row in run.history() if row.get("epoch_seconds")]
        spent = float(np.mean(seconds)) if seconds else None
        rows.append(
            {
                "run": run.path.name, "accuracy": accuracy, "interval": interval,
                "difference": difference, "seconds_per_epoch": spent,
            }
        )  # fmt: skip
        cells.append([
            run.path.name, f"{accuracy:.4f}", span(interval),
            "" if difference is None else f"{difference['difference']:+.4f}",
            "" if difference is None else span(difference["interval"], "+"),
            "" if spent is None else f"{spent:.2f}",
        ])  # fmt: skip
    headers = [
        *("run", "pairwise accuracy", "95 % interval"),
        *("minus the first", "95 % interval", "s per epoch"),
    ]
    head = f"{split.capitalize()} split, {len(first)} images, the same for all runs"
    text = f"{head}\n\n{format_table(headers, cells, 'lrlrlr')}"
    return text, {"split": split, "n_images": len(first), "rows": plain(rows)}


def _part(model: ScoreModel, split: str, config: Config) -> GradedImages:
    """A split of a model's run; by one grader's tiers where that is asked for."""
    folder = model.checkpoint.parent
    images = load_split(folder / SPLIT_FILE, model.info.tiers).part(split)
    return images.of_grader(config.evaluate.grader)


def _require_same(
    model: ScoreModel, part: GradedImages, other: ScoreModel, its: GradedImages, split: str
) -> None:
    ours, theirs = (
        dict(zip(images.hashes, images.order.tolist(), strict=True)) for images in (part, its)
    )
    if ours == theirs and model.info.tiers == other.info.tiers:
        return
    common = ours.keys() & theirs.keys()
    graded = sum(ours[sha] != theirs[sha] for sha in common)
    raise DataError(
        f"The {split} splits of {model.checkpoint.parent} and {other.checkpoint.parent} differ: "
        f"{len(ours)} and {len(theirs)} images, {len(common)} in common"
        + (f", {graded} of them graded differently" if graded else "")
        + ". One run may have learnt from what the other is evaluated on. Runs share a split when they are "
        "trained on the same data with the same --split-seed, or with --full --init-from the other; or "
        "evaluate each on --test-data that neither has seen."
    )
