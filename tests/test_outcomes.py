"""The ledger of a run: compact, and the same as one made with plain lists and dicts."""

from __future__ import annotations

import numpy as np
import pytest

from mirip_fast.errors import ImageError
from mirip_fast.features.outcomes import InputHashes, Outcome, ledger


def naive(
    known: list[bytes | ImageError], embedded: set[bytes], failures: dict[bytes, str]
) -> list[Outcome]:
    result: list[Outcome] = []
    for i, sha in enumerate(known):
        if isinstance(sha, ImageError):
            result.append(Outcome("failed", None, str(sha)))
        elif sha in failures:
            result.append(Outcome("failed", sha, failures[sha]))
        elif sha in known[:i]:
            result.append(Outcome("duplicate", sha))
        else:
            result.append(Outcome("embedded" if sha in embedded else "present", sha))
    return result


@pytest.mark.parametrize("seed", range(20))
def test_the_ledger_is_that_of_plain_lists(seed: int) -> None:
    rng = np.random.default_rng(seed)
    contents = [rng.bytes(32) for _ in range(8)]
    contents += [contents[0][:8] + rng.bytes(24) for _ in range(4)]  # alike at the beginning
    contents += [bytes(32), bytes(31) + b"\1", b"\1" + bytes(31)]
    known: list[bytes | ImageError] = [
        ImageError(f"broken {i}") if rng.random() < 0.2 else contents[rng.integers(len(contents))]
        for i in range(int(rng.integers(0, 60)))
    ]
    embedded = {sha for sha in contents if rng.random() < 0.5}
    failures = {sha: "no" for sha in contents if rng.random() < 0.2}
    flags = np.array([sha in embedded for sha in known], bool)
    made = ledger(InputHashes.of(known), flags, failures)
    assert list(made) == naive(known, embedded, failures)
    assert len(made) == len(known)


def test_parts_are_all_that_could_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InputHashes, "_AT_ONCE", 4)
    inputs = InputHashes(11)
    for i in (0, 3, 4, 5, 10):
        inputs[i] = bytes([i]) * 32
    inputs.fail(5, "changed")  # known a moment ago
    found = [
        (i, sha)
        for where, hashes in inputs.parts()
        for i, sha in zip(where.tolist(), hashes, strict=True)
    ]
    assert found == [(i, bytes([i]) * 32) for i in (0, 3, 4, 10)]
    assert inputs[5] is None and inputs[1] is None and inputs[10] == b"\n" * 32


def test_a_ledger_is_a_sequence() -> None:
    made = ledger(InputHashes.of([bytes(32), ImageError("no"), bytes(32)]))
    assert made[-1] == made[2] == Outcome("duplicate", bytes(32))
    assert [o.status for o in made[:2]] == ["present", "failed"]
    with pytest.raises(IndexError):
        made[3]
    assert list(ledger(InputHashes(0))) == []


def test_an_input_that_was_forgotten_is_told() -> None:
    inputs = InputHashes(3)
    inputs.fail(0, "no")
    inputs[0] = bytes(32)  # read after all
    inputs[1] = b"a" * 32
    made = list(ledger(inputs))
    assert [o.status for o in made] == ["present", "present", "failed"]
    assert made[0].reason is None and "not looked at" in str(made[2].reason)
    with pytest.raises(ValueError, match="32 bytes"):
        inputs[2] = b"a"


def test_a_run_without_any_readable_input() -> None:
    assert [o.status for o in ledger(InputHashes.of([ImageError("no")] * 3))] == ["failed"] * 3


def test_repeats_are_found_however_far_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InputHashes, "_AT_ONCE", 3)
    order = [0, 1, 0, 2, 2, 3, 1, -1, 4, -1, 4, 0, 5]
    known = [ImageError("no") if n < 0 else bytes([n]) * 32 for n in order]
    repeated = InputHashes.of(known).repeated().tolist()
    assert repeated == [n >= 0 and n in order[:i] for i, n in enumerate(order)]
