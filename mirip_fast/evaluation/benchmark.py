"""How fast and how large a model is on this machine, against the documented requirements."""

from __future__ import annotations

import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mirip_fast.evaluation.evaluator import score_pairs
from mirip_fast.models.losses import pair_loss
from mirip_fast.runtime import resolve_device, set_seed

__all__ = ["PerformanceBenchmarks", "against_requirements", "set_seed", "time_call"]

#: Pairs per step that the memory requirement is about.
REQUIRED_BATCH = 32


#: What the documented checklist asks for.
REQUIREMENTS = {
    "inference_ms": 100.0,  # per pair, below
    "memory_gb": 12.0,  # at batch size 32, below
    "training_hours": 6.0,  # for 10,000 images, below
    "accuracy": 0.60,  # pairwise, at least
}


def time_call(call: Callable[[], object], device: torch.device, *, repeats: int) -> float:
    """Median seconds of a call, after one warm-up; the device is waited for."""

    def once() -> float:
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    once()
    return statistics.median(once() for _ in range(repeats))


def against_requirements(
    device: torch.device,
    *,
    hours: float,
    inference_ms: float | None = None,
    accuracy: float | None = None,
    whole: bool = True,
) -> dict[str, Any]:
    """What was measured, with the peak of memory, and what of it meets the :data:`REQUIREMENTS`.

    Args:
        device: where it was measured.
        hours: training for 10,000 images.
        inference_ms: per pair; None: not measured.
        accuracy: pairwise (0–1); None: not measured.
        whole: whether the batch was as large as the memory requirement says.

    Returns:
        See :meth:`PerformanceBenchmarks.run_full_benchmark`.
    """
    memory_gb, kind = peak_memory_gb(), "peak resident memory of the process"
    name = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        memory_gb = torch.cuda.max_memory_allocated(device) / (1 << 30)
        kind, name = "peak allocated on the GPU", torch.cuda.get_device_name(device)
    need = REQUIREMENTS
    return {
        "inference_time_ms": inference_ms,
        "memory_usage_gb": memory_gb,
        "memory_kind": kind,
        "training_hours_per_10k": hours,
        "accuracy": accuracy,
        "meets_inference_requirement": None
        if inference_ms is None
        else inference_ms < need["inference_ms"],
        "meets_memory_requirement": memory_gb < need["memory_gb"] if whole else None,
        "meets_training_requirement": hours < need["training_hours"],
        "meets_accuracy_requirement": None if accuracy is None else accuracy >= need["accuracy"],
        "device": name,
    }


class PerformanceBenchmarks:
    """Measures a whole model: images through backbone and head.

    Args:
        model: any module whose ``forward(first images, second images)`` gives two scores, [B] or [B, 1].
        device: where to measure.
        image_size: side of the random images, in pixels.
        batch_size: pairs of the training step whose memory and time are measured.
        repeats: calls behind each median.
    """

    def __init__(
        self,
        model: nn.Module,
        device: str | torch.device = "auto",
        *,
        image_size: int = 768,
        batch_size: int = REQUIRED_BATCH,
        repeats: int = 3,
    ):
        self.device = resolve_device(str(device))
        self.model = model.to(self.device)
        self.image_size, self.batch_size, self.repeats = image_size, batch_size, repeats

    def run_full_benchmark(
        self, *, accuracy: float | None = None, epochs: int = 100
    ) -> dict[str, Any]:
        """Measure inference, memory and a training step.

        Args:
            accuracy: pairwise accuracy measured elsewhere, in 0–1; None: not measured.
            epochs: passes that the training time is reckoned for.

        Returns:
            inference_time_ms: median per pair, one pair at a time.
            memory_usage_gb: CUDA: peak allocated in a training step of ``batch_size`` pairs; else the
                peak resident memory of the process; ``memory_kind`` says which.
            training_hours_per_10k: ``epochs`` passes over 10,000 pairs, reckoned from one measured step.
            accuracy: as given.
            meets_inference_requirement, meets_memory_requirement, meets_training_requirement,
            meets_accuracy_requirement: whether; None where not measured (memory: with smaller batches).
            device: its name.
        """
        inference_ms = 1000 * self.measure_inference()
        step_seconds = self.measure_training_step()
        hours = step_seconds / self.batch_size * 10_000 * epochs / 3600
        whole = self.batch_size >= REQUIRED_BATCH
        return against_requirements(
            self.device, inference_ms=inference_ms, hours=hours, accuracy=accuracy, whole=whole
        )

    def measure_inference(self) -> float:
        """Median seconds of scoring one pair of images."""
        self.model.eval()
        first, second = self._images(1), self._images(1)
        score_pairs(self.model, first, second)  # refuses what gives no two scores

        @torch.inference_mode()
        def score() -> None:
            self.model(first, second)

        return time_call(score, self.device, repeats=self.repeats)

    def measure_training_step(self) -> float:
        """Seconds of one training step; the weights are not changed."""
        self.model.train()
        first, second = self._images(self.batch_size), self._images(self.batch_size)
        labels = torch.ones(self.batch_size, device=self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

        def step() -> None:
            score1, score2 = score_pairs(self.model, first, second)
            pair_loss(score1, score2, labels).backward()  # type: ignore[no-untyped-call]
            self.model.zero_grad(set_to_none=True)

        return time_call(step, self.device, repeats=1)

    def _images(self, count: int) -> torch.Tensor:
        size = (count, 3, self.image_size, self.image_size)
        return torch.randn(size, device=self.device)


def peak_memory_gb() -> float:
    """Peak resident memory of this process so far, in GB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / (1 << 30)
