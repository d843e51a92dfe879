"""The room that embed announces before it begins: whole shards, less what the shards there have free."""

from __future__ import annotations

import logging
from pathlib import Path
from unittest import mock

import pytest
from test_embed import Phase, draw

from mirip_fast.features import embed, shards
from mirip_fast.files import format_bytes


def shards_size(phase: Phase) -> int:
    return sum(file.stat().st_size for file in phase.store.path.glob("*.h5"))


def said(phase: Phase, n_images: int, caplog: pytest.LogCaptureFixture, free: int = 1 << 40) -> str:
    caplog.clear()
    with (
        caplog.at_level(logging.INFO, "mirip_fast.features.embed"),
        mock.patch.object(embed.shutil, "disk_usage", return_value=mock.Mock(free=free)),
    ):
        phase.phase.say(n_images)
    return caplog.text


@pytest.mark.parametrize("options", [{}, {"tta": "flip", "patches": "grid:2"}, {"patches": "none"}])
def test_what_is_announced_is_what_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, options: dict[str, str]
) -> None:
    phase = Phase(tmp_path, **options)
    paths = [draw(tmp_path / f"{i}.png", i) for i in range(3)]
    size = phase.phase.most_bytes(3)
    text = said(phase, 3, caplog)
    assert f"The features of 3 images take at most {format_bytes(size)} more in" in text
    assert text.count("\n") == 2 and "1.0 TiB are free" in text
    phase.run(paths)
    n_shards = len(list(phase.store.path.glob("*.h5")))
    assert size - n_shards * (16 << 10) <= shards_size(phase) <= size
    # They are there now, and there is room for others in the same files.
    assert "The features of 4000 images take no further space in" in said(phase, 4000, caplog)


def test_free_slots_are_not_counted_and_further_shards_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_MAX_ROWS", 4)
    paths = [draw(tmp_path / f"{i}.png", i) for i in range(20)]
    phase, done = Phase(tmp_path), 0
    for count in (3, 1, 6, 2, 8):
        before, size = shards_size(phase), phase.phase.most_bytes(count)
        phase.run(paths[done : done + count])
        done += count
        assert size * 0.05 <= shards_size(phase) - before <= size, (done, count)
    assert Phase(tmp_path).phase.most_bytes(0) == 0


def test_too_little_room_is_said_beforehand(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a disk with 88 KiB: six small images take a whole shard of each series."""
    phase = Phase(tmp_path)
    size = phase.phase.most_bytes(6)
    assert size > 1 << 20
    text = said(phase, 6, caplog, free=88 << 10)
    assert "There may be too little room" in text and "88.0 KiB are free" in text
    assert f"{format_bytes(size)} are needed" in text and "--cache-dir" in text
    assert "too little" in said(phase, 6, caplog, free=size - 1)
    assert "too little" not in said(phase, 6, caplog, free=size)
    phase.run([draw(tmp_path / "a.png", 1)])
    assert "too little" not in said(phase, 6, caplog, free=0)


def test_every_process_makes_shards_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = Phase(tmp_path)
    one = phase.phase.most_bytes(1)
    phase.run([draw(tmp_path / "a.png", 1)])
    assert [(s.part, n) for s, n, _ in phase.store.slots("cls.28")] == [(0, 4095)]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert phase.phase.most_bytes(1) == one  # each makes a part of its own
    assert phase.phase.most_bytes(100) == 3 * one
