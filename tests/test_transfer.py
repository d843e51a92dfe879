"""Copies to and from a GPU: the order of what is queued, tried with a stand-in; and the real thing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_embed import Phase, draw

from mirip_fast.features import engine
from mirip_fast.features.backbone import Backbone, load_backbone
from mirip_fast.features.backbone_files import build_tiny_random
from mirip_fast.features.engine import Speed
from mirip_fast.features.recipe import wanted_series

LOG: list[str] = []


class FakeStream:
    def __init__(self, name: str):
        self.name = name

    def wait_event(self, event: FakeEvent) -> None:
        LOG.append(f"{self.name} waits for {event.name}")


class FakeEvent:
    made = 0
    current = FakeStream("compute")

    def __init__(self, enable_timing: bool):
        assert enable_timing
        self.name = f"mark {FakeEvent.made % 6}"
        FakeEvent.made += 1

    def record(self) -> None:
        LOG.append(f"{FakeEvent.current.name}: {self.name}")

    def synchronize(self) -> None:
        LOG.append(f"waited for {self.name}")

    def elapsed_time(self, end: FakeEvent) -> float:
        return 2.0


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that says it is a GPU: the same calls, done at once."""
    build_tiny_random()  # imports what looks at the real ones
    names = iter(["in", "out"])
    empty = torch.empty

    @contextlib.contextmanager
    def stream(chosen: FakeStream) -> Iterator[None]:
        before, FakeEvent.current = FakeEvent.current, chosen
        yield
        FakeEvent.current = before

    def unpinned(*size: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        if pin_memory:
            LOG.append("pinned")
        return empty(*size, **options)

    monkeypatch.setattr(torch.cuda, "Stream", lambda _: FakeStream(next(names)))
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: FakeEvent.current)
    monkeypatch.setattr(torch, "empty", unpinned)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    monkeypatch.setattr(engine, "_is_cuda", lambda _: True)
    LOG.clear()
    FakeEvent.made = 0


def test_copies_and_passes_wait_for_each_other(tmp_path: Path, gpu: None) -> None:
    phase = Phase(tmp_path, tta="flip")
    speed = Speed()
    backbone = phase.load()
    runner = engine.Forward(backbone, phase.recipe, 4, speed)
    rng = np.random.default_rng(0)
    images = [(rng.integers(0, 256, (28, 28, 3), dtype=np.uint8),) for _ in range(3)]
    need, hashes = tuple(wanted_series(phase.recipe)), [bytes([i]) * 32 for i in range(3)]
    ((_, wait),) = runner.run((need, hashes, images))
    rows = wait()
    queued = [line for line in LOG if line != "pinned"]
    assert queued == [
        "in: mark 0", "in: mark 1", "compute waits for mark 1", "compute: mark 2", "compute: mark 3",
        "out waits for mark 3", "out: mark 4", "out: mark 5", "waited for mark 5",
    ]  # fmt: skip
    assert LOG.count("pinned") == 1 + 4  # the pictures; cls and mean of two views
    assert speed.busy["backbone"] == speed.busy["copy back"] == pytest.approx(0.002)
    for i, (square,) in enumerate(images):
        cls, _ = backbone.tokens(backbone.normalise(torch.from_numpy(square)[None]))
        spec = next(spec for spec in rows if spec.name == "cls.28")
        np.testing.assert_allclose(rows[spec][i], cls[0].numpy(), rtol=2e-3, atol=2e-3)


def test_a_whole_run_on_the_stand_in(tmp_path: Path, gpu: None) -> None:
    paths = [draw(tmp_path / f"{i}.png", i) for i in range(9)]
    phase = Phase(tmp_path)
    phase.limit = 3  # memory runs out once
    outcomes = phase.run(paths, batch_size=4)
    assert {o.status for o in outcomes} == {"embedded"}
    for path, outcome in zip(paths, outcomes, strict=True):
        got = phase.stored(outcome, "mean.28")
        np.testing.assert_allclose(got, phase.expected(path, "mean"), rtol=2e-3, atol=2e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_gives_the_features_of_the_processor(tmp_path: Path) -> None:
    paths = [draw(tmp_path / f"{i}.png", i) for i in range(40)]
    phase = Phase(tmp_path, precision="fp32")
    told: list[Speed] = []

    def load() -> Backbone:
        return load_backbone(phase.recipe.backbone, torch.device("cuda", 0), "fp32")

    outcomes = phase.run(paths, load, workers=2, batch_size=16, cores=None, on_speed=told.append)
    for path, outcome in zip(paths, outcomes, strict=True):
        for kind in ("cls", "mean"):
            got = phase.stored(outcome, f"{kind}.28")
            np.testing.assert_allclose(got, phase.expected(path, kind), rtol=5e-3, atol=5e-3)
    assert told[0].device == "cuda" and told[0].busy["copy back"] > 0
