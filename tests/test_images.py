"""Finding, reading, decoding and resizing of images."""

from __future__ import annotations

import logging
import os
import struct
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from unittest.mock import MagicMock

import hostile_images
import numpy as np
import pytest
from hostile_images import Case, encode, tiff, waves
from PIL import Image, ImageFile

from mirip_fast.data import image_files, images
from mirip_fast.data.image_files import scan_images
from mirip_fast.data.images import RESIZE_MODES, decode_squares, load_rgb, resize_square, to_array
from mirip_fast.data.sources import read_image
from mirip_fast.errors import DataError, ImageError

# Pillow warns of the damage that these files have on purpose.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Case]]:
    root = tmp_path_factory.mktemp("hostile")
    return root, hostile_images.make(root)


def big_jpeg(width: int, height: int, quality: int = 90, **options: object) -> bytes:
    """A smooth JPEG of any size."""
    return encode(
        waves().resize((width, height), Image.Resampling.BICUBIC),
        "JPEG",
        quality=quality,
        **options,
    )


# ------------------------------------------------------------------ the collection


def test_every_file_of_the_collection_ends_as_expected(folder: tuple[Path, list[Case]]) -> None:
    root, cases = folder
    found = set(scan_images(root))
    assert {str(path.relative_to(root)) for path in found} <= {case.name for case in cases}
    references = hostile_images.references()
    same: defaultdict[str, dict[bytes, str]] = defaultdict(dict)
    for case in cases:
        path = root / case.name
        assert (path in found) == (case.outcome != "ignored"), case.name
        if case.outcome == "failure":
            with pytest.raises(ImageError) as caught:
                load_rgb(path)
            reason = str(caught.value)
            assert reason.isprintable() and 0 < len(reason) <= 300, case.name
            assert "0x" not in reason, "the same file must give the same reason"
        elif case.outcome == "picture":
            pixels = to_array(load_rgb(path))
            if case.same:
                same[case.same].setdefault(pixels.tobytes(), case.name)
            if case.like:
                difference = np.abs(pixels.astype(int) - to_array(references[case.like])).mean()
                assert difference <= case.within, case.name
    for word, pictures in same.items():
        assert len(pictures) == 1, f"{word}: {list(pictures.values())} differ"


# ------------------------------------------------------------------ finding


def test_scan_order_is_that_of_the_raw_bytes(tmp_path: Path) -> None:
    names = [
        "b.png",
        "B.png",
        "a/z.png",
        "a.png",
        "a-b.png",
        "é.png",
        "\udcff.png",
        "🎨.png",
        "가.png",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [os.path.relpath(path, tmp_path) for path in scan_images(tmp_path)] == [
        "B.png", "a-b.png", "a.png", "a/z.png", "b.png", "é.png", "가.png", "🎨.png", "\udcff.png",
    ]  # fmt: skip


def test_what_is_a_picture_by_content_is_found_and_the_rest_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    picture = Image.new("RGB", (8, 8), "red")
    found = {
        "a.jfif": "JPEG", "b.JPE": "JPEG", "c": "PNG", "d.dat": "WEBP", "e.php": "GIF", "f.dib": "BMP",
        "g.image": "TIFF", "h.x": "AVIF", "i.psd": "PNG",
    }  # fmt: skip
    passed = {"a.jfif.bak": "JPEG", "a.jpg_original": "JPEG", "a.jpg~": "JPEG"}
    for name, kind in (found | passed).items():
        picture.save(tmp_path / name, kind)
    for name, head in {
        "p.PSD": b"8BPS",
        "q.psd": b"8BPS",
        "r.zip": b"PK",
        "t": b"BMW and others",
    }.items():
        (tmp_path / name).write_bytes(head)
    for number in range(20):
        (tmp_path / f"u.k{number}").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "drive").symlink_to("/nowhere/at/all")
    with caplog.at_level(logging.INFO, "mirip_fast"):
        assert [path.name for path in scan_images(tmp_path)] == sorted(found)
    assert (
        "29 files passed over: 2 .psd, 2 without an ending, 1 .bak, 1 .jpg_original," in caplog.text
    )
    assert "and 19 more kinds" in caplog.text
    for name in found:
        load_rgb(tmp_path / name)


def test_linked_folders_are_read_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data, far = tmp_path / "home" / "data", tmp_path / "far"
    for name in (data / "S/a.png", far / "b.png", far / "deep/c.png"):
        name.parent.mkdir(parents=True, exist_ok=True)
        name.touch()
    (data / "A").symlink_to(far)
    for place, target in {
        data / "B": "S", data / "S/up": "..", data / "above": "../..", data / "root": "/",
        far / "back": data, far / "self": ".", data / "again": far / "deep",
    }.items():  # fmt: skip
        place.symlink_to(target)
    with caplog.at_level(logging.INFO, "mirip_fast"):
        found = [os.path.relpath(path, data) for path in scan_images(data)]
    assert found == ["A/b.png", "A/deep/c.png", "S/a.png"]
    assert "7 files passed over: 7 linked folder(s) already read" in caplog.text


def test_scan_of_a_file_or_nothing_names_it(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.touch()
    with pytest.raises(DataError, match=r"a\.png is a file, not a folder"):
        scan_images(file)
    with pytest.raises(DataError, match="nowhere does not exist"):
        scan_images(tmp_path / "nowhere")


def test_scan_tells_of_a_folder_that_it_can_not_enter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "locked").mkdir()
    real = os.scandir

    def scandir(path: str) -> object:
        if os.fspath(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"locked cannot be read \(Permission denied\)"):
        scan_images(tmp_path)


# ------------------------------------------------------------------ reading


def test_a_pipe_that_appears_after_the_first_look_does_not_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, regular = tmp_path / "pipe.jpg", tmp_path / "a.jpg"
    os.mkfifo(pipe)
    regular.write_bytes(b"x")
    status = regular.stat()
    monkeypatch.setattr(Path, "stat", lambda self, **_: status)
    reading = ThreadPoolExecutor(1).submit(read_image, pipe)
    try:
        error = reading.exception(5)
    finally:
        os.close(os.open(pipe, os.O_RDWR))  # lets a reader that waits go on
    assert isinstance(error, ImageError) and "named pipe" in str(error)


def test_a_file_that_grows_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"x" * 5000)
    real = image_files.open_image_file

    def open_and_grow(path: Path) -> object:
        stream = real(path)
        stream.peek()  # type: ignore[attr-defined]
        with path.open("ab") as more:
            more.write(b"y" * 9000)
        return stream

    monkeypatch.setattr(image_files, "open_image_file", open_and_grow)
    assert read_image(path)[0] == b"x" * 5000 + b"y" * 9000  # grown before the reading began

    def open_and_touch(path: Path) -> MagicMock:
        stream = real(path)
        reader = MagicMock(wraps=stream)
        reader.__enter__.return_value = reader
        reader.read.side_effect = lambda n: (stream.read(n), os.truncate(path, 20_000))[0]
        return reader

    monkeypatch.setattr(image_files, "open_image_file", open_and_touch)
    with pytest.raises(ImageError, match="changed while it was being read"):
        read_image(path)


def test_reasons_for_what_can_not_be_opened(tmp_path: Path) -> None:
    link = tmp_path / "l.png"
    (tmp_path / "empty.png").touch()
    (tmp_path / "hole.png").touch()
    os.truncate(tmp_path / "hole.png", (2 << 30) + 1)
    link.symlink_to("evil\n\x1b[31m.png")
    for path, reason in [
        (tmp_path / "none.png", "^the file does not exist$"),
        (tmp_path / "empty.png", "^the file is empty$"),
        (tmp_path / "hole.png", "^2147483649 bytes is over the limit of 2147483648 bytes$"),
        (tmp_path, "^not a regular file but a folder$"),
        (link, r"^a link to evil \\x1b\[31m\.png, which does not exist$"),
        (Path("nul\0.png"), "null"),
        (tmp_path / ("n" * 300), "name too long"),
    ]:
        with pytest.raises(ImageError, match=reason):
            read_image(path)


# ------------------------------------------------------------------ decoding


def test_size_is_checked_before_any_pixel_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encode(Image.new("1", (10_000, 8_951)), "PNG")  # 10,000 pixels more than allowed

    def load(self: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(
        ImageError, match="10000 x 8951 pixels is over .* 89.5 megapixels; --max-meg"
    ):
        load_rgb(data)


@pytest.mark.parametrize(
    "error", [MemoryError(), RecursionError("deep"), KeyError(3), struct.error("two\nlines")]
)
def test_whatever_a_decoder_raises_becomes_a_reason(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(image: Image.Image) -> Image.Image:
        raise error

    monkeypatch.setattr(images, "_to_rgb", fail)
    with pytest.raises(ImageError) as caught:
        load_rgb(encode(waves(), "PNG"))
    assert str(caught.value).isprintable() and str(caught.value)


def test_16_bit_grey_is_scaled_and_12_bit_too() -> None:
    values = np.array([0, 1 << 8, 128 << 8, 65535], dtype="<u2")
    deep = tiff(4, 1, values.tobytes(), bits=(258, 3, 16))
    assert to_array(load_rgb(deep))[0, :, 0].tolist() == [0, 1, 128, 255]
    packed = bytes([0x00, 0x08, 0x00, 0xFF, 0xFF, 0xFF])  # 0x000, 0x800, 0xFFF, 0xFFF
    twelve = tiff(4, 1, packed, bits=(258, 3, 12))
    assert to_array(load_rgb(twelve))[0, :, 0].tolist() == [0, 128, 255, 255]


def test_transparent_colours_become_white_at_every_depth() -> None:
    grey = np.array([[0x1234, 0x1299]], dtype=np.uint16)
    chunk = hostile_images.png_chunk(b"tRNS", b"\x12\x34")
    assert to_array(load_rgb(hostile_images.png16(grey, 0, chunk)))[0, :, 0].tolist() == [255, 0x12]
    colour = np.array([[[0x1234, 0x5678, 0x9ABC], [0, 0, 0]]], dtype=np.uint16)
    chunk = hostile_images.png_chunk(b"tRNS", b"\x12\x34\x56\x78\x9a\xbc")
    pixels = to_array(load_rgb(hostile_images.png16(colour, 2, chunk)))
    assert pixels[0].tolist() == [[255, 255, 255], [0, 0, 0]]


def test_half_transparent_is_halfway_to_white() -> None:
    image = Image.new("RGBA", (3, 3), (0, 100, 200, 51))  # opacity 0.2
    assert to_array(load_rgb(encode(image, "PNG")))[1, 1].tolist() == [204, 224, 244]


def test_an_animation_or_scan_is_looked_at_no_further_than_told() -> None:
    shades = [Image.new("RGB", (8, 8), (5 * i, 0, 0)) for i in range(images.MAX_FRAMES + 1)]
    film = encode(
        shades[0], "PNG", save_all=True, append_images=[*shades[1:], waves().resize((8, 8))]
    )
    assert load_rgb(film).getcolors() == [
        (64, (0, 0, 0))
    ]  # the first; all that is looked at is flat


@pytest.mark.parametrize(
    ("data", "flat"),
    [
        (encode(waves(), "PNG"), False),
        (encode(hostile_images.clear("white"), "PNG"), True),
        (encode(Image.new("RGB", (99, 70), (180, 20, 30)), "JPEG"), True),
        (encode(Image.new("RGB", (99, 70), (180, 20, 30)), "WEBP"), True),
        (encode(hostile_images.line("red", Image.new("RGB", (900, 900))), "PNG"), False),
    ],
)
def test_a_picture_of_a_single_colour_is_known(data: bytes, flat: bool) -> None:
    assert decode_squares(data, (16,), "pad", draft=True).flat is flat


def test_pillow_is_left_as_it_was_and_says_nothing(recwarn: pytest.WarningsRecorder) -> None:
    before = Image.MAX_IMAGE_PIXELS
    palette = encode(waves().quantize(9), "PNG", transparency=bytes(9))
    odd = hostile_images.jpeg_with(0xE1, b"Exif\0\0II*\0\x08\0\0\0\xff\0", encode(waves(), "JPEG"))
    for data in (palette, odd, b"no picture", hostile_images.png(10**6, 10**6, 8, 2, b"")):
        with suppress(ImageError):
            load_rgb(data)
    assert before == Image.MAX_IMAGE_PIXELS


# ------------------------------------------------------------------ reduced scale


def test_a_jpeg_over_the_limit_is_read_at_reduced_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    data, limit = big_jpeg(800, 600), 800 * 600 // 9
    monkeypatch.setattr(images, "MAX_PIXELS", limit)
    assert load_rgb(data, max_pixels=limit).size == (200, 150)
    # Whatever limit is given, or a file had two kinds of features.
    assert load_rgb(data, max_pixels=10**6).size == (200, 150)
    assert decode_squares(data, (90,), "squash", draft=False, max_pixels=limit).size == (800, 600)
    whole = encode(load_rgb(data), "PNG")
    assert load_rgb(whole, max_pixels=200 * 150).size == (200, 150)
    with pytest.raises(ImageError, match="200 x 150 pixels is over the limit"):
        load_rgb(whole, max_pixels=200 * 150 - 1)
    with pytest.raises(
        ImageError, match="40000 x 40000 pixels is over the limit of 1000 megapixels$"
    ):
        load_rgb(hostile_images.with_jpeg_size(encode(waves(), "JPEG"), 40_000, 40_000))


@pytest.mark.parametrize(
    ("width", "height", "size", "expected"),
    [
        (1000, 800, 100, (250, 200)),
        (1000, 799, 100, (500, 400)),
        (1600, 1600, 100, (200, 200)),
        (400, 400, 100, (200, 200)),
        (399, 5000, 100, (399, 5000)),
        (80, 48, 100, (80, 48)),
    ],
)
def test_draft_keeps_at_least_twice_the_size(
    width: int, height: int, size: int, expected: tuple[int, int]
) -> None:
    assert load_rgb(big_jpeg(width, height), draft_size=size).size == expected


@pytest.mark.parametrize("mode", RESIZE_MODES)
def test_draft_looks_like_the_full_decode(mode: str) -> None:
    data = big_jpeg(1200, 900, quality=95)
    full = resize_square(load_rgb(data), 100, mode)
    quick = resize_square(load_rgb(data, draft_size=100), 100, mode)
    difference = np.abs(to_array(full).astype(int) - to_array(quick))
    assert 0 < difference.mean() < 1.0


def test_draft_finds_the_same_damage() -> None:
    data = big_jpeg(1600, 1600)
    for cut in (len(data) // 3, len(data) - 9):
        for draft_size in (None, 100):
            with pytest.raises(ImageError, match="truncated"):
                load_rgb(data[:cut], draft_size=draft_size)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_squares_report_the_whole_upright_size(orientation: int) -> None:
    data = big_jpeg(1000, 700, exif=hostile_images.exif(orientation))
    shown = (700, 1000) if orientation >= 5 else (1000, 700)
    for draft in (True, False):
        squares = decode_squares(data, (60,), "squash", draft=draft)
        assert squares.size == shown
        assert [square.size for square in squares.images] == [(60, 60)]


def test_a_square_does_not_depend_on_the_other_sizes() -> None:
    data = big_jpeg(900, 900)  # 100 is decoded at 1/4, 130 and 224 at 1/2, 300 in full
    sizes = (300, 100, 224, 130)
    together = decode_squares(data, sizes, "crop", draft=True)
    for size, square in zip(sizes, together.images, strict=True):
        (alone,) = decode_squares(data, (size,), "crop", draft=True).images
        assert square.tobytes() == alone.tobytes()
        expected = resize_square(load_rgb(data, draft_size=size), size, "crop")
        assert square.tobytes() == expected.tobytes()


# ------------------------------------------------------------------ resizing


def bicubic_matrix(source: int, target: int, start: float, length: float) -> np.ndarray:
    """Weights [target, source] of antialiased bicubic interpolation (Keys 1981, a = -0.5), float64.

    The part of the source from ``start`` on, ``length`` pixels long, fills the target.
    """
    scale = length / target
    stretch = max(scale, 1.0)
    matrix = np.zeros((target, source))
    for out in range(target):
        centre = start + (out + 0.5) * scale
        for inn in range(source):
            x = abs((inn + 0.5 - centre) / stretch)
            if x < 1:
                matrix[out, inn] = 1.5 * x**3 - 2.5 * x**2 + 1
            elif x < 2:
                matrix[out, inn] = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return matrix / matrix.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("width", "height"), [(80, 48), (81, 48), (13, 200), (200, 13), (10, 12)])
@pytest.mark.parametrize("mode", RESIZE_MODES)
def test_resize_against_a_float64_reference(mode: str, width: int, height: int) -> None:
    size = 32
    noise = np.random.default_rng(3).integers(60, 190, (height, width, 3)).astype(np.uint8)
    got = to_array(resize_square(Image.fromarray(noise), size, mode)).astype(float)
    side = min(width, height) if mode == "crop" else None  # the crop of the whole, resized
    inner = [size, size]
    if mode == "pad":
        inner = [max(1, round(length * size / max(width, height))) for length in (height, width)]
    down, across = (
        bicubic_matrix(length, target, (length - (side or length)) / 2, side or length)
        for length, target in zip((height, width), inner, strict=True)
    )
    expected = np.full((size, size, 3), 255.0)
    top, left = (size - inner[0]) // 2, (size - inner[1]) // 2
    resized = np.einsum("ts,swc,uw->tuc", down, noise.astype(float), across)
    expected[top : top + inner[0], left : left + inner[1]] = resized.clip(0, 255)
    assert np.abs(got - expected).max() <= 1.5  # Pillow rounds twice: after rows and after columns
