"""Which settings a sweep tries: the words of ``--grid``, and the cells that they make.

``learning_rate=1e-4,3e-4`` lists values; ``learning_rate=1e-5..1e-3`` is a range to draw from, evenly in the
logarithm where it spans a factor of ten or more (Bergstra & Bengio 2012 on random search).
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mirip_fast.config import Config
from mirip_fast.errors import ConfigError
from mirip_fast.settings import Setting, settings, yaml_text

#: Settings of these sections can be swept, but for those that do not change what is learned.
_SECTIONS = ("head", "train")
_FIXED = {
    "name", "output_dir", "folds", "bootstrap", "save_every_n_epochs", "save_total_limit", "seed",
}  # fmt: skip

#: Cells that a grid may have: more take days, and a table of them is read by nobody.
_MOST_CELLS = 5_000


@dataclass(frozen=True)
class Axis:
    """One setting and what it may be.

    Attributes:
        setting: which one.
        values: the listed values; empty for a range.
        low, high: the ends of a range.
    """

    setting: Setting
    values: tuple[Any, ...] = ()
    low: float = math.nan
    high: float = math.nan

    def draw(self, rng: np.random.Generator) -> Any:
        """A random value."""
        if self.values:
            return self.values[int(rng.integers(len(self.values)))]
        if self.low > 0 and self.high / self.low >= 10:
            value = math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        else:
            value = rng.uniform(self.low, self.high)
        value = min(max(value, self.low), self.high)
        return round(value) if self.setting.kind is int else float(f"{value:.3g}")


#: Dotted key → value: how a cell differs from the configuration it starts from.
Cell = Mapping[str, Any]


def parse_axes(specs: Sequence[str]) -> list[Axis]:
    """The axes that ``--grid`` options name.

    Args:
        specs: texts like ``learning_rate=1e-4,3e-4``, ``head.features=cls,cls+mean`` or
            ``weight_decay=1e-4..1``.

    Raises:
        ConfigError: an unknown setting, a wrong value, or a setting that is named twice; all together.
    """
    axes: list[Axis] = []
    problems = []
    for spec in specs:
        try:
            axis = _parse_axis(spec)
            if any(axis.setting.key == other.setting.key for other in axes):
                raise ConfigError(
                    f"{axis.setting.name} is there twice; list its values with commas"
                )
            axes.append(axis)
        except ConfigError as error:
            problems.append(f"--grid {spec}: {error}")
    if problems:
        raise ConfigError("\n".join(problems))
    return axes


def make_cells(axes: Sequence[Axis], random: int | None, seed: int) -> list[dict[str, Any]]:
    """The cells of a sweep; the first one is empty: the configuration as it is.

    Args:
        axes: what varies.
        random: how many cells to draw; None takes the whole grid.
        seed: of the draw.

    Raises:
        ConfigError: nothing varies, a range without ``random``, or too many cells.
    """
    if not axes:
        raise ConfigError(
            "Say what to vary, like --grid learning_rate=1e-4,3e-4 --grid features=cls,cls+mean"
        )
    ranges = [axis.setting.name for axis in axes if not axis.values]
    size = math.prod(len(axis.values) for axis in axes)
    if random is None and ranges:
        raise ConfigError(f"{ranges[0]} is a range: say how many cells to draw with --random N")
    if random is None or (not ranges and random >= size):
        if size > _MOST_CELLS:
            raise ConfigError(f"The grid has {size:,} cells; draw some of them with --random N")
        rows = itertools.product(*(axis.values for axis in axes))
        cells = [_cell(axes, row) for row in rows]
    else:
        cells = _draw_cells(axes, random, seed)
    return [{}, *cells]


def configure(config: Config, cell: Cell) -> Config:
    """The configuration with a cell's values in it."""
    values = {name: dict(section) for name, section in config.to_dict().items()}
    for key, value in cell.items():
        section, name = key.split(".")
        values[section][name] = value
    sections = {
        field.name: type(getattr(config, field.name))(**values[field.name])
        for field in dataclasses.fields(Config)
    }
    return Config(**sections)


def sweepable(key: str) -> bool:
    """Whether a setting (a dotted key) is one that a sweep may vary."""
    section, _, name = key.partition(".")
    return section in _SECTIONS and name not in _FIXED


def cell_text(cell: Cell) -> str:
    """A cell as it would be typed: ``learning_rate=0.0003 features=cls+mean``."""
    words = [f"{key.split('.')[1]}={yaml_text(value)}" for key, value in cell.items()]
    return " ".join(words) or "(as configured)"


def _parse_axis(spec: str) -> Axis:
    name, equals, text = (part.strip() for part in spec.partition("="))
    if not equals or not text:
        raise ConfigError("write it as setting=value,value,…")
    setting = _find(name)
    low, dots, high = text.partition("..")
    if dots:
        if setting.kind not in (int, float) or setting.choices:
            raise ConfigError(f"{setting.name} has no range; list its values with commas")
        ends = [setting.parse(low), setting.parse(high)]
        if None in ends or not ends[0] < ends[1]:
            raise ConfigError(f"{text} is no range from a smaller number to a larger one")
        return Axis(setting, low=float(ends[0]), high=float(ends[1]))
    values = [setting.parse(part.strip()) for part in text.split(",")]
    return Axis(setting, tuple(dict.fromkeys(values)))


def _find(name: str) -> Setting:
    known = {s.name: s for s in settings(*_SECTIONS) if s.name not in _FIXED}
    known["dropout"] = known["projector_dropout"]
    if name in known:
        return known[name]
    for setting in known.values():
        if setting.key == name:
            return setting
    if name.rpartition(".")[2] == "seed":
        raise ConfigError("repeat every cell with other seeds by --seeds N")
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else f" There are: {', '.join(sorted(known))}."
    raise ConfigError(f"there is no setting {name!r} to vary.{hint}")


def _draw_cells(axes: Sequence[Axis], count: int, seed: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    cells: list[dict[str, Any]] = []
    # Ranges hardly ever repeat; lists do, and a cell that is there already is drawn again.
    for _ in range(1000 * count):
        cell = _cell(axes, [axis.draw(rng) for axis in axes])
        if cell not in cells:
            cells.append(cell)
        if len(cells) == count:
            break
    return cells


def _cell(axes: Sequence[Axis], values: Sequence[Any]) -> dict[str, Any]:
    return {axis.setting.key: value for axis, value in zip(axes, values, strict=True)}
