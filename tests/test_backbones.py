"""Several backbones side by side: embedded with each, learned from and scored through all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from mirip_fast_cli.main import run
from numpy.typing import NDArray
from safetensors.numpy import load_file
from test_cli import draw, make_data
from test_readouts import rows_of

from mirip_fast.features.store import FeatureStore
from mirip_fast.models.numpy_head import NumpyHead
from mirip_fast.ranking.evaluate import pick_model

_EMBED = ["embed", "data", "--image-size", "32", "--workers", "0"]
_RANK = ["-q", "rank", "folder", "--workers", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, model_dir: Callable[[str], Path]) -> Path:
    """A data set embedded with two backbones in one command, and a run of each readout."""
    work = tmp_path_factory.mktemp("backbones")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        make_data(work / "data", 60)
        for i in range(5):
            draw(work / "folder" / f"{i}.png", i / 5, 100 + i)
        for name, kind in (("a", "vit"), ("b", "siglip")):
            (work / name).symlink_to(model_dir(kind))
        # A list in the project's file is what the flag given twice is.
        (work / "mirip.yaml").write_text("embed:\n  backbone: [a, b]\n")
        assert run(["-q", *_EMBED]) == 0
        assert run(["-q", "train", "--head-only", "--name", "gp"]) == 0
        head = ["--readout", "head", "--epochs", "3", "--name", "head"]
        assert run(["-q", "train", "--head-only", *head]) == 0
    return work


@pytest.fixture
def work(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(trained)
    yield trained


def _run(work: Path, name: str) -> Path:
    (folder,) = (work / "runs").glob(f"*-{name}")
    return folder


def _rows(work: Path, about: dict[str, object], images: list[Path]) -> NDArray[np.float64]:
    """[n, D] what a run sees of some files, joined by hand from the stores of its backbones."""
    hashes = [hashlib.sha256(path.read_bytes()).digest() for path in images]
    parts = []
    kinds = str(about["features"]).split("+")
    for number, part in enumerate([about, *about.get("more", [])], 1):  # type: ignore[misc]
        for path in (work / "cache").glob("*/store.json"):
            store = FeatureStore.open(path.parent)
            if store.fingerprint == part["fingerprint"]:
                break
        for kind in kinds:
            if (kind.partition("@")[2] or "1") != str(number):
                continue
            series = f"{kind.partition('@')[0]}.{part['views'][0][0]}"
            parts.append(store.read(series, store.rows(series, hashes)).astype(np.float64))
    return np.hstack(parts)


def _about(path: Path) -> dict[str, object]:
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    about: dict[str, object] = json.loads(header["__metadata__"]["about"])["model"]
    return about


def _by_process(arrays: dict[str, NDArray], rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """mean + sd · Σ w (1 + Σ a exp(−|x − x′| / ℓ)), each block centred: of length 1, and in deviations."""
    total, basis, ends = 1.0, 0, np.cumsum(arrays["blocks"])[:-1]
    centred = rows - arrays["centre"]
    units = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in np.split(centred, ends, axis=1)]
    parts = units + np.split(centred / arrays["deviation"], ends, axis=1)
    for x, amplitude, length in zip(parts, arrays["amplitudes"], arrays["lengths"], strict=True):
        if amplitude:
            theirs = arrays["basis"][:, basis : basis + x.shape[1]].astype(np.float64)
            distance = np.linalg.norm(x[:, None] - theirs[None], axis=2)
            total, basis = total + amplitude * np.exp(-distance / length), basis + x.shape[1]
    result: NDArray[np.float64] = arrays["mean"] + arrays["sd"] * (total @ arrays["weights"])
    return result


@pytest.mark.parametrize("name", ["gp", "head"])
def test_new_works_are_scored_by_the_rows_of_all_backbones(
    work: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    folder = _run(work, name)
    told = json.loads((folder / "run.json").read_text())["backbones"]
    assert set(told) <= {str((work / n).resolve()) for n in "ab"} and (
        name == "gp" or len(told) == 2
    )
    file = folder / ("gp.safetensors" if name == "gp" else "head.safetensors")
    assert run([*_RANK, "--checkpoint", str(folder)]) == 0
    ranked = {row["file"]: float(row["score"]) for row in rows_of(work / "ranking.csv")}
    images = sorted((work / "folder").iterdir())
    rows = _rows(work, _about(file), images)
    arrays = load_file(file)
    expected = _by_process(arrays, rows) if name == "gp" else NumpyHead(arrays)(rows)
    np.testing.assert_allclose([ranked[p.name] for p in images], expected, atol=2e-4)


@pytest.mark.parametrize("readout", ["auto", "ensemble"])
def test_several_readouts_are_tried_through_both(work: Path, readout: str) -> None:
    """Scores of new works are those of the members on the rows of both, joined by hand."""
    train = ["-q", "train", "--head-only", "--readout", readout, "--epochs", "2"]
    assert run([*train, "--name", readout]) == 0
    folder = _run(work, readout)
    told = json.loads((folder / "run.json").read_text())
    assert set(told["compared"]) == {"gp", "head"}
    out = f"by-{readout}"
    assert run([*_RANK, "--checkpoint", str(folder), "--tiers", "--out", out]) == 0
    ranked = {row["file"]: row for row in rows_of(work / out / "ranking.csv")}
    images = sorted((work / "folder").iterdir())
    model = pick_model(folder, work)
    rows = _rows(work, _about(model.checkpoint), images)
    expected = np.mean([member(rows) for member in model.members], axis=0)
    np.testing.assert_allclose(
        [float(ranked[p.name]["score"]) for p in images], expected, atol=2e-4
    )
    if readout == "ensemble":
        assert len(model.members) == 6 and set(told["backbones"]) == {
            str((work / name).resolve()) for name in "ab"
        }


@pytest.mark.parametrize(
    "command",
    [
        ["evaluate"],
        ["rank", "folder", "--workers", "0", "--tiers", "--anchors", "3", "--html", "r.html"],
        ["compare", "folder/0.png", "folder/4.png"],
        ["export", "--hf", "share", "--overwrite"],
        ["similar", "folder/4.png"],
    ],
    ids=" ".join,
)
def test_what_takes_a_run_takes_one_of_two_backbones(work: Path, command: list[str]) -> None:
    more = [] if command[0] == "similar" else ["--checkpoint", str(_run(work, "head"))]
    assert run(["-q", *command, *more]) == 0


def test_the_folder_of_a_shared_model_ranks_alike_with_the_backbones_given(
    work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    head = ["--checkpoint", str(_run(work, "head"))]
    assert run(["-q", "export", "--hf", "share", "--overwrite", *head]) == 0
    assert not [p for p in Path("share").iterdir() if str(work).encode() in p.read_bytes()]
    tables = []
    draw(work / "folder" / "5.png", 0.5, 7)  # has to be computed
    for options in (
        [*_RANK, "--checkpoint", "share", "--backbone", "b", "--backbone", "a"],
        [*_RANK, *head],
    ):
        assert run(options) == 0
        tables.append(rows_of(work / "ranking.csv"))
    assert tables[0] == tables[1] and len(tables[0]) >= 5
    draw(work / "folder" / "6.png", 0.4, 8)
    wrong = ["--backbone", "a", "--backbone", "tiny-random"]
    assert run([*_RANK, "--checkpoint", "share", *wrong]) == 1
    assert "tiny-random is none of those that the model looks through" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["explain", "folder/4.png"], "explain looks through one backbone"),
        (
            ["rank", "folder", "--html", "p.html", "--explain", "1"],
            "rank --explain looks through one",
        ),
        (["export", "--head-only", "--out", "onnx"], "train --head-only --backbone "),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_looks_through_one_backbone_says_so(
    work: Path, capfd: pytest.CaptureFixture[str], command: list[str], said: str
) -> None:
    assert run([*command, "--checkpoint", str(_run(work, "head"))]) == 1
    assert said in capfd.readouterr().err


@pytest.mark.parametrize(
    "options", [[], ["--readout", "head", "--epochs", "2"]], ids=["gp", "head"]
)
def test_judged_pairs_are_learned_through_both(work: Path, options: list[str]) -> None:
    names = sorted(path.name for path in (work / "data").rglob("*.png"))
    pairs = [f"{a},{b},{-1 if a < b else 1}" for a, b in zip(names, names[7:], strict=False)]
    lines = ["image_path_1,image_path_2,label", *pairs * 3]
    (work / "pairs.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    out = ["--output-dir", f"pairs{len(options)}"]
    train = ["-q", "train", "--head-only", "--pairs", "pairs.csv", *out, *options]
    assert run(train) == 0
    assert run([*_RANK, *out, "--anyway", "--out", f"ranked{len(options)}"]) == 0
    assert len(rows_of(work / f"ranked{len(options)}" / "ranking.csv")) == len(
        list((work / "folder").iterdir())
    )


def test_embedding_again_finds_the_rows_of_both(
    work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(_EMBED) == 0
    said = capfd.readouterr()
    assert said.out.count("0 embedded + 60 already there") == 2
    assert "Pass 1 of 2" in said.err and "Pass 2 of 2" in said.err


def test_an_interrupted_head_goes_on_with_both(work: Path) -> None:
    folder = _run(work, "head")
    assert run(["-q", "train", "--head-only", "--resume", str(folder)]) == 0


def test_one_backbone_of_several_can_be_asked_for(
    work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    one = ["-q", "train", "--head-only", "--backbone", "b", "--name", "one"]
    assert run(one) == 0
    folder = _run(work, "one")
    assert json.loads((folder / "run.json").read_text())["backbones"] == [
        str((work / "b").resolve())
    ]
    assert "more" not in _about(folder / "gp.safetensors")


def test_what_a_backbone_lacks_is_said_with_the_command_that_adds_it(
    work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["train", "--head-only", "--backbone", "a", "--backbone", "tiny-random"]) == 1
    said = capfd.readouterr().err
    assert "is not embedded with tiny-random yet" in said
    assert "--backbone tiny-random --image-size 32" in said
    few = [*_EMBED, "--backbone", "tiny-random", "--limit", "20"]
    assert run(["-q", *few]) == 0
    assert run(["train", "--head-only", "--backbone", "a", "--backbone", "tiny-random"]) == 1
    said = capfd.readouterr().err
    assert "40 of 60 images have no features of tiny-random yet" in said
    assert "mirip-fast embed" in said and "--limit" not in said
    assert run(["-q", *_EMBED]) == 0  # the newest is of both again


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--backbone", "a", "--backbone", "./a"], "is given twice"),
        (["--backbone", "a", "--backbone", ""], "a name is empty"),
        (["--backbone", "a", "--backbone", "nothing/here"], "nothing/here"),
        (["--backbone", "a", "--backbone", "b", "--export", "f.h5"], "give one --backbone"),
    ],
    ids=["twice", "empty", "gone", "export"],
)
def test_backbones_that_cannot_be_embedded_with_are_refused_before_the_first_pass(
    work: Path, capfd: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    assert run([*_EMBED, *flags]) == 1
    told = capfd.readouterr()
    assert said in told.err and "already there" not in told.out
