"""What the end-to-end loop says of itself: the values of an epoch, as logged, kept and tracked."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

import torch

from mirip_fast.finetune.fit_parts import Progress

if TYPE_CHECKING:
    from mirip_fast.finetune.fit import FullFit

log = logging.getLogger(__name__)


def rates_of(fit: FullFit) -> dict[str, float]:
    """Learning rate of every group of parameters, by name."""
    groups = zip(fit.names, fit.optimizer.param_groups, strict=True)
    return {name: float(group["lr"]) for name, group in groups}


def epoch_values(
    fit: FullFit, progress: Progress, loss: float, accuracy: float
) -> dict[str, float]:
    """The columns of history.csv, from what an epoch saw and how the validation split was judged."""
    return {
        "train/loss": progress.loss / max(1, progress.steps),
        "train/accuracy": progress.right / progress.pairs if progress.pairs else math.nan,
        "val/loss": loss,
        "val/accuracy": accuracy,
        "learning_rate": max(rates_of(fit).values()),
        "epoch_seconds": progress.seconds,
        "gradient_norm": progress.norm / max(1, progress.steps),
        "images_per_second": progress.images / max(progress.seconds, 1e-9),
        "data_seconds": progress.waited,
        "memory_gib": _memory(fit.device),
    }


def tell_epoch(fit: FullFit, values: dict[str, float], *, is_best: bool) -> None:
    """One line of the log."""
    log.info(
        "epoch %3d/%d  loss %.4f  accuracy %.4f  val loss %.4f  val accuracy %.4f  "
        "%.1f s, %.1f images/s%s",
        fit.epoch,
        fit.plan.epochs,
        values["train/loss"],
        values["train/accuracy"],
        values["val/loss"],
        values["val/accuracy"],
        values["epoch_seconds"],
        values["images_per_second"],
        "  best" if is_best else "",
    )


def _memory(device: torch.device) -> float:
    """Peak memory of this process, in GiB: of the GPU where there is one."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
