"""`rank` and `compare`: scores of works that nobody has graded."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mirip_fast.config import Config, EvaluateConfig
from mirip_fast.data.applicants import applicants_of, names_some
from mirip_fast.data.locate import tell_unlisted
from mirip_fast.data.manifest import read_manifest
from mirip_fast.data.sources import keep_indexes_in
from mirip_fast.data.table import Manifest, given_name, own_columns
from mirip_fast.errors import DataError
from mirip_fast.evaluation.calibration import Calibration
from mirip_fast.features.embed import OnProgress
from mirip_fast.features.phase_one import settings_of
from mirip_fast.features.store import FeatureStore
from mirip_fast.files import write_csv
from mirip_fast.portfolio.ranking import (
    CONFIDENCE,
    applicant_records,
    of_works,
    rank_applicants,
    rank_scores,
    remove_old_applicants,
    write_applicants,
    write_ranking,
)
from mirip_fast.ranking.anchors import Anchors, anchor_remarks, win_rates
from mirip_fast.ranking.applicants import applicant_tiers, choose_portfolio, shared_error
from mirip_fast.ranking.graded import column_of
from mirip_fast.ranking.held_out import load_calibration, made_with
from mirip_fast.ranking.score_model import ScoreModel
from mirip_fast.ranking.scorer import Scored, score_files
from mirip_fast.text import address, counted

if TYPE_CHECKING:
    import pandas as pd

#: Grades drawn of each work by a Gaussian process, for the intervals of ranks.
DRAWS = 500

_NO_INTERVALS = (
    "unknown: it is not known how far grades lie from the model's scores, which takes 30 held-out works with "
    "grades that its scores rise with"
)


@dataclass(frozen=True)
class RankDone:
    """A sorted portfolio, and the works that could not be read.

    Attributes:
        source: what was ranked.
        model: what scored it.
        ranking: the works, the best first; see :func:`mirip_fast.portfolio.ranking.rank_scores`.
        failures: path and reason of each work that could not be read.
        names: of all works, in the order of the source.
        calibration: what the scores were taken to mean.
        draws: those that the rank intervals rest on.
        no_intervals: why there are no rank intervals; None where there are.
        seen: works that the model was made with, whose scores are surer than those of new ones.
        root: the folder that the works' names start from.
        hashes: a work's name → SHA-256 of its file.
        store: holds the works' features.
        anchors: what the works were compared with; None where they were not.
        applicants: whose works they are, in order, see
            :func:`mirip_fast.portfolio.ranking.rank_applicants`; None where nobody asked.
        portfolio: how their scores were made: ``by``, the column that names them; ``within``, the column
            inside whose values they are ranked, or None; ``made_by``, how works make a score, and ``why``;
            and ``remarks``, what else has to be said, in sentences. Empty where nobody asked.
    """

    source: Path
    model: ScoreModel
    ranking: pd.DataFrame
    failures: list[tuple[str, str]]
    names: list[str]
    calibration: Calibration
    draws: int
    no_intervals: str | None
    seen: int
    root: Path
    hashes: Mapping[str, bytes]
    store: FeatureStore
    anchors: Anchors | None = None
    applicants: pd.DataFrame | None = None
    portfolio: Mapping[str, Any] = field(default_factory=dict)

    def write(self, out: Path) -> list[Path]:
        """Write ranking.csv and ranking.json into a folder, applicants.csv with applicants, and failures.csv
        where works failed.

        Returns:
            The files but for failures.csv.
        """
        known = self.calibration
        about: dict[str, Any] = {
            "folder": address(self.source),
            "checkpoint": str(self.model.checkpoint),
            "made_with": self.seen,
            "held_out": {
                "source": known.source,
                "images": known.images,
                "remarks": known.warnings(),
            },
            "rank_intervals": {
                "confidence": CONFIDENCE,
                "draws": self.draws,
                "views": len(self.model.info.views),
                "unknown": self.no_intervals,
            },
        }
        if self.anchors is not None:
            about["anchors"] = {**self.anchors, "remarks": anchor_remarks(self.anchors)}
        people = self.applicants
        if people is not None:
            about |= {"applicants": applicant_records(people), "portfolio": self.portfolio}
        files = write_ranking(out, self.ranking, about)
        if people is None:
            remove_old_applicants(out)
        else:
            files.append(write_applicants(out, people, self.portfolio["within"]))
        if self.failures:
            rows = [{"path": address(Path(path)), "reason": why} for path, why in self.failures]
            write_csv(out / "failures.csv", ("path", "reason"), rows)
        return files


def rank_folder(
    model: ScoreModel,
    folder: Path | str,
    config: Config,
    *,
    anchors: Anchors | None = None,
    backbone: str | None = None,
    rehash: bool = False,
    anyway: bool = False,
    command: str = "",
    progress: OnProgress = lambda *_: None,
) -> RankDone:
    """Sort the images of a folder (or CSV file, tars, address) by score.

    Args:
        model: the trained model.
        folder: what to sort; grades, where there are any, are not looked at.
        config: cache folder, device, column names.
        anchors: the model's, to tell each work's win rates against graded works of each tier.
        backbone: another place of the model's backbone, if it moved.
        rehash: read every file again instead of trusting size and time.
        anyway: sort by a model that is no better than chance, too.
        command: what is running, for whoever finds the store locked.
        progress: called after every committed batch.

    Raises:
        DataError: no image could be read, or the model is no better than chance.
    """
    calibration = load_calibration(model)
    if calibration.chance and not anyway:
        raise DataError(
            f"{calibration.chance} More graded works may help, or another backbone or readout; --anyway "
            "sorts by it all the same."
        )
    keep_indexes_in(Path(config.embed.cache_dir))
    manifest = read_manifest(folder, config.data, with_grades=False)
    tell_unlisted(manifest.source, manifest.table["file"])
    files = manifest.table["file"].tolist()
    scored = _score(model, manifest.paths, config, backbone, rehash, command, progress)
    failures = [
        (file, why)
        for file, why in zip(files, scored.outcomes["reason"], strict=True)
        if why is not None
    ]
    if len(failures) == len(files):
        path, reason = address(Path(failures[0][0])), failures[0][1]
        raise DataError(
            f"{folder}: none of {len(files)} images could be read (first: {path}: {reason})"
        )
    names = [os.path.relpath(file, manifest.root) for file in files]
    own = own_columns(manifest.table)
    works = manifest.table[["file", "image_id", *own]].assign(file=names)
    given = {c: given_name(c) for c in own}
    works = works.rename(columns={c: n for c, n in given.items() if n not in works.columns})
    draws, no_intervals = _draws(model, scored)
    applicants, columns = None, None
    portfolio: dict[str, Any] = {}
    if manifest.options.by is not None:
        applicants, columns, portfolio = _applicants(
            model, manifest, names, scored, config.evaluate
        )
        works = works.drop(
            columns=[c for c in works.columns if c == manifest.options.by == "applicant"]
        )
    rates = None
    if anchors is not None:
        contents = [sha or b"" for sha in scored.outcomes["sha256"]]
        rates = win_rates(anchors, scored.scores, contents)
    ranking = rank_scores(
        works, scored.scores, view_spread=scored.view_spread, calibration=calibration, draws=draws,
        win_rates=rates, applicants=columns,
    )  # fmt: skip
    hashes = {
        name: sha
        for name, sha in zip(names, scored.outcomes["sha256"], strict=True)
        if sha is not None
    }
    return RankDone(
        manifest.source, model, ranking, failures, names, calibration,
        0 if draws is None else len(draws), no_intervals,
        made_with(model, scored.outcomes["sha256"]),
        manifest.root, hashes, scored.store, anchors, applicants, portfolio,
    )  # fmt: skip


def compare_images(
    model: ScoreModel,
    first: Path,
    second: Path,
    config: Config,
    *,
    backbone: str | None = None,
    command: str = "",
) -> tuple[NDArray[np.floating], float | None, Calibration]:
    """Score two image files, and say how probable it is that the first beats the second.

    Returns:
        Their scores [2], the probability (0–1; None if unknown), and what that rests on.

    Raises:
        DataError: a file cannot be read.
    """
    paths = [first, second]
    scored = _score(model, paths, config, backbone, False, command)
    for path, reason in zip(paths, scored.outcomes["reason"], strict=True):
        if reason is not None:
            raise DataError(f"{path}: {reason}")
    calibration = load_calibration(model)
    chance = calibration.pair_probability(scored.scores[0] - scored.scores[1])
    return scored.scores[:2], None if chance is None else float(chance), calibration


def _draws(model: ScoreModel, scored: Scored) -> tuple[NDArray[np.float64] | None, str | None]:
    """[H, n] grades that the readable works may get, NaN for the others; or why not."""
    # The same picture under two names is scored once: rounding must not order it.
    place: dict[bytes, int] = {}
    index = np.array(
        [
            -1 if status == "failed" else place.setdefault(sha, len(place))
            for status, _, sha in scored.outcomes.itertuples(index=False)
        ]
    )
    scores = np.empty(len(place), scored.scores.dtype)
    scores[index[index >= 0]] = scored.scores[index >= 0]
    drawn = model.draw(scored.store, list(place), scores, DRAWS) if place else None
    if drawn is None:
        return None, _NO_INTERVALS
    return np.where(index >= 0, drawn[:, index], np.nan), None


def _applicants(
    model: ScoreModel,
    manifest: Manifest,
    files: Sequence[str],
    scored: Scored,
    config: EvaluateConfig,
) -> tuple[pd.DataFrame, dict[str, NDArray[Any]], dict[str, Any]]:
    """The applicants in order, what each work says of its own, and how their scores were made."""
    by, remarks = str(manifest.options.by), []
    owners = names = applicants_of(manifest)
    within = None if config.within is None else column_of(manifest, config.within)
    if within is not None:
        names = [n if value is not None else None for n, value in zip(owners, within, strict=True)]
        lost = [file for file, a, b in zip(files, owners, names, strict=True) if a and not b]
        if lost:
            remarks.append(
                f"{counted(len(lost), 'work')} without a value in {config.within!r}, ranked as works only: "
                f"{names_some(lost)}"
            )
    how, why = choose_portfolio(model, by, config.portfolio)
    nobody = [file for file, name in zip(files, owners, strict=True) if name is None]
    if nobody:
        remarks.append(
            f"{counted(len(nobody), 'work')} without an applicant, ranked as works only: {names_some(nobody)}"
        )
    # The same picture handed in twice by one applicant counts once.
    seen, counting, copies = set(), [], []
    for file, name, value, sha in zip(
        files, names, within or [None] * len(names), scored.outcomes["sha256"], strict=True
    ):
        key = (name, value, sha)
        again = name is not None and sha is not None and key in seen
        copies += [file] if again else []
        counting.append(None if again else name)
        seen.add(key)
    if copies:
        remarks.append(
            f"{counted(len(copies), 'work')} handed in twice by one applicant, counted once: "
            f"{names_some(copies)}"
        )
    readable = np.flatnonzero(scored.outcomes["status"] != "failed").tolist()
    failed = sorted({*filter(None, names)} - {names[i] or "" for i in readable})
    if failed:
        remarks.append(
            f"{counted(len(failed), 'applicant')} not ranked, as no work of theirs could be read: "
            f"{names_some(failed)}"
        )
    shared = shared_error(model)
    together = np.unique([names[i] or f"\n{i}" for i in readable], return_inverse=True)[1]
    drawn = model.draw(
        scored.store, scored.outcomes["sha256"][readable].tolist(), scored.scores[readable], DRAWS,
        together=together.astype(np.int64), shared=shared or 0.0,
    )  # fmt: skip
    draws = None
    if drawn is not None:
        draws = np.full((DRAWS, len(names)), np.nan)
        draws[:, readable] = drawn
        remarks.append(
            "95 % of an applicant's rank: how far grades lie from what the model had said of graded works "
            "that it had not trained on, and which works were handed in."
            + (
                " How alike its errors on works of one applicant are is not known (it takes ten groups of "
                "graded works), so they count as independent: such intervals are too narrow."
                if shared is None
                else f" Its errors on two works of one applicant correlate by {shared:.2f}."
            )
        )
    table = rank_applicants(counting, scored.scores, files, how, draws=draws, within=within)
    tiers, said = applicant_tiers(model, by, how, table["score"])
    if tiers is not None:
        table.insert([*table.columns].index("works"), "tier", tiers)
        remarks.append(said)
    portfolio = {
        "by": by, "within": config.within, "made_by": how, "why": why, "remarks": remarks,
    }  # fmt: skip
    return table, of_works(table, names, within), portfolio


def _score(
    model: ScoreModel,
    paths: Sequence[Path],
    config: Config,
    backbone: str | None,
    rehash: bool,
    command: str,
    progress: OnProgress = lambda *_: None,
) -> Scored:
    settings = settings_of(config.embed, len(paths), rehash=rehash, command=command)
    return score_files(
        model,
        paths,
        cache_dir=Path(config.embed.cache_dir),
        device=config.runtime.device,
        backbone=backbone,
        settings=settings,
        progress=progress,
    )
