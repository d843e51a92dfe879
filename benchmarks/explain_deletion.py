"""Do the maps of `explain` point at what matters? Deletion, on pictures of your own.

    python benchmarks/explain_deletion.py --checkpoint runs/… --cache-dir cache --pictures folder/

For every picture, the patches that a map calls most important are removed, and the picture is scored again
(the deletion check of Petsiuk, Das & Saenko 2018, «RISE», and Samek et al. 2017). Patches are replaced by
the picture's mean colour, which the maps never saw, and by the blur that occlusion uses. Told per method:

- falls: mean change of the score after removing the patches that raise it most (below 0 is right);
- rises: after removing those that lower it most (above 0 is right);
- gap: rises minus falls;
- strongest: mean absolute change after removing the patches with the largest values of either sign;
- sign: share of pictures where removing patches that raise leaves a lower score than removing those that
  lower.

The controls are as many patches at random (mean of 8 draws), and the map of another picture: as smooth as
the picture's own, but in the wrong places. Rivals of occlusion: integrated gradients (Sundararajan, Taly &
Yan 2017, 16 steps from the blurred picture) and a linear fit to random masks (as in LIME, Ribeiro et al.
2016: 200 masks of 7 × 7 cells).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from mirip_fast.data.image_files import scan_images
from mirip_fast.data.images import decode_squares
from mirip_fast.data.sources import read_image
from mirip_fast.evaluation.text_table import format_table
from mirip_fast.features.backbone import Backbone, load_backbone
from mirip_fast.features.embed import open_hashes
from mirip_fast.portfolio.occlusion import BLUR, occlusion_map
from mirip_fast.ranking.evaluate import pick_model
from mirip_fast.ranking.scorer import phase_of_model
from mirip_fast.ranking.torch_score import ImageScorer, MeanHead

Square = NDArray[np.uint8]
Map = NDArray[np.float32]
DRAWS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--output-dir", type=Path, default=Path("runs"))
    parser.add_argument("--cache-dir", type=Path, default=Path("cache"))
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--count", type=int, default=24, help="evenly spaced among the pictures")
    parser.add_argument("--details", default="6,8,14")
    parser.add_argument("--rivals", action="store_true")
    parser.add_argument("--share", type=float, default=0.2, help="of the patches removed")
    args = parser.parse_args()

    model = pick_model(args.checkpoint, args.output_dir)
    with open_hashes(args.cache_dir) as hashes:
        phase = phase_of_model(model.info, args.cache_dir, "auto", None, hashes)
    backbone = load_backbone(phase.recipe.backbone, phase.device, phase.recipe.precision)
    scorer = ImageScorer(backbone.model, backbone.spec, MeanHead(model.members), model.info)
    scorer.to(phase.device)

    paths = scan_images(args.pictures)
    paths = paths[:: max(1, len(paths) // args.count)][: args.count]
    size = phase.recipe.views[0].size
    squares = []
    for path in paths:
        made = decode_squares(read_image(path)[0], [size], phase.recipe.resize, draft=True)
        squares.append(np.array(made.images[0]))

    methods: dict[str, Callable[[Square], Map]] = {
        f"occlusion, detail {d}": occlusion(backbone, scorer, model.info.features, int(d))
        for d in args.details.split(",")
    }
    if args.rivals:
        methods["integrated gradients"] = integrated_gradients(backbone, scorer)
        methods["fit to random masks"] = mask_fit(backbone, scorer)
    report(backbone, scorer, squares, methods, args.share)


def report(
    backbone: Backbone,
    scorer: ImageScorer,
    squares: list[Square],
    methods: dict[str, Callable[[Square], Map]],
    share: float,
) -> None:
    rng = np.random.default_rng(0)
    maps: dict[str, list[Map]] = {name: [] for name in methods}
    seconds = dict.fromkeys(methods, 0.0)
    for name, method in methods.items():
        for square in squares:
            started = time.perf_counter()
            maps[name].append(method(square))
            seconds[name] += time.perf_counter() - started
    first = next(iter(methods))
    side = maps[first][0].shape[0]
    count = round(share * side * side)
    maps["control: another picture's map"] = maps[first][1:] + maps[first][:1]
    print(f"{len(squares)} pictures, {side} × {side} patches, {count} removed ({share:.0%})")
    for filling in ("mean colour", "blur"):
        rows, chance = [], []
        for square in squares:
            draws = [rng.permutation(side * side)[:count] for _ in range(DRAWS)]
            chance.append(changes(backbone, scorer, square, draws, filling))
        for name, found in maps.items():
            per_picture = []
            for square, values in zip(squares, found, strict=True):
                flat = values.ravel()
                orders = [np.argsort(key)[:count] for key in (-flat, flat, -np.abs(flat))]
                per_picture.append(changes(backbone, scorer, square, orders, filling))
            falls, rises, strongest = np.array(per_picture).T
            relative = f"{seconds[name] / seconds[first]:.1f}" if name in seconds else ""
            rows.append(
                (
                    name, f"{falls.mean():+.3f}", f"{rises.mean():+.3f}",
                    f"{(rises - falls).mean():.3f}", f"{np.abs(strongest).mean():.3f}",
                    f"{(rises > falls).mean():.2f}", relative,
                )
            )  # fmt: skip
        mean = np.array(chance)
        rows.append(
            ("control: random patches", *[f"{mean.mean():+.3f}"] * 2, "0",
             f"{np.abs(mean).mean():.3f}", "", "")
        )  # fmt: skip
        print(f"\nremoved patches replaced by: {filling}")
        names = ("map", "falls", "rises", "gap", "strongest", "sign", "time, ratio")
        print(format_table(names, rows, align="lrrrrrr"))


@torch.no_grad()
def score(backbone: Backbone, scorer: ImageScorer, pictures: list[Square]) -> NDArray[np.float64]:
    """Scores of the base view, in batches of 16."""
    parts = []
    for i in range(0, len(pictures), 16):
        pixels = backbone.normalise(torch.from_numpy(np.stack(pictures[i : i + 16])))
        parts.append(scorer.head(scorer.features(pixels)).double().cpu().numpy())
    return np.concatenate(parts)


def changes(
    backbone: Backbone,
    scorer: ImageScorer,
    square: Square,
    removed: list[NDArray[np.int64]],
    filling: str,
) -> list[float]:
    """How the score changes when each of the sets of patches is removed."""
    patch = backbone.spec.patch_size
    side = len(square) // patch
    fill = blurred(square)
    if filling == "mean colour":
        fill = np.broadcast_to(square.mean((0, 1)).round().astype(np.uint8), square.shape)
    pictures = [square]
    for patches in removed:
        mask = np.zeros(side * side, bool)
        mask[patches] = True
        large = mask.reshape(side, side).repeat(patch, 0).repeat(patch, 1)[..., None]
        pictures.append(np.where(large, fill, square))
    scores = score(backbone, scorer, pictures)
    return list(scores[1:] - scores[0])


def blurred(square: Square) -> Square:
    image = Image.fromarray(square).filter(ImageFilter.GaussianBlur(BLUR * len(square)))
    return np.asarray(image)


def occlusion(
    backbone: Backbone, scorer: ImageScorer, features: str, detail: int
) -> Callable[[Square], Map]:
    def method(square: Square) -> Map:
        return occlusion_map(backbone, scorer.head, features, square, detail=detail, batch_size=16)[
            0
        ]

    return method


def integrated_gradients(backbone: Backbone, scorer: ImageScorer) -> Callable[[Square], Map]:
    steps, batch = 16, 4
    patch = backbone.spec.patch_size

    def method(square: Square) -> Map:
        pixels = backbone.normalise(torch.from_numpy(square[None]))
        start = backbone.normalise(torch.from_numpy(blurred(square)[None].copy()))
        total = torch.zeros_like(pixels)
        alphas = (torch.arange(steps, device=pixels.device) + 0.5) / steps
        for part in alphas.split(batch):
            point = (start + part.view(-1, 1, 1, 1) * (pixels - start)).requires_grad_(True)
            (gradient,) = torch.autograd.grad(scorer.head(scorer.features(point)).sum(), point)
            total += gradient.sum(0, keepdim=True)
        shares = (total / steps * (pixels - start)).sum(1, keepdim=True)
        sums = torch.nn.functional.avg_pool2d(shares, patch)[0, 0] * patch**2
        return sums.float().cpu().numpy()

    return method


def mask_fit(backbone: Backbone, scorer: ImageScorer) -> Callable[[Square], Map]:
    count, cells = 200, 7
    patch = backbone.spec.patch_size

    def method(square: Square) -> Map:
        rng = np.random.default_rng(0)
        side = len(square) // patch
        half = rng.random((count // 2, cells, cells)) < 0.5
        kept = np.concatenate([half, ~half])
        index = np.arange(side) * cells // side
        fill = blurred(square)
        pictures = []
        for mask in kept:
            large = mask[index][:, index].repeat(patch, 0).repeat(patch, 1)[..., None]
            pictures.append(np.where(large, square, fill))
        scores = score(backbone, scorer, pictures)
        design = kept.reshape(count, -1) - 0.5
        ridge = design.T @ design + 0.25 * cells**2 * np.eye(cells**2)
        weights = np.linalg.solve(ridge, design.T @ (scores - scores.mean()))
        return weights.reshape(cells, cells)[index][:, index].astype(np.float32)

    return method


if __name__ == "__main__":
    main()
