"""mirip-fast: learns a grader's taste from tiered artwork and sorts a portfolio.

The public names are loaded when they are first used, so that ``import mirip_fast`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "DataSplitter": "mirip_fast.data.splits",
    "PairwiseDataset": "mirip_fast.data.pairs",
    "TrainingConfig": "mirip_fast.finetune.trainer",
    "PairwiseRankingModel": "mirip_fast.models.ranking_model",
    "Trainer": "mirip_fast.finetune.trainer",
    "Evaluator": "mirip_fast.evaluation.evaluator",
    "PerformanceBenchmarks": "mirip_fast.evaluation.benchmark",
    "batch_compare": "mirip_fast.evaluation.evaluator",
    "set_seed": "mirip_fast.runtime",
    "embed": "mirip_fast.api",
    "train": "mirip_fast.api",
    "load": "mirip_fast.api",
    "Works": "mirip_fast.api",
    "Model": "mirip_fast.api",
    "PairwiseRanker": "mirip_fast.estimator",
}

__all__ = [
    "DataSplitter",
    "Evaluator",
    "Model",
    "PairwiseDataset",
    "PairwiseRanker",
    "PairwiseRankingModel",
    "PerformanceBenchmarks",
    "Trainer",
    "TrainingConfig",
    "Works",
    "batch_compare",
    "embed",
    "load",
    "set_seed",
    "train",
]

if TYPE_CHECKING:
    from mirip_fast.api import Model, Works, embed, load, train
    from mirip_fast.data.pairs import PairwiseDataset
    from mirip_fast.data.splits import DataSplitter
    from mirip_fast.estimator import PairwiseRanker
    from mirip_fast.evaluation.benchmark import PerformanceBenchmarks
    from mirip_fast.evaluation.evaluator import Evaluator, batch_compare
    from mirip_fast.finetune.trainer import Trainer, TrainingConfig
    from mirip_fast.models.ranking_model import PairwiseRankingModel
    from mirip_fast.runtime import set_seed


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mirip_fast' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
