"""What a pair is, by option: against plain loops over pairs, and that options which cannot go together are told."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch

from mirip_fast.config import TrainConfig
from mirip_fast.errors import ConfigError, DataError
from mirip_fast.ranking.objective import (
    DeviceRows,
    Objective,
    draw_partners,
    make_loss,
    pairs_files,
    require_pairs,
)
from mirip_fast.ranking.rows import ListedPairs, Rows

CPU = torch.device("cpu")


class FirstNumber(torch.nn.Module):
    """Scores a row by its first number."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features[:, 0]


def rows(n: int = 40, *, pairs: ListedPairs | None = None, within: bool = False) -> Rows:
    rng = np.random.default_rng(n)
    return Rows(
        ids=[str(i) for i in range(n)],
        features=rng.integers(-4, 5, (n, 1, 3)).astype(np.float32) / 2,
        tiers=rng.integers(0, 4, n),
        groups=[None] * n,
        within=rng.integers(0, 3, n) if within else None,
        tier_scores=rng.integers(0, 30, n) / 10,
        pairs=pairs,
    )


def listed(n: int, p: int = 50, seed: int = 1) -> ListedPairs:
    rng = np.random.default_rng(seed)
    images = np.array([rng.choice(n, 2, replace=False) for _ in range(p)])
    return ListedPairs(images, rng.integers(-1, 2, p), rng.integers(0, 4, p) / 2)


def config(**values: object) -> TrainConfig:
    made = TrainConfig()
    for name, value in values.items():
        setattr(made, name, value)
    return made


def judge(settings: TrainConfig, data: Rows):
    return Objective(settings, data).judge(FirstNumber(), DeviceRows.of(data, CPU))


def right(difference: float) -> float:
    return 1.0 if difference > 0 else 0.5 if difference == 0 else 0.0


# --- judged pairs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["margin", "logistic"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_judged_pairs_are_the_plain_loop(kind: str, smoothing: float) -> None:
    if kind == "margin" and smoothing:
        return
    data = rows(pairs=listed(40))
    scores = data.features[:, 0, 0].astype(np.float64)
    weight = loss = decided = accuracy = 0.0
    for (one, other), label, w in zip(
        data.pairs.images, data.pairs.label, data.pairs.weight, strict=True
    ):
        d = scores[one] - scores[other]
        if kind == "margin":
            cost = abs(d) if label == 0 else max(0.0, 0.7 - label * d)
        else:
            target = {1: 1 - smoothing / 2, -1: smoothing / 2, 0: 0.5}[int(label)]
            win = 1 / (1 + math.exp(-d))
            cost = -target * math.log(win) - (1 - target) * math.log(1 - win)
        loss += w * cost
        weight += w
        if label:
            decided += w
            accuracy += w * right(label * d)
    found = judge(config(pairs="file.csv", loss=kind, margin=0.7, label_smoothing=smoothing), data)
    assert found[0] == pytest.approx(loss / weight, rel=1e-6)
    assert found[1:] == pytest.approx((accuracy / decided, tier_accuracy(data)), abs=1e-12)


def tier_accuracy(data: Rows, *, inside: bool = False) -> float:
    scores = data.features[:, 0, 0]
    return float(
        np.mean(
            [
                right(scores[i] - scores[j])
                for i, j in itertools.permutations(range(len(data)), 2)
                if data.tiers[i] < data.tiers[j]
                and (not inside or data.within[i] == data.within[j])
            ]
        )
    )


def test_an_epoch_has_every_judged_pair_once() -> None:
    data = rows(pairs=listed(40))
    objective = Objective(config(pairs="file.csv"), data)
    batches = objective.batches(8, np.random.default_rng(0))
    assert objective.units == 50 and sorted(np.concatenate(batches)) == list(range(50))
    on_device = DeviceRows.of(data, CPU)
    batch = np.array([3, 7, 11])
    only = Rows(
        **{**vars(data), "pairs": ListedPairs(*(a[batch] for a in vars(data.pairs).values()))}
    )
    expected = judge(config(pairs="file.csv"), only)[0]
    found = objective.batch_loss(FirstNumber(), on_device, batch, np.random.default_rng(0))
    assert float(found) == pytest.approx(expected)


# --- finer grades and columns ----------------------------------------------------------------------


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("label", ["tier", "tier_score"])
def test_pairs_of_a_label_inside_a_column_are_the_plain_loop(label: str, within: bool) -> None:
    data = rows(within=within)
    scores = data.features[:, 0, 0]
    quality = -data.tiers if label == "tier" else data.tier_scores
    costs, accuracy = [], []
    for i, j in itertools.permutations(range(len(data)), 2):
        if quality[i] > quality[j] and (not within or data.within[i] == data.within[j]):
            costs.append(max(0.0, 1 - float(scores[i] - scores[j])))
            accuracy.append(right(scores[i] - scores[j]))
    found, of_tiers = judge(config(label=label), data), None
    if label == "tier_score":
        of_tiers = pytest.approx(tier_accuracy(data, inside=within), abs=1e-12)
    assert found[0] == pytest.approx(np.mean(costs), rel=1e-6)
    assert found[1] == pytest.approx(np.mean(accuracy), abs=1e-12) and found[2] == of_tiers


def test_a_split_without_a_pair_is_refused() -> None:
    data = rows(6, within=True)
    apart = Rows(**{**vars(data), "tiers": np.arange(6) % 2, "within": np.arange(6)})
    with pytest.raises(
        DataError, match="val split has 6 images.*of different tiers inside one value of the --with"
    ):
        require_pairs(apart, make_loss(config()), "val")
    alike = Rows(**{**vars(data), "tier_scores": np.ones(6), "within": None})
    with pytest.raises(DataError, match="no pair of different grades"):
        require_pairs(alike, make_loss(config(label="tier_score")), "train")


# --- drawn pairs -----------------------------------------------------------------------------------


def test_partners_are_drawn_uniformly_from_the_same_column_value() -> None:
    labels = np.array([5, 3, 3, 1, 0, 4, 2, 2])
    within = np.array([0, 0, 0, 0, 1, 1, 1, 2])  # the last has no partner
    partners = {
        i: [j for j in range(8) if within[i] == within[j] and labels[i] != labels[j]]
        for i in range(8)
    }
    assert sum(bool(found) for found in partners.values()) == 7
    counts: Counter[tuple[int, int]] = Counter()
    rounds = 3000
    for seed in range(rounds):
        pairs = draw_partners(labels, within, np.random.default_rng(seed))
        assert pairs.shape == (7, 2) and (labels[pairs[:, 0]] > labels[pairs[:, 1]]).all()
        counts.update(map(tuple, pairs.tolist()))
    for i, j in itertools.permutations(range(8), 2):
        chance = 0.0
        if j in partners[i] and labels[i] > labels[j]:
            chance = 1 / len(partners[i]) + 1 / len(partners[j])
        assert counts[i, j] / rounds == pytest.approx(chance, abs=0.06)


# --- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"label_smoothing": 0.1}, "--label-smoothing goes with --loss logistic"),
        ({"label": "pairs"}, "--label pairs goes with --pairs FILE.csv"),
        ({"pairs_zero": "tie"}, "--pairs-zero goes with --pairs FILE"),
    ],
)
def test_settings_that_do_not_go_together_are_told(values: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_loss(config(**values))


def test_pairs_name_a_file_or_a_way(tmp_path) -> None:
    assert pairs_files(config()) == pairs_files(config(pairs="sampled")) == []
    (tmp_path / "p.csv").touch()
    assert pairs_files(config(pairs=str(tmp_path / "p.csv"))) == [tmp_path / "p.csv"]
    with pytest.raises(ConfigError, match="--pairs samplde: use all, sampled, or a CSV file"):
        pairs_files(config(pairs="samplde"))
