"""Splits: nothing is lost, nothing that belongs together is torn apart, and the shares are as told."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mirip_fast.config import SplitConfig
from mirip_fast.data.splits import SPLITS, DataSplitter, deviation, split_manifest
from mirip_fast.data.table import Manifest, image_table
from mirip_fast.errors import ConfigError, MiripError

TIERS = ("S", "A", "B", "C")


def manifest(tiers: list[int], groups: list[str | None] | None = None) -> Manifest:
    columns = {
        "image_id": [f"id{i:04d}" for i in range(len(tiers))],
        "file": [f"/none/{i}.png" for i in range(len(tiers))],
        "tier": tiers,
        "group": groups or [None] * len(tiers),
    }
    return Manifest(Path("/none/metadata.csv"), Path("/none"), TIERS, image_table(columns, TIERS))


def assigned(split: Manifest) -> list[str]:
    return split.table["split"].tolist()


@pytest.mark.parametrize("seed", range(20))
def test_random_data(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(60, 400))
    tiers = rng.choice(4, n, p=[0.05, 0.3, 0.4, 0.25]).tolist()
    groups = [f"g{g}" if g else None for g in rng.integers(0, n // 3, n)] if seed % 2 else None
    hashes = [int(h) for h in rng.integers(0, n * 5, n)]
    data = manifest(tiers, groups)
    split = split_manifest(data, SplitConfig(), hashes)
    assert len(assigned(split)) == n and set(assigned(split)) == set(SPLITS)
    for labels in (hashes, groups or []):
        seen: dict[object, str] = {}
        for label, part in zip(labels, assigned(split), strict=False):
            if label is not None:
                assert seen.setdefault(label, part) == part
    # The deviation that is told is the true one.
    worst = 0.0
    for part in SPLITS:
        here = [tier for tier, name in zip(tiers, assigned(split), strict=True) if name == part]
        for tier in set(tiers):
            worst = max(worst, abs(here.count(tier) / len(here) - tiers.count(tier) / n) * 100)
    assert deviation(split) == pytest.approx(worst)
    if groups is None:
        assert worst <= 5 or n < 100
    # The order of the rows does not matter; the seed does.
    order = rng.permutation(n)
    again = split_manifest(data.subset(order), SplitConfig(), [hashes[i] for i in order])
    assert [assigned(again)[k] for k in np.argsort(order)] == assigned(split)
    assert assigned(split_manifest(data, SplitConfig(split_seed=7), hashes)) != assigned(split)


def test_shares_without_groups() -> None:
    split = split_manifest(manifest([i % 4 for i in range(400)]), SplitConfig())
    assert [assigned(split).count(name) for name in SPLITS] == [320, 40, 40]
    assert deviation(split) <= 1e-9


@pytest.mark.parametrize(
    ("tiers", "size", "sizes", "told"),
    [
        (
            [i // 6 for i in range(24)],
            2,
            [8, 8, 8],
            "12 separate groups",
        ),  # each tier in every split
        ([0, 1, 2, 3] * 3, 1, [4, 4, 4], "12 images"),
        (np.random.default_rng(1).integers(0, 4, 240).tolist(), 20, [200, 20, 20], None),
        ([0, 1, 2, 3] * 60, 2, [192, 24, 24], None),
    ],
)
def test_sizes_that_groups_make_impossible_are_told(
    tiers: list[int],
    size: int,
    sizes: list[int],
    told: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Tier shares that few groups cannot have do not take the training images away."""
    groups = [f"g{i // size}" for i in range(len(tiers))]
    split = split_manifest(manifest(tiers, groups), SplitConfig())
    assert [assigned(split).count(name) for name in SPLITS] == sizes
    shares = "/".join(f"{100 * n / len(tiers):.0f}" for n in sizes)
    assert (f"asked 80/10/10 %, came {shares} %" in caplog.text) == bool(told)
    assert (told or "") in caplog.text
    caplog.clear()
    DataSplitter().split(pd.DataFrame({"tier": tiers, "group": groups}))
    assert ("asked 80/10/10 %" in caplog.text) == bool(told)


@pytest.mark.parametrize("n", range(1, 13))
def test_very_small_data_is_split_or_refused(n: int) -> None:
    try:
        split = split_manifest(manifest([i % 2 for i in range(n)]), SplitConfig())
    except MiripError as error:
        assert n < 8 and str(error)
    else:
        assert len(assigned(split)) == n and "train" in assigned(split)


def test_ratios_are_checked() -> None:
    with pytest.raises(ConfigError):
        split_manifest(manifest([0, 1] * 20), SplitConfig(test_ratio=0.2))


def test_the_documented_splitter() -> None:
    table = pd.DataFrame(
        {"image_id": [f"i{k}" for k in range(200)], "tier": ["S", "A", "B", "C"] * 50}
    )
    parts = DataSplitter(0.8, 0.1, 0.1, seed=42, stratify_column="tier").split(table)
    assert [len(part) for part in parts] == [160, 20, 20]
    assert sorted(pd.concat(parts)["image_id"]) == sorted(table["image_id"])
    assert all((part["tier"].value_counts() == len(part) / 4).all() for part in parts)
    with pytest.raises(MiripError, match="grade"):
        DataSplitter(stratify_column="grade").split(table)


@pytest.mark.parametrize("name", ["group", "Group", "GROUP ", "groups", "colour"])
def test_the_documented_splitter_passes_no_group_over(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An applicant in two splits makes the test result too good."""
    table = pd.DataFrame({"tier": ["S", "A"] * 60, name: [f"person {i // 6}" for i in range(120)]})
    caplog.set_level(logging.WARNING, "mirip_fast")
    train, val, test = (set(part[name]) for part in DataSplitter().split(table))
    assert (not train & (val | test)) == (name not in ("groups", "colour"))
    assert (name in caplog.text) == (name not in ("group", "colour"))
