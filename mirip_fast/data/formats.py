"""Formats that Pillow does not read by itself: each needs a package, which is loaded where such a file is.

What these packages make of a file is bytes that Pillow reads, or a plugin of Pillow; so whatever holds for
a picture (limits, orientation, transparency) holds for these as well, see :mod:`mirip_fast.data.images`.
"""

from __future__ import annotations

import functools
import importlib
import io
import re
import struct
from collections import Counter
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple

from mirip_fast.errors import ImageError

if TYPE_CHECKING:
    from PIL.Image import Image


class Extra(NamedTuple):
    """What a kind of pictures needs.

    Attributes:
        what: such a file, in words.
        module: what is imported.
        package: what is installed.
        endings: of the names of such files, lower case.
    """

    what: str
    module: str
    package: str
    endings: tuple[str, ...]


EXTRAS = {
    "HEIC": Extra("a HEIC picture", "pillow_heif", "pillow-heif", (".heic", ".heif", ".hif")),
    "JPEG XL": Extra("a JPEG XL picture", "pillow_jxl", "pillow-jxl-plugin", (".jxl",)),
    "PDF": Extra("a PDF", "pypdfium2", "pypdfium2", (".pdf",)),
    "RAW": Extra(
        "a camera's RAW file", "rawpy", "rawpy",
        (
            ".3fr", ".arw", ".cr2", ".cr3", ".dcr", ".dng", ".erf", ".fff", ".iiq", ".kdc", ".mef", ".mos",
            ".nef", ".nrw", ".orf", ".pef", ".raf", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f",
        ),
    ),
}  # fmt: skip
#: What to do with a file of several pages; over HTTP there is another way.
SAY_WHICH = "; call it .pdf, or name a page: ….pdf#page=1"
#: The longer side in pixels of a PDF's page as it is drawn.
PAGE_SIDE = 2048
#: More pages or bytes than this no portfolio has.
MAX_PAGES, MAX_PDF_BYTES = 1000, 256 << 20
_PREVIEW = 1500  # pixels of the longer side that a RAW file's preview should have
_RAWS = (b"IIRO", b"IIRS", b"MMOR", b"IIU\0", b"FUJIFILMCCD-RAW", b"FOVb", b"\0MRM")
_TURNS = {3: 3, 5: 8, 6: 6}  # LibRaw's "flip" → EXIF orientation
_PAGE_OF = re.compile(r"(.+\.pdf)(#page=[1-9]\d{0,6})", re.IGNORECASE | re.DOTALL)
_MARK = re.compile(rb"\n#page=(\d{1,7})\Z")
#: How a JPEG XL begins: the picture alone, or in boxes.
JXL_STARTS = (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")
#: Ending → kind.
KINDS = {ending: kind for kind, extra in EXTRAS.items() for ending in extra.endings}


@functools.cache
def _module(kind: str) -> Any:
    """The module that reads a kind; None where it is not installed, or does not load."""
    try:
        return importlib.import_module(EXTRAS[kind].module)
    except (ImportError, OSError):
        return None


def can_read(ending: str, passed: Counter[str]) -> bool:
    """Whether pictures with this ending can be read; if not, one more of their kind is counted."""
    kind = KINDS.get(ending)
    if kind is None or _module(kind) is not None:
        return True
    passed[kind] += 1
    return False


def package_for(kind: str) -> Any:
    """The module that reads a kind.

    Raises:
        ImageError: it is not installed; says what to type.
    """
    module = _module(kind)
    if module is None:
        raise ImageError(f"{EXTRAS[kind].what}; to read it: pip install {EXTRAS[kind].package}")
    return module


def split_page(path: str) -> tuple[str, str]:
    """``a.pdf#page=3`` → ``a.pdf`` and ``#page=3``; of whatever is no PDF's page, all and nothing."""
    found = _PAGE_OF.fullmatch(path)
    return (found[1], found[2]) if found else (path, "")


def is_pdf(data: bytes) -> bool:
    """Whether a file is a PDF, perhaps with the mark of a page."""
    return b"%PDF-" in data[:1024]


def marked(data: bytes, page: str) -> bytes:
    """The content of a PDF's page: that of the file, a line feed, and ``#page=3``. Its hash is the page's."""
    return data + b"\n" + page.encode() if page else data


def pdf_pages(data: bytes) -> int:
    """How many pages a PDF has; 0 if it is none, whatever its name is.

    Raises:
        ImageError: it cannot be read, or has more than :data:`MAX_PAGES`.
    """
    if not is_pdf(data):
        return 0
    with closing(_open_pdf(data)) as document:
        return len(document)


def pdf_page(data: bytes) -> bytes:
    """A page as a BMP, its longer side :data:`PAGE_SIDE` pixels, on white. Scripts and forms are not run.

    Args:
        data: see :func:`marked`; without a mark the only page is meant.

    Raises:
        ImageError: it cannot be read, or has no such page.
    """
    mark = _MARK.search(data, max(0, len(data) - 16))
    with closing(_open_pdf(data[: mark.start()] if mark else data)) as document:
        pages, number = len(document), int(mark[1]) if mark else 1
        if not mark and pages > 1:
            raise ImageError(f"a PDF of {pages} pages{SAY_WHICH}")
        if not 1 <= number <= pages:
            last = f"the last is #page={pages}" if pages > 1 else "it has one"
            raise ImageError(f"the PDF has no page {number}; {last}")
        page = document[number - 1]
        side = max(page.get_size())
        if not 0 < side < 1e9:
            raise ImageError("a page without a size")
        return _bmp(page.render(scale=PAGE_SIDE / side, may_draw_forms=False).to_pil())


def _open_pdf(data: bytes) -> Any:
    """A document of pypdfium2; forms, and so scripts, are not begun."""
    pdfium = package_for("PDF")
    if len(data) > MAX_PDF_BYTES:
        raise ImageError(f"a PDF of more than {MAX_PDF_BYTES >> 20} MiB; split it")
    try:
        document = pdfium.PdfDocument(data)
    except pdfium.PdfiumError as error:
        locked = "password" in str(error).lower() or "security" in str(error).lower()
        raise ImageError(
            "a PDF with a password; save it without" if locked else "a damaged PDF"
        ) from error
    if not 1 <= len(document) <= MAX_PAGES:
        raise ImageError(
            f"a PDF of {len(document):,} pages; up to {MAX_PAGES:,} are read. Split it"
        )
    return document


def _bmp(picture: Image) -> bytes:
    stream = io.BytesIO()
    picture.convert("RGB").save(stream, "BMP")
    return stream.getvalue()


def is_raw(data: bytes) -> bool:
    """Whether a file is what a camera's sensor saw, by its content."""
    if data.startswith(_RAWS) or data[4:12] == b"ftypcrx ":
        return True
    if not data.startswith((b"II*\0", b"MM\0*")):
        return False
    order = "<" if data.startswith(b"II") else ">"
    at = int.from_bytes(data[4:8], "little" if order == "<" else "big")
    count = struct.unpack(f"{order}H", data[at : at + 2])[0] if at + 2 <= len(data) else 0
    table = data[at + 2 : at + 2 + 12 * count]
    entries = struct.iter_unpack(f"{order}HHIHH", table[: len(table) // 12 * 12])
    tags = {tag: value for tag, _, _, value, _ in entries}
    # A Canon; or by DNG's version, sensor's pixels, or a small preview beside others (TIFF/EP).
    preview = tags.get(254) == 1 and 330 in tags and 271 in tags
    return data[8:10] == b"CR" or 50706 in tags or tags.get(262) in (32803, 34892) or preview


def raw_picture(data: bytes, max_pixels: int) -> bytes:
    """The preview in a camera's RAW file as a JPEG; where that is small, a rendering of half size as a BMP.

    Args:
        data: content of the file.
        max_pixels: of the sensor, for a rendering.

    Raises:
        ImageError: it cannot be read.
    """
    rawpy = package_for("RAW")
    from PIL import Image

    try:
        with rawpy.imread(io.BytesIO(data)) as raw:
            width, height = raw.sizes.raw_width, raw.sizes.raw_height
            preview = _preview(rawpy, raw, min(_PREVIEW, max(width, height) // 2))
            if preview:
                return preview
            if width * height > max_pixels:
                limit = f"the limit of {max_pixels / 1e6:g} megapixels; --max-megapixels raises it"
                raise ImageError(f"{width} x {height} pixels is over {limit}")
            return _bmp(Image.fromarray(raw.postprocess(half_size=True, use_camera_wb=True)))
    except rawpy.LibRawError as error:
        raise ImageError("a damaged RAW file, or of a camera that is not known") from error


def _preview(rawpy: Any, raw: Any, least: int) -> bytes:
    """The JPEG in a RAW file, to be turned as the camera was held; none if its longer side is shorter."""
    from PIL import Image, JpegImagePlugin  # noqa: F401 - to have Pillow know it

    try:
        found = raw.extract_thumb()
        if found.format != rawpy.ThumbFormat.JPEG:
            return b""
        jpeg: bytes = found.data
        with Image.open(io.BytesIO(jpeg), formats=("JPEG",)) as picture:
            if max(picture.size) < least:
                return b""
            turned = 0x0112 in picture.getexif()
    except (rawpy.LibRawError, OSError):
        return b""
    exif = Image.Exif()
    exif[0x0112] = _TURNS.get(raw.sizes.flip, 1)
    segment = exif.tobytes()
    return (
        jpeg
        if turned
        else jpeg[:2] + struct.pack(">HH", 0xFFE1, len(segment) + 2) + segment + jpeg[2:]
    )


def jxl_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) in pixels of a JPEG XL picture, before turning; None where there is no header.

    The plugin decodes all pixels when it opens a file, so the size is read here before.
    Layout: ISO/IEC 18181-1, SizeHeader (bits, the lowest of each byte first); -2, boxes.
    """
    at = 0
    while not data.startswith(JXL_STARTS[0], at):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        head = 8
        if length == 1:
            length, head = int.from_bytes(data[at + 8 : at + 16], "big"), 16
        if kind in (b"jxlc", b"jxlp"):
            at += head + (4 if kind == b"jxlp" else 0)
            if not data.startswith(JXL_STARTS[0], at):
                return None
        elif length < head or at + length >= len(data):
            return None
        else:
            at += length
    bits, used = int.from_bytes(data[at + 2 : at + 14], "little"), 0

    def take(count: int) -> int:
        nonlocal used
        value, used = bits >> used & (1 << count) - 1, used + count
        return value

    small = take(1)

    def side() -> int:
        return 8 * (1 + take(5)) if small else 1 + take((9, 13, 18, 30)[take(2)])

    height, ratio = side(), take(3)
    if ratio == 0:
        return side(), height
    over, under = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))[ratio - 1]
    return height * over // under, height
