"""Colour profiles: pixels that a picture means otherwise than sRGB has them, as sRGB."""

from __future__ import annotations

import functools
import io
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from PIL.ImageCms import ImageCmsTransform

# Colour space of a profile (its signature) → mode of the pixels it is for.
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
_LARGEST = 16 << 20  # bytes; of printers' profiles the largest has three million
_SAME = 2  # levels of 255 by which sRGB's own profiles differ


def to_srgb(picture: Image.Image, profile: bytes) -> Image.Image:
    """A picture as RGB (with transparency RGBA), in the colours that its profile means.

    Args:
        picture: of any mode of 8 bits.
        profile: an ICC profile; if it means sRGB, the picture is given back as it is.

    Raises:
        ValueError: the profile is damaged, or of another kind than the pixels.
    """
    mode, transform = _transform(profile)
    grey, cmyk = picture.mode in ("L", "LA", "1"), picture.mode == "CMYK"
    if (mode == "CMYK") != cmyk or (mode == "L" and not grey):
        raise ValueError(f"a profile for {mode}, and the pixels are {picture.mode}")
    if transform is None:
        return picture
    if not picture.has_transparency_data:
        return transform.apply(picture.convert(mode))
    picture = picture.convert("RGBA")
    result = transform.apply(picture.convert(mode))
    result.putalpha(picture.getchannel("A"))
    return result


@functools.lru_cache(maxsize=8)  # of a folder's pictures most have the same
def _transform(profile: bytes) -> tuple[str, ImageCmsTransform | None]:
    """The mode that a profile is for, and what brings it to sRGB; None where it means sRGB."""
    from PIL import ImageCms

    if len(profile) > _LARGEST:
        raise ValueError("too large")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _MODES[source.profile.xcolor_space.strip()]
        transform = ImageCms.ImageCmsTransform(
            source,
            ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (OSError, KeyError, TypeError, ImageCms.PyCMSError) as error:
        raise ValueError("damaged, or of a kind that is not read") from error
    if mode == "CMYK":
        return mode, transform
    if mode == "L":
        probe = Image.frombytes("L", (256, 1), bytes(range(256)))
    else:
        steps = bytes(range(0, 256, 17))
        colours = bytes(c for r in steps for g in steps for b in steps for c in (r, g, b))
        probe = Image.frombytes("RGB", (256, 16), colours)
    before, after = probe.convert("RGB").tobytes(), transform.apply(probe).tobytes()
    same = max(abs(a - b) for a, b in zip(before, after, strict=True)) <= _SAME
    return mode, None if same else transform
