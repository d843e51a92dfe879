"""What a file that no decoder takes really is, told from its first bytes; and mending JPEG headers."""

from __future__ import annotations

#: First bytes → what to tell the user. The first match wins.
_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"\xff\xd8\xff", "a damaged JPEG"),
    (b"\x89PNG\r\n\x1a\n", "a damaged PNG"),
    (b"GIF8", "a damaged GIF"),
    (b"BM", "a damaged BMP"),
    (b"II*\0", "a damaged or unusual TIFF"),
    (b"MM\0*", "a damaged or unusual TIFF"),
    (b"\xff\x0a", "a JPEG XL file; export it as JPEG or PNG"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL file; export it as JPEG or PNG"),
    (b"\0\x05\x16\x07", "macOS side information about a picture, not the picture itself"),
    (b"8BPS", "a Photoshop file; export it as JPEG or PNG"),
    (b"%PDF", "a PDF; export its pages as JPEG or PNG"),
    (b"%!PS", "a PostScript file; export it as JPEG or PNG"),
    (b"PK\x03\x04", "a zip archive; unpack it first"),
)
_TEXTS: tuple[tuple[bytes, str], ...] = (
    (b"<!doctype html", "a web page, not a picture; download it again"),
    (b"<html", "a web page, not a picture; download it again"),
    (b"<svg", "an SVG drawing; export it as PNG"),
)
_BMP_HEADERS = tuple(size.to_bytes(4, "little") for size in (12, 16, 40, 52, 56, 64, 108, 124))
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

#: How many bytes of a file :func:`is_picture` needs.
HEAD_BYTES = 32

_SEGMENTS_WITH_COLOUR = {0xE0: 16, 0xEE: 14}  # JFIF and Adobe: their least whole lengths in bytes
_EXIF_SEGMENT = 0xE1


def is_picture(head: bytes) -> bool:
    """Whether a file that begins with ``head`` is a picture of a kind that is decoded, or told when it fails.

    Args:
        head: its first :data:`HEAD_BYTES` bytes.
    """
    if head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a")):
        return True
    if head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return head[8:10] != b"CR"  # Canon's raw format, whose first page is a preview
    if head.startswith(b"BM"):  # texts begin so too: the size of the second header decides
        return head[14:18] in _BMP_HEADERS
    if head[:4] == b"RIFF":
        return head[8:12] == b"WEBP"
    return head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis", *_HEIC_BRANDS)


def describe_unreadable(data: bytes) -> str:
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
    return "not a picture in a known format (JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF)"


def _describe_boxes(brand: bytes) -> str:
    if brand in _HEIC_BRANDS:
        return "a HEIC picture; export it as JPEG"
    if brand in (b"avif", b"avis"):
        return "a damaged AVIF, or one that the installed Pillow can not decode"
    return "a film, not a picture"


def without_jpeg_metadata(data: bytes) -> bytes | None:
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
