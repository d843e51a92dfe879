"""Anchors: a few graded works of each tier, with held-out scores, that new works are compared with.

``anchors.json`` lies in the run's folder and names the SHA-256 of the model file it was made for. A head
beats its own training works far too often, so only works with a score by a model that had not trained on
them can be anchors. They are the medoids of their tier.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
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


@dataclass(frozen=True)
class Anchor:
    """A graded work to compare with.

    Attributes:
        image_id: its id in the data; in a shared model only its tier and a number.
        path: the image file; None in a shared model.
        sha256: of its bytes.
        tier: 0 is the best.
        score: its held-out score, in the unit of the run's model.
    """

    image_id: str
    path: Path | None
    sha256: bytes
    tier: int
    score: float


@dataclass(frozen=True)
class Anchors:
    """A model's anchors.

    Attributes:
        works: the best tier first.
        tier_names: K names, best first.
        held_out: held-out works of each tier, [K].
        source: where their scores come from: ``out-of-fold`` or ``validation``.
        asked: anchors wanted of each tier.
    """

    works: tuple[Anchor, ...]
    tier_names: tuple[str, ...]
    held_out: tuple[int, ...]
    source: str
    asked: int

    @property
    def counts(self) -> tuple[int, ...]:
        """Anchors of each tier, [K]."""
        found = np.bincount([work.tier for work in self.works], minlength=len(self.tier_names))
        return tuple(int(count) for count in found)

    def win_rates(
        self, scores: NDArray[np.floating], hashes: Sequence[bytes]
    ) -> NDArray[np.float64]:
        """How often works beat the anchors of each tier: those with a lower score, an equal one counts half.

        No picture is compared with itself.

        Args:
            scores: [n] of the works by the anchors' model.
            hashes: [n] SHA-256 of their files.

        Returns:
            [n, K]; NaN for tiers without an anchor to compare with.
        """
        of_tier = np.eye(len(self.tier_names))[[work.tier for work in self.works]]  # [a, K]
        own = np.array([work.score for work in self.works], dtype=np.float64)
        difference = np.subtract.outer(np.asarray(scores, dtype=np.float64), own)
        wins = np.heaviside(difference, 0.5)
        same = np.equal.outer(
            np.array(hashes, dtype=object), np.array([w.sha256 for w in self.works], dtype=object)
        )
        other = 1.0 - same.astype(np.float64)
        compared = other @ of_tier
        rates: NDArray[np.float64] = np.full(compared.shape, np.nan)
        np.divide((wins * other) @ of_tier, compared, out=rates, where=compared > 0)
        return rates

    def shareable(self) -> Anchors:
        """The same without names and files of the works."""
        works = [
            replace(work, image_id=f"{self.tier_names[work.tier]} {number}", path=None)
            for number, work in enumerate(self.works, 1)
        ]
        return replace(self, works=tuple(works))

    def remarks(self) -> list[str]:
        """What a reader of the win rates has to know, in sentences."""
        named = list(zip(self.tier_names, self.counts, strict=True))
        said = []
        absent = [name for name, count in named if not count]
        if absent:
            said.append(
                f"No held-out work is of tier {', '.join(absent)}: nothing is compared with it."
            )
        few = [f"{name} ({count})" for name, count in named if 0 < count < self.asked]
        if few:
            said.append(
                f"Fewer than {self.asked} held-out works are there of tier {', '.join(few)}: all are "
                "anchors, and its win rates are rough."
            )
        return said

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "version": VERSION,
            "source": self.source,
            "asked": self.asked,
            "held_out": dict(zip(self.tier_names, self.held_out, strict=True)),
            "anchors": [
                {
                    "tier": self.tier_names[work.tier],
                    "image_id": work.image_id,
                    **({} if work.path is None else {"path": str(work.path)}),
                    "sha256": work.sha256.hex(),
                    "score": work.score,
                }
                for work in self.works
            ],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Anchors:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: another version, or an entry is missing or wrong.
        """
        if values.get("version") != VERSION:
            raise ValueError(f"version {values.get('version')!r}, where {VERSION} is understood")
        try:
            names = tuple(str(name) for name in values["held_out"])
            return cls(
                works=tuple(
                    Anchor(
                        str(work["image_id"]), Path(work["path"]) if "path" in work else None,
                        bytes.fromhex(work["sha256"]), names.index(work["tier"]), float(work["score"]),
                    )
                    for work in values["anchors"]
                ),
                tier_names=names,
                held_out=tuple(int(count) for count in values["held_out"].values()),
                source=str(values["source"]),
                asked=int(values["asked"]),
            )  # fmt: skip
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"an entry is missing or wrong ({error!r})") from error


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
    works = tuple(
        Anchor(
            held_out.ids[i], held_out.paths[i], hashes[held_out.ids[i]],
            int(held_out.tier_codes[i]), float(held_out.scores[i]),
        )
        for i in chosen
    )  # fmt: skip
    anchors = Anchors(works, info.tiers, tuple(counts.tolist()), held_out.held_out_by, asked)
    try:
        save_anchors(model.checkpoint, anchors)
    except PermissionError as error:  # a run that others may only read can still be used
        log.warning("The anchors cannot be kept with the model: %s", error)
    return anchors


def save_anchors(model: Path, anchors: Anchors) -> None:
    """Write anchors.json beside the model file that they are for."""
    about = {"model": model.name, "model_sha256": sha256_of(model)}
    write_json(model.with_name(ANCHORS_FILE), {**about, **anchors.to_dict()})


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
    if kept is not None and asked in (None, kept.asked):
        return kept
    if kept is not None and any(work.path is None for work in kept.works):
        raise DataError(
            f"--anchors {asked}: a shared model keeps {kept.asked} of each tier, and has no graded works to "
            "choose others among; leave --anchors out"
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
                f"Without --anchors the {kept.asked} of each tier that are kept are used. "
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
        return Anchors.from_dict(values)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read: {error}. Anchors are chosen again once it is removed and "
            f"`mirip-fast verify --accept {path.parent}` was told so."
        ) from error


IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

_LEAST_GAIN = 1e-9  # of the sum of distances; less is rounding


def find_medoids(rows: NDArray[np.floating], k: int) -> IntArray:
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

    def sums(chosen: IntArray) -> FloatArray:
        """[n] the sum of distances with each row beside the chosen ones; infinite for those."""
        nearest = distances[:, chosen].min(axis=1, initial=np.inf)
        total: FloatArray = np.minimum(distances, nearest[:, None]).sum(axis=0)
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
