"""Looking after caches: what is said of them, verified, repaired, pruned, exported and joined.

The stores are real ones, embedded with the built-in backbone, once; each test spoils a copy.
"""

from __future__ import annotations

import csv
import errno
import json
import os
import shlex
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import h5py
import numpy as np
import pytest
from made_tables import images_of
from mirip_fast_cli.main import run
from PIL import Image

from mirip_fast.config import Config
from mirip_fast.errors import DiskFullError, RunNotFoundError, StoreError, StoreLockedError
from mirip_fast.features.canary import write_canary
from mirip_fast.features.datasets import Dataset, find_datasets, newest_dataset
from mirip_fast.features.maintenance import (
    KEPT_DAYS,
    StorePlan,
    StoreReport,
    carry_out,
    describe_cache,
    export_dataset,
    merge_caches,
    plan_prune,
    repair_store,
    verify_cache,
)
from mirip_fast.features.phase_one import EmbedDone, embed_data
from mirip_fast.features.shards import SeriesSpec, shard_name
from mirip_fast.features.store import FeatureStore
from mirip_fast.features.store_writer import StoreWriter
from mirip_fast.files import list_files, partial_path

N = 12
NOW: dict[str, Any] = {"older_than": 0}


def embed(source: Path, cache: Path, *, limit: int | None = None, **options: object) -> EmbedDone:
    config = Config()
    config.embed.backbone, config.embed.image_size, config.embed.workers = "tiny-random", 28, 0
    config.embed.layers = "last"
    config.embed.cache_dir, config.runtime.device = str(cache), "cpu"
    for name, value in options.items():
        setattr(config.embed, name, value)
    return embed_data(source, config, limit=limit)


def draw(folder: Path, numbers: range, tiers: str = "SA") -> Path:
    for n in numbers:
        path = folder / tiers[n % len(tiers)] / f"그림 {n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(n)
        Image.fromarray(rng.integers(0, 255, (20, 20, 3), np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``data`` with N pictures, one that is none and one twice; ``cache`` with its features."""
    root = tmp_path_factory.mktemp("made")
    draw(root / "data", range(N))
    (root / "data" / "S" / "none.png").write_text("no picture")
    shutil.copy(root / "data" / "S" / "그림 0.png", root / "data" / "A" / "twin.png")
    embed(root / "data", root / "cache", tta="flip")
    return root


@pytest.fixture
def cache(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, in the working folder; ``data`` is where it was embedded from."""
    shutil.copytree(made / "cache", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    return Path("cache")


@pytest.fixture
def data(made: Path) -> Path:
    return made / "data"


def the_store(cache: Path) -> FeatureStore:
    (file,) = cache.glob("*/store.json")
    return FeatureStore.open(file.parent)


def features(cache: Path, dataset: Dataset) -> np.ndarray:
    """Every feature of a data set, side by side, in its order."""
    store = FeatureStore.open(dataset.store_path)
    hashes = [e.sha256 for e in images_of(dataset.images()) if e.status != "failed"]
    parts = [store.read(s, store.rows(s, hashes)) for s in dataset.series()]
    return np.concatenate([part.reshape(len(hashes), -1) for part in parts], axis=1)


def flip(store: FeatureStore, series: str, slot: int, part: str, bit: int = 1) -> None:
    shard = store.shards(series)[0]
    at, size = {
        "features": (shard.features_at, shard.spec.row_bytes),
        "sha256": (shard.sha256_at, 32),
        "checksum": (shard.checksum_at, 8),
    }[part]
    with shard.path.open("r+b") as stream:
        stream.seek(at + slot * size + 2)
        byte = stream.read(1)[0]
        stream.seek(at + slot * size + 2)
        stream.write(bytes([byte ^ bit]))


def verified(cache: Path) -> StoreReport:
    (report,) = verify_cache(cache)
    return report


def image_at(cache: Path, series: str, slot: int) -> set[Path]:
    with h5py.File(the_store(cache).shards(series)[0].path) as file:
        sha = file["sha256"][slot].tobytes()
    (dataset,) = find_datasets(cache)
    return {e.path for e in images_of(dataset.images()) if e.sha256 == sha}


# ---- info


def test_info_tells_what_there_is(cache: Path, data: Path) -> None:
    (store,) = describe_cache(cache)
    assert {s["name"]: (s["rows"], s["shape"]) for s in store["series"]} == dict.fromkeys(
        ("cls.28", "cls.28-flip", "mean.28", "mean.28-flip"), (N, (64,))
    )
    (dataset,) = store["datasets"]
    assert [dataset[key] for key in ("source", "images", "failed", "graded")] == [
        str(data),
        N + 2,
        1,
        True,
    ]
    assert (store["unused_rows"], store["problem"], store["writing"]) == (0, None, None)
    assert store["bytes"] == sum(f.stat().st_size for f in store["path"].rglob("*") if f.is_file())
    with StoreWriter(the_store(cache), command="embed elsewhere"):
        (busy,) = describe_cache(cache)
        assert f"process {os.getpid()}" in busy["writing"] and "embed elsewhere" in busy["writing"]


def test_info_goes_on_after_a_damaged_store(cache: Path) -> None:
    shutil.copytree(the_store(cache).path, cache / "zzz")
    (the_store_json,) = cache.glob("zzz/store.json")
    the_store_json.write_text("{")
    (shard, *_) = sorted(next(p for p in cache.iterdir() if len(p.name) == 16).glob("*.h5"))
    good, bad = describe_cache(cache)
    assert good["problem"] is None and "store.json is damaged" in bad["problem"]
    shard.unlink()
    assert shard.name in describe_cache(cache)[0]["problem"]
    with pytest.raises(RunNotFoundError, match="mirip-fast embed"):
        describe_cache(cache / "nowhere")


# ---- verify and repair


@pytest.mark.parametrize("part", ["features", "sha256", "checksum"])
@pytest.mark.parametrize("bit", [1, 128])
def test_a_damaged_row_is_named_by_its_image(cache: Path, part: str, bit: int) -> None:
    wanted = image_at(cache, "cls.28", 3)
    before = {f: f.read_bytes() for f in cache.rglob("*") if f.is_file()}
    flip(the_store(cache), "cls.28", 3, part, bit)
    after = {f: f.read_bytes() for f in cache.rglob("*") if f.is_file()}
    report = verified(cache)
    ((shard, slot, _, images),) = report.damaged
    assert (shard.name, slot, set(images)) == (shard_name("cls.28", 0, 0), 3, wanted)
    ((_, lacking, of, _),) = report.lacking
    assert (lacking, of) == (1, N)
    assert {f: f.read_bytes() for f in cache.rglob("*") if f.is_file()} == after != before


def test_a_twin_is_named_by_both_files(cache: Path, data: Path) -> None:
    (dataset,) = find_datasets(cache)
    sha = next(e.sha256 for e in images_of(dataset.images()) if e.path.name == "twin.png")
    flip(the_store(cache), "mean.28", int(the_store(cache).rows("mean.28", [sha])[0]), "features")
    ((*_, images),) = verified(cache).damaged
    assert {path.name for path in images} == {"twin.png", "그림 0.png"}


def test_repair_makes_embed_compute_exactly_what_is_damaged(cache: Path, data: Path) -> None:
    (dataset,) = find_datasets(cache)
    before, store = features(cache, dataset), the_store(cache)
    for slot, part in ((1, "features"), (4, "sha256"), (7, "checksum")):
        flip(store, "cls.28", slot, part)
    flip(store, "cls.28", 100, "checksum")  # an empty slot
    report = verified(cache)
    assert [slot for _, slot, *_ in report.damaged] == [1, 4, 7, 100]
    assert repair_store(report.path) == ["4 damaged rows are marked as missing"]
    report = verified(cache)
    assert not report.damaged and not report.faults
    ((_, lacking, _, command),) = report.lacking
    assert lacking == 3
    words = shlex.split(command)
    assert words[:2] == ["mirip-fast", "embed"]
    assert run([*words[1:], "--device", "cpu"]) == 0
    (again,) = find_datasets(cache)
    statuses = [e.status for e in images_of(again.images())]
    assert statuses.count("embedded") == 3 and statuses.count("present") == N - 3
    assert verified(cache).whole
    np.testing.assert_array_equal(features(cache, again), before)


def test_missing_and_unreadable_shards_are_named_and_repaired(cache: Path) -> None:
    store = the_store(cache)
    files = {name: store.path / shard_name(name, 0, 0) for name in store.series()}
    files["cls.28"].unlink()
    os.truncate(files["mean.28"], 5000)
    report = verified(cache)
    assert any("cls.28-r00-00000.h5 is missing" in fault for fault in report.faults)
    assert any("mean.28-r00-00000.h5" in fault for fault in report.faults)
    assert report.rows == 2 * N  # the rest was checked
    assert len(repair_store(report.path)) == 3  # one was put aside, both series begin anew
    assert files["mean.28"].with_name("mean.28-r00-00000.h5.damaged").stat().st_size == 5000
    report = verified(cache)
    assert not report.faults and not report.damaged and report.lacking[0][1] == N


def test_a_damaged_list_of_shards_is_written_anew(cache: Path) -> None:
    store = the_store(cache)
    (store.path / "shards-r00.json").write_text("[")
    report = verified(cache)
    assert report.rows == 4 * N and "shards-r00.json is damaged" in report.faults[0]
    assert "listed anew" in repair_store(report.path)[0]
    assert verified(cache).whole


def test_what_repair_can_not_put_right_is_told(cache: Path) -> None:
    store = the_store(cache)
    (dataset,) = find_datasets(cache)
    (store.path / "mine.h5").write_bytes(b"")
    assert "mine.h5" in verified(cache).faults[0]
    (store.path / "mine.h5").unlink()
    manifest = dataset.folder / "manifest.csv"
    whole = manifest.read_text(encoding="utf-8")
    for cut in range(2, 150, 3):
        manifest.write_text(whole[:-cut], encoding="utf-8")
        (fault,) = verified(cache).faults
        assert "manifest.csv" in fault and f"mirip-fast embed {dataset.source}" in fault
    manifest.write_text(whole, encoding="utf-8")
    (dataset.folder / "dataset.json").write_text("{}")
    assert "dataset.json" in verified(cache).faults[0]


def test_a_damaged_store_json_is_written_anew_by_embed(cache: Path, data: Path) -> None:
    path = the_store(cache).path
    for text in ("{", "[]", "[" * 100_000, '{"schema": 1}'):
        (path / "store.json").write_text(text)
        assert (
            "store.json" in verified(cache).faults[0]
            or "another version" in verified(cache).faults[0]
        )
    (path / "store.json").unlink()
    assert embed(data, cache, tta="flip").summary["present"] == N
    assert verified(cache).whole


def test_rows_that_are_written_meanwhile_are_not_called_damaged(cache: Path) -> None:
    """A run that writes the row between two looks at it: the second look decides."""
    store = the_store(cache)
    flip(store, "cls.28", 3, "features")
    from mirip_fast.features.shards import Shard

    matching = Shard.matching

    def rewritten(self: Shard, *arguments: object) -> object:
        result = matching(self, *arguments)
        if self.spec.name == "cls.28":
            flip(store, "cls.28", 3, "checksum")
        return result

    with mock.patch.object(Shard, "matching", rewritten):
        assert verified(cache).damaged == []


# ---- prune


def plans(cache: Path, **wanted: Any) -> StorePlan:
    (plan,) = plan_prune(cache, **(wanted or NOW))
    return plan


def test_prune_keeps_every_row_that_a_data_set_names(
    cache: Path, data: Path, tmp_path: Path
) -> None:
    assert plans(cache).empty
    other = draw(tmp_path / "other", range(N - 2, N + 8))  # two of its images are in data, too
    embed(other, cache, tta="flip")
    (dataset,) = [d for d in find_datasets(cache) if d.source == other]
    shutil.rmtree(dataset.folder)  # as if it had only been ranked
    (dataset,) = find_datasets(cache)
    before = features(cache, dataset)
    (store,) = describe_cache(cache)
    assert store["unused_rows"] == 4 * 8
    young = plans(cache, older_than=KEPT_DAYS)
    assert young.empty and young.young == 4 * 8  # an interrupted run may yet go on
    plan = plans(cache)
    assert (plan.dropped, plan.kept, plan.whole) == (32, 4 * N, False)
    carry_out(plan)
    np.testing.assert_array_equal(features(cache, dataset), before)
    assert verified(cache).whole and plans(cache).empty
    assert describe_cache(cache)[0]["unused_rows"] == 0


def test_old_rows_go_without_being_asked_for_twice(cache: Path, tmp_path: Path) -> None:
    shutil.rmtree(find_datasets(cache)[0].folder)
    for file in the_store(cache).path.glob("*.h5"):
        os.utime(file, (time.time() - 15 * 86400,) * 2)
    assert plans(cache, older_than=KEPT_DAYS).whole
    os.utime(next(the_store(cache).path.glob("cls.28-r*.h5")))
    assert not plans(cache, older_than=KEPT_DAYS).whole


def test_a_store_that_nobody_uses_goes_as_a_whole(cache: Path, data: Path, tmp_path: Path) -> None:
    embed(data, cache, image_size=42)
    big = find_datasets(cache)[0]
    shutil.rmtree(big.folder)
    (big.store_path / "note.txt").write_text("mine")
    todo = [plan for plan in plan_prune(cache, **NOW) if not plan.empty]
    assert [plan.path for plan in todo] == [big.store_path] and todo[0].whole
    assert carry_out(todo[0]) > 500_000
    assert [p.name for p in big.store_path.iterdir()] == ["note.txt"]  # a stranger's file stays
    assert verified(cache).whole
    with pytest.raises(StoreError):
        FeatureStore.open(big.store_path)
    assert embed(data, cache, image_size=42).summary["embedded"] == N


def test_series_that_no_data_set_lists_go_when_asked(cache: Path, data: Path) -> None:
    dataset = embed(data, cache, tta="none", patches="none").dataset
    before = features(cache, dataset)
    assert plans(cache).empty
    plan = plans(cache, older_than=0, series=True)
    assert set(plan.series) == {"cls.28-flip", "mean.28", "mean.28-flip"}
    carry_out(plan)
    assert set(the_store(cache).series()) == {"cls.28"}
    np.testing.assert_array_equal(features(cache, dataset), before)


def test_what_came_to_be_used_after_the_plan_stays(cache: Path, data: Path) -> None:
    folder = find_datasets(cache)[0].folder
    away = folder.parent.parent.parent.parent / "away"
    folder.rename(away)
    plan = plans(cache)
    assert plan.whole
    folder.parent.mkdir(exist_ok=True)
    away.rename(folder)
    carry_out(plan)
    assert verified(cache).whole and len(find_datasets(cache)) == 1


def test_leftovers_of_kills_and_repairs_go(cache: Path) -> None:
    path = the_store(cache).path
    earlier = f".{shard_name('cls.28', 0, 7)}.99.partial"  # as earlier versions named them
    made = [partial_path(path / name).name for name in (shard_name("cls.28", 0, 7), "canary.json")]
    for name in (earlier, *made, "cls.28-r00-00009.h5.damaged"):
        (path / name).write_bytes(bytes(1000))
    plan = plans(cache)
    assert len(plan.leftovers) == 4 and plan.frees == 4000
    assert carry_out(plan) == 4000 and verified(cache).whole


def test_prune_does_nothing_where_it_can_not_know(cache: Path) -> None:
    (dataset,) = find_datasets(cache)
    manifest = dataset.folder / "manifest.csv"
    text = manifest.read_text(encoding="utf-8")
    manifest.write_text(text[:-80], encoding="utf-8")
    with pytest.raises(StoreError, match="manifest"):
        plan_prune(cache, **NOW)
    manifest.write_text(text, encoding="utf-8")
    (dataset.folder / "dataset.json").write_text("{}")
    with pytest.raises(StoreError, match="nothing in .* is pruned"):
        plan_prune(cache, **NOW)


def test_prune_is_refused_while_a_run_writes(cache: Path) -> None:
    (the_store(cache).path / "x.h5.damaged").write_bytes(b"1")
    plan = plans(cache)
    with StoreWriter(the_store(cache), command="embed elsewhere"), pytest.raises(StoreLockedError):
        carry_out(plan)
    assert (the_store(cache).path / "x.h5.damaged").exists()


def test_a_writer_that_waited_while_its_store_was_pruned_is_told(cache: Path) -> None:
    store = the_store(cache)
    shutil.rmtree(find_datasets(cache)[0].folder)
    carry_out(plans(cache))
    with pytest.raises(StoreError):
        StoreWriter(store)


# ---- export


def test_export_is_what_the_store_holds(cache: Path, data: Path) -> None:
    (dataset,) = find_datasets(cache)
    told: list[tuple[int, int]] = []
    done = export_dataset(dataset, Path("out.h5"), progress=lambda *p: told.append(p))
    assert done["/features/cls"] == ((N + 1, 64), "float16")
    assert told[-1] == (4 * 128 * (N + 1),) * 2
    entries = [e for e in images_of(dataset.images()) if e.status != "failed"]
    with h5py.File("out.h5") as file:
        parts = [
            file[f"features/{name}"][:]
            for name in ("cls", "patch", "views/28-flip/cls", "views/28-flip/patch")
        ]
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), features(cache, dataset))
        assert file["image_id"].asstr()[:].tolist() == [e.image_id for e in entries]
        assert file["path"].asstr()[:].tolist() == [str(e.path) for e in entries]
        assert file["tier"].asstr()[:].tolist() == ["SA"[e.tier] for e in entries]
        assert json.loads(file.attrs["fingerprint"]) == the_store(cache).fingerprint
        assert file.attrs["source"] == str(data)


def test_export_overwrites_only_when_told(cache: Path) -> None:
    (dataset,) = find_datasets(cache)
    Path("out.h5").write_bytes(b"precious")
    with pytest.raises(StoreError, match="--overwrite"):
        export_dataset(dataset, Path("out.h5"))
    full = OSError(errno.ENOSPC, "full")
    with (
        mock.patch.object(os, "posix_fallocate", side_effect=full),
        pytest.raises(DiskFullError, match="are needed"),
    ):
        export_dataset(dataset, Path("out.h5"), overwrite=True)
    assert Path("out.h5").read_bytes() == b"precious"
    export_dataset(dataset, Path("out.h5"), overwrite=True)
    assert h5py.is_hdf5("out.h5")


def test_exports_that_can_not_be(cache: Path, tmp_path: Path) -> None:
    (dataset,) = find_datasets(cache)
    for file, reason in (
        (tmp_path, "is a folder"),
        (tmp_path / "no" / "out.h5", "no folder"),
        (dataset.store_path / "out.h5", "another folder"),
    ):
        with pytest.raises(StoreError, match=reason):
            export_dataset(dataset, file)
    with pytest.raises(RunNotFoundError, match="mirip-fast embed other"):
        newest_dataset(cache, Path("other"))
    flip(the_store(cache), "cls.28", 3, "features")
    repair_store(verified(cache).path)
    with pytest.raises(StoreError, match="mirip-fast embed"):
        export_dataset(dataset, Path("out.h5"))
    assert not Path("out.h5").exists()


# ---- merge


@pytest.fixture
def other(made: Path, tmp_path: Path) -> Path:
    """A cache made apart: two of its ten images are in the first one, too."""
    draw(tmp_path / "elsewhere", range(N - 2, N + 8))
    embed(tmp_path / "elsewhere", tmp_path / "other", tta="flip")
    return tmp_path / "other"


def added(done: dict[str, Any]) -> set[int]:
    """Rows that a merge added, of any series."""
    return {found[0] for found in done["series"].values()}


def test_caches_made_apart_are_joined(cache: Path, other: Path, data: Path, tmp_path: Path) -> None:
    apart = [(d.source, features(c, d)) for c in (cache, other) for d in find_datasets(c)]
    before = {f: f.read_bytes() for f in other.rglob("*") if f.is_file()}
    (done,) = merge_caches(cache, [other])
    names = ("cls.28", "cls.28-flip", "mean.28", "mean.28-flip")
    assert done["series"] == dict.fromkeys(
        names, (8, 2, 0, 1.0)
    )  # added, of both, differing, cosine
    assert done["datasets"] == [str(tmp_path / "elsewhere")] and not done["twice"]
    assert verified(cache).whole
    for source, expected in apart:
        (dataset,) = [d for d in find_datasets(cache) if d.source == source]
        np.testing.assert_array_equal(features(cache, dataset), expected)
    (again,) = merge_caches(cache, [other])
    assert added(again) == {0} and not again["datasets"]
    assert {f: f.read_bytes() for f in other.rglob("*") if f.is_file()} == before
    ids = [e.image_id for d in find_datasets(other) for e in images_of(d.images())]
    copy = next(d for d in find_datasets(cache) if d.source == tmp_path / "elsewhere")
    assert [e.image_id for e in images_of(copy.images())] == ids


def test_other_fingerprints_come_as_stores_of_their_own(
    cache: Path, data: Path, tmp_path: Path
) -> None:
    embed(data, tmp_path / "big", image_size=42)
    (done,) = merge_caches(cache, [tmp_path / "big"])
    assert {name: found[0] for name, found in done["series"].items()} == {"cls.42": N, "mean.42": N}
    assert len(describe_cache(cache)) == 2
    assert all(report.whole for report in verify_cache(cache))
    (done,) = merge_caches(Path("new"), [next(p.parent for p in cache.glob("*/store.json"))])
    assert max(added(done)) > 0 and all(r.whole for r in verify_cache(Path("new")))
    with pytest.raises(StoreError, match="itself"):
        merge_caches(cache, [cache])
    with pytest.raises(RunNotFoundError):
        merge_caches(cache, [tmp_path / "nowhere"])


def test_two_data_sets_of_one_name_are_both_kept(cache: Path, data: Path, tmp_path: Path) -> None:
    """The same folder, embedded on another machine where one more picture lay in it."""
    (first,) = find_datasets(cache)
    shutil.copytree(cache, tmp_path / "machine2")
    (second,) = find_datasets(tmp_path / "machine2")
    rows = (second.folder / "manifest.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    (second.folder / "manifest.csv").write_text("".join(rows[:-1]), encoding="utf-8")
    info = {**second.info, "images": N + 1, "embedded_at": "2099-01-01T00:00:00+00:00"}
    (second.folder / "dataset.json").write_text(json.dumps(info))
    list_files(second.folder)
    (done,) = merge_caches(cache, [tmp_path / "machine2"])
    assert done["twice"] == [str(data)]
    newest, older = find_datasets(cache)
    assert len(newest.images()) == N + 1 and images_of(older.images()) == images_of(first.images())
    assert newest.folder.name == f"{first.folder.name}-2"
    (again,) = merge_caches(cache, [tmp_path / "machine2"])
    assert again["datasets"] == [] and len(find_datasets(cache)) == 2


def put_rows(store: FeatureStore, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Write every row of a store anew, changed."""
    for name, spec in store.series().items():
        hashes = sorted(store.valid_hashes(name))
        rows = change(store.read(name, store.rows(name, hashes))).astype(spec.dtype)
        for file in [shard.path for shard in store.shards(name)]:
            file.unlink()
        (store.path / "shards-r00.json").unlink(missing_ok=True)
        from mirip_fast.features.shards import ShardWriter, create_shard

        shard = create_shard(store.path / shard_name(name, 0, 0), spec, store.fingerprint_id)
        writer = ShardWriter(shard)
        table = np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 32)
        writer.write(np.arange(len(hashes)), table, rows)
        writer.close()


def test_caches_that_do_not_agree_are_not_mixed(cache: Path, other: Path) -> None:
    before = {f: f.read_bytes() for f in cache.rglob("*.h5")}
    put_rows(the_store(other), lambda rows: rows[:, ::-1])
    with pytest.raises(StoreError, match="do not agree.*--force"):
        merge_caches(cache, [other])
    assert {f: f.read_bytes() for f in cache.rglob("*.h5")} == before
    (dataset,) = find_datasets(cache)
    expected = features(cache, dataset)
    (done,) = merge_caches(cache, [other], force=True)
    assert {found[:3] for found in done["series"].values()} == {(8, 2, 2)}
    np.testing.assert_array_equal(features(cache, dataset), expected)  # what was there stays


def test_the_test_picture_tells_caches_apart_that_share_no_image(
    cache: Path, other: Path, tmp_path: Path
) -> None:
    file = next(other.glob("*/canary.json"))
    whole = json.loads(file.read_text())
    row = whole["features"]["cls.28"]
    whole["features"]["cls.28"] = [x * 1.05 for x in row]
    whole["made_with"]["torch"] = "9.9"
    write_canary(file, the_store(other).fingerprint_id, whole["features"], whole["made_with"])
    before = {f: f.read_bytes() for f in cache.rglob("*") if f.is_file()}
    with pytest.raises(StoreError, match="test picture differ by 5.*torch .* → 9.9.*--force"):
        merge_caches(cache, [other])
    assert {f: f.read_bytes() for f in cache.rglob("*") if f.is_file()} == before
    merge_caches(tmp_path / "new", [other])  # a new cache keeps it, and is guarded from now on
    kept = json.loads(next((tmp_path / "new").glob("*/canary.json")).read_text())
    assert kept["made_with"] == whole["made_with"]
    np.testing.assert_allclose(kept["features"]["cls.28"], whole["features"]["cls.28"], rtol=1e-6)
    with pytest.raises(StoreError, match="do not agree"):
        merge_caches(tmp_path / "new", [cache])
    for text in ("[]", '{"features": {"cls.28": [NaN]}, "made_with": {}}', '{"features": 1}'):
        file.write_text(text)
        with pytest.raises(StoreError, match="canary.json cannot be read"):
            merge_caches(cache, [other])
        merge_caches(tmp_path / f"new{len(text)}", [other], force=True)
        assert not list((tmp_path / f"new{len(text)}").glob("*/canary.json"))
    merge_caches(cache, [other], force=True)


def test_rounding_is_no_disagreement(cache: Path, other: Path) -> None:
    put_rows(the_store(other), lambda rows: rows * (1 + 2**-9))
    (done,) = merge_caches(cache, [other])
    assert all(
        differing == 0 and 0.999 < worst <= 1 for *_, differing, worst in done["series"].values()
    )


def test_rows_that_are_damaged_or_not_finite_stay_behind(cache: Path, other: Path) -> None:
    def spoil(rows: np.ndarray) -> np.ndarray:
        rows[-1] = np.nan
        return rows

    store = the_store(other)
    put_rows(store, spoil)
    flip(store, "cls.28", 4, "features")
    (done,) = merge_caches(cache, [other], force=True)
    assert done["corrupt"] == 1 and done["series"]["cls.28"][0] in (6, 7)
    for name in the_store(cache).series():
        opened = the_store(cache)
        assert np.isfinite(
            opened.read(name, opened.rows(name, sorted(opened.valid_hashes(name))))
        ).all()
    assert not verified(cache).damaged


HOSTILE: dict[str, Callable[[Path], object]] = {
    "pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "link to itself": lambda path: (path.unlink(), path.symlink_to(path)),
    "endless": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "deep": lambda path: path.write_text("[" * 200_000),
    "large": lambda path: os.truncate(path, 1 << 34),  # all holes
}


@pytest.mark.parametrize("how", HOSTILE)
@pytest.mark.parametrize("name", ["store.json", "shards-r00.json"])
def test_hostile_stores_are_refused(cache: Path, other: Path, name: str, how: str) -> None:
    HOSTILE[how](next(other.glob(f"*/{name}")))
    with pytest.raises((StoreError, RunNotFoundError), match=f"{name}|No feature store"):
        merge_caches(cache, [other])
    assert verified(cache).whole


@pytest.mark.parametrize("how", [how for how in HOSTILE if how != "large"])
@pytest.mark.parametrize("name", ["dataset.json", "manifest.csv"])
def test_hostile_ledgers_stay_behind(cache: Path, other: Path, name: str, how: str) -> None:
    HOSTILE[how](next(other.glob(f"*/datasets/*/{name}")))
    (done,) = merge_caches(cache, [other])
    assert done["datasets"] == [] and len(find_datasets(cache)) == 1
    assert len(done["problems"]) == 1 or name == "dataset.json"
    assert added(done) == {8}


def test_ledgers_that_lie_stay_behind(cache: Path, other: Path) -> None:
    (dataset,) = find_datasets(other)
    info, manifest = dataset.info, dataset.folder / "manifest.csv"
    lies = [
        {"source": 1}, {"tiers": "SA"}, {"views": []}, {"views": [[28]]}, {"views": [["28", False]]},
        {"kinds": [1]}, {"images": "10"}, {"embedded_at": "yesterday"}, {"data": None},
        {"embedded_at": "2026-01-01T00:00:00"}, {"limit": "1"},
    ]  # fmt: skip
    for lie in lies:
        (dataset.folder / "dataset.json").write_text(json.dumps({**info, **lie}))
        (done,) = merge_caches(cache, [other])
        assert len(done["problems"]) == 1 and not done["datasets"], lie
    (dataset.folder / "dataset.json").write_text(json.dumps(info))
    with manifest.open(encoding="utf-8-sig", newline="") as stream:
        rows = list(csv.DictReader(stream))
    for column, value in (("sha256", "ab"), ("sha256", "zz"), ("status", "fine"), ("tier", "Q")):
        with manifest.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows([{**rows[0], column: value}, *rows[1:]])
        (done,) = merge_caches(cache, [other])
        assert len(done["problems"]) == 1 and not done["datasets"], (column, value)
    assert verified(cache).whole


def test_a_name_that_leads_out_of_the_cache_does_not(cache: Path, other: Path) -> None:
    (dataset,) = find_datasets(other)
    info = {**dataset.info, "source": "/etc/passwd", "root": "../../..", "name": "../../../up"}
    (dataset.folder / "dataset.json").write_text(json.dumps(info))
    list_files(dataset.folder)
    merge_caches(cache, [other])
    copies = [d.folder for d in find_datasets(cache)]
    assert len(copies) == 2 and all(f.parent == the_store(cache).path / "datasets" for f in copies)


def test_a_series_of_another_shape_is_refused(cache: Path, other: Path) -> None:
    store = the_store(other)
    for file in store.path.glob("cls.28-r*.h5"):
        file.unlink()
    spec = SeriesSpec("cls.28", (9,), "float16")
    from mirip_fast.features.shards import create_shard

    create_shard(store.path / shard_name("cls.28", 0, 0), spec, store.fingerprint_id)
    with pytest.raises(StoreError, match=r"cls\.28 has other rows"):
        merge_caches(cache, [other])


# ----------------------------------------------------------------------- what accidents and strangers leave


def test_verify_sees_a_changed_grade_and_every_command_names_it(
    cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (dataset,) = find_datasets(cache)
    ledger = dataset.folder / "manifest.csv"
    data = ledger.read_bytes()
    ledger.write_bytes(data.replace(b",S,", b",A,", 1))
    assert any("manifest.csv" in fault for fault in verified(cache).faults)
    assert run(["--quiet", "train", "--head-only"]) == 1
    err = capfd.readouterr().err
    assert "manifest.csv" in err and "mirip-fast embed" in err
    ledger.write_bytes(data)
    assert verified(cache).whole
    (dataset.folder / "dataset.json").unlink()
    assert any("dataset.json" in fault for fault in verified(cache).faults)
    assert run(["--quiet", "train", "--head-only"]) == 1
    assert "dataset.json" in capfd.readouterr().err


@pytest.mark.parametrize("how", ["empty", "foreign", "changed", "gone"])
def test_verify_sees_what_became_of_the_test_picture(cache: Path, how: str) -> None:
    file = the_store(cache).path / "canary.json"
    content = json.loads(file.read_text())
    if how == "gone":
        file.unlink()
    elif how == "empty":
        file.write_text("")
    elif how == "foreign":
        write_canary(file, "0" * 16, content["features"], content["made_with"])
    else:
        content["features"]["cls.28"][3] *= 1.0001
        file.write_text(json.dumps(content))
    (fault,) = verified(cache).faults
    assert str(file) in fault


def test_a_merge_that_a_full_disk_stopped_is_completed(
    cache: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each call that syncs a file: first the error, then the same command with room."""
    real, stopped = os.fsync, 0
    for room in range(100):
        target, left = tmp_path / f"target{room}", room

        def full(handle: int) -> None:
            nonlocal left
            left -= stat.S_ISREG(os.fstat(handle).st_mode)
            if left < 0 and stat.S_ISREG(os.fstat(handle).st_mode):
                raise OSError(errno.ENOSPC, "full")
            real(handle)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            try:
                merge_caches(target, [other])
            except DiskFullError:
                stopped += 1
        (done,) = merge_caches(target, [other])
        assert not done["problems"] and len(find_datasets(target)) == 1
        assert all(report.whole for report in verify_cache(target))
        if left >= 0:
            break
    assert stopped > 8 and left >= 0


def test_a_half_data_set_is_told_completed_and_pruned(cache: Path, other: Path) -> None:
    (theirs,) = find_datasets(other)
    half = the_store(cache).path / "datasets" / theirs.folder.name
    half.mkdir()  # as earlier versions left it
    aside = half.with_name(f".{half.name}-x.partial")
    aside.mkdir()
    (aside / "manifest.csv").write_text("half")
    assert len([f for f in verified(cache).faults if "is no data set" in f]) == 2
    (done,) = merge_caches(cache, [other])
    assert done["datasets"] == [str(theirs.source)] and not done["problems"]
    carry_out(plans(cache))
    assert verified(cache).whole and not aside.exists()


@pytest.mark.parametrize("hard", [False, True])
def test_a_lock_that_is_a_link_empties_nothing(cache: Path, tmp_path: Path, hard: bool) -> None:
    lock, victim = the_store(cache).path / "LOCK", tmp_path / "victim"
    victim.write_text("precious")
    lock.unlink()
    lock.hardlink_to(victim) if hard else lock.symlink_to(victim)
    with pytest.raises(StoreError, match="LOCK is .*Remove it"):
        StoreWriter(the_store(cache))
    assert victim.read_text() == "precious"
    lock.unlink()
    marker = lock.with_name("DIRTY-r00")
    marker.symlink_to(victim)
    put_rows(the_store(cache), lambda rows: rows)
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("how", ["pipe", "endless", "folder"])
@pytest.mark.parametrize(
    "name", ["LOCK", "store.json", "canary.json", "shards-r00.json", "cls.28-r00-00000.h5"]
)
def test_nothing_but_regular_files_is_opened(cache: Path, data: Path, name: str, how: str) -> None:
    HOSTILE[how](the_store(cache).path / name)
    for command in (
        ["cache", "info"],
        ["cache", "verify"],
        ["cache", "merge", "cache", "--cache-dir", "new"],
        ["embed", str(draw(Path("more"), range(90, 92))), *EMBED],
    ):
        assert run(["--quiet", *command]) in (0, 1)
    assert run(["--quiet", "embed", "more", *EMBED]) == 1


EMBED = ["--backbone", "tiny-random", "--image-size", "28", "--workers", "0"]


def test_bytes_that_are_no_text_in_store_json_are_named(
    cache: Path, data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = the_store(cache).path / "store.json"
    file.write_bytes(file.read_bytes().replace(b"squash", b"sq\xffash"))
    assert run(["--quiet", "cache", "verify"]) == 1
    assert run(["--quiet", "embed", str(data), *EMBED]) == 1
    out, err = capfd.readouterr()
    assert "store.json" in out and "store.json" in err and "fault of mirip-fast" not in err


def test_features_that_are_not_finite_are_named(
    cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    put_rows(the_store(cache), lambda rows: rows * np.nan)
    assert run(["--quiet", "train", "--head-only"]) == 1
    assert run(["--quiet", "duplicates"]) == 1
    err = capfd.readouterr().err
    assert err.count("are not finite") == 2 and "fault of mirip-fast" not in err
