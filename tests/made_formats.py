"""PDFs and cameras' RAW files made from scratch: small, and as hostile as is asked."""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image

#: A red half, and a word.
_DRAWN = "1 0 0 rg 0 0 150 200 re f BT /F 40 Tf 160 90 Td (Works) Tj ET"


def pdf(
    pages: int = 1, box: str = "0 0 300 200", *, drawn: str = _DRAWN, catalog: str = "", page: str = "",
    trailer: str = "",
) -> bytes:  # fmt: skip
    """A PDF of pages that all look the same (ISO 32000-1, 7.5).

    Args:
        pages: how many.
        box: of each page, in points.
        drawn: content of each page.
        catalog: more entries of the catalogue.
        page: more entries of each page.
        trailer: more entries of the trailer.
    """
    font = "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>"
    numbers = " ".join(f"{4 + i} 0 R" for i in range(pages))
    objects = [
        f"<</Type/Catalog/Pages 2 0 R {catalog}>>",
        f"<</Type/Pages/Count {pages}/Kids[{numbers}]>>",
        f"<</Length {len(drawn)}>>stream\n{drawn}\nendstream",
    ]
    objects += [
        f"<</Type/Page/Parent 2 0 R/MediaBox[{box}]/Contents 3 0 R/Resources<</Font<</F{font}>>>>{page}>>"
    ] * pages
    out, places = "%PDF-1.7\n", []
    for number, content in enumerate(objects, 1):
        places.append(f"{len(out):010} 00000 n \n")
        out += f"{number} 0 obj{content}endobj\n"
    table = f"xref\n0 {len(places) + 1}\n0000000000 65535 f \n{''.join(places)}"
    end = f"trailer<</Size {len(places) + 1}/Root 1 0 R {trailer}>>startxref\n{len(out)}\n%%EOF"
    return (out + table + end).encode()


def halves(size: tuple[int, int]) -> Image.Image:
    """Red at the left, blue at the right."""
    picture = Image.new("RGB", size, "red")
    picture.paste("blue", (size[0] // 2, 0, *size))
    return picture


def preview(size: tuple[int, int]) -> bytes:
    """A JPEG of :func:`halves`."""
    stream = io.BytesIO()
    halves(size).save(stream, "JPEG")
    return stream.getvalue()


def dng(
    *, jpeg: bytes = b"", flip: int = 1, claimed: tuple[int, int] | None = None, order: str = "<"
) -> bytes:
    """A DNG 1.4 whose sensor of 64 x 48 pixels saw :func:`halves`.

    Args:
        jpeg: a preview.
        flip: EXIF orientation.
        claimed: another (width, height) to say.
        order: of bytes, ``<`` or ``>``.
    """
    sensor = np.full((48, 64), 60, f"{order}u2")
    sensor[0::2, 0:32:2] = 3000  # of each square red, green, green, blue
    sensor[1::2, 33::2] = 3000
    strip = sensor.tobytes()
    width, height = claimed or (64, 48)
    raw = {
        254: ("L", [0]), 256: ("L", [width]), 257: ("L", [height]), 258: ("H", [16]), 259: ("H", [1]),
        262: ("H", [32803]), 273: ("L", [0]), 277: ("H", [1]), 278: ("L", [height]), 279: ("L", [len(strip)]),
        33421: ("H", [2, 2]), 33422: ("B", [0, 1, 1, 2]), 50714: ("H", [0]), 50717: ("L", [4095]),
    }  # fmt: skip
    about = {
        271: ("s", b"Test\0"), 272: ("s", b"Camera\0"), 274: ("H", [flip]), 50706: ("B", [1, 4, 0, 0]),
        50707: ("B", [1, 1, 0, 0]), 50708: ("s", b"Test Camera\0"), 50728: ("L/", [1] * 6),
        50721: ("l/", [v for row in np.eye(3, dtype=int).tolist() for n in row for v in (n, 1)]),
        50778: ("H", [21]),
    }  # fmt: skip
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}L", 8)
    if not jpeg:
        whole = about | raw
        whole[273] = ("L", [8 + len(_directory(whole, 8, order))])
        return start + _directory(whole, 8, order) + strip
    across, down = Image.open(io.BytesIO(jpeg)).size
    about |= {
        254: ("L", [1]), 256: ("L", [across]), 257: ("L", [down]), 258: ("H", [8, 8, 8]), 259: ("H", [7]),
        262: ("H", [6]), 273: ("L", [0]), 277: ("H", [3]), 278: ("L", [down]), 279: ("L", [len(jpeg)]),
        330: ("L", [0]),
    }  # fmt: skip
    second = 8 + len(_directory(about, 8, order))
    pixels = second + len(_directory(raw, second, order))
    about[330], about[273], raw[273] = ("L", [second]), ("L", [pixels]), ("L", [pixels + len(jpeg)])
    return start + _directory(about, 8, order) + _directory(raw, second, order) + jpeg + strip


def _directory(tags: dict, at: int, order: str) -> bytes:
    """A TIFF's directory at a place, and the values that do not fit into it."""
    out, more = struct.pack(f"{order}H", len(tags)), b""
    for tag, (kind, values) in sorted(tags.items()):
        type_number = {"B": 1, "s": 2, "H": 3, "L": 4, "L/": 5, "l/": 10}[kind]
        body = values if kind == "s" else struct.pack(f"{order}{len(values)}{kind[0]}", *values)
        place = body.ljust(4, b"\0")
        if len(body) > 4:
            place = struct.pack(f"{order}L", at + 2 + 12 * len(tags) + 4 + len(more))
            more += body + bytes(len(body) % 2)
        count = len(values) // 2 if "/" in kind else len(values)
        out += struct.pack(f"{order}HHL", tag, type_number, count) + place
    return out + bytes(4) + more
