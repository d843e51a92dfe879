"""The embed loop: every image's row is its own, whatever stands around it."""

from __future__ import annotations

import functools
import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mirip_fast.config import EmbedConfig
from mirip_fast.data.decode_worker import Choose, Decoded, DecodeJob, decode_job
from mirip_fast.data.hashes import HashMemory
from mirip_fast.data.images import load_rgb, resize_square, to_array
from mirip_fast.errors import StoppedError, StoreLockedError
from mirip_fast.features import shards
from mirip_fast.features.backbone import Backbone, load_backbone
from mirip_fast.features.backbone_files import BackboneSpec
from mirip_fast.features.embed import PhaseOne, embed, prepare
from mirip_fast.features.engine import Speed
from mirip_fast.features.outcomes import STATUSES, EmbedInterrupt, summarise
from mirip_fast.features.recipe import Recipe, make_recipe
from mirip_fast.features.shards import Shard
from mirip_fast.features.store import DIRTY_FILE, FeatureStore
from mirip_fast.features.store_writer import StoreWriter


def draw(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(np.kron(pixels[:5, :5], np.ones((8, 6, 1), np.uint8))).save(path)
    return path


@functools.cache
def alone(spec: BackboneSpec) -> Backbone:
    """A backbone of the tests' own, to compute single images with."""
    return load_backbone(spec, torch.device("cpu"), "fp32")


class Phase:
    """Phase one on a folder, with a backbone whose calls are counted."""

    def __init__(self, folder: Path, **options: object):
        self.hashes = HashMemory(None)
        config = EmbedConfig(
            **{
                "backbone": "tiny-random",
                "image_size": 28,
                "layers": "last",
                "cache_dir": str(folder / "cache"),
                **options,
            }
        )
        self.phase: PhaseOne = prepare(config, "cpu", self.hashes)
        self.loads = 0
        self.passed = 0  # images that went through the backbone, the canary among them
        self.limit: int | None = None  # out of memory above this batch size

    @property
    def images(self) -> int:
        """Images that went through the backbone; each load looks at the canary first."""
        return self.passed - self.loads

    @property
    def store(self) -> FeatureStore:
        return self.phase.store

    @property
    def recipe(self) -> Recipe:
        return self.phase.recipe

    def load(self) -> Backbone:
        self.loads += 1
        backbone = load_backbone(self.recipe.backbone, torch.device("cpu"), "fp32")
        features = backbone.features

        def counted(pixels: torch.Tensor, kinds: Sequence[str]) -> dict[str, torch.Tensor]:
            if self.limit is not None and len(pixels) > self.limit:
                raise torch.OutOfMemoryError("out of memory")
            self.passed += len(pixels)
            return features(pixels, kinds)

        backbone.features = counted  # type: ignore[method-assign]
        return backbone

    def run(
        self, paths: list[Path], load: Callable[[], Backbone] | None = None, **settings: Any
    ) -> list[Any]:
        """What became of each image; ``status``, ``reason`` and ``sha256``."""
        settings = {"workers": 0, "batch_size": 4, "cores": 1, **settings}
        images = embed(paths, self.recipe, self.store, load or self.load, self.hashes, **settings)
        assert summarise(images)["left"] == 0
        return [*images.itertuples()]

    def expected(self, path: Path, kind: str, *, flip: bool = False) -> np.ndarray:
        """One image alone through the backbone."""
        backbone = alone(self.recipe.backbone)
        pixels = to_array(resize_square(load_rgb(path), self.recipe.size, self.recipe.resize))
        tensor = backbone.normalise(torch.from_numpy(pixels)[None])
        return backbone.features(tensor.flip(-1) if flip else tensor, [kind])[kind][0].numpy()

    def stored(self, outcome: Any, series: str) -> np.ndarray:
        assert outcome.sha256 is not None
        rows = self.store.rows(series, [outcome.sha256])
        assert rows[0] >= 0
        return self.store.read(series, rows)[0].astype(np.float32)


def assert_own_rows(phase: Phase, paths: list[Path], outcomes: list[Any]) -> None:
    for path, outcome in zip(paths, outcomes, strict=True):
        assert outcome.status in STATUSES
        if outcome.status != "failed":
            for kind in phase.recipe.kinds:
                stored = phase.stored(outcome, f"{kind}.28")
                np.testing.assert_allclose(stored, phase.expected(path, kind), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_every_input_has_one_status_and_its_own_row_in_any_order(
    tmp_path: Path, workers: int, batch_size: int
) -> None:
    rng = np.random.default_rng(batch_size)
    paths = [draw(tmp_path / f"{i}.png", i) for i in range(20)]
    for i in rng.choice(20, 5, replace=False):
        paths.append(tmp_path / f"copy of {i}.png")
        paths[-1].write_bytes(paths[i].read_bytes())
    for i in range(4):
        paths.append(tmp_path / f"broken {i}.png")
        paths[-1].write_bytes(rng.bytes(50))
    paths += [tmp_path / "absent.png", paths[0]]
    paths = [paths[i] for i in rng.permutation(len(paths))]
    phase = Phase(tmp_path)
    outcomes = phase.run(paths, workers=workers, batch_size=batch_size)
    seen: set[bytes] = set()
    for path, outcome in zip(paths, outcomes, strict=True):
        broken = path.name.startswith(("broken", "absent"))
        content = b"" if broken else path.read_bytes()
        expected = "failed" if broken else "duplicate" if content in seen else "embedded"
        assert outcome.status == expected, path
        assert (outcome.reason is None) == (expected != "failed")
        seen.add(content)
    assert phase.images == 20
    assert len(outcomes) == len(paths) == 31
    assert_own_rows(phase, paths, outcomes)
    again = phase.run(paths[::-1], workers=0)
    assert phase.images == 20 and [o.status for o in again].count("present") == 20
    assert_own_rows(phase, paths[::-1], again)


def test_the_second_run_computes_nothing_and_loads_nothing(tmp_path: Path) -> None:
    paths = [draw(tmp_path / f"{i}.png", i) for i in range(6)]
    phase = Phase(tmp_path)
    phase.run(paths)
    assert (phase.loads, phase.images) == (1, 6)
    moved = [path.rename(tmp_path / f"moved-{path.name}") for path in paths]
    for path in moved:
        os.utime(path, (1, 1))
    assert {o.status for o in phase.run(moved)} == {"present"}
    assert (phase.loads, phase.images) == (1, 6)
    draw(moved[2], 99)
    outcomes = phase.run([*moved, draw(tmp_path / "new.png", 100)])
    assert [o.status for o in outcomes] == ["present"] * 2 + ["embedded"] + ["present"] * 3 + [
        "embedded"
    ]
    assert phase.images == 8


def test_a_change_that_size_and_time_hide_is_found_by_rehashing(tmp_path: Path) -> None:
    path = draw(tmp_path / "0.bmp", 0)
    os.utime(path, (1, 1))
    phase = Phase(tmp_path)
    phase.run([path])
    size = path.stat().st_size
    os.utime(draw(path, 1), (1, 1))
    assert path.stat().st_size == size
    assert phase.run([path])[0].status == "present"  # the price of not reading every file
    outcomes = phase.run([path], rehash=True)
    assert outcomes[0].status == "embedded"
    assert_own_rows(phase, [path], outcomes)


def test_views_and_kinds_are_filled_by_need(tmp_path: Path) -> None:
    paths = [draw(tmp_path / f"{i}.png", i) for i in range(5)]
    Phase(tmp_path, patches="none").run(paths[:3])
    phase = Phase(tmp_path, patches="none", tta="flip")
    outcomes = phase.run(paths)
    assert phase.images == 3 + 2 * 2  # three lack the flipped view, two lack both
    for path, outcome in zip(paths, outcomes, strict=True):
        np.testing.assert_allclose(
            phase.stored(outcome, "cls.28-flip"), phase.expected(path, "cls", flip=True),
            rtol=2e-3, atol=2e-3,
        )  # fmt: skip
        mirrored = tmp_path / "mirrored.png"
        load_rgb(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(mirrored)
        np.testing.assert_allclose(
            phase.stored(outcome, "cls.28-flip"),
            phase.expected(mirrored, "cls"),
            rtol=2e-2,
            atol=2e-2,
        )
    grid = Phase(tmp_path, patches="grid:2")
    grid.run(paths)
    assert grid.images == 5
    assert {"cls.28", "cls.28-flip", "grid2.28", "mean.28"} == set(grid.store.series())
    assert grid.store.series()["grid2.28"].shape == (2, 2, 64)


def test_out_of_memory_halves_the_batch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = [draw(tmp_path / f"{i}.png", i) for i in range(9)]
    phase = Phase(tmp_path)
    phase.limit = 3
    outcomes = phase.run(paths, batch_size=8)
    assert "batches of 2 images" in caplog.text and {o.status for o in outcomes} == {"embedded"}
    assert_own_rows(phase, paths, outcomes)
    other = Phase(tmp_path / "b")
    other.limit = 0
    with pytest.raises(torch.OutOfMemoryError):
        other.run(paths[:1])


def test_a_feature_that_does_not_fit_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [draw(tmp_path / f"{i}.png", i) for i in range(3)]
    phase = Phase(tmp_path)

    def huge(self: Backbone, pixels: torch.Tensor, kinds: Sequence[str]) -> dict[str, torch.Tensor]:
        rows = features(self, pixels, kinds)
        for row in rows.values() if len(pixels) > 1 else ():
            row[1] = 1e6
        return rows

    features = Backbone.features
    monkeypatch.setattr(Backbone, "features", huge)
    outcomes = phase.run(paths)
    assert [o.status for o in outcomes] == ["embedded", "failed", "embedded"]
    assert "--store-dtype float32" in str(outcomes[1].reason)
    monkeypatch.undo()
    assert_own_rows(phase, [paths[0], paths[2]], [outcomes[0], outcomes[2]])


class Backwards:
    """A pool in which the last file is read first; the results come in order, as always."""

    passes = 0

    def __init__(self, workers: int) -> None:
        Backwards.passes += 1

    def __enter__(self) -> Backwards:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def close(self) -> None:
        pass

    def decode(self, jobs: Iterable[DecodeJob], choose: Choose) -> Iterator[Decoded]:
        listed = list(jobs)
        done = {job.index: decode_job(job, choose) for job in reversed(listed)}
        yield from (done[job.index] for job in listed)


def test_copies_side_by_side_are_decoded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of them is read first, its pixels are taken, and there is no second pass."""
    monkeypatch.setattr("mirip_fast.features.embed.DecodePool", Backwards)
    monkeypatch.setattr(Backwards, "passes", 0)
    paths = [draw(tmp_path / f"{i}-{copy}.png", i) for i in range(3) for copy in "ab"]
    phase = Phase(tmp_path)
    reports: list[Speed] = []
    outcomes = phase.run(paths, on_speed=reports.append)
    assert [o.status for o in outcomes] == ["embedded", "duplicate"] * 3
    assert Backwards.passes == 1 and phase.images == 3
    assert [report.images for report in reports] == [3]
    assert_own_rows(phase, paths, outcomes)


class StaleMemory(HashMemory):
    """Remembers every file's hash, and lets something happen to the files right after it was asked."""

    def __init__(self, paths: list[Path], change: Callable[[], object]):
        super().__init__(None)
        self._hashes = {path: hashlib.sha256(path.read_bytes()).digest() for path in paths}
        self._change = change

    def recall_many(self, paths: Iterable[Path]) -> Iterator[bytes | None]:
        known = [self._hashes.get(path) for path in paths]
        self._change()
        self._hashes = {}
        yield from known


def test_a_second_pass_is_told_together_with_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that vanished is computed from its copy, with the backbone that is loaded."""
    paths = [draw(tmp_path / f"{i}.png", i) for i in range(4)]
    copy = draw(tmp_path / "copy.png", 0)
    phase = Phase(tmp_path)
    phase.hashes = StaleMemory([*paths, copy], lambda: paths[0].unlink(missing_ok=True))
    reports: list[Speed] = []
    outcomes = phase.run([*paths, copy], on_speed=reports.append)
    assert [o.status for o in outcomes] == ["failed"] + ["embedded"] * 4
    assert "does not exist" in outcomes[0].reason
    assert_own_rows(phase, [*paths, copy], outcomes)
    assert phase.loads == 1
    assert [report.images for report in reports] == [4]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_changes_while_it_is_read_gets_no_wrong_row(
    tmp_path: Path, workers: int
) -> None:
    paths = [draw(tmp_path / f"{i}.png", i) for i in range(3)]
    phase = Phase(tmp_path)
    phase.hashes = StaleMemory(paths, lambda: draw(paths[1], 77))
    outcomes = phase.run(paths, workers=workers)
    assert_own_rows(phase, paths, outcomes)
    assert [o.status for o in outcomes] == ["embedded"] * 3
    assert outcomes[1].sha256 == HashMemory(None).sha256(paths[1])


def test_a_file_that_becomes_another_one_while_it_is_read(tmp_path: Path) -> None:
    paths = [draw(tmp_path / f"{i}.png", i) for i in range(3)]
    phase = Phase(tmp_path)

    def change() -> None:
        paths[1].write_bytes(paths[0].read_bytes())
        paths[2].unlink(missing_ok=True)

    phase.hashes = StaleMemory(paths, change)
    outcomes = phase.run(paths)
    assert [o.status for o in outcomes] == ["embedded", "duplicate", "failed"]
    assert_own_rows(phase, paths, outcomes)


def test_an_interrupted_run_accounts_for_every_image(tmp_path: Path) -> None:
    paths = [draw(tmp_path / f"{i}.png", i) for i in range(12)]
    phase = Phase(tmp_path)
    phase.run(paths[:3])
    broken, copy, late = (tmp_path / f"{name}.png" for name in ("broken", "copy", "late"))
    broken.write_bytes(b"no picture")
    copy.write_bytes(paths[0].read_bytes())
    late.write_bytes(paths[-1].read_bytes())  # a copy of the one that is not finished
    every = [paths[0], copy, broken, *paths[1:], late]
    at_the_last, stopping = threading.Event(), threading.Event()

    def load() -> Backbone:
        backbone = phase.load()
        features = backbone.features
        square = resize_square(load_rgb(paths[-1]), phase.recipe.size, phase.recipe.resize)
        last = backbone.normalise(torch.from_numpy(to_array(square))[None])[0]

        def held(pixels: torch.Tensor, kinds: Sequence[str]) -> dict[str, torch.Tensor]:
            if torch.allclose(pixels[-1], last, atol=1e-3):
                at_the_last.set()
                assert stopping.wait(20)
                raise StoppedError
            return features(pixels, kinds)

        backbone.features = held  # type: ignore[method-assign]
        return backbone

    def stop(*progress: int) -> None:
        if at_the_last.is_set():
            stopping.set()
            raise KeyboardInterrupt

    with pytest.raises(EmbedInterrupt) as stopped:
        phase.run(every, load, batch_size=2, progress=stop)
    assert [*summarise(stopped.value.images).values()] == [15, 8, 3, 1, 1, 2]
    again = Phase(tmp_path)
    assert [o.status for o in again.run(every)].count("present") == 11 and again.images == 1


def test_a_run_stopped_at_once_accounts_for_every_image(tmp_path: Path) -> None:
    """Nothing is open yet: neither the engine nor the store for writing."""
    paths = [draw(tmp_path / f"{i}.png", i) for i in range(4)]
    phase = Phase(tmp_path)
    phase.run(paths[:2])

    def load() -> Backbone:
        raise KeyboardInterrupt

    with pytest.raises(EmbedInterrupt) as stopped:
        phase.run(paths, load)
    assert [*summarise(stopped.value.images).values()] == [4, 0, 2, 0, 0, 2]


@pytest.mark.parametrize("after_a_crash", [False, True])
def test_ctrl_c_does_not_wait_until_a_large_cache_is_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after_a_crash: bool
) -> None:
    """A decoding thread verifies the cache, all of it, when it comes upon the first new picture."""
    monkeypatch.setattr(shards, "_MAX_ROWS", 1)
    paths = [draw(tmp_path / f"{i}.png", i) for i in range(30)]
    phase = Phase(tmp_path)
    phase.run(paths[:-1])
    if after_a_crash:
        (phase.store.path / f"{DIRTY_FILE}-r00").touch()
    verified = []
    matching = Shard.matching

    def slow(self: Shard, *arguments: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            verified.append(self.path)
            if len(verified) == 1:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            time.sleep(0.1)
        return matching(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Shard, "matching", slow)
        with pytest.raises(KeyboardInterrupt):
            Phase(tmp_path).run(paths, workers=1)
        assert 1 <= len(verified) < 10
    again = Phase(tmp_path)  # the lock was given back
    outcomes = again.run(paths)
    assert [o.status for o in outcomes] == ["present"] * 29 + ["embedded"]
    assert_own_rows(again, paths, outcomes)


def test_a_locked_store_is_told_and_not_touched(tmp_path: Path) -> None:
    paths = [draw(tmp_path / "0.png", 0)]
    phase = Phase(tmp_path)
    with StoreWriter(phase.store, command="another run"):
        with pytest.raises(StoreLockedError, match="another run"):
            phase.run(paths)
        assert phase.images == 0


def test_the_fingerprint_is_of_what_shapes_the_numbers(tmp_path: Path) -> None:
    phase = Phase(tmp_path)
    spec = phase.recipe.backbone
    base = EmbedConfig(backbone="tiny-random", image_size=28)
    same = [
        replace(base, embed_batch_size=3), replace(base, workers=5), replace(base, cache_dir="x"),
        replace(base, tta="full"), replace(base, patches="grid:2"), replace(base, image_size=30),
    ]  # fmt: skip
    other = [
        replace(base, image_size=42), replace(base, resize="pad"), replace(base, decode="exact"),
        replace(base, store_dtype="float32"), replace(base, colours="stored"),
    ]  # fmt: skip
    identity = make_recipe(base, spec, "fp32").fingerprint_id
    assert {make_recipe(o, spec, "fp32").fingerprint_id for o in same} == {identity}
    ids = [make_recipe(o, spec, "fp32").fingerprint_id for o in other]
    ids += [
        make_recipe(base, spec, "bf16").fingerprint_id,
        make_recipe(base, replace(spec, weights_id="0"), "fp32").fingerprint_id,
        make_recipe(base, replace(spec, mean=(0.0, 0.0, 0.0)), "fp32").fingerprint_id,
    ]
    assert len({identity, *ids}) == 1 + len(ids)
    moved = replace(spec, name="elsewhere", folder=Path("elsewhere"))
    assert make_recipe(base, moved, "fp32").fingerprint_id == identity
    # Name a cache on every machine: if these change, PREPROCESSING_VERSIONS or the backbone did.
    assert (
        make_recipe(replace(base, colours="stored"), spec, "fp32").fingerprint_id
        == "809ec5df84d3dbca"
    )
    assert identity == "123c1b0d218197e2"


def test_damage_found_meanwhile_is_mended_in_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_MAX_ROWS", 4)  # the first shard is full
    paths = [draw(tmp_path / f"{i}.png", i) for i in range(6)]
    phase = Phase(tmp_path)
    first = phase.run(paths[:5])
    name = f"{phase.recipe.kinds[0]}.28"
    (row,) = phase.store.rows(name, [first[2].sha256 or b""]).tolist()
    shard = phase.store.shards(name)[0]
    with shard.path.open("r+b") as stream:
        stream.seek(shard.features_at + row * shard.spec.row_bytes)
        byte = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte[0] ^ 1]))
    again = Phase(tmp_path)
    outcomes = again.run(paths)  # only the sixth is new, but writing looks through all
    assert [o.status for o in outcomes] == ["present"] * 2 + ["embedded"] + ["present"] * 2 + [
        "embedded"
    ]
    assert_own_rows(again, paths, outcomes)
