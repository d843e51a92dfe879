"""Where backbones come from: folders, copied caches, the hub; what is missing or damaged there is named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mirip_fast.data.hashes import HashMemory
from mirip_fast.errors import BackboneError
from mirip_fast.features.backbone import load_backbone
from mirip_fast.features.backbone_files import BackboneSpec, find_backbone, locate

Models = Callable[[str], Path]
LARGE = "facebook/dinov2-large"


def spec_of(name: str | Path) -> BackboneSpec:
    with HashMemory(None) as hashes:
        return find_backbone(str(name), hashes.sha256)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cached(cache: Path, folder: Path, name: str = "someone/model") -> Path:
    """``folder`` in a cache as the hub lays it out, with links to blobs; returns the snapshot."""
    model = cache / f"models--{name.replace('/', '--')}"
    snapshot = model / "snapshots" / ("a" * 40)
    for where in (model / "blobs", model / "refs", snapshot):
        where.mkdir(parents=True)
    (model / "refs" / "main").write_text("a" * 40)
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, model / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def hub(monkeypatch: pytest.MonkeyPatch, *answers: object) -> list[object]:
    """A hub that is reached and gives these answers, one per call; returns those not given yet."""
    import huggingface_hub
    from huggingface_hub import constants

    left = list(answers)

    def answer(name: str, *file: str, **how: object) -> str:
        value = left.pop(0)
        if isinstance(value, Exception):
            raise value
        return str(value(**how) if callable(value) else value)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", answer)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return left


def http(kind: str, status: int) -> Exception:
    """An error as ``huggingface_hub`` raises it for an answer of the hub."""
    from types import SimpleNamespace

    from huggingface_hub import errors

    answer = SimpleNamespace(status_code=status, headers={}, request=None)
    error: Exception = getattr(errors, kind)(f"{status} Client Error.", response=answer)
    return error


def test_a_failing_download_is_tried_again_and_told(
    monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    left = hub(monkeypatch, *[ConnectionError("no route to host")] * 3)
    with pytest.raises(BackboneError) as error:
        locate(LARGE, attempts=3, pause_s=0)
    assert not left
    for text in (LARGE, str(cache), "hf download", "--backbone DIR", "no route to host"):
        assert text in str(error.value)


def test_a_download_that_works_at_last_is_used(
    model_dir: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = hub(monkeypatch, ConnectionError("once"), model_dir("dinov2"))
    assert locate("someone/model", pause_s=0) == model_dir("dinov2") and not left


def test_a_download_that_broke_off_is_gone_on_with(
    model_dir: Models, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = model_dir("dinov2")
    part = cached(cache, whole)
    (part / "model.safetensors").rename(part / "model-00001-of-00002.safetensors")
    weights = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (part / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    with pytest.raises(
        BackboneError, match=r"model-00002-of-00002\.safetensors, which is not there"
    ):
        locate("someone/model")  # offline
    left = hub(monkeypatch, whole)
    assert locate("someone/model", pause_s=0) == whole and not left
    shutil.copy(whole / "model.safetensors", part / "model-00002-of-00002.safetensors")
    assert locate("someone/model", pause_s=0) == part


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (("GatedRepoError", 403), "gated.*hf auth login"),
        (
            ("RepositoryNotFoundError", 401),
            r"no such model(.|\n)*Did you mean facebook/dinov2-large",
        ),
        (("HfHubHTTPError", 401), "refuses the login.*hf auth login"),
        (("HfHubHTTPError", 503), "answers 503"),
        ("LocalEntryNotFoundError", "no connection to the hub"),
        ("HFValidationError", "what is wrong"),
    ],
)
def test_errors_of_the_hub_keep_their_meaning(
    monkeypatch: pytest.MonkeyPatch, error: str | tuple[str, int], told: str
) -> None:
    from huggingface_hub import errors

    raised = (
        http(*error) if isinstance(error, tuple) else getattr(errors, error)("what is wrong\nmore")
    )
    left = hub(monkeypatch, raised, "never")
    with pytest.raises(BackboneError, match=told):
        locate("facebook/dinov2-lrge", attempts=1, pause_s=0)
    assert left == ["never"]


def test_what_will_not_help_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for answer in (http("RepositoryNotFoundError", 404), http("GatedRepoError", 403), tmp_path):
        left = hub(monkeypatch, answer, "never")
        with pytest.raises(BackboneError):
            locate("someone/dataset", pause_s=0)
        assert left == ["never"]


def test_without_a_network_nothing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    left = hub(monkeypatch, "never")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BackboneError, match="HF_HUB_OFFLINE") as error:
        locate(LARGE, pause_s=0)
    assert left == ["never"] and "asked the hub" not in str(error.value)


@pytest.mark.parametrize("name", ["dinov2-large", "DINOv2-Large", "Facebook/dinov2-large"])
def test_a_known_name_needs_no_owner(
    name: str, model_dir: Models, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    snapshot = cached(cache, model_dir("dinov2"), LARGE)
    with caplog.at_level("INFO"):
        assert locate(name) == snapshot
    assert f"{name} is taken for {LARGE}" in caplog.text
    assert locate(f"https://huggingface.co/{LARGE}/") == snapshot


@pytest.mark.parametrize(
    "name", ["~nobody/m", "./m", "a\0b", "C:\\m", "a/b/c", "m" * 5000, "", "tiny_random"]
)
def test_names_of_all_kinds_are_told_and_never_a_fault(name: str) -> None:
    with pytest.raises(BackboneError):
        locate(name)


@pytest.mark.parametrize("name", ["facebook/dinov2-lrge", "dinov2_large", "google/dinov2-large"])
def test_a_name_that_is_nearly_right_is_told(name: str) -> None:
    with pytest.raises(BackboneError, match=f"Did you mean.*{LARGE}"):
        locate(name)


def test_a_folder_of_a_cache_means_its_snapshot(
    model_dir: Models, cache: Path, tmp_path: Path
) -> None:
    snapshot = cached(cache, model_dir("dinov2"))
    model = snapshot.parent.parent
    for given in (snapshot, snapshot.parent, model, Path(os.path.relpath(model))):
        assert locate(str(given)) == snapshot
    with pytest.raises(BackboneError, match="models--someone--model"):
        locate(str(cache))
    with pytest.raises(BackboneError, match=r"is a file; give its folder"):
        locate(str(snapshot / "config.json"))
    with pytest.raises(BackboneError, match="Did you mean .*models--someone--model"):
        locate(f"{model}l")
    (model / "refs" / "main").unlink()
    assert locate(str(model)) == snapshot
    shutil.copytree(snapshot, snapshot.with_name("b" * 40))
    with pytest.raises(BackboneError, match="2 snapshots"):
        locate(str(model))


def spoil(kind: str, file: Path) -> None:
    data = file.read_bytes()
    file.unlink()
    if kind == "link":
        file.symlink_to("../../blobs/gone")
    elif kind == "fifo":
        os.mkfifo(file)
    else:
        start = b"version https://git-lfs.github.com/spec/v1\noid sha256:00"
        contents = {"empty": b"", "lfs": start, "cut": data[:-40], "page": b"<!DOCTYPE html>" * 9}
        file.write_bytes(contents[kind])


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("link", r"is a link to ../../blobs/gone, which is not there"),
        ("empty", "is empty"),
        ("lfs", "Git LFS"),
        ("fifo", "no regular file"),
        ("cut", "(is cut off|cannot be read)"),
        ("page", "cannot be (loaded|read)"),
    ],
)
def test_damaged_copies_name_the_file(
    kind: str, told: str, file: str, model_dir: Models, cache: Path, tmp_path: Path
) -> None:
    shutil.copytree(model_dir("dinov2"), tmp_path / "m")
    snapshot = cached(cache, model_dir("dinov2"))
    for folder, name in ((tmp_path / "m", tmp_path / "m"), (snapshot, "someone/model")):
        spoil(kind, folder / file)
        with pytest.raises(BackboneError, match=told) as error:
            spec_of(name)
        assert file in str(error.value)


def test_pickled_weights_are_read_as_tensors_and_nothing_else(
    model_dir: Models, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pickled = tmp_path / "pickled"
    shutil.copytree(model_dir("dinov2"), pickled)
    state = load_file(pickled / "model.safetensors")
    (pickled / "model.safetensors").unlink()
    config = tmp_path / "config"
    shutil.copytree(pickled, config)
    torch.save(state, pickled / "pytorch_model.bin")

    def answer(allow_patterns: list[str]) -> Path:
        return pickled if "pytorch_model*.bin" in allow_patterns else config

    left = hub(monkeypatch, answer, answer)
    assert locate("someone/old") == pickled and not left
    snapshot = cached(cache, pickled)
    image = torch.randint(256, (1, 32, 32, 3), dtype=torch.uint8)
    features = []
    for name in (model_dir("dinov2"), "someone/model"):
        backbone = load_backbone(spec_of(name), torch.device("cpu"), "fp32")
        features.append(backbone.tokens(backbone.normalise(image))[0])
    assert torch.equal(*features)
    (snapshot / "pytorch_model.bin").unlink()
    torch.save({**state, "more": Path("x")}, snapshot / "pytorch_model.bin")
    with pytest.raises(BackboneError, match="never read") as error:
        load_backbone(spec_of("someone/model"), torch.device("cpu"), "fp32")
    assert "weights_only" not in str(error.value)


def test_preprocessing_that_was_not_cached_is_asked_for(
    model_dir: Models,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    snapshot = cached(cache, model_dir("dinov2"))
    (snapshot / "preprocessor_config.json").unlink()
    left = hub(monkeypatch, model_dir("dinov2") / "preprocessor_config.json")
    assert spec_of("someone/model").mean == (0.4, 0.5, 0.6) and not left
    assert "ImageNet" not in caplog.text
    hub(monkeypatch, *[http("RemoteEntryNotFoundError", 404)] * 2)
    assert spec_of("someone/model").mean == (0.485, 0.456, 0.406)
    assert "ImageNet" in caplog.text
