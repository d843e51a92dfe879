"""The ledger of a run: every input has one status."""

from __future__ import annotations

import pytest

from mirip_fast.errors import ImageError
from mirip_fast.features.outcomes import LEFT, Outcome, ledger, summarise

A, B, C, D = (bytes([n]) * 32 for n in range(4))


def test_every_input_has_one_status() -> None:
    known = [A, ImageError("broken"), B, A, C, None, D, C]
    made = ledger(known, {A, C, D}, {D: "no"})
    assert made == [
        Outcome("embedded", A), Outcome("failed", None, "broken"), Outcome("present", B),
        Outcome("duplicate", A), Outcome("embedded", C),
        Outcome("failed", None, "it was not looked at; run the same command again"),
        Outcome("failed", D, "no"), Outcome("duplicate", C),
    ]  # fmt: skip
    assert ledger([]) == []
    assert [o.status for o in ledger([A, A])] == ["present", "duplicate"]


def test_a_stopped_run_says_what_is_left() -> None:
    made = ledger([A, B, None, A, B, ImageError("x")], {A}, {}, left={B})
    assert [o.status for o in made] == ["embedded", LEFT, LEFT, "duplicate", LEFT, "failed"]
    s = summarise(made, 0.0)
    assert (s.inputs, s.embedded, s.present, s.duplicate, s.failed, s.left) == (6, 1, 0, 1, 1, 3)
    with pytest.raises(AssertionError):
        summarise([Outcome("lost")], 0.0)
