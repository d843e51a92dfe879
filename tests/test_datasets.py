"""Embedded data sets: the ledger beside the store, and which data set training takes."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_tables import images_of
from PIL import Image

from mirip_fast.config import Config
from mirip_fast.errors import RunNotFoundError, StoreError
from mirip_fast.features.datasets import Dataset, find_datasets, newest_graded
from mirip_fast.features.maintenance import describe_cache
from mirip_fast.features.phase_one import EmbedDone, embed_data
from mirip_fast.features.recipe import View
from mirip_fast.files import list_files, write_csv


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path("cache")


def settings(**embed: object) -> Config:
    config = Config()
    config.embed.backbone, config.embed.image_size, config.embed.workers = "tiny-random", 28, 0
    config.embed.layers = "last"
    config.runtime.device = "cpu"
    for name, value in embed.items():
        setattr(config.embed, name, value)
    return config


def put(source: Path, *, limit: int | None = None, **options: object) -> EmbedDone:
    return embed_data(source, settings(**options), limit=limit)


def pictures(folder: Path, n: int = 3) -> Path:
    folder.mkdir(parents=True)
    for i in range(n):
        Image.new("RGB", (20, 20), (i * 20, 0, 99)).save(folder / f"{i}.png")
    return folder


def csv_rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_ledger_says_what_became_of_every_input(graded_folder: Path, cache: Path) -> None:
    images = graded_folder / "images"
    (images / "work_03.png").write_text("no picture")
    (images / "work_05.png").write_bytes((images / "work_04.png").read_bytes())
    (images / "work_07.png").unlink()
    done = put(graded_folder, tta="flip")
    counts = done.summary
    assert [*counts.values()] == [40, 37, 0, 1, 2, 0]
    assert done.dataset.store_path.parent == cache
    rows = csv_rows(done.dataset.folder / "manifest.csv")
    assert [row["image_id"] for row in rows] == [f"id{i:02d}" for i in range(40)]
    assert [row["status"] for row in rows].count("embedded") == 37
    assert rows[5]["status"] == "duplicate" and rows[5]["sha256"] == rows[4]["sha256"]
    assert rows[5]["tier"] == "A" and rows[5]["row"] == "7"
    failures = csv_rows(done.dataset.failures_csv)
    assert [Path(row["path"]).name for row in failures] == ["work_03.png", "work_07.png"]
    assert all(row["reason"] for row in failures) and set(failures[0]) == {"path", "reason"}
    info = done.dataset.info
    assert (info["images"], info["failed"], info["graded"], info["limit"]) == (40, 2, True, None)
    assert done.dataset.views() == (View(28), View(28, True))


def test_entries_are_read_as_they_were_written(graded_folder: Path, cache: Path) -> None:
    text = (graded_folder / "metadata.csv").read_text(encoding="utf-8").splitlines()
    text[0] += ",tier_score,group"
    text[1:] = [f"{line},{9.5 - i / 7!r},g{i // 2}" for i, line in enumerate(text[1:])]
    text[3] = 'id02,"odd, ""name""\n새 줄 🎨.png",B,회화,0.1,'
    (graded_folder / "images" / "work_02.png").rename(
        graded_folder / "images" / 'odd, "name"\n새 줄 🎨.png'
    )
    (graded_folder / "metadata.csv").write_text("\n".join(text) + "\n", encoding="utf-8")
    done = put(graded_folder)
    entries = images_of(done.dataset.images())
    assert done.summary["failed"] == 0 and len(entries) == 40
    first, odd = entries[0], entries[2]
    assert (first.tier, first.tier_score, first.group) == (0, 9.5, "g0")
    assert entries[1].tier_score == 9.5 - 1 / 7  # to the last bit
    assert first.own == {"department": "회화"} and first.path.is_absolute()
    assert odd.path.name == 'odd, "name"\n새 줄 🎨.png' and odd.path.is_file()
    assert odd.group is None and odd.tier == 2 and entries[2].status == "embedded"
    assert len({entry.sha256 for entry in entries}) == 40


def test_a_ledger_of_an_older_version_is_read(graded_folder: Path, cache: Path) -> None:
    """It has ``path``, and what else the CSV file says as JSON; a column may be called as one of ours."""
    text = (graded_folder / "metadata.csv").read_text(encoding="utf-8").splitlines()
    text = [
        text[0] + ",status,given_file,memo",
        *(f"{line},dried,f,{i}" for i, line in enumerate(text[1:])),
    ]
    (graded_folder / "metadata.csv").write_text("\n".join(text) + "\n", encoding="utf-8")
    dataset = put(graded_folder).dataset
    kept = dataset.images()
    assert [*kept.columns[-4:]] == ["department", "given_status", "given_given_file", "memo"]
    assert images_of(kept)[1].own == {
        "department": "회화", "status": "dried", "given_file": "f", "memo": "1",
    }  # fmt: skip
    rows = csv_rows(dataset.folder / "manifest.csv")
    own = ("department", "given_status", "given_given_file", "memo")
    for row, image in zip(rows, images_of(kept), strict=True):
        row["path"] = row.pop("file")
        row["extra"] = json.dumps(image.own)
    write_csv(dataset.folder / "manifest.csv", [n for n in rows[0] if n not in own], rows)
    assert dataset.images().equals(kept)


def test_a_name_that_is_no_utf8_is_kept(cache: Path, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "plain")
    try:
        (folder / "0.png").rename(folder / "caf\udce9.png")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    dataset = put(folder).dataset
    assert {entry.path.name for entry in images_of(dataset.images())} == {
        "1.png", "2.png", "caf\udce9.png",
    }  # fmt: skip


def test_a_damaged_ledger_is_told(graded_folder: Path, cache: Path) -> None:
    dataset = put(graded_folder).dataset
    manifest = dataset.folder / "manifest.csv"
    text = manifest.read_text(encoding="utf-8")
    for damage in (text.replace(",S,", ",Q,", 1), text.replace("image_id", "x", 1), text[:200]):
        manifest.write_text(damage, encoding="utf-8")
        with pytest.raises(StoreError, match="mirip-fast embed") as error:
            images_of(dataset.images())
        assert "manifest.csv" in str(error.value)
    manifest.unlink()
    with pytest.raises(StoreError, match="mirip-fast embed"):
        images_of(dataset.images())


def test_a_damaged_description_is_told(graded_folder: Path, cache: Path) -> None:
    dataset = put(graded_folder).dataset
    path = dataset.folder / "dataset.json"
    whole = path.read_text(encoding="utf-8")
    for damage in (whole[:50], "[]"):
        path.write_text(damage, encoding="utf-8")
        with pytest.raises(StoreError, match=r"dataset\.json"):
            newest_graded(cache)


def test_a_trial_takes_the_first_images(graded_folder: Path, cache: Path) -> None:
    done = put(graded_folder, limit=5)
    assert done.summary["inputs"] == 5 and done.dataset.info["limit"] == 5
    whole = put(graded_folder)
    assert (whole.summary["embedded"], whole.summary["present"]) == (35, 5)
    assert whole.dataset == done.dataset and whole.dataset.info["limit"] is None
    assert put(graded_folder, limit=1000).summary["inputs"] == 40


def test_the_newest_data_set_with_grades_is_taken(
    graded_folder: Path, cache: Path, tmp_path: Path
) -> None:
    with pytest.raises(RunNotFoundError, match="mirip-fast embed data/"):
        newest_graded(cache)
    plain = pictures(tmp_path / "plain")
    put(plain)
    with pytest.raises(RunNotFoundError, match="tier column") as error:
        newest_graded(cache)
    assert str(plain) in str(error.value)
    first = put(graded_folder).dataset
    second = put(graded_folder, image_size=42).dataset
    put(plain, image_size=42)
    assert newest_graded(cache).folder == second.folder != first.folder
    put(graded_folder)
    assert newest_graded(cache).folder == first.folder
    assert len(find_datasets(cache)) == 4


def test_newest_is_meant_in_time_not_in_text(graded_folder: Path, cache: Path) -> None:
    first, second = put(graded_folder).dataset, put(graded_folder, image_size=42).dataset
    for dataset, time in (
        (first, "2026-03-01T09:00:00+09:00"),
        (second, "2026-03-01T01:00:00+00:00"),
    ):
        content = {**dataset.info, "embedded_at": time}
        (dataset.folder / "dataset.json").write_text(json.dumps(content))
        list_files(dataset.folder)
    assert newest_graded(cache).folder == second.folder


NAMES = ["graded", "graded/metadata.csv", "cache/../graded/", "link", "link/metadata.csv"]


@pytest.mark.parametrize("embedded_as", NAMES)
def test_a_data_set_is_found_by_any_of_its_names(
    graded_folder: Path, cache: Path, embedded_as: str
) -> None:
    Path("link").symlink_to(graded_folder)
    cache.mkdir()
    dataset = put(Path(embedded_as)).dataset
    for asked_as in NAMES:
        assert newest_graded(cache, Path(asked_as)) == dataset
        assert newest_graded(cache, Path(asked_as).absolute()) == dataset


def test_a_folder_is_not_taken_for_what_lies_in_it(
    graded_folder: Path, cache: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "all"
    for name in ("one", "two"):
        pictures(folder / name / "S")
        pictures(folder / name / "A", 2)
        put(folder / name)
    assert newest_graded(cache, folder / "one").source == folder / "one"
    for other in (folder, graded_folder, tmp_path / "absent"):
        with pytest.raises(RunNotFoundError, match="not embedded") as error:
            newest_graded(cache, other)
        assert f"mirip-fast embed {other}" in str(error.value)


def test_two_data_sets_share_a_store_but_no_ledger(
    graded_folder: Path, cache: Path, tmp_path: Path
) -> None:
    other = tmp_path / "moved" / "graded"
    first = put(graded_folder).dataset
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "graded").symlink_to(pictures(tmp_path / "elsewhere"))
    second = put(other).dataset
    assert first.store_path == second.store_path and first.folder != second.folder
    assert len(first.images()) == 40 and len(second.images()) == 3
    (info,) = describe_cache(cache)
    assert {s["name"]: s["rows"] for s in info["series"]} == {"cls.28": 43, "mean.28": 43}
    assert [dataset["backbone"] for dataset in info["datasets"]] == ["tiny-random"] * 2


def test_what_to_type_to_embed_it_again(graded_folder: Path, cache: Path) -> None:
    odd = graded_folder.rename(graded_folder.parent / "it's graded")
    dataset = put(odd, tta="flip", decode="exact").dataset
    words = shlex.split(dataset.embed_command())
    assert words[:3] == ["mirip-fast", "embed", str(odd)] or words[2] == f"{odd}/metadata.csv"
    assert words[3:] == [
        "--backbone", "tiny-random", "--image-size", "28", "--layers", "last", "--tta", "flip", "--decode", "exact",
        "--workers", "0",
    ]  # fmt: skip
    trial = put(odd, limit=3, cache_dir="other place").dataset
    assert "--cache-dir 'other place'" in trial.embed_command()
    assert trial.embed_command().endswith("--limit 3")


def test_a_dataset_knows_its_store(tmp_path: Path) -> None:
    dataset = Dataset(tmp_path / "abc" / "datasets" / "data-1")
    assert dataset.store_path == tmp_path / "abc"


@pytest.fixture
def read_only(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, nothing can be written or deleted in the cache."""

    def forbid() -> None:
        real_open, real_unlink, real_mkdir = Path.open, Path.unlink, Path.mkdir

        def refuse(path: Path) -> None:
            if path.resolve().is_relative_to(cache.resolve()):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

        def opened(path: Path, mode: str = "r", *args: Any, **more: Any) -> Any:
            if "w" in mode:
                refuse(path)
            return real_open(path, mode, *args, **more)

        def unlink(path: Path, missing_ok: bool = False) -> None:
            refuse(path)
            real_unlink(path, missing_ok)

        def mkdir(
            path: Path, mode: int = 0o777, parents: bool = False, exist_ok: bool = False
        ) -> None:
            if not path.exists():
                refuse(path)
            real_mkdir(path, mode, parents, exist_ok)

        monkeypatch.setattr(Path, "open", opened)
        monkeypatch.setattr(Path, "unlink", unlink)
        monkeypatch.setattr(Path, "mkdir", mkdir)

    return forbid


def test_unchanged_data_need_no_writing(
    graded_folder: Path,
    cache: Path,
    read_only: Callable[[], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    (graded_folder / "images" / "work_03.png").write_text("no picture")
    (graded_folder / "images" / "work_05.png").write_bytes(
        (graded_folder / "images" / "work_04.png").read_bytes()
    )
    first = put(graded_folder)
    before = (first.dataset.folder / "dataset.json").read_bytes()
    read_only()
    again = put(graded_folder, embed_batch_size=7)  # which changes no result
    assert (again.summary["embedded"], again.summary["present"], again.summary["failed"]) == (
        0,
        38,
        1,
    )
    assert again.dataset == first.dataset
    assert (first.dataset.folder / "dataset.json").read_bytes() == before
    (said,) = (r.getMessage() for r in caplog.records if "cannot be written" in r.getMessage())
    assert "manifest.csv cannot be written (Read-only file system)" in said and "--data" in said


@pytest.mark.parametrize("change", ["grade", "limit", "views", "damage", "another"])
def test_changed_data_that_can_not_be_written_are_told(
    graded_folder: Path, cache: Path, tmp_path: Path, read_only: Callable[[], None], change: str
) -> None:
    put(graded_folder, tta="flip")
    dataset = put(graded_folder).dataset
    limit, options, data, file = None, {}, graded_folder, "manifest.csv"
    if change == "grade":
        text = (graded_folder / "metadata.csv").read_text(encoding="utf-8")
        (graded_folder / "metadata.csv").write_text(text.replace(",B", ",S", 1), encoding="utf-8")
    elif change == "limit":
        limit = 5
    elif change == "views":
        options = {"tta": "flip"}
    elif change == "damage":
        (dataset.folder / "manifest.csv").write_text("half")
    else:
        data, file = tmp_path / "mine", "mine-"  # the folder of its ledger
        data.mkdir()
        for name in ("work_00.png", "work_01.png"):
            (data / name).write_bytes((graded_folder / "images" / name).read_bytes())
    read_only()
    with pytest.raises(StoreError) as error:
        put(data, limit=limit, **options)
    text = str(error.value)
    assert re.search(rf"{file}\S* cannot be written \(Read-only file system\)", text), text
    assert "--cache-dir" in text and ".partial" not in text
