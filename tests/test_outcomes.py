"""The ledger of a run: every input has one status."""

from __future__ import annotations

import pytest

from mirip_fast.errors import ImageError
from mirip_fast.features.outcomes import LEFT, ledger, summarise

A, B, C, D = (bytes([n]) * 32 for n in range(4))


def test_every_input_has_one_status() -> None:
    known = [A, ImageError("broken"), B, A, C, None, D, C]
    made = ledger(known, {A, C, D}, {D: "no"})
    assert [*made.itertuples(index=False, name=None)] == [
        ("embedded", None, A), ("failed", "broken", None), ("present", None, B),
        ("duplicate", None, A), ("embedded", None, C),
        ("failed", "it was not looked at; run the same command again", None),
        ("failed", "no", D), ("duplicate", None, C),
    ]  # fmt: skip
    assert len(ledger([])) == 0
    assert ledger([A, A])["status"].tolist() == ["present", "duplicate"]


def test_a_stopped_run_says_what_is_left() -> None:
    made = ledger([A, B, None, A, B, ImageError("x")], {A}, {}, left={B})
    assert made["status"].tolist() == ["embedded", LEFT, LEFT, "duplicate", LEFT, "failed"]
    counts = {"inputs": 6, "embedded": 1, "present": 0, "duplicate": 1, "failed": 1, LEFT: 3}
    assert summarise(made) == counts
    with pytest.raises(AssertionError):
        summarise(made.replace({"status": {LEFT: "lost"}}))
