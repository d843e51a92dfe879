"""Anchors: a few graded works of each tier, with held-out scores, that new works are compared with.

``anchors.json`` lies in the run's folder and names the SHA-256 of the model file it was made for. A head
beats its own training works far too often, so only works with a score by a model that had not trained on
them can be anchors. They are the medoids of their tier.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mirip_fast.errors import DataError, StoreError
from mirip_fast.features.neighbours import unit
from mirip_fast.features.store import FeatureStore
from mirip_fast.files import has_file, read_json, sha256_of, write_json
from mirip_fast.ranking.graded import GradedImages, load_split
from mirip_fast.ranking.held_out import HELD_OUT_FILE, load_held_out
from mirip_fast.ranking.rows import open_store, read_features
from mirip_fast.ranking.score_model import ScoreModel
from mirip_fast.training.run_folder import SPLIT_FILE, Run

log = logging.getLogger(__name__)

#: File in a run's folder.
ANCHORS_FILE = "anchors.json"
#: Anchors of each tier, unless told otherwise.
PER_TIER = 10
VERSION = 1

_MOST = 1000  # works of a tier to choose among: distances between all take 8 MB


#: What the file says: ``version``; ``source`` of the scores (``out-of-fold``, ``validation`` or ``left-out
#: groups``); ``asked``, anchors wanted of each tier; ``held_out``, tier → held-out works of it, best first;
#: and ``anchors``, the best tier first, of each its ``tier``, ``image_id`` (in a shared model the tier and a
#: number), ``path`` (not in a shared model), ``sha256`` as hexadecimal digits, ``score`` in the model's unit.
Anchors = dict[str, Any]


def anchor_counts(anchors: Anchors) -> dict[str, int]:
    """Tier, best first → how many anchors it has."""
    found = Counter(work["tier"] for work in anchors["anchors"])
    return {tier: found[tier] for tier in anchors["held_out"]}


def win_rates(
    anchors: Anchors, scores: NDArray[np.floating], hashes: Sequence[bytes]
) -> dict[str, NDArray[np.float64]]:
    """How often works beat the anchors of each tier: those with a lower score, an equal one counts half.

    No picture is compared with itself.

    Args:
        anchors: of a model.
        scores: [n] of the works by that model.
        hashes: [n] SHA-256 of their files.

    Returns:
        Tier → [n]; NaN where it has no anchor to compare with.
    """
    known = pd.DataFrame(anchors["anchors"], columns=["tier", "sha256", "score"])
    difference = np.subtract.outer(np.asarray(scores, dtype=np.float64), known["score"].to_numpy())
    points = np.heaviside(difference, 0.5)
    own = np.array([sha.hex() for sha in hashes], dtype=object)
    points[np.equal.outer(own, known["sha256"].to_numpy())] = np.nan
    rates = pd.DataFrame(points.T).groupby(known["tier"]).mean().reindex(anchors["held_out"])
    return dict(zip(anchors["held_out"], rates.to_numpy(), strict=True))


def anchor_remarks(anchors: Anchors) -> list[str]:
    """What a reader of the win rates has to know, in sentences."""
    counts, said = anchor_counts(anchors), []
    absent = [name for name, count in counts.items() if not count]
    if absent:
        said.append(
            f"No held-out work is of tier {', '.join(absent)}: nothing is compared with it."
        )
    asked = anchors["asked"]
    few = [f"{name} ({count})" for name, count in counts.items() if 0 < count < asked]
    if few:
        said.append(
            f"Fewer than {asked} held-out works are there of tier {', '.join(few)}: all are "
            "anchors, and its win rates are rough."
        )
    return said


def write_anchors(
    model: ScoreModel,
    held_out: GradedImages,
    images: GradedImages,
    store: FeatureStore,
    asked: int = PER_TIER,
) -> Anchors:
    """Choose the medoids of each tier among works with held-out scores; write anchors.json beside the model.

    The space is that of the features that the model's head looks at, of the first view. Of tiers with more
    than 1,000 works, an even choice over their scores is looked at.

    Args:
        model: the run's model.
        held_out: scores in the model's unit, of works that were not trained on.
        images: the run's graded images, those of ``held_out`` among them.
        store: their features.
        asked: anchors of each tier.

    Raises:
        DataError: fewer than two tiers have held-out works.
        StoreError: features are missing.
    """
    hashes, info = dict(zip(images.ids, images.hashes, strict=True)), model.info
    counts = np.bincount(held_out.tier_codes, minlength=len(info.tiers))
    if (counts > 0).sum() < 2:
        there = ", ".join(info.tiers[k] for k in np.flatnonzero(counts)) or "no tier"
        raise DataError(
            f"--tiers: the run's held-out works are of {there} only, and works are compared with at least "
            "two tiers. Train with more graded works, or with --folds 5, which holds out every work once."
        )
    chosen: list[int] = []
    for tier in range(len(info.tiers)):
        members = _members(held_out, hashes, tier)
        if len(members) > asked:
            shas = [hashes[held_out.ids[i]] for i in members]
            rows = read_features(store, shas, info.features, info.views[:1])[:, 0]
            members = members[find_medoids(rows, asked)]
        chosen += members.tolist()
    anchors: Anchors = {
        "version": VERSION,
        "source": held_out.held_out_by,
        "asked": asked,
        "held_out": dict(zip(info.tiers, counts.tolist(), strict=True)),
        "anchors": [
            {
                "tier": info.tiers[held_out.tier_codes[i]],
                "image_id": held_out.ids[i],
                "path": str(held_out.paths[i]),
                "sha256": hashes[held_out.ids[i]].hex(),
                "score": float(held_out.scores[i]),
            }
            for i in chosen
        ],
    }
    try:
        save_anchors(model.checkpoint, anchors)
    except PermissionError as error:  # a run that others may only read can still be used
        log.warning("The anchors cannot be kept with the model: %s", error)
    return anchors


def save_anchors(model: Path, anchors: Anchors, *, shared: bool = False) -> None:
    """Write anchors.json beside the model file that they are for; ``shared``: without the works' names."""
    about = {"model": model.name, "model_sha256": sha256_of(model), **anchors}
    if shared:
        about["anchors"] = [
            {**work, "image_id": f"{work['tier']} {number}"}
            for number, work in enumerate(anchors["anchors"], 1)
        ]
        for work in about["anchors"]:
            work.pop("path", None)
    write_json(model.with_name(ANCHORS_FILE), about)


def find_anchors(model: ScoreModel, cache_dir: Path, asked: int | None = None) -> Anchors:
    """The anchors kept with a model; chosen from the cache and kept where there are none, or other ones.

    Args:
        model: a run's model.
        cache_dir: folder of the stores.
        asked: anchors of each tier; None takes what is kept, else :data:`PER_TIER`.

    Raises:
        DataError: the run has no tiers, no held-out scores, or those of another model; or a file of it is
            damaged.
        StoreError: anchors have to be chosen, and the features for that are not in the cache.
    """
    kept = _kept(model)
    if kept is not None and asked in (None, kept["asked"]):
        return kept
    if kept is not None and any("path" not in work for work in kept["anchors"]):
        raise DataError(
            f"--anchors {asked}: a shared model keeps {kept['asked']} of each tier, and has no graded works "
            "to choose others among; leave --anchors out"
        )
    images, held_out = _graded(model)
    try:
        store = open_store(cache_dir, model.info)
        return write_anchors(model, held_out, images, store, asked or PER_TIER)
    except StoreError as error:
        raise StoreError(
            "--tiers: the features of the graded works, among which anchors are chosen, are not all in "
            f"the cache ({error}). "
            + (
                f"Without --anchors the {kept['asked']} of each tier that are kept are used. "
                if kept
                else ""
            )
            + "Rank the graded works once with this model (`mirip-fast rank DATA --checkpoint RUN`), "
            "which computes them; the anchors are then kept with the model."
        ) from error


def keep_anchors(model: ScoreModel, images: GradedImages, store: FeatureStore) -> None:
    """:func:`write_anchors` at the end of a training, which goes on without them where there can be none."""
    held_out = load_held_out(model.checkpoint.parent, model.info.tiers)
    if held_out is None or not held_out.has_tiers:
        return
    try:
        write_anchors(model, held_out, images, store)
    except DataError as error:
        log.info("No anchors for rank --tiers: %s", error)


def _graded(model: ScoreModel) -> tuple[GradedImages, GradedImages]:
    """The graded works of a model's run, and the held-out scores of some of them."""
    folder = model.checkpoint.parent
    own = Run(folder).model
    if own.is_file() and model.checkpoint.resolve() != own.resolve():
        raise DataError(
            f"--tiers: the held-out scores in {folder} are those of its {own.name}, and this "
            f"{model.checkpoint.name} scores in another unit. Rank with --checkpoint {own}"
        )
    images = load_split(folder / SPLIT_FILE, model.info.tiers)
    if not images.has_grades:
        raise DataError(
            f"--tiers: {folder} learned from works without tiers, so there are none to put works in. Train "
            "on works with tiers, or rank without --tiers."
        )
    held_out = load_held_out(folder, model.info.tiers)
    if held_out is None or not len(held_out):
        raise DataError(
            f"--tiers: {folder} has no held-out scores ({HELD_OUT_FILE}) to choose anchors by; train again, "
            "or name the run with --checkpoint"
        )
    missing = set(held_out.ids) - set(images.ids)
    if missing:
        raise DataError(
            f"{folder / HELD_OUT_FILE} names {min(missing)!r}, which {SPLIT_FILE} beside it does not have"
        )
    return images, held_out


def _members(held_out: GradedImages, hashes: Mapping[str, bytes], tier: int) -> NDArray[np.int64]:
    """Works of a tier, each picture once, the best score first; an even choice of them if they are many."""
    order = np.argsort(-held_out.scores, kind="stable")
    seen: dict[bytes, int] = {}
    for i in order[held_out.tier_codes[order] == tier].tolist():
        seen.setdefault(hashes[held_out.ids[i]], i)
    members = np.array(list(seen.values()), dtype=np.int64)
    if len(members) > _MOST:
        members = members[np.linspace(0, len(members) - 1, _MOST).round().astype(np.int64)]
    return members


def _kept(model: ScoreModel) -> Anchors | None:
    path = model.checkpoint.with_name(ANCHORS_FILE)
    try:
        if not has_file(path):
            return None
        values = read_json(path)
        if values.get("model_sha256") != sha256_of(model.checkpoint):
            return None
        if values.get("version") != VERSION:
            raise ValueError(f"version {values.get('version')!r}, where {VERSION} is understood")
        try:
            return _checked(values)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"an entry is missing or wrong ({error!r})") from error
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read: {error}. Anchors are chosen again once it is removed and "
            f"`mirip-fast verify --accept {path.parent}` was told so."
        ) from error


def _checked(values: Mapping[str, Any]) -> Anchors:
    """The entries of a file; raises a plain error where one is missing or wrong."""
    anchors = {name: values[name] for name in ("version", "source", "asked", "held_out", "anchors")}
    anchors["asked"] = int(anchors["asked"])
    anchors["held_out"] = {str(tier): int(n) for tier, n in anchors["held_out"].items()}
    for work in anchors["anchors"]:
        anchors["held_out"][work["tier"]], work["image_id"], bytes.fromhex(work["sha256"])
        work["score"] = float(work["score"])
    return anchors


_LEAST_GAIN = 1e-9  # of the sum of distances; less is rounding


def find_medoids(rows: NDArray[np.floating], k: int) -> NDArray[np.int64]:
    """Choose k rows so that the sum of distances of all rows to the nearest of them is small.

    The distance is 1 − cosine. PAM (Kaufman and Rousseeuw 1990, Finding Groups in Data, chapter 2): BUILD
    takes the row that lowers the sum most, k times; SWAP exchanges a chosen row for another as long as that
    lowers the sum. The result is a local optimum: no single exchange lowers the sum. Nothing is drawn at
    random. Memory is 8 n² bytes a few times over.

    Args:
        rows: [n, D] features of any length.
        k: how many, 1 or more.

    Returns:
        [min(k, n)] numbers of rows, rising.
    """
    n = len(rows)
    if n <= k:
        return np.arange(n, dtype=np.int64)
    vectors = unit(rows).astype(np.float64)
    distances = np.maximum(1 - vectors @ vectors.T, 0)

    def sums(chosen: NDArray[np.int64]) -> NDArray[np.float64]:
        """[n] the sum of distances with each row beside the chosen ones; infinite for those."""
        nearest = distances[:, chosen].min(axis=1, initial=np.inf)
        total: NDArray[np.float64] = np.minimum(distances, nearest[:, None]).sum(axis=0)
        total[chosen] = np.inf
        return total

    chosen = np.empty(0, dtype=np.int64)
    for _ in range(k):
        chosen = np.append(chosen, sums(chosen).argmin())
    while True:
        now = distances[:, chosen].min(axis=1).sum()
        without = np.array([sums(np.delete(chosen, i)) for i in range(k)])
        out, row = np.unravel_index(int(without.argmin()), without.shape)
        if without[out, row] > now - _LEAST_GAIN:
            return np.sort(chosen)
        chosen[out] = row
