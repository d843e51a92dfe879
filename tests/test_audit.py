"""The audit of a data set: each fault is found where it was put, nothing else is, and the status tells."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_cache import picture, put, settings
from made_run import rows_of, scored
from made_tables import images_of
from mirip_fast_cli.main import run

from mirip_fast.config import Config, SplitConfig
from mirip_fast.data.manifest import read_manifest
from mirip_fast.data.splits import read_near_groups
from mirip_fast.errors import DataError
from mirip_fast.files import write_json
from mirip_fast.ranking.audit import (
    Audit,
    Finding,
    audit,
    audit_text,
    contradictions,
    contradictory_judgements,
    write_findings,
)
from mirip_fast.ranking.graded import GradedImages, graded_of_dataset, save_split
from mirip_fast.ranking.held_out import save_held_out

TIERS = ("S", "A", "B", "C")

#: name → (tier, group, degrees). Degrees 90 apart and more are no near duplicates; 10 apart are.
WORKS = {
    "가.png": ("S", "", 0.0),
    "b 🎨.png": ("A", "", 60.0),
    "c.png": ("B", "", 120.0),
    "d.png": ("C", "", 180.0),
    "e.png": ("A", "", 240.0),
    "f.png": ("B", "", 300.0),
}


def make(work: Path, extra: dict[str, tuple[str, str, float]] | None = None) -> Config:
    """A graded data set with made-up features; ``extra`` works on top of the harmless ones."""
    works = {**WORKS, **(extra or {})}
    for number, name in enumerate(works):
        if not (work / "data/images" / name).exists():
            picture(work / "data/images" / name, number)
    lines = [f"{name[:-4]},{name},{tier},{group}" for name, (tier, group, _) in works.items()]
    text = "\n".join(["image_id,filename,tier,group", *lines]) + "\n"
    (work / "data/metadata.csv").write_text(text, encoding="utf-8")
    config = settings(work / "cache")
    config.train.output_dir = str(work / "runs")
    put(config, work / "data", {name: angle for name, (_, _, angle) in works.items()})
    return config


def trained(work: Path, config: Config, split_of: dict[str, str], scores: dict[str, float]) -> Path:
    """A finished run with these splits and held-out scores."""
    manifest = read_manifest(work / "data")
    splits = tuple(split_of.get(record.image_id, "train") for record in images_of(manifest))
    folder = work / "runs/a-run"
    folder.mkdir(parents=True, exist_ok=True)
    source = str(manifest.source)
    write_json(folder / "run.json", {"status": "finished", "dataset": source, "started": "2026"})
    save_split(folder / "split.csv", GradedImages.of(manifest, [bytes(32)] * len(manifest), splits))
    records = [record for record in images_of(manifest) if record.image_id in scores]
    if records:
        held_out = scored(
            TIERS, np.array([scores[r.image_id] for r in records]), [r.tier for r in records],
            image_id=[r.image_id for r in records], file=[str(r.path) for r in records],
        )  # fmt: skip
        save_held_out(folder, held_out)
    return folder


def found(config: Config, **options: object) -> list[tuple[str, list[str]]]:
    done = audit(config, **options)  # type: ignore[arg-type]
    return [(finding.kind, sorted(finding.images["image_id"])) for finding in done.findings]


def test_a_sound_data_set_has_no_findings(work: Path) -> None:
    done = audit(make(work))
    assert done.findings == [] and done.failed == []
    assert "not looked at, as there are none yet" in done.checked[1]
    assert "--folds 5" in done.checked[-1]
    assert rows_of(work / "audit.csv") == [] and rows_of(work / "near_groups.csv") == []
    assert "Nothing was found fault with" in audit_text(done, 5)


def test_copies_and_near_duplicates(work: Path) -> None:
    extra = {
        "copy.png": ("C", "", 0.0),  # of 가, other tier, other split
        "near.png": ("A", "", 70.0),  # of b, same tier, other split
        "near2.png": ("C", "", 129.0),  # of c, other tier, same split
        "near3.png": ("C", "", 190.0),  # of d, same tier and split
        "far.png": ("A", "", 260.0),  # 20 degrees from e: cosine 0.94
    }
    (work / "data/images").mkdir(parents=True)
    picture(work / "data/images/가.png", 0)
    (work / "data/images/copy.png").write_bytes((work / "data/images/가.png").read_bytes())
    config = make(work, extra)
    trained(work, config, {"copy": "test", "near": "val"}, {})
    assert found(config) == [
        ("copy-across-splits", ["copy", "가"]),
        ("near-across-splits", ["b 🎨", "near"]),
        ("copy-other-tier", ["copy", "가"]),
        ("near-other-tier", ["c", "near2"]),
        ("near", ["d", "near3"]),
    ]
    rows = {row["kind"]: row for row in rows_of(work / "audit.csv")}
    assert rows["copy-other-tier"]["rows"] == "2; 8" and rows["copy-other-tier"]["tiers"] == "S; C"
    assert rows["copy-across-splits"]["splits"] == "train; test"
    assert rows["near-across-splits"]["value"] == "cosine 0.985 (b 🎨 and near)"
    assert rows["near"]["severity"] == "note" and rows["near"]["advice"]
    config.audit.near_cosine = 0.9
    assert ("near", ["e", "far"]) in found(config)


def test_near_groups_keep_splits_clean(work: Path) -> None:
    """What audit finds across splits is gone once its list is given to the split."""
    names = [f"{i:02d}" for i in range(24)]
    extra = {}
    for i, name in enumerate(names):  # pairs 2 degrees apart, 13 from the next
        extra[f"n{name}.png"] = ("SABC"[i % 4], "", i * 13.0)
        extra[f"n{name}x.png"] = ("SABC"[i % 4], "", i * 13.0 + 2)
    config = make(work, extra)
    config.audit.near_cosine = 0.999

    def across(near: str | None) -> int:
        from mirip_fast.features.datasets import newest_graded

        options = SplitConfig(near_groups=near)
        images = graded_of_dataset(newest_graded(work / "cache"), options)
        trained(work, config, {}, {})
        save_split(work / "runs/a-run/split.csv", images)
        return [kind for kind, _ in found(config)].count("near-across-splits")

    assert across(None) > 0
    labels = read_near_groups(work / "near_groups.csv", read_manifest(work / "data"))
    assert len(set(labels) - {None}) >= 24
    assert across(str(work / "near_groups.csv")) == 0
    command = ["split", "data", "--out", "parts", "--cache-dir", "cache"]
    assert run([*command, "--near-groups", "near_groups.csv"]) == 0
    split_of = {
        row["image_id"]: path.name
        for path in (work / "parts").glob("*.csv")
        for row in rows_of(path)
    }
    assert len(set(split_of.values())) == 3
    assert all(split_of[f"n{name}"] == split_of[f"n{name}x"] for name in names)


def test_straddling_groups(work: Path) -> None:
    extra = {
        "g1.png": ("A", "kim", 30.0),
        "g2.png": ("B", "kim", 90.0),
        "h.png": ("B", "lee", 150.0),
    }
    config = make(work, extra)
    assert found(config) == []  # no splits yet
    trained(work, config, {"g1": "val"}, {})
    assert found(config) == [("group-across-splits", ["g1", "g2"])]
    assert rows_of(work / "audit.csv")[0]["value"] == "group 'kim': train 1, val 1"


def test_splits_are_those_of_split_files_where_there_is_no_run(work: Path) -> None:
    config = make(work, {"near.png": ("A", "", 65.0)})
    header = "image_id,filename,tier\n"
    (work / "data/train_metadata.csv").write_text(header + "near,near.png,A\n")
    (work / "data/test_metadata.csv").write_text(header + "b 🎨,b 🎨.png,A\n", encoding="utf-8")
    assert found(config) == [("near-across-splits", ["b 🎨", "near"])]


def test_doubtful_grades(work: Path) -> None:
    config = make(work)
    scores = {"가": -3.0, "b 🎨": 2.0, "c": 1.0, "d": 0.0, "e": 2.5, "f": 1.5}
    trained(work, config, {}, scores)
    assert found(config) == [("disagreement", ["가"])]
    (row,) = rows_of(work / "audit.csv")
    assert row["value"].startswith("contradicts 100% of") and "out-of-fold" in row["value"]
    assert row["value"].endswith("it would be C") and row["rows"] == "2"
    config.audit.disagreement = 0.1
    assert len(found(config)) == 6  # 가 contradicts one comparison of each other image
    text = (work / "data/metadata.csv").read_text(encoding="utf-8")
    (work / "data/metadata.csv").write_text(text.replace("가.png,S", "가.png,C"), encoding="utf-8")
    assert ["가"] not in [images for _, images in found(config)]  # graded anew since


def test_contradictions_against_a_double_loop() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        n = int(rng.integers(2, 12))
        scores = rng.integers(0, 4, n).astype(float)
        tiers = rng.integers(0, 3, n)
        got = contradictions(scores, tiers)
        for i in range(n):
            others = [j for j in range(n) if tiers[j] != tiers[i]]
            wrong = 0.0
            for j in others:
                gap = (scores[i] - scores[j]) * (1 if tiers[i] < tiers[j] else -1)
                wrong += 1.0 if gap < 0 else 0.5 if gap == 0 else 0.0
            expected = wrong / len(others) if others else np.nan
            np.testing.assert_allclose(got[i], expected, equal_nan=True)


def test_files_that_are_unreadable_gone_changed_or_new(work: Path) -> None:
    extra = {"bad.png": ("A", "", float("nan"))}
    config = make(work)
    images = work / "data/images"
    (images / "bad.png").write_bytes(b"no picture")
    works = {**WORKS, **extra}
    lines = [f"{name[:-4]},{name},{tier}" for name, (tier, _, _) in works.items()]
    (work / "data/metadata.csv").write_text(
        "\n".join(["image_id,filename,tier", *lines]) + "\n", encoding="utf-8"
    )
    put(config, work / "data", {name: angle for name, (_, _, angle) in WORKS.items()})
    (images / "c.png").unlink()
    picture(images / "d.png", 999)
    picture(images / "new.png", 998)
    with (work / "data/metadata.csv").open("a") as stream:
        stream.write("new,new.png,B\n")
    assert found(config) == [
        ("unreadable", ["bad"]),
        ("missing", ["c"]),
        ("changed", ["d"]),
        ("not-embedded", ["new"]),
    ]
    assert rows_of(work / "audit.csv")[0]["value"] == "no degrees"


def test_a_folder_without_grades_and_the_data_itself_gone(
    work: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number, name in enumerate(("a.png", "b.png")):
        picture(work / "plain" / name, number)
    config = settings(work / "cache")
    put(config, work / "plain", {"a.png": 0, "b.png": 5})
    assert found(config) == [("near", ["a.png", "b.png"])]
    (work / "plain/a.png").unlink()
    assert found(config) == [("missing", ["a.png"]), ("near", ["a.png", "b.png"])]
    (work / "plain/b.png").unlink()
    (work / "plain").rmdir()
    assert found(config)[-1] == ("near", ["a.png", "b.png"])
    assert "is gone: the grades kept in the cache" in caplog.text


@pytest.mark.parametrize("n", [1, 40])
def test_one_image_and_all_alike(work: Path, n: int) -> None:
    degrees = {f"{i}.png": 7.0 for i in range(n)}
    for i in range(n):
        picture(work / "same" / f"{i}.png", i)
    config = settings(work / "cache")
    put(config, work / "same", degrees)
    kinds = found(config)
    assert [(kind, len(images)) for kind, images in kinds] == ([] if n == 1 else [("near", 40)])


def test_cycles(work: Path) -> None:
    config = make(work)
    (work / "pairs.csv").write_text(
        "image_path_1,image_path_2,label\nc.png,d.png,1\nd.png,e.png,1\nc.png,e.png,-1\nc.png,f.png,0\n"
    )
    done = audit(config, pairs=[work / "pairs.csv"])
    assert [sorted(one.images["image_id"]) for one in done.findings] == [
        ["c.png", "d.png", "e.png"]
    ]
    assert "not in this data" not in "".join(done.checked)
    assert rows_of(work / "audit.csv")[0]["rows"] == "2; 3; 4"
    header, *rows = (work / "pairs.csv").read_text().splitlines(keepends=True)
    for name, part in (("one.csv", rows[:1]), ("two.csv", rows[1:])):
        (work / name).write_text("".join([header, *part]))
    (work / "odd.csv").write_text(
        "".join([header, rows[0], "c.png,gone.png,1\n", "x.png,y.png,0\n"])
    )
    told = audit(config, pairs=[work / "odd.csv"]).checked[-1]
    assert "2 judgements of works that are not in this data (first: row 3, 'gone.png')" in told
    both = [work / "one.csv", work / "two.csv"]
    assert found(config, pairs=both) == [("cycle", ["c.png", "d.png", "e.png"])]
    assert rows_of(work / "audit.csv")[0]["rows"] == "one.csv:2; two.csv:2; two.csv:3"


def cycles(folder: Path, *judged: tuple[object, object]) -> list[tuple[tuple[str, ...], list[int]]]:
    """The cycles among judgements (better, worse) of the lines 2, 3, …: images and lines of each."""
    path = folder / "judged.csv"
    lines = ["image_path_1,image_path_2,label", *(f"{one},{other},1" for one, other in judged)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    findings, _ = contradictory_judgements([path])
    return [(tuple(f.images["image_id"]), f.images["row"].tolist()) for f in findings]


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ("ab bc ac ab ad", []),
        ("ab bc cd da ca xa", [("abc", [2, 3, 6]), ("abcd", [2, 3, 4, 5])]),
        ("ab ba ab cc", [("ab", [2, 3]), ("c", [5])]),
        ("ef bc ab de cd fa", [("abcdef", [4, 3, 6, 5, 2, 7])]),
    ],
)
def test_the_shortest_cycles_are_named_with_their_rows(
    tmp_path: Path, pairs: str, expected: list[tuple[str, list[int]]]
) -> None:
    found = cycles(tmp_path, *((pair[0], pair[1]) for pair in pairs.split()))
    assert found == [(tuple(images), rows) for images, rows in expected]


def test_cycles_against_trying_everything(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    seen = set()
    for _ in range(100):
        n = int(rng.integers(2, 7))
        drawn = rng.integers(0, n, (int(rng.integers(1, 11)), 2))
        edges = {(int(a), int(b)) for a, b in drawn if a != b or rng.random() < 0.1}
        if not edges:
            continue
        found = [[*map(int, images)] for images, _ in cycles(tmp_path, *edges)]
        for cycle in found:
            assert set(zip(cycle, [*cycle[1:], cycle[0]], strict=True)) <= edges
            assert len(set(cycle)) == len(cycle)
        shortest = next(
            (
                length
                for length in range(1, n + 1)
                for way in itertools.permutations(range(n), length)
                if all(edge in edges for edge in zip(way, (*way[1:], way[0]), strict=True))
            ),
            0,
        )
        assert min(map(len, found), default=0) == shortest
        seen.add(shortest)
    assert seen >= {0, 1, 2, 3}


def test_five_cycles_are_named_at_most_and_the_shortest(tmp_path: Path) -> None:
    ring = [*zip(range(10, 40), [*range(11, 40), 10], strict=True)]
    found = cycles(tmp_path, *ring, *((b, a) for a, b in ring[:10]))
    assert [len(images) for images, _ in found] == [2] * 5


def test_a_long_cycle_is_found_soon_and_told_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    ring = [f"w{i},w{(i + 1) % 4000},1" for i in range(4000)]
    path.write_text("\n".join(["image_path_1,image_path_2,label", *ring]))
    findings, (said,) = contradictory_judgements([path])
    text = audit_text(Audit(findings, [said], [], []), 5)
    assert len(findings[0].images) == 4000
    assert "(rows 2, 3, 4, 5, " in text and max(map(len, text.splitlines())) < 250


def test_files_of_judgements_are_read_as_training_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(
        "image_path_1;image_path_2;label;judge\n./가.png;b\\c.png;1;kim\n"
        "가.png;./b/c.png;−1;\nx;y;0;\n",
        "utf-8-sig",
    )
    (cycle,), (said,) = contradictory_judgements([path])
    assert cycle.images["image_id"].tolist() == ["b/c.png", "가.png"]
    assert said.startswith("Preferences: 2 judgements and 1 tie in")
    path.write_text("image_path_1,image_path_2,label\na,b,2\n,b,1\na,b,nan\n")
    with pytest.raises(DataError) as caught:
        contradictory_judgements([path])
    assert [line.partition("pairs.csv")[2][:2] for line in str(caught.value).splitlines()] == [
        ":2", ":3", ":4",
    ]  # fmt: skip
    path.write_text("image_path_1,image_path_2,label\na,b,1\na,c,0\n")
    assert "2 judgements and 0 ties" in contradictory_judgements([path], zero="second")[1][0]


def test_the_command_ends_with_the_status_asked_for(
    work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    extra = {"near.png": ("A", "", 65.0), "=sum(a1).png": ("A", "", 63.0)}
    config = make(work, extra)
    command = ["audit", "data", "--out", "found"]
    assert run([*command]) == 0  # a note does not fail
    trained(work, config, {"near": "test"}, {})
    assert run(command) == 1
    out, _ = capfd.readouterr()
    assert "near-across-splits" in out and "near (A, test)" in out and "Failed: 1 finding" in out
    (row,) = rows_of(work / "found/audit.csv")
    assert row["images"] == "b 🎨; near; =sum(a1)"
    assert run([*command, "--fail-on", "none"]) == 0
    assert run([*command, "--fail-on", "group-across-splits,cycle"]) == 0
    assert run([*command, "--near-cosine", "0.9999"]) == 0
    assert run([*command, "--fail-on", "eror"]) == 1
    assert "Did you mean error?" in capfd.readouterr().err
    for wrong in (
        ["audit", "nowhere"],
        [*command, "--run", "nowhere"],
        [*command, "--pairs", "no.csv"],
    ):
        assert run(wrong) == 1
    assert "Traceback" not in capfd.readouterr().err


def test_no_cell_is_a_formula(work: Path) -> None:
    known = {"image_id": ["=sum(a1)", "b"], "tier": ["-1", "A"], "file": ["@a", "b"]}
    findings = [Finding("near", pd.DataFrame(known), "")]
    write_findings(work / "audit.csv", findings)
    (row,) = rows_of(work / "audit.csv")
    assert (row["images"], row["tiers"], row["paths"]) == ("'=sum(a1); b", "'-1; A", "'@a; b")


def test_lists_of_near_groups(work: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(work)
    manifest = read_manifest(work / "data")
    path = work / "near.csv"
    path.write_text("near_group,image_id\n1,c\n1,d\n2,elsewhere\n")
    assert read_near_groups(path, manifest) == [None, None, "1", "1", None, None]
    assert "1 image not in data/metadata.csv" in caplog.text
    for text, message in {
        "near_group,image_id\n1,x\n": "none of its 1 image is in",
        "near_group,image_id\n1,c\n2,c\n": "give both groups one name",
        "near_group,image_id\n,c\n": "a group and an image_id",
        "group,image_id\n1,c\n": "no column 'near_group'.*Is it 'group'",
    }.items():
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            read_near_groups(path, manifest)
    path.write_text("near_group,image_id,path\n")
    assert read_near_groups(path, manifest) == [None] * 6
    with pytest.raises(DataError, match="cannot be read"):
        read_near_groups(work / "absent.csv", manifest)
