"""`explain`: what in a picture raises and what lowers its score, and which graded works it looks like."""

from __future__ import annotations

import dataclasses
import io
import logging
import math
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mirip_fast.config import Config
from mirip_fast.data.decode_pool import DecodePool, load_pictures, picture_job
from mirip_fast.data.sources import is_gone, is_unchanged
from mirip_fast.errors import CheckpointError, DataError, ImageError, MiripError, StoreError
from mirip_fast.evaluation.plots import drawing
from mirip_fast.features.embed import open_hashes
from mirip_fast.features.engine import default_batch_size
from mirip_fast.features.neighbours import WORK, open_gallery, unit
from mirip_fast.features.phase_one import settings_of
from mirip_fast.features.recipe import series_name
from mirip_fast.files import write_bytes
from mirip_fast.models.numpy_head import NumpyHead
from mirip_fast.portfolio.similar import nearest_works
from mirip_fast.ranking.graded import load_split
from mirip_fast.ranking.held_out import load_calibration, load_held_out
from mirip_fast.ranking.rows import open_store, read_features
from mirip_fast.ranking.score_model import ScoreModel, TrainedHead
from mirip_fast.ranking.scorer import Scored, phase_of_model, score_files
from mirip_fast.text import shown
from mirip_fast.training.run_folder import SPLIT_FILE

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

#: Longer side of a drawn picture, and of a graded work beside it, in pixels.
SHOWN_SIDE, _LIKE_SIDE = 900, 360
_LIKES = 3  # graded works of a tier that a picture looks like

_GONE = Image.new("RGB", (_LIKE_SIDE, _LIKE_SIDE // 2), (225, 225, 225))  # since it was graded
# Orange and blue: told apart with every common kind of colour blindness, and in grey by their labels.
_RAISES = (230, 97, 1)
_LOWERS = (33, 102, 216)
_STRONGEST = 0.8  # of the colour at the strongest place; the rest is the picture


@dataclass(frozen=True)
class Explained:
    """One picture and why it has its score.

    Attributes:
        path: the image file.
        score: as ``rank`` gives it: the mean over the model's views.
        map: [rows, columns] over the base view. Occlusion, a value per patch: above 0 raises the score, below
            0 lowers it; in the score's own unit. Attention, one per token: its share of the head's look over
            an even one, less 1; at least −1.
        attention: whether the map is of the head's attention.
        tier: name of the tier that its score puts it in; None where graded works are not at hand.
        likes: the graded works that it looks like: the nearest of the best tier, then, where it is in
            another one, the nearest of its own; see :func:`mirip_fast.portfolio.similar.nearest_works`.
        picture: RGB, upright, small enough to draw.
        resize: how the picture became the backbone's square: squash, pad or crop.
    """

    path: Path
    score: float
    map: pd.DataFrame
    attention: bool
    tier: str | None
    likes: pd.DataFrame
    picture: Image.Image
    resize: str

    def overlay(self, *, limit: float | None = None) -> Image.Image:
        """The map over the picture, RGB; see :func:`overlay`. Of attention, what gets more than its share."""
        values = self.map.to_numpy()
        if self.attention:  # a look that is nearly even has hardly any colour
            values, limit = np.maximum(values, 0), limit or max(1.0, float(values.max()))
        return overlay(self.picture, values, self.resize, limit=limit)


def check_map(model: ScoreModel, config: Config, what: str) -> None:
    """Refuse a model of which ``explain.map`` cannot be made.

    Args:
        model: the trained model.
        config: the section explain is used.
        what: is running.

    Raises:
        CheckpointError: says how to name or train another.
    """
    if config.explain.map == "occlusion":
        model.require_one_backbone(what)
    elif not _attending(model):
        here = "" if model.info.more else f" --backbone {shlex.quote(model.info.embed.backbone)}"
        raise CheckpointError(
            f"--map attention shows where a head looks that attends to patch tokens, and {model.checkpoint} "
            "has none. For a run that has: `mirip-fast embed DATA --patches grid:7"
            f"{here} --image-size {model.info.embed.image_size}`, then `mirip-fast train --head-only "
            "--readout attention`; every model has a map without --map"
        )


def _attending(model: ScoreModel) -> list[tuple[TrainedHead, NumpyHead]]:
    heads = [(member, member.head) for member in model.members]
    return [(m, head) for m, head in heads if isinstance(head, NumpyHead) and head.attention]


class Explainer:
    """Explains pictures by one model; use it for several at once, since the backbone is loaded once.

    Args:
        model: the trained model.
        config: cache folder, device, batch size, detail of the map.
        backbone: another place of the model's backbone, if it moved.
        command: what is running, for whoever finds the store locked.

    Raises:
        BackboneError: the backbone cannot be found.
        CheckpointError: the backbone found is not the one that the model was trained on, or the map
            cannot be made of the model, see :func:`check_map`.
    """

    def __init__(
        self, model: ScoreModel, config: Config, *, backbone: str | None = None, command: str = ""
    ):
        check_map(model, config, "explain")
        self._model, self._config, self._command = model, config, command
        self._backbone_place = backbone
        self._cache_dir = Path(config.embed.cache_dir)
        self._occlusion = config.explain.map == "occlusion"
        if self._occlusion:
            from mirip_fast.ranking.torch_score import MeanHead

            with open_hashes(self._cache_dir) as hashes:
                self._phase = phase_of_model(
                    model.info, self._cache_dir, config.runtime.device, backbone, hashes
                )
            self._recipe = self._phase.recipe
            self._backbone, self._head = self._phase.load(), MeanHead(model.members)
        self._graded: GradedWorks | None = None
        try:
            self._graded = GradedWorks(model, self._cache_dir)
        except MiripError as error:
            log.warning("The graded works that a picture looks like cannot be shown: %s", error)

    def passes(self, count: int) -> int:
        """How many pictures go through the backbone to explain ``count``; for attention none."""
        if not self._occlusion:
            return 0
        from mirip_fast.portfolio.occlusion import regions

        side = self._recipe.views[0].size // self._recipe.backbone.patch_size
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
            failures: receives (path, reason) of those that cannot be read.
            progress: called after each pass with the number of pictures in it; :meth:`passes` in all.

        Raises:
            DataError: a file cannot be read, and ``failures`` is not given.
        """
        scored = score_files(
            self._model, paths,
            cache_dir=self._cache_dir, device=self._config.runtime.device,
            backbone=self._backbone_place,
            settings=settings_of(self._config.embed, len(paths), command=self._command),
        )  # fmt: skip
        total, done, started = self.passes(len(paths)), 0, time.monotonic()

        def passed(count: int) -> None:
            nonlocal done
            if done == 0:
                told = duration((time.monotonic() - started) / count * (total - count))
                where = self._phase.device
                log.info("%d passes through the backbone on %s: about %s", total, where, told)
            done += count
            progress(count)

        for i, path in enumerate(paths):
            reason = scored.outcomes["reason"][i]
            if reason is None:
                try:
                    yield self._explain(path, i, scored, passed)
                    continue
                except ImageError as error:
                    reason = str(error)
            if failures is None:
                raise DataError(f"{path}: {reason}")
            failures.append((path, reason))
            total -= self.passes(1)
            progress(self.passes(1))

    def _explain(
        self, path: Path, i: int, scored: Scored, progress: Callable[[int], None]
    ) -> Explained:
        import pandas as pd

        if self._occlusion:
            from mirip_fast.portfolio.occlusion import occlusion_map

            square, picture = self._decode(path)
            values, _, cls = occlusion_map(
                self._backbone, self._head, self._model.info.features, square,
                detail=self._config.explain.detail,
                batch_size=self._config.embed.embed_batch_size
                or default_batch_size(self._recipe, self._phase.device),
                progress=progress,
            )  # fmt: skip
        else:
            (drawn,) = load_pictures([path], SHOWN_SIDE)
            if isinstance(drawn, ImageError):
                raise drawn
            (values, cls), picture = self._attention(i, scored), drawn
        score, tier, likes = float(scored.scores[i]), None, pd.DataFrame()
        if self._graded is not None:
            tier = self._graded.tier_of(score)
            likes = self._graded.likes(cls, scored.outcomes["sha256"][i], tier)
        resize, attention = self._model.info.embed.resize, not self._occlusion
        shown = pd.DataFrame(values)
        return Explained(path, score, shown, attention, tier, likes, picture, resize)

    def _attention(self, i: int, scored: Scored) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The mean over the queries of all heads that attend: what their own pass over the tokens makes.

        Returns:
            The map, and the CLS token [D] of the base view.
        """
        info, hashes = self._model.info, [scored.outcomes["sha256"][i]]
        row = read_features(scored.store, hashes, info.features, info.views[:1])[:, 0]
        looks = [head.attention_maps(member.seen(row)) for member, head in _attending(self._model)]
        shares = np.mean([maps.mean(axis=1)[0] for maps in looks], axis=0)
        side = math.isqrt(len(shares))
        values = (shares * len(shares) - 1).reshape(side, side).astype(np.float32)
        return values, read_features(scored.store, hashes, "cls", info.views[:1])[0, 0]

    def _decode(self, path: Path) -> tuple[NDArray[np.uint8], Image.Image]:
        """What the backbone sees, [size, size, 3], and the picture to draw."""
        recipe, draw_it = self._recipe, picture_job(1, path, SHOWN_SIDE)
        see_it = dataclasses.replace(
            draw_it, index=0, sizes=(recipe.views[0].size,), mode=recipe.resize,
            draft=recipe.decode == "fast", srgb=recipe.srgb,
        )  # fmt: skip
        with DecodePool(1) as pool:
            square, picture = pool.decode([see_it, draw_it])
        for done in (square, picture):
            if done.reason is not None:
                raise ImageError(done.reason)
        return square.images[0], Image.fromarray(picture.images[0])


class GradedWorks:
    """The graded works of a model's run that are in the cache, and what its scores mean among them.

    Args:
        model: a model in its run's folder.
        cache_dir: folder of the stores.

    Raises:
        DataError: the run has no list of its graded images, or that is damaged.
        StoreError: the cache has no features of them any more.
    """

    def __init__(self, model: ScoreModel, cache_dir: Path):
        self._tiers = model.info.tiers
        self._store = open_store(cache_dir, model.info)
        self._series = series_name(model.info.views[0], "cls")
        folder = model.checkpoint.parent
        images = load_split(folder / SPLIT_FILE, self._tiers)
        if not images.has_tiers:
            raise DataError("the works that the model learned from have no tiers")
        if (self._store.rows(self._series, images.hashes) < 0).all():
            raise StoreError(f"{self._store.path} has no features of the run's graded images")
        known = images.table.assign(sha256=images.hashes)[WORK]
        self._works = known.drop_duplicates(["tier", "sha256"])
        self._calibration = load_calibration(model)
        held_out = load_held_out(folder, self._tiers)
        if held_out is not None and len(held_out):
            scores, tiers = held_out.scores, held_out.tier_codes
        else:  # a run of an earlier version
            kept = [i for i, split in enumerate(images.splits) if split != "train"]
            if not kept:
                raise DataError(f"{folder} has no scores of works it had not trained on")
            hashes = [images.hashes[i] for i in kept]
            scores = model.score(self._store, hashes).astype(np.float64)
            tiers = images.tier_codes[kept]
        # Held-out scores [n] and the number of works of each tier [K] among them.
        self._places = scores, np.bincount(tiers, minlength=len(self._tiers))

    def tier_of(self, score: float) -> str:
        """The tier that a score is put in: the most probable one, as ``rank`` names it.

        Where probabilities are unknown, it is that of its place among held-out scores of graded works:
        with the works sorted by score, the first as many as there are works of the best tier are put in
        it, the next in the second, and so on (as ``evaluate`` does).
        """
        if self._calibration.ordinal is not None:
            return self._tiers[int(self._calibration.ordinal.most_probable(np.array([score]))[0])]
        scores, counts = self._places
        above = int((scores > score).sum())
        filled = np.flatnonzero(counts)
        tier = int(np.searchsorted(np.cumsum(counts[filled]), above, side="right"))
        return self._tiers[int(filled[min(tier, len(filled) - 1)])]

    def likes(self, cls: NDArray[np.floating], sha256: bytes, tier: str) -> pd.DataFrame:
        """The three works of the best tier that a picture looks like, and those of ``tier`` if it is another.

        Args:
            cls: [D] its CLS token.
            sha256: of its file's bytes; it is not its own likeness.
            tier: that it is put in.
        """
        import pandas as pd

        found = []
        for name in dict.fromkeys((self._tiers[0], tier)):
            works = self._works[self._works["tier"] == name]
            works = works.loc[[sha != sha256 for sha in works["sha256"]]]
            if (self._store.rows(self._series, works["sha256"].tolist()) < 0).all():
                continue
            gallery = open_gallery(works, [self._store], self._series)
            nearest = nearest_works(gallery, unit(cls[None])[0], b"", _LIKES)
            # Who made the run chose the paths, so other files of this machine might lie there.
            same = list(map(is_unchanged, nearest["file"], nearest["sha256"]))
            changed = [file for file, known in zip(nearest["file"], same, strict=True) if not known]
            if changed:
                log.warning(
                    "%d of the %d graded works of tier %s that it looks like %s not shown: their content "
                    "changed since training (first: %s)",
                    *(len(changed), len(nearest), name, "is" if len(changed) == 1 else "are"),
                    shown(changed[0]),
                )
            found.append(nearest.loc[same])
        return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


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
        write_bytes(target, _draw(explained))
        done += 1
        yield explained, target
    if not done:
        path, reason = failures[0]
        raise DataError(f"{path}: {reason}")


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
    """The image files, each once; refused before anything heavy is loaded if they cannot be meant.

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


def duration(seconds: float) -> str:
    """``40 s``, ``12 min``, ``3.5 h``: as exact as an estimate is."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def where(values: NDArray[np.float32], *, raises: bool) -> tuple[str, float] | None:
    """The ninth of the square that raises (or lowers) the score most, in words, and its mean value.

    Returns:
        None where no part does.
    """
    rows, names = [values], [""]
    if len(values) >= 3:
        rows, names = np.array_split(values, 3, axis=0), ["top", "middle", "bottom"]
    best: tuple[str, float] | None = None
    for name, row in zip(names, rows, strict=True):
        sides = ("left", "centre", "right") if row.shape[1] >= 3 else ("",)
        for side, part in zip(sides, np.array_split(row, len(sides), axis=1), strict=True):
            mean = float(part.mean())
            if (mean > 0) == raises and mean and (best is None or abs(mean) > abs(best[1])):
                best = (" ".join(filter(None, (name, side))) or "the whole", mean)
    return best


def overlay(
    picture: Image.Image,
    values: NDArray[np.float32],
    resize: str,
    *,
    limit: float | None = None,
) -> Image.Image:
    """A picture in pale grey under its map: orange raises the score, blue lowers it.

    Args:
        picture: RGB, upright, of any size.
        values: [rows, columns] of the square that the backbone saw.
        resize: how the picture became that square: squash, pad or crop.
        limit: the change that gets the full colour (default: the strongest of this map); give the same
            to compare pictures.

    Returns:
        RGB, of the picture's size. What the backbone did not see stays grey.
    """
    limit = limit or float(np.abs(values).max()) or 1.0
    width, height = picture.size
    square = (width, height)
    if resize != "squash":
        square = ((min if resize == "crop" else max)(square),) * 2
    # The map on the picture's own pixels, 0 where the square does not reach.
    smooth = Image.fromarray(values.astype(np.float32)).resize(square, Image.Resampling.BICUBIC)
    left, top = (width - square[0]) // 2, (height - square[1]) // 2
    strength = np.zeros((height, width), np.float32)
    inner = np.asarray(smooth)[max(0, -top) :, max(0, -left) :][:height, :width]
    y, x = max(0, top), max(0, left)
    strength[y : y + inner.shape[0], x : x + inner.shape[1]] = inner
    strength = np.clip(strength / limit, -1, 1)[..., None]
    # Grey and pale, so that both colours show on dark paintings, too.
    grey = 95 + 0.6 * np.asarray(picture.convert("L"), np.float32)[..., None]
    colour = np.where(strength > 0, np.array(_RAISES, np.float32), np.array(_LOWERS, np.float32))
    share = _STRONGEST * np.abs(strength)
    mixed = grey * (1 - share) + colour * share
    return Image.fromarray(np.clip(mixed, 0, 255).astype(np.uint8), "RGB")


def _draw(explained: Explained) -> bytes:
    """The whole explanation as a PNG file: picture, map with legend, and the graded look-alikes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    likes = explained.likes
    files = [] if likes.empty else likes["file"].drop_duplicates().tolist()
    pictures = {
        path: _GONE if isinstance(picture, ImageError) else picture
        for path, picture in zip(files, load_pictures(files, _LIKE_SIDE), strict=True)
    }
    aspect = explained.picture.height / explained.picture.width
    heights = [1.0 + min(max(5.6 * aspect, 2.8), 8.5)] + [2.5] * bool(files)
    tiers = list(likes.groupby("tier", sort=False)) if files else []
    with (
        drawing([explained.tier or "", *(str(tier) for tier, _ in tiers)]),
        rc_context({"font.size": 11}),
    ):
        figure = Figure(figsize=(12.5, sum(heights)), facecolor="white")
        parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        _draw_map(parts[0], explained, heights[0])
        for half, (tier, nearest) in zip(parts[-1].subfigures(1, 2), tiers, strict=False):
            same = f"tier {tier}, because it looks like these"
            other = f"nearest graded works of tier {tier}"
            half.suptitle(same if tier == explained.tier else other, fontsize=12)
            edges = {"left": 0.03, "right": 0.97, "top": 0.84, "bottom": 0.12, "wspace": 0.06}
            axes = half.subplots(1, 3, gridspec_kw=edges)
            for place, file, cosine in zip(axes, nearest["file"], nearest["cosine"], strict=False):
                place.imshow(np.asarray(pictures[file]))
                place.set_title(f"cosine {cosine:.2f}", y=-0.16, fontsize=10)
            for place in axes:
                place.set_axis_off()
        # Through memory: a file that is being written has no name that tells its kind.
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def _draw_map(figure: Any, explained: Explained, inches: float) -> None:
    values, picture, attention = (
        explained.map.to_numpy(),
        explained.picture,
        explained.attention,
    )
    limit = float(np.abs(values).max()) or 1.0
    if attention:
        limit = max(1.0, float(values.max()))
    tier = f"   ·   tier {explained.tier}" if explained.tier else ""
    title = f"Score {explained.score:.4f}{tier}"
    figure.suptitle(title, fontsize=15, fontweight="bold", y=1 - 0.2 / inches, va="center")
    places = {
        "left": 0.02, "right": 0.92, "wspace": 0.04,
        "top": 1 - 0.75 / inches, "bottom": 0.12 / inches,
    }  # fmt: skip
    left, right, legend = figure.subplots(1, 3, width_ratios=[1, 1, 0.03], gridspec_kw=places)
    left.imshow(picture)
    left.set_title("the picture")
    right.imshow(explained.overlay())
    told = "orange raises the score (blurred away, it would fall), blue lowers it"
    if attention:
        told = "orange: the head looks there more than evenly; that is no cause"
    right.set_title(told, fontsize=11)
    for axes in (left, right):
        axes.set_axis_off()
    low = 0.0 if attention else -limit
    strip = np.linspace(1, low / limit, 256, dtype=np.float32)[:, None]
    pale = Image.new("RGB", (1, 256), (200, 200, 200))
    colours = overlay(pale, strip, "squash", limit=1.0)
    legend.imshow(colours, aspect="auto", extent=(0, 1, low, limit))
    legend.yaxis.tick_right()
    legend.set_xticks([])
    ticks = [tick for tick in (limit, limit / 2, 0.0, -limit / 2, -limit) if tick >= low]
    signed = ["0" if tick == 0 else f"{tick:+.2g}" for tick in ticks]
    legend.set_yticks(ticks, [f"×{1 + tick:.2g}" for tick in ticks] if attention else signed)
