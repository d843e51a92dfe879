"""Other ways to learn a ranking from cached features, to hold the default head against.

Each one is a function (train, inner, seed) → scorer: ``train`` and ``inner`` are rows with tiers (0 is the
best), ``inner`` chooses what the method has to choose (regularisation, number of trees, epoch), and the
scorer maps features [n, D] to scores [n], higher is better.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mirip_fast.config import Config
from mirip_fast.evaluation.metrics import pairwise_accuracy
from mirip_fast.models.checkpoint import load_checkpoint
from mirip_fast.models.head import RankingHead
from mirip_fast.ranking.fit import HeadFit
from mirip_fast.ranking.rows import Rows
from mirip_fast.training.presets import choose_pace
from mirip_fast.training.run_folder import Run
from mirip_fast.training.trackers import Trackers

Array = NDArray[Any]
Scorer = Callable[[Array], Array]

_PENALTIES = tuple(10.0**k for k in range(-1, 6))
_SVM_COSTS = (1e-4, 1e-3, 1e-2, 1e-1)
_SVM_PAIRS = 20_000


@dataclass(frozen=True)
class Graded:
    """n graded rows: features [n, D] float32, tiers [n] int64, finer grades [n] or None."""

    features: Array
    tiers: Array
    grades: Array | None


Ranker = Callable[[Graded, Graded, int], Scorer]


def head(**settings: Any) -> Ranker:
    """The product's head with these settings (``section__name=value``), as `train --head-only` fits it."""

    def fit(train: Graded, inner: Graded, seed: int) -> Scorer:
        config = Config()
        config.train.seed = seed
        config.train.save_every_n_epochs = 0
        for key, value in settings.items():
            section, name = key.split("__")
            if not hasattr(getattr(config, section), name):
                raise ValueError(f"no setting {section}.{name}")
            setattr(getattr(config, section), name, value)
        pace = choose_pace(config.train, len(train.tiers))
        config.train = dataclasses.replace(config.train, **vars(pace))
        with tempfile.TemporaryDirectory() as folder:
            run = Run(Path(folder))
            fitted = HeadFit(_rows(train), _rows(inner), config, pace, {}, torch.device("cpu"))
            fitted.run(run, Trackers({}))
            state = load_checkpoint(run.best)["model_state_dict"]
        model = RankingHead(train.features.shape[1], config.head)
        model.load_state_dict(state)
        model.eval()

        def score(features: Array) -> Array:
            with torch.inference_mode():
                return model(torch.from_numpy(features)).numpy()

        return score

    return fit


def ridge(label: str) -> Ranker:
    """Ridge regression on the tier's number or on the finer grade; the penalty chosen on ``inner``."""

    def fit(train: Graded, inner: Graded, seed: int) -> Scorer:
        from sklearn.linear_model import Ridge

        del seed  # nothing in it is random
        target = -train.tiers.astype(np.float64) if label == "tier" else train.grades
        return _choose(
            train,
            inner,
            [Ridge(alpha=a) for a in _PENALTIES],
            lambda m, x: m.fit(x, target),
            _predict,
        )

    return fit


def ranking_svm(train: Graded, inner: Graded, seed: int) -> Scorer:
    """Linear ranking SVM (Joachims 2002): a linear classifier of the differences of pairs."""
    from sklearn.svm import LinearSVC

    rng = np.random.default_rng(seed)
    better, worse = np.nonzero(train.tiers[:, None] < train.tiers[None, :])
    if len(better) > _SVM_PAIRS:
        chosen = rng.choice(len(better), _SVM_PAIRS, replace=False)
        better, worse = better[chosen], worse[chosen]
    side = np.where(rng.random(len(better)) < 0.5, 1, -1)

    def learn(model: Any, x: Array) -> None:
        model.fit((x[better] - x[worse]) * side[:, None], side)

    models = [LinearSVC(C=c, dual=False, fit_intercept=False) for c in _SVM_COSTS]
    return _choose(train, inner, models, learn, lambda m, x: x @ m.coef_[0])


def lambdarank(train: Graded, inner: Graded, seed: int) -> Scorer:
    """LightGBM's LambdaMART (Burges 2010), all images as one query, early stopping on ``inner``."""
    import lightgbm

    best = int(max(train.tiers.max(), inner.tiers.max()))
    model = lightgbm.LGBMRanker(
        objective="lambdarank", metric="None", n_estimators=500, learning_rate=0.05, num_leaves=15,
        min_child_samples=10, colsample_bytree=0.3, subsample=0.8, subsample_freq=1,
        lambdarank_truncation_level=10_000, random_state=seed, n_jobs=1, verbose=-1,
    )  # fmt: skip
    model.fit(
        train.features,
        best - train.tiers,
        group=[len(train.tiers)],
        eval_X=(inner.features,),
        eval_y=(best - inner.tiers,),
        eval_group=[[len(inner.tiers)]],
        eval_metric=lambda _, s: ("pairwise accuracy", pairwise_accuracy(s, inner.tiers), True),
        callbacks=[lightgbm.early_stopping(50, verbose=False)],
    )
    return lambda features: np.asarray(model.predict(features))


def _choose(
    train: Graded,
    inner: Graded,
    models: list[Any],
    learn: Callable[[Any, Array], Any],
    score: Callable[[Any, Array], Array],
) -> Scorer:
    """Standardise, fit every model, and keep the one that orders ``inner`` best."""
    mean, spread = train.features.mean(0), train.features.std(0) + 1e-6

    def scaled(features: Array) -> Array:
        return (features - mean) / spread

    x, x_inner = scaled(train.features), scaled(inner.features)
    quality = []
    for model in models:
        learn(model, x)
        quality.append(pairwise_accuracy(score(model, x_inner), inner.tiers))
    best = models[int(np.argmax(quality))]
    return lambda features: score(best, scaled(features))


def _predict(model: Any, x: Array) -> Array:
    return np.asarray(model.predict(x))


def _rows(graded: Graded) -> Rows:
    n = len(graded.tiers)
    return Rows([str(i) for i in range(n)], graded.features[:, None], graded.tiers, [None] * n)
