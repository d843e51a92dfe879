"""Why the first works of a page have their scores: maps over the pictures, and the graded works like them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mirip_fast.config import Config
from mirip_fast.features.command import default_workers
from mirip_fast.portfolio.graded_likes import Likeness
from mirip_fast.portfolio.thumbnails import Thumbnail, encode_picture, make_thumbnails
from mirip_fast.ranking.scorer import ScoreModel

_MAP_SIDE = 640  # pixels; the map itself has a few steps along each edge
_LIKE_SIDE, _LIKE_BYTES = 160, 12_000


@dataclass(frozen=True)
class PageMap:
    """Why one work has its score.

    Attributes:
        webp: the map over the picture, orange where it raises the score and blue where it lowers it.
        likes: the graded works that it looks like; with their small copies, empty where unreadable.
    """

    webp: bytes
    likes: tuple[tuple[Likeness, Thumbnail], ...]


def make_maps(
    model: ScoreModel,
    paths: Sequence[Path],
    config: Config,
    *,
    backbone: str | None = None,
    command: str = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[Path, PageMap]:
    """Explain works; those that can not be read any more are left out.

    Args:
        model: what scored them.
        paths: image files.
        config: the sections explain, embed and runtime are used.
        backbone: another place of the model's backbone, if it moved.
        command: what is running, for whoever finds the store locked.
        progress: called with passes of the backbone done and their total.

    Raises:
        BackboneError: the backbone can not be found.
    """
    from mirip_fast.portfolio.explain import Explainer

    explainer = Explainer(model, config, backbone=backbone, command=command)
    total, passed = explainer.passes(len(paths)), 0

    def count(new: int) -> None:
        nonlocal passed
        passed += new
        progress(passed, total)

    maps: dict[Path, bytes] = {}
    likes: dict[Path, list[Likeness]] = {}
    for explained in explainer.explain(paths, failures=[], progress=count):
        maps[explained.path] = encode_picture(explained.overlay(), _MAP_SIDE)
        found = explained.likes
        likes[explained.path] = [] if found is None else [*found.top, *found.same]
    files = list(dict.fromkeys(like.path for found in likes.values() for like in found))
    workers = min(len(files), default_workers(config.embed.workers))
    made = make_thumbnails(files, _LIKE_SIDE, _LIKE_BYTES, workers=workers)
    copies = dict(zip(files, made, strict=True))
    return {
        path: PageMap(webp, tuple((like, copies[like.path]) for like in likes[path]))
        for path, webp in maps.items()
    }
