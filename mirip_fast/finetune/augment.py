"""Augmentation of training images, by presets."""

from __future__ import annotations

from collections.abc import Callable

import torch

PRESETS = ("none", "light", "strong")

#: Smallest share of an image's area that a crop shows.
_SMALLEST_CROP = 0.8

Augmentation = Callable[[torch.Tensor], torch.Tensor]


def decode_size(preset: str, size: int) -> int:
    """Side in pixels at which images are decoded, so that the smallest crop is not blown up."""
    return size if preset == "none" else round(size / _SMALLEST_CROP**0.5)


def make_augmentation(preset: str, size: int) -> Augmentation | None:
    """The transforms of a preset: [3, H, W] uint8 → [3, size, size] uint8; None for ``none``.

    ``light``: a crop of 80–100 % of the area, mirrored or not. ``strong``: besides, turned by up to 10°,
    brightness, contrast, saturation and hue changed by up to 0.1, and two operations of RandAugment at
    magnitude 9 (Cubuk et al. 2020, arXiv 1909.13719).
    """
    from torchvision.transforms import InterpolationMode, v2

    if preset == "none":
        return None
    bicubic = InterpolationMode.BICUBIC
    light = [
        v2.RandomResizedCrop(
            size, scale=(_SMALLEST_CROP, 1.0), interpolation=bicubic, antialias=True
        ),
        v2.RandomHorizontalFlip(),
    ]
    if preset == "light":
        return v2.Compose(light)  # type: ignore[no-any-return]
    white = 255  # as transparency and padding are
    strong = [
        v2.RandomRotation(10, interpolation=InterpolationMode.BILINEAR, fill=white),
        v2.ColorJitter(0.1, 0.1, 0.1, 0.1),
        v2.RandAugment(num_ops=2, magnitude=9, fill=white),
    ]
    return v2.Compose([*light, *strong])  # type: ignore[no-any-return]
