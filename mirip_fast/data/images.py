"""Turning image files into RGB pixels, whatever people have in their folders.

A picture is read once into memory, recognised by its content (never by its name), checked, decoded and
brought to plain 8-bit RGB:

- formats: :data:`FORMATS` only. Anything else is refused before a decoder for it is started.
- size: at most :data:`MAX_PIXELS` pixels (checked on the header, before pixels are allocated) and
  :data:`MAX_FILE_BYTES` bytes.
- animations and multi-page files: the first frame.
- EXIF orientation is applied; an invalid one is ignored. Colour profiles are not applied. Broken
  metadata never costs the picture where the decoder can do without it.
- transparency is laid over white, as paper would be.
- 16-bit pixels are scaled to 8 bits; float and 32-bit pixels are refused, as their range is unknown.

Everything that can go wrong with one file is an :class:`~mirip_fast.errors.ImageError` whose message is
one printable line.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

# Importing a plugin registers it: Pillow then has no need to load the forty others.
from PIL import (
    AvifImagePlugin,  # noqa: F401
    BmpImagePlugin,  # noqa: F401
    GifImagePlugin,  # noqa: F401
    Image,
    JpegImagePlugin,  # noqa: F401
    PngImagePlugin,  # noqa: F401
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401
)

from mirip_fast.data.image_files import (
    IMAGE_EXTENSIONS,
    MAX_FILE_BYTES,
    one_line,
    read_image_bytes,
    scan_images,
)
from mirip_fast.data.signatures import describe_unreadable, without_jpeg_metadata
from mirip_fast.errors import ConfigError, ImageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "FORMATS",
    "IMAGE_EXTENSIONS",
    "MAX_FILE_BYTES",
    "MAX_PIXELS",
    "RESIZE_MODES",
    "decode_squares",
    "load_rgb",
    "one_reason",
    "read_image_bytes",
    "resize_square",
    "scan_images",
    "to_array",
    "to_bytes",
]

#: The formats that are decoded (Pillow's names; phones' multi-picture JPEGs count as JPEG).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
#: Largest picture that is decoded, in pixels (a 4-byte pixel makes this a third of a GiB).
MAX_PIXELS = 89_478_485
#: How a picture becomes square, see :func:`resize_square`.
RESIZE_MODES = ("squash", "pad", "crop")

_WHITE = (255, 255, 255)
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_rgb(source: Path | bytes, *, draft_size: int | None = None) -> Image.Image:
    """Decode one picture to RGB, upright, on white.

    Args:
        source: a file, or the content of one.
        draft_size: if given, a JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that leaves both
            sides at least twice this many pixels: far quicker, and still more than a resize to
            ``draft_size`` can use. The pixels differ slightly from those of a full decode.

    Returns:
        An image of mode RGB, without metadata.

    Raises:
        ImageError: the file can not be read or decoded; the message is the reason, on one line.
    """
    data = source if isinstance(source, bytes) else read_image_bytes(source)
    with one_reason():
        scale = 1 if draft_size is None else _draft_scale(_open(data), draft_size)
        return _decode(data, scale)[0]


def decode_squares(
    data: bytes, sizes: Sequence[int], mode: str, *, draft: bool
) -> tuple[tuple[int, int], list[Image.Image]]:
    """Decode one picture and make a square of each of ``sizes`` from it.

    A square depends on the picture, its own size, ``mode`` and ``draft`` alone, not on the other sizes
    asked for: in the rare case that two sizes allow different reduced scales, the JPEG is decoded twice.

    Args:
        data: the content of the image file.
        sizes: side lengths in pixels, at least one.
        mode: one of :data:`RESIZE_MODES`.
        draft: whether JPEGs are decoded at reduced scale (see :func:`load_rgb`).

    Returns:
        (width, height) of the whole picture, upright, in pixels; and the squares, in the order of
        ``sizes``.

    Raises:
        ImageError: the picture can not be decoded.
    """
    with one_reason():
        header = _open(data)
        decoded: dict[int, tuple[Image.Image, tuple[int, int]]] = {}
        squares = []
        for size in sizes:
            scale = _draft_scale(header, size) if draft else 1
            if scale not in decoded:
                decoded[scale] = _decode(data, scale)
            squares.append(resize_square(decoded[scale][0], size, mode))
        return decoded[scale][1], squares


def to_array(image: Image.Image) -> NDArray[np.uint8]:
    """The pixels of an RGB image: uint8 ``[H, W, 3]`` (height, width, colour), C order, 0-255."""
    import numpy as np

    return np.asarray(to_bytes(image))


def to_bytes(image: Image.Image) -> memoryview:
    """The pixels of an RGB image: bytes 0-255 in the shape [H, W, 3], C order, writable."""
    if image.mode != "RGB":
        raise ValueError(f"an RGB image is needed, not {image.mode}")
    return memoryview(bytearray(image.tobytes())).cast("B", (image.height, image.width, 3))


@contextmanager
def one_reason() -> Iterator[None]:
    """Turn whatever a decoder raises into an ImageError with one printable line."""
    try:
        yield
    except (ImageError, ConfigError):
        raise
    except MemoryError as error:
        raise ImageError("it needs more memory than one image may take") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"far more than the limit of {MAX_PIXELS} pixels") from error
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError, struct.error, …
        raise ImageError(one_line(str(error)) or type(error).__name__) from error


def _open(data: bytes) -> Image.Image:
    """Read the header alone; refuse foreign formats and too many pixels."""
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        # A colour profile or comment block that is cut short makes Pillow give up on the whole JPEG.
        plain = without_jpeg_metadata(data)
        if plain is None:
            raise ImageError(describe_unreadable(data)) from error
        try:
            image = Image.open(io.BytesIO(plain), formats=FORMATS)
        except UnidentifiedImageError:
            raise ImageError(describe_unreadable(data)) from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width} x {height} pixels is over the limit of {MAX_PIXELS} pixels")
    return image


def _draft_scale(header: Image.Image, size: int) -> int:
    """The strongest of the scales 1/8, 1/4, 1/2, 1 that leaves both sides at least ``2 * size``.

    For squash and crop that is twice what is kept of the shorter side; for pad it is more than that.
    """
    if header.format not in ("JPEG", "MPO"):
        return 1
    room = min(header.size) // (2 * size)
    return next((scale for scale in (8, 4, 2) if room >= scale), 1)


def _decode(data: bytes, scale: int) -> tuple[Image.Image, tuple[int, int]]:
    """Decode at 1/scale; also give the upright (width, height) that scale 1 has."""
    image = _open(data)
    width, height = image.size
    if scale > 1:
        image.draft(None, (width // scale, height // scale))
    if not isinstance(image.info.get("xmp"), bytes):
        # Pillow looks for an orientation in it, and trips over other types.
        image.info.pop("xmp", None)
    image.load()
    orientation = _orientation(image)
    rgb = _to_rgb(image)
    if orientation in _UPRIGHT:
        rgb = rgb.transpose(_UPRIGHT[orientation])
    rgb.info = {}  # or somebody turns it upright again
    if scale == 1:
        return rgb, rgb.size
    return rgb, (height, width) if orientation >= 5 else (width, height)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 (as stored) where there is none or it makes no sense."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # the parser of broken EXIF raises many things; none is worth the picture
        return 1
    return int(value) if isinstance(value, int | float) and value in _UPRIGHT else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F"):
        kind = "float" if image.mode == "F" else "32-bit"
        raise ImageError(f"{kind} pixels have no known range; save the picture with 8 or 16 bits")
    if image.mode.startswith("I;16"):
        image = _from_16_bit(image)
    if image.has_transparency_data:
        image = _over_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Grey pixels of 16 (or 12) bits as 8 bits: the high bits, as decoders do for 16-bit colour."""
    import numpy as np

    pixels = np.asarray(image)
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))
    grey = (pixels >> (bits[0] - 8)).astype(np.uint8)
    if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:  # white is zero
        grey = 255 - grey
    transparent = image.info.get("transparency")
    if transparent is not None:
        grey[pixels == transparent] = 255
    return Image.fromarray(grey)


def _over_white(image: Image.Image) -> Image.Image:
    colour = image.info.get("transparency")
    if isinstance(colour, tuple) and max(colour) > 255:
        # The transparent colour of a 16-bit PNG; its pixels have become 8-bit by now.
        image.info["transparency"] = tuple(value >> 8 for value in colour)
    if image.mode == "La":
        image = image.convert("LA")
    rgba = image.convert("RGBA")
    paper = Image.new("RGB", image.size, _WHITE)
    paper.paste(rgba, (0, 0), rgba)
    return paper


def resize_square(image: Image.Image, size: int, mode: str) -> Image.Image:
    """Resize to ``size`` x ``size`` pixels with antialiased bicubic interpolation.

    Args:
        image: an RGB image of any shape.
        size: side length in pixels.
        mode: ``squash`` changes the proportions; ``pad`` keeps the whole picture and its proportions,
            centred on white; ``crop`` keeps the largest centred square (of the resized whole: pixels
            just outside the square count in the interpolation).

    Raises:
        ConfigError: the mode is unknown.
    """
    width, height = image.size
    whole = (0.0, 0.0, float(width), float(height))
    if mode == "squash":
        return _resize(image, (size, size), whole)
    if mode == "crop":
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return _resize(image, (size, size), (left, top, left + side, top + side))
    if mode == "pad":
        longest = max(width, height)
        inner = (max(1, round(width * size / longest)), max(1, round(height * size / longest)))
        paper = Image.new("RGB", (size, size), _WHITE)
        corner = ((size - inner[0]) // 2, (size - inner[1]) // 2)
        paper.paste(_resize(image, inner, whole), corner)
        return paper
    raise ConfigError(f"Unknown resize mode {mode!r}; there are {', '.join(RESIZE_MODES)}")


def _resize(
    image: Image.Image, target: tuple[int, int], box: tuple[float, float, float, float]
) -> Image.Image:
    """Bicubic resize of ``box`` to ``target`` (width, height).

    Pillow resizes the rows first, into an intermediate of the target's width and the box's height: for a
    narrow picture of great height that would be gigabytes, as would the table of weights for any great
    length. Beyond a certain shrinkage, whole blocks of pixels are averaged first; what is left is at least
    three times the target.
    """
    extreme = max((box[2] - box[0]) / target[0], (box[3] - box[1]) / target[1]) > 32
    return image.resize(
        target, Image.Resampling.BICUBIC, box=box, reducing_gap=3.0 if extreme else None
    )
