"""The benchmark tells what it measured, and judges only that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mirip_fast_cli.main import run

from mirip_fast import PairwiseRankingModel, PerformanceBenchmarks
from mirip_fast.evaluation.benchmark import REQUIRED_BATCH, Requirements
from mirip_fast.ranking.benchmark import cached_benchmark, measured_accuracy


def measure(batch: int, accuracy: float | None = None) -> dict[str, object]:
    model = PairwiseRankingModel("tiny-random")
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    benchmarks = PerformanceBenchmarks(model, "cpu", image_size=28, batch_size=batch)
    report = benchmarks.run_full_benchmark(accuracy=accuracy)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in weights.items())
    return report


def test_requirements_are_judged_where_measured() -> None:
    report, need = measure(REQUIRED_BATCH, 0.61), Requirements()
    assert report["meets_accuracy_requirement"] is True
    for key, check, limit in (
        ("inference_time_ms", "meets_inference_requirement", need.inference_ms),
        ("memory_usage_gb", "meets_memory_requirement", need.memory_gb),
        ("training_hours_per_10k", "meets_training_requirement", need.training_hours),
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
