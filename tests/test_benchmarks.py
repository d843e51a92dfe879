"""Every benchmark starts: one that no longer imports measures nothing, and nobody would know."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
#: Those that run in a moment; the others say what they take.
SMALL = {
    "evaluator": ["--images", "60", "--rounds", "5"],
    "neighbours": ["--rows", "3000", "--width", "8"],
}


def start(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    monkeypatch.syspath_prepend(BENCHMARKS)
    own = [path.stem for path in BENCHMARKS.glob("*.py")]
    before = {name: sys.modules.pop(name) for name in own if name in sys.modules}
    try:
        runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
    except SystemExit as end:
        assert not end.code, end.code
    finally:  # modules of the tests have some of the same names
        for name in own:
            sys.modules.pop(name, None)
        sys.modules.update(before)


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py")))
def test_a_benchmark_starts(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start(name, SMALL.get(name, ["--help"]), monkeypatch)
    if (BENCHMARKS / f"{name}.py").read_text(encoding="utf-8").count('__name__ == "__main__"'):
        assert capsys.readouterr().out


def test_the_label_simulation_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "data" / "images").mkdir(parents=True)
    rows = ["filename,tier_score"]
    for i in range(30):
        pixels = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / "images" / f"{i}.png")
        rows.append(f"{i}.png,{i}")
    (tmp_path / "data" / "metadata.csv").write_text("\n".join(rows) + "\n")
    monkeypatch.chdir(tmp_path)
    arguments = ["data", "--backbone", "tiny-random", "--image-size", "28"]
    start("label_simulation", [*arguments, "--seeds", "1", "--judgements", "12"], monkeypatch)
    assert "Pairwise accuracy, works not judged" in capsys.readouterr().out
