"""Held-out scores come back as they were written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mirip_fast.errors import DataError
from mirip_fast.ranking.held_out import HELD_OUT_FILE, HeldOut, load_held_out, save_held_out

TIERS = ("S", "A", "B")


def test_round_trip_to_the_last_bit(tmp_path: Path) -> None:
    held_out = HeldOut(
        ids=["가", "b,\n", "c"],
        paths=[Path("가.png"), Path("b.png"), Path("c.png")],
        tiers=np.array([2, 0, 1]),
        tier_scores=[None, 1.5, 0.1],
        groups=["x", None, "x"],
        source="out-of-fold",
        scores=np.array([0.1 + 0.2, -1e-17, 3.0]),
    )
    save_held_out(tmp_path, held_out, TIERS)
    read = load_held_out(tmp_path, TIERS)
    assert read is not None
    assert (read.ids, read.paths, read.groups) == (held_out.ids, held_out.paths, held_out.groups)
    assert read.tier_scores == held_out.tier_scores
    assert read.source == "out-of-fold"
    np.testing.assert_array_equal(read.tiers, held_out.tiers)
    np.testing.assert_array_equal(read.scores, held_out.scores)


def test_no_file_is_no_scores(tmp_path: Path) -> None:
    assert load_held_out(tmp_path, TIERS) is None


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / HELD_OUT_FILE).write_text("image_id,tier\na,Z\n", encoding="utf-8")
    with pytest.raises(DataError, match=HELD_OUT_FILE):
        load_held_out(tmp_path, TIERS)
