"""A small collection of files that image folders really contain, each with what has to become of it."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, features

WIDTH, HEIGHT = 80, 48
PNG_START = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Case:
    """One file: its content (or what makes it), and what to expect.

    outcome: "picture", "failure" or "ignored".
    same: cases with the same word here must give exactly the same pixels.
    like: name of the reference picture that the pixels resemble; ``within``: mean difference in levels.
    """

    name: str
    content: bytes | Callable[[Path], object]
    outcome: str
    same: str | None = None
    like: str | None = None
    within: float = 0.0


def waves() -> Image.Image:
    """A smooth colour picture."""
    x = np.linspace(0, 3 * np.pi, WIDTH)[None, :]
    y = np.linspace(0, 2 * np.pi, HEIGHT)[:, None]
    bands = [np.sin(x) + 0 * y, np.cos(y) + 0 * x, np.sin(x + y)]
    return Image.fromarray((127 + 100 * np.stack(bands, axis=-1)).astype(np.uint8))


def tiles() -> Image.Image:
    """Flat squares of 16 pixels: JPEG keeps them exactly the same in every orientation."""
    colours = np.random.default_rng(7).integers(0, 256, (HEIGHT // 16, WIDTH // 16, 3))
    return Image.fromarray(colours.astype(np.uint8).repeat(16, axis=0).repeat(16, axis=1))


def references() -> dict[str, Image.Image]:
    """What ``Case.like`` refers to."""
    return {
        "waves": waves(),
        "grey": waves().convert("L").convert("RGB"),
        "white": Image.new("RGB", (WIDTH, HEIGHT), "white"),
    }


def encode_film(kind: str, **options: object) -> bytes:
    """waves(), then two black frames."""
    # New images each time, as saving leaves settings behind in them.
    frames = [Image.new("RGB", (WIDTH, HEIGHT)) for _ in range(2)]
    return encode(waves(), kind, save_all=True, append_images=frames, **options)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png_chunk(kind: bytes, body: bytes, damage: int = 0) -> bytes:
    checksum = zlib.crc32(kind + body) ^ damage
    return len(body).to_bytes(4, "big") + kind + body + checksum.to_bytes(4, "big")


def png(width: int, height: int, bits: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    """A PNG from raw rows, each with its leading filter byte; extra chunks go before the pixels."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    pixels = png_chunk(b"IDAT", zlib.compress(rows))
    return b"".join(
        [PNG_START, png_chunk(b"IHDR", header), *extra, pixels, png_chunk(b"IEND", b"")]
    )


def png16(samples: np.ndarray, colour: int, *extra: bytes) -> bytes:
    """A 16-bit PNG: grey [H, W] (colour 0) or RGB [H, W, 3] (colour 2)."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    return png(samples.shape[1], samples.shape[0], 16, colour, rows, *extra)


def tiff(width: int, height: int, strip: bytes, **tags: tuple[int, int, int]) -> bytes:
    """A little-endian grey TIFF with one strip. tags: name=(tag number, type, value), may replace."""
    entries = {
        256: (4, width),
        257: (4, height),
        258: (3, 8),
        259: (3, 1),
        262: (3, 1),
        277: (3, 1),
        278: (4, height),
        279: (4, len(strip)),
    }
    entries |= {number: (kind, value) for number, kind, value in tags.values()}
    entries[273] = (4, 8 + 2 + 12 * (len(entries) + 1) + 4)
    body = b"".join(
        struct.pack("<HHII", n, kind, 1, value) for n, (kind, value) in sorted(entries.items())
    )
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(4) + strip


def jpeg_with(segment: int, body: bytes, jpeg: bytes) -> bytes:
    """``jpeg`` with one more header segment right after its start."""
    return jpeg[:2] + bytes([0xFF, segment]) + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


def with_jpeg_size(jpeg: bytes, width: int, height: int) -> bytes:
    """``jpeg`` whose header claims another size."""
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :]


def turned(orientation: int) -> tuple[Image.Image, bytes]:
    """tiles() stored such that showing it in this EXIF orientation gives tiles(), and the EXIF block."""
    pixels = np.asarray(tiles())
    # What a viewer does with each value (EXIF 2.3, table of tag 274), undone.
    undo = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.swapaxes(0, 1),
        6: np.rot90(pixels, 1),
        7: np.rot90(pixels, 2).swapaxes(0, 1),
        8: np.rot90(pixels, -1),
    }
    return Image.fromarray(np.ascontiguousarray(undo.get(orientation, pixels))), exif(orientation)


def exif(orientation: int) -> bytes:
    block = Image.Exif()
    block[0x0112] = orientation
    return block.tobytes()


def cases() -> list[Case]:
    """All files of the collection."""
    return [
        *damaged(),
        *oversized(),
        *pixel_kinds(),
        *containers(),
        *orientations(),
        *names(),
        *no_files(),
    ]


def damaged() -> list[Case]:
    jpeg, flat = encode(waves(), "JPEG", quality=92), encode(waves(), "PNG")
    webp, gif = encode(waves(), "WEBP", lossless=True), encode(waves().convert("P"), "GIF")
    bad_header = png_chunk(b"IHDR", flat[16:29], damage=1)
    return [
        Case("damaged/empty.png", b"", "failure"),
        Case("damaged/two_bytes.jpg", b"\xff\xd8", "failure"),
        Case("damaged/letter.jpg", b"Dear applicant,\n" * 90, "failure"),
        Case("damaged/page.png", b"<!DOCTYPE html><html><body>Gone</body></html>", "failure"),
        Case("damaged/drawing.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "failure"),
        Case("damaged/postscript.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\nshowpage\n", "failure"),
        Case("damaged/archive.webp", b"PK\x03\x04" + bytes(60), "failure"),
        Case("damaged/portable.png", encode(waves(), "PPM"), "failure"),
        Case("damaged/phone.heic", b"\0\0\0\x18ftypheic" + bytes(300), "failure"),
        Case("damaged/half.jpg", jpeg[: len(jpeg) // 2], "failure"),
        Case("damaged/header_only.jpg", jpeg[:30], "failure"),
        Case("damaged/half.png", flat[: len(flat) // 2], "failure"),
        Case("damaged/half.webp", webp[: len(webp) // 2], "failure"),
        Case("damaged/half.gif", gif[: -len(gif) // 3], "failure"),
        Case("damaged/half.bmp", encode(waves(), "BMP")[:-3000], "failure"),
        Case("damaged/half.tiff", encode(waves(), "TIFF")[:-3000], "failure"),
        Case("damaged/header_sum.png", PNG_START + bad_header + flat[33:], "failure"),
        Case("damaged/no_pixels.png", png(0, 5, 8, 0, bytes(5)), "failure"),
        Case("damaged/noise.png", flat[:41] + b"\x99" * 200, "failure"),
    ]


def oversized() -> list[Case]:
    jpeg = encode(waves(), "JPEG")
    gif = bytearray(encode(waves().convert("P"), "GIF"))
    gif[6:10] = struct.pack("<HH", 60000, 60000)
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0))
    text = png_chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(30 << 20), 9))
    black = png(11_000, 9_000, 1, 0, bytes((1 + 11_000 // 8) * 9_000))
    return [
        Case("big/black.png", black, "failure"),
        Case("big/header.png", png(2**31 - 1, 2**31 - 1, 8, 2, b"\0"), "failure"),
        Case("big/header.jpg", with_jpeg_size(jpeg, 60_000, 60_000), "failure"),
        Case("big/header.gif", bytes(gif), "failure"),
        Case("big/header.tiff", tiff(2**31 - 1, 2**31 - 1, bytes(16)), "failure"),
        Case("big/text.png", PNG_START + head + text + png(8, 8, 8, 0, bytes(72))[33:], "failure"),
        Case("big/hole.jpg", lambda path: (path.touch(), os.truncate(path, 5 << 30)), "failure"),
    ]


def pixel_kinds() -> list[Case]:
    image = waves()
    grey16 = np.asarray(image.convert("L")).astype(np.uint16) * 257
    see_through = image.convert("RGBA")
    see_through.putalpha(0)
    levels = Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8))
    to_lab = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
    )
    lab = ImageCms.applyTransform(image, to_lab)
    lab.info.clear()
    cmyk = image.convert("CMYK")
    negative = (65535 - grey16).astype("<u2").tobytes()
    transparent_grey = png_chunk(b"tRNS", struct.pack(">H", int(grey16[0, 0])))
    return [
        Case("kind/cmyk.jpg", encode(cmyk, "JPEG", quality=95), "picture", like="waves", within=12),
        Case("kind/cmyk.tiff", encode(cmyk, "TIFF"), "picture", like="waves", within=12),
        Case("kind/lab.tiff", encode(lab, "TIFF"), "picture", like="waves", within=4),
        Case("kind/grey16.png", png16(grey16, 0), "picture", same="grey"),
        Case("kind/grey16.tiff", encode(Image.fromarray(grey16), "TIFF"), "picture", same="grey"),
        Case(
            "kind/white_is_zero.tiff",
            tiff(WIDTH, HEIGHT, negative, bits=(258, 3, 16), photometric=(262, 3, 0)),
            "picture",
            same="grey",
        ),
        Case(
            "kind/grey16_clear.png",
            png16(grey16, 0, transparent_grey),
            "picture",
            like="grey",
            within=9,
        ),
        Case(
            "kind/rgb16.png",
            png16(np.asarray(image).astype(np.uint16) * 257, 2),
            "picture",
            same="waves",
        ),
        Case("kind/bits.png", encode(image.convert("1"), "PNG"), "picture"),
        Case(
            "kind/palette.png",
            encode(image.quantize(128), "PNG"),
            "picture",
            like="waves",
            within=20,
        ),
        Case("kind/palette_clear.png", encode(image.quantize(9), "PNG", transparency=4), "picture"),
        Case("kind/grey_alpha.png", encode(image.convert("LA"), "PNG"), "picture", same="grey"),
        Case("kind/invisible.png", encode(see_through, "PNG"), "picture", like="white"),
        Case("kind/float.tiff", encode(levels, "TIFF"), "failure"),
        Case("kind/int32.tiff", encode(levels.convert("I"), "TIFF"), "failure"),
    ]


def containers() -> list[Case]:
    image = waves()
    jpeg, flat = encode(image, "JPEG", quality=92), encode(image, "PNG")
    found = [
        Case("fine/plain.jpg", jpeg, "picture", same="jpeg", like="waves", within=5),
        Case("fine/CAPITALS.JPG", jpeg, "picture", same="jpeg"),
        Case("fine/more_behind.jpg", jpeg + bytes(999), "picture", same="jpeg"),
        Case("fine/jpeg_inside.png", jpeg, "picture", same="jpeg"),
        Case(
            "fine/odd_exif.jpg", jpeg_with(0xE1, b"Exif\0\0rubbish", jpeg), "picture", same="jpeg"
        ),
        Case(
            "fine/odd_exif.webp",
            encode(image, "WEBP", lossless=True, exif=b"MM\0\x99rubbish"),
            "picture",
            same="waves",
        ),
        Case(
            "fine/cut_profile.jpg", jpeg_with(0xE2, b"ICC_PROFILE\0", jpeg), "picture", same="jpeg"
        ),
        Case("fine/cut_jfif.jpg", jpeg_with(0xE0, b"JFIF\0", jpeg), "picture", same="jpeg"),
        Case(
            "fine/progressive.jpg",
            encode(image, "JPEG", progressive=True),
            "picture",
            like="waves",
            within=9,
        ),
        Case("fine/two_pictures.jpg", encode_film("MPO"), "picture", like="waves", within=9),
        Case("fine/plain.png", flat, "picture", same="waves"),
        Case("fine/png_inside.jpg", flat, "picture", same="waves"),
        Case("fine/no_end.png", flat[:-12], "picture", same="waves"),
        Case(
            "fine/odd_profile.png",
            encode(image, "PNG", icc_profile=b"no profile"),
            "picture",
            same="waves",
        ),
        Case("fine/film.png", encode_film("PNG"), "picture", same="waves"),
        Case("fine/film.webp", encode_film("WEBP", lossless=True), "picture", same="waves"),
        Case("fine/film.gif", encode_film("GIF"), "picture", like="waves", within=25),
        Case("fine/pages.tif", encode_film("TIFF"), "picture", same="waves"),
        Case("fine/odd_xmp.tiff", tiff(8, 8, bytes(64), xmp=(700, 4, 7)), "picture"),
        Case("fine/plain.bmp", encode(image, "BMP"), "picture", same="waves"),
        Case("fine/dot.png", encode(Image.new("RGB", (1, 1)), "PNG"), "picture"),
        Case("fine/tall.png", encode(Image.new("RGB", (1, 9000)), "PNG"), "picture"),
        Case("fine/wide.jpg", encode(Image.new("RGB", (40_000, 2)), "JPEG"), "picture"),
    ]
    if features.check("libtiff"):
        found.append(
            Case(
                "fine/lzw.tif",
                encode(image, "TIFF", compression="tiff_lzw"),
                "picture",
                same="waves",
            )
        )
    if features.check("avif"):
        found.append(
            Case("fine/plain.avif", encode(image, "AVIF"), "picture", like="waves", within=9)
        )
    return found


def orientations() -> list[Case]:
    found = []
    for value in (*range(10), 60_000):
        stored, block = turned(value)
        lossless = encode(stored, "PNG", exif=block)
        lossy = encode(stored, "JPEG", exif=block, quality=100, subsampling=0)
        found.append(Case(f"exif/{value}.png", lossless, "picture", same="tiles"))
        found.append(Case(f"exif/{value}.jpg", lossy, "picture", same="tiles in JPEG"))
    stored, block = turned(6)
    found.append(
        Case(
            "exif/6.webp",
            encode(stored, "WEBP", lossless=True, exif=block),
            "picture",
            same="tiles",
        )
    )
    found.append(Case("exif/6.tiff", encode(stored, "TIFF", exif=block), "picture", same="tiles"))
    return found


def names() -> list[Case]:
    data = encode(tiles(), "PNG")
    good = [
        "수채화 한 장.png", "🎨.png", "line\nbreak.png", "tab\t.png", "quo\"te'.png", "a,b;c.png",
        "back\\slash.png", "%s{}.png", "=1+1.png", "-v.png", "\x1b[1mbold.png", " space .png",
        "no_ending", "setup.jpg.exe", "x" * 251 + ".png", os.fsdecode(b"caf\xe9\xff.png"),
    ]  # fmt: skip
    other = ["...png", ".secret.png", "._a.png", "list.csv", "a.png~", "@eaDir/a.png"]
    return [Case(f"name/{name}", data, "picture", same="tiles") for name in good] + [
        Case(f"name/{name}", data, "ignored") for name in other
    ]


def no_files() -> list[Case]:
    data = encode(tiles(), "PNG")

    def link(target: str) -> Callable[[Path], object]:
        return lambda path: path.symlink_to(target)

    return [
        Case("place/album.jpg/inside.png", data, "picture", same="tiles"),
        Case("place/album.jpg", lambda path: path.mkdir(exist_ok=True), "ignored"),
        Case("place/real.png", data, "picture", same="tiles"),
        Case("place/link.png", link("real.png"), "picture", same="tiles"),
        Case("place/nowhere.png", link("missing.png"), "failure"),
        Case("place/self.png", link("self.png"), "failure"),
        Case("place/up.png", link(".."), "ignored"),
        Case("place/endless.jpg", link("/dev/zero"), "failure"),
        Case("place/pipe.jpg", os.mkfifo, "failure"),
    ]


def make(folder: Path) -> list[Case]:
    """Write every file below ``folder``; gives the list back."""
    every = cases()
    for case in every:
        path = folder / case.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(case.content):
            case.content(path)
        else:
            path.write_bytes(case.content)
    return every
