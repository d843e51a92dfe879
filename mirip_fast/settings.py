"""The settings of :mod:`mirip_fast.config` as people give them: checked, read from YAML, written as YAML."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirip_fast.config import Config
from mirip_fast.errors import ConfigError

# More than any settings need, and little enough to be read in no time.
_MOST_BYTES, _MOST_DEPTH, _MOST_REFERENCES, _MOST_PROBLEMS = 64 << 10, 20, 20, 20


@dataclass(frozen=True)
class Setting:
    """One declared setting of the tree, as the command line and the documentation see it."""

    section: str
    name: str
    kind: type  # str, int, float or bool
    optional: bool  # whether auto is accepted
    default: Any
    help: str
    choices: tuple[str, ...]
    low: float | None
    high: float | None
    flag: str
    several: bool  # the flag may be given several times

    @property
    def key(self) -> str:
        """The dotted name used in YAML and messages, e.g. ``train.epochs``."""
        return f"{self.section}.{self.name}"

    @property
    def default_text(self) -> str:
        """The default as a user would type it."""
        return yaml_text(self.default)

    def parse(self, value: Any) -> Any:
        """``value`` (from YAML or the command line) as this setting's type.

        Raises:
            ConfigError: wrong type, unknown choice, or out of range. The message has no key in it.
        """
        if value is None or (isinstance(value, str) and value == "auto" and self.optional):
            if self.optional:
                return None
            raise ConfigError(f"needs a value ({self._expected()})")
        parsed = self._convert(value)
        if self.choices and parsed not in self.choices:
            close = difflib.get_close_matches(str(parsed), self.choices, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"{_short(repr(parsed))} is none of {', '.join(self.choices)}.{hint}")
        if isinstance(parsed, int | float) and not isinstance(parsed, bool):
            if self.low is not None and not parsed >= self.low:
                raise ConfigError(f"{parsed} is below {self.low:g}")
            if self.high is not None and not parsed <= self.high:
                raise ConfigError(f"{parsed} is above {self.high:g}")
        return parsed

    def _convert(self, value: Any) -> Any:
        wrong = ConfigError(f"{_short(repr(value))} is no {self._expected()}")
        if self.kind is bool:
            if isinstance(value, bool):
                return value
            raise wrong
        if self.kind is str:
            parts = value if isinstance(value, list) else [value]  # tiers: [S, A, B, C]
            if any(isinstance(part, dict | list | bool) for part in parts):
                raise wrong
            return ",".join(str(part) for part in parts)
        if isinstance(value, bool):
            raise wrong
        try:
            number = float(value)  # PyYAML reads 1e-3 as a string
        except (TypeError, ValueError, OverflowError):
            raise wrong from None
        if not math.isfinite(number):
            raise wrong
        if self.kind is int:
            if number != int(number):
                raise wrong
            return int(number)
        return number

    def _expected(self) -> str:
        words = {str: "text", int: "whole number", float: "number", bool: "true or false"}
        return words[self.kind] + (" or auto" if self.optional else "")


def settings(*sections: str) -> Iterator[Setting]:
    """All declared settings, or those of the given sections, in order."""
    hints_of_tree = typing.get_type_hints(Config)
    for section in dataclasses.fields(Config):
        if sections and section.name not in sections:
            continue
        section_type = hints_of_tree[section.name]
        hints = typing.get_type_hints(section_type)
        for item in dataclasses.fields(section_type):
            hint = hints[item.name]
            optional = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
            kind = (
                next(t for t in typing.get_args(hint) if t is not type(None)) if optional else hint
            )
            flag = item.metadata["flag"] or "--" + item.name.replace("_", "-")
            said = {**item.metadata, "flag": flag}
            yield Setting(section.name, item.name, kind, optional, item.default, **said)


@dataclass(frozen=True)
class Resolved:
    """A configuration and where its values came from."""

    config: Config
    given: frozenset[str]  # dotted keys that YAML or the command line set


def resolve(files: tuple[Path, ...] = (), given: Mapping[str, Any] | None = None) -> Resolved:
    """Defaults, overridden by each YAML file in turn, overridden by the command line.

    Args:
        files: YAML files, later ones win. All their errors are reported together.
        given: dotted key → value from the command line; a value of ``None`` was not given.

    Raises:
        ConfigError: unknown keys and wrong values, one line each, with a suggestion.
    """
    config = Config()
    known = {setting.key: setting for setting in settings()}
    problems: list[str] = []
    set_keys: set[str] = set()

    def assign(key: str, value: Any, where: str) -> None:
        setting = known.get(key)
        if setting is None:
            problems.append(
                f"{where}Unknown key '{_short(key)}'.{_did_you_mean(_short(key), known)}"
            )
            return
        try:
            setattr(getattr(config, setting.section), setting.name, setting.parse(value))
        except ConfigError as error:
            problems.append(f"{where}{key}: {error}")
        set_keys.add(key)

    for path in files:
        for key, value in _read_yaml(path, problems):
            assign(key, value, f"{path}: ")
    for key, value in (given or {}).items():
        if value is not None:
            assign(key, value, f"{known[key].flag}: " if key in known else "")
    if len(problems) > _MOST_PROBLEMS:
        problems[_MOST_PROBLEMS:] = [f"… and {len(problems) - _MOST_PROBLEMS} more"]
    if problems:
        raise ConfigError("\n".join(problems))
    return Resolved(config, frozenset(set_keys))


def config_from_dict(values: Mapping[str, Mapping[str, Any]]) -> Config:
    """A configuration from the nested dict that a run or a checkpoint keeps.

    Keys that this version does not know are left out: an older or newer run stays readable.
    """
    known = {setting.key: setting for setting in settings()}
    config = Config()
    if "embed" in values:  # what is not said there is as it was before it could be said
        config.embed.colours = "stored"
    for section, entries in values.items():
        for name, value in entries.items() if isinstance(entries, Mapping) else ():
            setting = known.get(f"{section}.{name}")
            if setting is not None:
                setattr(getattr(config, section), name, setting.parse(value))
    return config


def yaml_text(value: Any) -> str:
    """One value as YAML (and as typed on the command line): ``None`` is ``auto``."""
    import yaml

    if value is None:
        return "auto"
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    text: str = yaml.safe_dump(value, allow_unicode=True, width=10_000)
    return text.removesuffix("\n").removesuffix("...").strip()


def to_yaml(config: Config, *, comments: bool = False, only: frozenset[str] | None = None) -> str:
    """The configuration as YAML text.

    Args:
        config: what to write.
        comments: put each setting's help above it.
        only: dotted keys to write (default: all).
    """
    lines: list[str] = []
    section = ""
    for setting in settings():
        if only is not None and setting.key not in only:
            continue
        if setting.section != section:
            section = setting.section
            doc = (type(getattr(config, section)).__doc__ or "").strip()
            lines += ["", f"# {doc}"] if comments else []
            lines.append(f"{section}:")
        if comments:
            lines.append(f"  # {setting.help}")
        lines.append(
            f"  {setting.name}: {yaml_text(getattr(getattr(config, section), setting.name))}"
        )
    return "\n".join(lines).strip() + "\n"


def _read_yaml(path: Path, problems: list[str]) -> Iterator[tuple[str, Any]]:
    """The dotted keys and values of a YAML file; what is wrong with its shape goes to ``problems``."""
    shipped = shipped_settings()
    try:
        tree = _load_yaml(path if path.exists() else shipped.get(path.name, path))
    except FileNotFoundError:
        problems.append(f"{path}: there is no such file; these come along: {', '.join(shipped)}")
        return
    except (OSError, ValueError) as error:
        problems.append(f"{path}: {_short(' '.join(str(error).split()), 300)}")
        return
    if tree is None:
        return
    if not isinstance(tree, dict):
        problems.append(f"{path}: sections are expected, like 'train:' with settings below it")
        return
    sections = [section.name for section in dataclasses.fields(Config)]
    for section, entries in tree.items():
        if section not in sections:
            known = [*sections, *(setting.key for setting in settings())]
            problems.append(
                f"{path}: Unknown key '{_short(str(section))}'.{_did_you_mean(_short(str(section)), known)}"
            )
        elif isinstance(entries, dict):
            for name, value in entries.items():
                yield f"{section}.{name}", value
        elif entries is not None:
            problems.append(
                f"{path}: '{section}' is a section; write its settings below it, indented"
            )


def shipped_settings() -> dict[str, Path]:
    """Name → file of the settings that come along: ``configs/`` of the repository, also in the wheel."""
    package = Path(__file__).parent
    inside, beside = package / "configs", package.parent / "configs"
    folder = inside if inside.is_dir() else beside
    return {path.name: path for path in sorted(folder.glob("*.yaml"))}


def _load_yaml(path: Path) -> Any:
    """What a YAML file holds, as plain values.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no YAML, or none of a size and shape that settings have.
    """
    import yaml

    if path.exists() and not path.is_file():  # a pipe would be waited for, a device never ends
        raise ValueError("this is no file")
    with path.open("rb") as stream:
        data = stream.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise ValueError(f"more than {_MOST_BYTES >> 10} KiB are no settings")
    text = data.decode("utf-8-sig")
    try:
        depth = references = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            references += isinstance(event, yaml.AliasEvent)
            if depth > _MOST_DEPTH or references > _MOST_REFERENCES:
                deep = (
                    f"nested {depth} deep"
                    if depth > _MOST_DEPTH
                    else f"{references} references (*)"
                )
                line = event.start_mark.line + 1 if event.start_mark else 1
                raise ValueError(f"line {line}: {deep}: no settings are like that")
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _refuse_repeated_keys(node)
        return loader.construct_document(node)
    except RecursionError as error:
        raise ValueError("a reference (*) to what it stands in") from error
    except (yaml.YAMLError, OverflowError) as error:
        raise ValueError(str(error)) from error


def _refuse_repeated_keys(node: Any) -> None:
    """Of two sections or settings of one name YAML would take the later in silence."""
    import yaml

    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode) and key.value in seen:
            line = key.start_mark.line + 1
            raise ValueError(f"line {line}: '{_short(key.value)}' stands here for the second time")
        seen.add(str(key.value))
        _refuse_repeated_keys(value)


def _short(text: str, most: int = 80) -> str:
    return text if len(text) <= most else text[:most] + "…"


def _did_you_mean(key: str, known: typing.Iterable[str]) -> str:
    """A hint at a known key of a name like that of ``key``, of its own section where there is one."""
    names = list(known)
    section, _, wanted = key.rpartition(".")
    for pool in ([name for name in names if name.rpartition(".")[0] == section], names):
        by_end = {name.rpartition(".")[2]: name for name in pool}
        close = difflib.get_close_matches(wanted, by_end, n=1)
        if close:
            return f" Did you mean '{by_end[close[0]]}'?"
    return " `mirip-fast config` lists every key."
