"""`rank` and `compare`: scores of works that nobody has graded."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mirip_fast.config import Config
from mirip_fast.data.manifest import read_manifest
from mirip_fast.data.records import DataOptions
from mirip_fast.errors import DataError
from mirip_fast.features.command import default_workers
from mirip_fast.features.embed import Progress, Settings
from mirip_fast.files import write_csv
from mirip_fast.portfolio.ranking import Ranked, rank_scores, write_ranking
from mirip_fast.ranking.scorer import Scored, ScoreModel, score_files


@dataclass(frozen=True)
class RankDone:
    """A sorted portfolio, the files it was written to, and the works that could not be read."""

    ranking: list[Ranked]
    files: list[Path]
    failures: list[tuple[str, str]]  # path, reason


def rank_folder(
    model: ScoreModel,
    folder: Path,
    config: Config,
    out: Path,
    *,
    backbone: str | None = None,
    rehash: bool = False,
    command: str = "",
    progress: Callable[[Progress], None] = lambda _: None,
) -> RankDone:
    """Sort the images of a folder (or CSV file) by score and write ranking.csv and ranking.json.

    Args:
        model: the trained head.
        folder: what to sort; grades, where there are any, are not looked at.
        config: cache folder, device, column names.
        out: folder for the files.
        backbone: another place of the model's backbone, if it moved.
        rehash: read every file again instead of trusting size and time.
        command: what is running, for whoever finds the store locked.
        progress: called after every committed batch.

    Raises:
        DataError: no image could be read.
    """
    options = dataclasses.replace(DataOptions.from_config(config.data), with_grades=False)
    manifest = read_manifest(folder, options)
    records = manifest.records
    scored = _score(model, [r.path for r in records], config, backbone, rehash, command, progress)
    names = [os.path.relpath(record.path, manifest.root) for record in records]
    ranking = rank_scores(names, [r.image_id for r in records], scored.scores.tolist())
    failures = [
        (str(record.path), outcome.reason or "")
        for record, outcome in zip(records, scored.outcomes, strict=True)
        if outcome.status == "failed"
    ]
    if not ranking:
        path, reason = failures[0]
        raise DataError(
            f"{folder}: none of {len(records)} images could be read (first: {path}: {reason})"
        )
    about = {"folder": str(manifest.source), "checkpoint": str(model.checkpoint)}
    files = write_ranking(out, ranking, about)
    if failures:
        rows = [{"path": path, "reason": reason} for path, reason in failures]
        write_csv(out / "failures.csv", ("path", "reason"), rows)
    return RankDone(ranking, files, failures)


def compare_images(
    model: ScoreModel,
    paths: Sequence[Path],
    config: Config,
    *,
    backbone: str | None = None,
    command: str = "",
    progress: Callable[[Progress], None] = lambda _: None,
) -> list[float]:
    """The scores of single image files.

    Raises:
        DataError: a file can not be read.
    """
    scored = _score(model, paths, config, backbone, False, command, progress)
    for path, outcome in zip(paths, scored.outcomes, strict=True):
        if outcome.status == "failed":
            raise DataError(f"{path}: {outcome.reason}")
    return [float(score) for score in scored.scores]


def _score(
    model: ScoreModel,
    paths: Sequence[Path],
    config: Config,
    backbone: str | None,
    rehash: bool,
    command: str,
    progress: Callable[[Progress], None],
) -> Scored:
    settings = Settings(
        workers=min(len(paths), default_workers(config.embed.workers)),
        batch_size=config.embed.embed_batch_size,
        rehash=rehash,
        command=command,
    )
    return score_files(
        model,
        paths,
        cache_dir=Path(config.embed.cache_dir),
        device=config.runtime.device,
        backbone=backbone,
        settings=settings,
        progress=progress,
    )
