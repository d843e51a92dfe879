"""The page's server and a whole session: who may ask for what, and what becomes of a verdict."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forked import start, wait_for
from made_run import rows_of
from mirip_fast_cli.main import run
from PIL import Image
from scipy import stats
from test_cli import TINY, draw, make_data
from test_decode_pool import wait_until_gone

from mirip_fast.errors import ConfigError, DataError
from mirip_fast.features.store import FeatureStore
from mirip_fast.label import works as works_module
from mirip_fast.label.server import LabelRun
from mirip_fast.ranking.evaluate import pick_model
from mirip_fast.serving import LocalServer
from mirip_fast.settings import Resolved, resolve

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

SETTINGS = {
    "embed.backbone": "tiny-random", "embed.image_size": 28, "embed.workers": 0,
    "split.train_ratio": 0.5, "split.val_ratio": 0.3, "split.test_ratio": 0.2, "train.epochs": 3,
    "train.batch_size": 16, "label.judge": "Kim",
}  # fmt: skip
LABEL = ["label", "photos", "--no-browser", *TINY]
LABEL += ["--train-ratio", "0.5", "--val-ratio", "0.3", "--test-ratio", "0.2"]
NAMES = ["<script>alert(1)</script>.png", "quote\"'.png", "new\nline.png", "불꽃🔥.png"]


def settings(**more: Any) -> Resolved:
    return resolve((), SETTINGS | more)


def photos(folder: Path, n: int = 30) -> None:
    for i in range(n):
        name = NAMES[i].replace("/", "∕") if i < len(NAMES) else f"p{i:02d}.png"
        draw(folder / name, 0.1 + 0.8 * i / n, i)


class Browser:
    """Asks the server as a browser would."""

    def __init__(self, label: LabelRun, judge: int = 0):
        self.label, self.token = label, label.addresses[judge].split("/")[3]

    def ask(
        self, path: str, method: str = "GET", body: Any = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.label.server.port, timeout=20)
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        data = (
            body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        )
        connection.request(method, path, data, sent)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, content

    def get(self, name: str) -> tuple[int, dict[str, str], bytes]:
        return self.ask(f"/{self.token}/{name}")

    def post(self, name: str, **said: Any) -> tuple[int, Any]:
        status, _, content = self.ask(
            f"/{self.token}/{name}", "POST", said, X_Mirip_Token=self.token
        )
        return status, json.loads(content)

    def state(self) -> Any:
        return json.loads(self.get("state")[2])


@contextlib.contextmanager
def serving(
    folder: Path, out: Path, resolved: Resolved | None = None, **how: bool
) -> Iterator[Browser]:
    with LabelRun(folder, out, resolved or settings(), **how) as label:
        thread = threading.Thread(target=label.server.run)
        thread.start()
        try:
            yield Browser(label)
        finally:
            label.server.stop()
            thread.join(20)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A session in which nothing is judged."""
    work = tmp_path_factory.mktemp("asked")
    photos(work / "photos", 12)
    (work / "secret.txt").write_text("secret")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        with serving(work / "photos", work / "pairs.csv") as browser:
            yield browser
            assert not rows_of(work / "pairs.csv")


def test_who_may_ask_for_what(asked: Browser) -> None:
    status, headers, page = asked.get("")
    assert status == 200 and b"<main" in page
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert headers["referrer-policy"] == "no-referrer"
    assert not re.search(rb"(src|href)=\"(https?:)?//", page)  # nothing from elsewhere
    for name in ("label.js", "label.css", "words.js"):
        assert asked.get(name)[0] == 200

    # a wrong token or none
    for path in (
        "/",
        "/state",
        "/image/0",
        "/x/state",
        f"/{asked.token[:-1]}/state",
        "//state",
    ):
        assert asked.ask(path)[0] == 404
    said = {"number": asked.state()["number"], "label": 1}
    judge = f"/{asked.token}/judge"
    assert asked.ask(judge, "POST", said)[0] == 403
    assert asked.ask(judge, "POST", said, X_Mirip_Token="x")[0] == 403
    assert asked.ask("/x/judge", "POST", said, X_Mirip_Token=asked.token)[0] == 404
    assert asked.ask(judge, "GET")[0] in (404, 405)

    # other names of this machine (DNS rebinding), other pages
    for host in ("evil.example", "127.0.0.1.evil.example", "[::1]", "", "localhost:x"):
        assert asked.ask(f"/{asked.token}/state", Host=host)[0] in (400, 421)
    assert asked.ask(f"/{asked.token}/state", Host="localhost:1234")[0] == 200  # a tunnel
    for origin in ("http://evil.example", "null", "https://127.0.0.1"):
        sent = {"X_Mirip_Token": asked.token, "Origin": origin}
        assert asked.ask(judge, "POST", said, **sent)[0] == 421

    # whatever is no number of a work is no picture
    for path in (
        "image/../../secret.txt", "image/..%2f..%2fsecret.txt", "image/%2e%2e/%2e%2e/secret.txt",
        "image/-1", "image/30", "image/1e1", "image/0x1", "image//etc/passwd", "../pairs.csv",
        "server.py", "index.html", "..%2fserver.py", "image/" + "9" * 400,
    ):  # fmt: skip
        status, _, content = asked.get(path)
        assert status == 404 and b"secret" not in content and b"root:" not in content

    # what makes no sense
    deep = b"[" * 4000
    digits = b'{"label": 1, "number": ' + b"9" * 4400 + b"}"
    for nonsense in (b"", b"no json", deep, digits, b"\xff\xfe{", b'{"number": NaN, "label": 1}', b"[]", b'{"number": 1}', b"x" * 10_000,
                     b'{"number": 1, "label": 2}', b'{"number": true, "label": 1}'):  # fmt: skip
        assert asked.ask(judge, "POST", nonsense, X_Mirip_Token=asked.token)[0] == 400


def test_odd_request_lines_are_refused(asked: Browser, capfd: pytest.CaptureFixture[str]) -> None:
    image = f"/{asked.token}/image/".encode()
    for line in (
        b"OPTIONS *", b"GET *", b"GET ?", b"GET x", b"CONNECT 127.0.0.1:80", b"GET http://x",
        b"GET //", b"BREW /", b"GET /%ff%fe", b"GET /" + b"a" * 9000, b"GET " + image + b"9" * 5000,
        b"GET " + image + b"%D9%A3", b"GET " + image + b"%00",
    ):  # fmt: skip
        with socket.create_connection(("127.0.0.1", asked.label.server.port), 20) as client:
            client.sendall(line + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert client.recv(10).startswith(b"HTTP/1.1 4"), line
    assert asked.get("state")[0] == 200
    assert "Traceback" not in capfd.readouterr().err


def test_it_listens_on_this_machine_only(asked: Browser) -> None:
    port = asked.label.server.port
    assert asked.label.server.address.startswith(f"http://127.0.0.1:{port}/")
    listening = [
        line.split()[1]
        for table in ("/proc/net/tcp", "/proc/net/tcp6")
        if Path(table).exists()
        for line in Path(table).read_text().splitlines()[1:]
        if line.split()[3] == "0A" and int(line.split()[1].split(":")[1], 16) == port
    ]
    assert listening in ([], [f"0100007F:{port:04X}"])
    with pytest.raises(ConfigError, match=f"--port {port} cannot be listened on"):
        LocalServer(None, port)  # type: ignore[arg-type]
    for family, address in ((socket.AF_INET, "127.0.0.2"), (socket.AF_INET6, "::1")):
        with socket.socket(family) as other, pytest.raises(OSError):
            other.connect((address, port))


def test_pictures_are_made_anew(work: Path, decoded_elsewhere: Callable[[], None]) -> None:
    photos(work / "photos")
    payload = b"<html><script>alert('polyglot')</script>"
    for i in range(5, 30):
        with (work / "photos" / f"p{i:02d}.png").open("ab") as stream:
            stream.write(payload)
    (work / "private").mkdir()
    draw(work / "private" / "diary.png", 0.5, 99)
    (work / "photos" / "link.png").symlink_to(work / "private" / "diary.png")
    (work / "photos" / "inside.png").symlink_to("p06.png")  # the same bytes as another
    with serving(work / "photos", work / "pairs.csv") as browser:
        label = browser.label
        works = label.works
        number = {works.name(i): i for i in range(len(works))}
        decoded_elsewhere()
        assert not works.shown[number["link.png"]]
        assert browser.get(f"image/{number['link.png']}")[0] == 404
        status, headers, content = browser.get(f"image/{number['p10.png']}")
        assert status == 200 and headers["content-type"] == "image/jpeg"
        assert headers["x-content-type-options"] == "nosniff"
        assert b"script" not in content
        picture = Image.open(io.BytesIO(content))
        assert picture.format == "JPEG" and picture.size == (32, 32)
        # what is put in a file's place afterwards is not shown
        (work / "photos" / "p11.png").unlink()
        (work / "photos" / "p11.png").symlink_to(work / "private" / "diary.png")
        status, _, content = browser.get(f"image/{number['p11.png']}")
        assert status == 404 and b"changed" in content


def test_a_session(work: Path) -> None:
    photos(work / "photos")
    out = work / "pairs.csv"
    with serving(work / "photos", out, settings(**{"label.retrain_every": 5})) as browser:
        works = browser.label.works
        state = browser.state()
        first = state
        for i in range(24):
            label = 1 if state["works"][0] > state["works"][1] else -1
            if i == 3:
                label = 0
            status, state = browser.post("judge", number=state["number"], label=label, seconds=1.25)
            assert status == 200 and state["now"] == i + 1
            assert len(rows_of(out)) == i + 1  # at once
        row = rows_of(out)[0]
        assert row["image_path_1"] == works.name(first["works"][0])
        assert row["image_path_2"] == works.name(first["works"][1])
        assert (row["judge"], row["seconds"], row["kind"], row["predicted"]) == (
            "Kim",
            "1.2",
            "teach",
            "",
        )

        # a key pressed twice, a second tab
        assert browser.post("judge", number=first["number"], label=1)[0] == 409
        assert len(rows_of(out)) == 24

        # skipping writes nothing and the pair does not come again
        skipped = set(state["works"])
        status, state = browser.post("skip", number=state["number"])
        assert status == 200 and set(state["works"]) != skipped and len(rows_of(out)) == 24

        # undo shows the pair again, and the one that was up comes after it
        up = state["works"]
        last = rows_of(out)[-1]
        status, state = browser.post("undo")
        assert status == 200 and len(rows_of(out)) == 23
        assert works.name(state["works"][0]) == last["image_path_1"]
        status, state = browser.post("judge", number=state["number"], label=0)
        assert state["works"] == up
        assert (
            rows_of(out)[-1]["label"] == "0" and rows_of(out)[-1]["predicted"] == last["predicted"]
        )

        for _ in range(300):  # the head that is trained in the background
            if (state := browser.state())["heads"] or state["remark"]:
                break
            time.sleep(0.2)
        assert state["heads"] and state["remark"] is None, state["remark"]
        for _ in range(6):
            status, state = browser.post("judge", number=state["number"], label=1)
        assert {row["predicted"] for row in rows_of(out)[-5:]} <= {"1", "-1"}
        assert state["measure"] or state["teach"]
        text = json.dumps(state) + browser.get("")[2].decode()
        assert not any(part in text for part in ("alert(", 'quote"', "불꽃", "p10", "photos"))
        session = browser.label.session
        assert session.made_now == len(session.judgements) == 30
        told = browser.label.next_command()
        assert "--pairs pairs.csv" in told and "--val-ratio 0.3" in told
    # goes on from the file; hostile names come back
    with serving(work / "photos", out) as browser:
        assert browser.state()["judged"] == 30 and browser.state()["now"] == 0
        with pytest.raises(DataError, match="in use"):
            LabelRun(work / "photos", out, settings())


def test_few_judgements_are_learned_from_and_many_as_train_pairs_does(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos(work / "data")
    with LabelRun(work / "data", work / "pairs.csv", settings()) as label:
        session, works = label.session, label.works
        assert label._retrainer is not None
        bright = np.array([np.asarray(Image.open(works.path(i))).mean() for i in range(len(works))])
        for _ in range(30):
            state = session.state()
            one, other = state["works"]
            session.judge(state["number"], 1 if bright[one] > bright[other] else -1, 1.0)
        for _ in range(3):
            label._retrainer.wait(60)
        few = session._scores
        job = label._retrainer._job
    assert session._remark is None and few is not None
    others = works.in_split("test")
    assert (
        stats.kendalltau(few[others], bright[others]).statistic > 0.6
    )  # 14 were judged, not these
    monkeypatch.setattr(works_module, "FEW_PAIRS", 0)
    many = works_module.answer_job(job)
    options = ["--train-ratio", "0.5", "--val-ratio", "0.3", "--test-ratio", "0.2", "--epochs", "3"]
    options += ["--batch-size", "16", "--label", "pairs"]
    assert run(["train", "--head-only", "--pairs", "pairs.csv", "--data", "data", *options]) == 0
    model = pick_model(None, Path("runs"))
    store = FeatureStore.open(works.store.path)
    np.testing.assert_allclose(many["scores"], model.score(store, works.images.hashes), rtol=1e-6)
    kept = rows_of(next((work / "runs").iterdir()) / "pairs.csv")
    assert len(kept) == 30 and all(row["split"] for row in kept)  # no judgement is dropped


def test_a_model_that_is_there_predicts_from_the_first_pair(work: Path) -> None:
    make_data(work / "data", 40)
    assert run(["embed", "data", *TINY]) == 0
    assert run(["train", "--head-only", "--epochs", "3"]) == 0
    with LabelRun(work / "data", work / "pairs.csv", settings()) as label:
        label.session.judge(label.session.state()["number"], 1, 1.0)
    assert rows_of(work / "pairs.csv")[0]["predicted"] in ("1", "-1")


def test_faulty_files_are_told(work: Path) -> None:
    photos(work / "photos", 12)
    out = work / "pairs.csv"
    out.write_text("image_path_1,image_path_2,label\np05.png,nope.png,1\n")
    with pytest.raises(DataError, match=r"pairs.csv:2, image_path_2: 'nope.png' is no image"):
        LabelRun(work / "photos", out, settings())
    with pytest.raises(DataError, match="two are needed"):
        (work / "few").mkdir()
        for i in range(4):
            draw(work / "few" / f"{i}.png", 0.5, i)
        LabelRun(work / "few", work / "other.csv", settings())
    assert out.read_text().count("\n") == 2 and not (work / "other.csv").exists()


def test_without_the_packages(
    work: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert run(["label", "photos"]) == 1
    assert "pip install starlette uvicorn" in capfd.readouterr().err


IGNORING = """
import os, signal, sys, threading, time
from mirip_fast.label.server import make_app
from mirip_fast.serving import LocalServer

signal.signal(signal.SIGINT, signal.SIG_IGN)
server = LocalServer(lambda token: make_app({token: None}, None))

def signals():
    while not server._server.started:
        time.sleep(0.01)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(os.getpid(), number)
        time.sleep(0.3)
        print(server._server.should_exit, flush=True)

threading.Thread(target=signals).start()
signal.signal(signal.SIGTERM, signal.SIG_DFL)
server.run()
"""


def test_a_server_in_the_background_ignores_ctrl_c() -> None:
    """As the shell has it do that started it with an `&`; SIGTERM ends it."""
    done = subprocess.run(
        [sys.executable, "-c", IGNORING], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.split() == ["False"] and done.returncode == -signal.SIGTERM, done.stderr


def judged_file(work: Path) -> None:
    """Enough judgements for a head, and no Gaussian process, as soon as a session begins."""
    with LabelRun(work / "photos", work / "pairs.csv", settings()) as label:
        session = label.session
        for i in range(20):
            session.judge(session.state()["number"], 1 if i % 3 else -1, 1.0)
    header, *rows = (work / "pairs.csv").read_text().splitlines(keepends=True)
    (work / "pairs.csv").write_text(header + 80 * "".join(rows))


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_what_a_killed_server_leaves(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos(work / "photos")
    judged_file(work)
    # A training that takes long.
    (work / "mirip.yaml").write_text("train: {epochs: 100000, early_stopping_patience: 0}\n")
    temporary = work / "tmp"
    temporary.mkdir()

    # A process that was forked from the tests cannot start one that learns.
    command = [sys.executable, "-m", "mirip_fast_cli", *LABEL]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    try:
        wait_for(temporary, "mirip-fast-*/*/history.csv")  # it learns
        tasks = Path(f"/proc/{process.pid}/task").iterdir()
        children = {int(pid) for task in tasks for pid in (task / "children").read_text().split()}
    finally:
        process.kill()
        process.wait()
    assert children
    wait_until_gone(children)
    assert list(temporary.iterdir())
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    with LabelRun(work / "photos", work / "other.csv", settings()):
        assert not list(temporary.iterdir())


def test_ctrl_c_ends_it_and_says_what_is_next(work: Path) -> None:
    photos(work / "photos", 20)
    (process,) = start(lambda: run(LABEL), 1, work / "process")
    try:
        port, token = re.findall(r":(\d+)/(.*)/", process.said(1)[0].split()[-1])[0]
        connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=20)
        connection.request("GET", f"/{token}/state")
        state = json.loads(connection.getresponse().read())
        body = json.dumps({"number": state["number"], "label": 1})
        connection.request("POST", f"/{token}/judge", body, {"X-Mirip-Token": token})
        assert connection.getresponse().status == 200
    finally:
        os.kill(process.pid, signal.SIGINT)
        code, out, err = process.wait()
    assert code == 0 and "Traceback" not in err, err
    assert "1 judgement made now, 1 in all: pairs.csv" in out
    assert "Next: mirip-fast train --head-only --pairs pairs.csv --data photos" in out
    assert len(rows_of(work / "pairs.csv")) == 1
