"""Which regions of a picture raise its score and which lower it: occlusion.

Zeiler & Fergus 2014, «Visualizing and Understanding Convolutional Networks», section 4.2: cover a region,
score again, and see what changed. The regions are squares of patches that overlap by half; a covered one
shows a strong blur of itself, since a flat colour would be a thing that was never in a picture. A patch's
value is the mean change over the regions that it lies in.

It asks nothing of the model but scores, so it holds for every backbone, token kind and ensemble, and its
unit can be told in words: how much higher the score is because this region is as it is.
``benchmarks/explain_deletion.py`` compares it with other methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, islice

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from mirip_fast.features.backbone import Backbone
from mirip_fast.features.recipe import head_kinds
from mirip_fast.ranking.torch_score import MeanHead
from mirip_fast.runtime import in_passes, keep_freed_memory

#: Radius of the blur as a share of the picture's side: shapes are gone, colours and light stay.
BLUR = 0.09


def regions(side: int, detail: int) -> list[tuple[slice, slice]]:
    """The regions that are covered in turn: (detail − 1)² squares, each two steps wide, in patches.

    Args:
        side: patches along one edge of the picture.
        detail: steps along one edge; no more than there are patches.
    """
    steps = min(detail, side)
    edges = [round(i * side / steps) for i in range(steps + 1)]
    spans = [slice(*ends) for ends in zip(edges, edges[2:], strict=False)] or [slice(0, side)]
    return [(rows, columns) for rows in spans for columns in spans]


def occlusion_map(
    backbone: Backbone,
    head: MeanHead,
    features: str,
    square: NDArray[np.uint8],
    *,
    detail: int,
    batch_size: int,
    progress: Callable[[int], None] = lambda _: None,
) -> tuple[NDArray[np.float32], float, NDArray[np.float32]]:
    """Map what the regions of a picture do to its score.

    Args:
        backbone: on its device; the head is moved there.
        head: what scores.
        features: what the head sees, such as ``cls+mean``.
        square: [S, S, 3] the picture as the backbone sees it, 0–255, S a multiple of the patch size.
        detail: see :func:`regions`.
        batch_size: pictures per forward pass; halved where the memory is too small.
        progress: called with the number of pictures after each pass; 1 + (detail − 1)² in all.

    Returns:
        The map, a value per patch [rows, columns]: above 0 raises the score, below 0 lowers it, in the
        score's own unit; the score of the uncovered picture, and its CLS token [D].
    """
    head, kinds = head.to(backbone.device), head_kinds(features)
    patch = backbone.spec.patch_size
    side = square.shape[0] // patch
    covered = regions(side, detail)
    pictures = _covered(square, covered, patch)
    first_tokens: list[NDArray[np.float32]] = []

    def score(batch: list[NDArray[np.uint8]]) -> list[float]:
        pixels = backbone.normalise(torch.from_numpy(np.stack(batch)))
        rows = backbone.features(pixels, ("cls", *kinds))
        if not first_tokens:  # the first picture is the uncovered one
            first_tokens.append(rows["cls"][0].float().cpu().numpy())
        joined = torch.cat([rows[kind].flatten(1) for kind in kinds], dim=-1)
        found: list[float] = head(joined).double().cpu().tolist()
        progress(len(batch))
        return found

    scores: list[float] = []
    if backbone.device.type == "cpu":
        keep_freed_memory()
    while batch := list(islice(pictures, batch_size)):
        found, batch_size = in_passes(score, batch, batch_size)
        scores += chain.from_iterable(found)
    changes = scores[0] - np.array(scores[1:])
    # Per patch, the mean change over the regions that it lies in.
    total, count = np.zeros((side, side)), np.zeros((side, side))
    for region, change in zip(covered, changes, strict=True):
        total[region] += change
        count[region] += 1
    return (total / count).astype(np.float32), scores[0], first_tokens[0]


def _covered(
    square: NDArray[np.uint8], covered: list[tuple[slice, slice]], patch: int
) -> Iterator[NDArray[np.uint8]]:
    """The picture, then the picture with each region covered."""
    blur = ImageFilter.GaussianBlur(BLUR * len(square))
    blurred = np.asarray(Image.fromarray(square).filter(blur))
    yield square
    for region in covered:
        pixels = tuple(slice(patch * span.start, patch * span.stop) for span in region)
        picture = square.copy()
        picture[pixels] = blurred[pixels]
        yield picture
