"""The page of a ranking, as a file: what it holds, what it refuses, how large it is."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import re
from pathlib import Path
from urllib.parse import unquote_to_bytes

import numpy as np
import pytest
from made_page import HOSTILE, TIERS, check_parts, data_of, made_page, pictures
from mirip_fast_cli.main import run
from PIL import Image

from mirip_fast.evaluation.text_table import printable
from mirip_fast.portfolio import page as page_module
from mirip_fast.portfolio.page import density
from mirip_fast.portfolio.thumbnails import make_thumbnails
from mirip_fast.ranking.held_out import SOURCES

PARTS = Path(page_module.__file__).parent / "page_files"


@pytest.fixture
def hostile_page(tmp_path: Path) -> Path:
    pictures(tmp_path / "works", HOSTILE)
    failures = [(str(tmp_path / "works" / "<b>broken\n</b>.png"), "no </script> picture")]
    made_page(tmp_path / "works", HOSTILE, tmp_path / "out" / "report.html", failures=failures)
    return tmp_path / "out" / "report.html"


def test_no_name_gets_out_of_the_data(hostile_page: Path):
    text = hostile_page.read_text(encoding="utf-8")
    assert text.count("<script") == 2 + len(HOSTILE)  # the data, the program, the pictures
    assert text.count("</script>") == 2 + len(HOSTILE)
    assert "window.hacked" not in re.sub(r'id="data">.*', "", text)
    inside = re.search(r'id="data">(.*?)</script>', text, re.S)[1]
    assert inside.isascii() and not set("<>&\n\u2028") & set(inside)
    data = data_of(hostile_page)
    assert [work["name"] for work in data["works"]] == [printable(name) for name in HOSTILE]
    assert data["failures"] == [{"name": "<b>broken\\n</b>.png", "reason": "no </script> picture"}]


def test_originals_are_addressed_from_the_page_to_the_last_byte(hostile_page: Path, tmp_path: Path):
    for work, name in zip(data_of(hostile_page)["works"], HOSTILE, strict=True):
        address = work["original"]
        assert re.fullmatch(r"\./[A-Za-z0-9%._~/-]+", address)
        there = unquote_to_bytes(address)
        assert (str(hostile_page.parent).encode() + b"/" + there).endswith(
            b"/../works/" + name.encode("utf-8", "surrogateescape")
        )


def test_the_policy_names_the_script_and_the_style_that_are_there(hostile_page: Path):
    text = hostile_page.read_text(encoding="utf-8")
    policy = html.unescape(re.search(r'Security-Policy" content="(.*?)"', text)[1])
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'" and "unsafe" not in policy and "http" not in policy
    for rule, pattern in (
        ("script-src", r'<script type="module">(.*?)</script>'),
        ("style-src", r"<style>(.*?)</style>"),
    ):
        digest = hashlib.sha256(re.search(pattern, text, re.S)[1].encode()).digest()
        assert rules[rule] == f"'sha256-{base64.b64encode(digest).decode()}'"


def test_both_languages_say_the_same_things_and_every_word_is_used():
    check_parts("page_files")
    words = json.loads((PARTS / "words.json").read_text(encoding="utf-8"))
    english = words["en"]
    evaluation = PARTS.parent / "evaluation_files" / "words.json"
    for language, said in json.loads(evaluation.read_text(encoding="utf-8")).items():
        for source in SOURCES:  # of the scores that all numbers rest on
            assert f"source_{source}" in said and f"noteSource_{source}" in words[language]
    program = "".join(path.read_text(encoding="utf-8") for path in PARTS.glob("*.[jh]*[sl]"))
    asked = set(re.findall(r'say(?:Count)?\(\s*"(\w+)"', program))
    asked |= set(re.findall(r'data-say(?:-label|-hint)?="(\w+)"', program))
    assert asked <= {key.rpartition("_")[0] if "_" in key else key for key in english}
    for key in english:
        assert re.search(rf'["`]{re.escape(key.partition("_")[0])}["`_:$]|\b{key}:', program), key


def test_what_is_unknown_is_null(tmp_path: Path):
    pictures(tmp_path / "works", ["a.png", "b.png"])
    given = {"year": [2021.0, float("nan")], "note": ["", "좋음"], "sold": [None, True]}
    made_page(
        tmp_path / "works", ["a.png", "b.png"], tmp_path / "report.html", known=False, given=given
    )
    data = data_of(tmp_path / "report.html")
    work, other = data["works"]
    assert work["given"] == [["year", "2021.0"]]  # an empty cell is not shown
    assert other["given"] == [["note", "좋음"], ["sold", "True"]]
    assert work["low"] is work["high"] is work["percent"] is work["chances"] is None
    assert data["curves"] is data["sharpness"] is data["source"] is None
    assert data["remarks"] == ["unknown: no <file>"] and data["noIntervals"] == "unknown: no heads"


def test_numbers_and_held_out_scores_of_the_page(tmp_path: Path):
    names = [f"{i}.png" for i in range(9)]
    pictures(tmp_path / "works", names)
    done = made_page(tmp_path / "works", names, tmp_path / "report.html")
    data = data_of(tmp_path / "report.html")
    assert (data["source"], data["heldOut"], data["tiers"]) == ("out-of-fold", 200, list(TIERS))
    curves = data["curves"]["tiers"]
    assert [(c["name"], c["count"]) for c in curves] == [(name, 50) for name in TIERS]
    assert all(max(c["curve"]) == 1 and len(c["ticks"]) == 50 for c in curves)
    assert all(w["low"] <= w["rank"] <= w["high"] for w in data["works"])
    assert all(sum(w["chances"]) == pytest.approx(1, abs=1e-3) for w in data["works"])
    assert done == [tmp_path / "report.html"]


def test_density_is_scipys_with_silvermans_width():
    from scipy.stats import gaussian_kde

    values = np.sort(np.random.default_rng(0).gamma(2, size=80))
    grid = np.linspace(-1, 9, 60)
    quarter, three = np.percentile(values, [25, 75])
    width = 0.9 * min(values.std(ddof=1), (three - quarter) / 1.34) * 80**-0.2
    expected = gaussian_kde(values, width / values.std(ddof=1))(grid)
    np.testing.assert_allclose(density(values, grid), expected / expected.max(), rtol=1e-9)
    assert density(values[:1], grid).max() == 0
    same = density(np.full(5, 3.0), grid)
    assert grid[same.argmax()] == pytest.approx(3, abs=0.1) and same.max() == 1


def test_thumbnails_are_upright_small_and_within_their_bytes(tmp_path: Path):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (300, 600, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    noise.save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGBA", (40, 20), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    names = ["turned.jpg", "clear.png", "broken.png"]
    paths = [tmp_path / name for name in names]
    turned, clear, broken = make_thumbnails(paths, 200, 100_000, workers=0)
    picture = Image.open(io.BytesIO(turned))
    assert picture.format == "WEBP" and picture.size == (100, 200) and not picture.getexif()
    white = Image.open(io.BytesIO(clear))
    assert white.size == (40, 20)  # never larger than it is
    assert white.getpixel((5, 5)) == (255, 255, 255)
    assert broken == b""
    (tight,) = make_thumbnails(paths[:1], 200, len(turned) - 1, workers=0)
    assert Image.open(io.BytesIO(tight)).size == (70, 140) and len(tight) < len(turned)
    (least,) = make_thumbnails(paths[:1], 200, 10, workers=0)
    assert Image.open(io.BytesIO(least)).height == 100
    in_processes = list(make_thumbnails(paths, 200, 100_000, workers=1))
    assert in_processes == [turned, clear, broken]


def test_too_many_pictures_lie_beside_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    names = [f"{i}.png" for i in range(6)]
    pictures(tmp_path, names)
    monkeypatch.setattr(page_module, "PAGE_BYTES", 1000)
    page = tmp_path / "my report #1.html"
    done = made_page(tmp_path, names, page)
    folder = tmp_path / "my report #1_files"
    assert done == [page, folder]
    assert page.stat().st_size < 150_000 and len(list(folder.iterdir())) == 6
    assert not any(path.suffix for path in folder.iterdir())  # not taken for works
    data = data_of(page)
    assert data["pictures"] == "my%20report%20%231_files"
    assert all((folder / work["picture"]).is_file() for work in data["works"])
    (folder / "mine.txt").write_text("kept")
    made_page(tmp_path, names[:2], page)
    assert len(list(folder.iterdir())) == 3 and (folder / "mine.txt").is_file()


def test_rank_writes_a_page_and_explains_the_first_works(headed: Path, capfd):
    works = headed / "new works"
    pictures(works, ["가.png", "b.png", "c.png"])
    (works / "copy.png").write_bytes((works / "b.png").read_bytes())
    (works / "bad.png").write_bytes(b"nothing")
    asked = ["rank", "new works", "--workers", "0", "--top", "1", "--explain", "2", "--detail", "2"]
    assert run([*asked, "--html", "site/report.html"]) == 0
    assert "report.html" in capfd.readouterr().out
    data = data_of(Path("site/report.html"))
    assert data["title"] == "new works" and len(data["works"]) == 4
    assert [failure["name"] for failure in data["failures"]] == ["bad.png"]
    copy, original = ({w["name"]: w for w in data["works"]}[name] for name in ("copy.png", "b.png"))
    assert copy["stack"] == original["stack"] is not None
    assert copy["exact"] and copy["picture"] == original["picture"]
    first, second, *rest = data["works"]
    assert first["map"] and second["map"] and not any(work["map"] for work in rest)
    assert first["likes"] and all(like["picture"] for like in first["likes"])
    assert run(asked) == 2
    assert "--html" in capfd.readouterr().err


def test_a_page_in_place_of_a_folder_is_refused_before_anything_is_done(
    tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "site").mkdir()
    (tmp_path / "file").write_text("")
    assert run(["rank", "anything", "--html", "site"]) == 1
    assert "name a file in it" in capfd.readouterr().err
    assert run(["rank", "anything", "--html", "file/x/report.html"]) == 1
    assert "is a file, not a folder" in capfd.readouterr().err
