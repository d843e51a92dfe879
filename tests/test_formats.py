"""Pictures from phones, cameras and portfolios: formats that need a package, and what is told without it."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hostile_images import encode
from made_tars import make_tar
from PIL import Image

from mirip_fast.data import formats
from mirip_fast.data.decode_pool import DecodeJob, DecodePool
from mirip_fast.data.images import load_rgb
from mirip_fast.data.manifest import read_manifest
from mirip_fast.errors import DataError, ImageError

COLOURS = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0)}
TURNED = {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"}  # by a quarter


def quarters() -> Image.Image:
    """64 x 32: red and lime above blue and yellow."""
    picture = Image.new("RGB", (64, 32))
    for i, colour in enumerate(COLOURS):
        picture.paste(colour, (32 * (i % 2), 16 * (i // 2), 32 * (i % 2) + 32, 16 * (i // 2) + 16))
    return picture


def seen(picture: Image.Image) -> list[str]:
    """What stands in its quarters, row by row."""
    width, height = picture.size
    places = [(x, y) for y in (height // 4, height * 3 // 4) for x in (width // 4, width * 3 // 4)]
    return [
        min(COLOURS, key=lambda name: sum(abs(a - b) for a, b in zip(COLOURS[name], pixel)))  # noqa: B905
        for pixel in map(picture.getpixel, places)
    ]


UPRIGHT, QUARTER_TURN = list(COLOURS), ["blue", "red", "yellow", "lime"]


@pytest.mark.parametrize("ending", ["heic", "avif", "jxl"])
def test_phones_pictures_are_read_and_turned_once(ending: str, tmp_path: Path) -> None:
    pytest.importorskip({"heic": "pillow_heif", "jxl": "pillow_jxl"}.get(ending, "PIL"))
    if ending == "heic":
        sys.modules["pillow_heif"].register_heif_opener()
    upright, turned = tmp_path / f"a.{ending}", tmp_path / f"b.{ending}"
    quarters().save(upright, quality=95)
    if ending == "jxl":  # made from a JPEG, which has the turn in its EXIF alone
        quarters().save(tmp_path / "b.jpg", quality=95, **TURNED)
        Image.open(tmp_path / "b.jpg").save(turned, lossless_jpeg=True)
    else:
        quarters().save(turned, quality=95, **TURNED)
    with DecodePool(1) as pool:  # a process of its own, and the wrong name
        lying = shutil.copy(upright, tmp_path / "lying.jpg")
        (done,) = pool.decode([DecodeJob(0, lying, (8,), "squash", True)])
    assert (done.reason, done.width, done.height) == (None, 64, 32)
    assert [seen(load_rgb(upright)), load_rgb(upright).size] == [UPRIGHT, (64, 32)]
    assert [seen(load_rgb(turned)), load_rgb(turned).size] == [QUARTER_TURN, (32, 64)]
    with pytest.raises(ImageError, match=r"64 x 32|32 x 64"):
        load_rgb(turned, max_pixels=64 * 32 - 1)
    for cut in (20, 60, len(turned.read_bytes()) - 40):
        with pytest.raises(ImageError):
            load_rgb(turned.read_bytes()[:cut])


@pytest.mark.parametrize("encoder", ["heif-enc", "avifenc"])
def test_other_encoders_pictures_are_read(encoder: str, tmp_path: Path) -> None:
    if shutil.which(encoder) is None:
        pytest.skip(f"{encoder} is not installed")
    if encoder == "heif-enc":
        pytest.importorskip("pillow_heif")
    quarters().save(tmp_path / "a.png")
    turn = [] if encoder == "heif-enc" else ["--irot", "3"]
    out = tmp_path / "out"
    subprocess.run([encoder, *turn, tmp_path / "a.png", "-o", out], check=True, capture_output=True)
    assert seen(load_rgb(out)) == (UPRIGHT if encoder == "heif-enc" else QUARTER_TURN)


def test_of_several_pictures_in_a_heic_the_primary_one_is_taken() -> None:
    heif = pytest.importorskip("pillow_heif")
    both = heif.from_pillow(Image.new("RGB", (300, 300), "lime"))
    both.add_from_pillow(quarters())
    stream = io.BytesIO()
    both.save(stream, primary_index=1)
    assert load_rgb(stream.getvalue()).size == (64, 32)


def test_a_jpeg_xl_that_says_to_be_huge_is_refused_before_its_pixels_are_decoded() -> None:
    pytest.importorskip("pillow_jxl")
    bits = 0b0 | 0b11 << 1 | (200_000 - 1) << 3  # SizeHeader: not small, 30 bits of height; square
    bits |= 1 << 33
    data = b"\xff\x0a" + bits.to_bytes(8, "little")
    for lying in (
        data,
        b"\0\0\0\x0cJXL \r\n\x87\n" + (8 + len(data)).to_bytes(4, "big") + b"jxlc" + data,
    ):
        with pytest.raises(ImageError, match="200000 x 200000 pixels is over the limit"):
            load_rgb(lying)


def without(monkeypatch: pytest.MonkeyPatch, *kinds: str) -> None:
    """Have the packages for these kinds not installed."""
    known = formats._module.__wrapped__
    monkeypatch.setattr(formats, "_module", lambda kind: None if kind in kinds else known(kind))


@pytest.mark.parametrize("source", ["folder", "tar"])
def test_pictures_whose_package_is_missing_are_passed_over_and_told(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without(monkeypatch, *formats.EXTRAS)
    heic = b"\0\0\0\x18ftypheic" + bytes(300)
    files = {
        "a.png": encode(quarters(), "PNG"),
        "b.heic": heic,
        "한 장.HEIC": heic,
        "c.jxl": b"\xff\n",
    }
    data = tmp_path / "data"
    data.mkdir()
    if source == "tar":
        data = make_tar(data / "x.tar", files)
    else:
        for name, content in files.items():
            (data / name).write_bytes(content)
    with caplog.at_level("WARNING", "mirip_fast"):
        assert len(read_manifest(data)) == 1
    assert "2 HEIC files passed over: pip install pillow-heif" in caplog.text
    assert "1 JPEG XL file passed over: pip install pillow-jxl-plugin" in caplog.text
    if source == "folder":
        (data / "a.png").unlink()
        with pytest.raises(DataError, match="2 HEIC files passed over: pip install pillow-heif"):
            read_manifest(data)
        (data / "metadata.csv").write_text("filename,tier\nb.heic,S\n", encoding="utf-8")
        paths = read_manifest(data).paths
        with DecodePool(0) as pool:
            (done,) = pool.decode([DecodeJob(0, paths[0], (8,), "squash", True)])
        assert done.reason == "a HEIC picture; to read it: pip install pillow-heif"
