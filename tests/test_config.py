"""Settings: where their values come from, what is refused, and what is said then."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path

import pytest

from mirip_fast.config import Config
from mirip_fast.errors import ConfigError
from mirip_fast.settings import config_from_dict, resolve, settings, to_yaml

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def yaml_file(tmp_path: Path, text: str, name: str = "mirip.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def errors_of(*files: Path, **given: object) -> list[str]:
    with pytest.raises(ConfigError) as error:
        resolve(files, {key.replace("__", "."): value for key, value in given.items()})
    return str(error.value).splitlines()


def test_every_setting_says_what_it_is() -> None:
    declared = list(settings())
    assert len({setting.key for setting in declared}) == len(declared)
    for setting in declared:
        assert setting.help.endswith("."), setting.key
        assert setting.kind in (str, int, float, bool), setting.key
        assert setting.parse(setting.default) == setting.default, setting.key
        assert setting.flag.startswith("--"), setting.key
    for section in dataclasses.fields(Config):
        flags = [setting.flag for setting in settings(section.name)]
        assert flags and len(set(flags)) == len(flags), section.name


def test_defaults_are_overridden_by_files_and_those_by_flags(tmp_path: Path) -> None:
    project = yaml_file(
        tmp_path, "train: {epochs: 5, margin: 2, eps: 1e-7}\nhead: {features: mean}"
    )
    other = yaml_file(tmp_path, "train: {margin: 3}", "other.yaml")
    resolved = resolve((project, other), {"train.eps": 1e-6, "train.name": None})
    train = resolved.config.train
    assert (train.epochs, train.margin, train.eps) == (5, 3.0, 1e-6)
    assert train.gradient_clip_norm == 1.0 and resolved.config.head.features == "mean"
    assert resolved.given == {"train.epochs", "train.margin", "train.eps", "head.features"}


def test_auto_on_the_command_line_overrides_a_file(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "train: {epochs: 5, batch_size: auto, name: null}")
    assert resolve((path,)).config.train.epochs == 5
    assert resolve((path,), {"train.epochs": "auto"}).config.train.epochs is None
    assert resolve((path,)).config.train.batch_size is None
    assert resolve((path,)).config.train.name is None


def test_a_choice_may_be_called_auto() -> None:
    assert resolve((), {"runtime.device": "auto"}).config.runtime.device == "auto"
    assert resolve((), {"train.preset": "auto"}).config.train.preset == "auto"


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", ".001", "'0.001'"])
def test_numbers_however_yaml_reads_them(tmp_path: Path, text: str) -> None:
    path = yaml_file(tmp_path, f"train:\n  learning_rate: {text}\n  epochs: 1e2\n")
    train = resolve((path,)).config.train
    assert train.learning_rate == 0.001 and train.epochs == 100
    assert isinstance(train.epochs, int) and isinstance(train.learning_rate, float)


def test_a_list_is_taken_for_names_with_commas(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "data: {tiers: [gold, 2, 브론즈]}\n")
    assert resolve((path,)).config.data.tiers == "gold,2,브론즈"


def test_unknown_keys_come_with_a_suggestion(tmp_path: Path) -> None:
    path = yaml_file(
        tmp_path, "train: {epocs: 3, backbone: x, zzz: 1}\ntrian: {a: 3}\nepochs: 3\nqqq: 1\n"
    )
    assert errors_of(path, train__lr=1) == [
        f"{path}: Unknown key 'train.epocs'. Did you mean 'train.epochs'?",
        f"{path}: Unknown key 'train.backbone'. Did you mean 'embed.backbone'?",
        f"{path}: Unknown key 'train.zzz'. `mirip-fast config` lists every key.",
        f"{path}: Unknown key 'trian'. Did you mean 'train'?",
        f"{path}: Unknown key 'epochs'. Did you mean 'train.epochs'?",
        f"{path}: Unknown key 'qqq'. `mirip-fast config` lists every key.",
        "Unknown key 'train.lr'. `mirip-fast config` lists every key.",
    ]


def test_all_faults_of_all_places_are_told_at_once(tmp_path: Path) -> None:
    first = yaml_file(tmp_path, "train: {epochs: 1.5, margin: -1, loss: margn}\nembed: 3\n")
    second = yaml_file(tmp_path, "- a\n- b\n", "list.yaml")
    third = yaml_file(tmp_path, "train: {epochs: [\n", "broken.yaml")
    absent = tmp_path / "absent.yaml"
    lines = errors_of(first, second, third, absent, head__projector_dropout=2, train__seed="x")
    assert lines[:4] == [
        f"{first}: train.epochs: 1.5 is no whole number or auto",
        f"{first}: train.margin: -1.0 is below 0",
        f"{first}: train.loss: 'margn' is none of margin, logistic. Did you mean 'margin'?",
        f"{first}: 'embed' is a section; write its settings below it, indented",
    ]
    assert lines[4].startswith(f"{second}: sections are expected")
    assert lines[5].startswith(f"{third}: ") and "line" in lines[5]
    assert lines[6].startswith(f"{absent}: there is no such file; these come along: classic.yaml, ")
    assert lines[7] == "--projector-dropout: head.projector_dropout: 2.0 is above 0.99"
    assert lines[8] == "--seed: train.seed: 'x' is no whole number"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.epochs", True),
        ("train.epochs", math.inf),
        ("train.epochs", math.nan),
        ("train.epochs", [3]),
        ("train.margin", math.inf),
        ("train.margin", math.nan),
        ("train.margin", "wide"),
        ("tracking.wandb_log_model", "yes"),
        ("tracking.wandb_log_model", 1),
        ("train.name", {"a": 1}),
        ("train.name", True),
        ("data.tiers", [True, False]),
        ("data.tiers", [["S"], ["A"]]),
        ("train.margin", None),
        ("embed.image_size", "auto"),
        ("train.batch_size", 1),
    ],
)
def test_values_of_another_kind_are_refused(key: str, value: object) -> None:
    setting = next(setting for setting in settings() if setting.key == key)
    with pytest.raises(ConfigError):
        setting.parse(value)


def test_an_empty_file_or_section_changes_nothing(tmp_path: Path) -> None:
    for text in ("", "# nothing\n", "train:\nembed:\n"):
        resolved = resolve((yaml_file(tmp_path, text),))
        assert resolved.config == Config() and not resolved.given


@pytest.mark.parametrize("comments", [False, True])
def test_what_is_written_reads_the_same(tmp_path: Path, comments: bool) -> None:
    config = Config()
    config.data.tiers = "금,은,동 🥉"
    config.data.separator = "\t"
    config.data.image_root = "C:\\pictures: #1 'a' \"b\""
    config.train.name = "true"
    config.train.output_dir = "1e3"
    config.train.eps = 0.1 + 0.2
    config.train.epochs = 7
    config.tracking.wandb_notes = "two\nlines, and...\n\n  an indent ..."
    config.tracking.wandb_tags = "null"
    config.tracking.wandb_log_model = True
    path = yaml_file(tmp_path, to_yaml(config, comments=comments))
    assert resolve((path,)).config == config


def test_only_chosen_settings_are_written() -> None:
    text = to_yaml(Config(), only=frozenset({"train.margin", "embed.tta"}))
    assert text == "embed:\n  tta: none\ntrain:\n  margin: 1\n"


def test_a_kept_dict_reads_the_same_and_may_be_of_another_version() -> None:
    config = Config()
    config.train.learning_rate, config.embed.tta = 3e-4, "full"
    kept = config.to_dict()
    assert config_from_dict(kept) == config
    kept["train"]["of_the_future"] = 1
    del kept["evaluate"]
    assert config_from_dict({**kept, "later": {"x": 1}, "odd": 3}) == config  # type: ignore[dict-item]


def test_every_shipped_file_loads() -> None:
    files = sorted(CONFIGS.glob("*.yaml"))
    assert files
    for path in files:
        resolve((path,))
    assert resolve((CONFIGS / "default.yaml",)).config == Config()


LAUGHS = "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9 if i else ['ha'] * 9)}]\n" for i in range(10)
)
HOSTILE = {
    "nested": ("train: " + "[" * 20_000, "line 1: nested 21 deep"),
    "indented": ("".join(" " * i + "a:\n" for i in range(300)), "nested 21 deep"),
    "billions": (LAUGHS + "train: {epochs: *a9}", "21 references"),
    "itself": ("train: &a {epochs: *a}", "no whole number|reference"),
    "merged itself": ("train: &a {<<: *a}", "reference"),
    "long": ("#" * 5_000_000, "more than 64 KiB"),
    "digits": ("train: {epochs: " + "9" * 5000 + "}", "Exceeds the limit"),
    "large": ("train: {epochs: " + "9" * 400 + "}", "is no whole number"),
    "date": ("train: {epochs: 2001-99-99}", "month must be"),
    "text": ("train: {epochs: " + "x" * 50_000 + "}", "is no whole number"),
    "many": ("train:\n" + "".join(f"  k{i}: 1\n" for i in range(2000)), "and 1980 more"),
    "twice": ("train: {epochs: 3}\ntrain: {seed: 4}", "line 2: 'train' stands here for the second"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_files_that_are_no_settings_are_told_in_few_words(tmp_path: Path, name: str) -> None:
    text, told = HOSTILE[name]
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=told) as error:
        resolve((path,))
    assert str(error.value).startswith(f"{path}: ") and len(str(error.value)) < 20_000


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(ConfigError, match=f"{path}: this is no file"):
            resolve((path,))
