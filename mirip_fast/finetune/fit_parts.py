"""What the end-to-end loop is given, and what it keeps count of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mirip_fast.finetune.plan import Sample
from mirip_fast.training.trackers import Trackers

#: Gives the model's input of each list of samples, in order: pixels or kept tokens.
Load = Callable[[Sequence[Sequence[Sample]]], Iterator[torch.Tensor]]


@dataclass(frozen=True)
class Graded:
    """Graded images of one split.

    Attributes:
        tiers: [n] int64, 0 is the best tier.
        grades: [n] float64 what pairs are made by, higher is better: minus the tier, or the tier_score.
        groups: [n], None for an image that is its own group.
        within: [n] int64 codes inside which pairs count, or None for all pairs.
        load: gives their pixels or tokens.
    """

    tiers: NDArray[np.int64]
    grades: NDArray[np.float64]
    groups: Sequence[str | None]
    within: NDArray[np.int64] | None
    load: Load


@dataclass(frozen=True)
class Plan:
    """How a run goes, decided before it starts.

    Attributes:
        epochs: at most.
        batch_size: images per step.
        head_epochs: first epochs in which only the head learns.
        patience: epochs without a better one; 0 never stops.
        precision: of the model's arithmetic: fp32, bf16 or fp16.
        size: side of the images in pixels.
        cut: first block that runs, where the tokens before it are kept; None for whole images.
    """

    epochs: int
    batch_size: int
    head_epochs: int
    patience: int
    precision: str
    size: int
    cut: int | None = None


@dataclass
class Progress:
    """What an epoch has seen so far."""

    steps: int = 0
    loss: float = 0.0  # summed over steps
    right: float = 0.0
    pairs: float = 0.0
    images: int = 0
    norm: float = 0.0  # summed gradient norms
    seconds: float = 0.0
    waited: float = 0.0  # of them for data


@dataclass
class StopRequest:
    """Set by a signal handler, read between two steps."""

    signal: str | None = None


@dataclass
class Hooks:
    """What happens around the loop.

    Attributes:
        trackers: where values are reported.
        saved: called with every checkpoint that is complete.
        stop: asks the run to save and end.
        waited: seconds that the loop has waited for data, ever.
    """

    trackers: Trackers = field(default_factory=lambda: Trackers({}))
    saved: Callable[[Any], None] = lambda _: None
    stop: StopRequest = field(default_factory=StopRequest)
    waited: Callable[[], float] = lambda: 0.0
