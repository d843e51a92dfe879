"""What every test starts from: the same random numbers, one thread, no network; models and data to use."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Generator
from importlib import resources
from pathlib import Path
from typing import Any

# Threads that wait for each other only cost time here.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["LC_ALL"] = "C.UTF-8"  # commands speak English, whatever the terminal's language

import numpy as np
import pytest
import torch
from made_run import TINY, Restored, make_noisy_data
from PIL import Image
from small_models import MODEL_KINDS

from mirip_fast.evaluation import plots
from mirip_fast.ranking import finished
from mirip_fast.runtime import set_seed

torch.set_num_threads(1)
# A shell has what it starts in the background ignore Ctrl-C, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


_SAVE_FIGURE = plots.save_figure
_SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "patch_size": 8, "image_size": 32,
}  # fmt: skip


@pytest.fixture
def decoded_elsewhere(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and from then on decoding a file in this process fails, but for the picture of the package."""
    own = resources.files("mirip_fast.features").joinpath("canary.jpg").read_bytes()
    real = Image.open

    def open_image(source: Any, *arguments: Any, **options: Any) -> Image.Image:
        if sys._getframe(1).f_globals["__name__"].startswith("mirip_fast."):
            assert source.getvalue() == own, "decoded without protection"
        return real(source, *arguments, **options)

    return lambda: monkeypatch.setattr(Image, "open", open_image)


@pytest.fixture(autouse=True)
def _afresh() -> None:
    """No test finds the random numbers of another, nor the terminal to which a command had logged."""
    set_seed(0)
    package = logging.getLogger("mirip_fast")
    package.handlers, package.propagate = [], True
    package.setLevel(logging.NOTSET)


def _blank(figure: Any, path: Path, **_: Any) -> Path:
    Image.new("RGB", (1, 1)).save(path, "PNG")
    return path


@pytest.fixture(scope="session", autouse=True)
def _undrawn() -> Generator[None, None, None]:
    """To draw its pictures takes longer than all else that a small training does: see ``drawn``."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (plots, finished):
            patch.setattr(module, "save_figure", _blank)
        yield


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are really drawn."""
    for module in (plots, finished):
        monkeypatch.setattr(module, "save_figure", _SAVE_FIGURE)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Kind → directory of a small model with weights and preprocessor_config.json; not to be changed."""
    folder = tmp_path_factory.mktemp("models")

    def get(kind: str) -> Path:
        if not (folder / kind).exists():
            _save_model(folder / kind, kind)
        return folder / kind

    return get


def _save_model(folder: Path, kind: str) -> None:
    import transformers

    torch.manual_seed(0)
    names = {
        "dinov2": "Dinov2", "registers": "Dinov2WithRegisters", "dinov3": "DINOv3ViT", "vit": "ViT",
        "siglip": "SiglipVision", "siglip2": "Siglip2Vision", "clip": "CLIPVision",
    }  # fmt: skip
    config_class, model_class = (
        getattr(transformers, names[kind] + part) for part in ("Config", "Model")
    )
    more = {"num_register_tokens": MODEL_KINDS[kind]} if MODEL_KINDS.get(kind) else {}
    more |= {"num_patches": 16} if kind == "siglip2" else {}  # 32 pixels, 8 a patch
    model_class(config_class(**_SMALL, **more)).save_pretrained(folder)
    settings = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.3, 0.2, 0.25]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


@pytest.fixture
def graded_folder(tmp_path: Path) -> Path:
    """A data folder of 40 pictures in 4 tiers: the better the tier, the brighter."""
    folder = tmp_path / "graded"
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = ["image_id,filename,tier,department"]
    for i in range(40):
        tier = i % 4
        pixels = rng.normal(230 - 50 * tier, 20, (32, 32, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"work_{i:02d}.png")
        rows.append(f"id{i:02d},work_{i:02d}.png,{'SABC'[tier]},{'회화' if i % 8 < 4 else '조소'}")
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def one_head(tmp_path_factory: pytest.TempPathFactory) -> Restored:
    train = ["train", "--head-only", "--epochs", "4"]
    return Restored(tmp_path_factory.mktemp("head"), 40, ["embed", "data", *TINY], train)


@pytest.fixture
def headed(one_head: Restored, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: 40 graded works in data/, embedded, and a finished head-only run."""
    return one_head(monkeypatch)


@pytest.fixture(scope="session")
def one_calibrated(tmp_path_factory: pytest.TempPathFactory) -> Restored:
    shares = ["--train-ratio", "0.5", "--val-ratio", "0.3", "--test-ratio", "0.2"]
    commands = ["embed", "data", *TINY], ["train", "--head-only", "--epochs", "6", *shares]
    return Restored(tmp_path_factory.mktemp("noisy"), 160, *commands, make=make_noisy_data)


@pytest.fixture
def calibrated(one_calibrated: Restored, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a head-only run on 160 works, 48 of them held out: four times 12."""
    return one_calibrated(monkeypatch)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """Names that are no UTF-8, which tests print, cannot go from one process of the suite to another."""
    return _printable((yield))


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {key: _printable(item) for key, item in value.items()}
    return type(value)(map(_printable, value)) if isinstance(value, list | tuple) else value
