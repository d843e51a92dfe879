"""Pictures from phones, cameras and portfolios: formats that need a package, and what is told without it."""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest
from hostile_images import encode
from made_formats import dng, pdf, preview
from made_tars import make_tar
from mirip_fast_cli.main import run
from PIL import Image

from mirip_fast.data import formats
from mirip_fast.data.decode_pool import DecodeJob, DecodePool
from mirip_fast.data.hashes import HashMemory
from mirip_fast.data.images import load_rgb
from mirip_fast.data.manifest import read_manifest, write_manifest_csv
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


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (pdf(), (2048, 1366)),
        (pdf(box="0 0 100000 1"), (2048, 1)),  # points: 35 metres
        (pdf(box="0 0 0.001 0.001"), (2048, 2048)),
        (pdf(page="/Rotate 90"), (1366, 2048)),
        (pdf(catalog="/OpenAction<</S/JavaScript/JS(while(true){})>>"), (2048, 1366)),
        (b"junk " * 20 + pdf(), (2048, 1366)),
        (pdf(1001), "a PDF of 1,001 pages; up to 1,000 are read. Split it"),
        (pdf(3), "a PDF of 3 pages; call it .pdf, or name a page"),
        (pdf()[:-60], "a damaged PDF"),
        (pdf()[:200], "a damaged PDF"),
        (
            pdf(trailer=f"/Encrypt<</Filter/Standard/V 1/R 2/O({'o' * 32})/U({'u' * 32})/P -4>>"),
            "a PDF with a password",
        ),
        (pdf(trailer="/Encrypt<</Filter/Other/V 9>>"), "a PDF with a password"),
    ],
    ids=[
        "plain",
        "long",
        "small",
        "turned",
        "script",
        "junk",
        "many",
        "several",
        "cut",
        "short",
        "locked",
        "odd lock",
    ],
)
def test_a_page_of_a_pdf_is_a_picture_of_bounded_size(
    data: bytes, size: tuple[int, int] | str
) -> None:
    pytest.importorskip("pypdfium2")
    if isinstance(size, str):
        with pytest.raises(ImageError, match=size):
            load_rgb(data)
    else:
        assert load_rgb(data).size == size
    if data == pdf():
        page = load_rgb(data)
        assert [page.getpixel((x, 600)) for x in (100, 1900)] == [(255, 0, 0), (255, 255, 255)]
        assert len(set(page.crop((1024, 0, 2048, 1366)).convert("L").tobytes())) > 10  # a word


@pytest.mark.parametrize("source", ["folder", "csv", "tar", "file"])
def test_a_page_of_a_pdf_is_a_work(
    source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("pypdfium2")
    stream = io.BytesIO()
    pages = [quarters(), quarters().rotate(180), Image.effect_noise((64, 32), 50).convert("RGB")]
    pages[0].save(stream, "PDF", save_all=True, append_images=pages[1:], quality=95)
    name, data = "김 지원.PDF", tmp_path / "data"
    files = {
        name: stream.getvalue(),
        "b.pdf": pdf(),
        "c.pdf": b"%PDF-1.4\n",
        "d.pdf": encode(quarters(), "PNG"),
    }
    data.mkdir()
    for each, content in files.items():
        (data / each).write_bytes(content)
    whole = [f"{name}#page={i}" for i in (1, 2, 3)]
    expected = ["b.pdf#page=1", "c.pdf", "d.pdf", *whole]
    if source == "csv":
        table = data / "metadata.csv"
        table.write_text(
            f"image_id,filename,tier,학과\ng,{name},S,회화\nb,b.pdf,A,\nx,b.pdf#page=1,A,\n"
        )
        expected = [*whole, "b.pdf#page=1", "b.pdf#page=1"]
    elif source == "tar":
        data = make_tar(tmp_path / "x.tar", files)
        expected = [f"x.tar/{each}" for each in expected]
    elif source == "file":
        data, expected = data / name, whole
    with caplog.at_level("INFO", "mirip_fast"):
        manifest = read_manifest(data)
    assert sorted(manifest.table["named"]) == sorted(expected)
    assert "each page is a work" in caplog.text
    if source == "csv":
        assert manifest.ids == ["g#page=1", "g#page=2", "g#page=3", "b", "x"]
        assert [*manifest.table["tier"]] == ["S", "S", "S", "A", "A"]
        assert [*manifest.table["학과"]] == ["회화"] * 3 + ["", ""]
        assert not len(manifest.missing())
        write_manifest_csv(data / "again.csv", manifest)
        assert read_manifest(data / "again.csv").ids == manifest.ids
    named = dict(zip(manifest.table["named"], manifest.paths, strict=True))
    second = next(path for each, path in named.items() if each.endswith("PDF#page=2"))
    assert seen(load_rgb(second)) == UPRIGHT[::-1]
    with HashMemory(None) as memory, DecodePool(1) as pool:
        (done,) = pool.decode([DecodeJob(0, second, (8,), "squash", True)])
        assert done.sha256 == hashlib.sha256(files[name] + b"\n#page=2").digest()
        assert memory.sha256(second) == done.sha256


def test_what_a_pdfs_row_may_not_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pypdfium2")
    (tmp_path / "a.pdf").write_bytes(pdf(2))
    table = tmp_path / "metadata.csv"
    table.write_text("filename,tier\na.pdf,S\na.pdf#page=2,A\n")
    with pytest.raises(DataError, match="'a.pdf#page=2' is there twice, by itself and as a page"):
        read_manifest(table)
    table.write_text("filename,tier\na.pdf#page=3,S\nb.pdf#page=1,A\n")
    manifest = read_manifest(table)
    assert len(manifest.missing()) == 1
    with pytest.raises(ImageError, match="the PDF has no page 3; the last is #page=2"):
        load_rgb(manifest.paths[0])
    with pytest.raises(ImageError, match="the file does not exist"):
        load_rgb(manifest.paths[1])
    without(monkeypatch, "PDF")
    table.write_text("filename,tier\na.pdf,S\n")
    with pytest.raises(ImageError, match="a PDF; to read it: pip install pypdfium2"):
        load_rgb(read_manifest(table).paths[0])


@pytest.mark.parametrize("order", "<>")
def test_of_a_raw_file_the_preview_is_taken_or_half_of_its_pixels(
    order: str, tmp_path: Path
) -> None:
    pytest.importorskip("rawpy")

    def turned(data: bytes) -> tuple[tuple[int, int], list[str]]:
        picture = load_rgb(data)
        return picture.size, seen(picture)

    upright, quarter = ["red", "blue"] * 2, ["red", "red", "blue", "blue"]
    assert turned(dng(order=order)) == ((32, 24), upright)
    assert turned(dng(order=order, flip=6)) == ((24, 32), quarter)
    assert turned(dng(order=order, jpeg=preview((60, 45)))) == ((60, 45), upright)
    assert turned(dng(order=order, jpeg=preview((60, 45)), flip=6)) == ((45, 60), quarter)
    assert turned(dng(order=order, jpeg=preview((16, 12)))) == ((32, 24), upright)  # small
    for name in ("a.tif", "b.jpg", "b.DNG", "c.dng"):  # b is one shot, in two files
        (tmp_path / name).write_bytes(dng(order=order) if name != "b.jpg" else preview((9, 9)))
    assert read_manifest(tmp_path).ids == ["a.tif", "b.jpg", "c.dng"]
    for cut in (700, 3000, -2000):
        with pytest.raises(ImageError, match="a damaged RAW file"):
            load_rgb(dng(order=order)[:cut])
    with pytest.raises(
        ImageError, match="60000 x 60000 pixels is over the limit of 89.5 megapixels"
    ):
        load_rgb(dng(order=order, claimed=(60_000, 60_000)))


def test_a_raw_file_without_its_package_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "RAW")
    (tmp_path / "a.nef").write_bytes(dng())
    with pytest.raises(DataError, match="1 RAW file passed over: pip install rawpy"):
        read_manifest(tmp_path)
    with pytest.raises(ImageError, match="a camera's RAW file; to read it: pip install rawpy"):
        load_rgb(tmp_path / "a.nef")


def test_a_portfolio_is_ranked_page_by_page(
    headed: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pypdfium2")
    portfolio = Path("김 지원.pdf")
    portfolio.write_bytes(pdf(2))
    assert (
        run(
            [
                "rank",
                str(portfolio),
                "--html",
                "r.html",
                "--sort-into",
                "sorted",
                "--sort-by",
                "image_id",
            ]
        )
        == 0
    )
    assert "2 pages in 1 PDF; each page is a work" in capfd.readouterr().err
    page = Path("r.html").read_text(encoding="utf-8")
    assert (
        page.count(f"{quote(portfolio.name)}#page=") == 2
    )  # links that a browser opens at the page
    sorted_names = sorted(path.name for path in Path("sorted").glob("*/*"))
    assert sorted_names == ["김 지원 (page 1).pdf", "김 지원 (page 2).pdf"]
    assert run(["explain", f"{portfolio}#page=2"]) == 0
