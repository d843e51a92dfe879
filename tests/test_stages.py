"""Stages of a pipeline: order, short queues, and errors that reach whoever feeds them."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from mirip_fast.features.engine import STAGES, Speed, Stage


def test_after_ctrl_c_stopping_waits_for_what_is_being_done() -> None:
    """CPython takes a thread for ended whose join a signal broke off, while it goes on working."""
    waited_for, done = threading.Event(), []

    def work(items: list[int]) -> None:
        assert waited_for.wait(10)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.3)
        done.extend(items)

    stage: Stage[int] = Stage("t", work)
    stage.put(1)
    with pytest.raises(KeyboardInterrupt):
        stage.finish(waited_for.set)
    assert not stage.stop(drop=True, timeout_s=0.0), "it said that a working thread had ended"
    assert stage.stop(drop=True, timeout_s=5) and done == [1]


def report(device: str, busy: dict[str, float], cpu: dict[str, float], waiting: float = 0.0) -> str:
    speed = Speed(workers=2, threads=2 if device == "cpu" else 1, cores=4, device=device, images=9)
    speed.seconds = 10.0
    for stage in STAGES:
        speed.add(stage, busy.get(stage, 0.0), cpu.get(stage, 0.0))
    speed.wait(waiting)
    assert [row[0] for row in speed.rows()] == [*STAGES, "waiting for pictures"]
    return speed.bottleneck()


def test_the_bottleneck_and_its_flag_are_named() -> None:
    decode, backbone = "read + decode", "backbone"
    busy = {decode: 19.0, backbone: 4.0}
    assert "--workers (now 2 on 4 cores)" in report("cuda", busy, {}, waiting=6.0)
    assert "--workers" in report("cuda", {decode: 3.0, backbone: 4.0}, {}, waiting=6.0)
    assert "is the backbone" in report("cuda", {decode: 8.0, backbone: 9.8}, {}, waiting=0.1)
    assert "--patches" in report("cuda", {backbone: 5.0, "write": 9.5}, {})
    cpu = {decode: 10.0, backbone: 25.0}
    assert "--image-size" in report("cpu", {decode: 19.0, backbone: 19.0}, cpu)
    assert "--decode fast" in report(
        "cpu", {decode: 19.0, backbone: 19.0}, {decode: 25.0, backbone: 10.0}
    )
    assert "other programs" in report(
        "cpu", {decode: 19.0, backbone: 19.0}, {decode: 5.0, backbone: 9.0}
    )
    assert "is reading" in report("cpu", {decode: 19.0, backbone: 4.0}, {decode: 2.0}, waiting=15.0)
