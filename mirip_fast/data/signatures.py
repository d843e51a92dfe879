"""What a file that no decoder takes really is, by its first bytes; and mending what pixels do not need."""

from __future__ import annotations

import zlib

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


#: The mark that ends a JPEG.
JPEG_END = b"\xff\xd9"
_JPEG_RESTARTS = range(0xD0, 0xD8)
_NO_MARKERS = {bytes((second,)) for second in (0, 0xFF, *_JPEG_RESTARTS)}
_PNG_START = b"\x89PNG\r\n\x1a\n"


def without_wrong_chunks(data: bytes) -> bytes:
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


def without_padding(data: bytes) -> bytes:
    """``data`` without zeros at its end, which a disk's last block or a broken download leaves."""
    bare = data.rstrip(b"\0")
    return (
        data[: len(bare) + 1] if bare.endswith(b"\xff") else bare
    )  # FF 00 is a byte of pixels in a JPEG


def jpeg_with_ends(data: bytes) -> tuple[bytes, ...]:
    """A JPEG that breaks off, with three ends: where all make one picture, only its end was missing.

    The first is the mark of the end alone; the others have bits before it that a decoder takes for pixels if
    it lacks any.

    Returns:
        Nothing if ``data`` is no JPEG, has its end, or lacks whole scans.
    """
    if not data.startswith(b"\xff\xd8\xff") or data.endswith(JPEG_END) or not _has_every_scan(data):
        return ()
    bare = data.removesuffix(b"\xff")  # half a mark
    # A decoder that waits for a restart mark drops all that comes before.
    marks = [b"", *(bytes((0xFF, mark)) for mark in _JPEG_RESTARTS)]
    bits = (b"".join(mark + bit * 64 for mark in marks) for bit in (b"\x55", b"\xaa"))
    return bare + JPEG_END, *(bare + each + JPEG_END for each in bits)


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
