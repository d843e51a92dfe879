"""Applicants: how the scores of several works make one, and how well that orders graded applicants."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mirip_fast.config import Config
from mirip_fast.data.applicants import applicant_grades, applicants_of, sets_of, with_column
from mirip_fast.data.splits import members_of
from mirip_fast.data.table import own_column
from mirip_fast.errors import ConfigError, DataError
from mirip_fast.evaluation.bootstrap import accuracy_interval
from mirip_fast.evaluation.calibration import fit_calibration
from mirip_fast.evaluation.metrics import pairwise_accuracy, ranks
from mirip_fast.files import has_file
from mirip_fast.models.gp import normal_scores
from mirip_fast.ranking.graded import GradedImages, load_split
from mirip_fast.ranking.held_out import load_calibration, load_held_out
from mirip_fast.ranking.score_model import ScoreModel
from mirip_fast.text import nfc
from mirip_fast.training.run_folder import SPLIT_FILE

FloatArray = NDArray[np.float64]
Members = Sequence[NDArray[np.int64]]

#: Tried where graded applicants tell which is best; the first is taken where they do not.
CHOICES = ("mean", "median", "best:3")
#: Fewer graded applicants choose nothing; fewer with several works do not tell how alike their errors are.
_LEAST, _LEAST_SEVERAL = 20, 10


def check_portfolio(how: str | None) -> None:
    """Refuse a ``--portfolio`` that is none.

    Raises:
        ConfigError: says what there is.
    """
    if how is not None and not re.fullmatch(r"mean|median|best:[1-9]\d*", how):
        raise ConfigError(f"--portfolio {how}: use mean, median or best:3 (the mean of the best 3)")


def in_words(how: str) -> str:
    """``best:3`` → ``mean of the best 3``."""
    return how.replace("best:", "mean of the best ")


def aggregate(scores: ArrayLike, members: Members, how: str) -> FloatArray:
    """[…, n] scores of works → […, G] of applicants.

    Args:
        scores: of works.
        members: per applicant the places of the works.
        how: mean, median, or best:K, the mean of the best K, of all where there are fewer.
    """
    values = np.asarray(scores, dtype=np.float64)
    result = np.empty((*values.shape[:-1], len(members)))
    for number, places in enumerate(members):
        own = values[..., places]
        if how == "median":
            result[..., number] = np.median(own, axis=-1)
        else:
            if how != "mean":
                own = np.sort(own, axis=-1)[..., -int(how.removeprefix("best:")) :]
            result[..., number] = own.mean(axis=-1)
    return result


def choose_portfolio(model: ScoreModel, by: str, asked: str | None) -> tuple[str, str]:
    """How works make an applicant's score, and a sentence that says why.

    Args:
        model: the model; its run's held-out scores are looked at.
        by: the column of applicants.
        asked: by the user; None: the one of :data:`CHOICES` with the highest pairwise accuracy on graded
            applicants that were not trained on; the mean where fewer than 20 are known, or sets were trained.
    """
    check_portfolio(asked)

    def because(how: str, why: str) -> tuple[str, str]:
        return (
            how,
            f"An applicant's score is the {in_words(how)} of their works' scores: {why}.",
        )

    if asked is not None:
        return because(asked, "--portfolio asks for it")
    known = _held_out_applicants(model, by)
    if known is None:
        return because(CHOICES[0], f"fewer than {_LEAST} graded applicants are known to choose by")
    scores, members, order, finer, together = known
    if together:
        return because(CHOICES[0], "the model was trained on it")
    found = {
        how: pairwise_accuracy(aggregate(scores, members, how), order, finer=finer)
        for how in CHOICES
    }
    best = max(found, key=lambda how: found[how])
    others = ", ".join(f"{in_words(how)} {a:.4f}" for how, a in found.items() if how != best)
    return because(
        best,
        f"of {len(members)} graded applicants that the model had not trained on it orders "
        f"{found[best]:.4f} of the pairs rightly ({others})",
    )


def applicant_tiers(
    model: ScoreModel, by: str, how: str, scores: ArrayLike
) -> tuple[list[str] | None, str]:
    """The most probable tier of each applicant, None where it is unknown, and a sentence on what it rests on.

    Args:
        model: the model; its run's held-out scores are looked at.
        by: the column of applicants.
        how: works make a score.
        scores: [G] of the applicants.
    """
    calibration, known = load_calibration(model), _held_out_applicants(model, by)
    why = (
        "An applicant's tier is that which a single work of the same score would most probably get."
    )
    if known is not None:
        held_out, members, order, finer, _ = known
        if not finer:
            found = fit_calibration(
                aggregate(held_out, members, how),
                order,
                model.info.tiers,
                source=calibration.source,
            )
            if found.ordinal is not None:
                calibration = found
                why = (
                    f"An applicant's tier is the most probable one, learned from {len(members)} graded "
                    "applicants that the model had not trained on."
                )
    chances = calibration.tier_probabilities(np.asarray(scores, dtype=np.float64))
    if chances is None:
        return None, ""
    return [calibration.tier_names[k] for k in chances.argmax(axis=1)], why


def _held_out_applicants(
    model: ScoreModel, by: str
) -> tuple[FloatArray, list[NDArray[np.int64]], NDArray[np.int64], bool, bool] | None:
    """Held-out scores [m], the works of each graded applicant, their order [G], whether it is of grades
    that are no tiers, and whether sets were trained."""
    folder = model.checkpoint.parent
    held_out = load_held_out(folder, model.info.tiers)
    if held_out is None or not has_file(folder / SPLIT_FILE):
        return None
    manifest = load_split(folder / SPLIT_FILE, model.info.tiers)
    if own_column(by) in manifest.table:
        manifest = replace(manifest, options=replace(manifest.options, by=by))
    elif manifest.options.by is None:
        return None
    place = {image_id: i for i, image_id in enumerate(manifest.ids)}
    manifest = manifest.subset(place[image_id] for image_id in held_out.ids)
    grades = applicant_grades(manifest)
    names = [name if name in grades else None for name in applicants_of(manifest)]
    known, members = members_of(names)
    order, finer = _order([grades[name] for name in known])
    together = sets_of(manifest) is not None
    if not together and (len(known) < _LEAST or len(set(order.tolist())) < 2):
        return None
    return held_out.scores, members, order, finer, together


def _order(grades: Sequence[float]) -> tuple[NDArray[np.int64], bool]:
    """[G] tiers, or ranks of grades that are no tiers, 0 = best; and whether they are ranks."""
    values = np.asarray(grades)
    finer = values.dtype.kind == "f"
    return (ranks(-values) if finer else values.astype(np.int64)), finer


def shared_error(model: ScoreModel) -> float | None:
    """How alike a model's errors on works of one group are (0–1): their intraclass correlation.

    By a one-way analysis of variance of the held-out errors, standardised where a Gaussian process knows how
    uncertain each is; groups of graded works are applicants where ``--by`` said so. 1 where applicants were
    graded as a whole: all their works share its error.

    Returns:
        None where fewer than ten groups of several works are known.
    """
    process, folder = model.process, model.checkpoint.parent
    errors = model.errors if process is None else process.errors
    held_out = load_held_out(folder, model.info.tiers)
    if errors is None or held_out is None:
        return None
    if process is not None and len(errors) < len(held_out) and not process.pairs_alone:
        return 1.0
    if len(errors) != len(held_out):
        return None
    groups = [own for own in members_of([g or None for g in held_out.groups])[1] if len(own) > 1]
    if len(groups) < _LEAST_SEVERAL:
        return None
    sizes = np.array([len(own) for own in groups])
    means = np.array([errors[own].mean() for own in groups])
    n, k = sizes.sum(), len(groups)
    within = sum(float(((errors[own] - errors[own].mean()) ** 2).sum()) for own in groups) / (n - k)
    between = float(sizes @ (means - (sizes @ means) / n) ** 2) / (k - 1)
    usual = (n - (sizes**2).sum() / n) / (k - 1)
    return float(np.clip((between - within) / (between + (usual - 1) * within or 1.0), 0, 1))


def evaluate_applicants(
    model: ScoreModel, scores: ArrayLike, images: GradedImages, config: Config
) -> dict[str, Any] | None:
    """How well the applicants of graded works are ordered.

    Args:
        model: what scored them; how works make an applicant's score is chosen by its run.
        scores: [n] of the works.
        images: the n works; their options, or the settings, name the column of applicants.
        config: the sections data and evaluate are used.

    Returns:
        ``by``, ``portfolio``, ``applicants`` and ``works`` (how many), ``graded_by`` (applicants: by
        their own grades; works: by the mean of their works' grades, as they have none of their own),
        ``pairwise_accuracy`` (0–1), its 95 % ``interval`` over applicants or None, and ``said``, all of it in
        a sentence. None where no column is named, or the run's own shows no two applicants of different
        grades.

    Raises:
        ConfigError: ``--portfolio`` is none, or stands without ``--by``.
        DataError: ``--by`` names no column, or no two applicants of different grades.
    """
    check_portfolio(config.evaluate.portfolio)
    by = images.options.by if config.data.by is None else config.data.by
    if by is None:
        if config.evaluate.portfolio is not None:
            raise ConfigError("--portfolio is about applicants: name their column with --by")
        return None
    options = replace(images.options, by=nfc(by.strip()))
    manifest = with_column(replace(images, options=options))
    how, _ = choose_portfolio(model, str(manifest.options.by), config.evaluate.portfolio)
    names, grades = applicants_of(manifest), applicant_grades(manifest)
    own = len(set(grades.values())) > 1
    known, members = members_of([n if n in grades or not own else None for n in names])
    if own:
        order, ranked = _order([grades[name] for name in known])
    else:
        finer = normal_scores(images.tier_codes) if images.has_tiers else images.needed_scores
        order, ranked = ranks(aggregate(finer, members, "mean")), True
    if len({*order.tolist()}) < 2:
        if config.data.by is None:
            return None
        raise DataError(
            f"--by {by}: no two applicants of different grades among {len(names)} works"
        )
    mean = aggregate(scores, members, how)
    accuracy = pairwise_accuracy(mean, order, finer=ranked)
    found = accuracy_interval(mean, order, finer=ranked, rounds=config.evaluate.bootstrap_rounds)
    span = "unknown" if found is None else f"{found.low:.4f} to {found.high:.4f}"
    works = sum(map(len, members))
    return {
        "by": by,
        "portfolio": how,
        "applicants": len(known),
        "works": works,
        "graded_by": "applicants" if own else "works",
        "pairwise_accuracy": accuracy,
        "interval": None if found is None else [found.low, found.high],
        "said": f"Applicants (column {by}), each by the {in_words(how)} of their works' scores: pairwise "
        f"accuracy {accuracy:.4f} (95 % interval over {len(known)} applicants with {works} works: {span})."
        + (
            ""
            if own
            else " The mean of their works' grades counts, as they have none of their own."
        ),
    }
