"""The overlapped stages of embedding: nothing is done twice, nothing piles up, errors and stops come through."""

from __future__ import annotations

import errno
import gc
import hashlib
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_embed import Phase, assert_own_rows, draw
from torch import nn

from mirip_fast.data import decode_worker
from mirip_fast.data.decode_worker import Decoded
from mirip_fast.errors import DiskFullError
from mirip_fast.features.backbone import Backbone
from mirip_fast.features.engine import Engine, Speed, default_batch_size
from mirip_fast.features.recipe import pool_tokens
from mirip_fast.features.store_writer import StoreWriter


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often files were read and decoded in this process."""
    counts = {"read_image": 0, "decode_squares": 0}

    def counting(name: str) -> Callable[..., Any]:
        real = getattr(decode_worker, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return real(*args, **kwargs)

        return call

    for name in counts:
        monkeypatch.setattr(decode_worker, name, counting(name))
    return counts


def test_each_file_is_read_once_and_decoded_once_for_all_views(
    tmp_path: Path, counted: dict[str, int]
) -> None:
    paths = [draw(tmp_path / f"{i}.png", i) for i in range(5)]
    paths.append(tmp_path / "copy.png")
    paths[-1].write_bytes(paths[0].read_bytes())
    phase = Phase(tmp_path, tta="full", image_size=140)
    outcomes = phase.run(paths)
    assert counted == {"read_image": 6, "decode_squares": 5}  # a copy is read, not decoded
    assert [o.status for o in outcomes] == ["embedded"] * 5 + ["duplicate"]
    views = ("126", "140", "154", "126-flip", "140-flip", "154-flip")
    assert phase.store.series().keys() == {f"{k}.{v}" for k in ("cls", "mean") for v in views}
    # Moved files are read once more, and not decoded; known ones are not even read.
    moved = [path.rename(path.with_name(f"moved {path.name}")) for path in paths]
    assert {o.status for o in phase.run(moved)} == {"present", "duplicate"}
    assert counted == {"read_image": 12, "decode_squares": 5}


def test_a_file_that_has_settled_is_not_read_again(
    tmp_path: Path, counted: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mirip_fast.data.image_files.SETTLED_NS", -1)
    paths = [draw(tmp_path / f"{i}.png", i) for i in range(5)]
    phase = Phase(tmp_path)
    phase.run(paths)
    phase.run(paths)
    assert counted == {"read_image": 5, "decode_squares": 5}
    phase.run(paths, rehash=True)
    assert counted == {"read_image": 10, "decode_squares": 5}


@pytest.mark.parametrize("cores", [2, 4])
def test_several_lanes_give_the_same_rows(tmp_path: Path, cores: int) -> None:
    paths = [draw(tmp_path / f"{i}.png", i) for i in range(33)]
    before = torch.get_num_threads()
    phase = Phase(tmp_path)
    outcomes = phase.run(paths, cores=cores, workers=2, batch_size=3)
    assert phase.images == 33 and torch.get_num_threads() == before
    assert_own_rows(phase, paths, outcomes)
    assert not [t.name for t in threading.enumerate() if t.name.startswith("mirip")]


class Stub(Backbone):
    """Takes no time: its CLS token is the mean colour."""

    def __init__(self, phase: Phase):
        super().__init__(phase.recipe.backbone, nn.Identity(), torch.device("cpu"), "fp32")

    def features(self, pixels: torch.Tensor, kinds: Sequence[str]) -> dict[str, torch.Tensor]:
        n, side = len(pixels), pixels.shape[-1] // self.spec.patch_size
        colour = pixels.mean(dim=(1, 2, 3)).view(n, 1).expand(n, self.spec.hidden_size)
        patches = colour.view(n, 1, 1, -1).expand(n, side, side, -1)
        return {kind: pool_tokens(kind, colour, patches) for kind in kinds}


def test_pictures_do_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a writer that is slower than everything before it, only a window of pictures is in memory."""
    (path,) = [draw(tmp_path / "0.png", 0)]
    data, most = path.read_bytes(), 0
    paths = []
    for i in range(300):
        paths.append(tmp_path / f"{i}.png")
        paths[-1].write_bytes(data + bytes([i // 256, i % 256]))
    phase = Phase(tmp_path)
    append = StoreWriter.append

    def slowly(writer: StoreWriter, *args: Any) -> None:
        nonlocal most
        time.sleep(0.01)
        most = max(most, sum(isinstance(t, np.ndarray) and t.shape == (28, 28, 3) for t in alive()))
        append(writer, *args)

    def alive() -> list[Any]:
        found = []
        for thing in gc.get_objects():
            if type(thing) is Decoded:
                found.extend(thing.images)
            elif type(thing) is tuple and len(thing) == 3 and type(thing[2]) is list:  # a batch
                # Anything of this shape may be alive elsewhere: only squares are counted.
                of_images = (image for image in thing[2] if isinstance(image, (tuple, list)))
                found.extend(square for image in of_images for square in image)
        return found

    monkeypatch.setattr(StoreWriter, "append", slowly)
    outcomes = phase.run(paths, lambda: Stub(phase), workers=2, cores=2)
    assert {o.status for o in outcomes} == {"embedded"}
    assert 0 < most <= 64 + 2 * 4 * 8, most


def test_a_full_disk_is_told_as_such_and_keeps_what_was_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [draw(tmp_path / f"{i}.png", i) for i in range(30)]
    phase = Phase(tmp_path)
    append, calls = StoreWriter.append, []

    def full(writer: StoreWriter, hashes: Any, features: Any) -> None:
        calls.extend(hashes)
        if len(calls) > 8:
            from mirip_fast.files import disk_full

            raise disk_full(phase.store.path, 4096) from OSError(errno.ENOSPC, "full")
        append(writer, hashes, features)

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "append", full)
        with pytest.raises(DiskFullError, match="run the same command again"):
            phase.run(paths, batch_size=2, cores=2)
    assert not [t.name for t in threading.enumerate() if t.name.startswith("mirip")]
    again = Phase(tmp_path)
    outcomes = again.run(paths)
    assert 0 < [o.status for o in outcomes].count("present") < 30
    assert_own_rows(again, paths, outcomes)


def test_a_long_pass_is_broken_off_when_the_run_stops(tmp_path: Path) -> None:
    """A pass of a big backbone may take a minute; stopping does not wait for its end."""
    paths = [draw(tmp_path / f"{i}.png", i) for i in range(8)]
    phase = Phase(tmp_path)

    class Slow(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            time.sleep(0.05)
            return x

    class Big(Stub):
        def __init__(self) -> None:
            super().__init__(phase)
            self.model = nn.Sequential(*(Slow() for _ in range(400)))  # 20 s

        def features(self, pixels: torch.Tensor, kinds: Sequence[str]) -> dict[str, torch.Tensor]:
            if started.is_set():
                self.model(pixels)
            started.set()  # by the canary
            return super().features(pixels, kinds)

    started = threading.Event()

    def stop(*progress: int) -> None:
        if started.is_set():
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        phase.run(paths, Big, batch_size=2, cores=2, progress=stop)
    assert time.monotonic() - began < 10
    assert not [t.name for t in threading.enumerate() if t.name.startswith("mirip")]
    with StoreWriter(phase.store):
        pass  # the lock was given back


def test_ctrl_c_at_the_tail_of_a_run_leaves_no_thread_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All is decoded, and the run waits for the last pass. A thread left in torch would abort the process."""
    paths = [draw(tmp_path / f"{i}.png", i) for i in range(6)]
    phase = Phase(tmp_path)
    at_the_tail, interrupted = threading.Event(), threading.Event()
    finish = Engine.finish

    def noted(engine: Engine, tick: Callable[[], None]) -> None:
        def ticking() -> None:
            at_the_tail.set()
            tick()

        finish(engine, ticking)

    class Last(Stub):
        def features(self, pixels: torch.Tensor, kinds: Sequence[str]) -> dict[str, torch.Tensor]:
            if len(pixels) == 2 and at_the_tail.wait(10) and not interrupted.is_set():
                interrupted.set()
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                time.sleep(0.3)  # the pass goes on
            return super().features(pixels, kinds)

    monkeypatch.setattr(Engine, "finish", noted)
    with pytest.raises(KeyboardInterrupt):
        phase.run(paths, lambda: Last(phase), batch_size=2)
    assert interrupted.is_set()
    assert not [t.name for t in threading.enumerate() if t.name.startswith("mirip")]
    rows = phase.store.rows(
        "cls.28", [hashlib.sha256(path.read_bytes()).digest() for path in paths]
    )
    assert (rows >= 0).sum() == 2, "what the pass gave is committed, and no other pass begins"


def test_where_the_time_went_is_told(tmp_path: Path) -> None:
    paths = [draw(tmp_path / f"{i}.png", i) for i in range(12)]
    phase, told = Phase(tmp_path), []
    for _ in range(2):
        phase.run(paths, workers=1, cores=2, on_speed=told.append)
    (report,) = told  # the second run had nothing to do
    assert isinstance(report, Speed) and report.images == 12 and report.threads == 2
    for stage in ("read + decode", "backbone", "write"):
        assert report.busy[stage] > 0 and 0 < report.share[stage] <= 1.01, stage
    assert report.cpu["read + decode"] > 0 and report.bottleneck()


def test_the_batch_size_follows_the_number_of_tokens(tmp_path: Path) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    sizes = [
        [default_batch_size(Phase(tmp_path, image_size=s).recipe, d) for s in (28, 224, 756, 3000)]
        for d in (cpu, gpu)
    ]
    assert sizes == [[32, 3, 1, 1], [256, 256, 44, 2]]


def test_compiled_code_sees_one_shape(tmp_path: Path) -> None:
    """A batch that is not full is filled up, and what was filled up is left out."""
    paths = [draw(tmp_path / f"{i}.png", i) for i in range(7)]
    phase = Phase(tmp_path)
    load, shapes = phase.load, set()

    def compiled() -> Backbone:
        backbone = load()
        features = backbone.features
        backbone.compiled = True

        def seen(pixels: torch.Tensor, kinds: Sequence[str]) -> dict[str, torch.Tensor]:
            shapes.add(tuple(pixels.shape))
            return features(pixels, kinds)

        backbone.features = seen  # type: ignore[method-assign]
        return backbone

    outcomes = phase.run(paths, compiled, cores=2)
    assert shapes == {(4, 3, 28, 28)}
    assert_own_rows(phase, paths, outcomes)
