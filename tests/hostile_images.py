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
from PIL import Image, ImageCms, ImageDraw, features
from PIL.TiffImagePlugin import AppendingTiffWriter, ImageFileDirectory_v2

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
        "line": line("white", Image.new("RGB", (WIDTH, HEIGHT))),
    }


def line(colour: object, onto: Image.Image) -> Image.Image:
    """A thick line from corner to corner."""
    ImageDraw.Draw(onto).line((0, 0, WIDTH, HEIGHT), fill=colour, width=9)  # type: ignore[arg-type]
    return onto


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


def tiff_layout(
    samples: np.ndarray, photometric: int, bits: int, *, end: str = "<", side: int = 0, comp: int = 1,
    order: int = 1,
) -> bytes:  # fmt: skip
    """A TIFF of [H, W, S] samples in planes of their own, in strips of 5 rows or in tiles of ``side`` pixels."""
    height, width, count = samples.shape
    across, down = (side, side) if side else (width, 5)
    blocks = []
    for plane in range(count):
        for y in range(0, height, down):
            for x in range(0, width, across):
                part = samples[y : y + down, x : x + across, plane]
                if side:
                    part = np.pad(part, [(0, side - n) for n in part.shape])
                data = (
                    np.packbits(part, axis=1).tobytes()
                    if bits == 1
                    else part.astype(f"{end}u{bits // 8}").tobytes()
                )
                if order == 2:
                    data = bytes(int(f"{byte:08b}"[::-1], 2) for byte in data)
                blocks.append(zlib.compress(data) if comp == 8 else data)
    tags: dict[int, tuple[str, list[int]]] = {
        256: ("L", [width]), 257: ("L", [height]), 258: ("H", [bits] * count), 259: ("H", [comp]),
        262: ("H", [photometric]), 266: ("H", [order]), 277: ("H", [count]), 284: ("H", [2]),
    }  # fmt: skip
    tags |= {322: ("H", [side]), 323: ("H", [side])} if side else {278: ("L", [down])}
    where, sizes = (324, 325) if side else (273, 279)
    tags |= {where: ("L", [0] * len(blocks)), sizes: ("L", [len(block) for block in blocks])}
    behind = 8 + 2 + 12 * len(tags) + 4
    values = {tag: struct.pack(f"{end}{len(v)}{kind}", *v) for tag, (kind, v) in tags.items()}
    at = behind + sum(len(value) for value in values.values() if len(value) > 4)
    starts = [at + sum(map(len, blocks[:i])) for i in range(len(blocks))]
    values[where] = struct.pack(f"{end}{len(starts)}L", *starts)
    table, more = b"", b""
    for tag in sorted(tags):
        kind, value = tags[tag][0], values[tag]
        if len(value) > 4:
            place, more = struct.pack(f"{end}L", behind + len(more)), more + value
        else:
            place = value.ljust(4, b"\0")
        table += struct.pack(f"{end}HHL", tag, {"H": 3, "L": 4}[kind], len(tags[tag][1])) + place
    head = (b"II*\0" if end == "<" else b"MM\0*") + struct.pack(f"{end}LH", 8, len(tags))
    return head + table + bytes(4) + more + b"".join(blocks)


def pages(*images: tuple[Image.Image, dict[int, int]]) -> bytes:
    """A TIFF of several pages, each with tags of its own."""
    stream = io.BytesIO()
    with AppendingTiffWriter(stream, True) as writer:
        for image, tags in images:
            info = ImageFileDirectory_v2()
            for tag, value in tags.items():
                info[tag] = value
                info.tagtype[tag] = 4
            image.save(writer, "TIFF", tiffinfo=info)
            writer.newFrame()
    return stream.getvalue()


def bmp32(image: Image.Image, alpha: int) -> bytes:
    """A BMP with an alpha channel that is the same everywhere."""
    rows = np.dstack([np.asarray(image)[::-1, :, ::-1], np.full((HEIGHT, WIDTH), alpha, np.uint8)])
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    info = (
        struct.pack("<IiiHHIIiiII", 108, WIDTH, HEIGHT, 1, 32, 3, rows.nbytes, 0, 0, 0, 0) + masks
    )
    start = 14 + 108
    head = b"BM" + struct.pack("<IHHI", start + rows.nbytes, 0, 0, start)
    return head + info.ljust(108, b"\0") + rows.tobytes()


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
        *rare_layouts(),
        *more_than_one(),
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
    ]  # fmt: skip


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
    ]  # fmt: skip


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
        Case("kind/white_is_zero.tiff", tiff(WIDTH, HEIGHT, negative, bits=(258, 3, 16), photometric=(262, 3,
             0)), "picture", same="grey"),
        Case("kind/grey16_clear.png", png16(grey16, 0, transparent_grey), "picture", like="grey", within=9),
        Case("kind/rgb16.png", png16(np.asarray(image).astype(np.uint16) * 257, 2), "picture", same="waves"),
        Case("kind/bits.png", encode(image.convert("1"), "PNG"), "picture"),
        Case("kind/palette.png", encode(image.quantize(128), "PNG"), "picture", like="waves", within=20),
        Case("kind/palette_clear.png", encode(image.quantize(9), "PNG", transparency=4), "picture"),
        Case("kind/grey_alpha.png", encode(image.convert("LA"), "PNG"), "picture", same="grey"),
        Case("kind/invisible.png", encode(see_through, "PNG"), "picture", like="white"),
        Case("kind/float.tiff", encode(levels, "TIFF"), "failure"),
        Case("kind/int32.tiff", encode(levels.convert("I"), "TIFF"), "failure"),
    ]  # fmt: skip


def rare_layouts() -> list[Case]:
    """Layouts that some decoder makes garbage of, though they are valid; and needlessly refused ones."""
    image = waves()
    deep = np.asarray(image).astype(np.uint16) * 257
    grey16 = np.asarray(image.convert("L")).astype(np.uint16)[..., None] * 257
    bits = np.asarray(image.convert("1"))[..., None]
    lab = Image.merge("LAB", image.split())
    jpeg = encode(image, "JPEG", quality=92)
    marked = encode(image, "JPEG", quality=92, restart_marker_rows=1)
    stages = encode(image, "JPEG", quality=92, progressive=True)
    flat, few = encode(image, "PNG"), encode(image.quantize(32), "PNG")
    spoilt = few.index(b"PLTE") - 4
    wrong = [
        png_chunk(b"tEXt", b"a\0b", damage=1),
        png_chunk(b"iCCP", b"not a profile", damage=1),
        png_chunk(b"cHRM", b"", damage=1),
    ]
    sight = {"outcome": "picture", "same": "waves"}
    return [
        Case("layout/planes16.tiff", tiff_layout(deep, 2, 16), **sight),
        Case("layout/planes16_big.tiff", tiff_layout(deep, 2, 16, end=">"), **sight),
        Case("layout/planes16_tiles.tiff", tiff_layout(deep, 2, 16, side=16), **sight),
        Case("layout/planes16_zip.tiff", tiff_layout(deep, 2, 16, comp=8), **sight),
        Case("layout/planes8.tiff", tiff_layout(np.asarray(image), 2, 8), **sight),
        Case("layout/turned8.tiff", tiff_layout(np.asarray(image), 2, 8, order=2), **sight),
        Case("layout/plane16.tiff", tiff_layout(grey16, 1, 16), "picture", same="grey"),
        Case("layout/white0.tiff", tiff_layout(65535 - grey16, 0, 16), "picture", same="grey"),
        Case("layout/bit.tiff", tiff_layout(bits, 1, 1), "picture", same="bits"),
        Case("layout/bit_white0.tiff", tiff_layout(~bits, 0, 1), "picture", same="bits"),
        Case("layout/bit_turned.tiff", tiff_layout(bits, 1, 1, order=2), "picture", same="bits"),
        Case("layout/lab_planes.tiff", tiff_layout(np.asarray(lab), 8, 8), "failure"),
        Case("layout/signed.tiff", tiff(8, 8, bytes(64), signed=(339, 3, 2)), "failure"),
        Case("layout/no_alpha.bmp", bmp32(image, 0), **sight),
        Case("layout/opaque.bmp", bmp32(image, 255), **sight),
        Case("layout/white_line.png", encode(line("white", clear("white")), "PNG"), "picture", like="line"),
        Case("layout/white_line.gif", encode(line("white", clear("white")), "GIF"), "picture", like="line"),
        Case("layout/white_line_grey.png", encode(line("white", clear("white")).convert("LA"), "PNG"),
             "picture", like="line"),
        Case("layout/pale_line.webp", encode(line((250, 250, 245), clear("white")), "WEBP", lossless=True),
             "picture", like="line", within=3),
        Case("layout/sums.png", flat[:33] + b"".join(wrong) + flat[33:], **sight),
        Case("layout/late_sum.png", flat[:-12] + wrong[2] + flat[-12:], **sight),
        Case("layout/clear_sum.png", flat[:33] + png_chunk(b"tRNS", bytes(6), damage=1) + flat[33:],
             "failure"),
        Case("layout/palette_sum.png", few[:spoilt + 8] + b"\x99" + few[spoilt + 9:], "failure"),
        Case("layout/no_end.jpg", jpeg[:-2], "picture", same="jpeg"),
        Case("layout/half_end.jpg", jpeg[:-1], "picture", same="jpeg"),
        Case("layout/zeros_for_end.jpg", jpeg[:-2] + bytes(4096), "picture", same="jpeg"),
        Case("layout/no_end_stages.jpg", stages[:-2], "picture", like="waves", within=9),
        Case("layout/pixels_cut.jpg", jpeg[:-9], "failure"),
        Case("layout/zeros_for_pixels.jpg", jpeg[:-300] + bytes(4096), "failure"),
        Case("layout/ends_early.jpg", jpeg[:-300] + jpeg[-2:], "failure"),
        Case("layout/ends_early_turned.jpg",
             jpeg_with(0xE1, b"Exif\0\0" + exif(6)[6:], jpeg)[:-200] + jpeg[-2:], "failure"),
        Case("layout/little_in_much.jpg", with_jpeg_size(jpeg, 9_000, 9_000), "failure"),
        Case("layout/grey.jpg", encode(Image.new("RGB", (90, 70), (128, 128, 128)), "JPEG"), "picture"),
        Case("layout/cut_at_mark.jpg", marked[: marked.rindex(b"\xff\xd1")], "failure"),
        Case("layout/scan_cut.jpg", stages[: stages.rindex(b"\xff\xda")], "failure"),
    ]  # fmt: skip


def clear(colour: str) -> Image.Image:
    """Nothing, of a colour."""
    image = Image.new("RGBA", (WIDTH, HEIGHT), colour)
    image.putalpha(0)
    return image


def more_than_one() -> list[Case]:
    """Files of several frames or pages, the first of which is not what is meant."""
    image = waves()
    blank, small = Image.new("RGB", image.size, "white"), image.resize((20, 12))

    def film(kind: str, *first: Image.Image, **options: object) -> bytes:
        frames = [*first, image.convert(first[0].mode)]
        return encode(frames[0].copy(), kind, save_all=True, append_images=frames[1:], **options)

    sight = {"outcome": "picture", "same": "waves"}
    black = Image.new("RGB", image.size)
    return [
        Case("more/blank.gif", film("GIF", blank, black), "picture", like="waves", within=25),
        Case("more/clear.gif", film("GIF", clear("white")), "picture", like="waves", within=25),
        Case("more/blank.webp", film("WEBP", blank, black, lossless=True), **sight),
        Case("more/clear.png", film("PNG", clear("black")), **sight),
        Case("more/blank.tif", film("TIFF", blank), **sight),
        Case("more/all_blank.png", encode(blank.copy(), "PNG", save_all=True, append_images=[black]),
             "picture", like="white"),
        Case("more/small_first.tif", pages((small, {254: 1}), (image, {})), **sight),
        Case("more/old_small_first.tif", pages((small, {255: 2}), (image, {255: 1})), **sight),
        Case("more/sizes.tif", pages((small, {254: 1}), (small, {}), (image, {})), **sight),
        Case("more/mask_first.tif", pages((image.convert("1"), {254: 4}), (image, {})), **sight),
        Case("more/small_last.tif", pages((image, {}), (small, {254: 1})), **sight),
        Case("more/called_small.tif", pages((image, {254: 1})), **sight),
        Case("more/raw.tif", pages((small, {254: 1, 330: 8})), "failure"),
    ]  # fmt: skip


def containers() -> list[Case]:
    image = waves()
    jpeg, flat = encode(image, "JPEG", quality=92), encode(image, "PNG")
    found = [
        Case("fine/plain.jpg", jpeg, "picture", same="jpeg", like="waves", within=5),
        Case("fine/CAPITALS.JPG", jpeg, "picture", same="jpeg"),
        Case("fine/more_behind.jpg", jpeg + bytes(999), "picture", same="jpeg"),
        Case("fine/jpeg_inside.png", jpeg, "picture", same="jpeg"),
        Case("fine/odd_exif.jpg", jpeg_with(0xE1, b"Exif\0\0rubbish", jpeg), "picture", same="jpeg"),
        Case("fine/odd_exif.webp", encode(image, "WEBP", lossless=True, exif=b"MM\0\x99rubbish"), "picture",
             same="waves"),
        Case("fine/cut_profile.jpg", jpeg_with(0xE2, b"ICC_PROFILE\0", jpeg), "picture", same="jpeg"),
        Case("fine/cut_jfif.jpg", jpeg_with(0xE0, b"JFIF\0", jpeg), "picture", same="jpeg"),
        Case("fine/progressive.jpg", encode(image, "JPEG", progressive=True), "picture", like="waves",
             within=9),
        Case("fine/two_pictures.jpg", encode_film("MPO"), "picture", like="waves", within=9),
        Case("fine/plain.png", flat, "picture", same="waves"),
        Case("fine/png_inside.jpg", flat, "picture", same="waves"),
        Case("fine/no_end.png", flat[:-12], "picture", same="waves"),
        Case("fine/odd_profile.png", encode(image, "PNG", icc_profile=b"no profile"), "picture",
             same="waves"),
        Case("fine/film.png", encode_film("PNG"), "picture", same="waves"),
        Case("fine/film.webp", encode_film("WEBP", lossless=True), "picture", same="waves"),
        Case("fine/film.gif", encode_film("GIF"), "picture", like="waves", within=25),
        Case("fine/pages.tif", encode_film("TIFF"), "picture", same="waves"),
        Case("fine/odd_xmp.tiff", tiff(8, 8, bytes(64), xmp=(700, 4, 7)), "picture"),
        Case("fine/plain.bmp", encode(image, "BMP"), "picture", same="waves"),
        Case("fine/dot.png", encode(Image.new("RGB", (1, 1)), "PNG"), "picture"),
        Case("fine/tall.png", encode(Image.new("RGB", (1, 9000)), "PNG"), "picture"),
        Case("fine/wide.jpg", encode(Image.new("RGB", (40_000, 2)), "JPEG"), "picture"),
    ]  # fmt: skip
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
