"""Ways to learn a ranking from cached features, to hold against each other.

Each is a function (train, inner, seed) → :class:`Fitted`. What needs no validation images learns from both;
the heads and the trees stop on ``inner``. Tiers are 0 for the best.
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
from mirip_fast.models.gp import GaussianProcess, draw_errors, errors_in_tiers, normal_scores
from mirip_fast.models.head import RankingHead
from mirip_fast.ranking.fit import HeadFit
from mirip_fast.ranking.rows import Rows
from mirip_fast.training.optim import choose_preset
from mirip_fast.training.run_folder import Run
from mirip_fast.training.trackers import Trackers

Array = NDArray[Any]

_PENALTIES = 10.0 ** np.arange(-1, 6)
_PAIRS = 5_000


@dataclass(frozen=True)
class Graded:
    """n graded rows: features [n, D] float32, tiers [n] int64, groups [n], finer grades [n] or None, and
    their normal scores among all works of the set."""

    features: Array
    tiers: Array
    groups: Array
    grades: Array | None
    normal: Array | None = None

    def __add__(self, other: Graded) -> Graded:
        both = [(getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self)]
        return Graded(*(None if a is None else np.concatenate([a, b]) for a, b in both))


@dataclass(frozen=True)
class Fitted:
    """What was learned.

    Attributes:
        score: features [k, D] → scores [k], higher is better.
        held_out: scores and tiers of works it had not learned from, for its calibration; or None.
        draw: (features [k, D], draws) → [draws, k] grades that the grader may give; or None.
    """

    score: Callable[[Array], Array]
    held_out: tuple[Array, Array] | None = None
    draw: Callable[[Array, int], Array] | None = None


Ranker = Callable[[Graded, Graded, int], Fitted]


def gp(blocks: int) -> Ranker:
    """The product's Gaussian process on rows of so many equal blocks."""

    def fit(train: Graded, inner: Graded, seed: int) -> Fitted:
        both = train + inner
        process = GaussianProcess.fit(
            both.features,
            normal_scores(both.tiers),
            both.groups.tolist(),
            blocks=[both.features.shape[1] // blocks] * blocks,
            seed=seed,
            tiers=both.tiers,
        )
        return Fitted(process.score, (process.left_out, both.tiers), process.draw)

    return fit


def head(**settings: Any) -> Ranker:
    """The product's head with these settings (``section__name=value``), as `train --head-only` fits it."""

    def fit(train: Graded, inner: Graded, seed: int) -> Fitted:
        config = Config()
        config.train.seed = seed
        config.train.save_every_n_epochs = 0
        for key, value in settings.items():
            section, name = key.split("__")
            if not hasattr(getattr(config, section), name):
                raise ValueError(f"no setting {section}.{name}")
            setattr(getattr(config, section), name, value)
        preset = choose_preset(config.train, len(train.tiers))
        config.train = dataclasses.replace(config.train, **vars(preset))
        with tempfile.TemporaryDirectory() as folder:
            run = Run(Path(folder))
            fitted = HeadFit(_rows(train), _rows(inner), config, preset, {}, torch.device("cpu"))
            fitted.run(run, Trackers({}))
            state = load_checkpoint(run.best)["model_state_dict"]
        model = RankingHead(train.features.shape[1], config.head)
        model.load_state_dict(state)
        model.eval()

        def score(features: Array) -> Array:
            with torch.inference_mode():
                return model(torch.from_numpy(features)).numpy()

        known, tiers = score(inner.features).astype(float), inner.tiers
        apart, y = known - known.mean(), normal_scores(tiers)
        slope = np.cov(y, apart)[0, 1] / apart.var(ddof=1)  # as ranking/held_out.py has it
        errors = errors_in_tiers(tiers, slope * apart, np.ones(len(y))) / slope

        def draw(features: Array, draws: int) -> Array:
            return score(features) + draw_errors(errors, (draws, len(features)))

        return Fitted(score, (known, tiers), draw if slope > 0 and len(y) >= 30 else None)

    return fit


def _scaled(make: Callable[[], Any], target: Callable[[Graded], Array]) -> Ranker:
    """A regressor of scikit-learn's kind, on standardised rows."""

    def fit(train: Graded, inner: Graded, seed: int) -> Fitted:
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        del seed  # nothing in it is random
        both = train + inner
        model = make_pipeline(StandardScaler(), make()).fit(both.features, target(both))
        return Fitted(lambda features: np.asarray(model.predict(features)))

    return fit


def ridge(label: str) -> Ranker:
    """Ridge regression on the tier's number or on the finer grade; penalty by leave-one-out."""
    from sklearn.linear_model import RidgeCV

    return _scaled(lambda: RidgeCV(_PENALTIES), lambda g: -g.tiers if label == "tier" else g.grades)


def laplacian() -> Ranker:
    """Kernel ridge regression on the tier's number, Laplace kernel: a Gaussian process's mean."""
    from sklearn.kernel_ridge import KernelRidge
    from sklearn.model_selection import GridSearchCV

    grid = {"alpha": [0.01, 0.1, 0.5, 2], "gamma": [3e-4, 1e-3, 3e-3]}
    search = GridSearchCV(KernelRidge(kernel="laplacian"), grid, cv=4)
    return _scaled(lambda: search, lambda g: g.tiers.mean() - g.tiers)


def nearest() -> Ranker:
    """The mean tier of the nearest images, as many as cross-validation wants."""
    from sklearn.model_selection import GridSearchCV
    from sklearn.neighbors import KNeighborsRegressor

    grid = {"n_neighbors": [3, 5, 10, 20, 40]}
    search = GridSearchCV(KNeighborsRegressor(weights="distance"), grid, cv=4)
    return _scaled(lambda: search, lambda g: -g.tiers)


def ordinal(train: Graded, inner: Graded, seed: int) -> Fitted:
    """Ordinal logistic regression (mord's all-threshold model); the penalty chosen on ``inner``."""
    from mord import LogisticAT

    del seed
    models = [LogisticAT(alpha=a) for a in _PENALTIES]
    return _choose(
        train,
        inner,
        models,
        lambda m, x: m.fit(x, train.tiers.max() - train.tiers),
        lambda m, x: x @ m.coef_,
    )


def pairwise_logistic(train: Graded, inner: Graded, seed: int) -> Fitted:
    """Logistic regression of the differences of 5,000 pairs; the penalty chosen on ``inner``."""
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(seed)
    better, worse = np.nonzero(train.tiers[:, None] < train.tiers[None, :])
    if len(better) > _PAIRS:
        chosen = rng.choice(len(better), _PAIRS, replace=False)
        better, worse = better[chosen], worse[chosen]
    side = np.where(rng.random(len(better)) < 0.5, 1, -1)

    def learn(model: Any, x: Array) -> None:
        model.fit((x[better] - x[worse]) * side[:, None], side)

    models = [LogisticRegression(C=c, fit_intercept=False) for c in (1e-5, 1e-4, 1e-3, 1e-2)]
    return _choose(train, inner, models, learn, lambda m, x: x @ m.coef_[0])


def lambdarank(train: Graded, inner: Graded, seed: int) -> Fitted:
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
    return Fitted(lambda features: np.asarray(model.predict(features)))


def _choose(
    train: Graded,
    inner: Graded,
    models: list[Any],
    learn: Callable[[Any, Array], Any],
    score: Callable[[Any, Array], Array],
) -> Fitted:
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
    return Fitted(lambda features: score(best, scaled(features)))


def _rows(graded: Graded) -> Rows:
    n = len(graded.tiers)
    return Rows([str(i) for i in range(n)], graded.features[:, None], graded.tiers, [None] * n)
