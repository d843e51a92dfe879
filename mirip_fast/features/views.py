"""Views: the test-time augmentations of an image whose features are kept side by side."""

from __future__ import annotations

from dataclasses import dataclass

from mirip_fast.errors import ConfigError

#: Side lengths of the ``scales`` views, relative to the base view.
SCALES = (1.0, 0.9, 1.1)


@dataclass(frozen=True)
class View:
    """One way of looking at an image: the whole image, square, at ``size`` pixels a side."""

    size: int
    flip: bool = False  # mirrored left to right

    @property
    def name(self) -> str:
        """As used in series names: ``756`` or ``756-flip``."""
        return f"{self.size}-flip" if self.flip else str(self.size)


def effective_size(size: int, patch_size: int) -> int:
    """``size`` rounded down to whole patches: 768 → 756 for patches of 14 pixels.

    A patch embedding with stride = patch size ignores the remaining strip at the right and bottom edge;
    resizing to whole patches gives the same number of tokens and shows the model the whole image.

    Raises:
        ConfigError: ``size`` is smaller than one patch.
    """
    if size < patch_size:
        raise ConfigError(f"--image-size {size} is smaller than one patch of {patch_size} pixels")
    return size - size % patch_size


def make_views(tta: str, size: int, patch_size: int) -> tuple[View, ...]:
    """The views of a test-time augmentation setting, the base view first.

    Args:
        tta: ``none``, ``flip``, ``scales`` (0.9, 1.0, 1.1 of ``size``) or ``full`` (flip × scales).
        size: effective side of the base view, in pixels.
        patch_size: pixels per patch; scaled sides go to the nearest multiple. Views that then
            coincide are listed once.
    """
    scales = SCALES if tta in ("scales", "full") else (1.0,)
    sizes = [max(patch_size, round(size * scale / patch_size) * patch_size) for scale in scales]
    flips = (False, True) if tta in ("flip", "full") else (False,)
    return tuple(View(side, flip) for flip in flips for side in dict.fromkeys(sizes))
