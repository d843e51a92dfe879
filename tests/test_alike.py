"""`similar` and `duplicates`: the nearest works and the copies, over caches, folders and awkward input."""

from __future__ import annotations

import csv
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_cache import folder_of, picture, put, settings
from made_tables import images_of
from mirip_fast_cli.main import run

from mirip_fast.errors import DataError, StoreError
from mirip_fast.features import neighbours, phase_one
from mirip_fast.features.neighbours import WORK, open_gallery, stores_of
from mirip_fast.portfolio.similar import find_duplicates, find_similar

DEGREES = {"가.png": 0.0, "b 🎨.png": 5.0, "c.png": 30.0, "d.png": 100.0, "e.png": 102.0}
TINY = ["--backbone", "tiny-random", "--image-size", "28", "--workers", "0"]


def names(matches: pd.DataFrame) -> list[str]:
    return [path.name for path in matches["file"]]


def groups(done: tuple[pd.DataFrame, ...]) -> list[list[str]]:
    return [names(group) for _, group in done[0].groupby("group")]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_nearest_works_without_the_image_itself(work: Path) -> None:
    config = settings(work / "cache")
    put(config, folder_of(work / "art", DEGREES), DEGREES)
    (work / "art/copy.png").write_bytes((work / "art/가.png").read_bytes())
    put(config, work / "art", DEGREES | {"copy.png": 0.0})
    matches = find_similar(work / "art/가.png", config, 3)
    assert names(matches) == ["copy.png", "b 🎨.png", "c.png"]
    assert matches["exact"].tolist() == [True, False, False]
    expected = np.cos(np.radians([0, 5, 30]))
    np.testing.assert_allclose(matches["cosine"], expected, atol=1e-3)
    np.testing.assert_allclose(matches["distance"], 1 - expected, atol=1e-3)
    assert len(find_similar(work / "art/가.png", config, 99)) == 5


def test_a_content_whose_hash_ends_with_a_zero_is_compared_too(work: Path) -> None:
    config = settings(work / "cache")
    file = folder_of(work / "art", DEGREES) / "c.png"
    contents = (file.read_bytes() + number.to_bytes(4, "big") for number in range(10_000))
    file.write_bytes(next(c for c in contents if hashlib.sha256(c).digest()[-1] == 0))
    put(config, work / "art", DEGREES)
    assert "c.png" in names(find_similar(work / "art/가.png", config, 9))


def test_cached_works_are_compared_without_torch(work: Path) -> None:
    config = settings(work / "cache")
    put(config, folder_of(work / "art", DEGREES), DEGREES)
    code = (
        "import sys; from mirip_fast_cli.main import run;"
        "assert run(['similar', 'art/c.png']) == 0; assert run(['duplicates', 'art']) == 0;"
        "assert run(['duplicates']) == 0; assert run(['audit', 'art']) == 0;"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_an_image_that_is_not_cached_is_embedded_and_kept(work: Path) -> None:
    picture(work / "art/a.png", 5)
    picture(work / "art/b.png", 250)
    picture(work / "new.png", 5, compress_level=0)  # other bytes, the same picture
    assert run(["embed", "art", *TINY]) == 0
    assert run(["similar", "new.png", "--out", "found.csv"]) == 0
    rows = rows_of(work / "found.csv")
    assert [row["image_id"] for row in rows] == ["a.png", "b.png"]
    assert float(rows[0]["cosine"]) > 0.9999 and rows[0]["same_bytes"] == "0"
    code = (
        "import sys; from mirip_fast_cli.main import run; assert run(['similar', 'new.png']) == 0;"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_a_cache_that_can_not_be_written_to_still_answers(
    work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    picture(work / "art/a.png", 5)
    assert run(["embed", "art", *TINY]) == 0
    (store,) = (work / "cache").glob("*/store.json")
    before = sorted(path.name for path in store.parent.iterdir())
    picture(work / "new.png", 5, compress_level=0)
    config = settings(work / "cache")
    (work / "cache").chmod(0o500)
    lock = store.parent / "LOCK"
    lock.unlink(missing_ok=True)
    lock.mkdir()  # the store cannot be locked, whoever runs this test
    (cosine,) = find_similar(work / "new.png", config, 5)["cosine"]
    assert cosine > 0.9999 and "not kept" in capfd.readouterr().err
    (work / "cache").chmod(0o700)
    lock.rmdir()
    assert sorted(path.name for path in store.parent.iterdir()) == sorted({*before} - {"LOCK"})


def test_several_caches(work: Path) -> None:
    one, two = settings(work / "one"), settings(work / "two")
    put(one, folder_of(work / "art", {"a.png": 0, "b.png": 50}), {"a.png": 0, "b.png": 50})
    for number, name in enumerate(("c.png", "d.png"), start=20):
        picture(work / "more" / name, number)
    put(two, work / "more", {"c.png": 4, "d.png": 200})
    assert names(find_similar(work / "art/a.png", one, 9)) == ["b.png"]
    matches = find_similar(work / "art/a.png", one, 9, caches=[work / "two"])
    assert names(matches) == ["c.png", "b.png", "d.png"]
    assert groups(find_duplicates([], one)) == []
    assert groups(find_duplicates([], one, caches=[work / "two"])) == [["a.png", "c.png"]]
    assert groups(find_duplicates([work / "art"], one, caches=[work / "two"])) == [
        ["a.png", "c.png"]
    ]


def test_caches_with_other_features_are_refused(
    work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    one, two = settings(work / "one"), settings(work / "two", size=42)
    put(one, folder_of(work / "art", DEGREES), DEGREES)
    put(two, work / "art", DEGREES)
    with pytest.raises(StoreError, match="cannot be compared .*image_size: 28 ≠ 42"):
        find_similar(work / "art/c.png", one, 3, caches=[work / "two"])
    assert run(["duplicates", "--cache-dir", "one", "--cache", "two"]) == 1
    assert "image_size: 28 ≠ 42" in capfd.readouterr().err
    assert run(["duplicates", "--cache-dir", "one", "--cache", "nowhere"]) == 1
    assert "no data set is embedded in this cache" in capfd.readouterr().err


def test_only_one_data_set_is_searched_on_request(work: Path) -> None:
    config = settings(work / "cache")
    put(config, folder_of(work / "art", DEGREES), DEGREES)
    picture(work / "more/x.png", 77)
    put(config, work / "more", {"x.png": 1})
    assert names(find_similar(work / "art/가.png", config, 1)) == ["x.png"]
    assert "x.png" not in names(find_similar(work / "art/가.png", config, 9, data=work / "art"))


def test_duplicates_of_a_folder(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = settings(work / "cache")
    degrees = DEGREES | {"copy.png": 30.0, "=f.png": 101.0}
    folder_of(work / "art", degrees)
    shutil.copy(work / "art/c.png", work / "art/copy.png")
    (work / "art/broken.png").write_bytes(b"no picture")
    put(config, work / "art", degrees)
    done = find_duplicates([work / "art"], config)
    assert groups(done) == [
        ["=f.png", "d.png", "e.png"],
        ["b 🎨.png", "가.png"],
        ["c.png", "copy.png"],
    ]
    copies, searched, failures = done
    assert searched == 7 and [path.name for path, _ in failures] == ["broken.png"]
    exact, near = copies.iloc[5], copies.iloc[3]
    assert exact["exact"] and exact["distance"] == 0 and exact["nearest"].name == "copy.png"
    assert not near["exact"] and near["cosine"] == pytest.approx(np.cos(np.radians(5)), abs=1e-3)
    assert run(["duplicates", "art", "--top", "1", "--near-cosine", "0.999"]) == 0
    out, err = capfd.readouterr()
    assert "… and 1 more groups in duplicates.csv" in out and "broken.png" in err
    rows = rows_of(work / "duplicates.csv")
    assert [row["kind"] for row in rows] == ["near", "near", "near", "exact", "exact"]
    assert rows[0]["image_id"] == "'=f.png"


def test_duplicates_embeds_what_is_missing(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name, level in (("a.png", 9), ("b.png", 0), ("c.png", 9)):
        picture(work / "art" / name, 200 if name == "c.png" else 3, compress_level=level)
    assert run(["duplicates", "art", *TINY, "--near-cosine", "0.9999"]) == 0
    assert "3 files: 1 group, 1 file more than works" in capfd.readouterr().out
    assert [row["image_id"] for row in rows_of(work / "duplicates.csv")] == ["a.png", "b.png"]
    # Nothing but the cache is needed the second time, and no data set was left behind to train on.
    assert not list((work / "cache").glob("*/datasets"))


def test_what_is_said_when_there_is_nothing(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for command in (["similar", "a.png"], ["duplicates"]):
        assert run(command) == 1
        assert "run `mirip-fast embed data/` first" in capfd.readouterr().err
    config = settings(work / "cache")
    put(config, folder_of(work / "art", {"a.png": 1}), {"a.png": 1})
    assert run(["similar", "art/a.png"]) == 0
    assert "There is no other work in the cache" in capfd.readouterr().out
    assert find_duplicates([], config)[0].empty
    (work / "broken.png").write_bytes(b"no picture")
    for name in ("broken.png", "absent.png"):
        with pytest.raises(DataError, match=name):
            find_similar(work / name, config, 3)
    assert run(["similar", "art"]) == 1
    (work / "bad").mkdir()
    shutil.copy(work / "broken.png", work / "bad/x.png")
    with pytest.raises(DataError, match=r"none of 1 image could be read \(first: .*x.png"):
        find_duplicates([work / "bad"], config)
    assert "Traceback" not in capfd.readouterr().err


def test_a_file_that_is_gone_is_said_to_be(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = settings(work / "cache")
    put(config, folder_of(work / "art", DEGREES), DEGREES)
    (work / "art/b 🎨.png").unlink()
    assert run(["similar", "art/가.png", "--top", "1"]) == 0
    assert "art/b 🎨.png  (gone)" in capfd.readouterr().out


def test_all_images_alike(work: Path) -> None:
    degrees = {f"{i}.png": 9.0 for i in range(30)}
    config = settings(work / "cache")
    put(config, folder_of(work / "art", degrees), degrees)
    copies, *_ = find_duplicates([work / "art"], config)
    assert len(copies) == 30 and (copies["group"] == 1).all() and (copies["distance"] < 1e-6).all()
    assert len(find_similar(work / "art/3.png", config, 99)) == 29


def test_a_large_gallery_is_grouped_through_inverted_lists(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faiss")
    monkeypatch.setattr(neighbours, "FLAT_ROWS", 60)
    degrees = {f"{i}.png": 4.0 * i for i in range(80)}
    config = settings(work / "cache")
    put(config, folder_of(work / "art", degrees), degrees)
    assert sorted(names(find_similar(work / "art/7.png", config, 2))) == ["6.png", "8.png"]
    assert groups(find_duplicates([], config)) == [sorted(degrees)]


def test_works_without_features_are_left_out(work: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = settings(work / "cache")
    dataset = put(
        config, folder_of(work / "art", {"a.png": 1, "b.png": 2}), {"a.png": 1, "b.png": 2}
    )
    sha = [entry.sha256 or b"" for entry in images_of(dataset.images())]
    known = [(str(work / "a"), "a", sha[0], None), (str(work / "x"), "x", b"?" * 32, None)]
    works = pd.DataFrame(known, columns=WORK)
    gallery = open_gallery(works, stores_of([dataset]), "cls.28")
    assert gallery.hashes == (sha[0],) and "1 image without features" in caplog.text
    with pytest.raises(StoreError, match="mirip-fast embed"):
        open_gallery(works[1:], stores_of([dataset]), "cls.28")


def test_a_machine_without_the_precision_of_the_cache(
    work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    picture(work / "art/a.png", 5)
    assert run(["embed", "art", *TINY]) == 0
    (store,) = (work / "cache").glob("*/store.json")
    gpu = phase_one.FeatureStore.open(store.parent)
    gpu.fingerprint["precision"] = "bf16"  # as if it had been made on a GPU
    picture(work / "new.png", 5, compress_level=0)
    config = settings(work / "cache")
    outcomes, _, _ = phase_one.features_of_files(
        [work / "new.png"], config.embed, config, like=gpu, series="cls.28"
    )
    assert outcomes["status"].tolist() == ["embedded"]
    assert "holds bf16 features" in capfd.readouterr().err
    config.embed.resize = "pad"
    with pytest.raises(StoreError, match="resize: squash ≠ pad"):
        picture(work / "new2.png", 6)
        phase_one.features_of_files(
            [work / "new2.png"], config.embed, config, like=gpu, series="cls.28"
        )
