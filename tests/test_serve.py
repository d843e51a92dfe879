"""A page that is served, and scores over HTTP: what is kept, who may ask, what a stranger can send."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_page import made_ranking, pictures
from made_run import TINY, draw, make_data, rows_of
from mirip_fast_cli.main import run
from PIL import Image

from mirip_fast.config import Config
from mirip_fast.data.pair_files import read_pairs
from mirip_fast.errors import ConfigError, DataError
from mirip_fast.portfolio import page as page_module
from mirip_fast.portfolio import score_api
from mirip_fast.portfolio.rank import rank_folder
from mirip_fast.portfolio.serve import LivePage, works_to_serve
from mirip_fast.ranking.evaluate import pick_model
from mirip_fast.serving import Guard, require_packages

pytest.importorskip("multipart")
pytest.importorskip("httpx")
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.testclient import TestClient

TOKEN = "0123456789abcdef"
WORKS = [f"작품 {i}.png" for i in range(30)]


def client_of(routes: list[Any]) -> TestClient:
    guard = Middleware(Guard, token=TOKEN, names=["art.example"], public=score_api.PUBLIC)
    return TestClient(Starlette(routes=routes, middleware=[guard]), base_url="http://localhost")


def open_page(folder: Path) -> LivePage:
    config = Config()
    config.embed.workers = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_module, "find_stacks", lambda *_: {})
        return LivePage(made_ranking(folder / "works", WORKS), folder / "out", config)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pictures(tmp_path / "works", WORKS)
    return tmp_path


def keys_of(client: TestClient) -> list[str]:
    text = client.get(f"/{TOKEN}/").text
    data = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    assert data["live"] and "connect-src &#x27;self&#x27;" in text
    return [work["key"] for work in data["works"]]


def say(client: TestClient, marks: Any, token: str = TOKEN) -> Any:
    return client.post(f"/{TOKEN}/marks", json={"marks": marks}, headers={"x-mirip-token": token})


def test_marks_are_kept_at_once_and_two_browsers_lose_none(folder: Path) -> None:
    with open_page(folder) as page:
        client = client_of(page.routes(TOKEN))
        keys = keys_of(client)

        def browse(own: list[str], field: str, value: Any) -> None:
            for key in own:
                assert say(client, {key: {field: value}}).status_code == 200

        people = [
            threading.Thread(target=browse, args=(keys, field, value))
            for field, value in (("stars", 4), ("note", "좋다"), ("tags", ["2차"]))
        ]
        for person in people:
            person.start()
        for person in people:
            person.join()
        say(client, {keys[0]: {"note": None, "stars": 9, "fame": 1}, "../x": {"stars": 1}})
        expected = {key: {"stars": 4, "note": "좋다", "tags": ["2차"]} for key in keys}
        del expected[keys[0]]["note"]
        assert client.get(f"/{TOKEN}/marks").json()["marks"] == expected
        with pytest.raises(DataError, match="another `mirip-fast serve`"):
            open_page(folder)
    file = folder / "out" / "works-marks.jsonl"
    with file.open("ab") as stream:  # a power loss
        stream.write(b'{"marks": {')
    with open_page(folder) as page:
        assert page.marks.now == expected
    assert file.read_bytes().endswith(b"\n")
    file.write_text('{"marks_of": "another"}\n')
    with pytest.raises(DataError, match="another folder of works"):
        open_page(folder)


def test_a_corrected_order_becomes_judged_pairs(folder: Path) -> None:
    import pandas as pd

    with open_page(folder) as page:
        client = client_of(page.routes(TOKEN))
        keys = keys_of(client)
        say(client, {keys[25]: {"at": -1}, keys[3]: {"at": 4}, keys[4]: {"at": 3}})
        rows = rows_of(page.pairs_file)
        pairs = [(row["image_path_1"], row["image_path_2"]) for row in rows]
        assert (WORKS[4], WORKS[3]) in pairs and (WORKS[3], WORKS[4]) not in pairs
        first = [worse for better, worse in pairs if better == WORKS[25]]
        assert {WORKS[0], WORKS[24]} <= set(first) and 10 <= len(first) <= 12
        table = pd.DataFrame(
            {"file": [str(folder / "works" / n) for n in WORKS], "image_id": WORKS, "named": WORKS}
        )
        judged = read_pairs([page.pairs_file], table, [folder / "works"])
        assert len(judged) == page.pairs == len(rows) and set(judged.label) == {1}
        say(client, {key: {"at": None} for key in keys})  # all taken back
        assert rows_of(page.pairs_file) == [] and page.pairs == 0


def test_what_was_moved_joins_the_grades_in_the_next_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import mirip_fast as mf

    monkeypatch.chdir(tmp_path)
    for draws in (
        "ranking.finished.plot_curves",
        "evaluation.report.Report.draw",
    ):  # pictures take most of the time
        monkeypatch.setattr(f"mirip_fast.{draws}", lambda *_: None)
    make_data(tmp_path / "data", 48)
    for i in range(6):
        draw(tmp_path / "new" / f"{i}.png", 0.3 + 0.02 * i, 100 + i)
    train = ["train", "--head-only"]
    assert run(["-q", "embed", "data", *TINY]) == run(["-q", *train]) == 0
    model, config = mf.load(workers=0), Config()
    done = rank_folder(model.scorer, "new", config)
    before = done.ranking.set_index("file")["score"]
    with LivePage(done, tmp_path, config) as page:
        client = client_of(page.routes(TOKEN))
        say(client, {keys_of(client)[5]: {"at": -1}})  # the last one up to the first place
        assert page.pairs == 5
    capfd.readouterr()
    assert run(train) == 0
    told = capfd.readouterr().err
    assert "5 of 5 judged pairs of" in told and "join 44 graded works" in told
    assert "grades alone order 0.0000 rightly" in told
    again = mf.load(workers=0)
    assert again.path != model.path
    after = again.rank("new", anyway=True).set_index("file")["score"]
    last, first = before.idxmin(), before.idxmax()
    assert after[last] - after[first] > (before[last] - before[first]) / 2
    held_out = [rows_of(path / "held_out.csv") for path in (model.path, again.path)]
    assert held_out[0] == held_out[1]  # what is told of graded works rests on the grades alone
    # A head, too; and it goes on with them after a stop.
    assert run(["-q", *train, "--epochs", "2"]) == 0
    assert run(["-q", "cache", "prune", "--older-than", "0", "--yes"]) == 0
    assert run([*train, "--epochs", "2"]) == 1
    assert "6 of 6 works in judged pairs have no features" in capfd.readouterr().err
    assert run(["-q", "embed", "new", *TINY]) == 0
    head = [*train, "--data", "data", "--epochs", "20", "--learning-rate", "0.01"]
    scores = []
    for said in ("5 of 5 judged pairs of", "is gone: what was moved"):
        assert run(head) == 0
        assert said in capfd.readouterr().err
        scores.append(mf.load(workers=0).rank("new", anyway=True).set_index("file")["score"])
        page.pairs_file.unlink(missing_ok=True)
    gaps = [(one[last] - one[first]) / one.std() for one in scores]
    assert gaps[0] > gaps[1]


def test_what_was_moved_never_takes_the_place_of_grades_named_in_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import mirip_fast as mf

    monkeypatch.chdir(tmp_path)
    for draws in ("ranking.finished.plot_curves", "evaluation.report.Report.draw"):
        monkeypatch.setattr(f"mirip_fast.{draws}", lambda *_: None)
    make_data(tmp_path / "data", 48)
    table = tmp_path / "data" / "metadata.csv"
    table.write_text(table.read_text(encoding="utf-8-sig").replace(",tier,", ",anna,", 1))
    for i in range(3):
        draw(tmp_path / "new" / f"{i}.png", 0.3 + 0.2 * i, 100 + i)
    train = ["train", "--head-only", "--tier-column", "anna"]
    assert run(["-q", "embed", "data", *TINY]) == run(["-q", *train]) == 0
    done = rank_folder(mf.load(workers=0).scorer, "new", Config())
    with LivePage(done, tmp_path, Config()) as page:
        client = client_of(page.routes(TOKEN))
        say(client, {keys_of(client)[2]: {"at": -1}})
    capfd.readouterr()
    assert run(train) == 0
    assert "2 of 2 judged pairs of" in (told := capfd.readouterr().err) and "join 44" in told


def test_who_may_see_the_page_and_change_it(folder: Path) -> None:
    with open_page(folder) as page:
        client = client_of(page.routes(TOKEN))
        assert client.get("/wrong/").status_code == 404
        assert client.get(f"/{TOKEN}/", headers={"host": "evil.example"}).status_code == 421
        assert client.get(f"/{TOKEN}/", headers={"host": "art.example"}).status_code == 200
        for origin, status in (
            ("https://art.example", 200),
            ("https://localhost", 421),
            ("null", 421),
        ):
            assert client.get(f"/{TOKEN}/", headers={"origin": origin}).status_code == status
        assert say(client, {}, token="").status_code == 403
        sent = {"x-mirip-token": TOKEN}
        for body in (b"", b"[]", b'{"marks": 3}', b"\xff"):
            answer = client.post(f"/{TOKEN}/marks", content=body, headers=sent)
            assert answer.status_code == 400
        shown = client.get(f"/{TOKEN}/original/0")
        assert shown.headers["content-type"] == "image/jpeg" and shown.content[:2] == b"\xff\xd8"
        assert client.get(f"/{TOKEN}/original/30").status_code == 404
        (folder / "works" / WORKS[1]).write_bytes(b"another")
        assert client.get(f"/{TOKEN}/original/1").status_code == 404
        for name in ("../page.html", "%2e%2e%2fpage.html", "page.html"):
            assert client.get(f"/{TOKEN}/page_files/{name}").status_code == 404


@pytest.fixture
def scorer(headed: Path) -> Iterator[score_api.Scorer]:
    config = Config()
    config.embed.workers, config.runtime.device = 1, "cpu"
    with score_api.Scorer(pick_model(None, headed / "runs"), config, keep=headed / "kept") as it:
        yield it


def ask(client: TestClient, **sent: Any) -> Any:
    return client.post("/score", headers={"authorization": f"Bearer {TOKEN}"}, **sent)


def test_uploads_get_the_scores_of_rank_and_hostile_ones_a_reason(
    headed: Path, scorer: score_api.Scorer
) -> None:
    import mirip_fast as mf

    client = client_of(score_api.routes(scorer, most_bytes=100_000, queue=4))
    for i in range(3):
        draw(headed / "new" / f"새 {i}.png", 0.2 + 0.3 * i, 100 + i)
    files = sorted((headed / "new").iterdir())
    sent = [("files", (file.name, file.read_bytes())) for file in files]
    answer = ask(client, files=[*sent, ("files", ("../x.png", b"\x89PNG\r\n\x1a\n"))])
    assert answer.status_code == 200
    *works, broken = answer.json()["works"]
    expected = mf.load(workers=0).score("new", anyway=True)
    for work, row in zip(works, expected.to_dict("records"), strict=True):
        assert work["file"] == row["file"] and work["score"] == pytest.approx(
            row["score"], abs=1e-4
        )
        if "tier" in row:
            assert work["tier"] == row["tier"]
            assert work["score_100"] == pytest.approx(row["score_100"], abs=1)
            assert sum(work["tiers"].values()) == pytest.approx(1, abs=1e-3)
    assert broken["file"] == "x.png" and broken["error"] and "score" not in broken
    assert len(list((headed / "kept").iterdir())) >= 4  # it was asked for
    one = ask(client, content=files[2].read_bytes(), params={"name": "a"}).json()["works"][0]
    assert one == {**works[2], "file": "a"}  # whatever else is sent with it
    assert ask(client, content=b"no picture").status_code == 422
    assert ask(client, content=b"").status_code == 400
    assert ask(client, content=b"x" * 100_001).status_code == 413
    assert ask(client, content=iter([b"x" * 60_000] * 2)).status_code == 413
    many = [("files", (f"{i}.png", b"x")) for i in range(score_api.MOST_PICTURES + 1)]
    assert ask(client, files=many).status_code == 400
    assert client.post("/score", content=b"x").status_code == 404  # no token


def test_a_pdf_of_several_pages_is_told_to_be_sent_page_by_page(
    headed: Path, scorer: score_api.Scorer
) -> None:
    pytest.importorskip("pypdfium2")
    pages = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    pages[0].save(sent := io.BytesIO(), "PDF", save_all=True, append_images=pages[1:])
    client = client_of(score_api.routes(scorer, most_bytes=100_000, queue=4))
    answer = ask(client, content=sent.getvalue(), params={"name": "folio.pdf"})
    error = answer.json()["works"][0]["error"]
    assert answer.status_code == 422 and "a PDF of 2 pages; one page is a work: send each" in error


def test_more_requests_than_the_queue_holds_are_sent_away(
    scorer: score_api.Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(scorer, "score", lambda found: go_on.wait(20) and [{"file": ""}])
    with client_of(score_api.routes(scorer, most_bytes=1000, queue=3)) as client:
        answers: list[Any] = []
        people = [
            threading.Thread(target=lambda: answers.append(ask(client, content=b"x")))
            for _ in range(3)
        ]
        for person in people:
            person.start()
        deadline = time.monotonic() + 20
        while client.get("/health").json()["waiting"] < 3:
            assert time.monotonic() < deadline
        refused = ask(client, content=b"x")
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        go_on.set()
        for person in people:
            person.join()
        assert [answer.status_code for answer in answers] == [200] * 3
        assert client.get("/health").json()["waiting"] == 0
        about = client.get("/openapi.json").json()
        assert about["openapi"].startswith("3.1") and "/score" in about["paths"]
        assert "Authorization: Bearer" in client.get("/docs").text


def test_a_ranking_or_a_run_says_what_is_to_be_served(headed: Path) -> None:
    (one,) = (headed / "runs").glob("2*")
    assert works_to_serve(str(one), None) == (str(headed / "data" / "metadata.csv"), one)
    run(["--quiet", "rank", "data", "--anyway", "--out", "ranked"])
    works, checkpoint = works_to_serve("ranked", None)
    assert works is not None and Path(works).parts[-2:] == ("data", "metadata.csv")
    assert checkpoint is not None and checkpoint.parent.name == one.name
    assert works_to_serve("data", Path("x")) == ("data", Path("x"))
    with pytest.raises(ConfigError, match="needs the package nothing-at-all: pip install"):
        require_packages("serve", "nothing-at-all")
