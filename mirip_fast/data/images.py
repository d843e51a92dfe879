"""Turning image files into RGB pixels, whatever people have in their folders.

A picture is read once into memory, recognised by its content (never by its name), checked, decoded and
brought to plain 8-bit RGB:

- formats: :data:`FORMATS`, and those of :mod:`mirip_fast.data.formats` where their package is installed: a
  page of a PDF as a viewer draws it, of a camera's RAW file the preview in it. Anything else is refused
  before a decoder for it is started.
- size: at most :data:`MAX_PIXELS` pixels, or as many as the caller admits (checked on the header, before
  pixels are allocated), and :data:`MAX_FILE_BYTES` bytes. A larger JPEG is decoded at 1/2, 1/4 or 1/8 of
  its size. Nothing of more than :data:`UTMOST_PIXELS` is decoded.
- animations and multi-page files: the first frame; where that is of one flat colour, the first of
  the next :data:`MAX_FRAMES` that is not. A TIFF's reduced copies and masks are passed over.
- EXIF orientation is applied; an invalid one is ignored, as is that of a HEIC or JPEG XL, which has its own.
- colours are brought to sRGB where a colour profile says that they are others. One that is damaged, or of
  another kind than the pixels, is left aside, which :class:`Squares` tells.
- broken metadata never costs the picture where the decoder can do without it, nor does a missing end of a
  JPEG that has all its pixels.
- transparency is laid over white, as paper would be; what could not be seen there (white lines on
  nothing) over black. A BMP whose alpha is 0 everywhere has none, as viewers take it.
- 16-bit pixels are scaled to 8 bits; float, signed and 32-bit pixels are refused, as their range is
  unknown.

Everything that can go wrong with one file is an :class:`~mirip_fast.errors.ImageError` whose message is
one printable line.
"""

from __future__ import annotations

import functools
import io
import threading
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

from mirip_fast.data.formats import (
    EXTRAS,
    JXL_STARTS,
    is_pdf,
    is_raw,
    jxl_size,
    package_for,
    pdf_page,
    raw_picture,
)
from mirip_fast.data.image_files import HEIC_BRANDS, one_line
from mirip_fast.data.sources import read_image
from mirip_fast.errors import ConfigError, ImageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.ImageCms import ImageCmsTransform

#: The formats that are decoded (Pillow's names; phones' multi-picture JPEGs count as JPEG).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # and those of EXTRAS
#: Largest picture that is decoded where no other limit is given, in pixels (at 4 bytes each 0.36 GB).
MAX_PIXELS = 89_500_000
#: Largest picture that is decoded at all: a JPEG (at reduced scale), or one that a higher limit admits.
UTMOST_PIXELS = 1_000_000_000
#: How many frames of an animation are looked at, as long as they are of one flat colour.
MAX_FRAMES = 32
#: How a picture becomes square, see :func:`resize_square`.
RESIZE_MODES = ("squash", "pad", "crop")
#: That it does not, see :func:`resize_to_fit`.
FIT = "fit"

_JPEGS = ("JPEG", "MPO")
_WHITE, _GREY, _BLACK = (255, 255, 255), (128, 128, 128), (0, 0, 0)
# Levels of 255 by which pixels differ: up to the first a picture is of one colour (lossy formats are not
# exact), below the second lines on it are hardly seen.
_FLAT, _VISIBLE = 6, 16
_NEW_KIND, _OLD_KIND, _SUB_PAGES = 254, 255, 330  # NewSubfileType, SubfileType, SubIFDs
_ORIENTATION_TAG = 0x0112
_BAD_PROFILE = "bad profile"
# Colour space of a profile (its signature) → mode of the pixels it is for.
_PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
_LARGEST_PROFILE = 16 << 20  # bytes; of printers' profiles the largest has three million
_SAME_COLOURS = 2  # levels of 255 by which sRGB's own profiles differ
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

#: First bytes → what to tell the user. The first match wins.
_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"\xff\xd8\xff", "a damaged JPEG"),
    (b"\x89PNG\r\n\x1a\n", "a damaged PNG"),
    (b"GIF8", "a damaged GIF"),
    (b"BM", "a damaged BMP"),
    (b"II*\0", "a damaged or unusual TIFF"),
    (b"MM\0*", "a damaged or unusual TIFF"),
    *((start, "a damaged JPEG XL") for start in JXL_STARTS),
    (b"\0\x05\x16\x07", "macOS side information about a picture, not the picture itself"),
    (b"8BPS", "a Photoshop file; export it as JPEG or PNG"),
    (b"%!PS", "a PostScript file; export it as JPEG or PNG"),
    (b"PK\x03\x04", "a zip archive; unpack it first"),
)
_TEXTS: tuple[tuple[bytes, str], ...] = (
    (b"<!doctype html", "a web page, not a picture; download it again"),
    (b"<html", "a web page, not a picture; download it again"),
    (b"<svg", "an SVG drawing; export it as PNG"),
)
_SEGMENTS_WITH_COLOUR = {0xE0: 16, 0xEE: 14}  # JFIF and Adobe: their least whole lengths in bytes
_EXIF_SEGMENT = 0xE1
_JPEG_END = b"\xff\xd9"
_JPEG_RESTARTS = range(0xD0, 0xD8)
_NO_MARKERS = {bytes((second,)) for second in (0, 0xFF, *_JPEG_RESTARTS)}
_PNG_START = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, slots=True)
class Squares:
    """What :func:`decode_squares` makes of a picture.

    Attributes:
        size: (width, height) of the whole picture, upright, in pixels.
        images: RGB, one for each size asked for, in that order.
        flat: whether the whole picture is of a single colour.
        bad_profile: whether it has a colour profile that could not be used.
    """

    size: tuple[int, int]
    images: list[Image.Image]
    flat: bool
    bad_profile: bool = False


def load_rgb(
    source: Path | bytes,
    *,
    draft_size: int | None = None,
    max_pixels: int = MAX_PIXELS,
    srgb: bool = True,
) -> Image.Image:
    """Decode one picture to RGB, upright, on white.

    Args:
        source: a file, or the content of one.
        draft_size: if given, a JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that leaves both
            sides at least twice this many pixels: far quicker, and still more than a resize to
            ``draft_size`` can use. The pixels differ slightly from those of a full decode.
        max_pixels: the largest picture that is decoded; JPEGs may be larger, see the module.
        srgb: whether colour profiles are applied.

    Returns:
        An image of mode RGB, without metadata.

    Raises:
        ImageError: the file cannot be read or decoded; the message is the reason, on one line.
    """
    data = source if isinstance(source, bytes) else read_image(source)[0]
    with one_reason():
        data = _unwrapped(data, max_pixels)
        header = _open(data, max_pixels)
        picture = _decode(data, _scale(header, draft_size), max_pixels, srgb)[0]
        picture.info = {}
        return picture


def decode_squares(
    data: bytes,
    sizes: Sequence[int],
    mode: str,
    *,
    draft: bool,
    max_pixels: int = MAX_PIXELS,
    srgb: bool = True,
) -> Squares:
    """Decode one picture and make a square of each of ``sizes`` from it.

    A square depends on the picture, its own size, ``mode`` and ``draft`` alone, not on the other sizes
    asked for: in the rare case that two sizes allow different reduced scales, the JPEG is decoded twice.

    Args:
        data: the content of the image file.
        sizes: side lengths in pixels, at least one.
        mode: one of :data:`RESIZE_MODES`; or :data:`FIT`, for pictures to look at: see
            :func:`resize_to_fit`.
        draft: whether JPEGs are decoded at reduced scale (see :func:`load_rgb`).
        max_pixels: the largest picture that is decoded (see :func:`load_rgb`).
        srgb: whether colour profiles are applied.

    Raises:
        ImageError: the picture cannot be decoded.
    """
    with one_reason():
        data = _unwrapped(data, max_pixels)
        header = _open(data, max_pixels)
        decoded: dict[int, tuple[Image.Image, tuple[int, int]]] = {}
        squares = []
        for size in sizes:
            scale = _scale(header, size if draft else None)
            if scale not in decoded:
                decoded[scale] = _decode(data, scale, max_pixels, srgb)
            picture = decoded[scale][0]
            fit = mode == FIT
            squares.append(
                resize_to_fit(picture, size) if fit else resize_square(picture, size, mode)
            )
        return Squares(decoded[scale][1], squares, _is_flat(picture), _BAD_PROFILE in picture.info)


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
        with _without_pillows_limit():
            yield
    except (ImageError, ConfigError):
        raise
    except MemoryError as error:
        raise ImageError("it needs more memory than one image may take") from error
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError, struct.error, …
        raise ImageError(one_line(str(error)) or type(error).__name__) from error


# What Pillow has to remark on a broken file is no news to whoever reads this program's own report.
warnings.filterwarnings("ignore", module=r"PIL\.")
_pillow = threading.RLock()  # between changes of what holds for the whole of Pillow
_limits: list[int | None] = []  # Pillow's own, once for each picture that is being decoded


@contextmanager
def _without_pillows_limit() -> Iterator[None]:
    """Have Pillow leave the limit to us; threads may overlap."""
    with _pillow:
        _limits.append(_limits[0] if _limits else Image.MAX_IMAGE_PIXELS)
        Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        with _pillow:
            limit = _limits.pop()
            if not _limits:
                Image.MAX_IMAGE_PIXELS = limit


def _unwrapped(data: bytes, max_pixels: int) -> bytes:
    """What Pillow can read: of a PDF a page, of a RAW file its preview or a rendering."""
    if is_pdf(data):
        return pdf_page(data)
    return raw_picture(data, max_pixels) if is_raw(data) else _without_wrong_chunks(data)


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Read the header alone; refuse foreign formats and too many pixels."""
    try:
        image = _identify(data, max_pixels)
    except UnidentifiedImageError as error:
        # A colour profile or comment block that is cut short makes Pillow give up on the whole JPEG.
        plain = _without_jpeg_metadata(data)
        if plain is None:
            raise ImageError(_describe_unreadable(data)) from error
        try:
            image = _identify(plain, max_pixels)
        except UnidentifiedImageError:
            raise ImageError(_describe_unreadable(data)) from error
    _check_size(image, max_pixels)
    return image


def _identify(data: bytes, max_pixels: int) -> Image.Image:
    formats: tuple[str, ...] = FORMATS
    if data[4:8] == b"ftyp" and data[8:12] in HEIC_BRANDS:
        package_for("HEIC").register_heif_opener(decode_threads=1)
        formats = (*FORMATS, "HEIF")
    elif data.startswith(JXL_STARTS) and (size := jxl_size(data)):
        package_for("JPEG XL").JpegXLImagePlugin.DECODE_THREADS = 0
        _refuse_more(size, min(max_pixels, UTMOST_PIXELS))  # all its pixels are decoded right away
        formats = ("JXL",)
    image: Image.Image = Image.open(io.BytesIO(data), formats=formats)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return _tiff_page(data, _full_page(image))
    return image


def _full_page(image: TiffImagePlugin.TiffImageFile) -> int:
    """The first page's number; if that is a reduced copy or a mask, that of the largest which is neither."""
    if not _is_side_page(image):
        return 0
    whole, others = [], _SUB_PAGES in image.tag_v2
    for number in range(1, MAX_FRAMES):
        try:
            image.seek(number)
        except EOFError:
            break
        except Exception:  # in a form that is not read
            others = True
        else:
            others = True
            if not _is_side_page(image):
                whole.append((image.width * image.height, -number))
    if others and not whole:
        raise ImageError(
            "only a reduced copy in it can be read (a camera's raw file?); export it as JPEG or PNG"
        )
    return -max(whole)[1] if whole else 0


def _is_side_page(image: TiffImagePlugin.TiffImageFile) -> bool:
    """Whether a page is a reduced copy of another, or its mask."""
    return bool(image.tag_v2.get(_NEW_KIND, 0) & 0b101) or image.tag_v2.get(_OLD_KIND) == 2


def _tiff_page(data: bytes, number: int) -> TiffImagePlugin.TiffImageFile:
    """One page of a TIFF; refuses, or has libtiff read, the layouts that Pillow makes garbage of."""
    image = TiffImagePlugin.TiffImageFile(io.BytesIO(data))
    image.seek(number)
    tags = image.tag_v2
    if max(tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))) == 2:
        raise ImageError("signed pixels have no known range; save the picture with 8 or 16 bits")
    planes = tags.get(TiffImagePlugin.PLANAR_CONFIGURATION) == 2
    if planes and image.mode in ("LA", "LAB"):
        raise ImageError("its colours lie in planes of their own; save it without that, or as PNG")
    subsampled = tags.get(TiffImagePlugin.YCBCRSUBSAMPLING, (1, 1)) != (1, 1)
    if planes or subsampled or tags.get(TiffImagePlugin.FILLORDER) == 2:
        with _pillow:
            TiffImagePlugin.READ_LIBTIFF = True
            try:
                image = TiffImagePlugin.TiffImageFile(io.BytesIO(data))
                image.seek(number)
            finally:
                TiffImagePlugin.READ_LIBTIFF = False
    return image


def _check_size(image: Image.Image, max_pixels: int) -> None:
    _refuse_more(
        image.size, UTMOST_PIXELS if image.format in _JPEGS else min(max_pixels, UTMOST_PIXELS)
    )


def _refuse_more(size: tuple[int, int], limit: int) -> None:
    width, height = size
    if width * height > limit:
        way = "; --max-megapixels raises it" if limit < UTMOST_PIXELS >= width * height else ""
        raise ImageError(
            f"{width} x {height} pixels is over the limit of {limit / 1e6:g} megapixels{way}"
        )


def _scale(header: Image.Image, size: int | None) -> int:
    """Of the scales 1, 1/2, 1/4, 1/8 the one to decode at.

    The strongest that leaves both sides at least ``2 * size``: for squash and crop that is twice what
    is kept of the shorter side; for pad it is more than that. But at least as strong as a picture of more
    than :data:`MAX_PIXELS` needs. It must not depend on the limit that the caller gives, or one file had
    two kinds of features.
    """
    if header.format not in _JPEGS:
        return 1
    room = 0 if size is None else min(header.size) // (2 * size)
    wanted = next((scale for scale in (8, 4, 2) if room >= scale), 1)
    pixels = header.width * header.height
    needed = next((scale for scale in (1, 2, 4) if pixels <= MAX_PIXELS * scale**2), 8)
    return max(wanted, needed)


def _decode(
    data: bytes, scale: int, max_pixels: int, srgb: bool
) -> tuple[Image.Image, tuple[int, int]]:
    """Decode at 1/scale; also give the upright (width, height) that scale 1 has."""
    # With nothing but the end missing, the pixels are the same whatever comes behind what is there. Where a
    # download broke off and zeros fill its place, the decoder takes those for pixels.
    ends = _jpeg_with_ends(_without_padding(data)) if data.endswith(bytes(16)) else ()
    if not ends:
        try:
            whole = _decode_frame(data, scale, max_pixels, srgb)
        except OSError:
            ends = _jpeg_with_ends(data)
            if not ends:
                raise
        else:
            if _GREY in _corners(whole[0]):  # what a decoder fills a JPEG with that ends too early
                ends = _jpeg_with_ends(data[: max(0, data.rfind(_JPEG_END))])
            if not ends:
                return whole
    first, *others = (_decode_frame(each, scale, max_pixels, srgb) for each in ends)
    if any(other[0] != first[0] for other in others):
        raise ImageError("image file is truncated")
    return first


def _corners(image: Image.Image) -> list[object]:
    right, bottom = image.width - 1, image.height - 1
    return [image.getpixel(place) for place in ((0, 0), (right, 0), (0, bottom), (right, bottom))]


def _decode_frame(
    data: bytes, scale: int, max_pixels: int, srgb: bool
) -> tuple[Image.Image, tuple[int, int]]:
    """The first frame or page; or of a few more the first that is not of one flat colour."""
    image = _open(data, max_pixels)
    width, height = image.size
    if scale > 1:
        image.draft(None, (width // scale, height // scale))
    rgb, orientation = _upright(image, srgb)
    if scale > 1:
        return rgb, (height, width) if orientation >= 5 else (width, height)
    if image.format not in _JPEGS and _is_flat(rgb):
        rgb = rgb.copy()  # it may be the very image that turns to other frames
        # Together they are no more work than one large picture.
        more = min(MAX_FRAMES - 1, max_pixels // (width * height))
        for number in range(image.tell() + 1, image.tell() + 1 + more):
            try:
                frame = _seek(image, data, number)
                if frame is not None:
                    _check_size(frame, max_pixels)
                    other, _ = _upright(frame, srgb)
                    if not _is_flat(other):
                        return other, other.size
            except Exception:  # there is no further frame, or it is damaged
                break
    return rgb, rgb.size


def _seek(image: Image.Image, data: bytes, number: int) -> Image.Image | None:
    """Another frame; None for a page of a TIFF that is no picture of its own."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        page = _tiff_page(data, number)
        return None if _is_side_page(page) else page
    image.seek(number)
    return image


def _upright(image: Image.Image, srgb: bool) -> tuple[Image.Image, int]:
    """The frame that an image is at as upright RGB, and the orientation that it had."""
    if not isinstance(image.info.get("xmp"), bytes):
        # Pillow looks for an orientation in it, and trips over other types.
        image.info.pop("xmp", None)
    image.load()
    orientation = _orientation(image)
    rgb, bad_profile = _to_rgb(image, srgb)
    if orientation in _UPRIGHT:
        rgb = rgb.transpose(_UPRIGHT[orientation])
    rgb.info = {_BAD_PROFILE: True} if bad_profile else {}  # or somebody turns it upright again
    return rgb, orientation


def _is_flat(image: Image.Image) -> bool:
    """Whether the picture is of a single colour."""
    return _contrast(image) <= _FLAT


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 (as stored) where there is none or it makes no sense."""
    if image.format == "HEIF" or (image.format == "JXL" and not getattr(image, "jpeg", None)):
        return 1  # the decoder has turned it
    try:
        value = image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # the parser of broken EXIF raises many things; none is worth the picture
        return 1
    return int(value) if isinstance(value, int | float) and value in _UPRIGHT else 1


def _to_rgb(image: Image.Image, srgb: bool) -> tuple[Image.Image, bool]:
    """A frame as RGB, and whether it has a colour profile that could not be used."""
    bad_profile, profile = False, image.info.get("icc_profile", b"") if srgb else b""
    if image.mode in ("I", "F"):
        kind = "float" if image.mode == "F" else "32-bit"
        raise ImageError(f"{kind} pixels have no known range; save the picture with 8 or 16 bits")
    if image.mode.startswith("I;16"):
        image = _from_16_bit(image)
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        _with_8_bit_key(image)
    if profile or profile is None:  # Pillow has None for one that is cut short
        try:
            image = _to_srgb(image, profile or b"")
        except ValueError:
            bad_profile = True
    if image.has_transparency_data:
        image = _on_paper(image)
    return image if image.mode == "RGB" else image.convert("RGB"), bad_profile


def _to_srgb(picture: Image.Image, profile: bytes) -> Image.Image:
    """A picture as RGB (with transparency RGBA), in the colours that its profile means.

    Args:
        picture: of any mode of 8 bits.
        profile: an ICC profile; if it means sRGB, the picture is given back as it is.

    Raises:
        ValueError: the profile is damaged, or of another kind than the pixels.
    """
    mode, transform = _srgb_transform(profile)
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
def _srgb_transform(profile: bytes) -> tuple[str, ImageCmsTransform | None]:
    """The mode that a profile is for, and what brings it to sRGB; None where it means sRGB."""
    from PIL import ImageCms

    if len(profile) > _LARGEST_PROFILE:
        raise ValueError("too large")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _PROFILE_MODES[source.profile.xcolor_space.strip()]
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
    same = max(abs(a - b) for a, b in zip(before, after, strict=True)) <= _SAME_COLOURS
    return mode, None if same else transform


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


def _with_8_bit_key(image: Image.Image) -> None:
    """Make the transparent colour of a 16-bit PNG one of 8 bits, as its pixels have become by now."""
    colour = image.info.get("transparency")
    if isinstance(colour, tuple) and max(colour) > 255:
        image.info["transparency"] = tuple(value >> 8 for value in colour)


def _on_paper(image: Image.Image) -> Image.Image:
    """Transparency laid over white; over black where it can only be seen there."""
    rgba = image.convert("RGBA")
    lowest, highest = rgba.getchannel("A").getextrema()
    if highest == 0 and image.format == "BMP":
        return rgba.convert("RGB")
    on_white = _over(rgba, _WHITE)
    if lowest == highest or _contrast(on_white) >= _VISIBLE:
        return on_white
    on_black = _over(rgba, _BLACK)
    return on_black if _contrast(on_black) > _contrast(on_white) else on_white


def _over(rgba: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    paper = Image.new("RGB", rgba.size, colour)
    paper.paste(rgba, (0, 0), rgba)
    return paper


def _contrast(image: Image.Image) -> int:
    """By how many levels the pixels of an RGB image differ, in the band where they do most."""
    sample = image.resize((32, 32), Image.Resampling.NEAREST)  # of most pictures it tells enough
    most = 0
    for each in (sample, image):
        bands: Any = each.getextrema()
        most = max(high - low for low, high in bands)
        if most >= _VISIBLE:
            break
    return most


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


def resize_to_fit(image: Image.Image, side: int) -> Image.Image:
    """The whole picture in its proportions, its longer side at most ``side`` pixels; never enlarged."""
    width, height = image.size
    scale = min(1.0, side / max(width, height))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    if size == image.size:
        return image
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)


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


def _describe_unreadable(data: bytes) -> str:
    """Say in a few words what a file is that could not be opened as an image."""
    for start, what in _SIGNATURES:
        if data.startswith(start):
            return what
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "a damaged WebP"
    if data[4:8] == b"ftyp":
        return _describe_boxes(data[8:12])
    text = data[:1000].lower()
    for mark, what in _TEXTS:
        if mark in text:
            return what
    return f"not a picture in a known format ({', '.join((*FORMATS, *EXTRAS))})"


def _describe_boxes(brand: bytes) -> str:
    if brand in HEIC_BRANDS:
        return "a damaged HEIC picture, or one in a form that is not read"
    if brand in (b"avif", b"avis"):
        return "a damaged AVIF, or one that the installed Pillow cannot decode"
    return "a film, not a picture"


def _without_jpeg_metadata(data: bytes) -> bytes | None:
    """A JPEG without the header blocks that pixels do not need, or None if ``data`` is no JPEG.

    Kept are EXIF (for the orientation) and, where complete, JFIF and Adobe (they name the colour space).
    Layout: marker FF xx, then a two-byte big-endian length that counts itself (ITU-T T.81, annex B).
    """
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    kept = [data[:2]]
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        marker, end = data[at + 1], at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        is_metadata = 0xE0 <= marker <= 0xEF or marker == 0xFE
        whole = marker in _SEGMENTS_WITH_COLOUR and end - at >= _SEGMENTS_WITH_COLOUR[marker]
        if not is_metadata or whole or marker == _EXIF_SEGMENT:
            kept.append(data[at:end])
        if end <= at + 3:
            break  # a length below two leads nowhere
        at = end
    kept.append(data[at:])
    return b"".join(kept)


def _without_wrong_chunks(data: bytes) -> bytes:
    """A PNG without those chunks of a wrong checksum that its pixels do not need; other data as it is.

    Such chunks have a name that begins with a small letter; all but tRNS, which makes pixels transparent.
    Layout: length (4 bytes), name, body, CRC-32 of name and body (PNG specification, 5.3).
    """
    if not data.startswith(_PNG_START):
        return data
    kept, at, whole = [_PNG_START], len(_PNG_START), True
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        name, checksum = data[at + 4 : at + 8], data[end - 4 : end]
        spare = name[:1].islower() and name != b"tRNS" and end <= len(data)
        if spare and zlib.crc32(memoryview(data)[at + 4 : end - 4]) != int.from_bytes(
            checksum, "big"
        ):
            whole = False
        else:
            kept.append(data[at:end])
        at = end
    return data if whole else b"".join(kept)


def _without_padding(data: bytes) -> bytes:
    """``data`` without zeros at its end, which a disk's last block or a broken download leaves."""
    bare = data.rstrip(b"\0")
    return (
        data[: len(bare) + 1] if bare.endswith(b"\xff") else bare
    )  # FF 00 is a byte of pixels in a JPEG


def _jpeg_with_ends(data: bytes) -> tuple[bytes, ...]:
    """A JPEG that breaks off, with three ends: where all make one picture, only its end was missing.

    The first is the mark of the end alone; the others have bits before it that a decoder takes for pixels if
    it lacks any.

    Returns:
        Nothing if ``data`` is no JPEG, has its end, or lacks whole scans.
    """
    if (
        not data.startswith(b"\xff\xd8\xff")
        or data.endswith(_JPEG_END)
        or not _has_every_scan(data)
    ):
        return ()
    bare = data.removesuffix(b"\xff")  # half a mark
    # A decoder that waits for a restart mark drops all that comes before.
    marks = [b"", *(bytes((0xFF, mark)) for mark in _JPEG_RESTARTS)]
    bits = (b"".join(mark + bit * 64 for mark in marks) for bit in (b"\x55", b"\xaa"))
    return bare + _JPEG_END, *(bare + each + _JPEG_END for each in bits)


def _has_every_scan(jpeg: bytes) -> bool:
    """Whether scans of all components begin in it, in a progressive one of all coefficients at full depth.

    Layouts of the headers: ITU-T T.81, B.2.2 and B.2.3.
    """
    at, progressive = 2, False
    lacking: dict[int, set[int]] = {}  # component → coefficients
    while 0 <= at < len(jpeg) - 4 and (marker := jpeg[at + 1]) != 0xD9:
        body = jpeg[at + 4 : at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and len(body) > 6:
            progressive = marker in (0xC2, 0xC6, 0xCA, 0xCE)
            lacking = {component: set(range(64)) for component in body[6::3]}
        elif marker == 0xDA and len(body) > 4:
            first, last, depth = body[-3], body[-2], body[-1] & 0xF
            if not progressive:
                first, last, depth = 0, 63, 0
            for component in body[1:-3:2] if depth == 0 else ():
                lacking.get(component, set()).difference_update(range(first, last + 1))
        at = jpeg.find(b"\xff", at + 4 + len(body))
        while at >= 0 and jpeg[at + 1 : at + 2] in _NO_MARKERS:  # pixels
            at = jpeg.find(b"\xff", at + 1)
    return bool(lacking) and not any(lacking.values())
