"""Several graders of the same works: read, made one tier of, told apart where they contradict themselves."""

from __future__ import annotations

import functools
import itertools
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from made_run import TINY, draw, rows_of
from mirip_fast_cli.main import run

import mirip_fast as mf
from mirip_fast.config import DataConfig
from mirip_fast.data.manifest import read_manifest, write_manifest_csv
from mirip_fast.data.table import Manifest, image_table
from mirip_fast.errors import DataError
from mirip_fast.evaluation.agreement import agreement, alpha
from mirip_fast.evaluation.metrics import PairCounter, pairwise_accuracy, ranks
from mirip_fast.models.gp import GaussianProcess, grader_scores, normal_scores
from mirip_fast.models.losses import PairLoss
from mirip_fast.ranking.graded import GradedImages

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
    return read_manifest(path, DataConfig(**options))  # type: ignore[arg-type]


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
    found = read(tmp_path, "filename,등급1,등급_이\na.png,1,2\nb.png,3,3\n", tier_column="등급", tiers="1,2,3")  # fmt: skip
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


def test_an_offices_table_is_read_as_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Columns called by the teachers' names, pictures in the one folder beside the table."""
    (tmp_path / "그림").mkdir()
    (tmp_path / "그림/가.HEIC").touch()
    text = "파일,지원자,김 교수,Lee,비고\n가.HEIC,김,S,a,좋음\n나.png,이,,B,\n"
    caplog.set_level(logging.INFO)
    read(tmp_path, text)
    assert "the column '파일' names the pictures" in caplog.text
    assert "did you mean --tier-column '김 교수,Lee'?" in caplog.text  # and so it is:
    found = read(tmp_path, text, tier_column="김 교수,Lee")
    assert found.table["tier_Lee"].tolist() == ["A", "B"]
    assert [*found.table["tier"]] == ["A", "B"]
    assert Path(found.table["file"][0]) == tmp_path / "그림/가.HEIC"
    write_manifest_csv(tmp_path / "copy.csv", found)
    again = read_manifest(tmp_path / "copy.csv").table
    assert again["tier_김 교수"].tolist() == ["S", ""]
    with pytest.raises(DataError, match=r"no column 'Le' \(--tier-column\)"):
        read(tmp_path, text, tier_column="김 교수,Le")


def test_one_grader_changes_nothing(tmp_path: Path) -> None:
    found = read(tmp_path, "filename,tier,grader\na.png,S,Kim\nb.png,B,Kim\n").table
    assert found["grader"].tolist() == ["Kim", "Kim"]
    assert not [c for c in found.columns if c.startswith("tier_") and c != "tier_score"]
    assert np.isnan(found["tier_score"]).all()


def test_a_grader_spelled_two_ways_is_one(tmp_path: Path) -> None:
    found = read(tmp_path, "filename,tier,grader\na.png,S,Kim\na.png,S,KIM\na.png,B,Lee\n").table
    assert found[["tier_Kim", "tier_Lee"]].to_numpy().tolist() == [["S", "B"]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a.png,S,Kim,x\na.png,A,Kim,x\nb.png,A,Lee,x\n", r"csv:3, tier: 'a.png' by 'Kim' has 'A' here"),
        ("a.png,S,Kim,x\na.png,A,Lee,y\n", r"csv:3, group: 'a.png' has 'y' here and 'x' in row 2"),
        ("a.png,S,Kim,x\na.png,A,Lee,x\nb.png,A,,x\n", r"csv:4, grader: empty; who gave the tier\?"),
        ("a.png,S,Kim,x\na.png,Z,Lee,x\n", r"^[^\n]*csv:3, tier: unknown tier 'Z'[^\n]*\nThe tiers"),
        ("a.png,Y,Kim,x\na.png,Z,Lee,x\n", r"'Y'[^\n]*\n[^\n]*'Z'[^\n]*\nThe tiers"),
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
    with pytest.raises(DataError, match=r"csv:3, grader: 'a.png' is 'Lee' here and 'Kim' above"):
        read(tmp_path, "filename,tier,grader\na.png,S,Kim\na.png,A,Lee\n", id_column="grader")


def test_columns_of_numbers_and_notes(tmp_path: Path) -> None:
    # Through a float column 1 became 1.0; a lone column of dates is nobody's tiers.
    found = read(tmp_path, "filename,tier 1,tier_2\na.png,1.0,2\nb.png,2.0,\n", tiers="1,2")
    assert found.table["tier_1"].tolist() == ["1", "2"] and found.tier_counts() == {"1": 0, "2": 2}
    found = read(tmp_path, "filename,tier_date\na.png,2020\n")
    assert found.table["tier_date"].tolist() == ["2020"] and not found.has_grades


def test_rank_reads_each_work_once(tmp_path: Path) -> None:
    (tmp_path / "grades.csv").write_text(LONG, encoding="utf-8")
    found = read_manifest(tmp_path / "grades.csv", with_grades=False)
    assert len(found) == 5
    assert found.table["tier_Lee"].tolist() == LEE


STRICT = {"엄격 김": 1, "Mild": -1}


@pytest.fixture(scope="module")
def office(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An embedded data set: the brighter the better; a strict and a mild grader share 30 of 90 works, each
    has 30 more, and ten have no grade."""
    work = tmp_path_factory.mktemp("office")
    rows = ["filename,tier,grader,학과"]
    for i in range(100):
        quality = i * 37 % 100 / 100
        draw(work / "data" / "images" / f"작품 {i:02d}.png", 0.1 + 0.8 * quality, i)
        who = [] if i >= 90 else [name for g, name in enumerate(STRICT) if i % 3 in (g, 2)]
        for name in who or [""]:
            tier = "SABC"[round(min(3, max(0, 3.4 - 4 * quality + STRICT[name])))] if name else ""
            rows.append(f"작품 {i:02d}.png,{tier},{name},{'회화' if i % 2 else '디자인'}")
    (work / "data" / "metadata.csv").write_text("\n".join(rows) + "\n", encoding="utf-8-sig")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        assert run(["embed", "data", *TINY]) == 0
        yield work


SPLIT = ["--train-ratio", "0.5", "--val-ratio", "0.2", "--test-ratio", "0.3"]


def test_agreement_is_told_and_the_rest_is_ranked(
    office: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["embed", "data", *TINY]) == 0
    told = capfd.readouterr()
    assert "30 of 100 works have two grades and more" in told.err
    assert "90 of 100 works have a grade" in told.err
    assert "How far the graders agree, on 30 works" in told.out and "엄격 김 +1." in told.out
    assert run(["train", "--head-only", *SPLIT]) == 0
    told = capfd.readouterr()
    assert "How far the graders agree" in told.err and "inside one grader's tiers" in told.err
    assert run(["evaluate", "--html", "page.html", "--out", "evaluation.json"]) == 0
    out = capfd.readouterr().out
    assert (
        "one grader by the others (human ceiling)" in out and "the model on the same pairs" in out
    )
    found = json.loads((office / "evaluation.json").read_text(encoding="utf-8"))["agreement"]
    assert {row["grader"] for row in found["graders"]} == set(STRICT)
    assert found["model_within"] > 0.9 and found["ceiling"] > 0.8
    assert "humanCeiling" in (office / "page.html").read_text(encoding="utf-8")
    report = mf.load().evaluate()
    assert report.by_grader and "pairs of different tiers by one grader" in out
    assert report.agreement is not None and report.agreement.to_table() in out
    assert " ".join(report.better_than.split()) in " ".join(out.split())
    assert report.agreement.to_table() in str(report) and "The model is" in str(report)
    assert run(["rank", "data", "--workers", "0", "--html", "works.html"]) == 0
    assert "(the human ceiling)" in Path("works.html").read_text(encoding="utf-8")
    assert len(rows_of(office / "ranking.csv")) == 100


@pytest.mark.parametrize("how", [[], ["--readout", "head"], ["--pairs", "sampled"]])
def test_a_strict_and_a_mild_grader_are_not_mixed(office: Path, how: list[str]) -> None:
    name = "-".join(how).strip("-") or "gp"
    assert run(["-q", "train", "--head-only", *SPLIT, *how, "--output-dir", name]) == 0
    assert run(["-q", "rank", "data", "--workers", "0", "--output-dir", name, "--out", name]) == 0
    order = [
        int(Path(row["file"]).stem[-2:]) * 37 % 100 for row in rows_of(Path(name) / "ranking.csv")
    ]
    place = np.corrcoef(order, np.arange(100)[::-1])[0, 1]
    assert place > 0.97  # of pooled tiers: 0.91, 0.95, 0.96


def test_the_difference_of_two_runs_is_of_the_accuracies_beside_it(office: Path) -> None:
    for epochs in ("1", "20"):
        train = ["-q", "train", "--head-only", *SPLIT, "--readout", "head", "--epochs", epochs]
        assert run([*train, "--output-dir", "two", "--name", epochs]) == 0
    runs = [str(next((office / "two").glob(f"*-{name}"))) for name in ("1", "20")]
    assert run(["-q", "evaluate", *runs, "--out", "two.json"]) == 0
    first, second = json.loads((office / "two.json").read_text(encoding="utf-8"))["rows"]
    apart = second["accuracy"] - first["accuracy"]
    assert second["difference"]["difference"] == pytest.approx(apart)


def test_every_split_counts_pairs_by_the_rule_of_all() -> None:
    ids = [f"w{i}" for i in range(6)]
    columns = {"tier_a": list("SAB") * 2, "tier_b": list("SAB") * 2}
    for tiers, decided in (("SABSAB", False), ("BABSAB", True)):
        given = {"image_id": ids, "file": ids, "tier": ["SAB".index(tier) for tier in tiers]}
        table = image_table(given | columns, "SAB")
        manifest = Manifest(Path("x.csv"), Path(), tuple("SAB"), table)
        images = GradedImages.of(manifest, [None] * 6, ["train"] * 3 + ["test"] * 3)
        for some in (images, images.part("train"), images.part("test").part("test")):
            assert (some.grades is None) == (some.labels(None).grades is None) == decided


def test_one_graders_taste_is_learned(office: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "--head-only", *SPLIT, "--grader", "mild", "--output-dir", "mild"]) == 0
    (folder,) = (office / "mild").iterdir()
    rows = rows_of(folder / "split.csv")
    assert len(rows) == 60 and all(row["tier"] == row["tier_Mild"] for row in rows)
    capfd.readouterr()
    assert run(["evaluate", "--output-dir", "mild", "--test-data", "data/metadata.csv"]) == 0
    told = capfd.readouterr()
    assert "Mild graded 60 of 100 works: only these" in told.err and "60 images" in told.out
    assert run(["train", "--head-only", "--grader", "Kim"]) == 1
    assert (
        "--grader Kim: no grader has that name; there are 엄격 김, Mild" in capfd.readouterr().err
    )


def test_training_end_to_end_takes_pairs_inside_a_grader(
    office: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    full = ["train", "--full", "data", "--epochs", "1", "--init-from", "none", *TINY, *SPLIT]
    full += ["--loader-workers", "0", "--output-dir", "full"]
    assert run([*full, "--mixup", "0.2"]) == 1
    assert "of which no grader's pairs can be made" in capfd.readouterr().err
    assert run(full) == 0
    assert "Works are compared inside one grader's tiers" in capfd.readouterr().err
    (folder,) = (office / "full").iterdir()
    val = [row for row in rows_of(folder / "split.csv") if row["split"] == "val"]
    scores = mf.load(folder, workers=0).score("data", anyway=True).set_index("image_id")["score"]
    right = []
    for name, (one, other) in itertools.product(STRICT, itertools.combinations(val, 2)):
        tiers = ["SABC".find(row[f"tier_{name}"] or "?") for row in (one, other)]
        if min(tiers) >= 0 and tiers[0] != tiers[1]:
            gap = scores[one["image_id"]] - scores[other["image_id"]]
            right.append((gap > 0) == (tiers[0] < tiers[1]))
    told = json.loads((folder / "run.json").read_text(encoding="utf-8"))["val_pairwise_accuracy"]
    assert told == pytest.approx(np.mean(right))


def test_alpha_is_the_published_one() -> None:
    # Krippendorff 2011, «Computing Krippendorff's alpha-reliability», section C: ordinal, 0.815.
    a = [1, 2, 3, 3, 2, 1, 4, 1, 2, 0, 0, 0]
    b = [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, 0, 3]
    c = [0, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, 0]
    d = [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, 0]
    grades = np.array([a, b, c, d], dtype=np.float64).T - 1
    grades[grades < 0] = np.nan
    assert alpha(grades, 5) == pytest.approx(0.815, abs=5e-4)
    # A weight is what writing the work so often would give: so resamples are drawn.
    times = np.arange(12) % 3
    assert alpha(grades, 5, times) == pytest.approx(alpha(np.repeat(grades, times, axis=0), 5))
    assert np.isnan(alpha(np.array([[1, np.nan], [np.nan, 2]]), 4))
    assert np.isnan(alpha(np.ones((5, 2)), 4))


def test_the_human_ceiling_counts_each_grader_against_the_others() -> None:
    tiers = {"tier_a": list("SABC"), "tier_b": list("SBAC"), "tier_c": ["S", "S", "S", ""]}
    table = image_table({"image_id": list("wxyz"), "file": list("wxyz"), **tiers}, tuple("SABC"))
    found = agreement(table, [4.0, 3.0, 2.0, 1.0], rounds=50)
    assert found is not None
    # The others of a say S A A C, those of b S A A C too, and those of c S B B C (z, by c ungraded, aside).
    human = {row.grader: row.ceiling for row in found.graders.itertuples()}
    assert (
        human["a"] == 1 and human["c"] == 0.5
    )  # S S S: the same tier for both of a pair counts half
    assert found.figures["ceiling"] == pytest.approx(
        np.average([1, human["b"], 0.5], weights=[5, 5, 2])
    )
    assert (
        dict(zip(found.graders["grader"], found.graders["strictness"].round(2), strict=True))["c"]
        < 0
    )
    assert found.overlap == 4 and len(found.pairs) == 3
    interval = found.intervals["ceiling"]
    assert interval is not None and interval.low <= found.figures["ceiling"] <= interval.high


@pytest.mark.parametrize("seed", range(6))
def test_agreement_and_pairs_by_grader_are_those_of_plain_loops(seed: int) -> None:
    krippendorff = pytest.importorskip("krippendorff")
    rng = np.random.default_rng(seed)
    n, n_graders, n_tiers = (int(x) for x in rng.integers([6, 2, 2], [20, 6, 5]))
    base = rng.integers(0, n_tiers, n)[:, None] + rng.integers(-1, 2, (n, n_graders))
    grades = np.clip(base, 0, n_tiers - 1).astype(float)
    grades[rng.random(grades.shape) < 0.35] = np.nan
    grades[:2, 0] = [0, 1]
    names = tuple("SABCD"[:n_tiers])
    cells = [["" if np.isnan(x) else names[int(x)] for x in column] for column in grades.T]
    ids = [f"w{i}" for i in range(n)]
    columns = {f"tier_g{g}": column for g, column in enumerate(cells)}
    table = image_table({"image_id": ids, "file": ids, **columns}, names)
    found, score = agreement(table), rng.normal(size=n).round(1)
    assert found is not None
    expected = krippendorff.alpha(
        grades.T, level_of_measurement="ordinal", value_domain=list(range(n_tiers))
    )
    assert found.figures["alpha"] == pytest.approx(expected)
    human, model = np.zeros(2), np.zeros(2)
    m = np.isfinite(grades).sum(axis=1)
    for g in range(n_graders):
        rest = np.delete(grades, g, axis=1)
        for i, j in itertools.combinations(np.flatnonzero(np.isfinite(grades[:, g])), 2):
            apart = np.sign(grades[j, g] - grades[i, g])  # 1: the grader finds i better
            if apart:
                right = 0.5 + 0.5 * np.sign(score[i] - score[j]) * apart
                model += np.array([right, 1]) / np.sqrt(m[i] * m[j])
            if m[i] < 2 or m[j] < 2:
                continue
            one, other = (np.floor(np.nanmedian(rest[k]) + 0.5) for k in (i, j))
            if one != other:
                human += np.array([0.5 + 0.5 * np.sign(other - one) * apart, 1])
    assert found.figures["ceiling"] == pytest.approx(human[0] / human[1])
    assert pairwise_accuracy(score, [0] * n, grades=grades) == pytest.approx(model[0] / model[1])
    weights = rng.integers(0, 3, n)
    again = np.repeat(np.arange(n), weights)
    weighted = PairCounter(score, [0] * n, grades=grades).accuracy(weights)
    assert weighted == pytest.approx(
        PairCounter(score[again], [0] * len(again), grades=grades[again]).accuracy()
    )


def test_graders_of_different_works_tell_no_agreement() -> None:
    tiers = {"tier_a": ["S", "A", "", ""], "tier_b": ["", "", "B", "C"]}
    table = image_table({"image_id": list("wxyz"), "file": list("wxyz"), **tiers}, tuple("SABC"))
    found = agreement(table, np.arange(4.0))
    assert found is not None and np.isnan(found.figures["ceiling"])
    assert "how far they agree is unknown" in found.to_line()
    assert found.to_dict()["alpha"] is None and "unknown" in found.to_table()


def test_a_pair_weighs_the_product_of_both() -> None:
    rng = np.random.default_rng(0)
    scores = torch.tensor(rng.normal(size=9), requires_grad=True)
    tiers, inside = torch.tensor(rng.integers(0, 3, 9)), torch.tensor(rng.integers(0, 2, 9))
    weights = torch.tensor(rng.uniform(0.3, 1, 9))
    loss = PairLoss()(scores, tiers, inside, weights)
    pairs = [
        (i, j) for i in range(9) for j in range(9) if tiers[i] < tiers[j] and inside[i] == inside[j]
    ]
    terms = [torch.relu(1 - scores[i] + scores[j]) * weights[i] * weights[j] for i, j in pairs]
    wanted = sum(terms) / sum(weights[i] * weights[j] for i, j in pairs)
    assert loss.item() == pytest.approx(wanted.item())  # type: ignore[union-attr]
    (own,) = torch.autograd.grad(loss, scores)
    (theirs,) = torch.autograd.grad(wanted, scores)  # type: ignore[arg-type]
    assert torch.allclose(own, theirs)


def simulated(seed: int, n: int, *, skewed: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features [n + 200, 12], quality [n + 200], and the tiers [n, 3] of a mild, a usual and a strict
    grader, each of another third of the works; ``skewed``: the mild one saw the worse works."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(n + 200, 12)).astype(np.float32)
    quality = rows @ rng.normal(size=12) / 12**0.5 + 0.4 * rng.normal(size=n + 200)
    who = rng.integers(3, size=n)
    if skewed:
        who = np.digitize(quality[:n] + 0.5 * rng.normal(size=n), [-0.5, 0.5])
    seen = quality[:n] - np.array([-1.0, 0.0, 1.0])[who] + 0.4 * rng.normal(size=n)
    grades = np.full((n, 3), -1)
    grades[np.arange(n), who] = np.digitize(-seen, [-1, 0, 1])
    return rows, quality, grades


@pytest.mark.parametrize(("skewed", "exact"), [(False, 1_000), (True, 1_000), (True, 100)])
def test_training_within_graders_beats_pooled_tiers(skewed: bool, exact: int) -> None:
    gains = []
    for seed in range(4):
        rows, quality, grades = simulated(seed, 200, skewed=skewed)
        y, shares = grader_scores(grades)
        fit = functools.partial(GaussianProcess.fit, rows[:200], exact=exact, inducing=80)
        within, pooled = fit(y, graders=shares), fit(normal_scores(grades.max(axis=1)))
        order = ranks(quality[200:])
        gains.append(
            pairwise_accuracy(within.score(rows[200:]), order, finer=True)
            - pairwise_accuracy(pooled.score(rows[200:]), order, finer=True)
        )
        # What it says of works learned from is free of strictness, too.
        assert np.corrcoef(within.left_out, quality[:200])[0, 1] > 0.5
    assert min(gains) > 0 and np.mean(gains) > (0.03 if skewed else 0.008)
