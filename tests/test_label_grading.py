"""Grading one work at a time, four works at once, several judges, the list of what was judged, and sharing."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forked import start
from made_run import rows_of
from mirip_fast_cli.main import run
from test_cli import TINY
from test_label_file import known, row
from test_label_server import Browser, photos, serving, settings

from mirip_fast.config import DataConfig
from mirip_fast.data.graders import grades_of
from mirip_fast.data.manifest import read_manifest
from mirip_fast.data.pair_files import read_pairs
from mirip_fast.errors import ConfigError, DataError
from mirip_fast.label import grading, judgement_file
from mirip_fast.label.judgement_file import JudgementFile
from mirip_fast.label.server import LabelRun, judge_names

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

TWO = {"label.judge": "김 선생님,Lee", "label.retrain_every": 1000}


@pytest.fixture(scope="module")
def office(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 20 photos, four of which have hostile names, embedded once."""
    work = tmp_path_factory.mktemp("office")
    photos(work / "photos", 20)
    return work


@pytest.fixture(autouse=True)
def here(office: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(office)
    yield office
    for path in office.glob("*.csv"):
        path.unlink()


def grade(browser: Browser, tier: int) -> Any:
    status, state = browser.post("judge", number=browser.state()["number"], label=tier)
    assert status == 200, state
    return state


def test_tiers_of_two_graders_are_what_embed_reads(here: Path) -> None:
    out = here / "grades.csv"
    with serving(here / "photos", out, settings(**TWO), grade=True) as kim:
        lee = Browser(kim.label, 1)
        for i in range(4):
            up = kim.state()["works"]
            assert lee.state()["works"] == up  # the same works first: so agreement is told early
            assert grade(kim, i)["now"] == i + 1 == len(rows_of(out)) - i  # at once
            state = grade(lee, i)
        assert state["grades"]["overlap"] == 4 and state["grades"]["alpha"] == 1
        number = state["number"]
        assert lee.post("judge", number=number - 1, label=0)[0] == 409  # a key pressed twice
        assert lee.post("judge", number=number, label=4)[0] == 409
        assert lee.post("judge", number=number, order=[1])[0] == 400
        # a grade in the middle is undone and its work comes again; nobody undoes another's
        listed = json.loads(lee.get("list")[2])
        assert (
            len(listed) == 8 and [line["judge"] for line in listed if line["mine"]] == ["Lee"] * 4
        )
        first = [line for line in listed if line["mine"]][-1]
        theirs = next(line for line in listed if not line["mine"])
        assert lee.post("undo", row=theirs["row"])[0] == 500 and len(rows_of(out)) == 8
        status, state = lee.post("undo", row=first["row"])
        assert status == 200 and state["works"] == first["works"] and len(rows_of(out)) == 7
        assert grade(lee, 1)["now"] == 4
        assert lee.post("skip", number=lee.state()["number"])[0] == 200
        assert lee.get(f"thumb/{first['works'][0]}")[0] == 200
        text = json.dumps(state) + json.dumps(listed)
        assert not any(part in text for part in ("alert(", 'quote"', "불꽃", "p10", "photos"))
        assert kim.label.next_command().startswith("mirip-fast embed grades.csv --backbone tiny")
    assert out.read_bytes().startswith(b"\xef\xbb\xbf")
    table = read_manifest(out, DataConfig()).table
    assert sorted(map(tuple, grades_of(table).tolist())) == [(0, 1), (1, 1), (2, 2), (3, 3)]
    assert run(["embed", "grades.csv", *TINY]) == 0
    # going on later, with a name spelled in another way; then each work again
    again = {**TWO, "label.judge": "LEE"}
    with serving(here / "photos", out, settings(**again), grade=True) as lee:
        assert (lee.state()["judged"], lee.state()["left"]) == (4, 16)
    with serving(here / "photos", out, settings(**again), grade=True, again=True) as lee:
        assert lee.state()["left"] == 20
        for _ in range(20):
            grade(lee, 3)
        assert lee.state()["works"] == []
    assert len(rows_of(out)) == 4 + 20  # the new grade stands in the place of the old one
    with LabelRun(here / "photos", out, settings(**{"label.judge": "박"}), grade=True) as label:
        assert label.sessions[0].state()["grades"]["overlap"] == 4


def test_a_killed_program_has_every_grade(here: Path, tmp_path: Path) -> None:
    command = [
        "label",
        "photos",
        "--grade",
        *TINY,
        "--no-browser",
        "--judge",
        "김",
        "--judge",
        "Lee",
    ]
    (process,) = start(lambda: run(command), 1, tmp_path)
    try:
        addresses = [line.split()[-1] for line in process.said(2)]
        for i in range(5):
            address = addresses[i % 2]
            sent = {"X-Mirip-Token": address.split("/")[3]}
            said = json.dumps({"number": i // 2, "label": i % 4}).encode()
            asked = urllib.request.Request(address + "judge", said, sent)
            with urllib.request.urlopen(asked) as got:
                assert got.status == 200
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    rows = rows_of(here / "grades.csv")
    told = [("김", "S"), ("Lee", "A"), ("김", "B"), ("Lee", "C"), ("김", "S")]
    assert [(r["grader"], r["tier"]) for r in rows] == told


def test_works_with_a_tier_are_not_asked_for(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = sorted(path.name for path in (here / "photos").glob("p*.png"))
    lines = [f"photos/{name},{'S' if i < 3 else ''},회화과" for i, name in enumerate(names)]
    (here / "works.csv").write_text("image_path,tier,department\n" + "\n".join(lines))
    with LabelRun(here / "works.csv", here / "grades.csv", settings(), grade=True) as label:
        assert label.session.state()["left"] == len(names) - 3
        label.session.grade(0, 0)
    assert "as the data has a tier already: 3 works" in caplog.text
    assert (
        rows_of(here / "grades.csv")[0]["department"] == "회화과"
    )  # the user's columns come through
    (here / "all.csv").write_text("image_path,tier\nphotos/p05.png,S\nphotos/p06.png,A\n")
    with pytest.raises(DataError, match="Nothing is left to grade"):
        LabelRun(here / "all.csv", here / "other.csv", settings(), grade=True)
    (here / "other.csv").write_text("filename,tier,grader\nphotos/p05.png,S,Kim\n")
    with pytest.raises(DataError, match="the tier 'S' is none of 수, 우. Give the tiers"):
        other = settings(**{"data.tiers": "수,우"})
        LabelRun(here / "photos", here / "other.csv", other, grade=True)
    with pytest.raises(DataError, match="is no file of tiers by work and grader: it has no column"):
        LabelRun(here / "works.csv", here / "works.csv", settings(), grade=True)


def test_works_that_a_model_is_unsure_of_come_first(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Model:
        def score(self, store: object, hashes: list[bytes]) -> np.ndarray[Any, Any]:
            return np.arange(len(hashes), dtype=np.float64)

    class Known:
        def tier_probabilities(self, scores: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            sure = np.clip(scores / len(scores), 0.01, 0.49) + 0.5
            return np.stack([sure, 1 - sure], axis=1)

    monkeypatch.setattr(grading, "load_calibration", lambda model: Known())
    with LabelRun(here / "photos", here / "grades.csv", settings(), grade=True) as label:
        model: Any = Model()
        order = grading.grading_order(label.works, model, again=False, seed=1)
        drawn = grading.grading_order(label.works, None, again=False, seed=1)
    assert sorted(order) == sorted(drawn) == list(range(20))
    turns = list(dict.fromkeys([0, drawn[0], 1, drawn[1]]))
    assert order[: len(turns)] == turns


def test_four_works_give_six_pairs(here: Path) -> None:
    out = here / "pairs.csv"
    with serving(here / "photos", out, settings(**TWO), four=True) as kim:
        works, state = kim.label.works, kim.state()
        assert (
            len(state["works"]) == 4 and len({works.images.splits[i] for i in state["works"]}) == 1
        )
        best_last = state["works"][::-1]
        for wrong in ([*best_last[:3], best_last[0]], best_last[:3], []):
            assert kim.post("judge", number=state["number"], order=wrong)[0] == 409
        status, _ = kim.post("judge", number=state["number"], order=best_last, seconds=12)
        rows = rows_of(out)
        assert status == 200 and len(rows) == 6
        assert {(r["label"], r["judge"], r["seconds"]) for r in rows} == {
            ("-1", "김 선생님", "2.0")
        }
        manifest = works.images
        read = read_pairs([out], manifest.table, [manifest.root])
        assert (
            len({tuple(sorted(pair)) for pair in read[["one", "other"]].to_numpy().tolist()}) == 6
        )
        assert kim.post("undo")[1]["works"] == state["works"] and rows_of(out) == []
        assert kim.post("judge", number=kim.state()["number"], order=best_last)[0] == 200
        # one of the six is undone; then two works are compared
        row = json.loads(kim.get("list")[2])[3]["row"]
        assert kim.post("undo", row=row)[0] == 200 and len(rows_of(out)) == 5
        state = kim.post("four", on=False)[1]
        assert len(state["works"]) == 2
        assert kim.post("undo")[0] == 200 and rows_of(out) == []  # the other five


def test_two_judges_of_pairs(here: Path) -> None:
    resolved = settings(**TWO, **{"label.measure_share": 0.9})
    with serving(here / "photos", here / "pairs.csv", resolved) as kim:
        lee = Browser(kim.label, 1)
        for browser in (kim, lee):
            for _ in range(10):
                state = browser.state()
                better = 1 if state["works"][0] < state["works"][1] else -1
                assert browser.post("judge", number=state["number"], label=better)[0] == 200
        (two,) = lee.state()["agreement"]
        assert (two["first"], two["second"]) == ("김 선생님", "Lee")
        assert (
            two["count"] >= 5 and two["hits"] == two["count"]
        )  # measuring pairs are shown to both
        assert lee.state()["judged"] == 10 and len(rows_of(here / "pairs.csv")) == 20
        listed = json.loads(lee.get("list")[2])
        assert sum(line["mine"] for line in listed) == 10
        assert sum(not line["mine"] for line in listed) == two["count"]  # no hint at what comes
        # a token is good for its judge alone
        path, said = f"/{kim.token}/undo", {"row": listed[0]["row"]}
        assert lee.ask(path, "POST", said, X_Mirip_Token=lee.token)[0] == 403
        assert lee.ask("/x/state", Authorization=f"Bearer {lee.token}")[0] == 404


@pytest.mark.parametrize("names", ["Kim, kim", "Kim,", "score", "김 선생,김선생"])
def test_judges_have_names_of_their_own(names: str) -> None:
    with pytest.raises(ConfigError, match="a name of their own"):
        judge_names(names)


def test_sharing_on_the_network(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mirip_fast.label.server.network_addresses", lambda: ["192.0.2.7"])
    with serving(here / "photos", here / "grades.csv", grade=True, share=True) as browser:
        label = browser.label
        assert re.fullmatch(
            rf"http://192\.0\.2\.7:{label.server.port}/\S{{30,}}/", label.server.address
        )
        assert label.server._socket.getsockname()[0] == "0.0.0.0"
        path = f"/{browser.token}/state"
        for host in ("192.0.2.7", socket.gethostname()):
            assert browser.ask(path, Host=host)[0] == 200
        assert browser.ask(path, Host="evil.example")[0] == 421
        assert browser.ask("/state", Host="192.0.2.7")[0] == 404


def test_a_row_in_the_middle_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pairs.csv"
    path.write_bytes(b'image_path_1;image_path_2;label\na.png;b.png;1\n\n"x\ny.png";c.png;0\n')
    with JudgementFile(path) as file:  # rows of earlier sessions too
        file.append(row("c.png", "d.png"), row("d.png", "e.png", -1))
        before = path.read_bytes()

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(judgement_file, "write_bytes", full)
        with pytest.raises(OSError):
            file.take_back(2)
        assert path.read_bytes() == before
        monkeypatch.undo()
        file.take_back(2)
        with pytest.raises(DataError, match="taken back already"):
            file.take_back(2)
        with pytest.raises(DataError, match="in use"):  # held still
            JudgementFile(path)
        file.append(row("e.png", "f.png"), instead_of=[1, 3])
        assert '"x\ny.png";c.png;0' in file.aside.read_text()
    text = "image_path_1;image_path_2;label\nd.png;e.png;-1\ne.png;f.png;1\n"
    assert path.read_bytes().decode() == text
    read = read_pairs([path], known("d.png", "e.png", "f.png"), [Path("/works")])
    assert read.label.tolist() == [-1, 1]
