"""Applicants with several works each: their order, its interval, their grades; what an office would lose."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import openpyxl
import pandas as pd
import pytest
from made_page import data_of
from made_run import TINY, flat, rows_of
from mirip_fast_cli.main import run
from PIL import Image

import mirip_fast as mf
from mirip_fast.config import DataConfig
from mirip_fast.data.applicants import applicant_grades
from mirip_fast.data.manifest import read_manifest
from mirip_fast.data.splits import members_of
from mirip_fast.models.gp import draw_errors
from mirip_fast.portfolio.ranking import rank_applicants, ranks_of
from mirip_fast.ranking.applicants import aggregate
from mirip_fast.training.run_folder import find_runs

APPLICANTS = 28


def name_of(number: int) -> str:
    return f"지원자 {number:02d}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder: 28 applicants of three works each, works graded near their applicant; a run on them."""
    root = tmp_path_factory.mktemp("office") / "made"
    rng = np.random.default_rng(0)
    (root / "data" / "images").mkdir(parents=True)
    rows, grades = ["image_id,filename,tier,지원자,학과"], ["지원자,tier"]
    new, pictures = ["filename,지원자,학과"], rng.normal(0, 40, (APPLICANTS, 3, 28, 28, 3))
    for a in range(APPLICANTS):
        tier = a % 4
        level = 200 - 30 * tier + rng.normal(0, 12)
        for w in range(3):
            name = f"작품 {a}-{w}.png"
            pixels = (pictures[a, w] + level + rng.normal(0, 12)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / "data" / "images" / name)
            given = int(np.clip(tier + rng.integers(-1, 2), 0, 3))
            department = "회화" if a % 3 else "조소"
            rows.append(f"id{a}-{w},{name},{'SABC'[given]},{name_of(a)},{department}")
            new.append(f"{name},{name_of(a)},{department}")
        grades.append(f"{name_of(a)},{'SABC'[tier]}")
    for file, lines in (("metadata.csv", rows), ("grades.csv", grades), ("new.csv", new)):
        (root / "data" / file).write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert run(["--quiet", "embed", "data", *TINY]) == 0
        assert run(["--quiet", "train", "--head-only", "--by", "지원자"]) == 0
    return root


@pytest.fixture
def office(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def test_applicants_are_in_order_each_with_their_works(
    office: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Single works scattered over ranks 2, 37, 41, 68 say nothing of whom to admit."""
    table = pd.read_csv("data/new.csv", encoding="utf-8-sig")
    table.loc[4, "지원자"] = " "
    again = table.iloc[6].copy()  # the same picture, handed in twice under two names
    again["filename"] = "copy.png"
    shutil.copy(Path("data/images") / table.iloc[6]["filename"], "data/images/copy.png")
    broken = pd.Series({"filename": "broken.png", "지원자": "김 깨짐", "학과": "회화"})
    Path("data/images/broken.png").write_bytes(b"no picture")
    table = pd.concat([table, pd.DataFrame([again, broken])])
    table.to_csv("data/new.csv", index=False, encoding="utf-8")
    rank = ["rank", "data/new.csv", "--by", "지원자", "--html", "page.html", *TINY[-2:]]
    assert run([*rank, "--xlsx", "r.xlsx", "--sheets-by", "지원자"]) == 0
    told = flat(capfd.readouterr().out)
    assert "An applicant's score is the mean of their works' scores:" in told
    assert "1 work without an applicant, ranked as works only: images/작품 1-1.png" in told
    assert "1 work handed in twice by one applicant, counted once: images/copy.png" in told
    assert "1 applicant not ranked, as no work of theirs could be read: 김 깨짐" in told
    assert "correlate by" in told and f"{name_of(1)}" in told
    people, works = rows_of(Path("applicants.csv")), rows_of(Path("ranking.csv"))
    assert len(people) == APPLICANTS and [p["rank"] for p in people] == sorted(
        (p["rank"] for p in people), key=int
    )
    book = openpyxl.load_workbook("r.xlsx")
    first = book.worksheets[0]
    head, *rows = first.iter_rows(values_only=True)
    shown = [(str(r[head.index("rank")]), r[head.index("applicant")]) for r in rows]
    assert (first.title, shown) == ("applicants", [(p["rank"], p["applicant"]) for p in people])
    assert len(first._images) == len(people)
    own_sheets = [name for name in book.sheetnames[2:] if name != "without 지원자"]
    assert own_sheets == [p["applicant"] for p in people]
    scores = {w["file"]: float(w["score"]) for w in works}
    for person in people:
        files = person["files"].split("; ")
        assert len(files) == int(person["works"]) == (2 if person["applicant"] == name_of(1) else 3)
        assert float(person["score"]) == pytest.approx(
            np.mean([scores[f] for f in files]), abs=1e-4
        )
        assert int(person["rank_low"]) <= int(person["rank"]) <= int(person["rank_high"])
    of = {p["applicant"]: p for p in people}
    for work in works:
        if work["file"] == "images/작품 1-1.png":
            assert work["applicant"] == work["applicant_rank"] == ""
        else:
            own = of[work["지원자"]]
            assert work["applicant"] == work["지원자"]
            assert (work["applicant_rank"], work["applicant_rank_high"]) == (
                own["rank"],
                own["rank_high"],
            )
            assert work["applicant_tier"] == own["tier"]
    tiers = ["SABC".index(p["tier"]) for p in people]
    assert tiers == sorted(tiers) and len(set(tiers)) > 1
    assert "An applicant's tier is that which a single work of the same score" in told
    read = json.loads(Path("ranking.json").read_text())
    assert read["applicants"][0]["tier"] == people[0]["tier"]
    assert read["applicants"][0]["name"] == people[0]["applicant"]
    assert read["applicants"][0]["works"] == people[0]["files"].split("; ")
    inside = data_of(Path("page.html"))
    first = inside["applicants"][0]
    assert first["tier"] == people[0]["tier"]
    assert [inside["works"][i]["name"] for i in first["works"]] == read["applicants"][0]["works"]


def test_a_list_of_applicants_is_not_left_behind_nor_another_file_lost(
    office: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rank = ["rank", "data/new.csv", *TINY[-2:]]
    assert run([*rank, "--by", "지원자"]) == 0 and Path("applicants.csv").is_file()
    assert run(rank) == 0
    assert "applicants.csv of an earlier ranking is removed" in capfd.readouterr().err
    assert not Path("applicants.csv").exists()
    Path("applicants.csv").write_text("지원자,tier\n지원자 01,S\n", encoding="utf-8")
    assert run(rank) == 0
    before = Path("ranking.json").read_bytes()
    assert run([*rank, "--by", "지원자"]) == 1
    assert "applicants.csv is no list that `rank --by` wrote, and stays" in capfd.readouterr().err
    assert Path("ranking.json").read_bytes() == before  # nothing was computed, nothing replaced
    assert Path("applicants.csv").read_text(encoding="utf-8").startswith("지원자,tier")


def test_the_middle_and_the_best_and_departments(
    office: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Who paints is not compared with who sculpts; the weaker works of an applicant may not count."""
    for how, made in (("median", np.median), ("best:2", lambda s: np.mean(np.sort(s)[-2:]))):
        assert (
            run(["rank", "data/new.csv", "--by", "지원자", "--portfolio", how, "--within", "학과"])
            == 0
        )
        scores = {w["file"]: float(w["score"]) for w in rows_of(Path("ranking.csv"))}
        people = rows_of(Path("applicants.csv"))
        for person in people:
            own = [scores[f] for f in person["files"].split("; ")]
            assert float(person["score"]) == pytest.approx(made(own), abs=1e-4)
        for department in ("회화", "조소"):
            ranks = [int(p["rank"]) for p in people if p["학과"] == department]
            assert ranks == list(range(1, len(ranks) + 1))
    assert run(["rank", "data/new.csv", "--by", "지원자", "--portfolio", "best"]) == 1
    assert "use mean, median or best:3" in capfd.readouterr().err
    assert run(["rank", "data/new.csv", "--within", "학과"]) == 2
    assert run(["rank", "data/new.csv", "--by", "지원"]) == 1
    assert "Did you mean 지원자? A folder per applicant: --by folder" in flat(
        capfd.readouterr().err
    )
    for table in {*Path("data").glob("*.csv")} - {Path("data/new.csv")}:
        table.unlink()
    assert run(["rank", "data", "--by", "지원자"]) == 1  # its table is called new.csv
    assert "The table in it is read where it is named: data/new.csv" in flat(capfd.readouterr().err)


def test_a_folder_per_applicant(office: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for row in rows_of(Path("data/new.csv"))[:18]:
        place = Path("받은 것") / row["학과"] / row["지원자"]
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path("data/images") / row["filename"], place)
    assert run(["rank", "받은 것", "--by", "folder/folder"]) == 0
    assert {p["applicant"] for p in rows_of(Path("applicants.csv"))} == {
        f"{'회화' if a % 3 else '조소'}/{name_of(a)}" for a in range(6)
    }
    capfd.readouterr()
    assert run(["rank", "받은 것", "--by", "folder"]) == 0  # departments: told
    assert "If those are the applicants: --by folder/folder" in flat(capfd.readouterr().err)


def test_the_same_in_python(office: Path) -> None:
    table = pd.read_csv("data/new.csv", encoding="utf-8-sig").rename(
        columns={"지원자": "applicant"}
    )
    table["filename"] = ["data/images/" + name for name in table["filename"]]
    ranking = mf.load().rank(table, by="applicant", portfolio="best:1")
    assert "given_applicant" not in ranking
    for name, own in ranking.groupby("applicant"):
        assert (own["applicant_score"] == own["score"].max()).all(), name
    assert (ranking["applicant_rank_low"] <= ranking["applicant_rank_high"]).all()
    people = ranking.attrs["applicants"]
    assert [p["rank"] for p in people] == sorted(p["rank"] for p in people)


def test_grades_of_applicants_choose_and_are_evaluated(
    office: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """All works of an applicant stay in one split; their own grades say how well they are ordered."""
    lines = Path("data/grades.csv").read_text(encoding="utf-8-sig").splitlines()
    Path("data/grades.csv").write_text("\n".join([*lines[:-1], "없는 사람,A"]), encoding="utf-8")
    shares = ["--train-ratio", "0.5", "--val-ratio", "0.25", "--test-ratio", "0.25"]
    train = ["train", "--head-only", "--by", "지원자", "--applicants", "data/grades.csv", *shares]
    assert run(train) == 0
    out, err = map(flat, capfd.readouterr())
    assert "1 applicant without a work: 없는 사람" in err
    assert f"1 applicant without a grade: {name_of(APPLICANTS - 1)}" in err
    assert "Left out, too: Applicants (column 지원자)" in out
    assert "rank FOLDER --by '지원자'" in out
    newest = find_runs(Path("runs"))[0].path
    splits = pd.read_csv(newest / "split.csv", encoding="utf-8-sig")
    assert (splits.groupby("지원자")["split"].nunique() == 1).all()
    assert run(["evaluate"]) == 0
    told = flat(capfd.readouterr().out)
    read = json.loads((newest / "evaluation_test.json").read_text())["applicants"]
    assert read["graded_by"] == "applicants" and read["said"] in told
    works = splits[splits["split"] == "test"]
    assert (read["applicants"], read["works"]) == (works["지원자"].nunique(), len(works))
    assert run(["rank", "data/new.csv", "--by", "지원자"]) == 0
    told = flat(capfd.readouterr().out)
    assert "An applicant's tier is " in told
    assert re.search(r"of \d\d graded applicants that the model had not trained on it orders", told)
    assert read["portfolio"].replace("best:", "mean of the best ") in told
    for wrong, said in (
        ("지원자,tier\n지원자 01,S\n지원자 01,A\n", "has another grade in a row above"),
        ("지원자,tier\n지원자 01,1등\n", "unknown tier '1등'; known are S, A, B, C"),
        ("이름,tier\n지원자 01,S\n", "no column '지원자'"),
        ("지원자,tier\n누구,S\n", "none of 1 applicant (first: 누구) has a work"),
    ):
        Path("data/grades.csv").write_text(wrong, encoding="utf-8")
        assert run(train) == 1
        assert said in flat(capfd.readouterr().err)


def test_tiers_that_differ_by_case_alone_are_kept_apart(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("filename,applicant\n1.png,김\n2.png,이\n3.png,박\n")
    grades = tmp_path / "grades.csv"
    grades.write_text("applicant,tier\n김,A\n이,a\n박, B \n")
    options = DataConfig(tiers="A,a,b", by="applicant", applicants=str(grades))
    assert read_manifest(tmp_path, options).table["tier"].tolist() == ["A", "a", "b"]


@pytest.mark.parametrize("readout", ["gp", "numbers", "head"])
def test_grades_of_applicants_alone_are_learned_from(
    office: Path, capfd: pytest.CaptureFixture[str], readout: str
) -> None:
    """Who admits people grades people; the mean of an applicant's works has that grade, and not each work."""
    Path("data/list.csv").write_text(Path("data/new.csv").read_text(encoding="utf-8-sig"))
    assert run(["--quiet", "embed", "data/list.csv", *TINY]) == 0
    how = ["--by", "지원자", "--applicants", "data/grades.csv", "--data", "data/list.csv"]
    if readout == "numbers":
        grades = [f"{name_of(a)},{9.5 - a % 4}" for a in range(APPLICANTS)]
        Path("data/grades.csv").write_text(
            "\n".join(["지원자,tier_score", *grades]), encoding="utf-8"
        )
    short = ["--epochs", "8", "--val-ratio", "0.3", "--test-ratio", "0.2", "--train-ratio", "0.5"]
    made = ["--readout", "head", *short] if readout == "head" else ["--readout", "gp"]
    assert run(["train", "--head-only", *how, *made]) == 0
    told = flat("".join(capfd.readouterr()))
    assert f"is learned ({APPLICANTS} applicants, {3 * APPLICANTS} works)" in told
    if readout == "head":
        assert "all pairs of applicants" in told
    assert run(["evaluate", "--bootstrap-rounds", "50"]) == 0
    found = json.loads((find_runs(Path("runs"))[0].path / "evaluation_test.json").read_text())[
        "applicants"
    ]
    assert found["graded_by"] == "applicants" and found["pairwise_accuracy"] > 0.6
    assert run(["rank", "data/new.csv", "--by", "지원자"]) == 0
    told = flat(capfd.readouterr().out)
    assert "the mean of their works' scores: the model was trained on it." in told
    people = rows_of(Path("applicants.csv"))
    best = [int(p["applicant"][-2:]) % 4 for p in people[:7]]
    assert np.mean(best) < 1 < np.mean([int(p["applicant"][-2:]) % 4 for p in people[-7:]])
    if readout != "head":  # one error for all works of an applicant
        assert "correlate by 1.00" in told


@pytest.mark.parametrize("readout", ["ensemble"])
def test_any_readout_ranks_applicants(office: Path, readout: str) -> None:
    by = ["--by", "지원자", "--applicants", "data/grades.csv"]
    train = ["-q", "train", "--head-only", "--readout", readout, "--epochs", "2", *by]
    assert run([*train, "--output-dir", readout]) == 0
    rank = ["-q", "rank", "data", "--workers", "0", "--by", "지원자", "--output-dir", readout]
    assert run(rank) == 0
    assert list(office.glob("applicants.csv"))


def test_a_head_learns_from_pairs_of_applicants() -> None:
    """The loss of a batch is that of the mean scores, whichever works stand beside each other."""
    torch = pytest.importorskip("torch")
    from mirip_fast.config import TrainConfig
    from mirip_fast.ranking.objective import DeviceRows, Objective, make_loss
    from mirip_fast.ranking.rows import Rows

    rng = np.random.default_rng(0)
    sets = np.array([5, 2, 5, 9, 2, 2, 7])
    tiers = np.array([0, 1, 0, 2, 1, 1, 1])
    rows = Rows(
        [str(i) for i in range(7)], rng.normal(size=(7, 1, 3)).astype(np.float32), tiers,
        [None] * 7, sets=sets,
    )  # fmt: skip
    head = torch.nn.Linear(3, 1)
    head.forward = lambda x, plain=head: torch.nn.functional.linear(x, plain.weight)[:, 0]
    objective = Objective(TrainConfig(), rows)
    (batch,) = objective.batches(64, np.random.default_rng(0))
    assert objective.units == 4 and sorted(batch) == list(range(7))
    scores = head(torch.from_numpy(rows.features[:, 0])).detach()
    means = torch.stack([scores[torch.from_numpy(sets == s)].mean() for s in (5, 2, 9, 7)])
    wanted = make_loss(TrainConfig())(means, torch.tensor([0, 1, 2, 1]), None)
    device = DeviceRows.of(rows, torch.device("cpu"))
    loss = objective.batch_loss(head, device, batch, rng)
    assert float(loss.detach()) == pytest.approx(float(wanted), abs=1e-6)
    assert objective.judge(head, device)[0] == pytest.approx(float(wanted), abs=1e-6)
    with pytest.raises(mf.errors.ConfigError, match="leave it out"):
        Objective(TrainConfig(pairs="sampled"), rows)


@pytest.mark.parametrize("how", ["mean", "best:3"])
def test_the_interval_holds_the_true_rank(how: str) -> None:
    """Works of one hand are misjudged alike: counted as independent, ranks would look surer than they are."""
    rng = np.random.default_rng(0)
    held: dict[float, list[float]] = {0.5: [], 0.0: []}
    for _ in range(12):
        hand = np.repeat(np.arange(30), rng.integers(1, 7, 30))
        n = len(hand)
        scores = rng.normal(size=30)[hand] + 0.3 * rng.normal(size=n)
        off, errors = rng.normal(size=30) * 0.5**0.5, 0.8 * rng.normal(size=400)
        truth = scores + 0.8 * (off[hand] + 0.5**0.5 * rng.normal(size=n))
        names = [str(h) for h in hand]
        true = ranks_of(aggregate(truth, members_of(names)[1], how))
        for shared, found in held.items():
            draws = scores + draw_errors(errors, (200, n), 1, hand, shared)
            table = rank_applicants(names, scores, names, how, draws=draws)
            ranks = true[table["applicant"].astype(int)]
            found.append(
                float(((table["rank_low"] <= ranks) & (ranks <= table["rank_high"])).mean())
            )
    assert np.mean(held[0.5]) > 0.95 > 0.93 > np.mean(held[0.0])


@pytest.mark.parametrize(("alike", "known"), [(12, 0), (21, 0), (39, 39), (40, 40)])
def test_works_that_happen_to_have_one_grade_make_none_of_their_applicant(
    tmp_path: Path, alike: int, known: int
) -> None:
    """Else the way to join works, and applicants' tiers, would be learned from an odd choice of them."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = [
        f"w{a}-{w},a.png,{'SABC'[(a + (w if a >= alike else 0)) % 4]},{name_of(a)}"
        for a in range(40)
        for w in range(2)
    ]
    (tmp_path / "m.csv").write_text("\n".join(["image_id,filename,tier,applicant", *rows]) + "\n")
    manifest = read_manifest(tmp_path / "m.csv", DataConfig(by="applicant"))
    grades = applicant_grades(manifest)
    assert len(grades) == known
    assert all(grades[name] == int(name.split()[1]) % 4 for name in grades)
