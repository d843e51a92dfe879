"""Works of a ranking that show the same picture: exact copies and near duplicates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mirip_fast.features.gallery import Work, open_gallery
from mirip_fast.features.recipe import series_name
from mirip_fast.features.store import FeatureStore
from mirip_fast.models.model_info import ModelInfo
from mirip_fast.portfolio.duplicates import group_copies


@dataclass(frozen=True)
class Stacked:
    """The place of one work in its stack.

    Attributes:
        stack: number of the stack.
        exact: whether another file of the stack has the same bytes.
        cosine: of the CLS features of this and the nearest other work of the stack, −1 to 1.
    """

    stack: int
    exact: bool
    cosine: float


def find_stacks(
    files: Sequence[str],
    image_ids: Sequence[str],
    root: Path,
    hashes: Mapping[str, bytes],
    store: FeatureStore,
    info: ModelInfo,
    near_cosine: float,
) -> dict[int, Stacked]:
    """Find near duplicates among ranked works by the features that they were ranked with.

    Args:
        files: [n] names of the works, in the order of the ranking.
        image_ids: [n] their ids.
        root: the folder that their names start from.
        hashes: name → SHA-256 of the file.
        store: holds their features.
        info: the views of the model.
        near_cosine: cosine of the CLS features from which on two works are near duplicates.

    Returns:
        Place in ``files`` → its stack; works that are like no other are not in it. Empty where the
        store keeps no CLS features.
    """
    series = series_name(info.views[0], "cls")
    if series not in store.series():
        return {}
    place = {root / file: i for i, file in enumerate(files)}
    works = [Work(path, image_ids[i], hashes[files[i]]) for path, i in place.items()]
    groups = group_copies(open_gallery(works, [store], series), near_cosine)
    return {
        place[copy.work.path]: Stacked(number, copy.exact, copy.cosine)
        for number, copies in enumerate(groups)
        for copy in copies
    }
