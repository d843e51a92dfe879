"""The figures of `mirip-fast benchmark` for fine-tuning: steps of `train --full`."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mirip_fast.config import Config
from mirip_fast.evaluation.benchmark import REQUIRED_BATCH, against_requirements
from mirip_fast.features.backbone import load_model
from mirip_fast.features.backbone_files import BackboneSpec
from mirip_fast.features.recipe import effective_size, head_kinds
from mirip_fast.finetune.data import Batches, Pictures
from mirip_fast.finetune.fit import FullFit, Plan
from mirip_fast.finetune.model import ScoringModel
from mirip_fast.finetune.strategy import parse_strategy, prepare_model
from mirip_fast.finetune.train import EPOCHS
from mirip_fast.models.head import RankingHead
from mirip_fast.ranking.rows import Rows
from mirip_fast.runtime import resolve_precision
from mirip_fast.training.run_folder import Run

_STEPS = 3  # of which the first warms up


def finetune_benchmark(
    spec: BackboneSpec, device: torch.device, *, image_size: int, batch_size: int = REQUIRED_BATCH
) -> dict[str, Any]:
    """Measure steps of the default recipe on random images, with the keys of ``run_full_benchmark``.

    Where memory runs out on a GPU, the step is done in micro-batches, as training does it.

    Args:
        spec: the backbone.
        device: where.
        image_size: side of the images, in pixels; rounded down to whole patches.
        batch_size: images per step.

    Returns:
        Besides those keys: step_seconds (the median), images_per_step, and images_at_once (those of a
        micro-batch). Reading and augmenting images, evaluating and saving are not in the figures.
    """
    config = Config()
    size = effective_size(image_size, spec.patch_size)
    strategy = parse_strategy(config.finetune, spec.num_layers)
    head = RankingHead(spec.hidden_size * len(head_kinds("cls+mean")), config.head)
    model = ScoringModel(spec, load_model(spec), head, "cls+mean")
    prepare_model(model, strategy, config.finetune)
    model.to(device)
    tiers = np.arange(batch_size, dtype=np.int64) % len(config.data.tier_names())
    rows = Rows(
        [""] * batch_size, np.empty((batch_size, 0, 0), np.float32), tiers, [None] * batch_size
    )
    precision = resolve_precision("auto", device)
    plan = Plan(_STEPS, batch_size, head_epochs=0, patience=0, precision=precision, size=size)
    made_up = torch.randint(256, (batch_size, size, size, 3), dtype=torch.uint8)
    pixels = Batches(Pictures([], size, kept=made_up), 0, 0, pinned=False)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    fit = FullFit(model, strategy, rows, pixels, rows, pixels, config, plan, {})
    marks = []
    for _ in range(_STEPS):  # an epoch is one step
        started = time.perf_counter()
        fit.train_epoch(Run(Path()))  # saves nothing
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        marks.append(time.perf_counter() - started)
        fit.now["steps"] = 0
    seconds = statistics.median(marks[1:])
    hours, whole = seconds / batch_size * 10_000 * EPOCHS / 3600, batch_size >= REQUIRED_BATCH
    return {
        **against_requirements(device, hours=hours, whole=whole),
        "step_seconds": seconds,
        "images_per_step": batch_size,
        "images_at_once": -(-batch_size // fit.parts_per_step),
    }
