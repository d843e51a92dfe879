"""Colour profiles: what is seen is sRGB, and caches of before stay what they are."""

from __future__ import annotations

import io
import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hostile_images import encode
from made_profiles import P3, display_profile, grey_profile, printer_profile
from made_run import TINY, make_data
from mirip_fast_cli.main import run
from numpy.typing import NDArray
from PIL import Image, ImageCms

from mirip_fast.data.images import decode_squares, load_rgb, to_array

# XYZ under D50 → linear sRGB; from the inverse of the primaries that sRGB's profiles have.
_SRGB = np.array(
    [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.7141]]
)


def as_srgb(xyz: NDArray[np.float64]) -> NDArray[np.float64]:
    """[…, 3] levels 0-255 of XYZ under D50 (IEC 61966-2-1)."""
    linear = np.clip(xyz @ np.linalg.inv(_SRGB).T, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def assert_seen(data: bytes, expected: NDArray[np.float64], *, stored: bool = True) -> None:
    seen = to_array(load_rgb(data)).astype(float)
    assert np.abs(seen - expected).max() < 2.5
    if stored:  # and the numbers as they are in the file are others
        assert np.abs(to_array(load_rgb(data, srgb=False)) - expected).max() > 10


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "HEIF"])
def test_wide_gamut_is_brought_to_srgb(kind: str) -> None:
    if kind == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    stream, lossless = io.BytesIO(), {"WEBP": {"lossless": True}, "HEIF": {"quality": -1}}
    settings = lossless.get(kind, {}) | (
        {"chroma": 444, "matrix_coefficients": 0} if kind == "HEIF" else {}
    )
    Image.fromarray(pixels).save(stream, kind, icc_profile=display_profile(), **settings)
    assert_seen(stream.getvalue(), as_srgb((pixels / 255) ** 2.2 @ P3.T))


def test_cmyk_is_what_its_profile_says() -> None:
    inks = np.array(list(product((0, 1), repeat=4)))
    a_b = np.random.default_rng(1).integers(-20, 20, (16, 2)) * (inks.sum(1) % 4 > 0)[:, None]
    lab = np.column_stack([100 - 25 * inks.sum(1), a_b]).astype(float)
    profile = printer_profile(lab.reshape(2, 2, 2, 2, 3))
    pixels = (255 * inks[None]).astype(np.uint8)
    data = encode(Image.fromarray(pixels, "CMYK"), "TIFF", icc_profile=profile)
    y = (np.round(lab[:, 0] * 2.55) / 2.55 + 16) / 116
    f = np.stack([y + lab[:, 1] / 500, y, y - lab[:, 2] / 200], axis=1)
    xyz = np.where(f > 6 / 29, f**3, (f - 4 / 29) * 3 * (6 / 29) ** 2) * (0.9642, 1, 0.8249)
    assert_seen(data, as_srgb(xyz)[None])
    # A whole picture as a JPEG, against littlecms on the whole array.
    cmyk = Image.radial_gradient("L").resize((64, 64))
    cmyk = Image.merge(
        "CMYK", [cmyk, cmyk.rotate(90), cmyk.transpose(Image.Transpose.TRANSPOSE), cmyk]
    )
    jpeg = encode(cmyk, "JPEG", quality=95, icc_profile=profile)
    whole = ImageCms.profileToProfile(
        Image.open(io.BytesIO(jpeg)), io.BytesIO(profile), ImageCms.createProfile("sRGB"),
        ImageCms.Intent.RELATIVE_COLORIMETRIC, "RGB", flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )  # fmt: skip
    assert whole is not None
    assert_seen(jpeg, np.asarray(whole, float))


def test_grey_and_transparency_have_profiles_too() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    light = as_srgb(((ramp / 255) ** 1.7)[..., None] * np.array((0.9642, 1, 0.8249)))
    profile = grey_profile(1.7)
    assert_seen(encode(Image.fromarray(ramp), "PNG", icc_profile=profile), light)
    clear = Image.merge("LA", [Image.fromarray(ramp), Image.new("L", (16, 16), 255)])
    assert_seen(encode(clear, "PNG", icc_profile=profile), light)
    palette = Image.new("RGB", (16, 16), (200, 40, 40)).quantize(4)
    expected = as_srgb((np.array((200, 40, 40)) / 255) ** 2.2 @ P3.T)
    keyed = encode(palette, "PNG", icc_profile=display_profile(), transparency=1)
    assert_seen(keyed, expected * np.ones((16, 16, 1)))
    sixteen = Image.fromarray(ramp.astype(np.uint16) << 8)
    assert_seen(encode(sixteen, "TIFF", icc_profile=profile), light)


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize(
    ("profile", "told"),
    [
        (SRGB, False),
        (SRGB[:300], True),
        (b"not a profile", True),
        (grey_profile(1.0), True),
        (printer_profile(np.zeros((2, 2, 2, 2, 3))), True),
        (display_profile().replace(b"RGB ", b"3CLR"), True),
    ],
    ids=["srgb", "cut", "nonsense", "grey", "cmyk", "three inks"],
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_profile_that_changes_nothing_or_cannot_be_used(
    kind: str, profile: bytes, told: bool
) -> None:
    picture = Image.effect_noise((40, 40), 80).convert("RGB").convert("HSV").convert("RGB")
    data = encode(picture, kind, icc_profile=profile)
    seen = decode_squares(data, (40,), "squash", draft=True)
    plain = decode_squares(encode(picture, kind), (40,), "squash", draft=True)
    assert to_array(seen.images[0]).tolist() == to_array(plain.images[0]).tolist()
    assert (seen.bad_profile, plain.bad_profile) == (told, False)


def test_a_cache_and_a_model_of_before_stay_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_data(Path("data"))
    assert run(["embed", "data", *TINY, "--colours", "stored"]) == 0
    (old,) = Path("cache").glob("*/store.json")
    (ledger,) = Path("cache").glob("*/datasets/*/dataset.json")
    info = json.loads(ledger.read_text())
    del info["embed"]["colours"]  # as earlier versions wrote it
    ledger.write_text(json.dumps(info))
    ledger.with_name("files.json").unlink()
    assert run(["train", "--head-only"]) == 0
    wide = encode(Image.new("RGB", (40, 40), (200, 40, 40)), "PNG", icc_profile=display_profile())
    broken = encode(Image.new("RGB", (40, 40), (20, 40, 200)), "PNG", icc_profile=b"broken")
    Path("new").mkdir()
    Path("new/wide.png").write_bytes(wide)
    Path("new/p.png").write_bytes(broken)
    capfd.readouterr()
    assert run(["rank", "new"]) == 0
    assert "profile" not in capfd.readouterr().err
    assert [*Path("cache").glob("*/store.json")] == [old]
    assert run(["embed", "new", *TINY]) == 0
    told = capfd.readouterr().err
    assert f"{old.parent} holds features made without the colour profiles of pictures" in told
    assert "1 picture is read without the colour profile in it" in told
    assert "p.png" in told
    assert len([*Path("cache").glob("*/store.json")]) == 2
    assert run(["embed", "data", *TINY, "--colours", "stored"]) == 0
    assert "40 already there" in capfd.readouterr().out
