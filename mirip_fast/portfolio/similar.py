"""`similar`: the works of embedded data sets that look most like an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mirip_fast.config import Config
from mirip_fast.data.csv_reader import absolute
from mirip_fast.errors import DataError
from mirip_fast.features.embed import Progress
from mirip_fast.features.gallery import (
    Gallery,
    Work,
    base_series,
    datasets_like,
    open_gallery,
    reference_dataset,
    stores_of,
    works_of_datasets,
)
from mirip_fast.features.neighbours import FloatArray, open_index, unit
from mirip_fast.features.on_demand import embed_options, features_of_files
from mirip_fast.features.store import FeatureStore
from mirip_fast.files import spreadsheet_safe, write_csv

_COLUMNS = ("place", "cosine", "distance", "tier", "same_bytes", "image_id", "path")


@dataclass(frozen=True)
class Match:
    """A work that looks like the image asked for.

    Attributes:
        work: the file and what is known about it.
        cosine: of the two images' CLS features, −1 to 1; 1 is the same.
        same_bytes: whether it is a copy of the image's file.
    """

    work: Work
    cosine: float
    same_bytes: bool

    @property
    def distance(self) -> float:
        """1 − cosine, 0 to 2."""
        return max(0.0, 1 - self.cosine)  # rounding may pass 1


def find_similar(
    image: Path,
    config: Config,
    top: int,
    *,
    data: Path | None = None,
    caches: Sequence[Path] = (),
    backbone: str | None = None,
    command: str = "",
    progress: Callable[[Progress], None] = lambda _: None,
) -> list[Match]:
    """The nearest works, the nearest first; the image itself is left out, copies of it are not.

    Args:
        image: an image file, embedded or not.
        config: cache folder, device.
        top: works wanted.
        data: search this data set only; None searches all that were embedded as the newest was.
        caches: further cache folders to search.
        backbone: another place of the backbone, if it moved.
        command: what is running, for whoever finds the store locked.
        progress: called while the image is embedded.

    Raises:
        DataError: the image can not be read.
        RunNotFoundError: nothing is embedded.
        StoreError: a further cache holds other features; names the differing fields.
    """
    reference = reference_dataset(Path(config.embed.cache_dir), data)
    own, series = FeatureStore.open(reference.store_path), base_series(reference)
    here = [reference] if data else datasets_like(own, [Path(config.embed.cache_dir)])
    datasets = [*here, *datasets_like(own, caches)]
    options = embed_options(reference)
    if backbone is not None:
        options.backbone = backbone
    asked = features_of_files(
        [image], options, config, like=own, series=series, command=command, progress=progress
    )
    (outcome,) = asked.outcomes
    if outcome.sha256 is None or outcome.status == "failed":
        raise DataError(f"{image}: {outcome.reason}")
    rows = asked.store.read(asked.series, asked.store.rows(asked.series, [outcome.sha256]))
    # The image itself stays in the gallery, so that the gallery's index fits every question.
    gallery = open_gallery(works_of_datasets(datasets), stores_of(datasets), series)
    itself = absolute(image)
    found = nearest_works(gallery, unit(rows), outcome.sha256, top + 1)
    return [match for match in found if match.work.path != itself][:top]


def nearest_works(gallery: Gallery, query: FloatArray, sha256: bytes, top: int) -> list[Match]:
    """The ``top`` works nearest to ``query`` [1, D]; ``sha256`` is that of its file's bytes."""
    index = open_index(gallery.vectors, gallery.folder, gallery.series)
    numbers, cosines = index.nearest(query, min(top, gallery.vectors.count))
    matches = [
        Match(work, float(cosine), work.sha256 == sha256)
        for number, cosine in zip(numbers[0].tolist(), cosines[0].tolist(), strict=True)
        if number >= 0
        for work in gallery.works_of(number)
    ]
    return sorted(matches, key=lambda m: (not m.same_bytes, -m.cosine, str(m.work.path)))[:top]


def write_matches(path: Path, matches: Sequence[Match]) -> None:
    """Write one line per match."""
    rows = [
        {
            "place": place,
            "cosine": f"{match.cosine:.4f}",
            "distance": f"{match.distance:.4f}",
            "tier": match.work.tier,
            "same_bytes": int(match.same_bytes),
            "image_id": spreadsheet_safe(match.work.image_id),
            "path": spreadsheet_safe(str(match.work.path)),
        }
        for place, match in enumerate(matches, start=1)
    ]
    write_csv(path, _COLUMNS, rows)
