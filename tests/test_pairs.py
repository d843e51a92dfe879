"""The documented dataset of image pairs, and the sample pictures."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from mirip_fast_cli.demo import make_portfolio, make_sample

from mirip_fast.data.pairs import PairwiseDataset
from mirip_fast.errors import ConfigError, DataError


def table(tiers: str) -> pd.DataFrame:
    return pd.DataFrame({"filename": [f"{i}.png" for i in range(len(tiers))], "tier": list(tiers)})


def test_all_pairs_are_every_cross_tier_pair_once() -> None:
    tiers = "SBCABBSCA"
    data = PairwiseDataset(table(tiers), "x", pairs="all")
    seen = Counter()
    for index in range(len(data)):
        first, second, label = data.pair(index)
        better, worse = (first, second) if label == 1 else (second, first)
        assert "SABC".index(tiers[better]) < "SABC".index(tiers[worse])
        seen[better, worse] += 1
    expected = {
        (i, j)
        for i in range(len(tiers))
        for j in range(len(tiers))
        if "SABC".index(tiers[i]) < "SABC".index(tiers[j])
    }
    assert set(seen) == expected and set(seen.values()) == {1}


def test_sampled_pairs_are_one_per_image() -> None:
    data = PairwiseDataset(table("SABC" * 50), "x", seed=3)
    pairs = [data.pair(i) for i in range(len(data))]
    assert len(pairs) == 200 and pairs == [data.pair(i) for i in range(200)]
    assert all(row in pairs[row][:2] for row in range(200))
    share = np.mean([label == 1 for *_, label in pairs])
    assert 0.35 < share < 0.65  # the better image is not always first
    assert pairs != [PairwiseDataset(table("SABC" * 50), "x", seed=4).pair(i) for i in range(200)]


def test_what_is_wrong_is_told() -> None:
    with pytest.raises(DataError, match="no column tier"):
        PairwiseDataset(table("SA").drop(columns="tier"), "x")
    with pytest.raises(DataError, match="unknown tiers X"):
        PairwiseDataset(table("SX"), "x")
    with pytest.raises(DataError, match="two tiers"):
        PairwiseDataset(table("SS"), "x")
    with pytest.raises(ConfigError, match="sampled"):
        PairwiseDataset(table("SA"), "x", pairs="some")
    with pytest.raises(IndexError):
        PairwiseDataset(table("SA"), "x")[2]


def test_the_sample_is_the_same_every_time(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_sample(tmp_path / name, n=24)
        make_portfolio(tmp_path / name / "p", n=3)
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.*"))
    assert len(files) == 24 + 3 + 1
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    with (tmp_path / "one" / "metadata.csv").open(encoding="utf-8-sig", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert Counter(row["tier"] for row in rows) == {"S": 4, "A": 7, "B": 8, "C": 5}
    means = [np.mean([float(r["tier_score"]) for r in rows if r["tier"] == t]) for t in "SABC"]
    assert means == sorted(means, reverse=True)
