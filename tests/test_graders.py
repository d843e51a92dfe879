"""Several graders of the same works: read, made one tier of, told apart where they contradict themselves."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from mirip_fast.data.manifest import read_manifest, write_manifest_csv
from mirip_fast.data.table import DataOptions, Manifest
from mirip_fast.errors import DataError

#: Tiers by two graders; the fourth work has one grade, the last none.
KIM, LEE = ["S", "S", "A", "C", ""], ["S", "B", "B", "", ""]
LONG = "filename,tier,grader,학과\n" + "".join(
    f"작품 {i}.png,{tier},{grader},{dept}\n"
    for i, tiers in enumerate(zip(KIM, LEE, strict=True))
    for tier, grader, dept in zip(tiers, (" 김 교수", "Lee"), ("디자인", ""), strict=True)
)
WIDE = "filename,Tier (김 교수),tier_Lee,학과,tier_note\n" + "".join(
    f"작품 {i}.png,{a},{b},디자인,good\n" for i, (a, b) in enumerate(zip(KIM, LEE, strict=True))
)


def read(folder: Path, text: str, **options: str) -> Manifest:
    path = folder / "grades.csv"
    path.write_text(text, encoding="utf-8")
    return read_manifest(path, DataOptions(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize("text", [LONG, WIDE], ids=["row per grader", "column per grader"])
def test_a_work_has_its_graders_tiers_and_their_consensus(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    caplog.set_level(logging.INFO)
    found = read(tmp_path, text)
    table = found.table
    assert table["image_id"].tolist() == [f"작품 {i}.png" for i in range(5)]
    assert table["tier_김 교수"].tolist() == KIM
    assert table["tier_Lee"].tolist() == LEE
    # The median; of A and B, halfway, the worse one. S and B: A, which nobody gave.
    assert [None if t < 0 else "SABC"[t] for t in found.tier_codes] == ["S", "A", "B", "C", None]
    assert found.tier_scores == [3, 2, 1.5, 0, None]
    assert table["학과"].tolist() == ["디자인"] * 5
    assert "2 graders (works graded): 김 교수 (4), Lee (3); 3 of 5 works have two" in caplog.text
    assert "4 of 5 works have a grade; the others (first:" in caplog.text
    # Written, as `split` does, and read again it is the same, and the tiers are the decided ones.
    write_manifest_csv(tmp_path / "copy.csv", found)
    again = read_manifest(tmp_path / "copy.csv").table
    assert again[table.columns].drop(columns="row").equals(table.drop(columns="row"))


def test_a_tier_beside_the_graders_columns_is_the_decision(tmp_path: Path) -> None:
    text = "filename,tier,tier_score,tier_1,tier_2\na.png,C,7,S,S\nb.png,,5,A,A\nc.png,S,,B,C\n"
    found = read(tmp_path, text)
    assert [*found.table["tier"]] == ["C", "A", "S"]
    assert found.tier_scores == [7, 5, None]  # a finer grade, and no grader called «score»


def test_other_names_of_the_columns_are_heeded(tmp_path: Path) -> None:
    found = read(tmp_path, "filename,등급1,등급_이\na.png,1,2\nb.png,3,3\n", tier_column="등급", tiers=("1", "2", "3"))  # fmt: skip
    assert found.table["tier_1"].tolist() == ["1", "3"]
    write_manifest_csv(tmp_path / "copy.csv", found)
    assert read_manifest(tmp_path / "copy.csv", found.options).table["tier_이"].tolist() == [
        "2",
        "3",
    ]
    text = "filename,tier,교수\na.png,S,Kim\na.png,B,kim \nb.png,S,이\n"
    with pytest.raises(
        DataError, match=r"csv:3, tier: 'a.png' by 'Kim' has 'B' here and 'S' in row 2"
    ):
        read(tmp_path, text, grader_column="교수")


def test_one_grader_changes_nothing(tmp_path: Path) -> None:
    found = read(tmp_path, "filename,tier,grader\na.png,S,Kim\nb.png,B,Kim\n").table
    assert found["grader"].tolist() == ["Kim", "Kim"]
    assert not [c for c in found.columns if c.startswith("tier_") and c != "tier_score"]
    assert np.isnan(found["tier_score"]).all()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a.png,S,Kim,x\na.png,A,Kim,x\nb.png,A,Lee,x\n", r"csv:3, tier: 'a.png' by 'Kim' has 'A' here"),
        ("a.png,S,Kim,x\na.png,A,Lee,y\n", r"csv:3, group: 'a.png' has 'y' here and 'x' in row 2"),
        ("a.png,S,Kim,x\na.png,A,Lee,x\nb.png,A,,x\n", r"csv:4, grader: empty; who gave the tier\?"),
        ("a.png,S,Kim,x\na.png,Z,Lee,x\n", r"csv:3, tier: unknown tier 'Z'"),
        ("a.png,S,Kim,x\na.png,A,score,x\n", r"grader: no grader can be called 'score'"),
    ],
)  # fmt: skip
def test_rows_that_contradict_each_other_are_named(tmp_path: Path, rows: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, "filename,tier,grader,group\n" + rows)


def test_faults_of_columns_name_the_column(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"csv:2, tier_2: unknown tier 'Z'"):
        read(tmp_path, "filename,tier_1,tier_2\na.png,S,Z\nb.png,A,B\n")
    with pytest.raises(DataError, match=r"tier_1: unknown tier '5'(.|\n)*--tiers \"BEST"):
        read(tmp_path, "filename,tier_1,tier_2\na.png,5,4\nb.png,3,2\n")
    with pytest.raises(DataError, match=r"TIER_kim: one grader's, as the column 'tier_Kim' is"):
        read(tmp_path, "filename,tier_Kim,TIER_kim\na.png,S,A\n")


def test_rank_reads_each_work_once(tmp_path: Path) -> None:
    found = read(tmp_path, LONG, with_grades=False)  # type: ignore[arg-type]
    assert len(found) == 5
    assert found.table["tier_Lee"].tolist() == LEE
