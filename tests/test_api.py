"""The Python face: what a command does, one line does."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar
from unittest.mock import MagicMock

import numpy as np
import pandas as pd
import pytest
from mirip_fast_cli.main import run
from PIL import Image

import mirip_fast as mf

TINY = {"backbone": "tiny-random", "image_size": 28, "workers": 0}


def draw(folder: Path, count: int, seed: int = 0) -> list[str]:
    """Pictures that are darker the worse they are; returns their tiers."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        pixels = rng.normal(200 - 40 * (i % 4), 30, (28, 28, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return ["SABC"[i % 4] for i in range(count)]


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with graded works, ``new`` ones, and a model that was trained in five lines."""
    folder = tmp_path_factory.mktemp("face")
    tiers = draw(folder / "data" / "images", 80)
    table = pd.DataFrame({"filename": [f"{i:03d}.png" for i in range(80)], "tier": tiers})
    table["applicant"] = [f"지원자 {i // 4}" for i in range(80)]
    table.to_csv(folder / "data" / "metadata.csv", index=False)
    draw(folder / "new", 8, seed=1)
    (folder / "new" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    return folder


@pytest.fixture(scope="module")
def model(there: Path) -> mf.Model:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(there)
        works = mf.embed("data", **TINY)
        return mf.train(works)


@pytest.fixture(autouse=True)
def _inside(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(there)


def test_works_are_a_table_and_rows_in_its_order(there: Path, model: mf.Model) -> None:
    draw(there / "some", 5, seed=2)
    (there / "some" / "001.png").write_bytes(b"no picture")
    works = mf.embed("some", **TINY)
    images = works.images
    assert list(images["status"]) == ["embedded", "failed", "embedded", "embedded", "embedded"]
    assert images["reason"][1] and len(works) == 5
    rows = works.features("cls")
    assert rows.shape[0] == 5 and np.isnan(rows[1]).all() and np.isfinite(rows[[0, 2, 3, 4]]).all()
    again = mf.embed("some", **TINY)
    assert list(again.images["status"]) == ["present", "failed", "present", "present", "present"]
    np.testing.assert_array_equal(again.features("cls"), rows)
    graded = mf.embed("data", **TINY).images
    assert list(graded["applicant"][:2]) == ["지원자 0"] * 2 and list(graded["tier"][:4]) == list(
        "SABC"
    )


def test_a_ranking_is_that_of_the_command(there: Path, model: mf.Model) -> None:
    ranking = model.rank("new", out="out", html="page.html")
    assert run(["rank", "new", "--workers", "0", "--out", "by-command"]) == 0
    assert (there / "out" / "ranking.csv").read_bytes() == (
        there / "by-command" / "ranking.csv"
    ).read_bytes()
    assert list(ranking["rank"]) == list(range(1, 9)) and ranking["score"].is_monotonic_decreasing
    [(path, reason)] = ranking.attrs["failures"]
    assert path.endswith("broken.png") and reason
    scores = model.score("new")
    assert list(scores["file"]) == ranking.attrs["names"] and len(scores) == 9
    assert scores["score"].isna().tolist() == [name == "broken.png" for name in scores["file"]]
    assert "<!doctype html>" in (there / "page.html").read_text(encoding="utf-8")


def test_a_table_comes_in_where_a_path_may(there: Path, model: mf.Model) -> None:
    new = pd.DataFrame({"file": [f"new/{i:03d}.png" for i in (3, 0)], "school": ["가", "나"]})
    ranking = model.rank(new)
    assert ranking.set_index("school")["file"].to_dict() == {"가": "003.png", "나": "000.png"}
    graded = pd.read_csv("data/metadata.csv")
    graded["file"] = [str(there / "data" / "images" / name) for name in graded.pop("filename")]
    other = mf.train(graded, **TINY, name="table")
    by_path = model.score("new")["score"]
    assert other.score("new")["score"].corr(by_path) > 0.99  # another split, as ids are others
    assert model.evaluate(graded).n_images == 80
    with pytest.raises(ValueError, match="in a column file, filename, image_path; this one has x"):
        model.rank(pd.DataFrame({"x": [1]}))


def test_a_model_is_loaded_evaluated_explained_and_shared(there: Path, model: mf.Model) -> None:
    report = mf.load(model.path).evaluate()
    assert report.pairwise_accuracy == model.evaluate().pairwise_accuracy
    assert "pairwise accuracy" in str(report) and "data:image/png" in report._repr_html_()
    [explained] = model.explain("new/000.png", detail=2)
    assert explained.overlay().mode == "RGB"
    model.export("shared")
    expected = model.rank("new")
    pd.testing.assert_frame_equal(mf.load("shared").rank("new"), expected)
    with pytest.raises(mf.errors.ConfigError, match="overwrite"):
        model.export("shared")


def test_wrong_words_are_told_with_the_right_ones(model: mf.Model) -> None:
    with pytest.raises(ValueError, match="Did you mean 'embed.image_size'"):
        mf.embed("data", imagesize=28)
    with pytest.raises(ValueError, match="epochs"):
        mf.train(config={"train": {"epochs": "many"}})
    with pytest.raises(FileNotFoundError, match="runs/nowhere"):
        mf.load("runs/nowhere/at/all")


class _Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as an upload and a download of small files need."""

    files: ClassVar[dict[str, bytes]] = {}

    def log_message(self, *_: object) -> None: ...

    def _answer(self, value: object, **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(200)
        for name, text in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        import base64

        sent = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            return self._answer({"url": "https://huggingface.co/user/name", "name": "user/name"})
        if "/preupload/" in self.path:
            asked = json.loads(sent)["files"]
            return self._answer(
                {"files": [{**f, "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
            )
        if "/commit/" in self.path:
            for line in map(json.loads, sent.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self._answer(
                {"commitUrl": "https://huggingface.co/user/name/commit/1", "commitOid": "1" * 40}
            )
        return self._answer({"valid": True})

    def do_GET(self) -> None:
        if "/resolve/" in self.path:
            content = self.files[self.path.split(f"/resolve/{'1' * 40}/")[1].partition("?")[0]]
            etag = f'"{hash(content):x}"'
            return self._answer(content, ETag=etag, **{"X-Repo-Commit": "1" * 40})
        names = [
            {"rfilename": name, "path": name, "type": "file", "size": len(data), "oid": "0"}
            for name, data in self.files.items()
        ]
        if "/tree/" in self.path:
            return self._answer(names)
        return self._answer(
            {"id": "user/name", "sha": "1" * 40, "siblings": names, "private": False}
        )

    do_HEAD = do_GET


def test_a_model_goes_to_the_hub_and_comes_back(
    there: Path, model: mf.Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Against a local stand-in of the hub's HTTP interface."""
    server = HTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    import huggingface_hub

    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    try:
        done = model.push_to_hub("user/name", token="hf_x")
        pd.testing.assert_frame_equal(mf.load("user/name").rank("new"), model.rank("new"))
    finally:
        server.shutdown()
    assert "user/name" in done
    card = _Hub.files["README.md"].decode()
    assert "](calibration.png)" in card and _Hub.files["calibration.png"].startswith(b"\x89PNG")


def test_the_page_for_a_space_ranks_what_it_is_given(
    there: Path, model: mf.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for gradio, which hands the chosen files to the function of the button."""
    path = Path(__file__).parent.parent / "examples" / "space" / "app.py"
    spec = importlib.util.spec_from_file_location("app", path)
    assert spec is not None and spec.loader is not None
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    gradio = MagicMock()
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    model.export("for_a_space")
    monkeypatch.setenv("MODEL", "for_a_space")
    app.main()
    gradio.Blocks.return_value.__enter__.return_value.launch.assert_called_once()
    (pressed, given, shown), _ = gradio.Button.return_value.click.call_args
    assert given is gradio.File.return_value and len(shown) == 3
    before = sorted(Path("cache").rglob("*"))
    table, pictures, told = pressed([f"new/00{i}.png" for i in range(8)] + ["new/broken.png"])
    assert list(table["file"]) == [caption.partition(". ")[2] for _, caption in pictures]
    assert list(table["rank"]) == list(range(1, 9)) and {"score_100", "tier"} <= {*table}
    assert Path(pictures[0][0]).is_file() and "09 broken.png cannot be read" in told
    assert sorted(Path("cache").rglob("*")) == before  # nothing of a visitor's pictures is kept
    assert pressed(None)[2] == "Choose some pictures."
    assert pressed(["new/broken.png"])[1] == []


def test_the_estimator_keeps_the_conventions() -> None:
    from sklearn.model_selection import GroupKFold, cross_val_score
    from sklearn.utils.estimator_checks import check_estimator

    check_estimator(mf.PairwiseRanker())
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(120, 16))
    truth = rows[:, 0] + 0.3 * rng.normal(size=120)
    names = np.array(["C", "B", "A", "S"])[
        np.searchsorted(np.quantile(truth, [0.25, 0.5, 0.75]), truth)
    ]
    ranker = mf.PairwiseRanker(tiers=("S", "A", "B", "C"))
    groups = np.arange(120) // 4
    scores = cross_val_score(ranker, rows, names, cv=GroupKFold(5), groups=groups)
    assert scores.mean() > 0.75
    better = names[:, None] < names[None, :]  # A < B < C, and S is put before them
    code = np.array([{"S": 0, "A": 1, "B": 2, "C": 3}[name] for name in names])
    better = code[:, None] < code[None, :]
    fitted = ranker.fit(rows, names, groups)
    said = fitted.predict(rows)
    ahead = np.sign(said[:, None] - said[None, :]) / 2 + 0.5
    assert fitted.score(rows, names) == pytest.approx(ahead[better].mean())
    assert fitted.left_out_.shape == (120,)
    with pytest.raises(ValueError, match="grades D are none of tiers"):
        ranker.fit(rows, ["D", *names[1:]])


def blocks(text: str) -> list[str]:
    """The blocks of Python before the names of the training loop."""
    found = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return [block for block in found if "DataSplitter" not in block]


def test_a_strangers_type_check_covers_the_readme() -> None:
    """``typed_notebook.py`` is checked with the package's own types, strictly, where the code is linted."""
    here = Path(__file__).parent
    readme = (here.parent / "README.md").read_text(encoding="utf-8")
    assert "\n".join(blocks(readme)[:1]) in (here / "typed_notebook.py").read_text(encoding="utf-8")
    assert '"tests/typed_notebook.py"' in (here.parent / "pyproject.toml").read_text()
    assert (Path(mf.__file__).parent / "py.typed").is_file()
