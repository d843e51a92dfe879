"""`explain`: what in a picture raises and what lowers its score, and which graded works it looks like."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mirip_fast.config import Config
from mirip_fast.data.decode_pool import DecodePool, picture_job
from mirip_fast.data.sources import is_gone
from mirip_fast.errors import DataError, ImageError
from mirip_fast.features.command import settings_of
from mirip_fast.features.forward import default_batch_size
from mirip_fast.features.phase_one import PhaseOne, open_hashes
from mirip_fast.files import write_atomically
from mirip_fast.portfolio.explain_picture import SHOWN_SIDE, draw, overlay
from mirip_fast.portfolio.graded_likes import GradedLikes, GradedWorks, graded_works
from mirip_fast.ranking.scorer import Scored, ScoreModel, phase_of_model, score_files

if TYPE_CHECKING:
    from mirip_fast.portfolio.occlusion import ScoreMap

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Explained:
    """One picture and why it has its score.

    Attributes:
        path: the image file.
        score: as ``rank`` gives it: the mean over the model's views.
        map: what each part of the base view does to its score.
        likes: the graded works that it looks like; None where they are not at hand.
        picture: RGB, upright, small enough to draw.
        resize: how the picture became the backbone's square: squash, pad or crop.
    """

    path: Path
    score: float
    map: ScoreMap
    likes: GradedLikes | None
    picture: Image.Image
    resize: str

    def overlay(self, *, limit: float | None = None) -> Image.Image:
        """The map over the picture, RGB; see :func:`mirip_fast.portfolio.explain_picture.overlay`."""
        return overlay(self.picture, self.map.values, self.resize, limit=limit)


class Explainer:
    """Explains pictures by one model; use it for several at once, since the backbone is loaded once.

    Args:
        model: the trained model.
        config: cache folder, device, batch size, detail of the map.
        backbone: another place of the model's backbone, if it moved.
        command: what is running, for whoever finds the store locked.

    Raises:
        BackboneError: the backbone can not be found.
        CheckpointError: the backbone found is not the one that the model was trained on, or the model
            has several.
    """

    def __init__(
        self, model: ScoreModel, config: Config, *, backbone: str | None = None, command: str = ""
    ):
        from mirip_fast.features.backbone import load_backbone
        from mirip_fast.ranking.torch_score import MeanHead

        model.require_one_backbone("explain")
        self._model, self._config, self._command = model, config, command
        self._backbone_place = backbone
        self._cache_dir = Path(config.embed.cache_dir)
        with open_hashes(self._cache_dir) as hashes:
            self._phase: PhaseOne = phase_of_model(
                model.info, self._cache_dir, config.runtime.device, backbone, hashes
            )
        recipe = self._phase.recipe
        self._backbone = load_backbone(recipe.backbone, self._phase.device, recipe.precision)
        self._head = MeanHead(model.members)
        self._graded: GradedWorks | None = graded_works(model, self._cache_dir)

    def passes(self, count: int) -> int:
        """How many pictures go through the backbone to explain ``count``."""
        from mirip_fast.portfolio.occlusion import regions

        recipe = self._phase.recipe
        side = recipe.views[0].size // recipe.backbone.patch_size
        return count * (1 + len(regions(side, self._config.explain.detail)))

    def explain(
        self,
        paths: Sequence[Path],
        *,
        failures: list[tuple[Path, str]] | None = None,
        progress: Callable[[int], None] = lambda _: None,
    ) -> Iterator[Explained]:
        """Explain pictures one after the other; says how long it will take once it is known.

        Args:
            paths: image files.
            failures: receives (path, reason) of those that can not be read.
            progress: called after each pass with the number of pictures in it; :meth:`passes` in all.

        Raises:
            DataError: a file can not be read, and ``failures`` is not given.
        """
        scored = self._score(paths)
        clock = _Clock(self.passes(len(paths)), str(self._phase.device), progress)
        for i, path in enumerate(paths):
            reason = scored.outcomes[i].reason
            if reason is None:
                try:
                    yield self._explain(path, i, scored, clock)
                    continue
                except ImageError as error:
                    reason = str(error)
            if failures is None:
                raise DataError(f"{path}: {reason}")
            failures.append((path, reason))
            clock.skip(self.passes(1))

    def _score(self, paths: Sequence[Path]) -> Scored:
        settings = settings_of(self._config.embed, len(paths), command=self._command)
        return score_files(
            self._model, paths,
            cache_dir=self._cache_dir, device=self._config.runtime.device,
            backbone=self._backbone_place, settings=settings,
        )  # fmt: skip

    def _explain(self, path: Path, i: int, scored: Scored, clock: _Clock) -> Explained:
        from mirip_fast.portfolio.occlusion import occlusion_map

        recipe = self._phase.recipe
        square, picture = self._decode(path)
        score_map = occlusion_map(
            self._backbone, self._head, self._model.info.features, square,
            detail=self._config.explain.detail,
            batch_size=self._config.embed.embed_batch_size
            or default_batch_size(recipe, self._phase.device),
            progress=clock,
        )  # fmt: skip
        score = float(scored.scores[i])
        sha256 = scored.outcomes[i].sha256 or b""
        likes = self._graded.likes(score_map.cls, sha256, score) if self._graded else None
        return Explained(path, score, score_map, likes, picture, recipe.resize)

    def _decode(self, path: Path) -> tuple[NDArray[np.uint8], Image.Image]:
        """What the backbone sees, [size, size, 3], and the picture to draw."""
        recipe = self._phase.recipe
        shown = picture_job(1, path, SHOWN_SIDE)
        seen = dataclasses.replace(
            shown, index=0, sizes=(recipe.views[0].size,), mode=recipe.resize,
            draft=recipe.decode == "fast",
        )  # fmt: skip
        with DecodePool(1) as pool:
            square, picture = pool.decode([seen, shown])
        for done in (square, picture):
            if done.reason is not None:
                raise ImageError(done.reason)
        return square.images[0], Image.fromarray(picture.images[0])


def explain_to_files(
    explainer: Explainer,
    paths: Sequence[Path],
    out: Path,
    *,
    progress: Callable[[int], None] = lambda _: None,
    failures: list[tuple[Path, str]],
) -> Iterator[tuple[Explained, Path]]:
    """Explain pictures and write ``<name>.explain.png`` for each into ``out``, as each is done.

    Raises:
        DataError: a path is a folder, or none of the files can be read.
    """
    names = picture_names(paths)
    done = 0
    for explained in explainer.explain(paths, failures=failures, progress=progress):
        target = out / names[explained.path]
        write_atomically(target, partial(_write, draw(explained)))
        done += 1
        yield explained, target
    if not done:
        path, reason = failures[0]
        raise DataError(f"{path}: {reason}")


def _write(data: bytes, stream: IO[bytes]) -> None:
    stream.write(data)


def picture_names(paths: Sequence[Path]) -> dict[Path, str]:
    """The name of each picture's explanation: its own, with a number where two share one."""
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for path in paths:
        name, number = f"{path.stem}.explain.png", 2
        while name.casefold() in taken:
            name, number = f"{path.stem}.explain-{number}.png", number + 1
        taken.add(name.casefold())
        names[path] = name
    return names


def check_paths(paths: Sequence[Path], out: Path) -> list[Path]:
    """The image files, each once; refused before anything heavy is loaded if they can not be meant.

    Raises:
        DataError: a folder, or a file that does not exist; or ``out`` is a file.
    """
    for path in paths:
        if path.is_dir():
            raise DataError(
                f"{path} is a folder; explain takes image files, such as {path}/*.jpg. "
                f"`mirip-fast rank {path}` sorts it."
            )
        if is_gone(path):
            raise DataError(f"{path}: there is no such file")
    if out.exists() and not out.is_dir():
        raise DataError(f"--out {out} is a file; give a folder")
    return list(dict.fromkeys(paths))


class _Clock:
    """Passes progress on, and tells after the first pass how long all of them will take."""

    def __init__(self, total: int, device: str, inner: Callable[[int], None]):
        self._total, self._device, self._inner = total, device, inner
        self._started = time.monotonic()
        self._done = 0

    def __call__(self, count: int) -> None:
        if self._done == 0:
            seconds = (time.monotonic() - self._started) / count * (self._total - count)
            log.info(
                "%d passes through the backbone on %s: about %s",
                self._total, self._device, duration(seconds),
            )  # fmt: skip
        self._done += count
        self._inner(count)

    def skip(self, count: int) -> None:
        self._total -= count
        self._inner(count)


def duration(seconds: float) -> str:
    """``40 s``, ``12 min``, ``3.5 h``: as exact as an estimate is."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
