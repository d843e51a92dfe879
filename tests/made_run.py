"""Small data and finished runs, what they answer, and spoiling their files: for tests and ``make torture``."""

from __future__ import annotations

import csv
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from mirip_fast_cli.main import run
from PIL import Image

from mirip_fast.config import Config
from mirip_fast.data.table import Manifest, image_table
from mirip_fast.errors import MiripError
from mirip_fast.features.store import FeatureStore
from mirip_fast.files import listed_files
from mirip_fast.ranking.anchors import find_anchors
from mirip_fast.ranking.evaluate import evaluate_split
from mirip_fast.ranking.folds import load_plan
from mirip_fast.ranking.graded import GradedImages
from mirip_fast.ranking.held_out import load_calibration, load_held_out, made_with
from mirip_fast.ranking.judged_pairs import evaluate_pairs
from mirip_fast.ranking.scorer import load_score_model
from mirip_fast.training.run_folder import FOLDS_FILE, run_of_checkpoint

_HEAD = [
    *("--quiet", "train", "--head-only", "--epochs", "2", "--device", "cpu"),
    *("--train-ratio", "0.2", "--val-ratio", "0.7", "--test-ratio", "0.1"),
    *("--projector-hidden-dim", "8", "--projector-output-dim", "8", "--score-hidden-dim", "4"),
]


TINY = ["--backbone", "tiny-random", "--image-size", "28", "--workers", "0"]


def draw(path: Path, brightness: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.clip(rng.normal(255 * brightness, 20, (32, 32, 3)), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path)


def rows_of(path: Path) -> list[dict[str, str]]:
    """The lines of a CSV file, as they stand in it."""
    with path.open(encoding="utf-8-sig", newline="") as stream:
        return list(csv.DictReader(stream))


def scored(
    tiers: Sequence[str], scores: np.ndarray, codes: Sequence[int], **columns: Sequence[object]
) -> GradedImages:
    """Works named 0, 1, … with held-out scores."""
    names = [str(i) for i in range(len(scores))]
    known = {"image_id": names, "file": [f"{name}.png" for name in names], "tier": codes, **columns}
    manifest = Manifest(Path("x"), Path("x"), tuple(tiers), image_table(known, tiers))
    images = GradedImages.of(manifest, [bytes(32)] * len(scores), [""] * len(scores))
    return images.with_scores(scores, "out-of-fold")


def flat(text: str) -> str:
    """Without the line breaks of wrapped sentences."""
    return " ".join(text.split())


def make_data(folder: Path, n: int = 40) -> None:
    """Graded pictures: the better the tier, the brighter."""
    rows = ["image_id,filename,tier,department"]
    for i in range(n):
        tier = i % 4
        name = f"그림 {i:02d}.png" if i % 3 == 0 else f"work_{i:02d}.png"
        draw(folder / "images" / name, 0.9 - 0.2 * tier, i)
        rows.append(f"id{i:02d},{name},{'SABC'[tier]},{'회화' if i % 2 else '조소'}")
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n", encoding="utf-8-sig")


def make_noisy_data(folder: Path, n: int) -> None:
    """Pictures whose tiers overlap."""
    rng, rows = np.random.default_rng(0), ["image_id,filename,tier"]
    (folder / "images").mkdir(parents=True)
    for i in range(n):
        pixels = rng.normal(200 - 25 * (i % 4), 40, (28, 28, 3)) + rng.normal(0, 25)
        name = f"작품 {i:03d}.png"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "images" / name)
        rows.append(f"id{i},{name},{'SABC'[i % 4]}")
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")


class Restored:
    """A working folder with ``n`` works in data/, made once by commands, put back for every test."""

    def __init__(
        self,
        root: Path,
        n: int,
        *commands: list[str],
        make: Callable[[Path, int], None] = make_data,
    ):
        self.place, self.kept = root / "work", root / "kept"
        self.place.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.place)
            make(self.place / "data", n)
            for command in commands:
                assert run(command) == 0
        self.place.rename(self.kept)

    def __call__(self, monkeypatch: pytest.MonkeyPatch) -> Path:
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.kept, self.place)
        monkeypatch.chdir(self.place)
        return self.place


def make_runs(folder: Path) -> tuple[Path, ...]:
    """In the working folder ``folder``: a cache, a run with one head, one of folds, one of judged pairs."""
    make_data(folder / "data")
    judged = [f"id{i:02d},id{j:02d},1" for i in range(40) for j in range(i) if i % 4 < j % 4]
    (folder / "pairs.csv").write_text("\n".join(["image_path_1,image_path_2,label", *judged]))
    assert run(["--quiet", "embed", "data", *TINY]) == 0
    ways = (["--readout", "head"], ["--folds", "2"], ["--pairs", "pairs.csv"])
    for number, way in enumerate(ways):
        assert run([*_HEAD, *way, "--output-dir", f"runs{number}"]) == 0
    return tuple(next((folder / f"runs{n}").iterdir()) for n in range(3))


def answer(run: Path) -> str:
    """Everything that commands tell with a run: scores, probabilities, tiers, accuracy."""
    config = Config()
    config.evaluate.bootstrap_rounds = 2
    own, checkpoint = run_of_checkpoint(run)
    model = load_score_model(checkpoint)
    store = FeatureStore.open(Path("cache") / model.info.fingerprint_id)
    hashes = sorted(store.valid_hashes(next(iter(store.series()))))
    said: list[object] = [model.score(store, hashes).tolist(), load_calibration(model).to_dict()]
    said.append(made_with(model, hashes))
    said.append(evaluate_split(model, "test", config).report.to_dict())
    held_out = load_held_out(run, model.info.tiers)
    said.append(held_out and (held_out.scores.tolist(), held_out.ids))
    said += [evaluate_pairs(model, "val", config), find_anchors(model, Path("cache"))]
    said += [len(load_plan(own).images) if own.has(FOLDS_FILE) else None, own.info["status"]]
    return repr(said)


def damages(data: bytes, flips: int, rng: random.Random) -> Iterator[tuple[str, bytes | None]]:
    """What may become of a file: a name of the damage, and what is there then (None: nothing)."""
    for _ in range(flips):
        position, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
        flipped = bytes([data[position] ^ bit])
        yield f"bit {bit} of byte {position}", data[:position] + flipped + data[position + 1 :]
    yield "emptied", b""
    yield "zero-filled", bytes(len(data))
    yield "cut", data[: rng.randrange(1, len(data))]
    yield "a zero block", data[: len(data) // 2] + bytes(len(data) - len(data) // 2)
    yield "gone", None


#: Files that no answer depends on; `verify` alone looks at them.
RECORDS = ("config.yaml", "last_model.pt", "evaluation_out_of_fold.json")


def spoil(run: Path, flips: int, seed: int, told: Callable[[str | None], object]) -> None:
    """Damage each file of a run in turn: an error that names it, or the very same answer.

    Args:
        run: in the working folder of :func:`make_runs`.
        flips: bits of each file.
        seed: of the positions.
        told: called with each trial's failure, None where all was well.
    """
    rng, right = random.Random(seed), answer(run)
    for path in [run / "files.json", *(run / name for name in listed_files(run))]:
        data = path.read_bytes()
        for how, content in damages(data, flips, rng):
            if content == data:
                continue
            path.unlink()
            if content is not None:
                path.write_bytes(content)
            failure = None
            try:
                same = answer(run) == right
                # A list that lost a name, or is gone, changes no answer.
                if not same or path.name not in ("files.json", *RECORDS):
                    failure = f"{path.name}, {how}: {'passed over' if same else 'ANOTHER ANSWER'}"
            except MiripError as error:
                if path.name not in str(error) and path.name != "files.json":
                    failure = f"{path.name}, {how}: not named by {error}"
            except Exception as error:
                failure = f"{path.name}, {how}: {type(error).__name__}: {error}"
            told(failure)
            path.unlink(missing_ok=True)
            path.write_bytes(data)
