"""What the benchmarks share: measuring, and printing tables of ratios.

Every ratio compares two things measured in the same run, in turns, so that a machine that others use too
disturbs both alike; a table shows medians. Times of the clock are those that count; processor seconds
stand beside them, as they hardly depend on who else uses the machine.
"""

from __future__ import annotations

import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mirip_fast.evaluation.text_table import format_table
from mirip_fast.runtime import usable_cores


@dataclass
class Cost:
    """What something cost: seconds on the clock, and processor seconds with those of its processes."""

    wall: float = 0.0
    cpu: float = 0.0


def _cpu_seconds() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


@contextmanager
def measured() -> Iterator[Cost]:
    """Measure the block; processes that it started count once they have ended."""
    cost = Cost()
    wall, cpu = time.perf_counter(), _cpu_seconds()
    yield cost
    cost.wall, cost.cpu = time.perf_counter() - wall, _cpu_seconds() - cpu


def in_turns(
    rounds: int,
    pick: Callable[[Iterable[float]], float] = statistics.median,
    **actions: Callable[[], object],
) -> dict[str, Cost]:
    """Run each action once per round, in turns; gives the median cost of each, or what ``pick`` picks."""
    costs: dict[str, list[Cost]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            with measured() as cost:
                action()
            costs[name].append(cost)
    return {
        name: Cost(pick(c.wall for c in all_), pick(c.cpu for c in all_))
        for name, all_ in costs.items()
    }


def verdict(value: float, *, most: float | None = None, least: float | None = None) -> str:
    """Whether a figure meets its goal, in a word."""
    if most is None and least is None:
        return ""
    met = (most is None or value <= most) and (least is None or value >= least)
    return "met" if met else "NOT met"


def goal(*, most: float | None = None, least: float | None = None) -> str:
    """A goal as text."""
    return f"≤ {most:g}" if most is not None else f"≥ {least:g}" if least is not None else ""


@dataclass
class Line:
    """One line of a table: a figure and, where there is one, its goal."""

    what: str
    value: float
    unit: str = ""  # empty: a ratio
    most: float | None = None
    least: float | None = None

    def cells(self) -> tuple[str, str, str, str]:
        """As text."""
        text = f"{self.value:.4g}{' ' + self.unit if self.unit else ''}"
        goal_ = goal(most=self.most, least=self.least)
        return self.what, text, goal_, verdict(self.value, most=self.most, least=self.least)


def show(title: str, lines: Sequence[Line]) -> None:
    """Print a table."""
    cells = [line.cells() for line in lines]
    print(f"\n{title}")
    print(format_table(("measured", "figure", "goal", ""), cells, align="lrrl"), flush=True)


def machine() -> str:
    """One line that says where the figures come from."""
    import torch

    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [
            x.split(":", 1)[1].strip() for x in info.read_text().splitlines() if "model name" in x
        ]
        name = models[0] if models else name
    load = f", load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{name}{gpu}, {usable_cores()} cores, torch {torch.__version__}, "
        f"Python {platform.python_version()}{load}"
    )
