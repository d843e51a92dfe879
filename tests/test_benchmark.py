"""The benchmark tells what it measured, and judges only that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mirip_fast_cli.main import run

from mirip_fast import PairwiseRankingModel, PerformanceBenchmarks
from mirip_fast.evaluation.benchmark import REQUIRED_BATCH, REQUIREMENTS
from mirip_fast.finetune.benchmark import finetune_benchmark
from mirip_fast.ranking.benchmark import cached_benchmark, measured_accuracy


def measure(batch: int, accuracy: float | None = None) -> dict[str, object]:
    model = PairwiseRankingModel("tiny-random")
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    benchmarks = PerformanceBenchmarks(model, "cpu", image_size=28, batch_size=batch)
    report = benchmarks.run_full_benchmark(accuracy=accuracy)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in weights.items())
    return report


def test_requirements_are_judged_where_measured() -> None:
    report, need = measure(REQUIRED_BATCH, 0.61), REQUIREMENTS
    assert report["meets_accuracy_requirement"] is True
    for key, check, limit in (
        ("inference_time_ms", "meets_inference_requirement", need["inference_ms"]),
        ("memory_usage_gb", "meets_memory_requirement", need["memory_gb"]),
        ("training_hours_per_10k", "meets_training_requirement", need["training_hours"]),
    ):
        value = report[key]
        assert isinstance(value, float) and value > 0 and report[check] is (value < limit)
    small = measure(2, 0.59)
    assert (
        small["meets_memory_requirement"] is None and small["meets_accuracy_requirement"] is False
    )
    assert measure(2)["meets_accuracy_requirement"] is None


def test_the_cached_path() -> None:
    report = cached_benchmark(torch.device("cpu"), input_dim=16, images=200)
    assert report["accuracy"] is None and report["training_hours_per_10k"] > 0


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert measured_accuracy(tmp_path)[0] is None
    options = ["--backbone", "tiny-random", "--image-size", "28", "--images", "200"]
    assert run(["benchmark", *options]) == 0
    out = capfd.readouterr().out
    assert "not measured" in out and "not judged" in out and "2 pairs per step" in out
    assert "fine-tuning" in out and "s per step of 4 images, 10 epochs" in out


def test_fine_tuning_is_measured_with_the_backbone_learning(
    headed: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The documented requirement is about training end to end, with the backbone that the run has."""
    learned: list[int] = []
    adamw = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *args: object) -> object:
        learned.append(sum(p.grad is not None for g in self.param_groups for p in g["params"]))
        return adamw(self, *args)  # type: ignore[arg-type]

    spec = PairwiseRankingModel("tiny-random").spec
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        report = finetune_benchmark(spec, torch.device("cpu"), image_size=30, batch_size=32)
    assert len(learned) == 3 and min(learned) > 20  # more than a head's
    assert report["images_per_step"] == report["images_at_once"] == 32
    assert report["step_seconds"] > 0 and report["meets_memory_requirement"] is not None
    hours = report["step_seconds"] / 32 * 10_000 * 10 / 3600
    assert report["training_hours_per_10k"] == pytest.approx(hours)

    assert run(["benchmark", "--images", "200"]) == 0
    assert "tiny-random at" in capfd.readouterr().out
