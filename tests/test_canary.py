"""The built-in picture: a backbone that gives other features is told, and nothing is mixed in."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_embed import Phase, draw

from mirip_fast.errors import StoreError
from mirip_fast.features import canary
from mirip_fast.features.backbone import Backbone
from mirip_fast.features.canary import CANARY_FILE


def drift(phase: Phase, monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Let the backbone's tokens be off by ``factor``, as with a changed kernel."""
    load = phase.load

    def changed() -> Backbone:
        backbone = load()
        features = backbone.features

        def off(pixels: torch.Tensor, kinds: Sequence[str]) -> dict[str, torch.Tensor]:
            rows = features(pixels, kinds)
            cls = rows["cls"]
            noise = torch.randn(cls.shape, generator=torch.Generator().manual_seed(0))
            return {**rows, "cls": cls + factor * noise * cls.norm() / noise.norm()}

        backbone.features = off  # type: ignore[method-assign]
        return backbone

    monkeypatch.setattr(phase, "load", changed)


def test_changed_features_are_told_and_not_mixed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [draw(tmp_path / f"{i}.png", i) for i in range(4)]
    Phase(tmp_path).run(paths[:2])
    kept = json.loads((Phase(tmp_path).store.path / CANARY_FILE).read_text())
    assert {"torch", "transformers", "pillow", "device"} <= kept["made_with"].keys()
    phase = Phase(tmp_path)
    drift(phase, monkeypatch, 0.01)
    real = canary.versions
    monkeypatch.setattr(canary, "versions", lambda b: {**real(b), "torch": "9.9"})
    with pytest.raises(StoreError) as told:
        phase.run(paths)
    text = str(told.value)
    assert "differ by 1.0" in text and "--cache-dir" in text
    assert f"torch {kept['made_with']['torch']} → 9.9" in text and "pillow" not in text
    assert len(phase.store.valid_hashes("cls.28")) == 2
    assert json.loads((phase.store.path / CANARY_FILE).read_text()) == kept
    # What is there can be used; and with the old libraries it goes on.
    assert [o.status for o in phase.run(paths[:2])] == ["present"] * 2
    assert [o.status for o in Phase(tmp_path).run(paths)] == ["present"] * 2 + ["embedded"] * 2


def test_arithmetic_is_not_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [draw(tmp_path / f"{i}.png", i) for i in range(3)]
    Phase(tmp_path).run(paths[:1])
    phase = Phase(tmp_path)
    drift(phase, monkeypatch, 1e-4)
    assert phase.run(paths)[2].status == "embedded"


@pytest.mark.parametrize("resize", ["squash", "pad"])
def test_another_decoder_is_seen_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resize: str
) -> None:
    """The picture goes through decoding and resizing like any other."""
    paths = [draw(tmp_path / f"{i}.png", i) for i in range(3)]
    Phase(tmp_path, resize=resize).run(paths[:1])
    real = canary.picture
    monkeypatch.setattr(canary, "picture", lambda recipe, size: real(recipe, size)[::-1].copy())
    with pytest.raises(StoreError):
        Phase(tmp_path, resize=resize).run(paths)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda c: c.clear(), "an entry is missing"),
        (lambda c: c["features"].clear(), "holds no features"),
        # Nothing differs from NaN by more than some number.
        (lambda c: c["features"]["cls.28"].__setitem__(3, float("nan")), "not finite"),
    ],
)
def test_a_damaged_canary_is_told(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], why: str
) -> None:
    paths = [draw(tmp_path / f"{i}.png", i) for i in range(2)]
    phase = Phase(tmp_path)
    phase.run(paths[:1])
    file = phase.store.path / CANARY_FILE
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(StoreError, match=rf"canary\.json cannot be read .*{why}"):
        phase.run(paths)


def test_the_picture_is_a_picture(tmp_path: Path) -> None:
    recipe = Phase(tmp_path).recipe
    pixels = canary.picture(recipe, 224)
    assert pixels.shape == (224, 224, 3) and pixels.dtype == np.uint8
    assert pixels.std() > 40 and all(pixels[..., c].std() > 40 for c in range(3))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [r.getMessage() for r in caplog.records if r.name == canary.__name__]
    caplog.clear()
    return found


def test_a_canary_that_is_gone_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A new one beside older features would hide that what is added now differs from them."""
    paths = [draw(tmp_path / f"{i}.png", i) for i in range(4)]
    phase = Phase(tmp_path)
    phase.run(paths[:1])
    assert warnings(caplog) == []  # a store without rows has none yet
    (phase.store.path / CANARY_FILE).unlink()
    phase.run(paths[:2])
    (said,) = warnings(caplog)
    assert f"{CANARY_FILE} is not there" in said and "--cache-dir" in said
    phase.run(paths[:3])
    assert warnings(caplog) == []


def test_another_process_may_store_the_canary_and_rows_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [draw(tmp_path / f"{i}.png", i) for i in range(2)]
    phase = Phase(tmp_path)
    phase.run(paths[:1])
    file = phase.store.path / CANARY_FILE
    theirs = file.read_text()
    file.unlink()
    real = canary.find_shards

    def other(*given: Any) -> Any:
        file.write_text(theirs)
        return real(*given)

    monkeypatch.setattr(canary, "find_shards", other)
    assert phase.run(paths)[1].status == "embedded"
    assert warnings(caplog) == [] and file.read_text() == theirs


def test_a_canary_that_is_not_finite_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [draw(tmp_path / f"{i}.png", i) for i in range(3)]
    phase = Phase(tmp_path)
    real = canary._features

    def overflowing(*given: Any) -> dict[str, Any]:
        return {**real(*given), "cls.28": np.full(64, np.inf, np.float32)}

    with monkeypatch.context() as patch:
        patch.setattr(canary, "_features", overflowing)
        phase.run(paths[:1])  # each picture's row is judged alone
    (said,) = warnings(caplog)
    assert "not finite in fp32" in said and not (phase.store.path / CANARY_FILE).exists()
    phase.run(paths[:2])
    (said,) = warnings(caplog)
    assert "is not there" in said
    monkeypatch.setattr(canary, "_features", overflowing)
    with pytest.raises(StoreError, match="test picture are not finite"):
        phase.run(paths)
    assert len(phase.store.valid_hashes("cls.28")) == 2
