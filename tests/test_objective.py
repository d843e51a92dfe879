"""What a pair is, by option: against plain loops over pairs, and that options which can not go together are told."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch

from mirip_fast.config import TrainConfig
from mirip_fast.errors import ConfigError, DataError
from mirip_fast.models.allpairs import label_accuracy
from mirip_fast.ranking.batches import PartnerDraw
from mirip_fast.ranking.device_rows import DeviceRows
from mirip_fast.ranking.objective import (
    Objective,
    make_loss,
    pairs_files,
    parse_tier_weights,
    require_pairs,
)
from mirip_fast.ranking.rows import ListedPairs, Rows

CPU = torch.device("cpu")
TIERS = ("S", "A", "B", "C")


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
    return Objective(settings, TIERS, data).judge(FirstNumber(), DeviceRows.of(data, CPU))


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
    judged = judge(config(pairs="file.csv", loss=kind, margin=0.7, label_smoothing=smoothing), data)
    assert judged.loss == pytest.approx(loss / weight, rel=1e-6)
    assert judged.accuracy == pytest.approx(accuracy / decided, abs=1e-12)
    assert judged.tier_accuracy == pytest.approx(tier_accuracy(data), abs=1e-12)


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
    objective = Objective(config(pairs="file.csv"), TIERS, data)
    batches = objective.batches(8, np.random.default_rng(0))
    assert objective.units == 50 and sorted(np.concatenate(batches)) == list(range(50))
    on_device = DeviceRows.of(data, CPU)
    batch = np.array([3, 7, 11])
    only = Rows(
        **{**vars(data), "pairs": ListedPairs(*(a[batch] for a in vars(data.pairs).values()))}
    )
    expected = judge(config(pairs="file.csv"), only).loss
    found = objective.batch_loss(FirstNumber(), on_device, batch, np.random.default_rng(0))
    assert float(found) == pytest.approx(expected)


def test_without_a_decided_pair_the_tiers_judge() -> None:
    ties = listed(40)
    ties = ListedPairs(ties.images, ties.label * 0, ties.weight)
    data = rows(pairs=ties)
    judged = judge(config(pairs="file.csv"), data)
    assert judged.accuracy == pytest.approx(tier_accuracy(data)) and judged.tier_accuracy is None
    require_pairs(data, make_loss(config(), TIERS, within=False), "val")
    for split, ungraded in (
        ("train", data),
        ("val", Rows(**{**vars(data), "tiers": data.tiers * 0 - 1})),
    ):
        with pytest.raises(DataError, match=f"No judged pair lies inside the {split} split"):
            require_pairs(ungraded, make_loss(config(), TIERS, within=False), split)


def test_judged_pairs_need_no_tiers() -> None:
    data = rows(pairs=listed(40))
    ungraded = Rows(**{**vars(data), "tiers": np.full(40, -1)})
    with_tiers, without = (judge(config(pairs="file.csv"), d) for d in (data, ungraded))
    assert (without.loss, without.accuracy) == (with_tiers.loss, with_tiers.accuracy)
    assert without.tier_accuracy is None and with_tiers.tier_accuracy is not None


# --- finer grades and columns ----------------------------------------------------------------------


@pytest.mark.parametrize("min_gap", [0.0, 0.2, 1.0])
def test_finer_grades_are_the_plain_loop(min_gap: float) -> None:
    data = rows()
    scores, tenths = data.features[:, 0, 0], np.rint(data.tier_scores * 10).astype(int)
    costs, accuracy = [], []
    for i, j in itertools.permutations(range(len(data)), 2):
        if tenths[i] > tenths[j] and tenths[i] - tenths[j] >= round(min_gap * 10):
            costs.append(max(0.0, 1 - float(scores[i] - scores[j])))
            accuracy.append(right(scores[i] - scores[j]))
    judged = judge(config(label="tier_score", min_gap=min_gap), data)
    assert judged.loss == pytest.approx(np.mean(costs), rel=1e-6)
    assert judged.accuracy == pytest.approx(np.mean(accuracy), abs=1e-12)
    assert judged.tier_accuracy == pytest.approx(tier_accuracy(data), abs=1e-12)


@pytest.mark.parametrize("share", [None, 1.0, 0.4, 0.0])
def test_pairs_inside_a_column(share: float | None) -> None:
    data = rows(within=True)
    scores = data.features[:, 0, 0]
    costs: dict[bool, list[float]] = {True: [], False: []}
    for i, j in itertools.permutations(range(len(data)), 2):
        if data.tiers[i] < data.tiers[j]:
            costs[data.within[i] == data.within[j]].append(
                max(0.0, 1 - float(scores[i] - scores[j]))
            )
    part = 1.0 if share is None else share
    expected = part * np.mean(costs[True]) + (1 - part) * np.mean(costs[False])
    judged = judge(config(within_share=share), data)
    assert judged.loss == pytest.approx(expected, rel=1e-6)
    assert judged.accuracy == pytest.approx(tier_accuracy(data, inside=share != 0.0))


def test_a_split_without_a_pair_is_refused() -> None:
    data = rows(6, within=True)
    apart = Rows(**{**vars(data), "tiers": np.arange(6) % 2, "within": np.arange(6)})
    for share, split, words in (
        (1.0, "train", "inside one value of the --within column"),
        (0.5, "val", "inside one value of the --within column"),
        (0.5, "train", None),
        (0.0, "train", None),
    ):
        loss = make_loss(config(within_share=share), TIERS, within=True)
        if words is None:
            require_pairs(apart, loss, split)
            continue
        with pytest.raises(
            DataError, match=f"{split} split has 6 images.*of different tiers {words}"
        ):
            require_pairs(apart, loss, split)
    together = Rows(**{**vars(apart), "within": np.zeros(6, dtype=np.int64)})
    with pytest.raises(DataError, match="across the values"):
        require_pairs(together, make_loss(config(within_share=0.0), TIERS, within=True), "train")
    with pytest.raises(DataError, match="grades 99 apart"):
        loss = make_loss(config(label="tier_score", min_gap=99.0), TIERS, within=False)
        require_pairs(data, loss, "train")


def test_accuracy_by_label_is_the_plain_loop() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        n = int(rng.integers(0, 25))
        scores, labels = rng.integers(0, 6, n) / 4, rng.integers(0, 8, n)
        groups = rng.integers(0, 3, n) if rng.random() < 0.5 else None
        gap = int(rng.integers(0, 4))
        hits = [
            right(scores[i] - scores[j])
            for i, j in itertools.permutations(range(n), 2)
            if labels[i] > labels[j]
            and labels[i] - labels[j] >= gap
            and (groups is None or groups[i] == groups[j])
        ]
        found = label_accuracy(
            torch.from_numpy(scores),
            torch.from_numpy(labels),
            gap,
            None if groups is None else torch.from_numpy(groups),
        )
        assert found == (pytest.approx(np.mean(hits), abs=1e-12) if hits else None)


# --- drawn pairs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("min_gap", [0, 2])
def test_partners_are_drawn_uniformly_from_the_same_column_value(min_gap: int) -> None:
    labels = np.array([5, 3, 3, 1, 0, 4, 2, 2])
    within = np.array([0, 0, 0, 0, 1, 1, 1, 2])  # the last has no partner
    draw = PartnerDraw(labels, min_gap, within)
    partners = {
        i: [
            j
            for j in range(8)
            if within[i] == within[j]
            and labels[i] != labels[j]
            and abs(labels[i] - labels[j]) >= min_gap
        ]
        for i in range(8)
    }
    assert len(draw) == sum(bool(found) for found in partners.values()) == 7
    counts: Counter[tuple[int, int]] = Counter()
    rounds = 3000
    for seed in range(rounds):
        pairs = draw.draw(np.random.default_rng(seed))
        assert pairs.shape == (7, 2) and (labels[pairs[:, 0]] > labels[pairs[:, 1]]).all()
        counts.update(map(tuple, pairs.tolist()))
    for i, j in itertools.permutations(range(8), 2):
        chance = 0.0
        if j in partners[i] and labels[i] > labels[j]:
            chance = 1 / len(partners[i]) + 1 / len(partners[j])
        assert counts[i, j] / rounds == pytest.approx(chance, abs=0.06)


def test_drawn_pairs_weigh_by_their_tiers() -> None:
    data = rows()
    objective = Objective(config(pairs="sampled", tier_weights="S-A=3,A-C=0.5"), TIERS, data)
    batch = np.concatenate(objective.batches(8, np.random.default_rng(0)))
    scores, total, whole = data.features[:, 0, 0], 0.0, 0.0
    table = {(0, 1): 3.0, (1, 3): 0.5}
    for better, worse in batch:
        weight = table.get((int(data.tiers[better]), int(data.tiers[worse])), 1.0)
        total += weight * max(0.0, 1 - float(scores[better] - scores[worse]))
        whole += weight
    found = objective.batch_loss(
        FirstNumber(), DeviceRows.of(data, CPU), batch, np.random.default_rng(0)
    )
    assert float(found) == pytest.approx(total / whole, rel=1e-6)


# --- settings --------------------------------------------------------------------------------------


def test_tier_weights_are_read() -> None:
    assert parse_tier_weights(" ", TIERS) is None
    assert parse_tier_weights("S-A=2, A-C = 0.5", TIERS) == (
        (0, 2, 1, 1), (0, 0, 1, 0.5), (0, 0, 0, 1), (0, 0, 0, 0),
    )  # fmt: skip
    assert parse_tier_weights("top-1-low=0", ("top-1", "low")) == ((0, 0), (0, 0))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A-S=2", "the better tier comes first: S-A"),
        ("S-S=2", "names no pair of the tiers S, A, B, C .an example: S-A=2,A-B=2,B-C=2"),
        ("S-D=2", "names no pair"),
        ("S-A", "a weight of at least 0 is expected, as in S-A=2"),
        ("S-A=-1", "at least 0"),
        ("S-A=inf", "at least 0"),
        ("S-A=nan", "at least 0"),
        ("S-A=1,S-A=2", "S-A is there twice"),
        ("S-A=2,", "names no pair"),
    ],
)
def test_faulty_tier_weights_are_told(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_tier_weights(text, TIERS)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"label_smoothing": 0.1}, "--label-smoothing goes with --loss logistic"),
        ({"min_gap": 0.1}, "--min-gap goes with --label tier_score"),
        ({"tier_weights": "S-A=2", "label": "tier_score"}, "--tier-weights goes with --label tier"),
        ({"within_share": 0.5}, "--within-share goes with --within"),
        ({"pairs": "x.csv", "label": "tier_score"}, "--label goes with --pairs all or sampled"),
        ({"pairs": "x.csv", "tier_weights": "S-A=2"}, "has a column weight"),
    ],
)
def test_settings_that_do_not_go_together_are_told(values: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_loss(config(**values), TIERS, within=False)


def test_a_share_goes_with_all_pairs() -> None:
    for pairs in ("sampled", "x.csv"):
        with pytest.raises(ConfigError, match="--within-share.*goes with --pairs all"):
            make_loss(config(pairs=pairs, within_share=0.5), TIERS, within=True)


def test_pairs_name_a_file_or_a_way(tmp_path) -> None:
    assert pairs_files(config()) == pairs_files(config(pairs="sampled")) == []
    (tmp_path / "p.csv").touch()
    assert pairs_files(config(pairs=str(tmp_path / "p.csv"))) == [tmp_path / "p.csv"]
    with pytest.raises(ConfigError, match="--pairs samplde: use all, sampled, or a CSV file"):
        pairs_files(config(pairs="samplde"))
