"""The figures of `mirip-fast benchmark` for the cached path: features in memory, head only."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mirip_fast.config import Config, EmbedConfig
from mirip_fast.errors import RunNotFoundError
from mirip_fast.evaluation.benchmark import against_requirements, time_call
from mirip_fast.files import read_json, temporary_folder
from mirip_fast.models.head import RankingHead
from mirip_fast.ranking.fit import HeadFit
from mirip_fast.ranking.rows import Rows
from mirip_fast.ranking.scorer import load_score_model
from mirip_fast.training.optim import choose_preset
from mirip_fast.training.run_folder import Run, default_run
from mirip_fast.training.trackers import Trackers

_EPOCHS = 2  # measured; the rest is reckoned


def cached_benchmark(
    device: torch.device, *, input_dim: int, images: int = 10_000, accuracy: float | None = None
) -> dict[str, Any]:
    """Measure the cached path on random rows, with the keys of ``run_full_benchmark``.

    The training time is that of two epochs of the default recipe on ``images`` rows, checkpoints
    included, times the preset's epochs; the backbone's one pass is not in it.
    """
    head = RankingHead(input_dim).to(device).eval()
    pair = torch.randn(2, input_dim, device=device)

    @torch.inference_mode()
    def score() -> None:
        head(pair)

    milliseconds = 1000 * time_call(score, device, repeats=50)
    config = Config()
    preset = choose_preset(config.train, images)
    seconds = _seconds_per_epoch(config, images, input_dim, device)
    hours = seconds * preset.epochs * (10_000 / images) / 3600
    return against_requirements(device, inference_ms=milliseconds, hours=hours, accuracy=accuracy)


def _seconds_per_epoch(config: Config, images: int, input_dim: int, device: torch.device) -> float:
    rng = np.random.default_rng(0)

    def rows(n: int) -> Rows:
        features = rng.standard_normal((n, 1, input_dim), dtype=np.float32)
        tiers = rng.integers(4, size=n).astype(np.int64)
        return Rows([str(i) for i in range(n)], features, tiers, [None] * n)

    preset = choose_preset(config.train, images)
    measured = type(preset)(preset.batch_size, preset.learning_rate, _EPOCHS)
    fit = HeadFit(rows(images), rows(max(10, images // 8)), config, measured, {}, device)
    quiet = logging.getLogger("mirip_fast.ranking.fit")
    with temporary_folder() as folder:
        quiet.disabled = True  # epochs on random rows tell nothing
        try:
            return float(fit.run(Run(folder), Trackers({}))["seconds"]) / _EPOCHS
        finally:
            quiet.disabled = False


def looks_through(output_dir: Path) -> EmbedConfig | None:
    """Backbone and preprocessing of the newest finished run's model; None where there is none."""
    try:
        model = load_score_model(default_run(output_dir).model)
    except RunNotFoundError:
        return None
    return (model.members[0].info or model.info).embed


def measured_accuracy(output_dir: Path) -> tuple[float | None, str]:
    """Test pairwise accuracy of the newest finished run, and where it is from."""
    try:
        run = default_run(output_dir)
        report = read_json(run.path / "evaluation_test.json")
        return float(report["pairwise_accuracy"]), str(run.path)
    except (RunNotFoundError, FileNotFoundError):
        return None, "not measured: run `mirip-fast evaluate` first"
    except (OSError, ValueError, KeyError) as error:
        return None, f"not measured: {error}"
